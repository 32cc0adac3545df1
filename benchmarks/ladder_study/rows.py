"""Every row of the study, by name."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from .llama import LlamaLogits, make_llama
from .onecomp_peer import make_onecomp
from .ours import RUNGS, load_float, load_packed, make_float, make_preset, make_rung
from .protocol import ABLATION_TEXTS, TEXTS, Places
from .rounding import make_gptq, make_rounded


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        name: of its folder and its JSON.
        title: what the tables say.
        family: which table: "ladder", "ablation" or "peers"; the float model is in all of them.
        needs_preset: the preset that it is made with, which a release may not have.
        seed: of everything that is random in making it.
        make: (places, name, seed) -> what the tables need of its making; leaves files in the row's folder.
        load: (places, name) -> the model to score, None for the float model itself.
    """

    name: str
    title: str
    family: str
    make: Callable[[Places, str, int], dict[str, Any]]
    load: Callable[[Places, str], Any]
    seed: int = 0
    needs_preset: str | None = None

    @property
    def texts(self) -> tuple[str, ...]:
        """Keys of `TEXTS` that it is scored on."""
        if self.family == "float":
            return tuple(TEXTS)
        return tuple(text for text in TEXTS if (text in ABLATION_TEXTS) == (self.family == "ablation"))


def _load_llama(places: Places, name: str) -> LlamaLogits:
    return LlamaLogits(places, name, max(text.context for text in TEXTS.values()))


def _preset(preset: str, planes: int = 1, seed: int | None = None) -> Row:
    name = "-".join([preset, *(["2-planes"] if planes == 2 else []), *([] if seed is None else [f"seed{seed}"])])
    title = f"{preset}, {planes} plane{'s' if planes > 1 else ''}" + ("" if seed is None else f", seed {seed}")
    make = partial(make_preset, preset=preset, planes=planes)
    return Row(name, title, "ladder", make, load_packed, seed or 0, preset)


def _folder(name: str, title: str, make: Callable[[Places, str, int], dict[str, Any]]) -> Row:
    """A peer that leaves a dequantized float folder."""
    return Row(name, title, "peers", make, load_float)


def _llama(kind: str) -> Row:
    return Row(f"llama-{kind.lower()}", f"llama.cpp {kind}", "peers", partial(make_llama, kind=kind), _load_llama)


def _rung(rung: str) -> Row:
    titles = {
        "closed": "closed form, no data",
        "importance": "+ importance of inputs",
        "signs": "+ signs under the full Hessian",
        "prefix": "+ statistics of the quantized prefix",
        "correction": "+ corrected targets",
        "blocks": "+ block tuning",
        "distillation": "+ distillation",
        "flips": "+ gated flips",
    }
    return Row(f"rung-{rung}", titles[rung], "ablation", partial(make_rung, rung=rung), load_packed)


_ROWS = (
    Row("float", "float (bf16)", "float", make_float, lambda places, name: None),
    _preset("closed"),
    _preset("fast"),
    _preset("balanced"),
    _preset("best", seed=0),
    _preset("best", seed=1),
    _preset("best", planes=2, seed=0),
    _preset("best", planes=2, seed=1),
    _preset("fast", planes=2),
    *(_rung(rung) for rung in RUNGS),
    _folder("rtn-2bit-g64", "2 bits, groups of 64, rounded to nearest", partial(make_rounded, method="rtn")),
    _folder("search-2bit-g64", "2 bits, groups of 64, our search without data", partial(make_rounded, method="search")),
    _folder("gptq-2bit-g64", "2 bits, groups of 64, GPTQ with our search", make_gptq),
    *(_llama(kind) for kind in ("F16", "Q2_K", "TQ1_0", "TQ2_0", "IQ1_S", "IQ1_M", "IQ2_XXS", "Q1_0")),
    _folder("onecomp-balanced", "OneComp Onebit, its defaults", partial(make_onecomp, balancing=True)),
    _folder("onecomp-unbalanced", "OneComp Onebit, balancing off", partial(make_onecomp, balancing=False)),
)
ROWS = {row.name: row for row in _ROWS}
