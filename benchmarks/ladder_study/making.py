"""What every way of making a row shares: what it leaves for the tables, the texts it calibrates on, float folders."""

from pathlib import Path
from typing import Any

from hf_onebit import loading
from hf_onebit.calibration import CalibrationData, load_calibration
from hf_onebit.nn.replace import find_layers

from .protocol import CALIBRATION, Places

LENGTH = 1024


def calibration(places: Places, tokens: int, seed: int) -> CalibrationData:
    """Sequences of 1024 tokens of the one calibration text of the study."""
    tokenizer = loading.load_tokenizer(str(places.model))
    return load_calibration(places.data / CALIBRATION, tokenizer, max_tokens=tokens, context=LENGTH, seed=seed)


def described(data: CalibrationData) -> dict[str, Any]:
    """For the row's JSON."""
    return {"source": data.source, "tokens": data.tokens, "sha256": data.sha256}


def linear_names(model: Any) -> list[str]:
    """The linear layers that our own rows pack."""
    return list(find_layers(model).selected)


def mean_bits(model: Any, names: list[str], bits: Any) -> float:
    """Bits per weight of these layers together; ``bits`` of one layer by its (inputs, outputs)."""
    sizes = [tuple(model.get_submodule(name).weight.shape) for name in names]
    return sum(bits(i, o) * i * o for o, i in sizes) / sum(i * o for o, i in sizes)


def file_bits(model: Any, names: list[str], linear_bpw: float) -> tuple[float, int]:
    """Bits per weight and bytes of a file with these layers at ``linear_bpw`` and all else at 16 bits."""
    linear = sum(model.get_submodule(name).weight.numel() for name in names)
    total = sum(parameter.numel() for parameter in model.parameters())
    bits = linear * linear_bpw + 16 * (total - linear)
    return bits / total, round(bits / 8)


def save_dequantized(model: Any, folder: Path, places: Places) -> None:
    """A float folder that holds what a quantizer that has no file of ours stands for."""
    model.save_pretrained(folder)
    tokenizer = loading.load_tokenizer(str(places.model))
    tokenizer.save_pretrained(folder)
