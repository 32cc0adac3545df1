"""One optimizer step on packed words: piece by piece unpacked, moved (``algorithms.update``) and packed again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_onebit.algorithms.update import nearest_codes, step_size, update_moment
from hf_onebit.formats.weight_layout import WeightLayout

__all__ = ["Step", "update_words"]

# Weights of one piece: its float copies are this many numbers each.
_TILE = 1 << 21


@dataclass(frozen=True)
class Step:
    """The arguments of ``MPQWeightParameter.update``, by its names."""

    exp_avg_s: Tensor | None
    exp_avg_l: Tensor | None
    step: Tensor | None
    lr: float
    weight_decay: float
    beta1: float
    beta2: float
    eps: float
    dtype: torch.dtype
    correct_bias: bool
    projector: Any

    def direction(self, gradient: Tensor, columns: slice | None = None) -> Tensor:
        """u of ``algorithms.update``; the moments, or some columns of them, are moved on."""
        states = (self.exp_avg_l, self.exp_avg_s)
        m_state, v_state = (s if s is None or columns is None else s[:, columns] for s in states)
        m = update_moment(m_state, gradient, self.beta1)
        v = update_moment(v_state, gradient.square(), self.beta2)
        return m / (v.sqrt() + self.eps)


def update_words(words: Tensor, layout: WeightLayout, gradient: Tensor, step: Step) -> None:
    """Write the words after one step; see ``MPQWeightParameter.update``.

    Raises:
        ValueError: a gradient or moments of another shape, or a gradient that is not finite.
    """
    shape = (layout.in_features, words.shape[1])
    if step.projector is None and tuple(gradient.shape) != shape:
        raise ValueError(f"update got a gradient of shape {tuple(gradient.shape)}, expected (in, out) = {shape}")
    if not bool(gradient.isfinite().all()):
        raise ValueError("update got a gradient with inf or nan; nothing was changed")
    t = 1 if step.step is None else int(step.step) + 1
    if step.projector is not None and tuple(gradient.shape) == shape:
        like = step.exp_avg_s if step.exp_avg_l is None else step.exp_avg_l
        if like is None or tuple(like.shape) != shape:  # not projected yet
            gradient = step.projector.project(gradient, t)
    for name, state in (("exp_avg_s", step.exp_avg_s), ("exp_avg_l", step.exp_avg_l)):
        if state is not None and state.shape != gradient.shape:
            raise ValueError(f"{name} has shape {tuple(state.shape)}, expected the gradient's {tuple(gradient.shape)}")
    dtype = torch.promote_types(step.dtype, torch.float32)
    eta, shrink = step_size(step.lr, step.beta1, step.beta2, t, step.correct_bias), 1 - step.lr * step.weight_decay
    whole = None if step.projector is None else step.projector.project_back(step.direction(gradient.to(dtype)))
    columns = max(1, _TILE // layout.in_features)
    for first in range(0, shape[1], columns):
        part = slice(first, first + columns)
        u = step.direction(gradient[:, part].to(dtype), part) if whole is None else whole[:, part].to(dtype)
        _move(words[:, part], layout, part, u * eta, shrink)
    if step.step is not None:
        step.step.add_(1)


def _move(words: Tensor, layout: WeightLayout, columns: slice, step: Tensor, shrink: float) -> None:
    """Shrink the weight and subtract ``step`` ``(in, columns)``, inputs in their own order; ``words`` are written."""
    codes = layout.unpack(words)
    scale, offset = layout.affine(columns, step.dtype)
    W = codes.to(step.dtype).mul_(scale).sub_(offset).mul_(shrink)
    W -= step if layout.perm is None else step.index_select(0, layout.perm)
    words.copy_(layout.pack(nearest_codes(W, scale, offset, layout.levels(), codes)))
