"""Round a matrix to codes of a few bits in groups of inputs, with the scales that lose least.

For one group of weights w with importance d, levels s q - z (q = 0 .. Q, Q = 2^bits - 1) are chosen to minimise

    E(s, z, q) = Σ_j d_j (w_j - (s q_j - z))²

which is not convex: for fixed s and z the best q is rounding, q_j = clamp(round((w_j + z) / s), 0, Q); for fixed q the
best s and z solve two linear equations. With means ⟨·⟩ weighted by d they are

    s = ⟨(q - ⟨q⟩)(w - ⟨w⟩)⟩ / ⟨(q - ⟨q⟩)²⟩        z = s ⟨q⟩ - ⟨w⟩

and, where z = s z₀ is tied to the scale (symmetric), s = ⟨(q - z₀) w⟩ / ⟨(q - z₀)²⟩. Alternating the two is Lloyd's
algorithm (1982, doi:10.1109/TIT.1982.1056489) with equidistant levels: E never grows, and ends in a minimum near its
start. So it starts from a grid: the range of the group, clipped to a fraction ρ of itself, since large groups of few
bits gain more from finer levels than they lose at the clipped ends. A symmetric range has one level more on one side;
s may be negative, and the grid tries both signs.

That is the search "mse". "min-max" stops at the first start, the whole range. "half-quadratic" ends "mse" with rounds
of half_quadratic.py, for the error Σ_j d_j |w_j - (s q_j - z)|^p with p < 1.

s and z are rounded to float16, as they are stored, before any code or error is computed from them, so E is the error
of the stored layer. The best of everything visited is kept, plain min-max included.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_onebit.algorithms.half_quadratic import POWER, targets

__all__ = ["SEARCHES", "quantize_groupwise"]

SEARCHES = ("mse", "min-max", "half-quadratic")

_CHUNK = 1 << 17  # weights worked on at once: temporaries stay in a core's cache
_ROUNDS = 4  # of alternation from the best start; more change the error by less than a thousandth
_HALF_QUADRATIC_ROUNDS = 10
_FLOOR = 1e-12  # of the largest importance, so that a fit is never decided by nothing at all
_COUNTS = 1e-3  # of its group's mean importance: less than that does not widen the range
# Smallest fraction ρ worth trying, and the number of fractions, by bits: with many levels clipping never pays.
_GRID = {1: (0.1, 10), 2: (0.4, 10), 3: (0.55, 10), 4: (0.6, 9), 5: (0.75, 6), 6: (0.85, 5), 7: (0.92, 4), 8: (0.96, 4)}


def quantize_groupwise(
    W: Tensor,
    bits: int,
    group_size: int,
    symmetric: bool,
    importance: Tensor | None = None,
    where: str = "quantize_groupwise",
    search: str = "mse",
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, scales and zeros of a matrix: W[n, k] ≈ scales[g, n] · codes[n, k] - zeros[g, n], g = k // group_size.

    Args:
        W: ``(out, in)``, any float dtype; computed in float32.
        bits: width of one code, 1..8.
        group_size: inputs that share a scale, >= 1; -1 for all of them. The last group may be shorter.
        symmetric: zeros are scales · 2^(bits - 1) (scales / 2 at one bit) and are not returned.
        importance: non-negative weights of the squared errors, ``(in,)`` or ``(out, in)``; None counts all alike.
        where: the layer's name, for the error text.
        search: how scales and zeros are found; one of ``SEARCHES``.

    Returns:
        codes uint8 ``(out, in)``; scales float16 ``(groups, out)``; zeros float16 ``(groups, out)``, None if symmetric.

    Raises:
        ValueError: wrong arguments, values that are not finite, or scales that float16 cannot hold.
    """
    _check(W, bits, group_size, importance, where, search)
    out_features, in_features = W.shape
    group = min(in_features, in_features if group_size == -1 else group_size)
    groups = -(-in_features // group) if in_features else 0
    codes = torch.empty(out_features, in_features, dtype=torch.uint8, device=W.device)
    scales = torch.empty(groups, out_features, dtype=torch.float16, device=W.device)
    zeros = None if symmetric else torch.empty_like(scales)
    if importance is not None:
        importance = _floored(importance.to(W.device, torch.float32))
    full = in_features // group if group else 0
    spans = [(0, full, group)] if full else []
    if groups > full:
        spans.append((full * group, 1, in_features - full * group))
    rows_at_once = max(1, _CHUNK // max(in_features, 1))
    for first in range(0, out_features, rows_at_once):
        rows = slice(first, first + rows_at_once)
        for start, count, size in spans:
            columns = slice(start, start + count * size)
            w = W[rows, columns].to(torch.float32).unflatten(1, (count, size))
            d: Tensor | None = None
            if importance is not None:
                here = importance[rows, columns] if importance.dim() == 2 else importance[columns]
                d = here.unflatten(-1, (count, size))
            q, s, z, error = _fit(w, d, bits, symmetric, search)
            _check_range(w, error, where)
            codes[rows, columns] = q.flatten(1).to(torch.uint8)
            into = slice(start // group, start // group + count)
            scales[into, rows] = s.T.to(torch.float16)
            if zeros is not None:
                zeros[into, rows] = z.T.to(torch.float16)
    if groups and bool(W.any()) and not bool(scales.any()) and (zeros is None or not bool(zeros.any())):
        _refuse_range(float(W.abs().max()), where)
    return codes, scales, zeros


class _Best:
    """The best scale and zero of every group so far, and their error."""

    def __init__(self, w: Tensor, d: Tensor | None, bits: int, symmetric: bool) -> None:
        self.w, self.d = w, d
        self.top = float((1 << bits) - 1)
        self.middle = 0.5 if bits == 1 else float(1 << (bits - 1))
        self.symmetric = symmetric
        self.s = w.new_zeros(w.shape[:-1])
        self.z = w.new_zeros(w.shape[:-1])
        self.error = w.new_full(w.shape[:-1], float("inf"))
        self.total = None if d is None else d.sum(-1)
        self.power = 2.0

    def mean(self, values: Tensor) -> Tensor:
        """Over each group, weighted; ``values`` is spent."""
        if self.d is None or self.total is None:
            return values.mean(-1)
        return values.mul_(self.d).sum(-1) / self.total

    def codes(self, s: Tensor, z: Tensor) -> Tensor:
        inverse = torch.where(s == 0, 0.0, 1 / s)
        offset = torch.full_like(z, self.middle) if self.symmetric else z * inverse
        return torch.addcmul(offset.unsqueeze(-1), self.w, inverse.unsqueeze(-1)).round_().clamp_(0, self.top)

    def visit(self, s: Tensor, z: Tensor) -> Tensor:
        """Keep s and z, rounded as stored, where they are better; their codes."""
        s = s.to(torch.float16).to(torch.float32)
        z = s * self.middle if self.symmetric else z.to(torch.float16).to(torch.float32)
        q = self.codes(s, z)
        error = self.lost(s, z, q)
        better = error < self.error  # False where s or z overflowed
        self.s, self.z = torch.where(better, s, self.s), torch.where(better, z, self.z)
        self.error = torch.where(better, error, self.error)
        return q

    def lost(self, s: Tensor, z: Tensor, q: Tensor) -> Tensor:
        """The error of each group."""
        miss = torch.addcmul(z.unsqueeze(-1) + self.w, q, s.unsqueeze(-1), value=-1)
        return self.mean(miss.mul_(miss) if self.power == 2.0 else miss.abs_().pow_(self.power))

    def judge_by(self, power: float) -> None:
        """From here on, errors are of |w - ŵ| to this power."""
        self.power = power
        self.error = self.lost(self.s, self.z, self.codes(self.s, self.z))

    def refit(self, q: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The least squares s and z for these codes, of the weights or of ``targets``; ``q`` is spent."""
        w = self.w if targets is None else targets
        if self.symmetric:
            q = q.sub_(self.middle)
            s = self.mean(q * w) / self.mean(q.mul_(q)).clamp_(min=1e-30)
            return s, s
        mean_q, mean_w = self.mean(q.clone()), self.mean(w.clone())
        q = q.sub_(mean_q.unsqueeze(-1))
        # Centred first: the plain normal equations cancel when a group lies far from zero.
        covariance = self.mean((w - mean_w.unsqueeze(-1)).mul_(q))
        s = covariance / self.mean(q.mul_(q)).clamp_(min=1e-30)
        return s, s * mean_q - mean_w


def _fit(w: Tensor, d: Tensor | None, bits: int, symmetric: bool, search: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Groups ``(rows, groups, size)``: codes as floats; scales, zeros (as float16 holds them), errors of each group."""
    best = _Best(w, d, bits, symmetric)
    if search == "min-max":
        for s, z in _ends(w, best):
            best.visit(s, z)
        return best.codes(best.s, best.z), best.s, best.z, best.error
    least, count = _GRID[bits]
    for s, z in _starts(w, best, torch.linspace(1, least, count).tolist()):
        best.visit(*best.refit(best.visit(s, z)))
    for _ in range(_ROUNDS):
        best.visit(*best.refit(best.codes(best.s, best.z)))
    if search == "half-quadratic":
        best.judge_by(POWER)
        for round_ in range(_HALF_QUADRATIC_ROUNDS):
            q = best.codes(best.s, best.z)
            best.visit(*best.refit(q, targets(w, q, best.s, best.z, round_)))
    return best.codes(best.s, best.z), best.s, best.z, best.error


def _ends(w: Tensor, best: _Best) -> list[tuple[Tensor, Tensor]]:
    """Plain min-max: where it is symmetric, with either sign, as far as the longer side goes."""
    low, high = w.amin(-1), w.amax(-1)
    if not best.symmetric:
        return [((high - low) / best.top, -low)]
    largest = torch.where(high > -low, -high, -low) / best.middle
    return [(largest, largest), (-largest, -largest)]


def _starts(w: Tensor, best: _Best, fractions: list[float]) -> list[tuple[Tensor, Tensor]]:
    """Scales and zeros to begin from: min-max first, then the range clipped to ``fractions`` of itself."""
    if best.d is None:
        return _starts_of_range(w.amin(-1), w.amax(-1), best, fractions)
    # The range that matters, beside that of all: one large weight that counts for nothing must not set the scale.
    counts = best.d > _COUNTS * best.d.mean(-1, keepdim=True)
    low = torch.where(counts, w, float("inf")).amin(-1)
    high = torch.where(counts, w, -float("inf")).amax(-1)
    return [
        *_starts_of_range(w.amin(-1), w.amax(-1), best, fractions[:1]),
        *_starts_of_range(low, high, best, fractions),
    ]


def _starts_of_range(low: Tensor, high: Tensor, best: _Best, fractions: list[float]) -> list[tuple[Tensor, Tensor]]:
    if not best.symmetric:
        centre, half = (low + high) / 2, (high - low) / 2
        # With few levels it matters which end is clipped: with two, only that moves the border between them.
        ends = [(a, b) for a in fractions[::3] for b in fractions[::3]] if best.top < 8 else [(a, a) for a in fractions]
        clipped = [((a + b) * half / best.top, a * half - centre) for a, b in ends[1:]]
        return [(2 * half / best.top, -low), *clipped]  # at first with the end of the range exactly a code
    # The longer side takes the extra level; its scale is negative where that is the positive one.
    largest = torch.where(high > -low, -high, -low) / best.middle
    starts = [(rho * largest, largest) for rho in fractions]
    if best.top > 1:  # two levels of equal size are the same layer with either sign
        other = largest * (best.middle / (best.middle - 1))  # the shorter side's levels reach the largest weight
        starts += [(-rho * other, other) for rho in fractions[: len(fractions) // 2 + 1]]
        starts.append((-largest, largest))  # or are cut off: with the first start, both signs of plain min-max
    return starts


def _floored(d: Tensor) -> Tensor:
    """Importance over its largest entry; if that is zero, all count alike."""
    top = float(d.max()) if d.numel() else 0.0
    return (d / top).clamp_(min=_FLOOR) if top > 0 else torch.ones_like(d)


def _check(W: Tensor, bits: int, group_size: int, importance: Tensor | None, where: str, search: str) -> None:
    if search not in SEARCHES:
        raise ValueError(f"{where}: search is {search!r}, expected one of {', '.join(map(repr, SEARCHES))}")
    if not 1 <= bits <= 8:
        raise ValueError(f"{where}: bits must be between 1 and 8, got {bits}")
    if group_size < 1 and group_size != -1:
        raise ValueError(f"{where}: group_size must be positive, or -1 for the whole row, got {group_size}")
    if W.dim() != 2 or not W.is_floating_point():
        raise ValueError(f"{where}: W must be a float matrix (out, in), got {W.dtype} {tuple(W.shape)}")
    bad = W.numel() - int(W.isfinite().sum())
    if bad:
        raise ValueError(f"{where}: W has {bad} values that are inf or nan, expected none; is the checkpoint damaged?")
    if importance is None:
        return
    if tuple(importance.shape) not in {(W.shape[1],), tuple(W.shape)}:
        raise ValueError(
            f"{where}: importance has shape {tuple(importance.shape)}, expected ({W.shape[1]},) or {tuple(W.shape)}"
        )
    if not bool((importance.isfinite() & (importance >= 0)).all()):
        raise ValueError(f"{where}: importance must be finite and not negative; check what it was computed from")


def _check_range(w: Tensor, error: Tensor, where: str) -> None:
    # Nothing that float16 holds was visited: every error is still infinite.
    overflow = error.isinf()
    if bool(overflow.any()):
        _refuse_range(float(w[overflow].abs().max()), where)


def _refuse_range(largest: float, where: str) -> None:
    raise ValueError(
        f"{where}: the largest weight is {largest:.3g}, and float16 scales and zeros (6e-8 to 65504) cannot hold its "
        "group; scale the weights, or keep this layer float (modules_to_not_convert, --skip NAME)"
    )
