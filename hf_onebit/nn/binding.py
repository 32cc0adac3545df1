"""Modules that hold an ``MPQWeightParameter``: how it stays one, and how it gets its gradient.

Much of PyTorch makes parameters anew from their data and loses class and attributes (``load_state_dict(assign=True)``,
moves to the meta device, loaders, offloading hooks). So the module owns scales, zeros and indices, the weight's
attributes only point at them, and :meth:`BoundWeight.bind` points them again; the module calls it wherever its tensors
may have been replaced.

In backward the gradient of a layer is added by a node before the layer, not after it::

    x ── _Open ── product ── _Close ── y        _Close keeps dL/dy, the product makes dL/dx from the words, and only
                                                then _Open adds xᵀ dL/dy to the gradient of the weight

so a hook that waits for that gradient may change the words at once: nothing reads them any more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hf_onebit.argument_checks import require_module
from hf_onebit.nn.data_parallel import note_data_parallel, reducer_of
from hf_onebit.nn.index_parameter import INDICES, IndexParameter
from hf_onebit.nn.parameter import TRAINING, GradientFlag, MPQWeightParameter
from hf_onebit.nn.scale_bits import BYTES, SCALES, as_scales

__all__ = ["BoundWeight", "ignore_in_ddp"]

any_autocast: Callable[[], bool] = torch._C._is_any_autocast_enabled


def ignore_in_ddp(model: nn.Module) -> list[str]:
    """Put the packed weights of a model on the list that ``DistributedDataParallel`` passes over.

    It asks parameters in Python whether they require gradients, and packed ones may say yes to what autograd cannot
    do; their gradients are averaged by ``nn.data_parallel``. Call it on the very module that is wrapped, with
    everything in it; calling it again is fine.

    Returns:
        Names of the packed parameters.

    Raises:
        TypeError: the model is no module.
    """
    require_module("ignore_in_ddp", model)
    names = [
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, BoundWeight)
        for name in module.packed_names
        if isinstance(module._parameters.get(name), MPQWeightParameter)
    ]
    known = list(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
    added = [name for name in names if name not in known]
    model._ddp_params_and_buffers_to_ignore = [*known, *added]  # type: ignore[assignment]
    return names


class BoundWeight(nn.Module):
    """A module whose ``weight`` is an ``MPQWeightParameter`` with attributes that point at the module's own tensors."""

    in_features: int
    packed_names: tuple[str, ...] = ("weight",)
    packed_class: type[MPQWeightParameter] = MPQWeightParameter
    _gradient_flag = GradientFlag()  # until there is a weight
    _gradient_flag_1 = GradientFlag()  # of a second one

    def weight_attributes(self) -> dict[str, Any]:
        """The attributes of the weight by name, as they must be now."""
        raise NotImplementedError(f"{type(self).__name__} does not say what its weight's attributes are")

    def attributes_of(self, name: str) -> dict[str, Any]:
        """:meth:`weight_attributes` of each of the ``packed_names``."""
        return self.weight_attributes()

    def bind(self) -> None:
        """Make the weight an ``MPQWeightParameter`` again, where it no longer is, and point its attributes at the
        module's tensors. A weight that is not packed, as loaders put in its place for a while, is left alone. Indices
        become ones that ``requires_grad_`` of the whole model passes over.
        """
        for name in INDICES:
            index = self._parameters.get(name)
            if type(index) is nn.Parameter and not index.is_floating_point():
                IndexParameter.adopt(index)
        for name in self.packed_names:
            weight = self._parameters.get(name)
            if weight is None or weight.dtype != torch.int32:
                continue
            if type(weight) is nn.Parameter:
                # Not a new object: other modules (a tied embedding) may hold this one.
                weight = self.packed_class.adopt(weight)
            if isinstance(weight, MPQWeightParameter):
                vars(weight).update(self.attributes_of(name))
                # What torch.compile does by itself for parameters that are of no other class: sizes of weights are no
                # variables, or it takes a batch of 2 for the same number as 2 rows of words.
                vars(weight)["_dynamo_static_indices"] = set(range(weight.dim()))
                if name == "weight":
                    self._gradient_flag = weight.gradient_flag
                else:
                    self._gradient_flag_1 = weight.gradient_flag

    def __setattr__(self, name: str, value: Any) -> None:
        # FSDP2 puts gathered parameters in this way (past a class that has no __setattr__ of its own), cast by then.
        rounded = name in SCALES and getattr(value, "dtype", None) == torch.bfloat16
        if rounded and hasattr(self._parameters.get(name), "full_tensor"):
            raise RuntimeError(
                f"FSDP2's mixed precision has rounded {name} of a {type(self).__name__} to bfloat16. Call "
                "hf_onebit.nn.prepare_for_fsdp(model) before fully_shard; scales that learn need a policy without "
                "param_dtype"
            )
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        try:
            value = super().__getattr__(name)
        except AttributeError:
            stored = vars(self).get("_parameters", {}).get(name + BYTES) if name in SCALES else None
            if stored is None:
                raise
            return as_scales(stored)
        # Offloading hooks write into the table of parameters itself, so nothing else notices.
        if name in self.packed_names and not self._is_bound(value, name):
            self.bind()
        return value

    def _is_bound(self, weight: Any, name: str) -> bool:
        return getattr(weight, "scales", None) is self._parameters.get("scales")

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        super().register_parameter(name, param)
        self.bind()

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        def plain(tensor: Tensor) -> Any:
            # nn.Parameter refuses to be made of a parameter of another class, which fn may have returned as it was.
            moved = fn(tensor)
            return moved.detach() if isinstance(moved, (MPQWeightParameter, IndexParameter)) else moved

        return self._rebuilding(lambda: super(BoundWeight, self)._apply(plain, recurse))

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._rebuilding(lambda: super(BoundWeight, self)._load_from_state_dict(*args, **kwargs))

    def _rebuilding(self, work: Callable[[], Any]) -> Any:
        """Run what may make parameters anew from their data and ``requires_grad``, which integers must not have."""
        own = {name: self._parameters.get(name) for name in self.packed_names}
        before = {n: w for n, w in own.items() if isinstance(w, MPQWeightParameter) and w.is_packed}
        kept = {name: (weight.requires_grad, weight.privileged_grad) for name, weight in before.items()}
        for weight in before.values():
            weight.requires_grad, weight.privileged_grad = False, None
        try:
            return work()
        finally:
            self.bind()
            for name, weight in before.items():
                learns, gradient = kept[name]
                weight.requires_grad = learns
                now = self._parameters.get(name)
                if isinstance(now, MPQWeightParameter) and now.is_packed:
                    now.requires_grad = learns
                    vars(now).update({key: vars(weight)[key] for key in TRAINING if key in vars(weight)})
                    # A gradient on meta has no values to come back with.
                    if gradient is not None and (now.is_meta or not gradient.is_meta):
                        now.privileged_grad = gradient.to(now.device)

    def compute(self, x: Tensor) -> Tensor:
        """The layer's result for its input (of an embedding: ids), from the packed words as they are."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it computes")

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) floating point -> (..., out_features) of the same dtype, or of autocast's."""
        # The words alone would take any width that needs as many of them.
        width = self.__dict__.get("local_in_features", self.in_features)  # of this rank, under tensor parallelism
        if input.shape[-1:] != (width,):
            raise RuntimeError(f"{type(self).__name__} got x of shape {tuple(input.shape)}, expected (..., {width})")
        asked = torch.compiler.is_compiling() or any_autocast()
        if asked and not input.is_meta and torch.is_autocast_enabled(input.device.type) and input.is_floating_point():
            input = input.to(torch.get_autocast_dtype(input.device.type))
        if self._gradient_flag.on or self._gradient_flag_1.on:
            return self._learning(input) if torch.is_grad_enabled() else self._evaluating(input)
        return self.compute(input)

    def held(self, *names: str) -> tuple[Any, ...]:
        """Parameters by name; as the module holds them, past ``nn.Module.__getattr__``, where nothing is in between."""
        own = self._parameters
        if torch.compiler.is_compiling() or any(name not in own for name in names):  # traced, or parametrized
            return tuple(getattr(self, name) for name in names)
        return tuple([own[name] for name in names])

    @torch.compiler.disable  # what is traced must not meet integers that say they require gradients
    def _learning(self, x: Tensor) -> Tensor:
        weights = self._learning_weights()
        note_data_parallel(weights)
        # Anchors, empty tensors that learn, make backward come here when nothing else does.
        anchors = [weight.gradient_anchor(x.device) for weight in weights]
        seen = _Seen(self, weights)
        if x.is_floating_point():
            y: Tensor = _Close.apply(self.compute(_Open.apply(x, seen, *anchors)), None, seen)
        else:
            y = self._learning_of_ids(x, seen, anchors)
        return y

    @torch.compiler.disable  # as above
    def _evaluating(self, x: Tensor) -> Tensor:
        """The result of weights that learn where nothing is recorded."""
        note_data_parallel(self._learning_weights())  # reentrant checkpointing comes to _learning outside of it
        return self.compute(x)

    def _learning_weights(self) -> tuple[MPQWeightParameter, ...]:
        held = [getattr(self, name) for name in self.packed_names]
        return tuple(w for w in held if isinstance(w, MPQWeightParameter) and w.requires_grad)

    def _learning_of_ids(self, ids: Tensor, seen: _Seen, anchors: list[Tensor]) -> Tensor:
        # Ids take no gradient, so nothing waits for the product's backward; these nodes are older than it, and of
        # two that are ready the engine takes the younger one first.
        early = [_Pass.apply(anchor) for anchor in anchors]
        y: Tensor = _Close.apply(self.compute(ids), ids, seen, *early)
        return y

    def add_gradient(self, weight: MPQWeightParameter, x: Tensor, grad: Tensor) -> None:
        """Add to the weight's gradient what one backward pass through this layer gives."""
        weight.add_gradient(x, grad)


class _Seen:
    """What the two nodes around one use of a layer share."""

    __slots__ = ("grad", "layer", "weights")

    def __init__(self, layer: BoundWeight, weights: tuple[MPQWeightParameter, ...]) -> None:
        self.layer, self.weights = layer, weights
        self.grad: Tensor | None = None

    def add(self, x: Tensor, grad: Tensor) -> None:
        for weight in self.weights:
            self.layer.add_gradient(weight, x, grad)
            reducer = reducer_of(weight)
            if reducer is not None:
                reducer.ask()


class _Open(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, seen: _Seen, *anchors: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.seen = seen
        ctx.set_materialize_grads(False)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (x,) = ctx.saved_tensors
        seen: _Seen = ctx.seen
        if seen.grad is not None:
            seen.add(x, seen.grad)
            seen.grad = None
        return grads[0], None, *(None for _ in seen.weights)


class _Close(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, ids: Tensor | None, seen: _Seen, *anchors: Tensor) -> Tensor:
        ctx.with_ids = ids is not None
        ctx.save_for_backward(*(() if ids is None else (ids,)))
        ctx.seen = seen
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        seen: _Seen = ctx.seen
        if not ctx.with_ids:
            seen.grad = grads[0]
            return grads[0], None, None
        seen.add(ctx.saved_tensors[0], grads[0])
        return grads[0], None, None, *(None for _ in seen.weights)


class _Pass(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        return anchor.view_as(anchor)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0]
