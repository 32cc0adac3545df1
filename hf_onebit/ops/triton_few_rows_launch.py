"""Launches the kernel of triton_few_rows.py."""

import torch
from torch import Tensor

from hf_onebit.ops import triton_few_rows
from hf_onebit.ops.gpu_plans import ASM, Operand, Plan, ceil, count_units


def few_rows(X: Tensor, operand: Operand, bias: Tensor | None, plan: Plan) -> Tensor:
    """y = X Wᵀ + bias of signs, in one launch and without a workspace.

    Args:
        X: ``(rows, in)``, rows > 0, neighbours in the last dimension.
        operand: the layer, of signs.
        bias: ``(out,)`` or None.
        plan: ``splits`` 0; ``block_c`` rows share the words that a program reads. With 1 or 2 of them x has 21 bits
            and a sign, relative to the largest of 512 inputs, with 4 it has 14.

    Returns:
        ``(rows, out)`` in X's dtype.
    """
    rows, K = X.shape
    weight, a, b = operand.weight, operand.scales, operand.b
    two = operand.weight_1 is not None
    N = weight.shape[1]
    y = torch.empty((rows, N), dtype=X.dtype, device=X.device)
    triton_few_rows.few_rows[(ceil(N, plan.block_n), ceil(rows, plan.block_c))](
        X, b, operand.b_1 if two else b, weight, operand.weight_1 if two else weight, a, operand.a_1 if two else a,
        y if bias is None else bias, y, K, N, count_units(K), X.stride(0), rows, PLANES=2 if two else 1,
        BIAS=bias is not None, ROWS=plan.block_c, DIGITS=digits_of(plan), WARPS=plan.warps, ASM=ASM,
        num_warps=plan.warps,
    )  # fmt: skip
    return y


def digits_of(plan: Plan) -> int:
    """Signed digits of eight bits that stand for an input."""
    return 3 if plan.block_c <= 2 else 2
