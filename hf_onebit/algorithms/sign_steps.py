"""The steps that ``signs.fit_signs`` is made of: closed form, error feedback, flips, least squares for a and b.

Letters as there: W, Q (out, in), H (in, in), G = (W − Q) H; signs S (planes, out, in) as ±1 in float32.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hf_onebit.algorithms.closed_form import closed_form_planes
from hf_onebit.algorithms.curvature import SOLVE_DAMPING, Curvature, cholesky

__all__ = ["as_signs", "closed_start", "error_feedback", "feed", "fit_a", "fit_b", "fit_scales", "flip", "residual"]
__all__ += ["residual_of", "solve_a", "sweep"]

# Columns rounded or flipped before what they changed reaches the rest of the matrix: the wide update is one product.
_BLOCK = 64
# A flip must gain more than rounding can pretend, as a fraction of the entry's own share of the loss.
_LEAST_GAIN = 1e-5


def closed_start(W: Tensor, planes: int, H: Tensor, layer: str | None) -> tuple[Tensor, Tensor, Tensor]:
    """Signs (planes, out, in), ±1 in float32, a (planes, out) and b (planes, in) of the closed form."""
    closed = closed_form_planes(W, planes, layer=layer, importance=H.diagonal(), use_balancing=False)
    S = torch.stack([as_signs(signs) for signs, _, _ in closed])
    return S, torch.stack([a.float() for _, a, _ in closed]), torch.stack([b.float() for _, _, b in closed])


def error_feedback(W: Tensor, a: Tensor, b: Tensor, curvature: Curvature) -> Tensor:
    """Round columns in order of falling H_jj, each to what the errors of those before it ask it for.

    Args:
        W: (out, in) float32.
        a, b: scales (planes, out) and (planes, in).
        curvature: of the inputs.

    Returns:
        S (planes, out, in), ±1 in float32.
    """
    return feed(W, lambda columns: b[:, columns, None] * a[:, None], len(a), curvature)


def feed(W: Tensor, magnitudes: Callable[[Tensor], Tensor], planes: int, curvature: Curvature) -> Tensor:
    """``error_feedback`` where the (planes, columns, out) that signs multiply are given by columns."""
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
        return as_signs(sizes.mul_(magnitudes[0]) >= 0)[None]
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
    return sweep((W - dense(S, a, b)) @ H, S, a, b, H)


def sweep(G: Tensor, S: Tensor, a: Tensor, b: Tensor, H: Tensor) -> int:
    """``flip``, with G = (W − Q) H (out, in) at hand."""
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


def fit_scales(W: Tensor, WH: Tensor, S: Tensor, b: Tensor, H: Tensor) -> tuple[Tensor, Tensor, Tensor, float]:
    """a, then each plane's b and a again, each exact given the rest, but for a b that rounding made worse.

    Returns:
        a, b, G = (W − Q) H (out, in), and the loss.
    """
    a, G, loss = best_a(W, WH, S, b, H)
    for plane in range(len(S)):
        solved = b.clone()
        solved[plane] = fit_b(WH, S, a, b, H, plane)
        refitted, other_G, other_loss = best_a(W, WH, S, solved, H)
        if other_loss <= loss:
            a, b, G, loss = refitted, solved, other_G, other_loss
    return a, b, G, loss


def best_a(W: Tensor, WH: Tensor, S: Tensor, b: Tensor, H: Tensor) -> tuple[Tensor, Tensor, float]:
    """The best a for S and b, then G = (W − Q) H, and the loss; one product with H a plane."""
    P = S * b[:, None, :]
    PH = P @ H
    a = solve_a(WH, P, PH)
    return a, *residual_of(W, WH, P, PH, a)


def residual(W: Tensor, WH: Tensor, S: Tensor, a: Tensor, b: Tensor, H: Tensor) -> tuple[Tensor, float]:
    """G = (W − Q) H (out, in), and the loss."""
    P = S * b[:, None, :]
    return residual_of(W, WH, P, P @ H, a)


def residual_of(W: Tensor, WH: Tensor, P: Tensor, PH: Tensor, a: Tensor) -> tuple[Tensor, float]:
    """As ``residual``, with p_p = s_p ∘ b_p in P and its product with H; both are used up."""
    P.mul_(a[:, :, None])
    PH.mul_(a[:, :, None])
    R, G = (torch.sub(whole, parts.sum(0) if len(parts) > 1 else parts[0]) for whole, parts in ((W, P), (WH, PH)))
    return G, float(R.mul_(G).sum(dtype=torch.float64))


def fit_a(WH: Tensor, S: Tensor, b: Tensor, H: Tensor) -> Tensor:
    """For every row the a (planes,) that minimises its loss: [p_p H p_q] a = [p_p H w], p_p = s_p ∘ b_p."""
    P = S * b[:, None, :]
    return solve_a(WH, P, P @ H)


def solve_a(WH: Tensor, P: Tensor, PH: Tensor) -> Tensor:
    """As ``fit_a``, with p_p = s_p ∘ b_p in P (planes, out, in) and its product with H; a (planes, out) float32."""
    right = (P * WH).sum(-1)  # (planes, out)
    if len(P) == 1:
        left = (PH[0] * P[0]).sum(-1)
        return torch.where(left > 0, right[0] / left.clamp_min(torch.finfo(left.dtype).tiny), 0)[None]
    left = torch.einsum("pij,qij->ipq", PH, P).double()
    ridge = left.diagonal(dim1=-2, dim2=-1).mean(-1) * SOLVE_DAMPING
    left.diagonal(dim1=-2, dim2=-1).add_(ridge.clamp_min(torch.finfo(torch.float32).tiny)[:, None])
    return torch.linalg.solve(left, right.T.double()[..., None])[..., 0].T.float().contiguous()


def fit_b(WH: Tensor, S: Tensor, a: Tensor, b: Tensor, H: Tensor, plane: int) -> Tensor:
    """The b (in,) of one plane that minimises the loss, the other planes given."""
    A = S[plane] * a[plane][:, None]
    rest = WH
    for other in range(len(S)):
        if other != plane:
            rest = rest - dense(S[other : other + 1], a[other : other + 1], b[other : other + 1]) @ H
    right = (A * rest).sum(0)
    M = (A.T @ A).mul_(H)
    del A, rest
    mean = float(M.diagonal().mean())
    if not mean > 0:
        return b[plane]
    factor = cholesky(M.div_(mean), SOLVE_DAMPING)
    del M  # the solver takes a copy of the factor
    return torch.cholesky_solve((right / mean)[:, None], factor)[:, 0]


def as_signs(positive: Tensor) -> Tensor:
    """bool -> ±1 in float32."""
    return positive.float().mul_(2).sub_(1)


def dense(S: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Σ_p diag(a_p) S_p diag(b_p), (out, in)."""
    Q = S[0] * a[0][:, None]
    Q.mul_(b[0])
    for plane in range(1, len(S)):
        Q.add_((S[plane] * a[plane][:, None]).mul_(b[plane]))
    return Q
