"""What each layer adds to a plan's divergence when all layers are coarse together, not one in a model of floats.

With y + α (ŷ − y) for the outputs of every layer, α = 0 is the float model and α = 1 the packed one. The divergence
from the float model is, exactly,

    KL = Σ_l ∫₀¹ ∂KL/∂α_l dα,

one term a layer: the value of Aumann & Shapley 1974, which Sundararajan et al. 2017 (arXiv:1703.01365) take of inputs.
The derivative of a layer's α is a product of its outputs' error and their gradient, so one backward pass has all. What
the Fisher information of one layer cannot see is in it: errors that meet those of other layers or other tokens, and
rare large inputs whose gradients are small.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_onebit.bits.sensitivity import frozen, logits_of, pieces_of
from hf_onebit.calibration import Batch

# Where the derivative is taken: the middles of two halves.
_POINTS = (0.25, 0.75)


def attribute(
    model: nn.Module,
    packed: Mapping[str, nn.Module],
    batches: Sequence[Batch],
    *,
    tokens: int = 2048,
    length: int = 512,
    arithmetic: torch.dtype | None = torch.bfloat16,
) -> tuple[dict[str, float], int]:
    """Each layer's part of the divergence between a float model and its packed form.

    Memory beside the model: its packed layers, and the activations of one piece with those of the packed layers.

    Args:
        model: float model whose output has ``logits``, whole in memory; left as it was.
        packed: what stands for each layer in the packed form.
        batches: calibration sequences; pieces of them, evenly spread, are used.
        tokens: about how many to use.
        length: tokens of one piece.
        arithmetic: dtype of products (autocast), None for the model's own.

    Returns:
        {layer: nats per token}, of which some may be negative, about as many in sum as the packed form loses; and the
        tokens that it was taken on.

    Raises:
        ValueError: the model gives no logits, or they are not finite.
    """
    device = next(model.parameters()).device
    shares = {name: torch.zeros((), device=device, requires_grad=True) for name in packed}
    point: float | None = None  # α, None while outputs are the float model's own

    def hook(name: str) -> Callable[..., Any]:
        def after(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            if point is None:
                return None
            share = shares[name]
            moved: Tensor = output + (share + point).to(output.dtype) * (packed[name](*args) - output)
            return moved

        return after

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in packed]
    counted = 0
    try:
        with frozen(model):
            for piece in pieces_of(batches, tokens, length):
                point = None
                with torch.no_grad(), _arithmetic(device, arithmetic):
                    wanted = logits_of(model, piece).float().log_softmax(-1)
                counted += len(wanted)
                for point in _POINTS:  # noqa: B007  the hooks read it
                    with torch.enable_grad(), _arithmetic(device, arithmetic):
                        found = logits_of(model, piece).float().log_softmax(-1)
                        (wanted.exp() * (wanted - found)).sum().div(len(_POINTS)).backward()
    finally:
        for handle in handles:
            handle.remove()
    sums = {name: 0.0 if share.grad is None else float(share.grad) for name, share in shares.items()}
    return {name: total / counted for name, total in sums.items()}, counted


@contextlib.contextmanager
def _arithmetic(device: torch.device, dtype: torch.dtype | None) -> Iterator[None]:
    with torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext():
        yield
