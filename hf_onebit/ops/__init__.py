"""The operators of this package as typed functions; the same as ``torch.ops.hf_onebit.*`` but for forward mode.

Importing registers schemas, the reference kernels and the compiled ones that are there. It compiles nothing and
starts no accelerator.

These functions are differentiable in forward mode too (``torch.func.jvp``, dual numbers); called as ``torch.ops``, the
operators drop tangents.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from hf_onebit.ops import (  # noqa: F401  (importing registers)
    cpu,
    cpu_backward,
    forward_mode,
    gpu,
    gpu_mbwq,
    gpu_mpq,
    gpu_onebit,
    gpu_packing,
    reference,
    reference_mbwq,
    reference_mpq,
    schema,
    schema_group,
    schema_mbwq,
    schema_mpq,
    schema_update,
)
from hf_onebit.ops.cpu import activations, set_activations

__all__ = [
    "activations",
    "backends",
    "mbwq_linear",
    "mpq_embedding",
    "mpq_linear",
    "mpq_linear_g_idx",
    "onebit_linear",
    "onebit_linear_group",
    "pack",
    "set_activations",
    "unpack",
]

_ONEBIT_LINEAR = torch.ops.hf_onebit.onebit_linear.default
_ONEBIT_LINEAR_GROUP = torch.ops.hf_onebit.onebit_linear_group.default
_MPQ_LINEAR = torch.ops.hf_onebit.mpq_linear.default
_MPQ_LINEAR_G_IDX = torch.ops.hf_onebit.mpq_linear_g_idx.default
_MBWQ_LINEAR = torch.ops.hf_onebit.mbwq_linear.default
_MPQ_EMBEDDING = torch.ops.hf_onebit.mpq_embedding.default
# A formula that is registered from Python takes microseconds in every call, even where nothing is recorded. There, the
# dispatcher is told to go past it; modes and other dispatch keys see the call as before.
_below_autograd = torch._C._AutoDispatchBelowAutograd
# Where a level of forward mode is open, tensors may carry tangents, which the operators themselves would drop. The
# functions read ``forward_ad._current_level`` in line, -1 for none: a call would take as long as the rest of the way.

# Each implementation says itself where it is in use, or why it was refused.
_BACKENDS: dict[str, Callable[[], str]] = {"cpu": cpu.status, "gpu": gpu.status, "reference": reference.status}


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
        a: ``(out,)``, a dtype that ``x`` may have.
        b: ``(in,)``, a dtype that ``x`` may have.
        bias: ``(out,)``, a dtype that ``x`` may have, or None.
        weight_1: the second plane's signs, as ``weight``, or None; the three of the plane come together.
        a_1: the second plane's output scales.
        b_1: the second plane's input scales.

    Returns:
        ``(..., out)`` in ``x.dtype``. Gradients come back in the dtypes of their inputs.

    Raises:
        RuntimeError: dtypes, shapes or devices that do not belong together.
    """
    y: Tensor
    if forward_ad._current_level >= 0:
        y = forward_mode.call(_ONEBIT_LINEAR, x, weight, a, b, bias, weight_1, a_1, b_1)
        return y
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        y = _ONEBIT_LINEAR(x, weight, a, b, bias, weight_1, a_1, b_1)
        return y
    with _below_autograd():
        y = _ONEBIT_LINEAR(x, weight, a, b, bias, weight_1, a_1, b_1)
    return y


def mpq_linear(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
) -> Tensor:
    """A linear layer from group-quantized codes: y = x Wᵀ + bias, W[n, k] = scales[g, n] q[n, k] - zeros[g, n].

    Differentiable once, in every float argument. g = k // group_size.

    Args:
        x: ``(..., in)``, float16, bfloat16, float32 or float64; any strides; no batch or an empty one is fine.
        weight: int32 ``(ceil(in / 32) * bits, out)``, packed codes; padding codes are ignored.
        scales: ``(groups, out)``, any float dtype; groups = ceil(in / group_size).
        zeros: as scales, already multiplied by them; None for a symmetric layer: scales · 2^(bits - 1), scales / 2
            at one bit.
        bias: ``(out,)``, any float dtype, or None.
        bits: width of one code, 1..8.
        group_size: inputs that share a scale: a multiple of 32, or -1 for all of them.

    Returns:
        ``(..., out)`` in ``x.dtype``. Gradients come back in the dtypes of their inputs.

    Raises:
        RuntimeError: dtypes, shapes or devices that do not belong together.
    """
    y: Tensor
    if forward_ad._current_level >= 0:
        y = forward_mode.call(_MPQ_LINEAR, x, weight, scales, zeros, bias, bits, group_size)
        return y
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        y = _MPQ_LINEAR(x, weight, scales, zeros, bias, bits, group_size)
        return y
    with _below_autograd():
        y = _MPQ_LINEAR(x, weight, scales, zeros, bias, bits, group_size)
    return y


def mpq_linear_g_idx(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    g_idx: Tensor,
    bits: int,
) -> Tensor:
    """:func:`mpq_linear` where each input names its group: W[n, k] = scales[g_idx[k], n] q[n, k] - zeros[g_idx[k], n].

    Differentiable once, in every float argument.

    Args:
        x, weight, zeros, bias, bits: as for :func:`mpq_linear`.
        scales: ``(groups, out)``, any float dtype.
        g_idx: ``(in,)``, int32 or int64, values 0 .. groups - 1 in any order.

    Returns:
        ``(..., out)`` in ``x.dtype``. Gradients come back in the dtypes of their inputs.

    Raises:
        RuntimeError: dtypes, shapes or devices that do not belong together.
        IndexError or RuntimeError: an index of no group (on the CPU; accelerators find it when they get there).
    """
    y: Tensor
    if forward_ad._current_level >= 0:
        y = forward_mode.call(_MPQ_LINEAR_G_IDX, x, weight, scales, zeros, bias, g_idx, bits)
        return y
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        y = _MPQ_LINEAR_G_IDX(x, weight, scales, zeros, bias, g_idx, bits)
        return y
    with _below_autograd():
        y = _MPQ_LINEAR_G_IDX(x, weight, scales, zeros, bias, g_idx, bits)
    return y


def mbwq_linear(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    q_perm: Tensor | None,
    blocks: Sequence[int],
) -> Tensor:
    """A linear layer whose inputs have an order of their own and codes of one or several widths (formats/mbwq.py).

    Differentiable once, in every float argument.

    Args:
        x: ``(..., in)``, float16, bfloat16, float32 or float64; any strides; no batch or an empty one is fine.
        weight: int32 ``(words, out)``, the packed codes of one block after the other.
        scales: ``(groups, out)``, any float dtype.
        zeros: as scales, already multiplied by them; None for a symmetric layer.
        bias: ``(out,)``, any float dtype, or None.
        q_perm: ``(in,)``, int32 or int64, a permutation: packed row r is input ``q_perm[r]``; None: in their own order.
        blocks: bits, rows and group size of each block, flat.

    Returns:
        ``(..., out)`` in ``x.dtype``. Gradients come back in the dtypes of their inputs.

    Raises:
        RuntimeError: dtypes, shapes or devices that do not belong together.
    """
    y: Tensor
    if forward_ad._current_level >= 0:
        y = forward_mode.call(_MBWQ_LINEAR, x, weight, scales, zeros, bias, q_perm, blocks)
        return y
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        y = _MBWQ_LINEAR(x, weight, scales, zeros, bias, q_perm, blocks)
        return y
    with _below_autograd():
        y = _MBWQ_LINEAR(x, weight, scales, zeros, bias, q_perm, blocks)
    return y


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
    """Rows of a group-quantized matrix ``(out, embedding_dim)``, unpacked as they are looked up.

    Differentiable once, in scales and zeros.

    Args:
        ids: any shape, int32 or int64, values 0 .. out - 1.
        weight, scales, zeros, bits, group_size: as for :func:`mpq_linear`, with ``in`` = ``embedding_dim``.
        embedding_dim: length of a row.
        dtype: of the result; computed in float32 (float64 for that) and rounded once.

    Returns:
        ``(*ids.shape, embedding_dim)`` in ``dtype``.

    Raises:
        RuntimeError: dtypes, shapes or devices that do not belong together.
        IndexError: an id is no row of the matrix.
    """
    rows: Tensor
    if forward_ad._current_level >= 0:
        rows = forward_mode.call(_MPQ_EMBEDDING, ids, weight, scales, zeros, bits, group_size, embedding_dim, dtype)
        return rows
    rows = _MPQ_EMBEDDING(ids, weight, scales, zeros, bits, group_size, embedding_dim, dtype)
    return rows


def onebit_linear_group(
    x: Tensor,
    weight: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    bias: Sequence[Tensor] | None = None,
    weight_1: Sequence[Tensor] | None = None,
    a_1: Sequence[Tensor] | None = None,
    b_1: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Several :func:`onebit_linear` of the same ``x`` in one call, to the same bits.

    Args:
        x: ``(..., in)``, as for :func:`onebit_linear`.
        weight: for each layer, int32 ``(ceil(in / 32), out)``; ``out`` may differ between layers.
        a: for each layer, ``(out,)``.
        b: for each layer, ``(in,)``.
        bias: for each layer, ``(out,)``, or None where no layer has one.
        weight_1: the second planes' signs, or None; the three of the plane come together.
        a_1: the second planes' output scales, or None.
        b_1: the second planes' input scales, or None.

    Returns:
        For each layer, ``(..., out)`` in ``x.dtype``.

    Raises:
        RuntimeError: dtypes, shapes, devices or lengths of lists that do not belong together.
    """
    ys: list[Tensor]
    if forward_ad._current_level >= 0:  # one by one: an autograd.Function does not look into lists
        layers = schema_group.layers_of(weight, a, b, bias, weight_1, a_1, b_1)
        ys = [onebit_linear(x, *layer) for layer in layers]
        return ys
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        ys = _ONEBIT_LINEAR_GROUP(x, weight, a, b, bias, weight_1, a_1, b_1)
        return ys
    with _below_autograd():
        ys = _ONEBIT_LINEAR_GROUP(x, weight, a, b, bias, weight_1, a_1, b_1)
    return ys


def backends() -> dict[str, str]:
    """Implementations by name, and for each where it is in use or why it is not."""
    return {name: status() for name, status in _BACKENDS.items()}
