"""Gradients in a subspace of few dimensions (Zhao et al., "GaLore", 2024), so that moments are small.

Of a gradient G (K, N) with K <= N the basis P (K, r) spans the r largest left singular vectors, moments are of Pᵀ G
(r, N), and the direction u goes back as scale · P u. With K > N the basis is (N, r), of right singular vectors. It is
made anew every ``update_proj_gap`` steps; the moments stay, as in the paper.

The basis comes from a randomized range finder with two power iterations (Halko, Martinsson and Tropp 2011), which needs
products with G only. Its random signs are words of ``algorithms.counter_random``, so a resumed run goes on the same
way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_onebit.algorithms.counter_random import random_words

__all__ = ["LowRankProjector", "leading_basis"]

_OVERSAMPLED = 8
_POWER_ITERATIONS = 2
# The basis' random words are no one else's.
_SEED = 0x5851F42D4C957F2D


def leading_basis(G: Tensor, rank: int, seed: int, step: int, stream: int) -> Tensor:
    """An orthonormal basis ``(rows, rank)`` of nearly the largest left singular vectors.

    Args:
        G: float ``(rows, columns)``; float32 or wider.
        rank: at most as many as the smaller of both.
        seed, step, stream: of the random words.
    """
    width = min(rank + _OVERSAMPLED, *G.shape)
    words = random_words((G.shape[1], width), seed ^ _SEED, step, stream, device=G.device)
    Q = torch.linalg.qr(G @ ((words & 1) * 2 - 1).to(G.dtype))[0]
    for _ in range(_POWER_ITERATIONS):
        Q = torch.linalg.qr(G @ torch.linalg.qr(G.T @ Q)[0])[0]
    U = torch.linalg.svd(Q.T @ G, full_matrices=False)[0]
    return Q @ U[:, :rank]


class LowRankProjector:
    """What ``MPQWeightParameter.update`` takes as ``projector``, around the state that an optimizer saves.

    Args:
        state: where ``basis`` is kept, float32 ``(smaller side, rank)``.
        rank: r.
        update_proj_gap: steps between two bases.
        scale: factor of what goes back.
        seed, stream: of the random words.
    """

    def __init__(
        self, state: dict[str, Any], rank: int, update_proj_gap: int, scale: float, seed: int, stream: int
    ) -> None:
        self.state, self.rank, self.gap, self.scale = state, rank, update_proj_gap, scale
        self.seed, self.stream = seed, stream

    def project(self, grad: Tensor, step: int) -> Tensor:
        """The gradient ``(in, out)`` in the subspace; in step 1, and every gap, the subspace is chosen by it."""
        G = grad.to(torch.float32)
        left = G.shape[0] <= G.shape[1]
        if "basis" not in self.state or (step - 1) % self.gap == 0:
            self.state["basis"] = leading_basis(G if left else G.T, self.rank, self.seed, step, self.stream)
            self.state["left"] = left
        P = self.state["basis"]
        return P.T @ G if left else G @ P

    def project_back(self, low: Tensor) -> Tensor:
        """A direction in the subspace as one of the weight ``(in, out)``."""
        return self.project_back_columns(low, slice(None))

    def project_back_columns(self, low: Tensor, columns: slice) -> Tensor:
        """:meth:`project_back` of some columns of the weight."""
        P = self.state["basis"].to(low.dtype)
        back = P @ low[:, columns] if self.state["left"] else low @ P[columns].T
        return back.mul_(self.scale)
