"""``torch.ops.hf_onebit.onebit_linear_group``: several onebit layers of one input, in one call.

Schema, checks, fake and autograd formula, as in schema.py. Every list holds one tensor a layer; those of bias and of
the second plane are None where the layers have none. No list holds None itself: autograd does not look into such
lists.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_onebit.ops import forward_mode
from hf_onebit.ops.schema import check_onebit_linear

_NAMES = ("weight", "a", "b", "bias", "weight_1", "a_1", "b_1")
_List = Sequence[Tensor] | None

torch.library.define(
    "hf_onebit::onebit_linear_group",
    "(Tensor x, Tensor[] weight, Tensor[] a, Tensor[] b, Tensor[]? bias, Tensor[]? weight_1, Tensor[]? a_1, "
    "Tensor[]? b_1) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def layers_of(weight: Sequence[Tensor], *lists: _List) -> list[tuple[Any, ...]]:
    """[(weight, a, b, bias, weight_1, a_1, b_1)] of each layer, None for what is left out."""
    columns = [[None] * len(weight) if group is None else group for group in lists]
    return list(zip(weight, *columns, strict=True))


def check_onebit_linear_group(x: Tensor, weight: Sequence[Tensor], *lists: _List) -> None:
    """Refuse lists of different lengths, and layers that ``onebit_linear`` would refuse; RuntimeError."""
    op = "onebit_linear_group"
    count = len(weight)
    torch._check(count > 0, lambda: f"{op}: weight is empty, expected one tensor for each layer")
    for name, group in zip(_NAMES[1:], lists, strict=True):
        got = count if group is None else len(group)
        torch._check(
            got == count,
            lambda name=name, got=got: f"{op}: {name} has {got} tensors, expected {count}, one for each of weight",
        )
    for w, a, b, bias, weight_1, a_1, b_1 in layers_of(weight, *lists):
        check_onebit_linear(x, w, a, b, bias, weight_1, a_1, b_1, op)


def _fake(x: Tensor, weight: Sequence[Tensor], *lists: _List) -> list[Tensor]:
    check_onebit_linear_group(x, weight, *lists)
    return [x.new_empty(*x.shape[:-1], layer[1].shape[0]) for layer in layers_of(weight, *lists)]


# --- autograd -----------------------------------------------------------------------------------------------

_A, _B, _BIAS, _A_1, _B_1 = 1, 2, 3, 5, 6
_SCALES = (_A, _B, _A_1, _B_1)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, *lists = inputs
    # Only the scales' gradients read x. With frozen scales it is not kept alive.
    scales_train = any(t.requires_grad for place in _SCALES for t in lists[place] or ())
    ctx.bias_dtypes = None if lists[_BIAS] is None else [t.dtype for t in lists[_BIAS]]
    lists[_BIAS] = None
    ctx.given = [group is not None for group in lists]
    ctx.save_for_backward(x if scales_train else None, *(t for group in lists for t in group or ()))


def _autograd(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    x, *flat = ctx.saved_tensors
    count = len(grads)
    lists: list[Any] = []
    for given in ctx.given:
        lists.append(flat[:count] if given else None)
        flat = flat[count:] if given else flat
    needs_x, *needs = ctx.needs_input_grad
    results: list[Any] = [[None] * count if given else None for given in ctx.given]
    if ctx.bias_dtypes is not None:
        results[_BIAS] = [None] * count
    grad_x: Tensor | None = None
    for i, (grad, (weight, a, b, _, weight_1, a_1, b_1)) in enumerate(zip(grads, layers_of(*lists), strict=True)):
        if grad is None:  # nobody used this layer's output
            continue
        if ctx.bias_dtypes is not None and needs[_BIAS][i]:
            dtype = torch.float64 if grad.dtype == torch.float64 else torch.float32
            rows = grad.unsqueeze(0) if grad.dim() == 1 else grad.flatten(0, -2)
            results[_BIAS][i] = rows.sum(0, dtype=dtype).to(ctx.bias_dtypes[i])
        wanted = [needs_x, *(lists[place] is not None and needs[place][i] for place in _SCALES)]
        if not any(wanted):
            continue
        x_i = grad.new_zeros(()).expand(*grad.shape[:-1], b.shape[0]) if x is None else x
        op = torch.ops.hf_onebit.onebit_linear_backward.default
        found = forward_mode.call_backward(op, grad, x_i, weight, a, b, weight_1, a_1, b_1, wanted)
        if needs_x:
            grad_x = found[0] if grad_x is None else grad_x + found[0]
        for place, need, result in zip(_SCALES, wanted[1:], found[1:], strict=True):
            if need:
                results[place][i] = result
    return (grad_x, *results)


torch.library.register_fake("hf_onebit::onebit_linear_group", _fake)
torch.library.register_autograd("hf_onebit::onebit_linear_group", _autograd, setup_context=_setup_context)
