"""Two planes that learn as one: a latent number a weight, and both of its signs from the cell that the number is in.

A weight of two planes, W_ij = a_i b_j (S0 + r S1) with r_ij = a1_i b1_j / (a_i b_j), has four levels. Its neighbours
1 - |r| and |r| - 1 differ in both signs: a sign with a latent of its own (``latents.SignLatents``) would have to pass
through a level that is further away. So one latent v, in units of a_i b_j, stands for both, and the weight takes the
level next to it: for |r| <= 1 the levels meet at 0 and at ±1, whatever r, and

    S0 = sign(v),   S1 = sign(r) sign(v) sign(|v| - 1);

for |r| > 1 the planes change places, and the levels meet at 0 and ±|r|. The gradient passes straight through to v, as
of a weight that could move freely: ∂L/∂v = ∂L/∂W ⊙ a bᵀ.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_onebit.algorithms.latents import LATENT_LIMIT, LEAST_MARGIN, JointLatents, Latents, SignLatents
from hf_onebit.algorithms.sign_linear import SignPlane

# Four levels lie closer than two, and what two planes leave of the error is small: steps are this part of a sign's.
STEP = 0.3
# Margins are handed on in float16.
_MOST = 6e4


class PairLatents(Latents):
    """The latents of layers of two planes, and their optimizer.

    Args:
        pairs: {layer: names of its two planes}.
        planes: those planes, by name.
        margins: {plane: (out, in) float}, as for ``SignLatents``; the latent starts where the second plane's says that
            the weight would like to be. A layer without starts at its level. Float32 ones are changed at the end.
        betas: Adam's.

    Raises:
        ValueError: margins of another shape than their plane.
    """

    def __init__(
        self,
        pairs: Mapping[str, tuple[str, str]],
        planes: Mapping[str, SignPlane],
        margins: Mapping[str, Tensor] | None = None,
        betas: tuple[float, float] = (0.9, 0.95),
    ) -> None:
        self.pairs, self._margins = dict(pairs), dict(margins or {})
        self.planes = {layer: (planes[first], planes[second]) for layer, (first, second) in pairs.items()}
        for names in self.pairs.values():
            for name in names:
                found, expected = self._margins.get(name), planes[name].signs.shape
                if found is not None and found.shape != expected:
                    raise ValueError(
                        f"PairLatents: margins of {name!r} have shape {tuple(found.shape)}, expected {tuple(expected)}"
                    )
        super().__init__({layer: self._start(layer) for layer in pairs}, betas)
        for layer, (first, _) in self.planes.items():
            first.latent, first.stands_for_two = self.latents[layer], True

    def names(self) -> list[str]:
        return [name for pair in self.pairs.values() for name in pair]

    def step(self, rate: float) -> None:
        super().step(STEP * rate)

    def publish(self) -> None:
        """Nothing: planes have the signs that the last step gave them, which later scales do not change."""

    def values(self) -> dict[str, Tensor]:
        """A copy of the signs, (out, in) bool each, by plane."""
        return {
            name: plane.signs > 0
            for layer, names in self.pairs.items()
            for name, plane in zip(names, self.planes[layer], strict=True)
        }

    @torch.no_grad()
    def go_back(self, values: Mapping[str, Tensor]) -> None:
        """Take other signs, each latent at the nearest place that has them, and forget Adam's moments."""
        for layer, names in self.pairs.items():
            one, two = (values[name] for name in names)
            latent = self.latents[layer].nan_to_num_(nan=0.0)
            latent.copy_(_inside(latent, one, two, _ratio(*self.planes[layer])))
            for plane, positive in zip(self.planes[layer], (one, two), strict=True):
                _give(plane, positive)
        self.forget()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, values = super().state()
        return tensors | {f"{name}.signs": signs for name, signs in self.values().items()}, values

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        super().load_state(tensors, values)
        for layer, names in self.pairs.items():
            for plane, name in zip(self.planes[layer], names, strict=True):
                _give(plane, tensors[f"{name}.signs"])

    @torch.no_grad()
    def release(self) -> None:
        """Let the planes have no latents again; their signs stay as they are."""
        for layer, (first, second) in self.planes.items():
            first.latent, first.stands_for_two = None, False
            v, ratio = self.latents[layer], _ratio(first, second)
            for name, kept in zip(self.pairs[layer], (v, (v - first.signs) / _not_zero(ratio)), strict=True):
                if name in self._margins and self._margins[name].dtype == torch.float32:
                    self._margins[name].copy_(kept.nan_to_num().clamp(-_MOST, _MOST))
        self.drop_gradients()

    @torch.no_grad()
    def _start(self, layer: str) -> Tensor:
        first, second = self.planes[layer]
        ratio = _ratio(first, second)
        margin = self._margins.get(self.pairs[layer][1])
        own = second.signs.float() if margin is None else margin.detach().to(ratio.device).float()
        return _inside(first.signs + ratio * own, first.signs > 0, second.signs > 0, ratio)

    def _follow(self) -> None:
        """Latents stay near, and the planes take their signs; both depend on the ratio, which is made once."""
        for layer, latent in self.latents.items():
            ratio = _ratio(*self.planes[layer])
            limit = ratio.abs().clamp_min_(1).mul_(LATENT_LIMIT)
            latent.clamp_(-limit, limit)
            for plane, positive in zip(self.planes[layer], _signs_of(latent, ratio), strict=True):
                _give(plane, positive)


def sign_latents(planes: Mapping[str, SignPlane], margins: Mapping[str, Tensor], betas: tuple[float, float]) -> Latents:
    """The latents of planes named ``layer.number``: of two planes of one layer together, of all others each by itself.

    Raises:
        ValueError: as ``SignLatents`` and ``PairLatents``.
    """
    layers: dict[str, list[str]] = {}
    for name in planes:
        layers.setdefault(name.rpartition(".")[0], []).append(name)
    pairs = {layer: (names[0], names[1]) for layer, names in layers.items() if len(names) == 2}
    paired = {name for names in pairs.values() for name in names}
    alone = {name: plane for name, plane in planes.items() if name not in paired}
    single = SignLatents(alone, {name: m for name, m in margins.items() if name not in paired}, betas)
    if not pairs:
        return single
    both = PairLatents(pairs, planes, {name: m for name, m in margins.items() if name in paired}, betas)
    return JointLatents([single, both]) if alone else both


def _give(plane: SignPlane, positive: Tensor) -> None:
    """Have a plane take signs, (out, in) bool; it is not folded yet."""
    plane.signs.copy_(positive).mul_(2).sub_(1)


def _ratio(first: SignPlane, second: SignPlane) -> Tensor:
    """r (out, in): the second plane's magnitude, and sign, in units of the first one's."""
    return torch.outer(second.a / _not_zero(first.a), second.b / _not_zero(first.b))


def _not_zero(values: Tensor) -> Tensor:
    return torch.where(values.abs() < 1e-12, torch.full_like(values, 1e-12), values)


def _signs_of(latent: Tensor, ratio: Tensor) -> tuple[Tensor, Tensor]:
    """Whether each sign of the level next to the latent is +1, (out, in) bool."""
    size, positive = ratio.abs(), latent >= 0
    outer = latent.abs() >= size.clamp_min(1)  # both planes point the same way
    smaller = positive == outer  # +1 outside of a positive latent's border, and inside of a negative one's
    # For |r| > 1 the planes change places. (On a CPU torch.where of booleans takes tens of times as long.)
    trade = (positive ^ smaller) & (size > 1)
    return positive ^ trade, (smaller ^ trade) == (ratio >= 0)


def _inside(latent: Tensor, one: Tensor, two: Tensor, ratio: Tensor) -> Tensor:
    """The latents, each moved no further than into the cell of these signs (bool)."""
    size, aligned = ratio.abs(), two == (ratio >= 0)
    leads = torch.where(size <= 1, one, aligned)
    distance = torch.where(leads, latent, -latent)
    border = size.clamp_min(1)
    # A cell narrower than two margins keeps its middle.
    gap = (border / 2).clamp_max(LEAST_MARGIN)
    outer = torch.minimum(torch.maximum(distance, border + gap), border * LATENT_LIMIT)
    inner = torch.minimum(distance.clamp_min(0), border - gap).clamp_min(LEAST_MARGIN)
    moved = torch.where(one == aligned, outer, inner)
    return torch.where(leads, moved, -moved)
