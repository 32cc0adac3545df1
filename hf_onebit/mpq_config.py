"""``MPQConfig``, and the config of either method from its JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_onebit.algorithms.groupwise import SEARCHES
from hf_onebit.config import (
    OneBitConfig,
    PackingConfig,
    _check_bool,
    _check_group_size,
    _check_int,
    _expect,
)
from hf_onebit.formats.mpq import MAX_BITS, MIN_BITS
from hf_onebit.formats.onebit import FORMAT_VERSION
from hf_onebit.formats.table import KEYS
from hf_onebit.version import __version__

MPQ_PRESETS: dict[str, str] = {
    "closed": "the nearest weights: scales and zeros searched group by group; seconds, no text needed",
    "fast": "the nearest outputs: GPTQ on the quantized prefix, scales and zeros refitted to it; minutes",
    "balanced": "the same with more text, then each block's scales, zeros and rounding tuned; several times as long",
    "best": "the same with far more of both; many times as long",
}
# Tokens of calibration text that a preset is made for.
MPQ_CALIBRATION_TOKENS = {"closed": 16384, "fast": 16384, "balanced": 49152, "best": 147456}


class MPQConfig(PackingConfig):
    """How to quantize the linear layers of a model to codes of 1 to 8 bits in groups of inputs, W ≈ s q − z.

    Args:
        bits: width of one code, 1 to 8.
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
        modules_to_not_convert, lm_head_bits, embedding_bits, head_group_size: as of ``OneBitConfig``.
        dataset: what to calibrate on, as of ``OneBitConfig``. None means no data with ``preset="closed"``, and "self"
            with every other preset. With data, ``closed`` weighs each input by its mean square. Not stored.
        tokenizer, calibration_context, seed, spill: as of ``OneBitConfig``. Not stored.
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
    )

    def __init__(
        self,
        bits: int = 4,
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
        calibration_context: int = 1024,
        seed: int = 0,
        modules: dict[str, dict[str, Any]] | None = None,
        format_version: int = FORMAT_VERSION,
        dequantize: bool = False,
        fuse_projections: bool = False,
        quant_method: str = "mpq",
        lm_head_bits: int | None = None,
        embedding_bits: int | None = None,
        head_group_size: int = 64,
        untied: bool = False,
        spill: bool = False,
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
        self.validate()

    def _own_problems(self) -> list[str]:
        problems = [
            *_check_int("bits", self.bits, MIN_BITS, MAX_BITS),
            *_check_group_size("group_size", self.group_size),
            *_check_bool("symmetric", self.symmetric),
            *_check_bool("act_order", self.act_order),
            *_check_bool("double_quant", self.double_quant),
            *_expect(
                isinstance(self.search, str) and self.search in SEARCHES,
                "search",
                self.search,
                "one of " + ", ".join(map(repr, SEARCHES)),
            ),
        ]
        if self.act_order is True and self.preset == "closed":
            problems.append(
                "act_order is True: expected False with preset 'closed', which rounds no column after another; use "
                "preset='fast'"
            )
        if self.search != "mse" and self.preset in MPQ_PRESETS and self.preset != "closed":
            problems.append(
                f"search is {self.search!r}: expected 'mse' with preset {self.preset!r}, whose fits start from it; use "
                "preset='closed'"
            )
        return problems


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
