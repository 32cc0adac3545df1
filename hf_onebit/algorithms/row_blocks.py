"""Codes of several widths within one layer: the inputs that matter most get the widest.

Inputs are sorted by H_jj, their mean square, and cut into blocks of falling widths (formats/mbwq.py). An error of b
bits falls as 4^-b, so the widths that lose least at a given mean width are those of least Σ_j H_jj 4^(-b_j): the
multiple-choice knapsack of ``allocation``, with chunks of one group each. H_jj falls along the order, and so do widths.

``fit_blocks`` chooses the codes for a layer's outputs, block by block. With H = U D Uᵀ in that order
(``signs.Curvature.feedback``), E = W − Q and all blocks after b free to make up for b's errors, block b loses

    ‖(E_b U_bb + A_b) D_b^½‖²,    A_b = Σ_{c < b} E_c U_cb

which is the loss of an ordinary layer (``gptq.fit_groups``) with the target W_b + A_b U_bb⁻¹ and the Hessian
U_bb D_b U_bbᵀ. That is GPTQ's error feedback (Frantar et al. 2022, arXiv:2210.17323) with blocks in place of columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hf_onebit.algorithms.allocation import Option, allocate
from hf_onebit.algorithms.curvature import Curvature
from hf_onebit.algorithms.gptq import GroupFit, fit_groups
from hf_onebit.algorithms.groupwise import quantize_groupwise

__all__ = ["WIDTHS", "column_importance", "fit_blocks", "round_blocks", "widths_by_importance"]

# Widths that may stand beside one another in one layer (formats/mbwq.py).
WIDTHS = (8, 6, 5, 4, 3, 2)

Blocks = Sequence[tuple[int, int, int]]
"""(bits, rows, group size) of each block, widths falling."""


def widths_by_importance(importance: Tensor, mean_bits: float, group_size: int) -> tuple[tuple[int, int, int], ...]:
    """The row blocks of a layer that lose least at a mean width.

    Args:
        importance: (in,) of each input, >= 0, in any order.
        mean_bits: bits of a code in the mean, 2 to 8; not exceeded.
        group_size: inputs that share a scale, and the step in which blocks grow, >= 1.

    Returns:
        (bits, rows, group size) of each block, for the inputs in order of falling importance.

    Raises:
        ValueError: ``mean_bits`` is out of range.
    """
    if not WIDTHS[-1] <= mean_bits <= WIDTHS[0]:
        raise ValueError(f"mean_bits is {mean_bits}: expected {WIDTHS[-1]} to {WIDTHS[0]}")
    ordered = importance.double().clamp(min=0).sort(descending=True).values
    chunks = [(chunk.numel(), float(chunk.sum())) for chunk in ordered.split(group_size)]
    options = [[Option(bits * rows, total * 4.0**-bits) for bits in WIDTHS[::-1]] for rows, total in chunks]
    found = allocate(options, int(mean_bits * len(importance)))
    # A shorter last chunk may get more bits than those before it: widths fall all the same.
    widths = sorted((WIDTHS[::-1][choice] for choice in found.choices), reverse=True)
    rows = {bits: sum(r for (r, _), width in zip(chunks, widths, strict=True) if width == bits) for bits in WIDTHS}
    return tuple((bits, count, group_size) for bits, count in rows.items() if count)


@torch.no_grad()
def fit_blocks(
    W: Tensor, curvature: Curvature, blocks: Blocks, symmetric: bool, *, rounds: int = 2, layer: str | None = None
) -> GroupFit:
    """Choose codes, scales and zeros of a layer in row blocks that lower its output error.

    Args:
        W: (out, in) weights, or targets in their place.
        curvature: of the inputs.
        blocks: of the inputs in order of falling H_jj; rows add up to in.
        symmetric: without zeros.
        rounds: in each block, see ``gptq.fit_groups``.
        layer: the layer's name, for error messages.

    Returns:
        A ``GroupFit`` with ``g_idx``, groups counted from the first block on; ``losses`` has the final one.

    Raises:
        ValueError: as ``gptq.fit_groups``.
    """
    W = W.detach().float()
    order, U = curvature.feedback()
    H = curvature.H[order][:, order]
    # U⁻¹ H = D Uᵀ, whose diagonal is D's, since U's is 1.
    D = torch.linalg.solve_triangular(U, H, upper=True, unitriangular=True).diagonal().clamp_min(1e-12)
    ordered = W[:, order]
    left = torch.zeros_like(ordered)  # A: what the blocks so far ask of each column

    def one(first: int, last: int, bits: int, size: int) -> GroupFit:
        own = U[first:last, first:last]
        asked = torch.linalg.solve_triangular(own, left[:, first:last], upper=True, left=False, unitriangular=True)
        inner = Curvature((own * D[first:last]) @ own.T)
        fit = fit_groups(ordered[:, first:last] + asked, inner, bits, size, symmetric, rounds=rounds, layer=layer)
        error = ordered[:, first:last] - _dense(fit, bits, size)
        left[:, last:].addmm_(error, U[first:last, last:])
        return fit

    fit, Q = _joined(order, blocks, one)
    E = W - Q
    energy = float((W * (W @ curvature.H)).sum(dtype=torch.float64)) or 1.0
    loss = float((E * (E @ curvature.H)).sum(dtype=torch.float64)) / energy
    return GroupFit(fit.codes, fit.scales, fit.zeros, fit.g_idx, [loss], curvature.shrinkage)


@torch.no_grad()
def round_blocks(
    W: Tensor,
    blocks: Blocks,
    symmetric: bool,
    importance: Tensor | None = None,
    where: str = "round_blocks",
    search: str = "mse",
) -> GroupFit:
    """Round a matrix in row blocks to its nearest weights, inputs in order of falling importance.

    Args:
        W: (out, in) weights.
        blocks: as of ``fit_blocks``.
        symmetric: without zeros.
        importance: (in,) of each input, which weighs the errors; None orders inputs by the squares of their weights.
        where, search: as of ``groupwise.quantize_groupwise``.

    Raises:
        ValueError: as ``groupwise.quantize_groupwise``.
    """
    W = W.detach().float()
    order = column_importance(W, importance).argsort(descending=True, stable=True)

    def one(first: int, last: int, bits: int, size: int) -> GroupFit:
        columns = order[first:last]
        own = None if importance is None else importance.to(W.device)[columns]
        return GroupFit(*quantize_groupwise(W[:, columns], bits, size, symmetric, own, where, search))

    return _joined(order, blocks, one)[0]


def column_importance(W: Tensor, importance: Tensor | None) -> Tensor:
    """(in,): what inputs are ordered by, their importance, or the squares of their weights where it is not known."""
    return W.detach().float().square().mean(0) if importance is None else importance.to(W.device).float()


def _joined(order: Tensor, blocks: Blocks, one: Callable[[int, int, int, int], GroupFit]) -> tuple[GroupFit, Tensor]:
    """Blocks, each fitted by ``one(first, last, bits, group size)``, as a fit of all, and what it stands for."""
    parts, dense, groups, first, count = [], [], [], 0, 0
    for bits, rows, size in blocks:
        width = rows if size == -1 else size
        fit = one(first, first + rows, bits, size)
        parts.append(fit)
        dense.append(_dense(fit, bits, size))
        groups.append(torch.arange(rows, device=order.device) // width + count)
        first, count = first + rows, count + len(fit.scales)
    back = order.argsort()
    codes = torch.cat([fit.codes for fit in parts], 1)[:, back]
    scales = torch.cat([fit.scales for fit in parts])
    zeros = [fit.zeros for fit in parts if fit.zeros is not None]
    g_idx = torch.cat(groups)[back].to(torch.int32)
    return GroupFit(codes, scales, torch.cat(zeros) if zeros else None, g_idx), torch.cat(dense, 1)[:, back]


def _dense(fit: GroupFit, bits: int, size: int) -> Tensor:
    n = fit.codes.shape[1]
    group = torch.arange(n, device=fit.codes.device) // (n if size == -1 else size)
    s = fit.scales.float()[group].T
    middle = 0.5 if bits == 1 else float(1 << (bits - 1))
    return fit.codes.float() * s - (s * middle if fit.zeros is None else fit.zeros.float()[group].T)
