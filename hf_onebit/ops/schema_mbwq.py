"""The operators whose inputs have an order of their own: schemas, checks, fakes, autograd formulas.

``mpq_linear_g_idx`` is ``mpq_linear`` where each input names its group; ``mbwq_linear`` takes the inputs in packed
order, in row blocks that may differ in width (formats/mbwq.py). ``blocks`` are flat: bits, rows, group size of the
first, then of the second, ...
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_onebit.formats import mbwq
from hf_onebit.formats.packing import word_rows
from hf_onebit.ops import forward_mode
from hf_onebit.ops.schema import check_activations, check_bits, check_vector

_TAGS = (torch.Tag.pt2_compliant_tag,)

torch.library.define(
    "hf_onebit::mpq_linear_g_idx",
    "(Tensor x, Tensor weight, Tensor scales, Tensor? zeros, Tensor? bias, Tensor g_idx, int bits) -> Tensor",
    tags=_TAGS,
)
torch.library.define(
    "hf_onebit::mpq_linear_g_idx_backward",
    "(Tensor grad, Tensor x, Tensor weight, Tensor scales, Tensor? zeros, Tensor g_idx, int bits, bool[3] needs) -> "
    "(Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
torch.library.define(
    "hf_onebit::mbwq_linear",
    "(Tensor x, Tensor weight, Tensor scales, Tensor? zeros, Tensor? bias, Tensor? q_perm, int[] blocks) -> Tensor",
    tags=_TAGS,
)
torch.library.define(
    "hf_onebit::mbwq_linear_backward",
    "(Tensor grad, Tensor x, Tensor weight, Tensor scales, Tensor? zeros, Tensor? q_perm, int[] blocks, "
    "bool[3] needs) -> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)


# --- argument checks ----------------------------------------------------------------------------------------


def blocks_of(op: str, blocks: Sequence[int]) -> list[mbwq.Block]:
    """The flat list as triples; RuntimeError if they describe no layer."""
    torch._check(
        len(blocks) > 0 and len(blocks) % 3 == 0,
        lambda: f"{op}: blocks must hold bits, rows and group size of each block, got {len(blocks)} numbers",
    )
    triples = [(blocks[i], blocks[i + 1], blocks[i + 2]) for i in range(0, len(blocks), 3)]
    for bits, rows, size in triples:
        check_bits(op, bits)
        torch._check(
            rows > 0 and (size == -1 or (size >= 32 and size % 32 == 0)),
            lambda: f"{op}: blocks must have rows, and group sizes that are multiples of 32 or -1, got {triples}",
        )
    return triples


def check_mbwq_linear(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    q_perm: Tensor | None,
    blocks: Sequence[int],
) -> list[mbwq.Block]:
    """Refuse arguments of ``mbwq_linear`` whose dtypes, shapes or devices do not fit; RuntimeError.

    Returns:
        The blocks.
    """
    op = "mbwq_linear"
    check_activations(op, "x", x)
    triples = blocks_of(op, blocks)
    rows = sum(count for _, count, _ in triples)
    torch._check(
        x.shape[-1] == rows,
        lambda: f"{op}: x must have shape (..., {rows}), the rows of the blocks, got {tuple(x.shape)}",
    )
    _check_weight(op, x, weight, sum(mbwq.block_words(triples)))
    _check_statistics(op, x, weight, scales, zeros, sum(mbwq.block_group_counts(triples)))
    if q_perm is not None:
        _check_index(op, x, "q_perm", q_perm)
    if bias is not None:
        check_vector(op, x, "bias", bias, weight.shape[1], "one entry per output")
    return triples


def check_mpq_linear_g_idx(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    g_idx: Tensor,
    bits: int,
) -> None:
    """Refuse arguments of ``mpq_linear_g_idx`` whose dtypes, shapes or devices do not fit; RuntimeError."""
    op = "mpq_linear_g_idx"
    check_activations(op, "x", x)
    check_bits(op, bits)
    _check_weight(op, x, weight, word_rows(x.shape[-1], bits))
    _check_statistics(op, x, weight, scales, zeros, None)
    _check_index(op, x, "g_idx", g_idx)
    if bias is not None:
        check_vector(op, x, "bias", bias, weight.shape[1], "one entry per output")


def check_grad(op: str, grad: Tensor, x: Tensor, weight: Tensor, zeros: Tensor | None, needs: Sequence[bool]) -> None:
    """Refuse a gradient that the forward could not have led to; RuntimeError."""
    expected = (*x.shape[:-1], weight.shape[1])
    torch._check(grad.dim() == len(expected), lambda: f"{op}: grad must have shape {expected}, got {tuple(grad.shape)}")
    for got, want in zip(grad.shape, expected, strict=True):
        torch._check(got == want, lambda: f"{op}: grad must have shape {expected}, got {tuple(grad.shape)}")
    torch._check(grad.dtype == x.dtype, lambda: f"{op}: grad must have x's dtype {x.dtype}, got {grad.dtype}")
    torch._check(grad.device == x.device, lambda: f"{op}: grad is on {grad.device}, x on {x.device}")
    torch._check(len(needs) == 3, lambda: f"{op}: needs must have 3 entries (x, scales, zeros), got {len(needs)}")
    torch._check(zeros is not None or not needs[2], lambda: f"{op}: needs asks for a gradient of zeros, got no zeros")


def _check_weight(op: str, x: Tensor, weight: Tensor, words: int) -> None:
    torch._check(weight.dtype == torch.int32, lambda: f"{op}: weight must be packed int32 words, got {weight.dtype}")
    torch._check(
        weight.dim() == 2 and weight.shape[0] == words,
        lambda: f"{op}: weight must have shape ({words}, out), got {tuple(weight.shape)}",
    )
    torch._check(weight.device == x.device, lambda: f"{op}: weight is on {weight.device}, x on {x.device}")


def _check_statistics(
    op: str, x: Tensor, weight: Tensor, scales: Tensor, zeros: Tensor | None, groups: int | None
) -> None:
    _check_one(op, x, weight, "scales", scales, groups)
    if zeros is not None:
        _check_one(op, x, weight, "zeros", zeros, scales.shape[0])


def _check_one(op: str, x: Tensor, weight: Tensor, name: str, tensor: Tensor, groups: int | None) -> None:
    torch._check(tensor.is_floating_point(), lambda: f"{op}: {name} must be floating point, got {tensor.dtype}")
    torch._check(
        tensor.dim() == 2 and tensor.shape[1] == weight.shape[1] and (groups is None or tensor.shape[0] == groups),
        lambda: (
            f"{op}: {name} must have shape ({'groups' if groups is None else groups}, {weight.shape[1]}), got "
            f"{tuple(tensor.shape)}"
        ),
    )
    torch._check(tensor.device == x.device, lambda: f"{op}: {name} is on {tensor.device}, x on {x.device}")


def _check_index(op: str, x: Tensor, name: str, index: Tensor) -> None:
    torch._check(
        index.dtype in (torch.int32, torch.int64),
        lambda: f"{op}: {name} must be torch.int32 or torch.int64, got {index.dtype}",
    )
    torch._check(
        index.dim() == 1 and index.shape[0] == x.shape[-1],
        lambda: f"{op}: {name} must have shape ({x.shape[-1]},), one entry per input, got {tuple(index.shape)}",
    )
    torch._check(index.device == x.device, lambda: f"{op}: {name} is on {index.device}, x on {x.device}")


# --- fakes: shapes and dtypes without values ----------------------------------------------------------------


def _linear_fake(check: Any) -> Any:
    def fake(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        check(x, weight, *rest)
        return x.new_empty(*x.shape[:-1], weight.shape[1])

    return fake


def _backward_fake(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    order: Tensor | None,
    about: Any,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    check_grad("mpq_linear_g_idx_backward" if isinstance(about, int) else "mbwq_linear_backward", grad, x, weight,
               zeros, needs)  # fmt: skip
    return tuple(
        tensor.new_empty(tensor.shape) if need and tensor is not None else x.new_empty(0)
        for tensor, need in zip((x, scales, zeros), needs, strict=True)
    )


torch.library.register_fake("hf_onebit::mpq_linear_g_idx", _linear_fake(check_mpq_linear_g_idx))
torch.library.register_fake("hf_onebit::mbwq_linear", _linear_fake(check_mbwq_linear))
torch.library.register_fake("hf_onebit::mpq_linear_g_idx_backward", _backward_fake)
torch.library.register_fake("hf_onebit::mbwq_linear_backward", _backward_fake)


# --- autograd -----------------------------------------------------------------------------------------------


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, scales, zeros, bias, order, about = inputs
    # Only the scales' gradients read x's values, and the zeros' their sums. With both frozen it is not kept alive.
    keep = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
    ctx.save_for_backward(x if keep else None, weight, scales, zeros, order)
    ctx.in_features, ctx.about = x.shape[-1], about
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, scales, zeros, order = ctx.saved_tensors
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
        ops = torch.ops.hf_onebit
        by_index = isinstance(ctx.about, int)
        op = ops.mpq_linear_g_idx_backward.default if by_index else ops.mbwq_linear_backward.default
        results = forward_mode.call_backward(op, grad, x, weight, scales, zeros, order, ctx.about, needs)
        grad_x, grad_scales, grad_zeros = (r if n else None for r, n in zip(results, needs, strict=True))
    return grad_x, None, grad_scales, grad_zeros, grad_bias, None, None


for _name in ("mpq_linear_g_idx", "mbwq_linear"):
    _op = getattr(torch.ops.hf_onebit, _name).default
    forward_mode.register_autograd(_op, _backward, _setup, linear_in=((0,), (2, 3)), bias=4)
