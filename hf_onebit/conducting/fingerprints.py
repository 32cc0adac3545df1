"""The fingerprint of a run, by which an interrupted one knows its work again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from torch import Tensor, nn

from hf_onebit.calibration import CalibrationData
from hf_onebit.conducting.method import QuantizationMethod
from hf_onebit.config import PackingConfig
from hf_onebit.quantization.resume import Fingerprint, fingerprint
from hf_onebit.ranks import Ranks
from hf_onebit.rungs.recipes import Recipe


def run_fingerprint(
    method: QuantizationMethod,
    model: nn.Module,
    data: CalibrationData,
    recipe: Recipe,
    sharing: Ranks,
    tensors: Iterable[tuple[str, Tensor]] | None = None,
) -> Fingerprint:
    """Of a run; ``tensors`` are the model's where it has them in no memory."""
    defaults = run_options(method.config_class.from_dict({"preset": method.config.preset}))
    mine = fingerprint(model, data.batches, run_options(method.config), asdict(recipe), tensors)
    if sharing.size > 1:
        mine["machine"]["processes"] = sharing.size  # they split sums, and with them their rounding
    return Fingerprint(mine, {f"options.{key}": value for key, value in defaults.items()})


def run_options(config: PackingConfig) -> dict[str, Any]:
    """The options that a result may depend on."""
    apart = (
        "dataset",
        "tokenizer",
        "calibration_tokens",
        "dequantize",
        "fuse_projections",
        "spill",
        "modules",
        "untied",
        "data_parallel",
        "low_memory",
    )
    options = {key: value for key, value in vars(config).items() if key not in apart and not key.startswith("_")}
    return options | {"calibration_tokens": config.tokens_wanted}
