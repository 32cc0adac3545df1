"""The operators of this package as typed functions; the same as ``torch.ops.hf_onebit.*``.

Importing registers schemas, the reference kernels and the compiled ones that are there. It compiles nothing and
starts no accelerator.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from hf_onebit.ops import cpu, reference, schema  # noqa: F401  (importing registers)
from hf_onebit.ops.cpu import activations, set_activations

__all__ = ["activations", "backends", "onebit_linear", "pack", "set_activations", "unpack"]

# Each implementation says itself where it is in use, or why it was refused.
_BACKENDS: dict[str, Callable[[], str]] = {"cpu": cpu.status, "reference": reference.status}


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes into 32-bit words (layout: :mod:`hf_onebit.formats.packing`).

    Args:
        codes: ``(..., out, in)``, bool or any integer dtype, values 0 .. 2^bits - 1.
        bits: width of one code, 1..8.

    Returns:
        int32 ``(..., ceil(in / 32) * bits, out)``.

    Raises:
        RuntimeError: wrong dtype, shape or ``bits``.
        ValueError: a value out of range.
    """
    words: Tensor = torch.ops.hf_onebit.pack.default(codes, bits)
    return words


def unpack(words: Tensor, bits: int, in_features: int) -> Tensor:
    """Undo :func:`pack`.

    Args:
        words: int32 ``(..., ceil(in_features / 32) * bits, out)``.
        bits: width of one code, 1..8.
        in_features: codes per column.

    Returns:
        uint8 ``(..., out, in_features)``.

    Raises:
        RuntimeError: wrong dtype, shape, ``bits`` or ``in_features``.
    """
    codes: Tensor = torch.ops.hf_onebit.unpack.default(words, bits, in_features)
    return codes


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
    """A linear layer from packed signs: y = Σ_p a_p ⊙ (S_p (b_p ⊙ x)) + bias, with S_p ``(out, in)``.

    Differentiable once, in every float argument. Sums are accumulated in float32 (float64 for float64 ``x``).

    Args:
        x: ``(..., in)``, float16, bfloat16, float32 or float64; any strides; no batch or an empty one is fine.
        weight: int32 ``(ceil(in / 32), out)``, packed signs; padding bits are ignored.
        a: ``(out,)``, any float dtype.
        b: ``(in,)``, any float dtype.
        bias: ``(out,)``, any float dtype, or None.
        weight_1: the second plane's signs, as ``weight``, or None; the three of the plane come together.
        a_1: the second plane's output scales.
        b_1: the second plane's input scales.

    Returns:
        ``(..., out)`` in ``x.dtype``. Gradients come back in the dtypes of their inputs.

    Raises:
        RuntimeError: dtypes, shapes or devices that do not belong together.
    """
    y: Tensor = torch.ops.hf_onebit.onebit_linear.default(x, weight, a, b, bias, weight_1, a_1, b_1)
    return y


def backends() -> dict[str, str]:
    """Implementations by name, and for each where it is in use or why it is not."""
    return {name: status() for name, status in _BACKENDS.items()}
