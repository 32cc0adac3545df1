"""OneBit's closed form: W ≈ diag(a) · S · diag(b), S = sign(W). Xu et al. 2024, arXiv:2402.11295, §3 (SVID).

    |W| ──Sinkhorn──▶ r, c ──weighted rank one of diag(r)|W|diag(c)──▶ u, v ──fold──▶ a = u/r, b = v/c

|W| is non-negative, so its leading singular pair is too (Perron–Frobenius) and, by Eckart–Young, that pair is
the best a bᵀ for these signs. Balancing (Sinkhorn & Knopp 1967) and importance change what "best" counts;
whatever scaling they use is undone in a and b, so the planes always describe W itself. The derivations are in
docs/methods/onebit.md.

Letters: W (out, in); M = |W| over its largest entry; r (out,) and c (in,) balance M; d (in,) weighs columns;
u, v fit the balanced matrix and a (out,), b (in,) fit W. Only M is ever dense: the balanced and the weighted
matrix act through their vectors, diag(r) M diag(c) x = r * (M @ (c * x)).
"""

from __future__ import annotations

import math
import numbers
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "Plane",
    "closed_form",
    "closed_form_planes",
    "dequantize_planes",
    "importance_from_hessian",
    "option_problems",
    "sinkhorn",
    "to_half",
]

# A row or column with less mass than this fraction of the largest entry is dust: balancing leaves it alone.
_DUST = 2.0**-64
# Scales outside [1/_RANGE, _RANGE] mean that M cannot be balanced (its zero pattern forbids it, so Sinkhorn
# drives them to 0 and ∞). Within it, every product below stays inside fp32.
_RANGE = 2.0**100
# Sinkhorn has converged when a pass moves no column scale by more than this: fp32 cannot say it better.
_CONVERGED = 1e-6
# Importance is floored at this fraction of the largest, so that a fit is never decided by nothing at all.
_WEIGHT_FLOOR = 1e-12
_ALPHA_RANGE = 1e30
# What leaves a layer out, in messages; ``Onebit`` has another name for it.
_SKIPPED_BY = "modules_to_not_convert (--skip NAME)"
# Rounding to fp16 may change the norm of a scale vector by this fraction.
_HALF_TOLERANCE = 0.01


@dataclass(frozen=True, eq=False)
class Plane:
    """One sign matrix with its scales: W ≈ diag(a) · S · diag(b).

    Attributes:
        signs: (out, in) bool, True means +1.
        a: (out,) fp32, the scale of each output.
        b: (in,) fp32, the scale of each input; ‖a‖ = ‖b‖.
    """

    signs: Tensor
    a: Tensor
    b: Tensor


def option_problems(*, iters: object, use_balancing: object, balance_iters: object, balance_alpha: object) -> list[str]:
    """What is wrong with these options of the closed form, one sentence each; empty when nothing is."""
    problems = []
    if not _is_integer(iters) or iters < 0:  # type: ignore[operator]
        problems.append(f"iters must be an integer >= 0, got {iters!r}")
    if not isinstance(use_balancing, bool):
        problems.append(f"use_balancing must be True or False, got {use_balancing!r}")
    if use_balancing is not False:  # what balancing does not use, it does not judge
        if not _is_integer(balance_iters) or balance_iters < 1:  # type: ignore[operator]
            problems.append(
                f"balance_iters must be an integer >= 1, got {balance_iters!r}; to leave balancing out, set "
                "use_balancing=False"
            )
        is_real = isinstance(balance_alpha, numbers.Real) and not isinstance(balance_alpha, bool)
        if not is_real or not 0 < balance_alpha <= sys.float_info.max:  # type: ignore[operator]
            problems.append(f"balance_alpha must be a finite number > 0, got {balance_alpha!r}")
    return problems


@torch.no_grad()
def sinkhorn(magnitudes: Tensor, iterations: int, alpha: float) -> tuple[Tensor, Tensor]:
    """Scales r, c that give every row of diag(r) M diag(c) the mass alpha and every column n·alpha/m.

    One pass is r = alpha / (M c), c = (n·alpha/m) / (Mᵀ r) (Sinkhorn & Knopp 1967); passes stop early once
    they change nothing. n and m count the rows and columns that hold any mass: the others keep the scale 1. A
    matrix whose zero pattern cannot be balanced is left at the last pass whose scales fp32 can hold, so the
    result is finite.

    Args:
        magnitudes: M, (n, m), >= 0 and finite, any floating dtype. It is not changed.
        iterations: the most passes to run, >= 0.
        alpha: the mass of a row, within 1e±30. It fixes a gauge only: r·c is proportional to it.

    Returns:
        r (out,) and c (in,), in fp32 (fp64 for fp64 input), all > 0.

    Raises:
        ValueError: alpha or iterations out of range, or M is not such a matrix.
    """
    if not _is_integer(iterations) or iterations < 0:
        raise ValueError(f"sinkhorn: iterations must be an integer >= 0, got {iterations!r}")
    if not 1 / _ALPHA_RANGE <= alpha <= _ALPHA_RANGE:
        raise ValueError(f"sinkhorn: alpha must be within 1e-30 .. 1e30, got {alpha!r}")
    _check_matrix(magnitudes, None)
    peak = _finite_peak(magnitudes, None)
    if magnitudes.amin() < 0:
        raise ValueError(f"sinkhorn: magnitudes must be >= 0, got {magnitudes.amin().item():g}; pass W.abs()")
    M = magnitudes.to(_work_dtype(magnitudes)) / (peak or 1.0)
    r, c = _balance(M, iterations)
    # M was divided by its peak and balanced to mass 1; each side takes half of what is left, so neither
    # overflows.
    half = math.sqrt(alpha) / math.sqrt(peak or 1.0)
    return torch.where(_alive(M, 1), r * half, r), torch.where(_alive(M, 0), c * half, c)


@torch.no_grad()
def closed_form(
    W: Tensor,
    *,
    importance: Tensor | None = None,
    iters: int = 10,
    use_balancing: bool = True,
    balance_iters: int = 40,
    balance_alpha: float = 1.0,
    layer: str | None = None,
    skipped_by: str = _SKIPPED_BY,
) -> Plane:
    """The signs of W with the best scales for them: W ≈ diag(a) · S · diag(b). arXiv:2402.11295 §3.

    With M = |W| balanced to Mb = diag(r) M diag(c), this minimises Σ_ij d_j² (Mb_ij − u_i v_j)², d_j² =
    importance_j, by alternating least squares, which is power iteration on Mb diag(d), and returns a = u/r
    and b = v/c. Without balancing (r = c = 1) that is the importance-weighted SVID; without either, the plain
    one, whose squared error ‖W‖² − σ₁(|W|)² is the least that these signs allow.

    Balancing comes first and importance weighs only the fit. The other way round a converged Sinkhorn would
    cancel the importance: balancing M diag(d) gives c/d in place of c, and the same balanced matrix. So
    importance counts errors relative to the mass of their column. Where columns differ widely in mass and the
    weighted error of W itself is what matters, leave balancing out.

    A zero weight gets the sign +1. A column of importance 0 has no say in a, and still gets the b that fits
    it best. Where W resists balancing so much that the balanced fit is worse than none (a weighted squared
    error above that of Ŵ = 0; zero patterns and extreme tails can do that), the unbalanced fit is returned.
    The result depends on the arguments alone; no random numbers are drawn.

    Args:
        W: (out, in) weights, fp16, bf16, fp32 or fp64; not changed. Works in fp32 (fp64 for fp64) with one
            dense copy.
        importance: (in,), >= 0: how much the squared error of each column counts, such as the diagonal of a
            Hessian. Its scale does not matter; all zero means as if absent. Negative entries count as 0.
        iters: rounds of alternating least squares, started from the column means; 0 fits only a to those.
        use_balancing: balance the magnitudes before the fit.
        balance_iters: the most Sinkhorn passes.
        balance_alpha: the row mass of the balanced matrix. It is undone with the balancing, hence cannot
            change the result; the arithmetic uses 1 so that no value of it can overflow.
        layer: the layer's name, for error messages.
        skipped_by: where the caller lists the layers that stay float, for error messages.

    Returns:
        A ``Plane`` with ‖a‖ = ‖b‖, on W's device.

    Raises:
        ValueError: W is not a finite matrix of floats, importance does not fit it, or an option is out of
            range.
    """
    problems = option_problems(
        iters=iters, use_balancing=use_balancing, balance_iters=balance_iters, balance_alpha=balance_alpha
    )
    if problems:
        raise ValueError(f"{_name(layer)}: " + "; ".join(problems))
    _check_matrix(W, layer)
    signs = W >= 0
    M = W.detach().to(_work_dtype(W), copy=True).abs_()
    peak = _finite_peak(M, layer, skipped_by)
    d = _column_weights(importance, M, layer)
    if peak == 0:
        n, m = W.shape
        return Plane(signs, M.new_zeros(n, dtype=torch.float32), M.new_zeros(m, dtype=torch.float32))
    M.div_(peak)
    r, c = _balance(M, balance_iters if use_balancing else 0)
    a, b = _fit(M, r, c, d, iters)
    if use_balancing and not _squared_error(M, a, b, d) <= _energy(M, d):
        a, b = _fit(M, torch.ones_like(r), torch.ones_like(c), d, iters)
    root = math.sqrt(peak)
    return Plane(signs, (a * root).float(), (b * root).float())


def to_half(plane: Plane, layer: str | None, skipped_by: str = _SKIPPED_BY) -> tuple[Tensor, Tensor]:
    """Round the scales to fp16, as they are stored, and refuse what fp16 cannot hold.

    Single entries may round to 0. What may not happen is an overflow, or a rounding that changes the norm of
    a whole vector by more than 1 %, which means that its bulk lies below fp16's smallest steps.

    Args:
        plane: scales in fp32.
        layer: the layer's name, for the error message; None if it has none.
        skipped_by: as for ``closed_form``.

    Returns:
        a (out,) and b (in,) in fp16.

    Raises:
        ValueError: as above; it names the layer, the vector, its range and the remedy.
    """
    return _half(plane.a, "output scales a", layer, skipped_by), _half(plane.b, "input scales b", layer, skipped_by)


@torch.no_grad()
def closed_form_planes(
    W: Tensor, planes: int, *, layer: str | None = None, skipped_by: str = _SKIPPED_BY, **options: Any
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """W as a sum of sign planes: the first is the closed form of W, each further one that of what is left.

    The residual is taken against the fp16 scales that are stored, so a later plane also corrects their
    rounding.

    Args:
        W: (out, in) weights, as for ``closed_form``.
        planes: how many, >= 1; each costs about one bit per weight.
        layer: the layer's name, for error messages.
        skipped_by: as for ``closed_form``.
        options: keyword arguments of ``closed_form``, the same for every plane.

    Returns:
        For each plane (signs (out, in) bool, a (out,) fp16, b (in,) fp16).

    Raises:
        ValueError: as ``closed_form`` and ``to_half``, or planes < 1.
    """
    if not _is_integer(planes) or planes < 1:
        raise ValueError(f"{_name(layer)}: planes must be an integer >= 1, got {planes!r}")
    result: list[tuple[Tensor, Tensor, Tensor]] = []
    residual = W.detach()
    for _ in range(planes):
        if result:
            residual = dequantize_planes(result[-1:]).neg_().add_(residual)
        plane = closed_form(residual, layer=layer, skipped_by=skipped_by, **options)
        result.append((plane.signs, *to_half(plane, layer, skipped_by)))
    return result


@torch.no_grad()
def dequantize_planes(planes: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """The dense matrix Σ_p diag(a_p) S_p diag(b_p), (out, in), computed in fp32 from the scales as given.

    Args:
        planes: at least one of (signs (out, in) bool, a (out,), b (in,)).

    Raises:
        ValueError: there is no plane.
    """
    if not planes:
        raise ValueError("dequantize_planes: got no plane, expected at least one (signs, a, b)")
    total = _dense(*planes[0])
    for plane in planes[1:]:
        total.add_(_dense(*plane))
    return total


def importance_from_hessian(H: Tensor) -> Tensor:
    """The importance (in,) of each input: the diagonal of H (in, in), with rounding below zero cut off.

    For H = (2/N) XᵀX this is twice the mean square of each input, so that Σ_j importance_j (W_ij − Ŵ_ij)² is
    twice the mean squared error of output i if the inputs were uncorrelated.

    Raises:
        ValueError: H is not square.
    """
    if H.ndim != 2 or H.shape[0] != H.shape[1]:
        raise ValueError(f"the Hessian must be a square matrix (in, in), got shape {tuple(H.shape)}")
    return H.detach().diagonal().clamp(min=0)


def _fit(M: Tensor, r: Tensor, c: Tensor, d: Tensor, iters: int) -> tuple[Tensor, Tensor]:
    """Weighted rank-one fit of diag(r) M diag(c), unscaled: a, b with M ≈ a bᵀ and ‖a‖ = ‖b‖.

    Each round solves for u given v, then v given u; u ends as the solution for the last v. As u only ever
    meets v up to a factor, both are scaled to a largest entry of 1 before their squares are summed.
    """
    v = c * (M.T @ r)  # column means, up to a factor
    v = v / v.amax()
    u = _rows(M, r, c, d, v)
    for _ in range(iters):
        u = u / u.amax()
        v = c * (M.T @ (r * u)) / u.square().sum()  # weights cancel: each column is fitted on its own
        v = v / v.amax()
        u = _rows(M, r, c, d, v)
    return _gauge(u / r, v / c)


def _rows(M: Tensor, r: Tensor, c: Tensor, d: Tensor, v: Tensor) -> Tensor:
    """The u (out,) that minimises Σ_ij d_j² (r_i M_ij c_j − u_i v_j)²."""
    weighted = d.square() * v
    return r * (M @ (c * weighted)) / (weighted * v).sum()


def _gauge(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The same a bᵀ with ‖a‖ = ‖b‖. Neither the norms nor the factors leave the range of the entries."""
    top_a, top_b = a.amax().item(), b.amax().item()
    a, b = a / top_a, b / top_b
    size_a, size_b = a.norm().item(), b.norm().item()
    size = math.sqrt(top_a) * math.sqrt(top_b) * math.sqrt(size_a) * math.sqrt(size_b)
    return a * (size / size_a), b * (size / size_b)


def _balance(M: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Sinkhorn's scales for row mass 1, for M with a largest entry of 1 (or none); see ``sinkhorn``."""
    rows, columns = _alive(M, 1), _alive(M, 0)
    ratio = rows.sum() / columns.sum().clamp(min=1)
    r, c = M.new_ones(M.shape[0]), M.new_ones(M.shape[1])
    for _ in range(iterations):
        next_r = torch.where(rows, 1 / (M @ c), 1)
        next_c = torch.where(columns, ratio / (M.T @ next_r), 1)
        low = torch.minimum(next_r.amin(), next_c.amin())
        high = torch.maximum(next_r.amax(), next_c.amax())
        moved = (next_c / c - 1).abs().amax()
        if not (low >= 1 / _RANGE and high <= _RANGE):
            break
        r, c = next_r, next_c
        if moved < _CONVERGED:
            break
    return r, c


def _alive(M: Tensor, dim: int) -> Tensor:
    """Which rows (dim 1) or columns (dim 0) of M hold more mass than dust; bool."""
    return M.sum(dim) > _DUST


def _column_weights(importance: Tensor | None, M: Tensor, layer: str | None) -> Tensor:
    """d (in,): the square root of the importance, its largest entry 1; ones where there is none."""
    if importance is None:
        return M.new_ones(M.shape[1])
    if importance.shape != M.shape[1:]:
        raise ValueError(
            f"{_name(layer)}: importance must have one entry per input, shape ({M.shape[1]},), got "
            f"{tuple(importance.shape)}"
        )
    importance = importance.detach().to(M.device, torch.promote_types(importance.dtype, M.dtype))
    if not torch.isfinite(importance).all():
        raise ValueError(
            f"{_name(layer)}: importance holds NaN or infinite values (calibration activations overflowed); calibrate "
            "in float32 or bfloat16, or quantize without importance"
        )
    top = importance.amax()
    if top <= 0:
        return M.new_ones(M.shape[1])
    return (importance / top).clamp(min=_WEIGHT_FLOOR).sqrt().to(M.dtype)


def _energy(M: Tensor, d: Tensor) -> float:
    """Σ_ij d_j² M_ij²."""
    return float(_exact(torch.linalg.vector_norm(M, dim=0) * d).square().sum())


def _squared_error(M: Tensor, a: Tensor, b: Tensor, d: Tensor) -> float:
    """Σ_ij d_j² (M_ij − a_i b_j)², expanded so that nothing dense is built; good to 1e-6 of the energy."""
    weighted = d.square() * b
    cross = _exact(a) @ _exact(M @ weighted)
    model = _exact(a).square().sum() * (_exact(weighted) @ _exact(b))
    return _energy(M, d) - 2 * float(cross) + float(model)


def _half(scale: Tensor, role: str, layer: str | None, skipped_by: str) -> Tensor:
    half = scale.to(torch.float16)
    size = _exact(scale).norm()
    change = (_exact(half).norm() - size).abs()
    if torch.isfinite(half).all() and change <= _HALF_TOLERANCE * size:
        return half
    listed = f"add {layer!r}" if layer else "add its name"
    raise ValueError(
        f"{_name(layer)}: fp16 cannot hold the {role}: they range from {scale.abs().amin().item():.3g} to "
        f"{scale.abs().amax().item():.3g}, and fp16 holds 6e-08 (with full precision 6.1e-05) to 65504. Leave this "
        f"layer in floating point: {listed} to {skipped_by}."
    )


def _dense(signs: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """diag(a) S diag(b) in fp32."""
    return torch.outer(a.float(), b.float()).mul_(signs.to(torch.int8).mul_(2).sub_(1))


def _exact(x: Tensor) -> Tensor:
    """A vector in fp64, on the CPU because some accelerators have no fp64."""
    return x.to("cpu", torch.float64)


def _check_matrix(W: Tensor, layer: str | None) -> None:
    if W.ndim != 2 or not W.numel() or not W.is_floating_point():
        raise ValueError(
            f"{_name(layer)}: expected a non-empty floating-point matrix (out, in), got {W.dtype} of shape "
            f"{tuple(W.shape)}"
        )


def _finite_peak(M: Tensor, layer: str | None, skipped_by: str = _SKIPPED_BY) -> float:
    """The largest entry of M >= 0; refuses NaN and inf, which the maximum shows without a pass of its own."""
    peak = float(M.amax())
    if math.isfinite(peak):
        return peak
    nan, inf = int(M.isnan().sum()), int(M.isinf().sum())
    raise ValueError(
        f"{_name(layer)}: {nan} NaN and {inf} infinite of {M.numel()} weights; only finite weights can be quantized. "
        "Load the model in a dtype that holds them, check the checkpoint for damage, or leave this layer in floating "
        f"point by naming it in {skipped_by}."
    )


def _work_dtype(W: Tensor) -> torch.dtype:
    return torch.float64 if W.dtype == torch.float64 else torch.float32


def _is_integer(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _name(layer: str | None) -> str:
    return f"layer {layer!r}" if layer else "this weight"
