"""The operators of row blocks of several widths, and of inputs that name their groups, on GPUs."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_onebit.ops import gpu, gpu_products, reference, reference_mbwq, schema_mbwq
from hf_onebit.ops.gpu_mpq import plan_of_codes


def mbwq_linear(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    q_perm: Tensor | None,
    blocks: Sequence[int],
) -> Tensor:
    """Kernel of ``hf_onebit::mbwq_linear``: a product for each row block, of x as it is, added up in float32."""
    triples = schema_mbwq.check_mbwq_linear(x, weight, scales, zeros, bias, q_perm, blocks)
    if not gpu.takes(x, weight):
        return reference_mbwq.mbwq_linear(x, weight, scales, zeros, bias, q_perm, blocks)
    with gpu.on(x):
        rows = reference.as_rows(x)
        if q_perm is not None:
            rows = rows.index_select(1, q_perm)
        parts = list(reference_mbwq.row_blocks(rows, weight, scales, zeros, triples))
        plans = [plan_of_codes(part, w, s, z, None, bits, size) for part, w, s, z, (bits, _, size) in parts]
        if any(plan is None for plan in plans):
            return reference_mbwq.mbwq_linear(x, weight, scales, zeros, bias, q_perm, blocks)
        total = None if bias is None else bias.float()
        for (part, w, s, z, (bits, _, size)), plan in zip(parts, plans, strict=True):
            operand = gpu.launch().mpq_operand(w, s, z, bits, size)
            X = part if part.stride(-1) == 1 else part.contiguous()
            if plan.splits:
                y = gpu.launch().product(X, operand, None, plan, torch.float32)
            else:
                y = gpu_products.mm(X, gpu.launch().expanded(operand, X.shape[1], X.dtype))
            total = y if total is None else total + y
    assert total is not None
    return total.to(x.dtype).reshape(*x.shape[:-1], weight.shape[1])


def mpq_linear_g_idx(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    g_idx: Tensor,
    bits: int,
) -> Tensor:
    """Kernel of ``hf_onebit::mpq_linear_g_idx``: by tensor cores for few rows, else expanded first."""
    schema_mbwq.check_mpq_linear_g_idx(x, weight, scales, zeros, bias, g_idx, bits)
    if not gpu.takes(x, weight) or not gpu.agrees(x, "g_idx", dtype=x.dtype, bits=bits, zeros=zeros is not None):
        return reference_mbwq.mpq_linear_g_idx(x, weight, scales, zeros, bias, g_idx, bits)
    with gpu.on(x):
        operand = gpu.launch().mpq_operand(weight, scales, zeros, bits, -1)
        y: Tensor = gpu.launch().run_by_index(reference.as_rows(x), operand, g_idx, bias)
    return y.reshape(*x.shape[:-1], weight.shape[1])


def mpq_linear_g_idx_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    g_idx: Tensor,
    bits: int,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Kernel of ``hf_onebit::mpq_linear_g_idx_backward``: the gradient of x. The reference has those of the scales."""
    schema_mbwq.check_mpq_linear_g_idx(x, weight, scales, zeros, None, g_idx, bits)
    schema_mbwq.check_grad("mpq_linear_g_idx_backward", grad, x, weight, zeros, needs)
    if (
        any(needs[1:])
        or not gpu.takes(grad, weight)
        or not x.numel()
        or not gpu.agrees(x, "g_idx", dtype=x.dtype, bits=bits, zeros=zeros is not None)
    ):
        return reference_mbwq.mpq_linear_g_idx_backward(grad, x, weight, scales, zeros, g_idx, bits, needs)
    with gpu.on(x):
        operand = gpu.launch().mpq_operand(weight, scales, zeros, bits, -1)
        matrix = gpu.launch().expanded_by_index(operand, g_idx, x.dtype)
        grad_x = (reference.as_rows(grad) @ matrix.T).reshape(x.shape) if needs[0] else x.new_empty(0)
    return grad_x, x.new_empty(0), x.new_empty(0)


gpu.register(mbwq_linear, mpq_linear_g_idx, mpq_linear_g_idx_backward)
