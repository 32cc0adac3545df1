"""Launches the kernel of triton_indexed.py."""

import torch
from torch import Tensor

from hf_onebit.formats.packing import WORD_BITS
from hf_onebit.ops import gpu_plans, triton_indexed, triton_kernels
from hf_onebit.ops.gpu_plans import ASM, TILE, Operand, ceil, count_units, power_of_2

# With more rows the matrix is expanded.
MOST_ROWS = 16
# Outputs and warps of a tile. With 32 outputs a warp some widths spill, and with four warps Triton 3.6 takes
# Blackwell's own tensor instructions, and compiles this kernel to a trap.
BLOCK_N, WARPS = 32, 2
_REDUCE_BLOCK = 128


def product_by_index(X: Tensor, operand: Operand, g_idx: Tensor, bias: Tensor | None) -> Tensor:
    """y = X Wᵀ + bias by tensor cores, of codes whose inputs name their groups.

    Args:
        X: ``(rows, in)``, float16 or bfloat16, 1 to ``MOST_ROWS`` rows, neighbours in the last dimension.
        operand: the layer; its scales are float16.
        g_idx: ``(in,)`` int32 or int64, contiguous.
        bias: ``(out,)``, contiguous, or None.

    Returns:
        ``(rows, out)`` in X's dtype; NaN where an input names no group.
    """
    rows, K = X.shape
    N = operand.weight.shape[1]
    KU = count_units(K)
    KUP = ceil(KU, TILE) * TILE
    block_c = gpu_plans.columns_of_tile(rows, MOST_ROWS)
    u = torch.empty((rows, WORD_BITS, KUP), dtype=torch.float16, device=X.device)
    norm = torch.empty((rows,), dtype=torch.float32, device=X.device)
    y = torch.empty((rows, N), dtype=X.dtype, device=X.device)
    triton_kernels.prepare[(rows, 1)](
        X, X, X, u, norm, K, KUP, X.stride(0), rows, False, 1,
        UNITS=min(128, power_of_2(KUP)), num_warps=8 if KUP >= 64 else 4,
    )  # fmt: skip
    splits = gpu_plans.splits_for(operand, rows, K, BLOCK_N, block_c, WARPS, X.device)
    units_a_split = ceil(KUP // TILE, splits) * TILE
    splits = ceil(KU, units_a_split)
    partial = torch.empty((splits, rows, N), dtype=torch.float32, device=X.device)
    zeros = operand.scales if operand.zeros is None else operand.zeros
    triton_indexed.multiply_indexed[(ceil(N, BLOCK_N), ceil(rows, block_c), splits)](
        u, operand.weight, operand.scales, zeros, g_idx, partial, rows, N, K, KU, KUP, operand.scales.shape[0], splits,
        units_a_split, BITS=operand.bits, ZEROS=operand.zeros is not None, BLOCK_N=BLOCK_N, BLOCK_C=block_c, ASM=ASM,
        num_warps=WARPS, num_stages=1, **gpu_plans.registers_of(WARPS, gpu_plans.major(X.device)),
    )  # fmt: skip
    triton_kernels.reduce[(rows, ceil(N, _REDUCE_BLOCK))](
        partial, norm, operand.scales, operand.scales, norm if bias is None else bias, y, rows, N, y.stride(0), splits,
        PLANES=1, ROOM=power_of_2(splits), MPQ=True, BIAS=bias is not None, BLOCK=_REDUCE_BLOCK, num_warps=4,
    )  # fmt: skip
    return y
