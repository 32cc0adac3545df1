"""Launches the kernels of triton_kernels.py: sizes, workspaces, grids. Imported with the first call on a GPU."""

import functools
import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hf_onebit.formats.mpq import group_count
from hf_onebit.formats.packing import WORD_BITS
from hf_onebit.ops import triton_kernels as kernels

# Two codes at a time by inline PTX; other compilers and the interpreter get the same in plain Triton.
_ASM = torch.version.hip is None and os.environ.get("TRITON_INTERPRET", "0") != "1"
_TILE = 16  # units that multiply takes at once
_EXPAND_BLOCK = 256
_REDUCE_BLOCK = 128


class Plan(NamedTuple):
    """How a product is launched.

    ``splits`` 0: the kernel ``vector``, for at most ``block_c`` columns (parts · rows). ``block_n`` 0: expand to a
    float matrix and leave the product to torch.
    """

    block_n: int
    block_c: int
    splits: int
    warps: int
    stages: int


EXPAND = Plan(0, 0, 0, 0, 0)


class Operand(NamedTuple):
    """The tensors of one layer, of either kind; ``bits`` 1 and ``group_size`` 0 for signs."""

    weight: Tensor
    scales: Tensor  # a, or the scales of the groups
    zeros: Tensor | None
    b: Tensor | None
    weight_1: Tensor | None
    a_1: Tensor | None
    b_1: Tensor | None
    bits: int
    group_size: int

    @property
    def planes(self) -> int:
        """1 or 2."""
        return 1 if self.weight_1 is None else 2

    @property
    def is_mpq(self) -> bool:
        """Whether the words are codes in groups, not signs."""
        return self.group_size != 0


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


def parts_of(operand: Operand, rows: int, dtype: torch.dtype) -> int:
    """float16 numbers that stand for one input: two where that costs nothing or x has more digits than one keeps."""
    if dtype == torch.float32:
        return 2
    # b x has up to 22 significant bits; x alone is a float16 number, up to the common factor of its row.
    return 1 if operand.is_mpq else 2 if rows <= 16 else 1


def product(X: Tensor, operand: Operand, bias: Tensor | None, plan: Plan) -> Tensor:
    """y = X Wᵀ + bias by tensor cores, W expanded in registers.

    Args:
        X: ``(rows, in)``, rows > 0, neighbours in the last dimension.
        operand: the layer.
        bias: ``(out,)`` or None.
        plan: not EXPAND.

    Returns:
        ``(rows, out)`` in X's dtype.

    Raises:
        ValueError: the plan has fewer columns than that many rows take.
    """
    rows, K = X.shape
    N, planes = operand.weight.shape[1], operand.planes
    KU = _units(K)
    KUP = _ceil(KU, _TILE) * _TILE
    parts = parts_of(operand, rows, X.dtype)
    C = parts * rows
    if plan.splits == 0 and plan.block_c < C:
        raise ValueError(f"{plan} has room for {plan.block_c} columns, got {rows} rows of {parts} parts")
    u = torch.empty((planes * C, WORD_BITS, KUP), dtype=torch.float16, device=X.device)
    norm = torch.empty((planes * rows,), dtype=torch.float32, device=X.device)
    y = torch.empty((rows, N), dtype=X.dtype, device=X.device)
    b = X if operand.b is None else operand.b
    b_1 = b if operand.b_1 is None else operand.b_1
    weight_1 = operand.weight if operand.weight_1 is None else operand.weight_1
    zeros = operand.scales if operand.zeros is None else operand.zeros
    a_1 = operand.scales if operand.a_1 is None else operand.a_1
    kernels.prepare[(rows, planes)](
        X, b, b_1, u, norm, K, KUP, X.stride(0), rows, operand.b is not None, parts,
        UNITS=min(128, _power_of_2(KUP)), num_warps=8 if KUP >= 64 else 4,
    )  # fmt: skip
    if plan.splits == 0:
        programs = min(_ceil(N, plan.block_n), _multiprocessors(X.device) * max(16 // plan.warps, 1))
        kernels.vector[(programs,)](
            u, norm, operand.weight, weight_1, operand.scales, zeros, a_1, norm if bias is None else bias, y, rows, N,
            KU, KUP, _group_units(operand, K), BITS=operand.bits, MPQ=operand.is_mpq, ZEROS=operand.zeros is not None,
            PLANES=planes, PARTS=parts, BIAS=bias is not None, ROWS=plan.block_c // parts, BLOCK_N=plan.block_n,
            WARPS=plan.warps, ASM=_ASM, num_warps=plan.warps, num_stages=plan.stages,
        )  # fmt: skip
        return y
    units_a_split = _ceil(KUP // _TILE, plan.splits) * _TILE
    splits = _ceil(KU, units_a_split)
    partial = torch.empty((planes * splits, C, N), dtype=torch.float32, device=X.device)
    grid = (_ceil(N, plan.block_n), _ceil(C, plan.block_c), planes * splits)
    kernels.multiply[grid](
        u, operand.weight, weight_1, operand.scales, zeros, partial, C, N, KU, KUP, splits, units_a_split,
        _group_units(operand, K), BITS=operand.bits, MPQ=operand.is_mpq, ZEROS=operand.zeros is not None,
        BLOCK_N=plan.block_n, BLOCK_C=plan.block_c, ASM=_ASM,
        num_warps=plan.warps, num_stages=plan.stages,
    )  # fmt: skip
    terms = splits * parts
    kernels.reduce[(rows, _ceil(N, _REDUCE_BLOCK))](
        partial, norm, operand.scales, a_1, norm if bias is None else bias, y, rows, N, y.stride(0), terms,
        PLANES=planes, ROOM=_power_of_2(terms), MPQ=operand.is_mpq, BIAS=bias is not None,
        BLOCK=_REDUCE_BLOCK, num_warps=4,
    )  # fmt: skip
    return y


def expanded(operand: Operand, K: int, dtype: torch.dtype, outer: bool = True, inner: bool = True) -> Tensor:
    """Wᵀ ``(in, out)`` in ``dtype``, computed in float32 and rounded once; without a or b where told so."""
    return _expand(operand, K, dtype, outer, inner, codes=False)


def codes(weight: Tensor, K: int, bits: int) -> Tensor:
    """The codes themselves, uint8 ``(in, out)``."""
    return _expand(mpq_operand(weight, weight, None, bits, -1), K, torch.uint8, False, False, codes=True)


def embedding(ids: Tensor, operand: Operand, K: int, dtype: torch.dtype) -> Tensor:
    """Rows ``ids`` (one dimension, not empty) of the matrix, ``(ids, K)`` in ``dtype``; NaN for ids out of range."""
    N = operand.weight.shape[1]
    out = torch.empty((ids.shape[0], K), dtype=dtype, device=ids.device)
    units = min(16, _power_of_2(_units(K)))
    kernels.look_up[(ids.shape[0], _ceil(_units(K), units))](
        ids, operand.weight, operand.scales, operand.scales if operand.zeros is None else operand.zeros, out, N, K,
        _group_units(operand, K), BITS=operand.bits, ZEROS=operand.zeros is not None, UNITS=units,
    )  # fmt: skip
    return out


def _expand(operand: Operand, K: int, dtype: torch.dtype, outer: bool, inner: bool, codes: bool) -> Tensor:
    N = operand.weight.shape[1]
    out = torch.empty((K, N), dtype=dtype, device=operand.weight.device)
    pairs: Sequence[tuple[Tensor | None, Tensor]] = (
        (operand.weight_1, operand.weight),
        (operand.zeros if operand.is_mpq else operand.a_1, operand.scales),
        (operand.b, operand.scales),
        (operand.b_1, operand.scales if operand.b is None else operand.b),
    )
    weight_1, second, b, b_1 = (other if t is None else t for t, other in pairs)
    kernels.expand[(_ceil(N, _EXPAND_BLOCK), _units(K))](
        operand.weight, weight_1, operand.scales, second, b, b_1, out, N, K, _group_units(operand, K),
        BITS=operand.bits, MPQ=operand.is_mpq and not codes, ZEROS=operand.zeros is not None, PLANES=operand.planes,
        OUTER=outer, INNER=inner, CODES=codes, BLOCK=_EXPAND_BLOCK, num_warps=2,
    )  # fmt: skip
    return out


def _units(K: int) -> int:
    return (K + WORD_BITS - 1) // WORD_BITS


# Triton's own functions of these names are made for kernels and slow elsewhere.
def _ceil(n: int, divisor: int) -> int:
    return (n + divisor - 1) // divisor


def _power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _group_units(operand: Operand, K: int) -> int:
    """Units that share a scale."""
    if operand.group_size <= 0 or group_count(K, operand.group_size) == 1:
        return max(_units(K), 1)
    return operand.group_size // WORD_BITS


# --- which way ----------------------------------------------------------------------------------------------

# From so many rows on, a float matrix and torch's product. Overridden by HF_ONEBIT_EXPAND_ROWS.
_EXPAND_ROWS = {"onebit": 96, "mpq": 64}
_WARPS_PER_SM = 8
_VECTOR_COLUMNS = 8


def expand_rows(kind: str) -> int:
    """Rows of x from which a layer is expanded and multiplied by torch; ``HF_ONEBIT_EXPAND_ROWS`` overrides it.

    Raises:
        ValueError: the variable is no whole number.
    """
    forced = os.environ.get("HF_ONEBIT_EXPAND_ROWS", "")
    if not forced:
        return _EXPAND_ROWS[kind]
    if not forced.isdigit():
        raise ValueError(f"HF_ONEBIT_EXPAND_ROWS={forced}, expected a whole number of rows; unset it, or set one")
    return int(forced)


def fits(operand: Operand, dtype: torch.dtype) -> bool:
    """Whether ``product`` keeps the digits of this layer: it multiplies codes in groups as float16 numbers."""
    return not operand.is_mpq or (dtype != torch.float32 and operand.scales.dtype == torch.float16)


def plan_for(rows: int, K: int, operand: Operand, dtype: torch.dtype, device: torch.device) -> Plan:
    """How to compute ``rows`` rows; depends on sizes and dtypes alone."""
    kind = "mpq" if operand.is_mpq else "onebit"
    if rows >= expand_rows(kind) or not fits(operand, dtype):
        return EXPAND
    columns = rows * parts_of(operand, rows, dtype)
    # Loading ahead takes up to 140 KiB of shared memory, which only some devices have.
    stages = 2 if _shared_memory(device) >= 160 << 10 else 1
    if columns <= _VECTOR_COLUMNS and not operand.is_mpq:
        return Plan(32, _VECTOR_COLUMNS, 0, 8, stages)
    block_c = min(max(_power_of_2(columns), 8), 64)
    block_n, warps = {8: (64, 1), 16: (64, 2), 32: (64, 2), 64: (128, 4)}[block_c]
    if operand.bits > 4 and block_c == 32:  # eight words of each code's unit leave fewer registers
        block_n = 32
    if block_c == 64 and _major(device) >= 10:
        # With four warps Triton 3.6 takes Blackwell's own tensor instructions, and compiles this kernel to a trap.
        block_n, warps = 32 if operand.is_mpq else 64, 2
    return Plan(block_n, block_c, splits_for(operand, columns, K, block_n, block_c, warps, device), warps, stages)


def splits_for(
    operand: Operand, columns: int, K: int, block_n: int, block_c: int, warps: int, device: torch.device
) -> int:
    """Slices of the inputs that keep every multiprocessor busy: a power of two."""
    blocks = _ceil(operand.weight.shape[1], block_n) * _ceil(columns, block_c) * operand.planes
    wanted = max(_multiprocessors(device) * _WARPS_PER_SM // (blocks * warps), 1)
    most = _ceil(_units(K), _TILE)
    return min(_power_of_2(wanted), _power_of_2(most), 64)


def run(X: Tensor, operand: Operand, bias: Tensor | None, plan: Plan) -> Tensor:
    """y = X Wᵀ + bias, ``(rows, out)`` in X's dtype, by the plan."""
    if plan != EXPAND:
        return product(X, operand, bias, plan)
    matrix = expanded(operand, X.shape[1], X.dtype)
    if bias is None:
        return X @ matrix
    if bias.dtype == X.dtype:
        return torch.addmm(bias, X, matrix)
    return ((X @ matrix).float() + bias.float()).to(X.dtype)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@functools.cache
def _shared_memory(device: torch.device) -> int:
    """Bytes that a block may have."""
    if device.type != "cuda":
        return 0
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block))


@functools.cache
def _major(device: torch.device) -> int:
    """The first number of the compute capability; 0 for what has none."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" and _ASM else 0
