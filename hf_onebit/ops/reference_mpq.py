"""The operators on group-quantized weights in plain torch, on any device: right, not fast. See reference.py."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_onebit.formats import mpq, packing
from hf_onebit.ops import cpu
from hf_onebit.ops import schema_mpq as schema
from hf_onebit.ops.reference import accumulation_dtype, as_rows


def mpq_linear(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
) -> Tensor:
    """Kernel of ``hf_onebit::mpq_linear``: y = x Wᵀ + bias, W dequantized in float32 (float64 for float64 x)."""
    schema.check_mpq_linear(x, weight, scales, zeros, bias, bits, group_size)
    if x.is_cpu and x.dtype != torch.float64 and not torch.compiler.is_compiling():
        cpu.warn_if_missing()
    dtype = accumulation_dtype(x)
    W = mpq.dequantize(weight, scales, zeros, x.shape[-1], bits, group_size, dtype)
    y = as_rows(x).to(dtype) @ W.T
    if bias is not None:
        y = y + bias.to(dtype)
    return y.to(x.dtype).reshape(*x.shape[:-1], weight.shape[1])


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
    """Kernel of ``hf_onebit::mpq_linear_backward``.

    With D = gradᵀ x, the gradient of W: that of a scale is Σ D (q - z₀) over its group (q alone where there are
    zeros), that of a zero is -Σ D.

    Returns:
        Gradients of x, scales and zeros, each in its input's dtype; an empty one where ``needs`` is False.
        ``x`` gives only its shape and dtype when no gradient of scales or zeros is needed.
    """
    schema.check_mpq_linear_backward(grad, x, weight, scales, zeros, bits, group_size, needs)
    need_x, need_scales, need_zeros = needs
    dtype = accumulation_dtype(x)
    g = as_rows(grad).to(dtype)
    in_features = x.shape[-1]
    grad_x, grad_scales, grad_zeros = x.new_empty(0), x.new_empty(0), x.new_empty(0)
    if need_x:
        W = mpq.dequantize(weight, scales, zeros, in_features, bits, group_size, dtype)
        grad_x = (g @ W).to(x.dtype).reshape(x.shape)
    if need_scales:
        D = as_rows(x).to(dtype).T @ g  # (in, out), as the codes lie
        q = packing.unpack_rows(weight, bits, in_features).to(dtype)
        if zeros is None:
            q -= mpq.zero_point(bits)
        grad_scales = _group_sums(D * q, group_size).to(scales.dtype)
    if need_zeros and zeros is not None:
        sums = _group_sums(as_rows(x).to(dtype).T, group_size)
        grad_zeros = (-(sums @ g)).to(zeros.dtype)
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
    """Kernel of ``hf_onebit::mpq_embedding``: rows of the dequantized matrix, only those asked for unpacked.

    Raises:
        IndexError: an id is no row of the matrix.
    """
    schema.check_mpq_embedding(ids, weight, scales, zeros, bits, group_size, embedding_dim, dtype)
    schema.check_ids(ids, weight.shape[1])
    columns = ids.flatten()
    picked = [None if t is None else t.index_select(1, columns) for t in (weight, scales, zeros)]
    assert picked[0] is not None
    assert picked[1] is not None
    rows = mpq.dequantize(picked[0], picked[1], picked[2], embedding_dim, bits, group_size, dtype)
    return rows.reshape(*ids.shape, embedding_dim)


def mpq_embedding_backward(
    grad: Tensor,
    ids: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group_size: int,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Kernel of ``hf_onebit::mpq_embedding_backward``: gradients of scales and zeros, empty where not needed."""
    schema.check_mpq_embedding_backward(grad, ids, weight, scales, zeros, bits, group_size, needs)
    schema.check_ids(ids, weight.shape[1])
    dtype = accumulation_dtype(grad)
    columns = ids.flatten()
    D = grad.reshape(columns.shape[0], grad.shape[-1]).to(dtype).T  # (embedding_dim, ids)
    grad_scales, grad_zeros = grad.new_empty(0), grad.new_empty(0)
    if needs[0]:
        q = packing.unpack_rows(weight.index_select(1, columns), bits, grad.shape[-1]).to(dtype)
        if zeros is None:
            q -= mpq.zero_point(bits)
        sums = scales.new_zeros(scales.shape, dtype=dtype).index_add(1, columns, _group_sums(D * q, group_size))
        grad_scales = sums.to(scales.dtype)
    if needs[1] and zeros is not None:
        sums = zeros.new_zeros(zeros.shape, dtype=dtype).index_add(1, columns, _group_sums(D, group_size))
        grad_zeros = (-sums).to(zeros.dtype)
    return grad_scales, grad_zeros


def _group_sums(values: Tensor, group_size: int) -> Tensor:
    """``(in, n)`` to ``(groups, n)``."""
    if group_size == -1:
        return values.sum(0, keepdim=True)[: min(values.shape[0], 1)]
    groups = mpq.group_count(values.shape[0], group_size)
    group = torch.arange(values.shape[0], device=values.device) // group_size
    return values.new_zeros(groups, values.shape[1]).index_add(0, group, values)


for _kernel in (mpq_linear, mpq_linear_backward, mpq_embedding, mpq_embedding_backward):
    torch.library.impl(f"hf_onebit::{_kernel.__name__}", "default", _kernel)
