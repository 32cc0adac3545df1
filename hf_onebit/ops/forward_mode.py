"""Derivatives in forward mode: dual numbers, ``torch.func.jvp`` and ``jacfwd``.

What ``torch.library`` registers is for reverse mode. Called with dual numbers, such an operator drops their tangents
and says nothing, so while a forward level is open the functions of ``hf_onebit.ops`` come here instead. Here each
operator is an ``autograd.Function`` too: backward is the registered formula, and the tangent needs none of its own, for
the operators are linear in each of their float arguments.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["call", "call_backward", "register_autograd"]

_functions: dict[Any, type[torch.autograd.Function]] = {}


@torch._disable_dynamo  # which traces no tangents; torch.compiler.disable would import all of it now
def call(op: Any, *args: Any) -> Any:
    """An operator with all of its arguments, differentiable in both modes."""
    return _functions[op].apply(*_whole(args))


def call_backward(op: Any, *args: Any) -> Any:
    """An operator that computes gradients.

    Raises:
        NotImplementedError: one of its arguments carries a tangent.
    """
    if forward_ad._current_level < 0 and not torch._C._are_functorch_transforms_active():
        return op(*args)
    return _Gradients.apply(op, *_whole(args))  # torch.func.grad records it, whether or not anyone asks for more


def register_autograd(
    op: Any,
    backward: Callable[..., tuple[Any, ...]],
    setup_context: Callable[[Any, tuple[Any, ...], Any], None],
    linear_in: Sequence[Sequence[int]],
    bias: int | None = None,
) -> None:
    """Register an operator's formula with ``torch.library``, and the operator with :func:`call`.

    The operator of its gradients, which has the same name and ``_backward`` after it, is registered with a formula that
    refuses: there are no second derivatives.

    Args:
        op: the operator; one tensor is its result.
        backward: the formula, as for ``torch.library.register_autograd``.
        setup_context: as there; it reads no output.
        linear_in: positions of the float arguments but the bias; those in which the result is linear together are
            one group.
        bias: position of what is added to the result, if there is one.
    """

    class Product(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*args: Any) -> Any:
            return op(*_plain(args))

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            tensors = [t if isinstance(t, Tensor) else None for t in inputs]
            ctx.others = [None if isinstance(t, Tensor) else t for t in inputs]
            ctx.save_for_backward(*tensors)  # under torch.func the two have to be the same
            ctx.save_for_forward(*tensors)
            ctx.set_materialize_grads(False)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            if grads[0] is None:
                return (None,) * len(ctx.others)
            context = _Context(ctx.needs_input_grad)
            setup_context(context, _plain(_inputs(ctx)), None)
            return backward(context, *grads)

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            inputs = _inputs(ctx)
            terms = [
                Product.apply(*_with_tangents(inputs, tangents, group, bias))
                for group in linear_in
                if any(tangents[i] is not None for i in group)
            ]
            if bias is not None and tangents[bias] is not None:
                x, b = inputs[0], tangents[bias]
                terms.append(b.to(x.dtype).expand(*x.shape[:-1], *b.shape).clone())
            return sum(terms[1:], terms[0])

    Product.__name__ = Product.__qualname__ = op._schema.name.rpartition("::")[2]
    _functions[op] = Product
    torch.library.register_autograd(op, backward, setup_context=setup_context)
    torch.library.register_autograd(f"hf_onebit::{Product.__name__}_backward", _refusal(Product.__name__))


class _Numbers:
    """A list of numbers as one argument: vmap would take each of them for one."""

    __slots__ = ("values",)

    def __init__(self, values: Sequence[int]) -> None:
        self.values = values


def _whole(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(_Numbers(arg) if isinstance(arg, (list, tuple)) else arg for arg in args)


def _plain(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(arg.values if isinstance(arg, _Numbers) else arg for arg in args)


class _Context:
    """What a formula of ``torch.library`` reads of its own context."""

    def __init__(self, needs_input_grad: tuple[bool, ...]) -> None:
        self.needs_input_grad = needs_input_grad
        self.saved_tensors: tuple[Tensor | None, ...] = ()

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors


def _inputs(ctx: Any) -> tuple[Any, ...]:
    """The arguments that a Product was called with."""
    return tuple(o if t is None else t for t, o in zip(ctx.saved_tensors, ctx.others, strict=True))


def _with_tangents(
    inputs: tuple[Any, ...], tangents: tuple[Any, ...], group: Sequence[int], bias: int | None
) -> list[Any]:
    """The arguments with a group's tangents in the places of its values, and without the bias."""
    args = list(inputs)
    for i in group:
        if inputs[i] is not None:
            args[i] = torch.zeros_like(inputs[i]) if tangents[i] is None else tangents[i]
    if bias is not None:
        args[bias] = None
    return args


class _Gradients(torch.autograd.Function):
    """A gradient's operator, which cannot be differentiated itself."""

    generate_vmap_rule = True

    @staticmethod
    def forward(op: Any, *args: Any) -> Any:
        return op(*_plain(args))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.name = inputs[0]._schema.name.rpartition("::")[2].removesuffix("_backward")

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        _refusal(ctx.name)(ctx, *grads)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        _refusal(ctx.name)(ctx, *tangents)


def _refusal(name: str) -> Callable[..., Any]:
    """The formula of an operator's gradients, in either mode."""

    def refuse(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(
            f"{name} has first derivatives only, got a request for second ones: a gradient of it is differentiated in "
            "turn; take the gradient without create_graph=True and outside of forward mode, or dequantize the layers "
            "first"
        )

    return refuse
