"""Other libraries' packed layers on a GPU, where they are installed: GemLite, bitsandbytes, GPTQModel.

Each is given random weights, and the float32 matrix that it stands for is returned beside it, so that it can be checked
before it is timed.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

PEERS = {"gemlite1": "gemlite", "gemlite2": "gemlite", "gemlite4": "gemlite", "bnb4": "bitsandbytes",
         "gptqmodel4": "gptqmodel"}  # fmt: skip
# A layer's product with x, (rows, in) to (rows, out).
Call = Callable[[Tensor], Tensor]


def missing(kind: str) -> str:
    """What to install for a contender; an empty string where it is there."""
    library = PEERS[kind]
    return "" if importlib.util.find_spec(library) else f"{library} is not installed"


def peer(kind: str, out: int, in_: int, group: int, dtype: torch.dtype, device: torch.device) -> tuple[Call, Tensor]:
    """(the product, float32 weight (out, in)) of one layer of another library.

    Args:
        kind: a key of ``PEERS``; the digit is the bits of a weight.
        out, in_: outputs and inputs.
        group: inputs that share a scale.
        dtype: of x.
        device: of x.

    Raises:
        RuntimeError: the library has not what is asked of it; ImportError where it is not there.
    """
    bits = int(kind[-1])
    if kind.startswith("bnb"):
        functional = importlib.import_module("bitsandbytes.functional")
        matmul = importlib.import_module("bitsandbytes").matmul_4bit
        W = (torch.randn(out, in_, device=device) / in_**0.5).to(dtype)
        packed, state = functional.quantize_4bit(W, quant_type="nf4", blocksize=64)
        return lambda x: matmul(x, packed.t(), quant_state=state), functional.dequantize_4bit(packed, state).float()
    codes = torch.randint(0, 1 << bits, (out, in_), dtype=torch.uint8, device=device)
    scales = ((torch.rand(out, in_ // group, device=device) + 0.5) / in_**0.5).to(torch.float16)
    middle = torch.full_like(scales, (1 << bits) // 2 if bits > 1 else 0.5)
    spread = scales.float().repeat_interleave(group, 1)
    W = (codes.float() - middle.float().repeat_interleave(group, 1)) * spread
    if kind.startswith("gemlite"):
        gemlite = importlib.import_module("gemlite")
        types = {torch.float16: gemlite.DType.FP16, torch.bfloat16: gemlite.DType.BF16}
        layer = gemlite.GemLiteLinear(bits, group_size=group, in_features=in_, out_features=out,
                                      input_dtype=types[dtype], output_dtype=types[dtype])  # fmt: skip
        layer.pack(codes, scales.to(dtype), middle.to(dtype), None)
        return layer, W
    return _gptqmodel(bits, group, W, scales, middle, dtype, device), W


def _gptqmodel(
    bits: int, group: int, W: Tensor, scales: Tensor, middle: Tensor, dtype: torch.dtype, device: torch.device
) -> Call:
    """GPTQModel's Triton layer; the class has had several names."""
    module = importlib.import_module("gptqmodel.nn_modules.qlinear.tritonv2")
    found = [getattr(module, name) for name in ("TritonV2Linear", "TritonV2QuantLinear") if hasattr(module, name)]
    if not found:
        raise RuntimeError("gptqmodel has no Triton layer under a name that is known here")
    out, in_ = W.shape
    layer: Any = found[0](bits=bits, group_size=group, desc_act=False, sym=True, in_features=in_, out_features=out,
                          bias=False, pack_dtype=torch.int32)  # fmt: skip
    linear = nn.Linear(in_, out, bias=False)
    linear.weight = nn.Parameter(W.cpu(), requires_grad=False)
    g_idx = (torch.arange(in_) // group).to(torch.int32)
    layer.pack(linear, scales.float().cpu(), middle.float().cpu(), g_idx)
    layer.post_init()
    moved: Call = layer.to(device=device, dtype=dtype).eval()
    return moved
