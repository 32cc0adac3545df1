"""The experts of a layer in a few launches: where their packed layers are alike and on a GPU, and nothing is recorded.

``SeparateExperts`` otherwise calls its layers one expert after the other and has to know, on the host, which ones run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from hf_onebit.formats.onebit import pack_signs
from hf_onebit.formats.packing import pack
from hf_onebit.nn.linear import OneBitLinear
from hf_onebit.nn.mpq import MPQLinear
from hf_onebit.ops import gpu, gpu_examination, gpu_plans
from hf_onebit.ops.gpu_plans import Alike, Layers

__all__ = ["grouped", "run", "takes"]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# With more rows an expert, on the average, its layers one by one are the better way.
MOST_ROWS = 64
# What is examined: (inputs, outputs), odd and multiples of 16, for which Triton compiles other code; tokens of two
# experts each, for tiles of 8, 16 and 32 columns.
_EXAMINED_SIZES = ((70, 33), (128, 64))
_EXAMINED_TOKENS = (4, 9, 20, 40)


# {(role, device, dtype): what its layers looked like, and their tensors; None where they are not alike}: numbers and
# names alone, so that nothing is kept alive. What is here is believed only where layers still look so.
Memory = dict[tuple[int, torch.device, torch.dtype], tuple[tuple[Any, ...], "dict[str, tuple[int, ...]] | None"]]


def takes(
    x: Tensor, top_k_index: Tensor, roles: Sequence[Sequence[nn.Module]], memory: Memory | None = None
) -> list[Layers]:
    """What :func:`run` computes these layers from on x's device: nothing is recorded, and the kernels are right.

    Args:
        x, top_k_index: as of :func:`run`.
        roles: for each role, the layers of all experts.
        memory: what was found in calls before; kept by the caller, written here.

    Returns:
        The layers of each role; none where they are to be called one by one.
    """
    if torch.is_grad_enabled() or forward_ad._current_level >= 0:
        return []
    if torch.is_autocast_enabled(x.device.type) or not top_k_index.numel():
        return []
    found = suits(x, top_k_index, roles, memory)
    right = found and all(gpu.agrees(x, "experts", **variant(x, each[0])) for each in roles)
    return found if right else []


def variant(x: Tensor, layer: Any) -> dict[str, Any]:
    """Which examination the kernels for such layers have to pass."""
    if isinstance(layer, OneBitLinear):
        return {"dtype": x.dtype, "method": "onebit", "bits": 1, "zeros": False}
    return {"dtype": x.dtype, "method": "mpq", "bits": layer.bits, "zeros": layer.zeros is not None}


def suits(
    x: Tensor, top_k_index: Tensor, roles: Sequence[Sequence[nn.Module]], memory: Memory | None = None
) -> list[Layers]:
    """The layers of each role, where they are alike and there is a kernel for them; else none."""
    if x.dtype not in _DTYPES or top_k_index.numel() > MOST_ROWS * len(roles[0]):
        return []
    if not gpu_plans.has_tiles(x.device):
        return []
    found = []
    for place, layers in enumerate(roles):
        columns = _columns(layers, x, {} if memory is None else memory, place)
        if columns is None:
            return []
        found.append(_as_layers(layers[0], columns))
    return found


def _columns(layers: Sequence[nn.Module], x: Tensor, memory: Memory, place: int) -> dict[str, tuple[int, ...]] | None:
    """{name: addresses of all experts' tensors} where layers are alike; from the memory where they look as before."""
    with torch._C.DisableTorchFunctionSubclass():  # packed words ask Python for every attribute
        look = _look(layers)
    key = (place, x.device, x.dtype)
    if look is None:
        return None
    known = memory.get(key)
    if known is None or known[0] != look:
        addresses = None
        if _alike(layers, x):
            addresses = _addresses(layers)
        known = memory[key] = (look, addresses)
    return known[1]


def _look(layers: Sequence[nn.Module]) -> tuple[Any, ...] | None:
    """All of layers that kernels, and :func:`_alike`, depend on; None where one has to be called."""
    seen: list[Any] = []
    for layer in layers:
        own = vars(layer)
        # Hooks, and a forward of its own, as offloading gives it: that must be called.
        if own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own:
            return None
        seen += (type(layer), own.get("bits"), own.get("group_size"), own.get("planes"), own.get("in_features"))
        for tensor in own["_parameters"].values():
            if tensor is None:
                seen.append(None)
            elif hasattr(type(tensor), "__tensor_flatten__"):  # shards have no address
                return None
            else:
                seen += (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.is_contiguous(), tensor.device)
    return tuple(seen)


def _alike(layers: Sequence[nn.Module], x: Tensor) -> bool:
    first = layers[0]
    if type(first) not in (OneBitLinear, MPQLinear) or any(type(layer) is not type(first) for layer in layers):
        return False
    if getattr(first, "planes", 1) != 1 or getattr(first, "g_idx", None) is not None:
        return False
    if type(first) is MPQLinear and (
        x.dtype == torch.float32 or not _is_half(first.scales) or not _is_half(first.zeros)
    ):
        return False
    about = _about(first)
    for layer in layers:
        if _about(layer) != about:
            return False
        if not all(_is_plain(tensor, x) for tensor in layer._parameters.values() if tensor is not None):
            return False
    return True


def _is_half(tensor: Tensor | None) -> bool:
    """Whether the kernels, which read scales and zeros as float16, read it as what it is."""
    return tensor is None or tensor.dtype == torch.float16


def _is_plain(tensor: Tensor, x: Tensor) -> bool:
    """Whether its address says all: on x's device, contiguous, on 16 bytes."""
    return tensor.device == x.device and tensor.is_contiguous() and tensor.data_ptr() % 16 == 0


def _about(layer: nn.Module) -> tuple[Any, ...]:
    """What kernels take to be the same for all experts."""
    tensors = {n: None if t is None else (t.dtype, tuple(t.shape)) for n, t in layer._parameters.items()}
    return (getattr(layer, "bits", 1), getattr(layer, "group_size", 0), tuple(sorted(tensors.items())))


def grouped(layers: Sequence[Any]) -> Layers:
    """The tensors of one role's layers, which are alike, as the launches take them."""
    return _as_layers(layers[0], _addresses(layers))


def _addresses(layers: Sequence[Any]) -> dict[str, tuple[int, ...]]:
    held = [layer._parameters for layer in layers]
    return {n: tuple(p[n].data_ptr() for p in held) for n, tensor in held[0].items() if tensor is not None}


def _as_layers(first: Any, addresses: dict[str, tuple[int, ...]]) -> Layers:
    def each(name: str) -> Any:
        return Alike(first._parameters[name].detach(), addresses[name]) if name in addresses else None

    if isinstance(first, OneBitLinear):
        return Layers(each("weight"), each("a"), None, each("b"), each("bias"), 1, 0, first.in_features)
    about = (first.bits, first.group_size, first.in_features)
    return Layers(each("weight"), each("scales"), each("zeros"), None, each("bias"), *about)


def run(
    x: Tensor, top_k_index: Tensor, top_k_weights: Tensor, up: Sequence[Layers], inner: Any, down: Layers
) -> Tensor:
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
        experts = len(down.weight.addresses)
        rows = launch.sort_rows(top_k_index, experts)
        hidden = inner([launch.product(x, rows, layers) for layers in up])
        y = launch.product(hidden.contiguous(), rows, down, direct=True)
        outputs = torch.empty_like(y).index_copy_(0, rows.order, y).view(*top_k_index.shape, -1)
        known = ((top_k_index >= 0) & (top_k_index < experts)).unsqueeze(-1)
        weighted = torch.where(known, outputs * top_k_weights.unsqueeze(-1), 0.0)
        return weighted.to(x.dtype).float().sum(1).to(x.dtype)


def examine(device: torch.device, dtype: torch.dtype, method: str, bits: int, zeros: bool) -> str:
    """What is wrong with the grouped products of small layers on a device; an empty string where nothing is."""
    if not gpu_plans.has_tiles(device):  # nobody calls them there
        return ""
    for K, N in _EXAMINED_SIZES:
        random = torch.Generator().manual_seed(3)
        layers = [_random_layer(method, bits, zeros, K, N, random) for _ in range(4)]
        weights = torch.stack([layer.dequantize(torch.float64) for layer in layers])
        biases = torch.stack([layer.bias.detach().double() for layer in layers])
        there = grouped([layer.to(device) for layer in layers])
        for tokens in _EXAMINED_TOKENS:
            x = torch.randn(tokens, K, generator=random).to(dtype)
            index = torch.randint(0, 5, (tokens, 2), generator=random)  # 4 for none
            if wrong := _wrong(x, index, there, weights, biases):
                return f"{wrong}, for {tokens} tokens"
    return ""


def _random_layer(method: str, bits: int, zeros: bool, K: int, N: int, random: torch.Generator) -> Any:
    if method == "onebit":
        layer: Any = OneBitLinear(K, N)
        layer.weight.data.copy_(pack_signs(torch.rand(N, K, generator=random) < 0.5))
        layer.a.data.copy_(torch.rand(N, generator=random) + 0.5)
        layer.b.data.copy_(torch.rand(K, generator=random) + 0.5)
        return layer
    layer = MPQLinear(K, N, bits=bits, group_size=32, symmetric=not zeros)
    layer.weight.data.copy_(pack(torch.randint(0, 1 << bits, (N, K), generator=random, dtype=torch.uint8), bits))
    layer.scales.data.copy_((torch.rand(layer.scales.shape, generator=random) + 0.5) / (1 << bits))
    if zeros:
        layer.zeros.data.copy_(layer.scales * (1 << bits) * 0.4)
    return layer


def _wrong(x: Tensor, index: Tensor, layers: Any, weights: Tensor, biases: Tensor) -> str:
    """What is wrong with the products beside those in float64; an empty string where nothing is."""
    from hf_onebit.ops import triton_experts_launch as launch

    device = layers.weight.like.device
    rows = launch.sort_rows(index.to(device), len(weights))
    y = launch.product(x.to(device), rows, layers).cpu().double()
    chosen = rows.experts.cpu()
    expert = chosen.clamp(max=len(weights) - 1)
    expected = torch.einsum("pk,pnk->pn", x.double()[rows.tokens.cpu()], weights[expert]) + biases[expert]
    expected[chosen == len(weights)] = 0
    return gpu_examination.apart(y, expected, x.dtype)


gpu_examination.EXAMINATIONS["experts"] = lambda launch, device, **variant: examine(device, **variant)
