"""Launches the kernels of triton_kernels.py: sizes, workspaces, grids. Imported with the first call on a GPU."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_onebit.formats.mpq import group_count
from hf_onebit.formats.packing import WORD_BITS
from hf_onebit.ops import triton_kernels as kernels
from hf_onebit.ops import triton_pack
from hf_onebit.ops.gpu_plans import (
    ASM,
    TILE,
    Operand,
    Plan,
    ceil,
    count_units,
    major,
    multiplies_packed,
    parts_of,
    power_of_2,
    registers_of_product,
)
from hf_onebit.ops.triton_few_rows_launch import few_rows
from hf_onebit.ops.triton_indexed_launch import MOST_ROWS, product_by_index

_EXPAND_BLOCK = 256
_REDUCE_BLOCK = 128
_PACK_BLOCK = 64


def onebit_operand(
    weight: Tensor, a: Tensor, b: Tensor, weight_1: Tensor | None, a_1: Tensor | None, b_1: Tensor | None
) -> Operand:
    """The operand of signs."""
    if b_1 is not None and b_1.dtype != b.dtype:  # one kernel reads both
        b, b_1 = b.float(), b_1.float()
    if a_1 is not None and a_1.dtype != a.dtype:
        a, a_1 = a.float(), a_1.float()
    if weight_1 is not None and a_1 is not None and b_1 is not None:
        weight_1, a_1, b_1 = weight_1.contiguous(), a_1.contiguous(), b_1.contiguous()
    return Operand(weight.contiguous(), a.contiguous(), None, b.contiguous(), weight_1, a_1, b_1, 1, 0)


def mpq_operand(weight: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int) -> Operand:
    """The operand of group-quantized codes."""
    if zeros is not None:
        zeros = zeros.contiguous()
    return Operand(weight.contiguous(), scales.contiguous(), zeros, None, None, None, None, bits, group_size)


def product(X: Tensor, operand: Operand, bias: Tensor | None, plan: Plan, dtype: torch.dtype | None = None) -> Tensor:
    """y = X Wᵀ + bias by tensor cores, W expanded in registers.

    Args:
        X: ``(rows, in)``, rows > 0, neighbours in the last dimension.
        operand: the layer.
        bias: ``(out,)`` or None.
        plan: with splits.
        dtype: of the result; None for X's.

    Returns:
        ``(rows, out)``.
    """
    rows, K = X.shape
    N, planes = operand.weight.shape[1], operand.planes
    KU = count_units(K)
    KUP = ceil(KU, TILE) * TILE
    parts = parts_of(operand, rows, X.dtype)
    C = parts * rows
    u = torch.empty((planes * C, WORD_BITS, KUP), dtype=torch.float16, device=X.device)
    norm = torch.empty((planes * rows,), dtype=torch.float32, device=X.device)
    y = torch.empty((rows, N), dtype=dtype or X.dtype, device=X.device)
    b = X if operand.b is None else operand.b
    b_1 = b if operand.b_1 is None else operand.b_1
    weight_1 = operand.weight if operand.weight_1 is None else operand.weight_1
    zeros = operand.scales if operand.zeros is None else operand.zeros
    a_1 = operand.scales if operand.a_1 is None else operand.a_1
    kernels.prepare[(rows, planes)](
        X, b, b_1, u, norm, K, KUP, X.stride(0), rows, operand.b is not None, parts,
        UNITS=min(128, power_of_2(KUP)), num_warps=8 if KUP >= 64 else 4,
    )  # fmt: skip
    units_a_split = ceil(KUP // TILE, plan.splits) * TILE
    splits = ceil(KU, units_a_split)
    partial = torch.empty((planes * splits, C, N), dtype=torch.float32, device=X.device)
    grid = (ceil(N, plan.block_n), ceil(C, plan.block_c), planes * splits)
    registers = registers_of_product(plan, operand.bits, operand.is_mpq, operand.zeros is not None, major(X.device))
    kernels.multiply[grid](
        u, operand.weight, weight_1, operand.scales, zeros, partial, C, N, KU, KUP, splits, units_a_split,
        _group_units(operand, K), BITS=operand.bits, MPQ=operand.is_mpq, ZEROS=operand.zeros is not None,
        BLOCK_N=plan.block_n, BLOCK_C=plan.block_c, ASM=ASM,
        num_warps=plan.warps, num_stages=plan.stages, **registers,
    )  # fmt: skip
    terms = splits * parts
    kernels.reduce[(rows, ceil(N, _REDUCE_BLOCK))](
        partial, norm, operand.scales, a_1, norm if bias is None else bias, y, rows, N, y.stride(0), terms,
        PLANES=planes, ROOM=power_of_2(terms), MPQ=operand.is_mpq, BIAS=bias is not None,
        BLOCK=_REDUCE_BLOCK, num_warps=4,
    )  # fmt: skip
    return y


def expanded(operand: Operand, K: int, dtype: torch.dtype, outer: bool = True, inner: bool = True) -> Tensor:
    """Wᵀ ``(in, out)`` in ``dtype``, computed in float32 and rounded once; without a or b where told so."""
    return _expand(operand, K, dtype, outer, inner)


def expanded_by_index(operand: Operand, g_idx: Tensor, dtype: torch.dtype) -> Tensor:
    """Wᵀ ``(in, out)`` of codes whose inputs name their groups, in ``dtype``; NaN for a group that there is not."""
    return _expand(operand, g_idx.shape[0], dtype, True, True, index=g_idx.contiguous())


def packed(codes: Tensor, bits: int) -> Tensor:
    """Words of codes ``(out, in)`` that lie within ``bits`` bits."""
    N, K = codes.shape
    codes = codes.to(torch.uint8).contiguous()
    words = torch.empty((count_units(K) * bits, N), dtype=torch.int32, device=codes.device)
    triton_pack.pack_units[(ceil(N, _PACK_BLOCK), count_units(K))](
        codes, words, N, K, BITS=bits, BLOCK=_PACK_BLOCK, num_warps=2
    )
    return words


def codes(weight: Tensor, K: int, bits: int) -> Tensor:
    """The codes themselves, uint8 ``(in, out)``."""
    return _expand(mpq_operand(weight, weight, None, bits, -1), K, torch.uint8, False, False, codes=True)


def embedding(ids: Tensor, operand: Operand, K: int, dtype: torch.dtype) -> Tensor:
    """Rows ``ids`` (one dimension, not empty) of the matrix, ``(ids, K)`` in ``dtype``; NaN for ids out of range."""
    N = operand.weight.shape[1]
    out = torch.empty((ids.shape[0], K), dtype=dtype, device=ids.device)
    units = min(16, power_of_2(count_units(K)))
    kernels.look_up[(ids.shape[0], ceil(count_units(K), units))](
        ids, operand.weight, operand.scales, operand.scales if operand.zeros is None else operand.zeros, out, N, K,
        _group_units(operand, K), BITS=operand.bits, ZEROS=operand.zeros is not None, UNITS=units,
    )  # fmt: skip
    return out


def _expand(
    operand: Operand,
    K: int,
    dtype: torch.dtype,
    outer: bool,
    inner: bool,
    codes: bool = False,
    index: Tensor | None = None,
) -> Tensor:
    N = operand.weight.shape[1]
    out = torch.empty((K, N), dtype=dtype, device=operand.weight.device)
    pairs: Sequence[tuple[Tensor | None, Tensor]] = (
        (operand.weight_1, operand.weight),
        (operand.zeros if operand.is_mpq else operand.a_1, operand.scales),
        (operand.b, operand.scales),
        (operand.b_1, operand.scales if operand.b is None else operand.b),
    )
    weight_1, second, b, b_1 = (other if t is None else t for t, other in pairs)
    kernels.expand[(ceil(N, _EXPAND_BLOCK), count_units(K))](
        operand.weight, weight_1, operand.scales, second, b, b_1,
        operand.weight if index is None else index, out, N, K,
        _group_units(operand, K) if index is None else operand.scales.shape[0],
        BITS=operand.bits, MPQ=operand.is_mpq and not codes, ZEROS=operand.zeros is not None, PLANES=operand.planes,
        OUTER=outer, INNER=inner, CODES=codes, INDEXED=index is not None, BLOCK=_EXPAND_BLOCK, num_warps=2,
    )  # fmt: skip
    return out


def _group_units(operand: Operand, K: int) -> int:
    """Units that share a scale."""
    if operand.group_size <= 0 or group_count(K, operand.group_size) == 1:
        return max(count_units(K), 1)
    return operand.group_size // WORD_BITS


def run(X: Tensor, operand: Operand, bias: Tensor | None, plan: Plan) -> Tensor:
    """y = X Wᵀ + bias, ``(rows, out)`` in X's dtype, by the plan; of any strides."""
    X, bias = _side_by_side(X, bias)
    if plan.splits:
        return product(X, operand, bias, plan)
    if plan.block_n:
        return few_rows(X, operand, bias, plan)
    return times(X, expanded(operand, X.shape[1], X.dtype), bias)


def run_by_index(X: Tensor, operand: Operand, g_idx: Tensor, bias: Tensor | None) -> Tensor:
    """y = X Wᵀ + bias of codes whose inputs name their groups, ``(rows, out)`` in X's dtype; of any strides."""
    X, bias = _side_by_side(X, bias)
    if X.shape[0] <= MOST_ROWS and multiplies_packed(operand, X.dtype, X.device):
        return product_by_index(X, operand, g_idx.contiguous(), bias)
    return times(X, expanded_by_index(operand, g_idx, X.dtype), bias)


def _side_by_side(X: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Rows, and a bias, whose entries are neighbours, as the kernels read them."""
    return X if X.stride(-1) == 1 else X.contiguous(), None if bias is None else bias.contiguous()


def times(X: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """X matrix + bias, in X's dtype."""
    if bias is None:
        return X @ matrix
    if bias.dtype == X.dtype:
        return torch.addmm(bias, X, matrix)
    return ((X @ matrix).float() + bias.float()).to(X.dtype)
