"""LoRA adapters that start at what packing lost: the nearest low-rank matrix to W - Ŵ, W float and Ŵ packed.

Adapters that start at zero start at the packed model. With x the inputs of a layer and C = E[x xᵀ], the product B A of
rank r that leaves the least error of the layer's outputs, E‖(W - Ŵ - s B A) x‖², is

    s B A = U_r S_r V_rᵀ C^(-1/2),    U S Vᵀ = (W - Ŵ) C^(1/2)

(s is LoRA's scaling; C = 1 without data). Li et al. 2023, arXiv:2310.08659 (LoftQ) change the packed weight in turn
with the adapter; here the packed words stay as they are, so one base serves many adapters. Zhang et al. 2024,
arXiv:2410.06040 derive the form with C.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_onebit.argument_checks import require_module, shown
from hf_onebit.integrations.float_weights import float_weights_of
from hf_onebit.integrations.merging import adapted_layers
from hf_onebit.modes import evaluating
from hf_onebit.nn.mpq import MPQEmbedding

__all__ = ["ResidualFit", "init_from_residual"]

_DAMPING = 0.01  # of the mean variance of the inputs: directions that the data never shows still count
_EXACT_UP_TO = 768  # sides of a matrix whose whole decomposition takes no longer than a search for its first vectors
_BYTES_AT_ONCE = 1 << 29


@dataclass(frozen=True)
class ResidualFit:
    """Relative errors of one layer, ‖(W - its weight) C^(1/2)‖ / ‖W C^(1/2)‖, C as seen in the data, or 1.

    Attributes:
        before: of the packed weight alone.
        after: of packed weight and adapter.
    """

    before: float
    after: float


def init_from_residual(
    model: Any,
    float_weights: nn.Module | str | os.PathLike[str],
    batches: Iterable[Mapping[str, Tensor]] | None = None,
    *,
    adapter_name: str = "default",
) -> dict[str, ResidualFit]:
    """Set LoRA adapters on packed layers to what packing lost. Call it right after ``get_peft_model``.

    The adapter is an ordinary one: it is saved, loaded and trained as any other, and without it the model is the packed
    one. Adapters on embeddings and on float layers keep their start.

    Args:
        model: a packed model with LoRA (DoRA, rsLoRA) adapters.
        float_weights: the float model that was packed, or the folder of its safetensors files, of which one matrix at a
            time is read.
        batches: keyword arguments of the model, a few hundred tokens in all at least, none of which need be kept for
            later: errors are then weighed by the inputs that they meet, which serves the predictions far better. On
            the model's device.
        adapter_name: which adapter.

    Returns:
        {layer: its errors before and after}.

    Raises:
        TypeError: an argument of another type.
        ValueError: no such adapter of LoRA on a packed layer, one scaled by 0 or less, a float weight that is missing
            or of another shape, or no batches in ``batches``.
    """
    require_module("init_from_residual", model)
    if not isinstance(float_weights, (nn.Module, str, os.PathLike)):
        raise TypeError(
            f"init_from_residual got float_weights={shown(float_weights)}, expected the float model that was "
            "packed, or the folder of its safetensors files"
        )
    if not isinstance(adapter_name, str):
        raise TypeError(f"init_from_residual got adapter_name={shown(adapter_name)}, expected a name such as 'default'")
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers = {
        name: layer
        for name, layer in adapted_layers(base).items()
        if _is_lora(layer, adapter_name) and not isinstance(layer.get_base_layer(), MPQEmbedding)
    }
    if not layers:
        raise ValueError(
            f"init_from_residual found no LoRA adapter {adapter_name!r} on a packed linear layer of "
            f"{type(model).__name__}: call get_peft_model(model, LoraConfig(...)) first"
        )
    for name, layer in layers.items():
        if not 0 < layer.scaling[adapter_name] < math.inf:  # what the start is divided by
            raise ValueError(
                f"{name} scales its adapter by {layer.scaling[adapter_name]}, expected a finite number > 0: set "
                "lora_alpha to one"
            )
    read = float_weights_of(base, float_weights, "init_from_residual")
    tokens = None if batches is None else _listed(batches)
    fits = {}
    # All from the model as it is now: a chunk that is done must not change the inputs of the next.
    starts: dict[str, tuple[Tensor, Tensor]] = {}
    for chunk in _chunks(layers):
        inputs = {} if tokens is None else _second_moments(model, {name: layers[name] for name in chunk}, tokens)
        for name in chunk:
            layer = layers[name]
            packed = layer.get_base_layer()
            W = read(name, packed)
            fits[name], starts[name] = _fit(W, packed.dequantize(), inputs.get(name), layer.r[adapter_name])
    for name, (B, A) in starts.items():
        _set_adapter(layers[name], adapter_name, B, A)
    return fits


def _is_lora(layer: Any, adapter: str) -> bool:
    """Whether there is a pair of linear layers of that name: AdaLoRA's are three factors, others' have other names."""
    held = getattr(layer, "lora_A", {})
    return adapter in held and isinstance(held[adapter], nn.Linear)


def _listed(batches: Any) -> list[Mapping[str, Tensor]]:
    expected = "expected None or an iterable of dicts of the model's keyword arguments, like [{'input_ids': ids}]"
    if not isinstance(batches, Iterable) or isinstance(batches, (str, Mapping, Tensor)):
        raise TypeError(f"init_from_residual got batches={shown(batches)}, {expected}")
    listed = list(batches)
    if not listed:
        raise ValueError(f"init_from_residual got no batches in batches, {expected}")
    for number, batch in enumerate(listed):
        if not isinstance(batch, Mapping):
            raise TypeError(f"init_from_residual got batches[{number}]={shown(batch)}, {expected}")
    return listed


@torch.no_grad()
def _fit(W: Tensor, Q: Tensor, C: Tensor | None, rank: int) -> tuple[ResidualFit, tuple[Tensor, Tensor]]:
    R = W - Q
    root = inverse = None
    if C is not None:
        values, vectors = torch.linalg.eigh(C.double())
        values = values.clamp(min=0)
        values = (values + _DAMPING * values.mean()).sqrt().clamp(min=torch.finfo(torch.float32).tiny)
        root = ((vectors * values) @ vectors.T).to(R)
        inverse = ((vectors / values) @ vectors.T).to(R)
    M = R if root is None else R @ root
    U, S, V = _leading(M, rank)
    A = V.T if inverse is None else V.T @ inverse
    norm = A.norm(dim=1).clamp(min=torch.finfo(A.dtype).tiny)
    # Both factors of one size: then the gradients of each are as large as the other's.
    size = (S * norm).sqrt()
    A, B = A * (size / norm)[:, None], U * size
    whole = (W if root is None else W @ root).norm().clamp(min=torch.finfo(W.dtype).tiny)
    after = R - B @ A
    after = after if root is None else after @ root
    return ResidualFit(float(M.norm() / whole), float(after.norm() / whole)), (B, A)


def _leading(M: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first ``rank`` singular vectors and values, (out, r), (r,), (in, r); zeros where there are not as many."""
    count = min(rank, *M.shape)
    if min(M.shape) <= _EXACT_UP_TO:
        U, S, Vh = torch.linalg.svd(M, full_matrices=False)
        V = Vh.T
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            U, S, V = torch.svd_lowrank(M, q=min(count + 16, *M.shape), niter=6)
    U, S, V = U[:, :count], S[:count], V[:, :count]
    missing = rank - count
    pad = nn.functional.pad
    return pad(U, (0, missing)), pad(S, (0, missing)), pad(V, (0, missing))


@torch.no_grad()
def _set_adapter(layer: Any, adapter: str, B: Tensor, A: Tensor) -> None:
    scaling = layer.scaling[adapter]
    lora_A, lora_B = layer.lora_A[adapter], layer.lora_B[adapter]
    lora_A.weight.copy_(A / scaling**0.5)
    lora_B.weight.copy_(B / scaling**0.5)
    if adapter in layer.lora_magnitude_vector:  # DoRA's magnitudes are the norms of the sum
        learns = layer.lora_magnitude_vector[adapter].weight.requires_grad
        layer.lora_magnitude_vector[adapter].update_layer(
            base_layer=layer.get_base_layer(), lora_A=lora_A.weight, lora_B=lora_B.weight, scaling=scaling
        )
        layer.lora_magnitude_vector[adapter].weight.requires_grad_(learns)


def _chunks(layers: Mapping[str, Any]) -> list[list[str]]:
    """Layers whose second moments are in memory at a time."""
    chunks: list[list[str]] = [[]]
    held = 0
    for name, layer in layers.items():
        size = 4 * layer.get_base_layer().in_features ** 2
        if chunks[-1] and held + size > _BYTES_AT_ONCE:
            chunks.append([])
            held = 0
        chunks[-1].append(name)
        held += size
    return chunks


@torch.no_grad()
def _second_moments(
    model: Any, layers: Mapping[str, Any], batches: Sequence[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """Σ x xᵀ / rows of the inputs of each layer, (in, in) float32."""
    sums: dict[str, Tensor] = {}
    rows: dict[str, int] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach().flatten(0, -2).float()
            sums[name] = sums[name].addmm_(x.T, x) if name in sums else x.T @ x
            rows[name] = rows.get(name, 0) + len(x)

        return hook

    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    try:
        with evaluating(model):
            for batch in batches:
                model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: total / rows[name] for name, total in sums.items()}
