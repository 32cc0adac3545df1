"""Peers of 2 bits in groups of 64: rounding to nearest, our search without data, GPTQ. Evaluated dequantized."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hf_onebit import loading
from hf_onebit.algorithms.groupwise import quantize_groupwise
from hf_onebit.formats import mpq
from hf_onebit.formats.packing import pack
from hf_onebit.rungs.prefix import PrefixStatistics, walk_prefix

from .gptq import gptq
from .making import calibration, described, file_bits, linear_names, mean_bits, save_dequantized
from .protocol import Places

BITS, GROUP = 2, 64
GPTQ_TOKENS = 32768
DEQUANTIZED = "evaluated dequantized in bfloat16"


def round_to_nearest(W: Tensor) -> Tensor:
    """Range of each group to four levels, of which zero is one, so that it takes two bits: (out, in) float32."""
    rows, columns = W.shape
    groups = torch.nn.functional.pad(W.float(), (0, -columns % GROUP)).unflatten(1, (-1, GROUP))
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / (2**BITS - 1)).half().float()
    safe = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero = (-low / safe).round()
    codes = (groups / safe + zero).round().clamp_(0, 2**BITS - 1)
    return ((codes - zero) * scale).flatten(1)[:, :columns].reshape(rows, columns)


def search(W: Tensor) -> Tensor:
    """Our search for scales and zeros that lose least, without data: (out, in) float32."""
    codes, scales, zeros = quantize_groupwise(W, BITS, GROUP, False)
    return mpq.dequantize(pack(codes, BITS, check=False), scales, zeros, W.shape[1], BITS, GROUP)


def make_rounded(places: Places, name: str, seed: int, method: str) -> dict[str, Any]:
    """Without data: every layer by itself."""
    rounding: Callable[[Tensor], Tensor] = {"rtn": round_to_nearest, "search": search}[method]
    model = loading.load_float(str(places.model))
    start = time.perf_counter()
    names = linear_names(model)
    for layer in names:
        weight = model.get_submodule(layer).weight
        weight.data = rounding(weight.data).to(weight.dtype)
    minutes = (time.perf_counter() - start) / 60
    zero_bits = BITS if method == "rtn" else 16
    return _made(places, name, model, names, zero_bits, minutes, None)


def make_gptq(places: Places, name: str, seed: int) -> dict[str, Any]:
    """On the quantized prefix, stage by stage, as our own ladder walks."""
    model = loading.load_float(str(places.model))
    data = calibration(places, GPTQ_TOKENS, seed)
    names = linear_names(model)
    start = time.perf_counter()

    def visit(stage: dict[str, PrefixStatistics | None]) -> None:
        for layer, statistics in stage.items():
            weight = model.get_submodule(layer).weight
            seen = None if statistics is None else statistics.hessian
            Q = search(weight.data) if seen is None else gptq(weight.data, seen, BITS, GROUP)
            weight.data = Q.to(weight.dtype)

    walk_prefix(model, names, data.batches, visit, arithmetic=torch.bfloat16)
    minutes = (time.perf_counter() - start) / 60
    return _made(places, name, model, names, 16, minutes, described(data))


def _made(
    places: Places, name: str, model: Any, names: list[str], zero_bits: int, minutes: float, data: dict[str, Any] | None
) -> dict[str, Any]:
    """Bits count codes, a float16 scale for each group, and the zero of ``zero_bits``."""
    bits = mean_bits(model, names, lambda i, _o: BITS + (16 + zero_bits) * -(-i // GROUP) / i)
    file_bpw, file_bytes = file_bits(model, names, bits)
    save_dequantized(model, places.of(name) / "dequantized", places)
    notes = [
        DEQUANTIZED,
        "bits and bytes computed: codes, float16 scales, " + f"zeros of {zero_bits} bits; the rest at 16",
    ]
    return {"linear_bpw": bits, "file_bpw": file_bpw, "file_bytes": file_bytes, "calibration": data, "minutes": minutes,
            "command": None, "notes": notes}  # fmt: skip
