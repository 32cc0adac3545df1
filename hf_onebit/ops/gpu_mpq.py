"""The operators of group-quantized codes on GPUs."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_onebit.formats import mpq
from hf_onebit.ops import gpu, gpu_products, reference, reference_mpq, schema_mpq


def mpq_linear(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
) -> Tensor:
    """Kernel of ``hf_onebit::mpq_linear``."""
    plan = plan_of_codes(x, weight, scales, zeros, bias, bits, group_size)
    if plan is None:
        return reference_mpq.mpq_linear(x, weight, scales, zeros, bias, bits, group_size)
    with gpu.on(x):
        return gpu_products.linear(x, gpu.launch().mpq_operand(weight, scales, zeros, bits, group_size), bias, plan)


def plan_of_codes(
    x: Tensor, weight: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, bits: int, group_size: int
) -> Any:
    """The plan of a product with group-quantized codes; None where the reference shall answer."""

    def usable() -> bool:
        schema_mpq.check_mpq_linear(x, weight, scales, zeros, bias, bits, group_size)
        return gpu.takes(x, weight) and gpu.agrees(x, "mpq", dtype=x.dtype, bits=bits, zeros=zeros is not None)

    def operand() -> Any:
        return gpu.launch().mpq_operand(weight, scales, zeros, bits, group_size)

    signature = gpu_products.signature(bits, group_size, x, weight, scales, zeros, bias)
    return gpu_products.plan(signature, x, usable, operand)


def mpq_linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group_size: int,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Kernel of ``hf_onebit::mpq_linear_backward``: expansion by Triton, products and sums by torch."""
    schema_mpq.check_mpq_linear_backward(grad, x, weight, scales, zeros, bits, group_size, needs)
    if (
        not gpu.takes(grad, weight)
        or not x.shape[-1]
        or not gpu.agrees(x, "mpq", dtype=x.dtype, bits=bits, zeros=zeros is not None)
    ):
        return reference_mpq.mpq_linear_backward(grad, x, weight, scales, zeros, bits, group_size, needs)
    need_x, need_scales, need_zeros = needs
    K = x.shape[-1]
    grad_x, grad_scales, grad_zeros = (x.new_empty(0) for _ in range(3))
    with gpu.on(x):
        g = reference.as_rows(grad)
        if need_x:
            W = gpu.launch().expanded(gpu.launch().mpq_operand(weight, scales, zeros, bits, group_size), K, x.dtype)
            grad_x = (g @ W.T).reshape(x.shape)
        if need_scales or (need_zeros and zeros is not None):
            size = K if group_size == -1 else group_size
            groups = scales.shape[0]
            D = gpu_products.mm(reference.as_rows(x).T, g)  # (in, out), as the codes lie
            D = torch.nn.functional.pad(D, (0, 0, 0, groups * size - K)).view(groups, size, -1)
            if need_zeros and zeros is not None:
                grad_zeros = (-D.sum(1)).to(zeros.dtype)
            if need_scales:
                q = gpu.launch().codes(weight, K, bits)
                q = torch.nn.functional.pad(q, (0, 0, 0, groups * size - K)).view(groups, size, -1)
                middle = mpq.zero_point(bits) if zeros is None else 0.0
                grad_scales = (D * (q.float() - middle)).sum(1).to(scales.dtype)
    return grad_x, grad_scales, grad_zeros


def mpq_embedding(
    ids: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group_size: int,
    embedding_dim: int,
    dtype: torch.dtype,
) -> Tensor:
    """Kernel of ``hf_onebit::mpq_embedding``. As in torch, an id out of range is an assertion on the device."""
    schema_mpq.check_mpq_embedding(ids, weight, scales, zeros, bits, group_size, embedding_dim, dtype)
    usable = ids.numel() and embedding_dim and weight.shape[1] and dtype in gpu.FAST
    if not usable or not gpu.agrees(ids, "embedding", dtype=dtype, bits=bits, zeros=zeros is not None):
        return reference_mpq.mpq_embedding(ids, weight, scales, zeros, bits, group_size, embedding_dim, dtype)
    with gpu.on(ids):
        flat = ids.flatten().contiguous()  # a column of ids is flat already, and not side by side
        schema_mpq.check_ids(flat, weight.shape[1])
        operand = gpu.launch().mpq_operand(weight, scales, zeros, bits, group_size)
        rows: Tensor = gpu.launch().embedding(flat, operand, embedding_dim, dtype)
    return rows.reshape(*ids.shape, embedding_dim)


gpu.register(mpq_linear, mpq_linear_backward, mpq_embedding)
