"""Signs that learn: each follows a latent number, S = sign(l), and the gradient passes straight through to l.

A sign has no useful gradient of its own. Its latent takes ∂L/∂l = ∂L/∂W ⊙ a bᵀ, the gradient of a weight that could
move freely (straight-through estimator, Bengio et al. 2013, arXiv:1308.3432), in Adam's steps. Latents are in units of
the weight's magnitude a_i b_j: they start at the margins that the fit left (``signs.margins``), so that signs which
hardly matter flip first, and are clamped to ±``LATENT_LIMIT``, so that none drifts away for good; the gradient itself
is never cut to zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_onebit.algorithms.sign_linear import SignPlane

LATENT_LIMIT = 3.0
# Latents start this far from zero at the least: the first steps must not flip signs for nothing.
LEAST_MARGIN = 0.02
# Below any gradient that tells something: a share of the loss's mean over millions of weights is small.
_EPSILON = 1e-15


class Latents:
    """Numbers that discrete weights follow, and the optimizer that moves them.

    Args:
        latents: float32 tensors by name; moved in place.
        betas: Adam's.
    """

    def __init__(self, latents: dict[str, Tensor], betas: tuple[float, float]) -> None:
        self.latents = latents
        values = list(latents.values())
        # Adam's steps do not depend on the gradients' scale; the rate is given anew at each.
        self._adam = torch.optim.Adam(values, lr=0.0, betas=betas, eps=_EPSILON, fused=True) if values else None

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Move the latents against the gradients that backward left, and drop those; ``rate`` is the largest step."""
        if self._adam is None:
            return
        self._adam.param_groups[0]["lr"] = rate
        self._adam.step()
        self.drop_gradients()
        self._follow()

    def _follow(self) -> None:
        """After a step: let no latent drift so far that it would take many steps to come back."""
        raise NotImplementedError

    def drop_gradients(self) -> None:
        """Forget what backward left."""
        for latent in self.latents.values():
            latent.grad = None

    def forget(self) -> None:
        """Drop Adam's moments."""
        if self._adam is not None:
            self._adam.state.clear()

    def publish(self) -> None:
        """Give the weights the values of their latents."""
        raise NotImplementedError

    def names(self) -> list[str]:
        """Of the values that the latents stand for."""
        return list(self.latents)

    def values(self) -> dict[str, Tensor]:
        """A copy of the values that the latents stand for."""
        raise NotImplementedError

    def go_back(self, values: Mapping[str, Tensor]) -> None:
        """Take other values, each latent within reach of its own, and forget the moments."""
        raise NotImplementedError

    def release(self) -> None:
        """Let the weights have no latents again; they stay as they are."""
        raise NotImplementedError

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors, and values for JSON, from which :meth:`load_state` goes on."""
        tensors = {f"{name}.latent": latent.clone() for name, latent in self.latents.items()}
        steps = {}
        for name, latent in self.latents.items():
            moments = self._adam.state.get(latent) if self._adam is not None else None
            if moments:
                steps[name] = int(moments["step"])  # an expert that no token chose has fewer
                tensors[f"{name}.m"] = moments["exp_avg"].clone()
                tensors[f"{name}.v"] = moments["exp_avg_sq"].clone()
        return tensors, {"steps": steps}

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Take up where :meth:`state` was called."""
        for name, latent in self.latents.items():
            latent.copy_(tensors[f"{name}.latent"])
            if self._adam is not None:
                self._adam.state.pop(latent, None)
                if f"{name}.m" in tensors:
                    self._adam.state[latent] = {
                        "step": torch.tensor(float(values["steps"][name]), device=latent.device),
                        "exp_avg": tensors[f"{name}.m"].to(latent.device, copy=True),
                        "exp_avg_sq": tensors[f"{name}.v"].to(latent.device, copy=True),
                    }


class JointLatents(Latents):
    """Several kinds as one; no name is in two of them."""

    def __init__(self, parts: Sequence[Latents]) -> None:
        super().__init__({name: latent for part in parts for name, latent in part.latents.items()}, (0.0, 0.0))
        self._adam, self.parts = None, list(parts)

    def step(self, rate: float) -> None:
        for part in self.parts:
            part.step(rate)

    def forget(self) -> None:
        for part in self.parts:
            part.forget()

    def publish(self) -> None:
        for part in self.parts:
            part.publish()

    def names(self) -> list[str]:
        return [name for part in self.parts for name in part.names()]

    def values(self) -> dict[str, Tensor]:
        return {name: tensor for part in self.parts for name, tensor in part.values().items()}

    def go_back(self, values: Mapping[str, Tensor]) -> None:
        for part in self.parts:
            part.go_back({name: values[name] for name in part.names()})

    def release(self) -> None:
        for part in self.parts:
            part.release()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        states = [part.state() for part in self.parts]
        tensors = {name: tensor for found, _ in states for name, tensor in found.items()}
        return tensors, {"parts": [values for _, values in states]}

    def load_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        for part, own in zip(self.parts, values["parts"], strict=True):
            part.load_state(tensors, own)


class SignLatents(Latents):
    """The latents of some planes, and their optimizer.

    Args:
        planes: whose signs may change.
        margins: {plane: (out, in) float}, how far each sign is from flipping, the sign itself included; a plane that is
            missing here starts at ±1. Changed where they are float32.
        betas: Adam's.

    Raises:
        ValueError: margins of another shape than their plane, or of a plane that is not there.
    """

    def __init__(
        self,
        planes: Mapping[str, SignPlane],
        margins: Mapping[str, Tensor] | None = None,
        betas: tuple[float, float] = (0.9, 0.95),
    ) -> None:
        margins = margins or {}
        unknown = [name for name in margins if name not in planes]
        if unknown:
            raise ValueError(f"SignLatents: margins of {unknown[0]!r}, which is not among the {len(planes)} planes")
        self.planes = dict(planes)
        super().__init__({name: self._start(name, p, margins.get(name)) for name, p in planes.items()}, betas)
        for name, plane in self.planes.items():
            plane.latent = self.latents[name]

    @staticmethod
    @torch.no_grad()
    def _start(name: str, plane: SignPlane, margins: Tensor | None) -> Tensor:
        if margins is None:
            return plane.signs.float()
        if margins.shape != plane.signs.shape:
            raise ValueError(
                f"SignLatents: margins of {name!r} have shape {tuple(margins.shape)}, expected "
                f"{tuple(plane.signs.shape)}"
            )
        own = margins.detach().to(plane.signs.device).float()
        return own.mul_(plane.signs).clamp_(LEAST_MARGIN, LATENT_LIMIT).mul_(plane.signs)

    def _follow(self) -> None:
        for latent in self.latents.values():
            latent.clamp_(-LATENT_LIMIT, LATENT_LIMIT)

    @torch.no_grad()
    def publish(self) -> None:
        """Give the planes the signs of their latents; they are not folded yet. A plane's own W follows its latent."""
        for name, plane in self.planes.items():
            plane.signs.copy_(self.latents[name].signbit()).mul_(-2).add_(1)

    def values(self) -> dict[str, Tensor]:
        """A copy of the signs, (out, in) bool each."""
        return {name: ~latent.signbit() for name, latent in self.latents.items()}

    @torch.no_grad()
    def go_back(self, values: Mapping[str, Tensor]) -> None:
        """Take other signs, each latent as far from zero as it is, and forget Adam's moments."""
        for name, latent in self.latents.items():
            latent.nan_to_num_(nan=LEAST_MARGIN).abs_().clamp_(LEAST_MARGIN, LATENT_LIMIT)
            latent.copy_(torch.where(values[name], latent, -latent))
        self.forget()

    def release(self) -> None:
        """Let the planes have no latents again; their signs stay as they are."""
        for plane in self.planes.values():
            plane.latent = None
        self.drop_gradients()
