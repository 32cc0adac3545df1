"""The gradient of mpq_linear's input on the CPU: the matrix by the compiled kernels, the product by torch.

Forward many rows meet each weight, and backward as many: there a product of float matrices is what processors do best,
and the words are read once. The compiled ``mpq_embedding`` gives columns of the matrix, in the dtype of the product,
some MiB of them at a time; in bfloat16 that is the one rounding that a bfloat16 layer's own weight has. Gradients of
scales and zeros are those of the reference.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hf_onebit.arithmetic import product_dtype
from hf_onebit.formats.packing import WORD_BITS
from hf_onebit.ops import cpu, reference_mpq, schema_mpq
from hf_onebit.ops.reference import as_rows

BLOCK_BYTES = 2 << 20  # of the expanded matrix that there are at once


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
    """Kernel of ``hf_onebit::mpq_linear_backward``; results as of the reference."""
    if not needs[0] or grad.dtype == torch.float64 or grad.numel() == 0:
        return reference_mpq.mpq_linear_backward(grad, x, weight, scales, zeros, bits, group_size, needs)
    schema_mpq.check_mpq_linear_backward(grad, x, weight, scales, zeros, bits, group_size, needs)
    dtype = product_dtype(grad.device) if grad.dtype == torch.bfloat16 else torch.float32
    rows = as_rows(grad).to(dtype)
    grad_x = rows.new_empty(rows.shape[0], x.shape[-1])
    outputs = torch.arange(weight.shape[1], device=weight.device)
    for begin, end in _blocks(x.shape[-1], weight.shape[1] * dtype.itemsize, group_size):
        words = weight[begin // WORD_BITS * bits : -(-end // WORD_BITS) * bits]
        s, z = (_of_groups(t, begin, end, group_size) for t in (scales, zeros))
        assert s is not None
        W = torch.ops.hf_onebit.mpq_embedding.default(
            outputs, words, s, z, bits, group_size, end - begin, dtype
        )  # (out, end - begin)
        torch.mm(rows, W, out=grad_x[:, begin:end])
    grad_x = grad_x.to(x.dtype).reshape(x.shape)
    others = [False, *needs[1:]]
    if not any(others):
        return grad_x, x.new_empty(0), x.new_empty(0)
    rest = reference_mpq.mpq_linear_backward(grad, x, weight, scales, zeros, bits, group_size, others)
    return grad_x, *rest[1:]


def _blocks(in_features: int, column_bytes: int, group_size: int) -> Iterator[tuple[int, int]]:
    """Ranges of inputs that end where groups do, and whose part of the matrix is about ``BLOCK_BYTES``."""
    unit = WORD_BITS if group_size == -1 else group_size
    size = max(BLOCK_BYTES // max(column_bytes * unit, 1), 1) * unit
    for begin in range(0, in_features, size):
        yield begin, min(begin + size, in_features)


def _of_groups(statistics: Tensor | None, begin: int, end: int, group_size: int) -> Tensor | None:
    """Scales or zeros of the inputs ``begin`` to ``end``, which are whole groups or parts of the only one."""
    if statistics is None or group_size == -1:
        return statistics
    return statistics[begin // group_size : -(-end // group_size)]


if cpu.library() is not None:
    torch.library.impl("hf_onebit::mpq_linear_backward", "CPU", mpq_linear_backward)
