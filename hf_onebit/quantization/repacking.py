"""A packed layer made to stand for another float weight, in the format that it has: nearest by ‖W - Ŵ‖, without data.

Every search starts from what the layer holds and from scratch, and the better end is taken, so the result is never
farther from the new weight than the layer was. Both are alternating minimisations, each half of which is exact:

* onebit, of each plane with what the others leave, R: given the signs, a_i = Σ_j R_ij S_ij b_j / Σ_j b_j², and b
  likewise; from scratch, the closed form of ``algorithms.closed_form``.
* mpq: given codes, each group's scale and zero by least squares; given those, the nearest codes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from hf_onebit.algorithms.closed_form import closed_form_planes
from hf_onebit.formats import onebit
from hf_onebit.formats.weight_layout import WeightLayout
from hf_onebit.nn.linear import OneBitLinear
from hf_onebit.nn.replace import PackedModule

Tensors = dict[str, Tensor]
_ROUNDS = 6


@torch.no_grad()
def repack(layer: PackedModule, weight: Tensor, name: str = "") -> tuple[PackedModule, Tensor]:
    """A copy of a packed layer that stands for another weight.

    Args:
        layer: gives the format, and a start; unchanged.
        weight: float ``(out, in)``; of an embedding ``(rows, dimensions)``.
        name: of the layer, for errors.

    Returns:
        The copy, its scales float16 and frozen, and the float32 weight ``(out, in)`` that it stands for.

    Raises:
        ValueError: the weight has another shape, holds NaN or inf, or float16 cannot hold its scales.
    """
    W = weight.detach().float()
    expected = tuple(layer.dequantize().shape)
    if tuple(W.shape) != expected or not bool(torch.isfinite(W).all()):
        raise ValueError(
            f"{name or 'repack'} got a weight of shape {tuple(W.shape)}, expected finite values of shape {expected}"
        )
    made = copy.deepcopy(layer)
    for scale in made.scale_names:
        setattr(made, scale, nn.Parameter(getattr(made, scale).detach().half(), requires_grad=False))
    best = {n: p.detach().clone() for n, p in made.named_parameters() if n != "bias"}
    dense = made.dequantize()
    error = _distance(dense, W)
    candidates = _signs(made, W, name) if isinstance(made, OneBitLinear) else _codes(made, W)
    for tensors in candidates:
        if not all(bool(torch.isfinite(t).all()) for t in tensors.values() if t.is_floating_point()):
            continue
        _write(made, tensors)
        found = made.dequantize()
        distance = _distance(found, W)
        if distance < error:
            error, dense, best = distance, found, tensors
    _write(made, best)
    return made, dense


def _distance(A: Tensor, B: Tensor) -> float:
    return float((A - B).double().norm())


def _write(layer: PackedModule, tensors: Tensors) -> None:
    for name, tensor in tensors.items():
        layer.get_parameter(name).copy_(tensor)


# -- onebit ------------------------------------------------------------------------------------------------------------


def _signs(layer: OneBitLinear, W: Tensor, name: str) -> Iterator[Tensors]:
    held = {n: p.detach() for n, p in layer.named_parameters() if n != "bias"}
    for start in (
        onebit.unpack_planes(held, layer.in_features),
        closed_form_planes(W, layer.planes, layer=name or None),
    ):
        planes = [(torch.where(s, 1.0, -1.0), a.float(), b.float()) for s, a, b in start]
        for _ in range(_ROUNDS):
            for index in range(len(planes)):
                planes[index] = _rank_one(W - _others(planes, index), planes[index])
        yield onebit.pack_planes([(S > 0, a.half(), b.half()) for S, a, b in planes])


def _others(planes: list[tuple[Tensor, Tensor, Tensor]], index: int) -> Tensor | float:
    total: Tensor | float = 0.0
    for other, (S, a, b) in enumerate(planes):
        if other != index:
            total = total + a[:, None] * S * b
    return total


def _rank_one(R: Tensor, plane: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    S, a, b = plane
    M = R * S
    a = (M @ b) / b.square().sum().clamp(min=torch.finfo(b.dtype).tiny)
    b = (a @ M) / a.square().sum().clamp(min=torch.finfo(a.dtype).tiny)
    gauge = (a.norm() / b.norm().clamp(min=torch.finfo(b.dtype).tiny)).sqrt()
    if not bool(gauge > 0):
        return S, a, b
    return S, a / gauge, b * gauge


# -- mpq ---------------------------------------------------------------------------------------------------------------


def _codes(layer: PackedModule, W: Tensor) -> Iterator[Tensors]:
    layout: WeightLayout = cast(Any, layer.weight).weight_layout()
    packed = W.T if layout.perm is None else W.T.index_select(0, layout.perm)
    present = layout.unpack(layer.weight.detach())
    groups = _Groups(packed, layout)
    for s, z in (groups.split(*groups.present()), groups.split(*groups.range())):
        scales, zeros = s, z
        for _ in range(_ROUNDS):
            scale, offset = groups.spread(scales, zeros)
            codes = _nearest_codes(packed, scale, offset, layout.levels(), present)
            yield groups.tensors(codes, scales, zeros)
            scales, zeros = groups.fit(codes, scales, zeros)


def _nearest_codes(W: Tensor, scale: Tensor, offset: Tensor, levels: Tensor, codes: Tensor) -> Tensor:
    """The codes (in, out) nearest to a weight; those that are there where the scale is 0 and all mean the same."""
    q = ((W + offset) / scale).round_()
    q = torch.minimum(q.clamp_(min=0), levels.to(q.dtype))
    return torch.where(scale == 0, codes.to(q.dtype), q).to(torch.uint8)


class _Groups:
    """Least squares of every group of one layer at once; matrices are (in, out) in packed order."""

    def __init__(self, W: Tensor, layout: WeightLayout) -> None:
        self.W, self.layout = W, layout
        self.symmetric = layout.middle is not None

    def sums(self, values: Tensor) -> Tensor:
        """(in, out) -> (groups, out)."""
        return values.new_zeros(self.layout.scales.shape).index_add_(0, self.layout.group, values)

    def present(self) -> tuple[Tensor, Tensor | None]:
        """Scales and zeros as they are."""
        zeros = self.layout.zeros
        return self.layout.scales.detach().float(), None if zeros is None else zeros.detach().float()

    def range(self) -> tuple[Tensor, Tensor | None]:
        """Scales and zeros that just span the weights of each group."""
        index = self.layout.group[:, None].expand_as(self.W)
        empty = self.W.new_zeros(self.layout.scales.shape)
        top = self.sums(self.layout.levels().float().expand_as(self.W)) / self.sums(torch.ones_like(self.W))
        if self.symmetric:
            peak = empty.scatter_reduce(0, index, self.W.abs(), "amax", include_self=False)
            return peak / (top / 2).clamp(min=0.5), None
        high = empty.scatter_reduce(0, index, self.W, "amax", include_self=False)
        low = empty.scatter_reduce(0, index, self.W, "amin", include_self=False)
        return (high - low) / top, -low

    def split(self, scales: Tensor, zeros: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """As float16 keeps them."""
        return scales.half().float(), None if zeros is None else zeros.half().float()

    def spread(self, scales: Tensor, zeros: Tensor | None) -> tuple[Tensor, Tensor]:
        """Scale and offset of each row."""
        scale = scales.index_select(0, self.layout.group)
        if zeros is not None:
            return scale, zeros.index_select(0, self.layout.group)
        assert self.layout.middle is not None
        return scale, scale * self.layout.middle

    def fit(self, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The best scales and zeros for codes, as float16 keeps them; where codes are all alike, those that were."""
        q = codes.float()
        if zeros is None:
            assert self.layout.middle is not None
            q = q - self.layout.middle
            power = self.sums(q * q)
            best = torch.where(power > 0, self.sums(q * self.W) / power.clamp(min=1e-12), scales)
            return self.split(best, None)
        n = self.sums(torch.ones_like(q)).clamp(min=1)
        q_mean, w_mean = self.sums(q) / n, self.sums(self.W) / n
        q_off = q - q_mean.index_select(0, self.layout.group)
        power = self.sums(q_off * q_off)
        best = torch.where(power > 0, self.sums(q_off * self.W) / power.clamp(min=1e-12), scales)
        return self.split(best, best * q_mean - w_mean)

    def tensors(self, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensors:
        """By the names of docs/formats.md."""
        found = {"weight": self.layout.pack(codes), "scales": scales.half()}
        return found if zeros is None else {**found, "zeros": zeros.half()}
