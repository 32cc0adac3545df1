"""Layers that read the same tensor, q/k/v or gate/up, computed in one call.

Nothing about the model changes: no parameter moves, no module is replaced, state_dict and checkpoints stay as they
are. The first layer of a group that is called computes all of them and keeps the others' results until they are asked
for the same tensor. Groups are guessed from names and believed only after a call in which every layer got that tensor.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hf_onebit import ops
from hf_onebit.argument_checks import require_module
from hf_onebit.nn.linear import OneBitLinear, any_autocast, held_tensors

# Names under one parent that usually get one input. A wrong guess costs a comparison a call.
SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("query_proj", "key_proj", "value_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
    ("to_q", "to_k", "to_v"),
    ("gate_proj", "up_proj"),
    ("wi_0", "wi_1"),
    ("w1", "w3"),
)
_OPTIONAL = range(3, 7)  # bias and the second plane, in the order of held_tensors
_MOST_MISSES = 8  # results computed in vain, in calls, before a group is given up


def fuse_projections(model: nn.Module) -> int:
    """Let sibling layers that get the same input, q/k/v or gate/up, be computed in one call.

    Results keep their bits. What is fused is decided in each call: two layers are when the second is called with the
    very tensor that the first got, unchanged since (writes through ``.data`` are not seen). Calls that record
    gradients, run under autocast, in inference mode (whose tensors do not count their changes), in a function transform
    or in ``torch.compile``, and layers with forward pre-hooks, with cached signs or on another device, are computed one
    by one as before. Copies and pickles of a model are not fused.

    Args:
        model: any module that holds packed layers, with or without adapters around them.

    Returns:
        How many groups there are now.

    Raises:
        TypeError: the model is no module.
    """
    require_module("fuse_projections", model)
    unfuse_projections(model)
    count = 0
    for parent in model.modules():
        for layers in _sibling_layers(parent):
            group = _ProjectionGroup(layers)
            for layer in layers:
                layer._group = group
            count += 1
    return count


def unfuse_projections(model: nn.Module) -> int:
    """Undo :func:`fuse_projections`.

    Returns:
        How many groups there were.

    Raises:
        TypeError: the model is no module.
    """
    require_module("unfuse_projections", model)
    groups = set()
    for module in model.modules():
        if isinstance(module, OneBitLinear) and module._group is not None:
            groups.add(id(module._group))
            module._group = None
    return len(groups)


def _sibling_layers(parent: nn.Module) -> Iterator[list[OneBitLinear]]:
    """Packed children that the table puts together, and that one call of the operator can take."""
    children = dict(parent.named_children())
    for names in SIBLINGS:
        alike: dict[tuple[int, int, bool], list[OneBitLinear]] = {}
        for child in (children.get(name) for name in names):
            layer = child if isinstance(child, OneBitLinear) else getattr(child, "base_layer", None)  # an adapter's
            if isinstance(layer, OneBitLinear):
                alike.setdefault((layer.in_features, layer.planes, layer.bias is not None), []).append(layer)
        # One module under two names is called twice: its second result would be missing.
        yield from (layers for layers in alike.values() if len(set(layers)) == len(layers) > 1)


class _Call:
    """One input of a group: the outputs not yet asked for, or None for each while the group is on trial."""

    __slots__ = ("outputs", "version", "x")

    def __init__(self, group: _ProjectionGroup, x: Tensor, outputs: dict[OneBitLinear, Tensor | None]) -> None:
        self.outputs = outputs
        self.version = x._version
        # Nobody can ask any more when x is gone, after an exception say: then nothing is kept either.
        self.x = weakref.ref(x, lambda _: group.give_up(outputs))


class _OfThread(threading.local):
    call: _Call | None = None


class _ProjectionGroup:
    """Layers computed together. Threads know nothing of each other's calls."""

    def __init__(self, layers: list[OneBitLinear]) -> None:
        self._layers = tuple(layers)
        self._proven = False
        self._misses = 0
        self._thread = _OfThread()

    def output_of(self, layer: OneBitLinear, x: Tensor) -> Tensor | None:
        """The output of ``layer`` for ``x``, or None where it must be computed alone."""
        if torch.is_grad_enabled() or any_autocast() or x.is_inference():
            return None
        call = self._thread.call
        if call is not None and call.x() is x and call.version == x._version and layer in call.outputs:
            y = call.outputs.pop(layer)
            if not call.outputs:
                self._thread.call = None
                self._proven = True
            return y
        if call is not None:
            self._thread.call = None
            self.give_up(call.outputs)
        return self._begin(layer, x)

    def give_up(self, outputs: dict[OneBitLinear, Tensor | None]) -> None:
        """Drop what nobody asked for; a group that does this often is no group."""
        if any(y is not None for y in outputs.values()):
            self._proven = False
            self._misses += 1
        outputs.clear()

    def _begin(self, layer: OneBitLinear, x: Tensor) -> Tensor | None:
        layers = self._layers
        if self._misses >= _MOST_MISSES or not any(layer is known for known in layers):  # a replica shares the group
            return None
        if not self._proven:
            self._thread.call = _Call(self, x, {other: None for other in layers if other is not layer})
            return None
        lists = self._arguments(x)
        if lists is None:
            return None
        outputs: dict[OneBitLinear, Tensor | None] = dict(zip(layers, ops.onebit_linear_group(x, *lists), strict=True))
        y = outputs.pop(layer)
        self._thread.call = _Call(self, x, outputs)
        return y

    def _arguments(self, x: Tensor) -> list[Any] | None:
        """The operator's lists, from what the layers hold now; None if they cannot be computed together."""
        if torch._C._functorch.peek_interpreter_stack() is not None:  # vmap and the like know no lists
            return None
        device = x.device
        rows = []
        for layer in self._layers:
            tensors = held_tensors(layer)
            if tensors is None or layer._use_cache or layer._forward_pre_hooks or tensors[0].device != device:
                return None
            rows.append(tensors)
        lists: list[Any] = list(zip(*rows, strict=True))
        for place in _OPTIONAL:
            column = lists[place]
            absent = column[0] is None
            for tensor in column:
                if (tensor is None) != absent:
                    return None
            if absent:
                lists[place] = None
        return lists
