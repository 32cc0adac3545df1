"""Half-quadratic splitting: scales and zeros for an error in which the few large misses count less.

The error of a group is Σ_j |w_j - ŵ_j|^p with p < 1, which is not smooth. With an e_j for each weight that takes over
what it will not follow, it is split (Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning
Models") into

    Σ_j |e_j|^p + β/2 (w_j - ŵ_j - e_j)²

For fixed ŵ the best e is a shrinkage of the misses, and for fixed e the best s and z are least squares of ŵ to w - e.
β rises from round to round, so that the two agree in the end. Misses are measured in steps s of their group, so that β
means the same for every layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["POWER", "shrink_misses", "targets"]

POWER = 0.7
# β in the first round, and its growth from one to the next.
_FIRST, _GROWTH = 3.0, 1.2


def shrink_misses(x: Tensor, beta: float, power: float = POWER) -> Tensor:
    """What minimises |e|^p + β/2 (x - e)² nearly: sign(x) max(|x| - |x|^(p-1) / β, 0), any shape."""
    size = x.abs()
    return x.sign() * (size - size.clamp_min(1e-8).pow(power - 1) / beta).clamp_min(0)


def targets(w: Tensor, q: Tensor, s: Tensor, z: Tensor, round_: int) -> Tensor:
    """w - e of one round, counted from 0: what least squares is to fit.

    Args:
        w, q: weights and their codes, ``(..., size)``.
        s, z: scale and zero of each group, ``(...)``.
        round_: the higher, the closer e is to the whole miss of large misses.
    """
    step = s.abs().clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(-1)
    miss = (w - (q * s.unsqueeze(-1) - z.unsqueeze(-1))) / step
    return w - shrink_misses(miss, _FIRST * _GROWTH**round_).mul_(step)
