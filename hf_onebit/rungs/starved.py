"""Experts that calibration hardly reached, and what they are lent.

A Hessian of fewer rows than inputs has directions that no row shows, and an expert that no token chose has none at all.
Such an expert is lent the rows that are missing:

    H_e + (d − n_e) · M        n_e rows of d inputs

For layers that read the hidden states, M is the mean x xᵀ over all experts of the layer: what the router might have
sent. The inner inputs of two experts have nothing to do with each other, so for the layers that read those, M is the
identity times the mean square of one input. An expert with n_e ≥ d keeps its own statistics.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

_EXPERT = re.compile(r"(?P<experts>.*experts)\.(?P<number>\d+)\.(?P<layer>\w+)")


class Moments(Protocol):
    """Σ x xᵀ over the rows that one or more layers were given."""

    rows: int

    def total(self) -> Tensor | None:
        """(in, in) float32, or None where no row came by."""

    def lend(self, moments: Tensor, rows: int) -> None:
        """Add what other layers saw; ``rows`` counts the layer's own as before."""


def is_expert(name: str) -> bool:
    """Whether a layer is one expert's, and so is given some tokens only."""
    return _EXPERT.fullmatch(name) is not None


def feed_starved(model: nn.Module, sums: Mapping[str, Moments]) -> dict[str, int]:
    """Lend to the experts among some layers what they miss, in place.

    Args:
        model: has the layers; of separate experts (nn/experts.py) it is known which layers read the hidden states.
        sums: {layer: its inputs' moments}; layers that read one tensor may share them.

    Returns:
        {layer: rows that it saw itself} of those that were lent some.
    """
    groups: dict[tuple[str, str], list[str]] = {}
    for name in sums:
        if found := _EXPERT.fullmatch(name):
            groups.setdefault((found["experts"], found["layer"]), []).append(name)
    starved: dict[str, int] = {}
    lent: dict[int, tuple[Moments, Tensor, int]] = {}
    for (experts, layer), names in groups.items():
        moments = {id(sums[name]): sums[name] for name in names}
        mean = _mean(list(moments.values()), layer in _shared_inputs(model, experts))
        if mean is None:
            continue
        for name in names:
            missing = mean.shape[0] - sums[name].rows
            if missing > 0:
                starved[name] = sums[name].rows
                lent.setdefault(id(sums[name]), (sums[name], mean, missing))
    for sum_, mean, missing in lent.values():
        sum_.lend(mean * missing, missing)
    return starved


def _mean(moments: list[Moments], shared: bool) -> Tensor | None:
    """Mean x xᵀ of one row, (in, in) float32; None where no expert saw any."""
    rows = sum(m.rows for m in moments)
    totals = [total for m in moments if (total := m.total()) is not None]
    if not totals or rows == 0:
        return None
    if shared:
        mean = torch.zeros_like(totals[0])
        for total in totals:
            mean += total
        return mean.div_(rows)
    size = totals[0].shape[0]
    square = sum(float(total.diagonal().sum()) for total in totals) / (rows * size)
    return torch.eye(size, dtype=totals[0].dtype, device=totals[0].device) * square


def _shared_inputs(model: nn.Module, experts: str) -> Any:
    return getattr(model.get_submodule(experts), "shared_inputs", ())
