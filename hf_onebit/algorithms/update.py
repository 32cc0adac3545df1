"""One optimizer step on packed codes: the direction, the step, and how codes take it.

With G the gradient of the float weight W = s q - z of the codes q, t the step, η the learning rate, λ the weight
decay::

    m ← β₁ m + (1 - β₁) G
    v ← β₂ v + (1 - β₂) G²
    u = m / (√v + ε)
    η_t = η,  or with bias correction  η √(1 - β₂ᵗ) / (1 - β₁ᵗ)
    W ← (1 - η λ) W - η_t u

Nothing of W is kept beside its codes. In units of codes the step is d = -(η_t u + η λ W) / s, and

* **nearest**: q ← q + round(d). A step of less than half a level vanishes, and so does every later one like it.
* **stochastic**: q ← q + sign(d) (⌊|d|⌋ + [r < |d| - ⌊|d|⌋]) with r uniform on [0, 1). The mean of the new q is q + d,
  so small steps add up, however small they are.
* **inertia**, of one-bit codes: below.

Codes are held within their levels after that. Scales s and offsets z are as they were.

Signs have no small steps, so what is averaged decides (double momentum). With x = ±1 the sign of a weight and
g = G s/|s| the gradient's direction for x::

    m ← β₁ m + (1 - β₁) g
    n ← β₂ (1 - η λ) n + (1 - β₂) η m / (|m| + ε ρ)        ρ root mean square of m over the weight's output
    x ← -sign(n) where n is not 0

n starts at -x r ι, r uniform on [0, 1) and ι the inertia: it keeps the sign as it was until enough votes against it
came in. Only the signs of n and nearly only those of m count, so neither needs a bias correction; η sets how fast votes
outweigh the start, and weight decay shortens the memory. Source: the rule of bitorch-engine's binary layers ("Diode"),
where λ is ignored and ε is not there; Helwegen et al., "Latent weights do not exist" (NeurIPS 2019), has the argument
for inertia in place of latent weights.

**To the bit.** A product and a sum are two operations here, each rounded: ``add_(x, alpha=...)`` is one where the
processor has it, and in the last elements of a row two; roots are those of :func:`root`. So every step is the same on
every machine and in every piece of it, and a kernel can be held to these bits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_onebit.algorithms.counter_random import fraction

__all__ = [
    "ROUNDINGS",
    "flip_signs",
    "initial_inertia",
    "mean_square",
    "move_codes",
    "root",
    "step_size",
    "update_moment",
]

ROUNDINGS = ("stochastic", "nearest", "inertia")
# No code has more levels, and infinity has no fraction.
_FARTHEST = 256.0
_SUMMED = 128


def update_moment(state: Tensor | None, value: Tensor, beta: float) -> Tensor:
    """β state + (1 - β) value, written into ``state`` (its dtype) where there is one; from zero if None.

    Returns:
        What the state is now, in the dtype of ``value``.
    """
    if state is None:
        return value * (1 - beta)
    state.copy_(state.to(value.dtype).mul_(beta).add_(value * (1 - beta)))
    return state.to(value.dtype)


def root(x: Tensor) -> Tensor:
    """A new tensor: the square root; of float32 the nearest float32, where PyTorch may give one of its neighbours."""
    return x.double().sqrt_().to(x.dtype) if x.dtype == torch.float32 else x.sqrt()


def mean_square(m: Tensor) -> Tensor:
    """Mean of the squares of each column ``(1, columns)``, summed in an order of its own: blocks of 128 rows one after
    the other, then halves of the block.
    """
    total = m.new_zeros(_SUMMED, m.shape[1])
    for block in m.split(_SUMMED):
        total[: block.shape[0]] += block.square()
    while total.shape[0] > 1:
        total = total[: total.shape[0] // 2] + total[total.shape[0] // 2 :]
    return total.div_(m.shape[0])


def step_size(lr: float, beta1: float, beta2: float, times: tuple[int, int], correct_bias: bool) -> float:
    """η_t of the module's docstring; ε stays outside of the correction.

    Args:
        lr, beta1, beta2: η, β₁, β₂.
        times: how many steps the first and the second moment have seen, with this one.
        correct_bias: whether to correct.
    """
    return lr * math.sqrt(1 - beta2 ** times[1]) / (1 - beta1 ** times[0]) if correct_bias else lr


def move_codes(codes: Tensor, d: Tensor, levels: Tensor, words: Tensor | None) -> Tensor:
    """Codes after a step of ``d`` levels.

    Args:
        codes: uint8 ``(in, out)``.
        d: the step in levels, as codes, float; overwritten. NaN, which a scale of 0 leaves, moves nothing.
        levels: uint8 ``(in, 1)``, the largest code of each row.
        words: random words as codes, for stochastic rounding; None: round to the nearest, halves to even.

    Returns:
        uint8 ``(in, out)``.
    """
    d = d.nan_to_num_(nan=0.0, posinf=_FARTHEST, neginf=-_FARTHEST).clamp_(-_FARTHEST, _FARTHEST)
    if words is None:
        moved = d.round_()
    else:
        size = d.abs()
        whole = size.floor()
        up = fraction(words, d.dtype) < size.sub_(whole)
        moved = whole.add_(up).copysign_(d)
    q = moved.add_(codes).clamp_(min=0)
    return torch.minimum(q, levels.to(q.dtype)).to(torch.uint8)


def initial_inertia(codes: Tensor, words: Tensor, inertia: float, dtype: torch.dtype) -> Tensor:
    """n at the start: -x r ι, for codes 0 and 1 and random words."""
    return fraction(words, dtype).mul_(inertia).mul_(1 - 2 * codes.to(dtype))


def flip_signs(codes: Tensor, n: Tensor) -> Tensor:
    """uint8 codes, 1 for +, after a look at n: the sign against it, the code that is there where n is 0."""
    return torch.where(n > 0, 0, torch.where(n < 0, 1, codes)).to(torch.uint8)
