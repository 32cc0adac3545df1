"""What the operator ``packed_step`` takes, from what an update is given, and back; see ops/schema_update.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_onebit.algorithms.moments import BlockwiseMoment, FactoredMoment, Factors
from hf_onebit.formats.mpq import zero_point
from hf_onebit.formats.sign_layout import SignLayout
from hf_onebit.formats.weight_layout import WeightLayout

__all__ = ["Operands", "moment_of", "operands_of", "tensors_of"]

Pair = tuple[Tensor | None, Tensor | None]


@dataclass(frozen=True)
class Operands:
    """A layout as tensors; the operator's arguments of these names."""

    scales: Tensor
    zeros: Tensor | None
    input_scales: Tensor | None
    group: Tensor
    perm: Tensor | None
    blocks: tuple[int, ...]

    def of(self, part: slice) -> Operands:
        """Those of some columns."""
        zeros = None if self.zeros is None else self.zeros[:, part]
        return Operands(self.scales[:, part], zeros, self.input_scales, self.group, self.perm, self.blocks)

    def layout(self) -> WeightLayout | SignLayout:
        """Undo :func:`operands_of`."""
        rows = self.group.numel()
        if self.input_scales is not None:
            return SignLayout(rows, self.scales[0], self.input_scales)
        flat = self.blocks
        blocks = tuple(zip(flat[::3], flat[1::3], flat[2::3], strict=True))
        middle = None
        if self.zeros is None:
            middle = torch.cat([torch.full((held, 1), zero_point(bits)) for bits, held, _ in blocks])
            middle = middle.to(self.scales.device)
        return WeightLayout(rows, blocks, self.group, self.perm, self.scales, self.zeros, None, middle)


def operands_of(layout: Any, words: Tensor) -> Operands | None:
    """The layout of some words as tensors; None for one that is not ours."""
    if isinstance(layout, SignLayout):
        group = torch.zeros(layout.in_features, dtype=torch.int64, device=words.device)
        blocks = (1, layout.in_features, words.shape[0])
        return Operands(layout.a[None, :], None, layout.b, group, None, blocks)
    if not isinstance(layout, WeightLayout):
        return None
    zeros = layout.zeros
    if layout.zero_points is not None:
        zeros = layout.scales.to(torch.float32) * layout.zero_points.to(torch.float32)
    flat = tuple(number for block in layout.blocks for number in block)
    return Operands(layout.scales, zeros, None, layout.group, layout.perm, flat)


def tensors_of(state: Any, lane: int) -> Pair | None:
    """(values, peaks) of a moment as the operator takes them; None where it does not."""
    if state is None:
        return None, None
    if isinstance(state, FactoredMoment):
        return state.factors()
    pair: Pair = (state, None)
    if isinstance(state, BlockwiseMoment):
        if state.lane != lane:
            return None
        pair = state.codes, state.peaks
    elif not isinstance(state, Tensor) or state.dtype != torch.float32:
        return None
    return pair if all(tensor is None or has_neighbours(tensor) for tensor in pair) else None


def moment_of(values: Tensor | None, peaks: Tensor | None, lane: int) -> Any:
    """Undo :func:`tensors_of`."""
    if values is None or peaks is None:
        return values
    return Factors(values, peaks) if values.dim() == 1 else BlockwiseMoment(values, peaks, lane)


def has_neighbours(matrix: Tensor) -> bool:
    """Whether the columns of a matrix are side by side in memory."""
    return matrix.dim() == 2 and (matrix.shape[1] <= 1 or matrix.stride(1) == 1)
