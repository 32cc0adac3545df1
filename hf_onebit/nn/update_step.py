"""What one optimizer step on packed words is given: the layout of the words, the moments, how codes are rounded."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from hf_onebit.algorithms.update import root, step_size, update_moment

__all__ = ["Layout", "Rounding", "Step", "Tally", "advance"]


class Layout(Protocol):
    """What the words mean; ``formats.weight_layout.WeightLayout`` is one."""

    @property
    def in_features(self) -> int:
        """Rows of the matrix."""

    @property
    def perm(self) -> Tensor | None:
        """The input of each packed row; None where that is the row itself."""

    def unpack(self, words: Tensor) -> Tensor:
        """Codes uint8 ``(in, columns)`` of some columns of the words."""

    def pack(self, codes: Tensor) -> Tensor:
        """Undo ``unpack``."""

    def levels(self) -> Tensor:
        """uint8 ``(in, 1)``: the largest code of each row."""

    def affine(self, columns: slice, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(scale, offset) of some columns, so that W = scale * code - offset."""


@dataclass(frozen=True)
class Rounding:
    """How codes take a step; the attributes of an ``MPQWeightParameter``, by their names."""

    rounding: str = "stochastic"
    seed: int = 0
    stream: int = 0
    inertia: float = 1e-3


@dataclass
class Tally:
    """Sums over one step; tensors of one number, so that nothing waits for the device.

    Attributes:
        weights: how many there are.
        changed: codes that are others now.
        saturated: codes at the first or the last of their levels.
        moved: absolute steps in levels; of flips: of the signs that were against their inertia's vote.
        noise: variances of the rounding of those steps.
    """

    weights: int = 0
    changed: Tensor | float = 0.0
    saturated: Tensor | float = 0.0
    moved: Tensor | float = 0.0
    squared: Tensor | float = 0.0
    noise: Tensor | float = 0.0


@dataclass(frozen=True)
class Step:
    """The arguments of ``MPQWeightParameter.update``, by its names."""

    exp_avg_s: Any
    exp_avg_l: Any
    step: Tensor | None
    lr: float
    weight_decay: float
    beta1: float
    beta2: float
    eps: float
    dtype: torch.dtype
    correct_bias: bool
    projector: Any
    count: int = 0
    rounding: Rounding = field(default_factory=Rounding)
    tally: Tally | None = None
    given_eta: float | None = None

    @property
    def t(self) -> int:
        """Number of this step, from 1."""
        return (self.count if self.step is None else int(self.step)) + 1

    @property
    def eta(self) -> float:
        """The step size; a moment without a state has seen this gradient only."""
        if self.given_eta is not None:
            return self.given_eta
        times = (1 if self.exp_avg_l is None else self.t, 1 if self.exp_avg_s is None else self.t)
        return step_size(self.lr, self.beta1, self.beta2, times, self.correct_bias)

    def direction(self, gradient: Tensor, columns: slice, words: Tensor) -> Tensor:
        """u of ``algorithms.update`` for some columns; the moments move on."""
        v = advance(self.exp_avg_s, columns, gradient.square(), self.beta2, words)
        m = advance(self.exp_avg_l, columns, gradient, self.beta1, words)
        return m / root(v).add_(self.eps)


def advance(state: Any, columns: slice, value: Tensor, beta: float, words: Tensor) -> Tensor:
    """A new tensor: the moment of some columns after one step."""
    if state is None or isinstance(state, Tensor):
        moved = update_moment(None if state is None else state[:, columns], value, beta)
        return moved.clone() if isinstance(state, Tensor) and moved.dtype == state.dtype else moved
    found: Tensor = state.advance(columns, value, beta, words)
    return found
