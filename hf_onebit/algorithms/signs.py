"""Signs and scales chosen for a layer's outputs: W ≈ Σ_p diag(a_p) S_p diag(b_p) under the full Hessian.

    closed form ──▶ error feedback ──▶ ⟳ ( flips ─ a ─ b ) ──▶ fp16

The closed form asks for the nearest weights; this asks for the nearest outputs. With H = X Xᵀ of the layer's inputs
the loss is

    L(Q) = tr((W − Q) H (W − Q)ᵀ) = ‖(W − Q) X‖²,   Q = Σ_p diag(a_p) S_p diag(b_p)

and its rows are independent given b. Four steps lower it, the last three never raise it:

* Error feedback (Frantar et al. 2022, arXiv:2210.17323, for signs): columns are rounded one by one, each to what the
  errors of those before it ask for: with H = U D Uᵀ, U upper with a unit diagonal, w_k + Σ_{j < k} (W − Q)_j U_jk.
* Flips: with G = (W − Q) H, changing q_ij by −d changes L by 2 d G_ij + d² H_jj. Column by column, all rows side by
  side, each entry takes the signs that lower L most (coordinate descent; with two planes all four combinations).
* a, exactly: one P x P system a row. b, exactly: [(Sᵀ diag(a²) S) ∘ H] b = Σ_i a_i s_i ∘ (H w_i), one plane at a time.

H is an estimate. ``curvature.shrink`` moves it towards its diagonal, by as much as serves a slice of the data that was
held out (``heldout_choices``). The steps are in ``sign_steps``. Letters: W, Q (out, in); H, G as above; signs as ±1 in
float32 while they are worked on. The derivations and figures are in docs/methods/signs.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_onebit.algorithms.closed_form import Plane, dequantize_planes, to_half
from hf_onebit.algorithms.curvature import Curvature, check_fit
from hf_onebit.algorithms.sign_steps import (
    as_signs,
    closed_start,
    error_feedback,
    fit_scales,
    residual,
    residual_of,
    solve_a,
    sweep,
)

__all__ = ["SignFit", "fit_signs", "margins", "output_loss"]


@dataclass(frozen=True, eq=False)
class SignFit:
    """Planes fitted to a layer's outputs.

    Attributes:
        planes: for each plane signs (out, in) bool, a (out,) fp16, b (in,) fp16, as they are stored.
        losses: L / tr(W H Wᵀ) after the start, after error feedback, after every round, and of the stored planes.
        shrinkage: the share of H's off-diagonal that was given up, 0 to 1.
    """

    planes: list[tuple[Tensor, Tensor, Tensor]]
    losses: list[float] = field(default_factory=list)
    shrinkage: float = 0.0


@torch.no_grad()
def fit_signs(
    W: Tensor, curvature: Curvature, *, planes: int = 1, rounds: int = 4, layer: str | None = None
) -> SignFit:
    """Choose signs and scales that lower the output error of one layer.

    Args:
        W: (out, in) weights, or targets in their place (``correct_target``); any float dtype, not changed.
        curvature: of the inputs (in, in).
        planes: sign matrices, 1 or more, refined together.
        rounds: rounds of flips and scales after error feedback, >= 0.
        layer: the layer's name, for error messages.

    Returns:
        A ``SignFit``. Its losses never rise from one round to the next, the rounding to fp16 excepted. Runs in float32
        with about eight dense matrices of the larger of W's and H's size at the most.

    Raises:
        ValueError: W is not a finite matrix of floats, the curvature does not fit it, or fp16 cannot hold the scales.
    """
    check_fit(W, curvature, rounds, layer)
    target, work = W.detach().float(), curvature.H
    S, a, b = closed_start(target, planes, work, layer)
    WH = target @ work
    energy = float((target * WH).sum(dtype=torch.float64)) or 1.0
    loss = residual(target, WH, S, a, b, work)[1]
    losses = [loss / energy]

    candidate = error_feedback(target, a, b, curvature)
    G: Tensor | None
    fitted_a, fitted_b, G, fitted_loss = fit_scales(target, WH, candidate, b, work)
    if fitted_loss <= loss:
        S, a, b, loss = candidate, fitted_a, fitted_b, fitted_loss
    else:  # on a nearly diagonal H feedback may lose to what it started from
        G = None
    del candidate, fitted_a, fitted_b
    losses.append(loss / energy)
    for _ in range(rounds):
        if G is None:
            G = residual(target, WH, S, a, b, work)[0]
        flipped = sweep(G, S, a, b, work)
        G = None  # it is of no use any more, and as large as W
        a, b, G, loss = fit_scales(target, WH, S, b, work)
        losses.append(loss / energy)
        if flipped == 0:
            break
    G = None
    stored, loss = _to_stored(target, WH, S, a, b, work, layer)
    losses.append(loss / energy)
    return SignFit(stored, losses, curvature.shrinkage)


@torch.no_grad()
def margins(W: Tensor, planes: Sequence[tuple[Tensor, Tensor, Tensor]], curvature: Curvature) -> list[Tensor]:
    """How far each sign is from flipping: the entry that would suit the loss best, in units of a_i b_j.

    With all else fixed the loss is a parabola in q_ij with its minimum at q_ij + G_ij / H_jj. After flips have
    converged this has the sign of S_ij wherever flipping would not pay.

    Args:
        W: (out, in) weights or targets that the planes were fitted to.
        planes: stored planes (signs, a, b).
        curvature: that they were fitted under.

    Returns:
        one tensor (out, in) float32 a plane; ±1 where a scale is zero.
    """
    H = curvature.H
    step = (W.detach().float() - dequantize_planes(planes)) @ H
    step.div_(H.diagonal())
    found = []
    for signs, a, b in planes:
        size = torch.outer(a.float(), b.float())
        latent = torch.where(size > 0, step / size.clamp_min(torch.finfo(torch.float32).tiny), 0)
        found.append(latent.add_(as_signs(signs)))
    return found


@torch.no_grad()
def output_loss(W: Tensor, planes: Sequence[tuple[Tensor, Tensor, Tensor]], H: Tensor) -> float:
    """tr((W − Q) H (W − Q)ᵀ) / tr(W H Wᵀ) of stored planes (signs, a, b); 0 where the denominator is 0."""
    W, H = W.detach().float(), H.float()
    R = dequantize_planes(planes).neg_().add_(W)
    energy = float(((W @ H) * W).sum(dtype=torch.float64))
    return float(((R @ H) * R).sum(dtype=torch.float64)) / energy if energy > 0 else 0.0


def _to_stored(
    W: Tensor, WH: Tensor, S: Tensor, a: Tensor, b: Tensor, H: Tensor, layer: str | None
) -> tuple[list[tuple[Tensor, Tensor, Tensor]], float]:
    """fp16 scales, all >= 0 and ‖a‖ = ‖b‖; a is fitted once more to the rounded b. And their loss."""
    b = torch.stack([_as_half(*_gauge(x, y), layer)[1] for x, y in zip(a, b, strict=True)]).float()
    P = S * b[:, None, :]
    PH = P @ H
    a = solve_a(WH, P, PH)
    halves = [_as_half(x, y, layer) for x, y in zip(a, b, strict=True)]
    loss = residual_of(W, WH, P, PH, torch.stack([half_a for half_a, _ in halves]).float())[1]
    stored = []
    for signs, (half_a, half_b) in zip(S, halves, strict=True):
        negative = (half_a < 0)[:, None] ^ (half_b < 0)
        stored.append(((signs > 0) ^ negative, half_a.abs(), half_b.abs()))
    return stored, loss


def _gauge(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    size_a, size_b = float(a.double().norm()), float(b.double().norm())
    if size_a == 0 or size_b == 0:
        return a, b
    ratio = math.sqrt(size_b / size_a)
    return a * ratio, b / ratio


def _as_half(a: Tensor, b: Tensor, layer: str | None) -> tuple[Tensor, Tensor]:
    return to_half(Plane(torch.empty(0), a, b), layer)
