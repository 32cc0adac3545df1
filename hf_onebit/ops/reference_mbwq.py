"""The operators whose inputs have an order of their own, on any device; see schema_mbwq.py.

``mbwq_linear`` gathers x and leaves each row block to ``mpq_linear``, so it is as fast as what answers that in
float32. ``mpq_linear_g_idx`` here is plain torch: right, not fast.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hf_onebit.formats import mbwq, mpq, packing
from hf_onebit.ops import cpu
from hf_onebit.ops import schema_mbwq as schema
from hf_onebit.ops.reference import accumulation_dtype, as_rows


def mbwq_linear(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    q_perm: Tensor | None,
    blocks: Sequence[int],
) -> Tensor:
    """Kernel of ``hf_onebit::mbwq_linear``: one ``mpq_linear`` a block, summed in float32 (float64 for float64 x)."""
    triples = schema.check_mbwq_linear(x, weight, scales, zeros, bias, q_perm, blocks)
    rows = as_rows(x)
    if q_perm is not None:
        rows = rows.index_select(1, q_perm)
    if len(triples) > 1:
        rows = rows.to(accumulation_dtype(x))
    total: Tensor | None = None
    for part, words, s, z, (bits, _, size) in row_blocks(rows, weight, scales, zeros, triples):
        y = torch.ops.hf_onebit.mpq_linear.default(part, words, s, z, bias if total is None else None, bits, size)
        total = y if total is None else total + y
    assert total is not None
    return total.to(x.dtype).reshape(*x.shape[:-1], weight.shape[1])


def mbwq_linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    q_perm: Tensor | None,
    blocks: Sequence[int],
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Kernel of ``hf_onebit::mbwq_linear_backward``: gradients of x, scales and zeros, empty where not needed."""
    triples = schema.check_mbwq_linear(x, weight, scales, zeros, None, q_perm, blocks)
    schema.check_grad("mbwq_linear_backward", grad, x, weight, zeros, needs)
    rows, grad_rows = as_rows(x), as_rows(grad)
    if q_perm is not None and any(needs[1:]):
        rows = rows.index_select(1, q_perm)
    found = [
        torch.ops.hf_onebit.mpq_linear_backward.default(grad_rows, part, words, s, z, bits, size, needs)
        for part, words, s, z, (bits, _, size) in row_blocks(rows, weight, scales, zeros, triples)
    ]
    grad_x, grad_scales, grad_zeros = x.new_empty(0), x.new_empty(0), x.new_empty(0)
    if needs[0]:
        packed = torch.cat([parts[0] for parts in found], 1)
        if q_perm is not None:
            packed = torch.empty_like(packed).index_copy_(1, q_perm.long(), packed)
        grad_x = packed.reshape(x.shape)
    if needs[1]:
        grad_scales = torch.cat([parts[1] for parts in found])
    if needs[2]:
        grad_zeros = torch.cat([parts[2] for parts in found])
    return grad_x, grad_scales, grad_zeros


def mpq_linear_g_idx(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    g_idx: Tensor,
    bits: int,
) -> Tensor:
    """Kernel of ``hf_onebit::mpq_linear_g_idx``: y = x Wᵀ + bias, W dequantized in float32 (float64 for float64 x)."""
    schema.check_mpq_linear_g_idx(x, weight, scales, zeros, bias, g_idx, bits)
    if x.is_cpu and x.dtype != torch.float64 and not torch.compiler.is_compiling():
        cpu.warn_if_missing()
    dtype = accumulation_dtype(x)
    y = as_rows(x).to(dtype) @ _by_index(weight, scales, zeros, g_idx, bits, dtype)
    if bias is not None:
        y = y + bias.to(dtype)
    return y.to(x.dtype).reshape(*x.shape[:-1], weight.shape[1])


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
    """Kernel of ``hf_onebit::mpq_linear_g_idx_backward``: gradients of x, scales and zeros, empty where not needed."""
    schema.check_mpq_linear_g_idx(x, weight, scales, zeros, None, g_idx, bits)
    schema.check_grad("mpq_linear_g_idx_backward", grad, x, weight, zeros, needs)
    dtype = accumulation_dtype(x)
    g = as_rows(grad).to(dtype)
    grad_x, grad_scales, grad_zeros = x.new_empty(0), x.new_empty(0), x.new_empty(0)
    if needs[0]:
        grad_x = (g @ _by_index(weight, scales, zeros, g_idx, bits, dtype).T).to(x.dtype).reshape(x.shape)
    if needs[1]:
        D = as_rows(x).to(dtype).T @ g  # (in, out), as the codes lie
        q = packing.unpack_rows(weight, bits, x.shape[-1]).to(dtype)
        if zeros is None:
            q -= mpq.zero_point(bits)
        grad_scales = scales.new_zeros(scales.shape, dtype=dtype).index_add(0, g_idx, D * q).to(scales.dtype)
    if needs[2] and zeros is not None:
        columns = as_rows(x).to(dtype).T
        sums = columns.new_zeros(zeros.shape[0], columns.shape[1]).index_add(0, g_idx, columns)
        grad_zeros = (-(sums @ g)).to(zeros.dtype)
    return grad_x, grad_scales, grad_zeros


def _by_index(
    weight: Tensor, scales: Tensor, zeros: Tensor | None, g_idx: Tensor, bits: int, dtype: torch.dtype
) -> Tensor:
    """W as the codes lie, ``(in, out)``. An index of no group raises, on the CPU as IndexError."""
    q = packing.unpack_rows(weight, bits, g_idx.shape[0]).to(dtype)
    s = scales.to(dtype).index_select(0, g_idx)
    if zeros is None:
        return q.sub_(mpq.zero_point(bits)).mul_(s)
    return q.mul_(s).sub_(zeros.to(dtype).index_select(0, g_idx))


def row_blocks(
    rows: Tensor, weight: Tensor, scales: Tensor, zeros: Tensor | None, triples: list[mbwq.Block]
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None, mbwq.Block]]:
    """(x, words, scales, zeros) of each block, and the block."""
    counts = mbwq.block_group_counts(triples)
    zeros_parts = [None] * len(triples) if zeros is None else zeros.split(counts)
    columns = rows.split([count for _, count, _ in triples], dim=1)
    return zip(
        columns, weight.split(mbwq.block_words(triples)), scales.split(counts), zeros_parts, triples, strict=True
    )


for _kernel in (mbwq_linear, mbwq_linear_backward, mpq_linear_g_idx, mpq_linear_g_idx_backward):
    torch.library.impl(f"hf_onebit::{_kernel.__name__}", "default", _kernel)
