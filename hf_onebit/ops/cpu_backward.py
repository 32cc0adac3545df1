"""The gradient of mpq_linear's input on the CPU: the matrix by the compiled kernels, the product by torch.

Forward many rows meet each weight, and backward as many: there a product of float matrices is what processors do best,
and the words are read once. The compiled ``mpq_embedding`` gives the rows of the matrix, in the dtype of the product,
for one layer at a time; in bfloat16 that is the one rounding that a bfloat16 layer's own weight has. Gradients of
scales and zeros are those of the reference.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_onebit.ops import cpu, reference_mpq, schema_mpq
from hf_onebit.ops.reference import as_rows


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
    dtype = product_dtype(grad.dtype)
    rows = torch.arange(weight.shape[1], device=weight.device)
    W = torch.ops.hf_onebit.mpq_embedding.default(
        rows, weight, scales, zeros, bits, group_size, x.shape[-1], dtype
    )  # (out, in)
    grad_x = (as_rows(grad).to(dtype) @ W).to(x.dtype).reshape(x.shape)
    others = [False, *needs[1:]]
    if not any(others):
        return grad_x, x.new_empty(0), x.new_empty(0)
    rest = reference_mpq.mpq_linear_backward(grad, x, weight, scales, zeros, bits, group_size, others)
    return grad_x, *rest[1:]


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """bfloat16 where torch multiplies it as it is; else float32."""
    fast = (cpu.isa() or "").startswith(("avx512", "amx"))
    return torch.bfloat16 if dtype == torch.bfloat16 and fast else torch.float32


if cpu.library() is not None:
    torch.library.impl("hf_onebit::mpq_linear_backward", "CPU", mpq_linear_backward)
