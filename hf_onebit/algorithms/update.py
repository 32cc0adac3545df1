"""One optimizer step on packed codes: moments, the step, and rounding to the nearest codes.

With G the gradient of the float weight W of the codes, t the step, η the learning rate, λ the weight decay::

    m ← β₁ m + (1 - β₁) G
    v ← β₂ v + (1 - β₂) G²
    u = m / (√v + ε)
    η_t = η,  or with bias correction  η √(1 - β₂ᵗ) / (1 - β₁ᵗ)
    W ← (1 - η λ) W - η_t u
    q = round((W + z) / s), held within the levels of the codes

Scales s and offsets z are as they were. Nothing of W is kept beside its codes, so a step of less than half a level
vanishes. Pure functions of dense tensors; the packed side is the caller's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["nearest_codes", "step_size", "update_moment"]


def update_moment(state: Tensor | None, value: Tensor, beta: float) -> Tensor:
    """β state + (1 - β) value, written into ``state`` (its dtype) where there is one; from zero if None.

    Returns:
        What the state is now, in the dtype of ``value``.
    """
    if state is None:
        return value * (1 - beta)
    state.copy_(state.to(value.dtype).mul_(beta).add_(value, alpha=1 - beta))
    return state.to(value.dtype)


def step_size(lr: float, beta1: float, beta2: float, t: int, correct_bias: bool) -> float:
    """η_t of the module's docstring; ε stays outside of the correction."""
    return lr * math.sqrt(1 - beta2**t) / (1 - beta1**t) if correct_bias else lr


def nearest_codes(W: Tensor, scale: Tensor, offset: Tensor, levels: Tensor, codes: Tensor) -> Tensor:
    """The codes nearest to a float weight under given scales and offsets.

    Args:
        W: ``(in, out)``, float.
        scale, offset: as W, W ≈ scale · code - offset.
        levels: uint8 ``(in, 1)``, the largest code of each row.
        codes: uint8 ``(in, out)``, kept where the scale is 0 and every code means the same.

    Returns:
        uint8 ``(in, out)``.
    """
    q = ((W + offset) / scale).round_()
    q = torch.minimum(q.clamp_(min=0), levels.to(q.dtype))
    return torch.where(scale == 0, codes.to(q.dtype), q).to(torch.uint8)
