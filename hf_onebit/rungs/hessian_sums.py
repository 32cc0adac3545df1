"""The Hessian of a linear layer's inputs, summed as they stream by."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_onebit.ranks import Ranks


class HessianSum:
    """H = (2/N) Σ x xᵀ over the rows x that a linear layer was given, summed as they stream by.

    Args:
        in_features: length of a row.
    """

    def __init__(self, in_features: int) -> None:
        self.in_features = in_features
        self.rows = 0
        self.lent = 0  # rows of other layers (starved.py)
        self._sum: Tensor | None = None  # Σ x xᵀ, float32 (in_features, in_features)

    def add(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Count activations (..., in_features); rows whose ``mask`` (...) is 0 are padding and stay out."""
        rows = x.detach().reshape(-1, self.in_features).float()
        if mask is not None and mask.numel() == rows.shape[0]:
            rows = rows[mask.reshape(-1).bool().to(rows.device)]
        product = rows.t() @ rows
        self._sum = product if self._sum is None else self._sum.add_(product)
        self.rows += rows.shape[0]

    @property
    def hessian(self) -> Tensor | None:
        """(in_features, in_features) float32, or None where no row came by."""
        rows = self.rows + self.lent
        return None if self._sum is None or rows == 0 else self._sum * (2.0 / rows)

    def total(self) -> Tensor | None:
        """Σ x xᵀ."""
        return self._sum

    def add_up(self, ranks: Ranks, rows: int, device: torch.device) -> None:
        """Add what other processes saw, ``rows`` with this one's; on the first of them."""
        if rows:
            own = self._sum
            if own is None:
                own = torch.zeros(self.in_features, self.in_features, device=device)
            self._sum, self.rows = ranks.sum_on_first(own), rows

    def lend(self, moments: Tensor, rows: int) -> None:
        """Add what other layers saw."""
        self._sum = moments if self._sum is None else self._sum + moments
        self.lent += rows
