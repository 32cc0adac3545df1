"""Modules that hold an ``MPQWeightParameter``: how it stays one, and how it gets its gradient.

Much of PyTorch makes parameters anew from their data and loses class and attributes (``load_state_dict(assign=True)``,
moves to the meta device, loaders, offloading hooks). So the module owns scales, zeros and indices, the weight's
attributes only point at them, and :meth:`BoundWeight.bind` points them again; the module calls it wherever its tensors
may have been replaced.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hf_onebit.nn.parameter import GradientFlag, MPQWeightParameter

__all__ = ["BoundWeight", "ignore_in_ddp"]

any_autocast: Callable[[], bool] = torch._C._is_any_autocast_enabled


def ignore_in_ddp(model: nn.Module) -> list[str]:
    """Put the packed weights of a model on the list that ``DistributedDataParallel`` passes over.

    It asks parameters in Python whether they require gradients, and packed ones may say yes to what autograd cannot
    do. Call it on the very module that is wrapped, with everything in it; calling it again is fine.

    Returns:
        Names of the packed parameters.
    """
    names = [
        f"{prefix}.weight" if prefix else "weight"
        for prefix, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, BoundWeight)
    ]
    known = list(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
    added = [name for name in names if name not in known]
    model._ddp_params_and_buffers_to_ignore = [*known, *added]  # type: ignore[assignment]
    return names


class BoundWeight(nn.Module):
    """A module whose ``weight`` is an ``MPQWeightParameter`` with attributes that point at the module's own tensors."""

    in_features: int
    _gradient_flag = GradientFlag()  # until there is a weight

    def weight_attributes(self) -> dict[str, Any]:
        """The attributes of the weight by name, as they must be now."""
        raise NotImplementedError(f"{type(self).__name__} does not say what its weight's attributes are")

    def bind(self) -> None:
        """Make the weight an ``MPQWeightParameter`` again, where it no longer is, and point its attributes at the
        module's tensors. A weight that is not packed, as loaders put in its place for a while, is left alone.
        """
        weight = self._parameters.get("weight")
        if weight is None or weight.dtype != torch.int32:
            return
        if type(weight) is nn.Parameter:
            # Not a new object: other modules (a tied embedding) may hold this one.
            weight = MPQWeightParameter.adopt(weight)
        if isinstance(weight, MPQWeightParameter):
            vars(weight).update(self.weight_attributes())
            self._gradient_flag = weight.gradient_flag

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        # Offloading hooks write into the table of parameters itself, so nothing else notices.
        if name == "weight" and not self._is_bound(value):
            self.bind()
        return value

    def _is_bound(self, weight: Any) -> bool:
        return getattr(weight, "scales", None) is self._parameters.get("scales")

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        super().register_parameter(name, param)
        self.bind()

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        def plain(tensor: Tensor) -> Any:
            # nn.Parameter refuses to be made of a parameter of another class, which fn may have returned as it was.
            moved = fn(tensor)
            return moved.detach() if isinstance(moved, MPQWeightParameter) else moved

        return self._rebuilding(lambda: super(BoundWeight, self)._apply(plain, recurse))

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._rebuilding(lambda: super(BoundWeight, self)._load_from_state_dict(*args, **kwargs))

    def _rebuilding(self, work: Callable[[], Any]) -> Any:
        """Run what may make parameters anew from their data and ``requires_grad``, which integers must not have."""
        weight = self._parameters.get("weight")
        if not isinstance(weight, MPQWeightParameter) or not weight.is_packed:
            result = work()
            self.bind()
            return result
        learns, gradient = weight.requires_grad, weight.privileged_grad
        weight.requires_grad, weight.privileged_grad = False, None
        try:
            return work()
        finally:
            self.bind()
            now = self._parameters.get("weight")
            weight.requires_grad = learns
            if isinstance(now, MPQWeightParameter) and now.is_packed:
                now.requires_grad = learns
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
        if self._gradient_flag.on and torch.is_grad_enabled():
            return self._learning(input)
        return self.compute(input)

    def held(self, *names: str) -> tuple[Any, ...]:
        """Parameters by name; as the module holds them, past ``nn.Module.__getattr__``, where nothing is in between."""
        own = self._parameters
        if torch.compiler.is_compiling() or any(name not in own for name in names):  # traced, or parametrized
            return tuple(getattr(self, name) for name in names)
        return tuple([own[name] for name in names])

    @torch.compiler.disable  # what is traced must not meet integers that say they require gradients
    def _learning(self, x: Tensor) -> Tensor:
        # The anchor, an empty tensor that learns, makes backward come here when nothing else does.
        anchor = torch.empty(0, device=x.device, requires_grad=True)
        y: Tensor = _Collect.apply(self.compute(x), x.detach(), anchor, self)
        return y

    def add_gradient(self, weight: MPQWeightParameter, x: Tensor, grad: Tensor) -> None:
        """Add to the weight's gradient what one backward pass through this layer gives."""
        weight.add_gradient(x, grad)


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, anchor: Tensor, layer: BoundWeight) -> Tensor:
        ctx.save_for_backward(x)
        ctx.layer, ctx.weight = layer, layer._parameters["weight"]
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        ctx.layer.add_gradient(ctx.weight, x, grads[0])
        return grads[0], None, None, None
