"""The operators ``torch.ops.hf_onebit.*``: schemas, argument checks, fakes, autograd formulas. No arithmetic.

Kernels are registered elsewhere (reference.py for every device; a compiled kernel claims its own dispatch
key) and the dispatcher picks one. A kernel written in Python calls the ``check_`` function of its operator
first; one written in another language repeats those checks, so that no kernel ever trusts a size.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_onebit.formats.packing import word_rows
from hf_onebit.ops import forward_mode

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_TAGS = (torch.Tag.pt2_compliant_tag,)

torch.library.define("hf_onebit::pack", "(Tensor codes, int bits) -> Tensor", tags=_TAGS)
torch.library.define("hf_onebit::unpack", "(Tensor words, int bits, int in_features) -> Tensor", tags=_TAGS)
torch.library.define(
    "hf_onebit::onebit_linear",
    "(Tensor x, Tensor weight, Tensor a, Tensor b, Tensor? bias=None, Tensor? weight_1=None, Tensor? a_1=None, "
    "Tensor? b_1=None) -> Tensor",
    tags=_TAGS,
)
torch.library.define(
    "hf_onebit::onebit_linear_backward",
    "(Tensor grad, Tensor x, Tensor weight, Tensor a, Tensor b, Tensor? weight_1, Tensor? a_1, Tensor? b_1, bool[5] "
    "needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)


# --- argument checks ----------------------------------------------------------------------------------------
# Sizes are Python integers (or symbolic ones while tracing), so nothing here overflows.


def check_pack(codes: Tensor, bits: int) -> None:
    """Refuse arguments of ``pack`` that are wrong whatever their values; RuntimeError."""
    check_bits("pack", bits)
    torch._check(
        not (codes.is_floating_point() or codes.is_complex()),
        lambda: (
            f"pack: codes must be bool or integers, got {codes.dtype}; round them first, e.g. codes.to(torch.uint8)"
        ),
    )
    torch._check(codes.dim() >= 2, lambda: f"pack: codes must have shape (..., out, in), got {tuple(codes.shape)}")


def check_unpack(words: Tensor, bits: int, in_features: int) -> None:
    """Refuse words that do not hold ``in_features`` codes of ``bits`` bits; RuntimeError."""
    check_bits("unpack", bits)
    torch._check(in_features >= 0, lambda: f"unpack: in_features must not be negative, got {in_features}")
    torch._check(words.dtype == torch.int32, lambda: f"unpack: words must be torch.int32, got {words.dtype}")
    torch._check(words.dim() >= 2, lambda: f"unpack: words must have shape (..., rows, out), got {tuple(words.shape)}")
    rows = word_rows(in_features, bits)
    torch._check(
        words.shape[-2] == rows,
        lambda: (
            f"unpack: {in_features} inputs of {bits} bits take {rows} word rows, got {words.shape[-2]} in words of "
            f"shape {tuple(words.shape)}"
        ),
    )


def check_onebit_linear(
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    weight_1: Tensor | None,
    a_1: Tensor | None,
    b_1: Tensor | None,
    op: str = "onebit_linear",
) -> None:
    """Refuse arguments of ``onebit_linear`` whose dtypes, shapes or devices do not fit; RuntimeError."""
    check_activations(op, "x", x)
    _check_plane(op, x, ("weight", "a", "b"), weight, a, b)
    in_features, out_features = b.shape[0], a.shape[0]
    torch._check(
        x.shape[-1] == in_features,
        lambda: (
            f"{op}: x has {x.shape[-1]} features in its last dimension, the layer expects {in_features} (the length of "
            f"b); x has shape {tuple(x.shape)}"
        ),
    )
    if bias is not None:
        check_vector(op, x, "bias", bias, out_features, "one entry per output, as a")
    _check_second_plane(op, x, in_features, out_features, weight_1, a_1, b_1)


def check_onebit_linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    weight_1: Tensor | None,
    a_1: Tensor | None,
    b_1: Tensor | None,
    needs: Sequence[bool],
) -> None:
    """Refuse arguments of ``onebit_linear_backward`` that the forward could not have led to; RuntimeError."""
    op = "onebit_linear_backward"
    check_onebit_linear(x, weight, a, b, None, weight_1, a_1, b_1)
    expected = (*x.shape[:-1], a.shape[0])
    torch._check(grad.dim() == len(expected), lambda: f"{op}: grad must have shape {expected}, got {tuple(grad.shape)}")
    for got, want in zip(grad.shape, expected, strict=True):
        torch._check(got == want, lambda: f"{op}: grad must have shape {expected}, got {tuple(grad.shape)}")
    torch._check(grad.dtype == x.dtype, lambda: f"{op}: grad must have x's dtype {x.dtype}, got {grad.dtype}")
    torch._check(grad.device == x.device, lambda: f"{op}: grad is on {grad.device}, x on {x.device}")
    torch._check(len(needs) == 5, lambda: f"{op}: needs must have 5 entries (x, a, b, a_1, b_1), got {len(needs)}")
    torch._check(
        weight_1 is not None or not (needs[3] or needs[4]),
        lambda: f"{op}: needs asks for gradients of a_1 or b_1, but there is no second plane",
    )


def check_bits(op: str, bits: int) -> None:
    """Refuse a width outside 1..8; RuntimeError."""
    torch._check(1 <= bits <= 8, lambda: f"{op}: bits must be between 1 and 8, got {bits}")


def check_activations(op: str, name: str, x: Tensor) -> None:
    """Refuse what is no batch of float rows; RuntimeError."""
    torch._check(
        x.is_floating_point(),
        lambda: (
            f"{op}: {name} must be floating point, got {x.dtype}. Usually the calling model casts activations to "
            "`weight.dtype`, which is torch.int32 for a packed layer; list that layer in modules_to_not_convert so "
            "that it stays float"
        ),
    )
    torch._check(
        x.dtype in FLOAT_DTYPES,
        lambda: f"{op}: {name} must be float16, bfloat16, float32 or float64, got {x.dtype}; cast it first",
    )
    torch._check(x.dim() >= 1, lambda: f"{op}: {name} must have shape (..., in), got a scalar")


def _check_plane(op: str, x: Tensor, names: Sequence[str], weight: Tensor, a: Tensor, b: Tensor) -> None:
    weight_name, a_name, b_name = names
    torch._check(
        weight.dtype == torch.int32,
        lambda: (
            f"{op}: {weight_name} must be packed signs in torch.int32, got {weight.dtype}; pack a float matrix with "
            "hf_onebit.formats.onebit.pack_signs"
        ),
    )
    torch._check(
        weight.dim() == 2,
        lambda: f"{op}: {weight_name} must have shape (ceil(in / 32), out), got {tuple(weight.shape)}",
    )
    torch._check(weight.device == x.device, lambda: f"{op}: {weight_name} is on {weight.device}, x on {x.device}")
    check_vector(op, x, a_name, a, weight.shape[1], f"one scale per column of {weight_name}")
    torch._check(b.dim() == 1, lambda: f"{op}: {b_name} must have shape (in,), got {tuple(b.shape)}")
    check_vector(op, x, b_name, b, b.shape[0], "one scale per input")
    rows = word_rows(b.shape[0])
    torch._check(
        weight.shape[0] == rows,
        lambda: (
            f"{op}: {weight_name} has {weight.shape[0]} word rows, expected {rows} = ceil({b.shape[0]} / 32) for the "
            f"{b.shape[0]} entries of {b_name}"
        ),
    )


def check_vector(op: str, x: Tensor, name: str, vector: Tensor, size: int, meaning: str) -> None:
    """Refuse what is no float vector of ``size`` entries on x's device; RuntimeError."""
    torch._check(
        vector.is_floating_point(),
        lambda: f"{op}: {name} must be floating point, got {vector.dtype}; cast it first",
    )
    torch._check(
        vector.dtype in FLOAT_DTYPES,
        lambda: f"{op}: {name} must be float16, bfloat16, float32 or float64, got {vector.dtype}; cast it first",
    )
    torch._check(
        vector.dim() == 1,
        lambda: f"{op}: {name} must have shape ({size},), {meaning}, got {tuple(vector.shape)}",
    )
    torch._check(
        vector.shape[0] == size,
        lambda: f"{op}: {name} has {vector.shape[0]} entries, expected {size}, {meaning}",
    )
    torch._check(vector.device == x.device, lambda: f"{op}: {name} is on {vector.device}, x on {x.device}")


def _check_second_plane(
    op: str,
    x: Tensor,
    in_features: int,
    out_features: int,
    weight_1: Tensor | None,
    a_1: Tensor | None,
    b_1: Tensor | None,
) -> None:
    if weight_1 is None and a_1 is None and b_1 is None:
        return
    given = {"weight_1": weight_1, "a_1": a_1, "b_1": b_1}
    missing = [name for name, tensor in given.items() if tensor is None]
    torch._check(
        not missing,
        lambda: f"{op}: the second plane needs weight_1, a_1 and b_1 together, got no {', '.join(missing)}",
    )
    assert weight_1 is not None
    assert a_1 is not None
    assert b_1 is not None
    _check_plane(op, x, ("weight_1", "a_1", "b_1"), weight_1, a_1, b_1)
    torch._check(
        a_1.shape[0] == out_features,
        lambda: f"{op}: a_1 has {a_1.shape[0]} entries, expected {out_features}, as a: both planes have one size",
    )
    torch._check(
        b_1.shape[0] == in_features,
        lambda: f"{op}: b_1 has {b_1.shape[0]} entries, expected {in_features}, as b: both planes have one size",
    )


# --- fakes: shapes and dtypes without values ----------------------------------------------------------------


def _pack_fake(codes: Tensor, bits: int) -> Tensor:
    check_pack(codes, bits)
    *batch, out_features, in_features = codes.shape
    return codes.new_empty(*batch, word_rows(in_features, bits), out_features, dtype=torch.int32)


def _unpack_fake(words: Tensor, bits: int, in_features: int) -> Tensor:
    check_unpack(words, bits, in_features)
    return words.new_empty(*words.shape[:-2], words.shape[-1], in_features, dtype=torch.uint8)


def _onebit_linear_fake(
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    weight_1: Tensor | None = None,
    a_1: Tensor | None = None,
    b_1: Tensor | None = None,
) -> Tensor:
    check_onebit_linear(x, weight, a, b, bias, weight_1, a_1, b_1)
    return x.new_empty(*x.shape[:-1], a.shape[0])


def _onebit_linear_backward_fake(
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
    check_onebit_linear_backward(grad, x, weight, a, b, weight_1, a_1, b_1, needs)
    return tuple(
        tensor.new_empty(tensor.shape) if need and tensor is not None else x.new_empty(0)
        for tensor, need in zip((x, a, b, a_1, b_1), needs, strict=True)
    )


torch.library.register_fake("hf_onebit::pack", _pack_fake)
torch.library.register_fake("hf_onebit::unpack", _unpack_fake)
torch.library.register_fake("hf_onebit::onebit_linear", _onebit_linear_fake)
torch.library.register_fake("hf_onebit::onebit_linear_backward", _onebit_linear_backward_fake)


# --- autograd -----------------------------------------------------------------------------------------------
# Positions of onebit_linear's float arguments; the packed weights, 1 and 5, are integers without gradients.

_X, _A, _B, _BIAS, _A_1, _B_1 = 0, 2, 3, 4, 6, 7
_SCALES = (_A, _B, _A_1, _B_1)


def _needs_grad(ctx: Any) -> list[bool]:
    # The dispatcher drops trailing arguments that equal their defaults, so the context's list may be short.
    return [*ctx.needs_input_grad, *[False] * 8][:8]


def _setup_context(ctx: Any, inputs: tuple[Tensor | None, ...], output: Tensor) -> None:
    x, weight, a, b, bias, weight_1, a_1, b_1 = inputs
    # Only the scales' gradients read x. With frozen scales (adapter training) it is not kept alive.
    needs = _needs_grad(ctx)
    ctx.save_for_backward(x if any(needs[i] for i in _SCALES) else None, weight, a, b, weight_1, a_1, b_1)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _onebit_linear_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, a, b, weight_1, a_1, b_1 = ctx.saved_tensors
    wanted = _needs_grad(ctx)
    needs = [wanted[i] for i in (_X, *_SCALES)]
    grads: list[Tensor | None] = [None] * 8
    if wanted[_BIAS]:
        dtype = torch.float64 if grad.dtype == torch.float64 else torch.float32
        # Not Size.numel(): it would fix a dynamic batch size at the traced one.
        rows = grad.unsqueeze(0) if grad.dim() == 1 else grad.flatten(0, -2)
        grads[_BIAS] = rows.sum(0, dtype=dtype).to(ctx.bias_dtype)
    if any(needs):
        if x is None:  # nobody reads it: a stand-in of the right shape that takes no memory
            x = grad.new_zeros(()).expand(*grad.shape[:-1], b.shape[0])
        op = torch.ops.hf_onebit.onebit_linear_backward.default
        results = forward_mode.call_backward(op, grad, x, weight, a, b, weight_1, a_1, b_1, needs)
        for i, need, result in zip((_X, *_SCALES), needs, results, strict=True):
            grads[i] = result if need else None
    return tuple(grads)


forward_mode.register_autograd(
    torch.ops.hf_onebit.onebit_linear.default,
    _onebit_linear_autograd,
    _setup_context,
    linear_in=((_X,), (_A, _A_1), (_B, _B_1)),
    bias=_BIAS,
)
