"""Every operator in obvious plain torch: the truth that other kernels are tested against, on any device.

Registered as the default kernel of every dispatch key, so a kernel compiled for one device takes over there
and only there. It expands the signs to a float matrix on every call: right, not fast.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_onebit.formats import packing
from hf_onebit.formats.onebit import unpack_signs
from hf_onebit.ops import cpu, schema, schema_group


def status() -> str:
    """Where this implementation answers, in words."""
    return "in use on every device, where no other implementation is"


def pack(codes: Tensor, bits: int) -> Tensor:
    """Kernel of ``hf_onebit::pack``: :func:`hf_onebit.formats.packing.pack`, values checked (ValueError)."""
    schema.check_pack(codes, bits)
    return packing.pack(codes, bits)


def unpack(words: Tensor, bits: int, in_features: int) -> Tensor:
    """Kernel of ``hf_onebit::unpack``: :func:`hf_onebit.formats.packing.unpack`."""
    schema.check_unpack(words, bits, in_features)
    return packing.unpack(words, bits, in_features)


def onebit_linear(
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    weight_1: Tensor | None = None,
    a_1: Tensor | None = None,
    b_1: Tensor | None = None,
) -> Tensor:
    """Kernel of ``hf_onebit::onebit_linear``: y = Σ_p a_p ⊙ ((b_p ⊙ x) S_p) + bias, S_p ``(in, out)``."""
    schema.check_onebit_linear(x, weight, a, b, bias, weight_1, a_1, b_1)
    # float64 is for comparisons, which nobody waits for; a trace computes nothing.
    if x.is_cpu and x.dtype != torch.float64 and not torch.compiler.is_compiling():
        cpu.warn_if_missing()
    dtype = accumulation_dtype(x)
    X = as_rows(x).to(dtype)
    y = _plane(X, weight, a, b)
    if weight_1 is not None and a_1 is not None and b_1 is not None:
        y = y + _plane(X, weight_1, a_1, b_1)
    if bias is not None:
        y = y + bias.to(dtype)
    return y.to(x.dtype).reshape(*x.shape[:-1], a.shape[0])


def onebit_linear_group(x: Tensor, weight: Sequence[Tensor], *lists: Sequence[Tensor] | None) -> list[Tensor]:
    """Kernel of ``hf_onebit::onebit_linear_group``: ``onebit_linear`` of each layer."""
    schema_group.check_onebit_linear_group(x, weight, *lists)
    return [torch.ops.hf_onebit.onebit_linear.default(x, *layer) for layer in schema_group.layers_of(weight, *lists)]


def onebit_linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    weight_1: Tensor | None,
    a_1: Tensor | None,
    b_1: Tensor | None,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Kernel of ``hf_onebit::onebit_linear_backward``.

    Returns:
        Gradients of x, a, b, a_1 and b_1, each in its input's dtype; an empty one where ``needs`` is False.
        ``x`` gives only its shape and dtype when no gradient of a scale is needed.
    """
    schema.check_onebit_linear_backward(grad, x, weight, a, b, weight_1, a_1, b_1, needs)
    need_x, need_a, need_b, need_a_1, need_b_1 = needs
    g = as_rows(grad).to(accumulation_dtype(x))
    grad_x, grad_a, grad_b = _plane_backward(g, x, weight, a, b, (need_x, need_a, need_b))
    grad_a_1, grad_b_1 = x.new_empty(0), x.new_empty(0)
    if weight_1 is not None and a_1 is not None and b_1 is not None:
        grad_x_1, grad_a_1, grad_b_1 = _plane_backward(g, x, weight_1, a_1, b_1, (need_x, need_a_1, need_b_1))
        grad_x = grad_x + grad_x_1
    grad_x = grad_x.to(x.dtype)
    return grad_x.reshape(x.shape) if need_x else grad_x, grad_a, grad_b, grad_a_1, grad_b_1


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """In which sums are kept."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def as_rows(x: Tensor) -> Tensor:
    """``(..., n)`` as ``(rows, n)``."""
    # Not reshape(-1, n): -1 is ambiguous when n is 0.
    return x.unsqueeze(0) if x.dim() == 1 else x.flatten(0, -2)


def _plane(X: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    S = unpack_signs(weight, b.shape[0], X.dtype)
    return ((X * b.to(X.dtype)) @ S) * a.to(X.dtype)


def _plane_backward(
    g: Tensor, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, needs: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """One plane's share. With u = b ⊙ x, z = u S, y = a ⊙ z: dz = a ⊙ g, du = dz Sᵀ.

    The gradient of x comes back in g's dtype, for the planes' sum; those of a and b in their own.
    """
    need_x, need_a, need_b = needs
    grad_x, grad_a, grad_b = g.new_empty(0), x.new_empty(0), x.new_empty(0)
    S = unpack_signs(weight, b.shape[0], g.dtype)
    if need_a:
        z = (as_rows(x).to(g.dtype) * b.to(g.dtype)) @ S
        grad_a = (g * z).sum(0).to(a.dtype)
    if need_x or need_b:
        du = (g * a.to(g.dtype)) @ S.T
        if need_x:
            grad_x = du * b.to(g.dtype)
        if need_b:
            grad_b = (du * as_rows(x).to(g.dtype)).sum(0).to(b.dtype)
    return grad_x, grad_a, grad_b


for _kernel in (pack, unpack, onebit_linear, onebit_linear_group, onebit_linear_backward):
    torch.library.impl(f"hf_onebit::{_kernel.__name__}", "default", _kernel)
