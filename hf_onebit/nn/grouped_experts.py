"""The experts of a layer in a few launches: where their packed layers are alike and on a GPU, and nothing is recorded.

``SeparateExperts`` otherwise calls its layers one expert after the other and has to know, on the host, which ones run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_onebit.formats.onebit import pack_signs
from hf_onebit.formats.packing import pack
from hf_onebit.nn.linear import OneBitLinear
from hf_onebit.nn.mpq import MPQLinear
from hf_onebit.ops import gpu, gpu_examination

__all__ = ["grouped", "run", "takes"]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# With more rows an expert, on the average, its layers one by one are the better way.
MOST_ROWS = 64


def takes(x: Tensor, top_k_index: Tensor, roles: Sequence[Sequence[nn.Module]]) -> bool:
    """Whether :func:`run` computes these layers on x's device: nothing is recorded, and the kernels are right there."""
    if torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type) or not top_k_index.numel():
        return False
    return suits(x, top_k_index, roles) and gpu.agrees(x, "experts", dtype=x.dtype)


def suits(x: Tensor, top_k_index: Tensor, roles: Sequence[Sequence[nn.Module]]) -> bool:
    """Whether the layers of each role are alike, and there is a kernel for them."""
    if x.dtype not in _DTYPES or top_k_index.numel() > MOST_ROWS * len(roles[0]):
        return False
    return all(_alike(layers, x) for layers in roles)


def _alike(layers: Sequence[nn.Module], x: Tensor) -> bool:
    first = layers[0]
    if type(first) not in (OneBitLinear, MPQLinear) or any(type(layer) is not type(first) for layer in layers):
        return False
    if getattr(first, "planes", 1) != 1 or getattr(first, "g_idx", None) is not None:
        return False
    if type(first) is MPQLinear and (x.dtype == torch.float32 or first.scales.dtype != torch.float16):
        return False
    about = _about(first)
    for layer in layers:
        # Hooks, and a forward of its own, as offloading gives it: that must be called.
        if _about(layer) != about or layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer):
            return False
        if not all(_is_plain(tensor, x) for tensor in layer._parameters.values() if tensor is not None):
            return False
    return True


def _is_plain(tensor: Tensor, x: Tensor) -> bool:
    """Whether its address says all: no shards, on x's device, contiguous, on 16 bytes."""
    sharded = hasattr(tensor, "__tensor_flatten__")
    return not sharded and tensor.device == x.device and tensor.is_contiguous() and tensor.data_ptr() % 16 == 0


def _about(layer: nn.Module) -> tuple[Any, ...]:
    """What kernels take to be the same for all experts."""
    tensors = {n: None if t is None else (t.dtype, tuple(t.shape)) for n, t in layer._parameters.items()}
    return (getattr(layer, "bits", 1), getattr(layer, "group_size", 0), tuple(sorted(tensors.items())))


def grouped(layers: Sequence[Any]) -> Any:
    """The tensors of one role's layers, as the launches take them."""
    from hf_onebit.ops import triton_experts_launch as launch

    first = layers[0]

    def each(name: str) -> list[Tensor]:
        return [] if getattr(first, name, None) is None else [getattr(layer, name).detach() for layer in layers]

    if isinstance(first, OneBitLinear):
        return launch.Layers(each("weight"), each("a"), (), each("b"), each("bias"), 1, 0, first.in_features)
    return launch.Layers(
        each("weight"), each("scales"), each("zeros"), (), each("bias"), first.bits, first.group_size, first.in_features
    )


def run(x: Tensor, top_k_index: Tensor, top_k_weights: Tensor, up: Sequence[Any], inner: Any, down: Any) -> Tensor:
    """Weighted sums of the outputs of each token's experts; as ``SeparateExperts.forward``.

    Args:
        x: ``(tokens, hidden)``.
        top_k_index: ``(tokens, k)``; the number of experts stands for none.
        top_k_weights: ``(tokens, k)``.
        up: for each role that reads x, the layers of all experts.
        inner: what lies between, of the roles' outputs ``(rows, intermediate)`` and any order of rows.
        down: the layers of all experts that follow.

    Returns:
        ``(tokens, hidden)`` in x's dtype; summed over k in one order.
    """
    from hf_onebit.ops import triton_experts_launch as launch

    with gpu.on(x):
        x = x if x.stride(-1) == 1 else x.contiguous()
        rows = launch.sort_rows(top_k_index, len(down))
        hidden = inner([launch.product(x, rows, grouped(layers)) for layers in up])
        y = launch.product(hidden.contiguous(), rows, grouped(down), direct=True)
        outputs = torch.empty_like(y).index_copy_(0, rows.order, y).view(*top_k_index.shape, -1)
        known = ((top_k_index >= 0) & (top_k_index < len(down))).unsqueeze(-1)
        weighted = torch.where(known, outputs * top_k_weights.unsqueeze(-1), 0.0)
        return weighted.to(x.dtype).float().sum(1).to(x.dtype)


def examine(device: torch.device, dtype: torch.dtype) -> str:
    """What is wrong with the grouped products of small layers on a device; an empty string where nothing is."""
    random = torch.Generator().manual_seed(3)
    x = torch.randn(9, 70, generator=random).to(dtype)
    index = torch.randint(0, 5, (9, 2), generator=random)  # 4 for none
    for kind in (OneBitLinear, MPQLinear)[: 1 if dtype == torch.float32 else 2]:
        layers: list[Any] = [kind(70, 33) for _ in range(4)]
        for layer in layers:
            codes = torch.randint(0, 2, (33, 70), generator=random, dtype=torch.uint8)
            weight = pack_signs(codes.bool()) if kind is OneBitLinear else pack(codes * 5, 4)
            layer.weight.data.copy_(weight)
        from hf_onebit.ops import triton_experts_launch as launch

        rows = launch.sort_rows(index.to(device), 4)
        y = launch.product(x.to(device), rows, grouped([layer.to(device) for layer in layers])).cpu().double()
        weights = torch.stack([layer.dequantize(torch.float64).cpu() for layer in layers])
        biases = torch.stack([layer.bias.detach().double().cpu() for layer in layers])
        expert = rows.experts.cpu().clamp(max=3)
        expected = torch.einsum("pk,pnk->pn", x.double()[rows.tokens.cpu()], weights[expert]) + biases[expert]
        expected[rows.experts.cpu() == 4] = 0
        error = float((y - expected).abs().max() / expected.abs().max())
        if not error <= gpu_examination.TOLERANCES[dtype]:
            return f"is off by {error:.1e} of the largest result, for experts of {kind.__name__}"
    return ""


gpu_examination.EXAMINATIONS["experts"] = lambda launch, device, dtype: examine(device, dtype)
