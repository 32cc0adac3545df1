"""The operators on group-quantized weights: schemas, checks, fakes, autograd formulas; as schema.py does for signs."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_onebit.formats.mpq import group_count
from hf_onebit.formats.packing import WORD_BITS, word_rows
from hf_onebit.ops import forward_mode
from hf_onebit.ops.schema import FLOAT_DTYPES, check_activations, check_bits, check_vector

_TAGS = (torch.Tag.pt2_compliant_tag,)

torch.library.define(
    "hf_onebit::mpq_linear",
    "(Tensor x, Tensor weight, Tensor scales, Tensor? zeros, Tensor? bias, int bits, int group_size) -> Tensor",
    tags=_TAGS,
)
torch.library.define(
    "hf_onebit::mpq_linear_backward",
    "(Tensor grad, Tensor x, Tensor weight, Tensor scales, Tensor? zeros, int bits, int group_size, bool[3] needs) -> "
    "(Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
torch.library.define(
    "hf_onebit::mpq_embedding",
    "(Tensor ids, Tensor weight, Tensor scales, Tensor? zeros, int bits, int group_size, int embedding_dim, "
    "ScalarType dtype) -> Tensor",
    tags=_TAGS,
)
torch.library.define(
    "hf_onebit::mpq_embedding_backward",
    "(Tensor grad, Tensor ids, Tensor weight, Tensor scales, Tensor? zeros, int bits, int group_size, bool[2] needs) "
    "-> (Tensor, Tensor)",
    tags=_TAGS,
)


# --- argument checks ----------------------------------------------------------------------------------------


def check_mpq_linear(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
) -> None:
    """Refuse arguments of ``mpq_linear`` whose dtypes, shapes or devices do not fit; RuntimeError."""
    op = "mpq_linear"
    check_activations(op, "x", x)
    _check_layer(op, "x", x, x.shape[-1], weight, scales, zeros, bits, group_size)
    if bias is not None:
        check_vector(op, x, "bias", bias, weight.shape[1], "one entry per output")


def check_mpq_linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group_size: int,
    needs: Sequence[bool],
) -> None:
    """Refuse arguments of ``mpq_linear_backward`` that the forward could not have led to; RuntimeError."""
    op = "mpq_linear_backward"
    check_mpq_linear(x, weight, scales, zeros, None, bits, group_size)
    _check_grad(op, "x", x, grad, (*x.shape[:-1], weight.shape[1]), x.dtype)
    torch._check(len(needs) == 3, lambda: f"{op}: needs must have 3 entries (x, scales, zeros), got {len(needs)}")
    torch._check(zeros is not None or not needs[2], lambda: f"{op}: needs asks for a gradient of zeros, got no zeros")


def check_mpq_embedding(
    ids: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group_size: int,
    embedding_dim: int,
    dtype: torch.dtype,
) -> None:
    """Refuse arguments of ``mpq_embedding`` that are wrong whatever the values of the ids; RuntimeError."""
    op = "mpq_embedding"
    torch._check(
        ids.dtype in (torch.int32, torch.int64),
        lambda: f"{op}: ids must be torch.int32 or torch.int64, got {ids.dtype}",
    )
    torch._check(embedding_dim >= 0, lambda: f"{op}: embedding_dim must not be negative, got {embedding_dim}")
    _check_layer(op, "ids", ids, embedding_dim, weight, scales, zeros, bits, group_size)
    torch._check(
        dtype in FLOAT_DTYPES, lambda: f"{op}: dtype must be float16, bfloat16, float32 or float64, got {dtype}"
    )


def check_mpq_embedding_backward(
    grad: Tensor,
    ids: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group_size: int,
    needs: Sequence[bool],
) -> None:
    """Refuse arguments of ``mpq_embedding_backward`` that the forward could not have led to; RuntimeError."""
    op = "mpq_embedding_backward"
    torch._check(grad.dim() >= 1, lambda: f"{op}: grad must have shape (..., embedding_dim), got a scalar")
    check_mpq_embedding(ids, weight, scales, zeros, bits, group_size, grad.shape[-1], grad.dtype)
    _check_grad(op, "ids", ids, grad, (*ids.shape, grad.shape[-1]), grad.dtype)
    torch._check(len(needs) == 2, lambda: f"{op}: needs must have 2 entries (scales, zeros), got {len(needs)}")
    torch._check(zeros is not None or not needs[1], lambda: f"{op}: needs asks for a gradient of zeros, got no zeros")


def check_ids(ids: Tensor, count: int) -> None:
    """Refuse ids that are no row of the matrix; IndexError, as an embedding of torch raises.

    On a GPU it is an assertion on the device, as of torch's embedding: nothing waits for it.
    """
    if ids.is_meta or ids.numel() == 0:
        return
    if ids.is_cuda:
        torch._assert_async(((ids >= 0) & (ids < count)).all(), "mpq_embedding: an id is out of range")
        return
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= count:
        raise IndexError(
            f"mpq_embedding: index {low if low < 0 else high} is out of range, ids must lie in 0..{count - 1}"
        )


def _check_layer(
    op: str,
    source: str,
    x: Tensor,
    in_features: int,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group_size: int,
) -> None:
    check_bits(op, bits)
    torch._check(
        group_size == -1 or (group_size >= WORD_BITS and group_size % WORD_BITS == 0),
        lambda: f"{op}: group_size must be a multiple of {WORD_BITS}, or -1 for the whole row, got {group_size}",
    )
    torch._check(
        weight.dtype == torch.int32,
        lambda: (
            f"{op}: weight must be packed codes in torch.int32, got {weight.dtype}; pack codes with "
            "hf_onebit.formats.packing.pack"
        ),
    )
    torch._check(
        weight.dim() == 2,
        lambda: f"{op}: weight must have shape (ceil(in / 32) * bits, out), got {tuple(weight.shape)}",
    )
    torch._check(weight.device == x.device, lambda: f"{op}: weight is on {weight.device}, {source} on {x.device}")
    rows = word_rows(in_features, bits)
    torch._check(
        weight.shape[0] == rows,
        lambda: (
            f"{op}: weight has {weight.shape[0]} word rows, expected {rows} = ceil({in_features} / 32) * {bits} for "
            f"{in_features} inputs of {bits} bits"
        ),
    )
    groups = group_count(in_features, group_size)
    for name, statistics in (("scales", scales), ("zeros", zeros)):
        if statistics is not None:
            _check_statistics(op, source, x, name, statistics, groups, weight.shape[1], group_size)


def _check_statistics(
    op: str, source: str, x: Tensor, name: str, statistics: Tensor, groups: int, out_features: int, group_size: int
) -> None:
    torch._check(
        statistics.is_floating_point(),
        lambda: f"{op}: {name} must be floating point, got {statistics.dtype}; cast it first",
    )
    fits = statistics.dim() == 2
    torch._check(
        fits and statistics.shape[0] == groups and statistics.shape[1] == out_features,
        lambda: (
            f"{op}: {name} must have shape ({groups}, {out_features}), one row per group of {group_size} inputs and "
            f"one column per column of weight, got {tuple(statistics.shape)}"
        ),
    )
    torch._check(
        statistics.device == x.device, lambda: f"{op}: {name} is on {statistics.device}, {source} on {x.device}"
    )


def _check_grad(op: str, source: str, x: Tensor, grad: Tensor, expected: tuple[int, ...], dtype: torch.dtype) -> None:
    torch._check(grad.dim() == len(expected), lambda: f"{op}: grad must have shape {expected}, got {tuple(grad.shape)}")
    for got, want in zip(grad.shape, expected, strict=True):
        torch._check(got == want, lambda: f"{op}: grad must have shape {expected}, got {tuple(grad.shape)}")
    torch._check(grad.dtype == dtype, lambda: f"{op}: grad must have x's dtype {dtype}, got {grad.dtype}")
    torch._check(grad.device == x.device, lambda: f"{op}: grad is on {grad.device}, {source} on {x.device}")


# --- fakes: shapes and dtypes without values ----------------------------------------------------------------


def _mpq_linear_fake(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
) -> Tensor:
    check_mpq_linear(x, weight, scales, zeros, bias, bits, group_size)
    return x.new_empty(*x.shape[:-1], weight.shape[1])


def _mpq_linear_backward_fake(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group_size: int,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    check_mpq_linear_backward(grad, x, weight, scales, zeros, bits, group_size, needs)
    return _wanted(x, (x, scales, zeros), needs)


def _mpq_embedding_fake(
    ids: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group_size: int,
    embedding_dim: int,
    dtype: torch.dtype,
) -> Tensor:
    check_mpq_embedding(ids, weight, scales, zeros, bits, group_size, embedding_dim, dtype)
    return scales.new_empty(*ids.shape, embedding_dim, dtype=dtype)


def _mpq_embedding_backward_fake(
    grad: Tensor,
    ids: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group_size: int,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    check_mpq_embedding_backward(grad, ids, weight, scales, zeros, bits, group_size, needs)
    return _wanted(grad, (scales, zeros), needs)


def _wanted(like: Tensor, tensors: Sequence[Tensor | None], needs: Sequence[bool]) -> tuple[Tensor, ...]:
    return tuple(
        tensor.new_empty(tensor.shape) if need and tensor is not None else like.new_empty(0)
        for tensor, need in zip(tensors, needs, strict=True)
    )


torch.library.register_fake("hf_onebit::mpq_linear", _mpq_linear_fake)
torch.library.register_fake("hf_onebit::mpq_linear_backward", _mpq_linear_backward_fake)
torch.library.register_fake("hf_onebit::mpq_embedding", _mpq_embedding_fake)
torch.library.register_fake("hf_onebit::mpq_embedding_backward", _mpq_embedding_backward_fake)


# --- autograd -----------------------------------------------------------------------------------------------


def _setup_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, scales, zeros, bias, bits, group_size = inputs
    # Only the scales' gradients read x's values, and the zeros' their sums. With both frozen it is not kept alive.
    keep = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
    ctx.save_for_backward(x if keep else None, weight, scales, zeros)
    ctx.in_features, ctx.bits, ctx.group_size = x.shape[-1], bits, group_size
    ctx.bias_dtype = None if bias is None else bias.dtype


def _linear_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, scales, zeros = ctx.saved_tensors
    need_x, _, need_scales, need_zeros, need_bias = ctx.needs_input_grad[:5]
    grad_x = grad_scales = grad_zeros = grad_bias = None
    if need_bias:
        dtype = torch.float64 if grad.dtype == torch.float64 else torch.float32
        # Not Size.numel(): it would fix a dynamic batch size at the traced one.
        rows = grad.unsqueeze(0) if grad.dim() == 1 else grad.flatten(0, -2)
        grad_bias = rows.sum(0, dtype=dtype).to(ctx.bias_dtype)
    needs = [need_x, need_scales, need_zeros]
    if any(needs):
        if x is None:  # nobody reads it: a stand-in of the right shape that takes no memory
            x = grad.new_zeros(()).expand(*grad.shape[:-1], ctx.in_features)
        op = torch.ops.hf_onebit.mpq_linear_backward.default
        results = forward_mode.call_backward(op, grad, x, weight, scales, zeros, ctx.bits, ctx.group_size, needs)
        grad_x, grad_scales, grad_zeros = (r if n else None for r, n in zip(results, needs, strict=True))
    return grad_x, None, grad_scales, grad_zeros, grad_bias, None, None


def _setup_embedding(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ids, weight, scales, zeros, bits, group_size, _, _ = inputs
    ctx.save_for_backward(ids, weight, scales, zeros)
    ctx.bits, ctx.group_size = bits, group_size


def _embedding_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    ids, weight, scales, zeros = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[2:4])
    op = torch.ops.hf_onebit.mpq_embedding_backward.default
    results = forward_mode.call_backward(op, grad, ids, weight, scales, zeros, ctx.bits, ctx.group_size, needs)
    grad_scales, grad_zeros = (r if n else None for r, n in zip(results, needs, strict=True))
    return None, None, grad_scales, grad_zeros, None, None, None, None


forward_mode.register_autograd(
    torch.ops.hf_onebit.mpq_linear.default, _linear_autograd, _setup_linear, linear_in=((0,), (2, 3)), bias=4
)
forward_mode.register_autograd(
    torch.ops.hf_onebit.mpq_embedding.default, _embedding_autograd, _setup_embedding, linear_in=((2, 3),)
)
