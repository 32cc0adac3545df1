"""``MPQConfig``, and the config of either method from its JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_onebit.algorithms.groupwise import SEARCHES
from hf_onebit.choices import CHOICES, WITHIN_LAYER, Choice
from hf_onebit.config import CALIBRATION_CONTEXT, OneBitConfig, PackingConfig
from hf_onebit.config_checks import check_bool, check_group_size, check_targets, expect
from hf_onebit.formats.mpq import MAX_BITS, MIN_BITS
from hf_onebit.formats.onebit import FORMAT_VERSION
from hf_onebit.formats.table import KEYS
from hf_onebit.version import __version__

MPQ_PRESETS: dict[str, str] = {
    "closed": "the nearest weights: scales and zeros searched group by group; seconds, no text needed",
    "fast": "the nearest outputs: GPTQ on the quantized prefix, scales and zeros refitted, then distilled; minutes",
    "balanced": "the same with more text, each block's scales, zeros and rounding tuned, and codes distilled too; "
    "several times as long",
    "best": "the same with far more of all; many times as long",
}
# Tokens of calibration text that a preset is made for.
MPQ_CALIBRATION_TOKENS = {"closed": 16384, "fast": 81920, "balanced": 196608, "best": 786432}


class MPQConfig(PackingConfig):
    """How to quantize the linear layers of a model to codes of 1 to 8 bits in groups of inputs, W ≈ s q − z.

    Args:
        bits: width of one code, 1 to 8; or "auto": each layer gets one of ``choices``, so that all together lose least
            within ``target_bpw`` or ``target_size`` (docs/methods/auto_bits.md). How much a layer loses is measured on
            ``dataset``, or guessed from the weights where there is none.
        group_size: inputs that share a scale: a multiple of 32, or -1 for whole rows. The last group may be shorter.
        symmetric: no zeros: half as many statistics, and a code that means 0. It costs quality at few bits.
        act_order: groups are inputs of like importance, not neighbours (``q_perm`` in the file). It takes
            calibration data, and a preset other than ``closed``. The order in which columns are rounded follows their
            importance in either case.
        double_quant: store scales and zeros as codes of few bits themselves, which saves about two thirds of what they
            take. Weights are rounded for what is stored, so a reload gives the same
            model; a layer whose scales have changed since is saved without it.
        preset: which algorithms choose the bits; one of ``MPQ_PRESETS``.
        search: how ``closed`` finds scales and zeros: "mse" (least squares from a grid of clipped ranges), "min-max"
            (the range of each group, the quickest), or "half-quadratic" (a norm that large errors count less in). Other
            presets start from "mse".
        modules_to_not_convert, lm_head_bits, embedding_bits, head_group_size: as of ``OneBitConfig``. With
            ``bits="auto"`` and ``target_size``, the bits of head and embedding may be "auto" too: floating point, 8 or
            4.
        target_bpw: with ``bits="auto"``, bits per weight of the packed linear layers together (head apart), scales and
            biases included; never exceeded. Not stored.
        target_size: the same as a size of all weight files together, as of ``OneBitConfig``. Not stored.
        choices: with ``bits="auto"``, what there is to choose from: "1p" and "2p" (sign matrices of the method
            "onebit"), "3g64" (3 bits in groups of 64), "2.5g64" (several widths within a layer); None for
            ``hf_onebit.choices.CHOICES``. Not stored.
        consistent_groups: with ``bits="auto"``, layers that read one tensor (q/k/v, gate/up) get the same. Not stored.
        within_layer: with ``bits="auto"``, several widths within a layer are among the choices, the widest for the
            inputs that matter most. Not stored.
        dataset: what to calibrate on, as of ``OneBitConfig``. None means no data with ``preset="closed"``, and "self"
            with every other preset. With data, ``closed`` weighs each input by its mean square. Not stored.
        tokenizer, calibration_context, seed, spill, data_parallel, low_memory: as of ``OneBitConfig``. Not stored.
        calibration_tokens: how many tokens of ``dataset`` to use at the most; None for as many as the preset is made
            for (``MPQ_CALIBRATION_TOKENS``). Not stored.
        modules, untied, format_version: as of ``OneBitConfig``; written by quantization.
        dequantize, fuse_projections: as of ``OneBitConfig``. Not stored.

    Raises:
        ValueError: any value is of the wrong type or range, or a keyword is unknown; one message lists every problem.
    """

    method = "mpq"
    presets = MPQ_PRESETS
    preset_tokens = MPQ_CALIBRATION_TOKENS
    stored = (
        "quant_method",
        "format_version",
        "preset",
        "bits",
        "group_size",
        "symmetric",
        "act_order",
        "double_quant",
        "modules_to_not_convert",
        "modules",
    )
    stored_if_set = OneBitConfig.stored_if_set | {"search": "mse"}
    run_only = (
        "dataset",
        "tokenizer",
        "calibration_tokens",
        "calibration_context",
        "seed",
        "dequantize",
        "fuse_projections",
        "spill",
        "data_parallel",
        "low_memory",
        "target_bpw",
        "target_size",
        "choices",
        "consistent_groups",
        "within_layer",
    )

    def __init__(
        self,
        bits: int | str = 4,
        group_size: int = 64,
        symmetric: bool = False,
        act_order: bool = False,
        double_quant: bool = False,
        preset: str = "closed",
        search: str = "mse",
        modules_to_not_convert: list[str] | None = None,
        dataset: Any = None,
        tokenizer: Any = None,
        calibration_tokens: int | None = None,
        calibration_context: int = CALIBRATION_CONTEXT,
        seed: int = 0,
        modules: dict[str, dict[str, Any]] | None = None,
        format_version: int = FORMAT_VERSION,
        dequantize: bool = False,
        fuse_projections: bool = False,
        quant_method: str = "mpq",
        lm_head_bits: int | str | None = None,
        embedding_bits: int | str | None = None,
        head_group_size: int = 64,
        untied: bool = False,
        spill: bool = False,
        data_parallel: bool = True,
        low_memory: bool | None = None,
        target_bpw: float | None = None,
        target_size: int | str | None = None,
        choices: list[str] | None = None,
        consistent_groups: bool = False,
        within_layer: bool = False,
        **unknown: Any,
    ) -> None:
        self._refuse_unknown(unknown)
        self.quant_method = quant_method  # type: ignore[assignment]  # the base class types it as its own enum
        self.format_version = format_version
        self.preset = preset
        self.bits = bits
        self.group_size = group_size
        self.symmetric = symmetric
        self.act_order = act_order
        self.double_quant = double_quant
        self.search = search
        self.modules_to_not_convert = modules_to_not_convert
        self.modules = modules
        self.dataset = dataset
        self.tokenizer = tokenizer
        self.calibration_tokens = calibration_tokens
        self.calibration_context = calibration_context
        self.seed = seed
        self.dequantize = dequantize
        self.fuse_projections = fuse_projections
        self.lm_head_bits = lm_head_bits
        self.embedding_bits = embedding_bits
        self.head_group_size = head_group_size
        self.untied = untied
        self.spill = spill
        self.data_parallel = data_parallel
        self.low_memory = low_memory
        self.target_bpw = target_bpw
        self.target_size = target_size
        self.choices = choices
        self.consistent_groups = consistent_groups
        self.within_layer = within_layer
        self.validate()

    def _own_problems(self) -> list[str]:
        problems = [
            *(self._auto_problems() if self.chooses_bits else self._fixed_problems()),
            *check_group_size("group_size", self.group_size),
            *check_bool("symmetric", self.symmetric),
            *check_bool("act_order", self.act_order),
            *check_bool("double_quant", self.double_quant),
            *expect(
                isinstance(self.search, str) and self.search in SEARCHES,
                "search",
                self.search,
                "one of " + ", ".join(map(repr, SEARCHES)),
            ),
        ]
        problems += [*check_targets(self.target_bpw, self.target_size)]
        if self.act_order is True and self.preset == "closed":
            problems.append(
                "act_order is True: expected False with preset 'closed', which rounds no column after another; use "
                "preset='fast'"
            )
        if self.search != "mse" and self.preset in MPQ_PRESETS and self.preset != "closed":
            problems.append(
                f"search is {self.search!r}: expected 'mse' with preset {self.preset!r}, whose fits start from it; use "
                "preset='closed' (--preset closed)"
            )
        return problems

    def _fixed_problems(self) -> list[str]:
        """What is wrong with ``bits`` as a number."""
        expected = f"a whole number from {MIN_BITS} to {MAX_BITS}, or 'auto'"
        number = type(self.bits) is int
        problems = expect(number and MIN_BITS <= self.bits <= MAX_BITS, "bits", self.bits, expected)  # type: ignore[operator]
        for field in ("target_bpw", "target_size", "choices", "consistent_groups", "within_layer"):
            if (value := getattr(self, field)) not in (None, False):
                problems.append(
                    f"{field} is {value!r}: expected none beside bits={self.bits!r}; it takes bits='auto' (--bits auto)"
                )
        return problems

    def _auto_problems(self) -> list[str]:
        """What is wrong with the options that go with ``bits="auto"``."""
        problems = [
            *check_bool("consistent_groups", self.consistent_groups),
            *check_bool("within_layer", self.within_layer),
            *_check_choices(self.choices),
        ]
        if self.modules is None and self.target_bpw is None and self.target_size is None:
            problems.append(
                "bits is 'auto': expected target_bpw=X or target_size='60MB' with it (--target-bpw X, --target-size "
                "60MB)"
            )
        if self.group_size != 64:
            problems.append(
                f"group_size is {self.group_size!r} beside bits='auto', which chooses it: name what there is to choose "
                "from instead, such as choices=['2g128', '4g128'] (--choices 2g128,4g128)"
            )
        several = [name for name in self.names if _is_mixed(name)]
        if several and self.double_quant is True:
            problems.append(
                f"double_quant is True: expected False with several widths within a layer ({several[0]!r}), whose "
                "statistics it cannot hold; leave out within_layer"
            )
        return problems

    @property
    def names(self) -> tuple[str, ...]:
        """``choices``, or those tried where there are none given, with what ``within_layer`` adds."""
        given: Any = self.choices
        if not isinstance(given, (list, tuple, type(None))):
            return ()
        own = CHOICES if given is None else tuple(given)
        return (*own, *(name for name in WITHIN_LAYER if self.within_layer is True and name not in own))


def _check_choices(choices: Any) -> list[str]:
    if choices is None:
        return []
    if not isinstance(choices, (list, tuple)) or not choices or not all(isinstance(name, str) for name in choices):
        return expect(False, "choices", choices, "None or a list of names such as ['1p', '2g64', '4g64']")
    problems = []
    for name in choices:
        try:
            Choice.parse(name)
        except ValueError as error:
            problems.append(f"choices holds {name!r}: {error}")
    if len(set(choices)) < len(choices):
        problems.append(f"choices is {choices!r}: expected each name once")
    if not problems and all(Choice.parse(name).mixed for name in choices):
        problems.append(f"choices is {choices!r}: expected one of whole bits as well, for layers with too few inputs")
    return problems


def _is_mixed(name: Any) -> bool:
    try:
        return Choice.parse(name).mixed
    except (TypeError, ValueError):
        return False  # which is another problem


CONFIGS: dict[str, type[PackingConfig]] = {"onebit": OneBitConfig, "mpq": MPQConfig}
"""The config of each method."""


def config_from_dict(quantization: Mapping[str, Any], where: str) -> PackingConfig:
    """The config that a checkpoint's config.json holds.

    Args:
        quantization: its ``quantization_config``.
        where: the file or model, for the error text.

    Raises:
        ValueError: it is another library's, or a value in it is not valid.
    """
    method = quantization.get("quant_method")
    cls = CONFIGS.get(method) if isinstance(method, str) else None
    if cls is None:
        known = " and ".join(map(repr, KEYS))
        raise ValueError(f"{where} has quant_method {method!r}: hf_onebit {__version__} reads {known}")
    config = cls.from_dict(dict(quantization))
    assert isinstance(config, PackingConfig)
    return config
