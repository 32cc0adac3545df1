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

H is an estimate. `shrink` moves it towards its diagonal, by as much as serves a slice of the data that was held out
(`choose_shrinkage`). Letters: W, Q (out, in); H, G as above; signs as ±1 in float32 while they are worked on. The
derivations and figures are in docs/methods/signs.md.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_onebit.algorithms.closed_form import Plane, closed_form_planes, dequantize_planes, to_half

__all__ = [
    "CHOICE_ROWS",
    "STRENGTHS",
    "Curvature",
    "SignFit",
    "choose_shrinkage",
    "choose_strength",
    "drift_loss",
    "fit_signs",
    "margins",
    "output_loss",
    "shrink",
    "target_correction",
]

# Columns rounded or flipped before what they changed reaches the rest of the matrix: the wide update is one product.
_BLOCK = 64
# Strengths of a target's correction to try.
STRENGTHS = (0.0, 0.5, 1.0)
# Rows that shrinkages and strengths are chosen on, of each layer.
CHOICE_ROWS = 128
# Entries of a Hessian that may be in memory more often than needed.
_KEPT = 1 << 24
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
        """The order in which columns are rounded, by falling H_jj, and the upper unit U with H = U D Uᵀ in that order.

        D is diagonal, so that the loss is Σ_k D_kk ‖Σ_{j <= k} (W − Q)_j U_jk‖²: what the columns before k lost asks
        column k for the target w_k + Σ_{j < k} (W − Q)_j U_jk.
        """
        if self._feedback is None:
            order = self.H.diagonal().argsort(descending=True, stable=True)
            backwards = order.flip(0)  # the lower factor of H turned round is the upper one turned round
            factor = _cholesky(self.H[backwards][:, backwards], 0.0)
            factor.div_(factor.diagonal().clone())
            self._feedback = order, factor.flip(0, 1).contiguous()
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
    S, a, b = _start(target, planes, work, layer)
    WH = target @ work
    energy = float((target * WH).sum(dtype=torch.float64)) or 1.0
    loss = _residual(target, WH, S, a, b, work)[1]
    losses = [loss / energy]

    candidate = error_feedback(target, a, b, curvature)
    G: Tensor | None
    fitted_a, fitted_b, G, fitted_loss = _fit_scales(target, WH, candidate, b, work)
    if fitted_loss <= loss:
        S, a, b, loss = candidate, fitted_a, fitted_b, fitted_loss
    else:  # on a nearly diagonal H feedback may lose to what it started from
        G = None
    del candidate, fitted_a, fitted_b
    losses.append(loss / energy)
    for _ in range(rounds):
        if G is None:
            G = _residual(target, WH, S, a, b, work)[0]
        flipped = _sweep(G, S, a, b, work)
        G = None  # it is of no use any more, and as large as W
        a, b, G, loss = _fit_scales(target, WH, S, b, work)
        losses.append(loss / energy)
        if flipped == 0:
            break
    G = None
    stored, loss = _to_stored(target, WH, S, a, b, work, layer)
    losses.append(loss / energy)
    return SignFit(stored, losses, curvature.shrinkage)


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
        K, C_heldout, strengths: the layer's target is going to be corrected, see `choose_strength`: then each shrinkage
            is tried with the strength that suits it best.
        candidates: shrinkages to try, 0 to 1, from the smallest on until one does worse than the one before.
        planes, layer: as for `fit_signs`.
        rows: how many rows of W to try them on, evenly spaced.

    Returns:
        the curvature of the best, and for each shrinkage tried {strength: loss on the held-out data}, but for a term
        that is the same for all: `drift_loss` with C_heldout, by default H_heldout, over tr(W H Wᵀ). Without K the only
        strength is 0.

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
        K: correction (in, in), see `target_correction`.
        curvature: of the data to fit.
        H_heldout, C_heldout: of the other data, see `drift_loss`.
        strengths: to try, at least one.
        planes, rows, layer: as for `choose_shrinkage`.

    Returns:
        the best strength, and the loss of each as for `choose_shrinkage`.
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
            found = [_start(target, self._planes, H, self._layer)[1:] for target in self._targets]
            self._starts = (
                torch.stack([torch.stack([self._sample(x) for x in a]) for a, _ in found], 1),
                torch.stack([b for _, b in found], 1),
            )
        a, b = self._starts  # (planes, strengths, rows), (planes, strengths, in)
        # One pass over the columns for all: to error feedback, other targets are other rows.
        targets = torch.cat([self._sample(target) for target in self._targets])
        S = _feed(
            targets,
            lambda columns: (b[:, :, columns, None] * a[:, :, None]).transpose(1, 2).flatten(2),
            self._planes,
            curvature,
        )
        P = S.view(*a.shape, -1).mul_(b[:, :, None]).view(S.shape)
        fits = _solve_a(targets @ H, P, P @ H)[:, :, None].mul(P).sum(0)
        return [
            float(((Q @ self._H - 2 * self._reached) * Q).sum(dtype=torch.float64)) / self._energy
            for Q in fits.split(len(self._reached))
        ]


def _start(W: Tensor, planes: int, H: Tensor, layer: str | None) -> tuple[Tensor, Tensor, Tensor]:
    """Signs (planes, out, in), ±1 in float32, a (planes, out) and b (planes, in) of the closed form."""
    closed = closed_form_planes(W, planes, layer=layer, importance=H.diagonal(), use_balancing=False)
    S = torch.stack([_signs(signs) for signs, _, _ in closed])
    return S, torch.stack([a.float() for _, a, _ in closed]), torch.stack([b.float() for _, _, b in closed])


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
    """Round columns in order of falling H_jj, each to what the errors of those before it ask it for.

    Args:
        W: (out, in) float32.
        a, b: scales (planes, out) and (planes, in).
        curvature: of the inputs.

    Returns:
        S (planes, out, in), ±1 in float32.
    """
    return _feed(W, lambda columns: b[:, columns, None] * a[:, None], len(a), curvature)


def _feed(W: Tensor, magnitudes: Callable[[Tensor], Tensor], planes: int, curvature: Curvature) -> Tensor:
    """`error_feedback` where the (planes, columns, out) that signs multiply are given by columns."""
    order, U = curvature.feedback()
    n = W.shape[1]
    S = torch.empty(planes, *W.shape, device=W.device)
    # From here on columns lie as rows: each is then contiguous. This is Σ_{j < k} (W − Q)_j U_jk so far.
    asked = torch.zeros(n, W.shape[0], device=W.device)
    for start in range(0, n, _BLOCK):
        end = min(start + _BLOCK, n)
        columns = order[start:end]
        block = W[:, columns].T.contiguous()
        targets = asked[start:end].add_(block)
        signs = _round_block(block, targets, magnitudes(columns), U[start:end, start:end])
        S[:, :, columns] = signs.transpose(1, 2)
        asked[end:].addmm_(U[start:end, end:].T, block)
    return S


def _round_block(block: Tensor, targets: Tensor, magnitudes: Tensor, U: Tensor) -> Tensor:
    """Signs (planes, columns, out) of some columns; ``block`` (columns, out), their weights, becomes their errors.

    ``magnitudes`` (planes, columns, out) are what the signs multiply. Launching operations is most of the work here, so
    whatever does not depend on the columns before is done for the whole block.
    """
    last = len(block) - 1
    if len(magnitudes) == 1:
        sizes = magnitudes[0].abs()
        for k, (column, target, q) in enumerate(zip(block.unbind(), targets.unbind(), sizes.unbind(), strict=True)):
            torch.copysign(q, target, out=q)  # a zero, and a negative scale, are as good as any
            column.sub_(q)
            if k < last:
                targets[k + 1 :].addr_(U[k, k + 1 :], column)
        return _signs(sizes.mul_(magnitudes[0]) >= 0)[None]
    patterns = torch.tensor(list(itertools.product((1.0, -1.0), repeat=len(magnitudes))), device=block.device)
    sums = torch.tensordot(patterns, magnitudes, 1)  # (patterns, columns, out)
    best = torch.empty_like(block, dtype=torch.int64)
    for k, (column, target) in enumerate(zip(block.unbind(), targets.unbind(), strict=True)):
        nearest = (sums[:, k] - target).abs_().argmin(0)
        best[k] = nearest
        column.sub_(sums[:, k].gather(0, nearest[None])[0])
        if k < last:
            targets[k + 1 :].addr_(U[k, k + 1 :], column)
    return patterns[best].permute(2, 0, 1)


def flip(W: Tensor, S: Tensor, a: Tensor, b: Tensor, H: Tensor) -> int:
    """One sweep of coordinate descent over the signs, in place; how many changed.

    Args:
        W: (out, in) float32.
        S: (planes, out, in), ±1 in float32; changed.
        a, b: (planes, out) and (planes, in).
        H: (in, in), symmetric.
    """
    return _sweep((W - _dense(S, a, b)) @ H, S, a, b, H)


def _sweep(G: Tensor, S: Tensor, a: Tensor, b: Tensor, H: Tensor) -> int:
    """`flip`, with G = (W − Q) H (out, in) at hand."""
    n = len(H)
    G = G.T.contiguous()  # columns lie as rows: each is then contiguous
    subsets = [s for size in range(1, len(S) + 1) for s in itertools.combinations(range(len(S)), size)]
    changed = torch.zeros((), dtype=torch.int64, device=S.device)
    for start in range(0, n, _BLOCK):
        end = min(start + _BLOCK, n)
        # What each plane's flip adds to W − Q.
        doubled = S[:, :, start:end].transpose(1, 2).contiguous()
        doubled.mul_(2 * b[:, start:end, None]).mul_(a[:, None])
        moved, taken = _flip_block(G[start:end], doubled, H[start:end, start:end], subsets)
        for number, subset in enumerate(subsets):
            turn = 1 - 2 * (taken == number + 1).T.float()
            for plane in subset:
                S[plane, :, start:end] *= turn
        changed += (taken > 0).sum()
        G[end:].addmm_(H[start:end, end:].T, moved)
    return int(changed)


def _flip_block(G: Tensor, doubled: Tensor, H: Tensor, subsets: Sequence[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
    """The best flips of some columns: what they add to W − Q (columns, out), and which subset's they are, 0 for none.

    G (columns, out) is changed. Flips that add d to an entry change the loss by d (2 G + d H_jj).
    """
    last = len(G) - 1
    diagonal = H.diagonal()[:, None] * (1 + _LEAST_GAIN)
    if len(subsets) == 1:
        moved = doubled[0]
        known = [x.unbind() for x in (G, 2 * moved, moved.square() * diagonal, moved)]
        for k, (g, twice, least, step) in enumerate(zip(*known, strict=True)):
            step.mul_(torch.addcmul(least, twice, g) < 0)
            if k < last:
                G[k + 1 :].addr_(H[k, k + 1 :], step)
        return moved, moved != 0
    steps = torch.stack([doubled[list(subset)].sum(0) for subset in subsets])  # (subsets, columns, out)
    twice, least = 2 * steps, steps.square() * diagonal
    moved = torch.empty_like(G)
    taken = torch.empty_like(G, dtype=torch.int64)
    for k, (g, step) in enumerate(zip(G.unbind(), moved.unbind(), strict=True)):
        gain, best = torch.addcmul(least[:, k], twice[:, k], g).min(0)
        pays = gain < 0
        torch.mul(steps[:, k].gather(0, best[None])[0], pays, out=step)
        torch.mul(best + 1, pays, out=taken[k])
        if k < last:
            G[k + 1 :].addr_(H[k, k + 1 :], step)
    return moved, taken


def _fit_scales(W: Tensor, WH: Tensor, S: Tensor, b: Tensor, H: Tensor) -> tuple[Tensor, Tensor, Tensor, float]:
    """a, then each plane's b and a again, each exact given the rest, but for a b that rounding made worse.

    Returns:
        a, b, G = (W − Q) H (out, in), and the loss.
    """
    a, G, loss = _best_a(W, WH, S, b, H)
    for plane in range(len(S)):
        solved = b.clone()
        solved[plane] = _fit_b(WH, S, a, b, H, plane)
        refitted, other_G, other_loss = _best_a(W, WH, S, solved, H)
        if other_loss <= loss:
            a, b, G, loss = refitted, solved, other_G, other_loss
    return a, b, G, loss


def _best_a(W: Tensor, WH: Tensor, S: Tensor, b: Tensor, H: Tensor) -> tuple[Tensor, Tensor, float]:
    """The best a for S and b, then G = (W − Q) H, and the loss; one product with H a plane."""
    P = S * b[:, None, :]
    PH = P @ H
    a = _solve_a(WH, P, PH)
    return a, *_residual_of(W, WH, P, PH, a)


def _residual(W: Tensor, WH: Tensor, S: Tensor, a: Tensor, b: Tensor, H: Tensor) -> tuple[Tensor, float]:
    """G = (W − Q) H (out, in), and the loss."""
    P = S * b[:, None, :]
    return _residual_of(W, WH, P, P @ H, a)


def _residual_of(W: Tensor, WH: Tensor, P: Tensor, PH: Tensor, a: Tensor) -> tuple[Tensor, float]:
    """As `_residual`, with p_p = s_p ∘ b_p in P and its product with H; both are used up."""
    P.mul_(a[:, :, None])
    PH.mul_(a[:, :, None])
    R, G = (torch.sub(whole, parts.sum(0) if len(parts) > 1 else parts[0]) for whole, parts in ((W, P), (WH, PH)))
    return G, float(R.mul_(G).sum(dtype=torch.float64))


def _fit_a(WH: Tensor, S: Tensor, b: Tensor, H: Tensor) -> Tensor:
    """For every row the a (planes,) that minimises its loss: [p_p H p_q] a = [p_p H w], p_p = s_p ∘ b_p."""
    P = S * b[:, None, :]
    return _solve_a(WH, P, P @ H)


def _solve_a(WH: Tensor, P: Tensor, PH: Tensor) -> Tensor:
    right = (P * WH).sum(-1)  # (planes, out)
    if len(P) == 1:
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
    del A, rest
    mean = float(M.diagonal().mean())
    if not mean > 0:
        return b[plane]
    factor = _cholesky(M.div_(mean), _SOLVE_DAMPING)
    del M  # the solver takes a copy of the factor
    return torch.cholesky_solve((right / mean)[:, None], factor)[:, 0]


# --- the numbers ---------------------------------------------------------------------------------------------


def _to_stored(
    W: Tensor, WH: Tensor, S: Tensor, a: Tensor, b: Tensor, H: Tensor, layer: str | None
) -> tuple[list[tuple[Tensor, Tensor, Tensor]], float]:
    """fp16 scales, all >= 0 and ‖a‖ = ‖b‖; a is fitted once more to the rounded b. And their loss."""
    b = torch.stack([_as_half(*_gauge(x, y), layer)[1] for x, y in zip(a, b, strict=True)]).float()
    P = S * b[:, None, :]
    PH = P @ H
    a = _solve_a(WH, P, PH)
    halves = [_as_half(x, y, layer) for x, y in zip(a, b, strict=True)]
    loss = _residual_of(W, WH, P, PH, torch.stack([half_a for half_a, _ in halves]).float())[1]
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
