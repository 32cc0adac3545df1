"""Codes and statistics of groups chosen for a layer's outputs: W ≈ s q − z under the full Hessian.

    grid search ──▶ error feedback ──▶ ⟳ ( codes ─ scales and zeros )

``groupwise`` asks for the nearest weights; this asks for the nearest outputs. With H = X Xᵀ of the layer's inputs the
loss of a row is

    L(q) = (w − q̂) H (w − q̂)ᵀ = ‖(w − q̂) X‖²,   q̂_j = s_g q_j − z_g,   g the group of input j

and rows are independent. The steps, none of which lets a row's loss rise:

* The start: scales and zeros that lose least of the weights, each weighed by H_jj, and the nearest codes.
* Error feedback (Frantar et al. 2022, arXiv:2210.17323): columns are rounded one by one in order of falling H_jj, each
  to what the errors of those before it ask it for: w_k + Σ_{j < k} (w − q̂)_j U_jk with H = U D Uᵀ
  (``signs.Curvature.feedback``). A row keeps its start where that is better.
* Codes: with G = (w − q̂) H, the best code for input j, all else fixed, is the one nearest to q_j + G_j / (s H_jj)
  (coordinate descent, column by column, all rows side by side).
* Scales and zeros: for each group the 2 x 2 system of its s and z, all other groups fixed (block coordinate descent).

Groups are neighbouring inputs; then the order of rounding changes nothing in the file. With ``act_order`` they are
neighbours in that order instead, so that inputs of like importance share a scale, and ``g_idx`` says which group each
input belongs to.

Scales and zeros are float16 numbers, as they are stored, at every step, so the losses are those of the stored layer.
The derivations and figures are in docs/methods/mpq_quantization.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_onebit.algorithms.curvature import Curvature, check_fit
from hf_onebit.algorithms.groupwise import quantize_groupwise

__all__ = ["GroupFit", "Round", "dense", "fit_groups", "nearest_codes", "wishes"]

# (scales, zeros), float32 (groups, out) -> the same as the file will hold them; zeros are None in symmetric layers.
Round = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]

# Columns rounded before what they changed reaches the rest of the matrix: the wide update is one product.
_BLOCK = 32
# A step must gain more than rounding can pretend, as a fraction of what it moves.
_LEAST_GAIN = 1e-4


@dataclass(frozen=True, eq=False)
class GroupFit:
    """A layer fitted to its outputs.

    Attributes:
        codes: (out, in) uint8, in the order of W's inputs.
        scales: (groups, out) float16.
        zeros: (groups, out) float16, already multiplied by the scales; None in a symmetric layer.
        g_idx: (in,) int32, the group of each input, or None where groups are neighbouring inputs.
        losses: Σ L / tr(W H Wᵀ) after the start, after error feedback, and after every round.
        shrinkage: the share of H's off-diagonal that was given up, 0 to 1.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    g_idx: Tensor | None = None
    losses: list[float] = field(default_factory=list)
    shrinkage: float = 0.0


@torch.no_grad()
def fit_groups(
    W: Tensor,
    curvature: Curvature,
    bits: int,
    group_size: int,
    symmetric: bool,
    *,
    act_order: bool = False,
    rounds: int = 2,
    rounding: Round | None = None,
    layer: str | None = None,
) -> GroupFit:
    """Choose codes, scales and zeros that lower the output error of one layer.

    Args:
        W: (out, in) weights, or targets in their place; any float dtype, not changed.
        curvature: of the inputs (in, in).
        bits: width of one code, 1..8.
        group_size: inputs that share a scale, >= 1; -1 for all of them. The last group may be shorter.
        symmetric: zeros are scales · 2^(bits - 1) (scales / 2 at one bit) and are not returned.
        act_order: groups follow the order of falling H_jj (``g_idx``).
        rounds: rounds of codes, scales and zeros after error feedback, >= 0.
        rounding: what storage does to scales and zeros beyond float16 (double quantization); it may look at all of a
            layer's together. They are rounded once, after their rounds, and the codes are fitted to the result again.
        layer: the layer's name, for error messages.

    Returns:
        A ``GroupFit``. Its losses never rise, but for ``rounding``. Runs in float32 with about six dense matrices of
        the larger of W's and H's size.

    Raises:
        ValueError: W is not a finite matrix of floats, the curvature does not fit it, an argument is out of range, or
            float16 cannot hold the statistics.
    """
    check_fit(W, curvature, rounds, layer)
    W = W.detach().float()
    groups = _Groups(W, curvature, bits, group_size, symmetric, act_order, layer or "fit_groups")
    energy = float((groups.W * (groups.W @ groups.H)).sum(dtype=torch.float64)) or 1.0
    state = groups.start()
    losses = [float(state.loss.sum(dtype=torch.float64)) / energy]
    state = groups.feedback(state)
    losses.append(float(state.loss.sum(dtype=torch.float64)) / energy)
    for _ in range(rounds):
        changed = groups.refine(state)
        losses.append(float(state.loss.sum(dtype=torch.float64)) / energy)
        if not changed:
            break
    if rounding is not None:
        state = groups.rounded(state, rounding, rounds)
        losses.append(float(state.loss.sum(dtype=torch.float64)) / energy)
    return groups.result(state, losses, curvature.shrinkage)


def dense(fit: GroupFit, bits: int, group_size: int) -> Tensor:
    """The float32 matrix (out, in) that a fit stands for."""
    s, z = _statistics(fit, bits, group_size)
    return fit.codes.float() * s - z


def nearest_codes(W: Tensor, fit: GroupFit, bits: int, group_size: int) -> Tensor:
    """The uint8 codes (out, in) nearest to W under the scales and zeros of a fit; its codes are not looked at."""
    s, z = _statistics(fit, bits, group_size)
    inverse = torch.where(s == 0, 0.0, 1 / s)
    return ((W.float() + z) * inverse).round_().clamp_(0, (1 << bits) - 1).to(torch.uint8)


def _statistics(fit: GroupFit, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    """The scale and zero of each weight, (out, in) float32."""
    n = fit.codes.shape[1]
    g_idx = fit.g_idx
    if g_idx is None:
        g_idx = torch.arange(n, device=fit.codes.device) // (n if group_size == -1 else group_size)
    s = fit.scales.float()[g_idx.long()].T
    return s, s * _middle(bits) if fit.zeros is None else fit.zeros.float()[g_idx.long()].T


@torch.no_grad()
def wishes(W: Tensor, fit: GroupFit, curvature: Curvature, bits: int, group_size: int) -> Tensor:
    """Where each code would like to be: with all else fixed the loss is a parabola in q_ij with its minimum at
    q_ij + G_ij / (s H_jj).

    Args:
        W: (out, in) weights or targets that were fitted.
        fit, bits, group_size: the fit.
        curvature: that it was fitted under.

    Returns:
        (out, in) float32 in units of codes; the code itself where a scale is zero.
    """
    H = curvature.H
    step = (W.detach().float() - dense(fit, bits, group_size)) @ H
    step.div_(H.diagonal())
    s, _ = _statistics(fit, bits, group_size)
    return torch.where(s == 0, 0.0, step / s).add_(fit.codes)


@dataclass
class _State:
    """Codes (out, in) as floats, statistics (groups, out) as floats that float16 holds, and each row's loss."""

    q: Tensor
    s: Tensor
    z: Tensor
    loss: Tensor


class _Groups:
    """One layer's problem, its columns in an order in which groups are neighbours."""

    def __init__(
        self,
        W: Tensor,
        curvature: Curvature,
        bits: int,
        group_size: int,
        symmetric: bool,
        act_order: bool,
        where: str,
    ) -> None:
        n = W.shape[1]
        self.bits, self.symmetric, self.where = bits, symmetric, where
        self.size = n if group_size == -1 else min(group_size, n)
        self.top, self.middle = float((1 << bits) - 1), _middle(bits)
        self.order, self.U = curvature.feedback()
        self.by_importance = act_order and self.size < n
        self.W, self.H = W, curvature.H
        if self.by_importance:
            self.W, self.H = W[:, self.order], curvature.H[self.order][:, self.order]
        self.spans = [(a, min(a + self.size, n)) for a in range(0, n, self.size)]

    def start(self) -> _State:
        """The grid search of ``groupwise``, weighed by H's diagonal."""
        importance = self.H.diagonal()
        q, s, zeros = quantize_groupwise(self.W, self.bits, self.size, self.symmetric, importance, self.where)
        return self._judged(q.float(), s.float(), self._zeros(s.float(), zeros))

    def feedback(self, start: _State) -> _State:
        """Round with error feedback; rows that lose by it stay as they are."""
        if self.by_importance:
            found = self._feedback(start.s.clone(), start.z.clone(), renew=True)
        else:
            found = self._feedback(start.s, start.z, renew=False)
        return self._better(found, start)

    def _feedback(self, s: Tensor, z: Tensor, renew: bool) -> _State:
        """Columns in order of falling H_jj, each to what the errors of those before it ask it for.

        With ``renew``, which takes groups that are neighbours in that order, each group's statistics are searched anew
        when its turn comes, for what its columns are asked for by then.
        """
        rows, n = self.W.shape
        order = torch.arange(n, device=self.W.device) if self.by_importance else self.order
        group_of = [column // self.size for column in order.tolist()]
        q = torch.empty_like(self.W)
        # Columns lie as rows: each is then contiguous. This is the sum over j < k of (W - Q)_j U_jk so far.
        asked = self.W.new_zeros(n, rows)
        importance = self._conditional_importance() if renew else None
        # Blocks end where groups do, so that all errors before a group have come to it when it is searched.
        for first, last in self.spans if renew else [(0, n)]:
            if importance is not None:
                wanted = self.W[:, first:last] + asked[first:last].T
                found = quantize_groupwise(wanted, self.bits, -1, self.symmetric, importance[first:last], self.where)
                g = group_of[first]
                s[g] = found[1][0].float()
                z[g] = s[g] * self.middle if found[2] is None else found[2][0].float()
            for begin in range(first, last, _BLOCK):
                end = min(begin + _BLOCK, last)
                columns = order[begin:end]
                block = self.W[:, columns].T.contiguous()
                targets = asked[begin:end].add_(block)
                codes = self._round_block(block, targets, s, z, group_of[begin:end], self.U[begin:end, begin:end])
                q[:, columns] = codes.T
                asked[end:].addmm_(self.U[begin:end, end:].T, block)
        return self._judged(q, s, z)

    def _round_block(
        self, block: Tensor, targets: Tensor, s: Tensor, z: Tensor, group_of: list[int], U: Tensor
    ) -> Tensor:
        """Codes (columns, out) of some columns; ``block``, their weights, becomes their errors."""
        codes, last = torch.empty_like(block), len(block) - 1
        known: dict[int, tuple[Tensor, Tensor]] = {}  # of the groups met: 1 / s, and the code of 0
        for k, g in enumerate(group_of):
            if g not in known:
                inverse = torch.where(s[g] == 0, 0.0, 1 / s[g])
                known[g] = inverse, torch.full_like(inverse, self.middle) if self.symmetric else z[g] * inverse
            inverse, offset = known[g]
            code = torch.addcmul(offset, targets[k], inverse, out=codes[k]).round_().clamp_(0, self.top)
            error = torch.addcmul(block[k], code, s[g], value=-1, out=block[k]).add_(z[g])
            if k < last:
                targets[k + 1 :].addr_(U[k, k + 1 :], error)
        return codes

    def _conditional_importance(self) -> Tensor:
        """D of H = U D Uᵀ, what a miss of each column costs when those after it make up for it as far as they can."""
        H = self.H if self.by_importance else self.H[self.order][:, self.order]
        square = self.U.double().square()
        D = torch.linalg.solve_triangular(square, H.diagonal().double()[:, None], upper=True, unitriangular=True)
        return D[:, 0].clamp_min(0).float()

    def refine(self, state: _State) -> bool:
        """One round of codes and statistics in place; whether anything changed."""
        moved = self.descend(state)
        G = (self.W - self._dense(state)) @ self.H
        for g, (a, b) in enumerate(self.spans):
            moved |= self._refit(state, G, g, a, b)
        self._judge(state)
        return moved

    def descend(self, state: _State) -> bool:
        """One sweep of coordinate descent over the codes, in place."""
        n = self.W.shape[1]
        G = (self.W - self._dense(state)) @ self.H
        diagonal = self.H.diagonal().tolist()
        inverse = torch.where(state.s == 0, 0.0, 1 / state.s)
        any_moved = False
        for begin in range(0, n, _BLOCK):
            end = min(begin + _BLOCK, n)
            gradient = G[:, begin:end].T.contiguous()
            codes = state.q[:, begin:end].T.contiguous()
            moves = torch.empty_like(gradient)
            own = self.H[begin:end, begin:end]
            for k in range(end - begin):
                h, g = diagonal[begin + k], (begin + k) // self.size
                # A little short of the best place, so that no code moves for what rounding errors pretend.
                share = (1 - _LEAST_GAIN) / h if h > 0 else 0.0
                target = torch.addcmul(codes[k], gradient[k], inverse[g], value=share).round_().clamp_(0, self.top)
                torch.sub(target, codes[k], out=moves[k]).mul_(state.s[g])
                codes[k] = target
                if k + 1 < end - begin:
                    gradient[k + 1 :].addr_(own[k, k + 1 :], moves[k], alpha=-1)
            state.q[:, begin:end] = codes.T
            any_moved |= bool(moves.any())
            if end < n:
                G[:, end:].addmm_(moves.T, self.H[begin:end, end:], alpha=-1)
        return any_moved

    def _refit(self, state: _State, G: Tensor, g: int, a: int, b: int) -> bool:
        """The best s and z of one group, rounded as stored, where that lowers a row's loss; G follows."""
        P = state.q[:, a:b] - self.middle if self.symmetric else state.q[:, a:b]
        H, here = self.H[a:b, a:b], G[:, a:b]
        PH = P @ H
        pp, rp = (PH * P).sum(1), (P * here).sum(1)
        tiny = torch.finfo(torch.float32).tiny
        s, z = state.s[g], state.z[g]
        if self.symmetric:
            new_s = _half(s + rp / pp.clamp_min(tiny))
            new_z = new_s * self.middle
            ds = new_s - s
            change = ds * (ds * pp - 2 * rp)
        else:
            p1, r1, one = PH.sum(1), here.sum(1), H.sum().clamp_min(tiny)
            # The scale with the zero following it, then the zero that suits the rounded scale.
            left = pp - p1.square() / one
            right = rp - p1 * r1 / one
            new_s = _half(torch.where(left > 1e-6 * pp, s + right / left.clamp_min(tiny), s))
            ds = new_s - s
            new_z = _half(z + (p1 * ds - r1) / one)
            dz = new_z - z
            change = ds * ds * pp - 2 * ds * dz * p1 + dz * dz * one - 2 * (ds * rp - dz * r1)
        size = pp * new_s.square()
        better = (change < -_LEAST_GAIN * size.abs() * torch.finfo(torch.float16).eps) & new_s.isfinite()
        better &= new_z.isfinite()
        if not bool(better.any()):
            return False
        ds = torch.where(better, new_s - s, 0)
        dz = torch.where(better, new_z - z, 0)
        state.s[g], state.z[g] = s + ds, z + dz
        moved = P * ds[:, None]
        if not self.symmetric:
            moved -= dz[:, None]
        G.addmm_(moved, self.H[a:b], alpha=-1)
        return True

    def rounded(self, state: _State, rounding: Round, rounds: int) -> _State:
        """The statistics as storage keeps them, and codes that suit them."""
        s, zeros = rounding(state.s, None if self.symmetric else state.z)
        s = _half(s)
        z = self._zeros(s, zeros)
        kept = self._judged(state.q, s, z)
        nearest = self._judged(self._rounded_codes(s, z), s, z)
        found = self._better(self._feedback(s, z, renew=False), self._better(nearest, kept))
        for _ in range(rounds):
            if not self.descend(found):
                break
        self._judge(found)
        return found

    def result(self, state: _State, losses: list[float], shrinkage: float) -> GroupFit:
        """A fit in the order of W's own inputs."""
        q, g_idx = state.q.to(torch.uint8), None
        if self.by_importance:
            codes = torch.empty_like(q)
            codes[:, self.order] = q
            n = q.shape[1]
            g_idx = torch.empty(n, dtype=torch.int32, device=q.device)
            position = torch.arange(n, dtype=torch.int32, device=q.device)
            g_idx[self.order] = position.div(self.size, rounding_mode="floor")
            q = codes
        zeros = None if self.symmetric else state.z.half()
        return GroupFit(q, state.s.half(), zeros, g_idx, losses, shrinkage)

    # -- of a state -------------------------------------------------------------------------------------------------

    def _zeros(self, s: Tensor, zeros: Tensor | None) -> Tensor:
        return s * self.middle if zeros is None else _half(zeros)

    def _nearest(self, w: Tensor, s: Tensor, z: Tensor) -> Tensor:
        inverse = torch.where(s == 0, 0.0, 1 / s)
        if self.symmetric:
            return torch.addcmul(torch.full_like(w, self.middle), w, inverse).round_().clamp_(0, self.top)
        return ((w + z) * inverse).round_().clamp_(0, self.top)

    def _rounded_codes(self, s: Tensor, z: Tensor) -> Tensor:
        parts = [
            self._nearest(self.W[:, a:b], s[g][:, None].expand(-1, b - a), z[g][:, None])
            for g, (a, b) in enumerate(self.spans)
        ]
        return torch.cat(parts, 1)

    def _spread(self, statistics: Tensor) -> Tensor:
        return statistics.T.repeat_interleave(self.size, 1)[:, : self.W.shape[1]]

    def _dense(self, state: _State) -> Tensor:
        return (state.q * self._spread(state.s)).sub_(self._spread(state.z))

    def _judged(self, q: Tensor, s: Tensor, z: Tensor) -> _State:
        state = _State(q, s, z, q)
        self._judge(state)
        return state

    def _judge(self, state: _State) -> None:
        R = self._dense(state).neg_().add_(self.W)
        state.loss = ((R @ self.H) * R).sum(1)

    def _better(self, found: _State, other: _State) -> _State:
        """Of each row the better of two."""
        take = found.loss < other.loss
        return _State(
            torch.where(take[:, None], found.q, other.q),
            torch.where(take, found.s, other.s),
            torch.where(take, found.z, other.z),
            torch.where(take, found.loss, other.loss),
        )


def _middle(bits: int) -> float:
    """The code that means 0 in a symmetric layer."""
    return 0.5 if bits == 1 else float(1 << (bits - 1))


def _half(x: Tensor) -> Tensor:
    return x.to(torch.float16).to(torch.float32)
