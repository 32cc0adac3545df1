"""Signs and scales chosen for a layer's outputs: W ≈ Σ_p diag(a_p) S_p diag(b_p) under the full Hessian.

    closed form ──▶ error feedback ──▶ ⟳ ( flips ─ a ─ b ) ──▶ fp16

The closed form asks for the nearest weights; this asks for the nearest outputs. With H = X Xᵀ of the layer's inputs
the loss is

    L(Q) = tr((W − Q) H (W − Q)ᵀ) = ‖(W − Q) X‖²,   Q = Σ_p diag(a_p) S_p diag(b_p)

and its rows are independent given b. Four steps lower it, the last three never raise it:

* Error feedback (Frantar et al. 2022, arXiv:2210.17323, for signs): columns are rounded one by one and the error of
  each is spread over the columns still to come, along the rows of U, H⁻¹ = Uᵀ U.
* Flips: with G = (W − Q) H, changing q_ij by −d changes L by 2 d G_ij + d² H_jj. Column by column, all rows side by
  side, each entry takes the signs that lower L most (coordinate descent; with two planes all four combinations).
* a, exactly: one P x P system a row. b, exactly: [(Sᵀ diag(a²) S) ∘ H] b = Σ_i a_i s_i ∘ (H w_i), one plane at a time.

H is an estimate. `shrink` moves it towards its diagonal, by as much as serves a slice of the data that was held out
(`choose_shrinkage`). Letters: W, Q (out, in); H, G as above; signs as ±1 in float32 while they are worked on. The
derivations and figures are in docs/methods/signs.md.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_onebit.algorithms.closed_form import Plane, closed_form_planes, dequantize_planes, to_half

__all__ = [
    "Curvature",
    "SignFit",
    "choose_shrinkage",
    "drift_loss",
    "fit_signs",
    "margins",
    "output_loss",
    "sample_rows",
    "shrink",
    "target_correction",
]

# Columns rounded or flipped before what they changed reaches the rest of the matrix: the wide update is one product.
_BLOCK = 64
# Damping, as a fraction of the mean of H's diagonal: what every solve starts from, raised tenfold while it fails.
_DAMPING = 1e-2
_SOLVE_DAMPING = 1e-6
_MOST_DAMPING = 1e6
# A flip must gain more than rounding can pretend, as a fraction of the entry's own share of the loss.
_LEAST_GAIN = 1e-5


class Curvature:
    """A Hessian made ready for use: scaled to a mean diagonal of 1, shrunk and damped; layers of one input share it.

    Args:
        H: (in, in) Hessian of the inputs, symmetric and positive semi-definite up to rounding; its scale does not
            matter. All zero means that nothing is known: then the inputs count alike.
        shrinkage: share of the off-diagonal entries to give up, 0 to 1 (`shrink`).
        damping: added to the diagonal as a fraction of its mean, >= 0.

    Attributes:
        H: (in, in) float32, positive definite in all but pathological cases.
        shrinkage: as given.

    Raises:
        ValueError: H is not square, or not finite.
    """

    def __init__(self, H: Tensor, shrinkage: float = 0.0, damping: float = _DAMPING) -> None:
        if H.ndim != 2 or H.shape[0] != H.shape[1]:
            raise ValueError(f"the Hessian must be a square matrix (in, in), got shape {tuple(H.shape)}")
        if not bool(torch.isfinite(H).all()):
            raise ValueError(
                "the Hessian holds NaN or infinite values (calibration activations overflowed): calibrate in float32 "
                "or bfloat16"
            )
        self.shrinkage = shrinkage
        mean = float(H.diagonal().double().clamp(min=0).mean())
        if mean > 0:
            self.H = shrink(H.detach().float() / mean, shrinkage)
            self.H.diagonal().clamp_(min=0).add_(damping)
        else:
            self.H = torch.eye(H.shape[0], device=H.device)
        self._feedback: tuple[Tensor, Tensor] | None = None

    def feedback(self) -> tuple[Tensor, Tensor]:
        """The order in which columns are rounded, by falling H_jj, and the upper U with H⁻¹ = Uᵀ U in that order."""
        if self._feedback is None:
            order = self.H.diagonal().argsort(descending=True, stable=True)
            inverse = torch.cholesky_inverse(_cholesky(self.H[order][:, order], 0.0))
            scale = float(inverse.diagonal().mean())
            self._feedback = order, _cholesky(inverse.div_(scale), 0.0).T.mul_(math.sqrt(scale))
        return self._feedback


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
        W: (out, in) weights, or targets in their place (`correct_target`); any float dtype, not changed.
        curvature: of the inputs (in, in).
        planes: sign matrices, 1 or more, refined together.
        rounds: rounds of flips and scales after error feedback, >= 0.
        layer: the layer's name, for error messages.

    Returns:
        A `SignFit`. Its losses never rise from one round to the next, the rounding to fp16 excepted. Runs in float32
        with about eight dense matrices of the larger of W's and H's size at the most.

    Raises:
        ValueError: W is not a finite matrix of floats, the curvature does not fit it, or fp16 cannot hold the scales.
    """
    _check(W, curvature, rounds, layer)
    target, work = W.detach().float(), curvature.H
    importance = work.diagonal()
    closed = closed_form_planes(target, planes, layer=layer, importance=importance, use_balancing=False)
    S = torch.stack([_signs(signs) for signs, _, _ in closed])
    a = torch.stack([a.float() for _, a, _ in closed])
    b = torch.stack([b.float() for _, _, b in closed])
    WH = target @ work
    energy = float((target * WH).sum(dtype=torch.float64)) or 1.0
    losses = [_loss(target, WH, S, a, b, work) / energy]

    candidate = error_feedback(target, a, b, curvature)
    fitted = _fit_scales(target, WH, candidate, a, b, work)
    loss = _loss(target, WH, candidate, *fitted, work) / energy
    if loss <= losses[-1]:  # on a nearly diagonal H feedback may lose to what it started from
        S, (a, b) = candidate, fitted
    losses.append(min(loss, losses[-1]))
    for _ in range(rounds):
        flipped = flip(target, S, a, b, work)
        a, b = _fit_scales(target, WH, S, a, b, work)
        losses.append(_loss(target, WH, S, a, b, work) / energy)
        if flipped == 0:
            break
    stored = _to_stored(target, WH, S, a, b, work, layer)
    R = dequantize_planes(stored).neg_().add_(target)
    losses.append(float(((R @ work) * R).sum(dtype=torch.float64)) / energy)
    return SignFit(stored, losses, curvature.shrinkage)


@torch.no_grad()
def choose_shrinkage(
    W: Tensor,
    H: Tensor,
    H_heldout: Tensor,
    *,
    candidates: Sequence[float] = (0.02, 0.08, 0.25),
    planes: int = 1,
    rows: int = 128,
    layer: str | None = None,
) -> tuple[Curvature, dict[float, float]]:
    """The shrinkage whose fit on ``H`` does best on data that it did not see.

    Rows of W are independent but for b, so a sample of them tells for all; and what flips gain afterwards differs
    little between candidates, so the fits end with error feedback.

    Args:
        W: (out, in).
        H: Hessian of the data to fit.
        H_heldout: Hessian of the other data, from the same layer.
        candidates: shrinkages to try, 0 to 1.
        planes, layer: as for `fit_signs`.
        rows: how many rows of W to try them on, evenly spaced.

    Returns:
        the curvature of the best, and L / tr(W H Wᵀ) on the held-out data for each candidate.
    """
    sample = sample_rows(W, rows)
    errors: dict[float, float] = {}
    curvature: Curvature | None = None
    for candidate in candidates:
        curvature = None  # the next takes as much memory
        curvature = Curvature(H, candidate)
        fit = fit_signs(sample, curvature, planes=planes, rounds=0, layer=layer)
        errors[candidate] = output_loss(sample, fit.planes, H_heldout)
    if curvature is None:
        raise ValueError("choose_shrinkage: got no candidates, expected at least one number from 0 to 1")
    best = min(errors, key=lambda candidate: errors[candidate])
    if best != curvature.shrinkage:
        del curvature
        curvature = Curvature(H, best)
    return curvature, errors


def sample_rows(W: Tensor, rows: int) -> Tensor:
    """About ``rows`` rows of W (out, in), evenly spaced, in float32."""
    return W.detach()[:: max(1, W.shape[0] // rows)][:rows].float()


@torch.no_grad()
def target_correction(H: Tensor, C: Tensor, damping: float = _DAMPING) -> Tensor:
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
    factor = _cholesky((H / mean).float(), damping)
    return torch.cholesky_solve(((C - H) / mean).float().T.contiguous(), factor).T.contiguous()


@torch.no_grad()
def drift_loss(W: Tensor, planes: Sequence[tuple[Tensor, Tensor, Tensor]], H: Tensor, C: Tensor) -> float:
    """E‖W x − Q x̂‖² but for E‖W x‖², which no Q changes: tr(Q H Qᵀ) − 2 tr(W C Qᵀ), in H's units.

    Args:
        W: (out, in) float weights.
        planes: stored planes (signs, a, b), Q their sum.
        H, C: as for `target_correction`.
    """
    Q = dequantize_planes(planes)
    quadratic = float(((Q @ H.float()) * Q).sum(dtype=torch.float64))
    return quadratic - 2 * float(((W.detach().float() @ C.float()) * Q).sum(dtype=torch.float64))


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
        found.append(latent.add_(_signs(signs)))
    return found


def shrink(H: Tensor, gamma: float) -> Tensor:
    """(1 − γ) H + γ diag(H): what is left of the correlations when they are trusted less."""
    shrunk = H * (1 - gamma)
    shrunk.diagonal().copy_(H.diagonal())
    return shrunk


@torch.no_grad()
def output_loss(W: Tensor, planes: Sequence[tuple[Tensor, Tensor, Tensor]], H: Tensor) -> float:
    """tr((W − Q) H (W − Q)ᵀ) / tr(W H Wᵀ) of stored planes (signs, a, b); 0 where the denominator is 0."""
    W, H = W.detach().float(), H.float()
    R = dequantize_planes(planes).neg_().add_(W)
    energy = float(((W @ H) * W).sum(dtype=torch.float64))
    return float(((R @ H) * R).sum(dtype=torch.float64)) / energy if energy > 0 else 0.0


# --- the steps -----------------------------------------------------------------------------------------------


def error_feedback(W: Tensor, a: Tensor, b: Tensor, curvature: Curvature) -> Tensor:
    """Round columns in order of falling H_jj, each time spreading the error over the columns to come.

    Args:
        W: (out, in) float32.
        a, b: scales (planes, out) and (planes, in).
        curvature: of the inputs.

    Returns:
        S (planes, out, in), ±1 in float32.
    """
    order, U = curvature.feedback()
    W = W[:, order]
    n = W.shape[1]
    b = b[:, order]
    S = torch.empty(len(a), *W.shape, device=W.device)
    for start in range(0, n, _BLOCK):
        end = min(start + _BLOCK, n)
        block = W[:, start:end]
        errors = torch.empty_like(block)
        for j in range(start, end):
            k = j - start
            column = block[:, k]
            signs, q = _nearest(column, a * b[:, j : j + 1])
            S[:, :, j] = signs
            error = (column - q) / U[j, j]
            block[:, k + 1 :].addr_(error, U[j, j + 1 : end], alpha=-1)
            errors[:, k] = error
        W[:, end:].addmm_(errors, U[start:end, end:], alpha=-1)
    restored = torch.empty_like(S)
    restored[:, :, order] = S
    return restored


def _nearest(w: Tensor, magnitudes: Tensor) -> tuple[Tensor, Tensor]:
    """The signs (planes, out) whose sum of signed magnitudes (planes, out) is nearest to w (out,), and that sum."""
    if len(magnitudes) == 1:  # a zero, and a negative scale, are as good as any
        signs = _signs(w * magnitudes[0] >= 0)[None]
        return signs, signs[0] * magnitudes[0]
    patterns = torch.tensor(list(itertools.product((1.0, -1.0), repeat=len(magnitudes))), device=w.device)
    sums = patterns @ magnitudes  # (patterns, out)
    best = (sums - w).abs().argmin(0)
    return patterns[best].T, sums.gather(0, best[None])[0]


def flip(W: Tensor, S: Tensor, a: Tensor, b: Tensor, H: Tensor) -> int:
    """One sweep of coordinate descent over the signs, in place; how many changed.

    Args:
        W: (out, in) float32.
        S: (planes, out, in), ±1 in float32; changed.
        a, b: (planes, out) and (planes, in).
        H: (in, in), symmetric.
    """
    n = W.shape[1]
    G = (W - _dense(S, a, b)) @ H
    subsets = [s for size in range(1, len(S) + 1) for s in itertools.combinations(range(len(S)), size)]
    diagonal = H.diagonal()
    changed = 0
    for start in range(0, n, _BLOCK):
        end = min(start + _BLOCK, n)
        gradient = G[:, start:end].clone()
        moved = torch.zeros_like(gradient)
        doubled = 2 * a[:, :, None] * S[:, :, start:end] * b[:, None, start:end]  # what each plane's flip adds to W − Q
        for j in range(start, end):
            k = j - start
            g, h = gradient[:, k], diagonal[j]
            best_gain: Tensor | None = None
            best_step = g
            choice = g
            for number, subset in enumerate(subsets):
                step = doubled[subset[0], :, k] if len(subset) == 1 else doubled[list(subset), :, k].sum(0)
                gain = step * (2 * g + step * h)  # negative is good
                gain = gain + _LEAST_GAIN * h * step * step
                if best_gain is None:
                    better = gain < 0
                    best_gain = torch.where(better, gain, 0)
                    best_step = torch.where(better, step, 0)
                    choice = better.to(torch.int8)
                else:
                    better = gain < best_gain
                    best_gain = torch.where(better, gain, best_gain)
                    best_step = torch.where(better, step, best_step)
                    choice = torch.where(better, number + 1, choice)
            moved[:, k] = best_step
            gradient[:, k + 1 :].addr_(best_step, H[j, j + 1 : end])
            for number, subset in enumerate(subsets):
                mask = choice == number + 1
                for plane in subset:
                    S[plane, :, j] = torch.where(mask, -S[plane, :, j], S[plane, :, j])
        changed += int((moved != 0).sum())
        if end < n:
            G[:, end:].addmm_(moved, H[start:end, end:])
    return changed


def _fit_scales(W: Tensor, WH: Tensor, S: Tensor, a: Tensor, b: Tensor, H: Tensor) -> tuple[Tensor, Tensor]:
    """a, then b, then a again, each exact given the rest; a step that rounding made worse is not taken."""
    a = _fit_a(WH, S, b, H)
    before = _loss(W, WH, S, a, b, H)
    for plane in range(len(S)):
        solved = b.clone()
        solved[plane] = _fit_b(WH, S, a, b, H, plane)
        refitted = _fit_a(WH, S, solved, H)
        after = _loss(W, WH, S, refitted, solved, H)
        if after <= before:
            a, b, before = refitted, solved, after
    return a, b


def _fit_a(WH: Tensor, S: Tensor, b: Tensor, H: Tensor) -> Tensor:
    """For every row the a (planes,) that minimises its loss: [p_p H p_q] a = [p_p H w], p_p = s_p ∘ b_p."""
    P = S * b[:, None, :]
    PH = P @ H
    right = (P * WH).sum(-1)  # (planes, out)
    if len(S) == 1:
        left = (PH[0] * P[0]).sum(-1)
        return torch.where(left > 0, right[0] / left.clamp_min(torch.finfo(left.dtype).tiny), 0)[None]
    left = torch.einsum("pij,qij->ipq", PH, P).double()
    ridge = left.diagonal(dim1=-2, dim2=-1).mean(-1) * _SOLVE_DAMPING
    left.diagonal(dim1=-2, dim2=-1).add_(ridge.clamp_min(torch.finfo(torch.float32).tiny)[:, None])
    return torch.linalg.solve(left, right.T.double()[..., None])[..., 0].T.float().contiguous()


def _fit_b(WH: Tensor, S: Tensor, a: Tensor, b: Tensor, H: Tensor, plane: int) -> Tensor:
    """The b (in,) of one plane that minimises the loss, the other planes given."""
    A = S[plane] * a[plane][:, None]
    rest = WH
    for other in range(len(S)):
        if other != plane:
            rest = rest - _dense(S[other : other + 1], a[other : other + 1], b[other : other + 1]) @ H
    right = (A * rest).sum(0)
    M = (A.T @ A).mul_(H)
    del A
    mean = float(M.diagonal().mean())
    if not mean > 0:
        return b[plane]
    factor = _cholesky(M.div_(mean), _SOLVE_DAMPING)
    del M  # the solver takes a copy of the factor
    return torch.cholesky_solve((right / mean)[:, None], factor)[:, 0]


def _loss(W: Tensor, WH: Tensor, S: Tensor, a: Tensor, b: Tensor, H: Tensor) -> float:
    R = W - _dense(S, a, b)
    return float(((R @ H) * R).sum(dtype=torch.float64))


# --- the numbers ---------------------------------------------------------------------------------------------


def _to_stored(
    W: Tensor, WH: Tensor, S: Tensor, a: Tensor, b: Tensor, H: Tensor, layer: str | None
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """fp16 scales, all >= 0 and ‖a‖ = ‖b‖; a is fitted once more to the rounded b."""
    b = torch.stack([_as_half(*_gauge(x, y), layer)[1] for x, y in zip(a, b, strict=True)]).float()
    a = _fit_a(WH, S, b, H)
    stored = []
    for signs, x, y in zip(S, a, b, strict=True):
        half_a, half_b = _as_half(x, y, layer)
        negative = (half_a < 0)[:, None] ^ (half_b < 0)
        stored.append(((signs > 0) ^ negative, half_a.abs(), half_b.abs()))
    return stored


def _gauge(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    size_a, size_b = float(a.double().norm()), float(b.double().norm())
    if size_a == 0 or size_b == 0:
        return a, b
    ratio = math.sqrt(size_b / size_a)
    return a * ratio, b / ratio


def _as_half(a: Tensor, b: Tensor, layer: str | None) -> tuple[Tensor, Tensor]:
    return to_half(Plane(torch.empty(0), a, b), layer)


def _signs(positive: Tensor) -> Tensor:
    """bool -> ±1 in float32."""
    return positive.float().mul_(2).sub_(1)


def _dense(S: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Σ_p diag(a_p) S_p diag(b_p), (out, in)."""
    Q = S[0] * a[0][:, None]
    Q.mul_(b[0])
    for plane in range(1, len(S)):
        Q.add_((S[plane] * a[plane][:, None]).mul_(b[plane]))
    return Q


def _cholesky(A: Tensor, damping: float) -> Tensor:
    """The lower factor of A + damping · I, the damping raised tenfold for as long as A is not definite enough.

    A has a mean diagonal near 1, so the largest damping always succeeds on finite numbers.
    """
    diagonal = A.diagonal().clone()
    while damping <= _MOST_DAMPING:
        A.diagonal().add_(damping)  # in place and back: a copy of A may be half a gigabyte
        factor, failed = torch.linalg.cholesky_ex(A)
        A.diagonal().copy_(diagonal)
        if int(failed) == 0:
            return factor
        damping = max(damping * 10, _SOLVE_DAMPING)
    raise ValueError("a Hessian holds NaN or infinite values: calibrate in float32 or bfloat16")


def _check(W: Tensor, curvature: Curvature, rounds: int, layer: str | None) -> None:
    name = f"layer {layer!r}" if layer else "this weight"
    if W.ndim != 2 or not W.numel() or not W.is_floating_point():
        raise ValueError(f"{name}: expected a non-empty float matrix (out, in), got {W.dtype} of {tuple(W.shape)}")
    if curvature.H.shape[0] != W.shape[1]:
        raise ValueError(
            f"{name}: the Hessian must have shape ({W.shape[1]}, {W.shape[1]}), got {tuple(curvature.H.shape)}"
        )
    if rounds < 0:
        raise ValueError(f"{name}: rounds must be >= 0, got {rounds}")
