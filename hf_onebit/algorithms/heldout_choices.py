"""What is chosen for a layer on data that its fit does not see: the Hessian's shrinkage, the correction's strength."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_onebit.algorithms.closed_form import dequantize_planes
from hf_onebit.algorithms.curvature import DAMPING, Curvature, cholesky
from hf_onebit.algorithms.sign_steps import closed_start, feed, solve_a

__all__ = ["CHOICE_ROWS", "STRENGTHS", "choose_shrinkage", "choose_strength", "drift_loss", "target_correction"]

# Strengths of a target's correction to try.
STRENGTHS = (0.0, 0.5, 1.0)
# Rows that shrinkages and strengths are chosen on, of each layer.
CHOICE_ROWS = 128
# Entries of a Hessian that may be in memory more often than needed.
_KEPT = 1 << 24


@torch.no_grad()
def choose_shrinkage(
    W: Tensor,
    H: Tensor,
    H_heldout: Tensor,
    *,
    K: Tensor | None = None,
    C_heldout: Tensor | None = None,
    strengths: Sequence[float] = STRENGTHS,
    candidates: Sequence[float] = (0.02, 0.08, 0.25),
    planes: int = 1,
    rows: int = CHOICE_ROWS,
    layer: str | None = None,
) -> tuple[Curvature, dict[float, dict[float, float]]]:
    """The shrinkage whose fit on ``H`` does best on data that it did not see.

    Rows of W are independent but for b, so a sample of them tells for all; and what flips and the exact b gain
    afterwards differs little between candidates, so the fits are error feedback and a alone.

    Args:
        W: (out, in).
        H: Hessian of the data to fit.
        H_heldout: Hessian of the other data, from the same layer.
        K, C_heldout, strengths: the layer's target is going to be corrected, see ``choose_strength``: then each
            shrinkage is tried with the strength that suits it best.
        candidates: shrinkages to try, 0 to 1, from the smallest on until one does worse than the one before.
        planes, layer: as for ``fit_signs``.
        rows: how many rows of W to try them on, evenly spaced.

    Returns:
        the curvature of the best, and for each shrinkage tried {strength: loss on the held-out data}, but for a term
        that is the same for all: ``drift_loss`` with C_heldout, by default H_heldout, over tr(W H Wᵀ). Without K the
        only strength is 0.

    Raises:
        ValueError: no candidates.
    """
    if not candidates:
        raise ValueError("choose_shrinkage: got no candidates, expected at least one number from 0 to 1")
    strengths = strengths if K is not None else (0.0,)
    trial = _Trial(W, K, strengths, H_heldout, C_heldout, planes, rows, layer)
    losses: dict[float, dict[float, float]] = {}
    least: list[float] = []
    best: Curvature | None = None
    for candidate in sorted(candidates):
        curvature = Curvature(H, candidate)
        found = trial.losses(curvature)
        losses[candidate] = dict(zip(strengths, found, strict=True))
        least.append(min(found))
        if len(least) > 1 and least[-1] >= least[-2]:
            break
        # Made again rather than kept where it is large: the next takes as much memory.
        best = curvature if H.numel() <= _KEPT else None
        del curvature
    if best is None:
        best = Curvature(H, min(losses, key=lambda shrinkage: min(losses[shrinkage].values())))
    return best, losses


@torch.no_grad()
def choose_strength(
    W: Tensor,
    K: Tensor,
    curvature: Curvature,
    H_heldout: Tensor,
    C_heldout: Tensor,
    *,
    strengths: Sequence[float] = STRENGTHS,
    planes: int = 1,
    rows: int = CHOICE_ROWS,
    layer: str | None = None,
) -> tuple[float, dict[float, float]]:
    """The strength of a target correction that does best on data which neither it nor the fit saw.

    Args:
        W: (out, in) float weights.
        K: correction (in, in), see ``target_correction``.
        curvature: of the data to fit.
        H_heldout, C_heldout: of the other data, see ``drift_loss``.
        strengths: to try, at least one.
        planes, rows, layer: as for ``choose_shrinkage``.

    Returns:
        the best strength, and the loss of each as for ``choose_shrinkage``.
    """
    trial = _Trial(W, K, strengths, H_heldout, C_heldout, planes, rows, layer)
    losses = dict(zip(strengths, trial.losses(curvature), strict=True))
    return min(losses, key=lambda strength: losses[strength]), losses


class _Trial:
    """Quick fits of a sample of a layer's rows, corrected by several strengths, judged on data apart."""

    def __init__(
        self,
        W: Tensor,
        K: Tensor | None,
        strengths: Sequence[float],
        H_heldout: Tensor,
        C_heldout: Tensor | None,
        planes: int,
        rows: int,
        layer: str | None,
    ) -> None:
        W = W.detach().float()
        self._planes, self._rows, self._layer = planes, rows, layer
        corrected = W if K is None else W @ K
        self._targets = [W + strength * corrected if strength else W for strength in strengths]
        sample = self._sample(W)
        self._H = H_heldout.float()
        self._reached = sample @ (self._H if C_heldout is None else C_heldout.float())
        self._energy = float(((sample @ self._H) * sample).sum(dtype=torch.float64)) or 1.0
        self._starts: tuple[Tensor, Tensor] | None = None

    def _sample(self, x: Tensor) -> Tensor:
        return x[:: max(1, len(x) // self._rows)][: self._rows]

    def losses(self, curvature: Curvature) -> list[float]:
        """Of each strength."""
        H = curvature.H
        if self._starts is None:  # shrinkage leaves the diagonal alone, which is all that these depend on
            found = [closed_start(target, self._planes, H, self._layer)[1:] for target in self._targets]
            self._starts = (
                torch.stack([torch.stack([self._sample(x) for x in a]) for a, _ in found], 1),
                torch.stack([b for _, b in found], 1),
            )
        a, b = self._starts  # (planes, strengths, rows), (planes, strengths, in)
        # One pass over the columns for all: to error feedback, other targets are other rows.
        targets = torch.cat([self._sample(target) for target in self._targets])
        S = feed(
            targets,
            lambda columns: (b[:, :, columns, None] * a[:, :, None]).transpose(1, 2).flatten(2),
            self._planes,
            curvature,
        )
        P = S.view(*a.shape, -1).mul_(b[:, :, None]).view(S.shape)
        fits = solve_a(targets @ H, P, P @ H)[:, :, None].mul(P).sum(0)
        return [
            float(((Q @ self._H - 2 * self._reached) * Q).sum(dtype=torch.float64)) / self._energy
            for Q in fits.split(len(self._reached))
        ]


@torch.no_grad()
def target_correction(H: Tensor, C: Tensor, damping: float = DAMPING) -> Tensor:
    """The K for which W + strength · W K undoes, as far as a linear layer can, what the layers before already lost.

    The layer used to see inputs x and now sees x̂. The W* that minimises E‖W x − W* x̂‖² + λ ‖W* − W‖² is
    W + W (C − H) (H + λ)⁻¹ with H = E[x̂ x̂ᵀ] and C = E[x x̂ᵀ] (Arai & Ichikawa 2025, arXiv:2504.09629, eq. 8).

    Args:
        H: (in, in), from the quantized prefix's activations.
        C: (in, in), float activations (first index) against quantized ones (second), in H's units.
        damping: λ as a fraction of the mean of H's diagonal.

    Returns:
        K (in, in) float32; zeros where H is zero.
    """
    mean = float(H.diagonal().double().mean())
    if not mean > 0:
        return torch.zeros_like(H, dtype=torch.float32)
    factor = cholesky((H / mean).float(), damping)
    return torch.cholesky_solve(((C - H) / mean).float().T.contiguous(), factor).T.contiguous()


@torch.no_grad()
def drift_loss(W: Tensor, planes: Sequence[tuple[Tensor, Tensor, Tensor]], H: Tensor, C: Tensor) -> float:
    """E‖W x − Q x̂‖² but for E‖W x‖², which no Q changes: tr(Q H Qᵀ) − 2 tr(W C Qᵀ), in H's units.

    Args:
        W: (out, in) float weights.
        planes: stored planes (signs, a, b), Q their sum.
        H, C: as for ``target_correction``.
    """
    Q = dequantize_planes(planes)
    quadratic = float(((Q @ H.float()) * Q).sum(dtype=torch.float64))
    return quadratic - 2 * float(((W.detach().float() @ C.float()) * Q).sum(dtype=torch.float64))
