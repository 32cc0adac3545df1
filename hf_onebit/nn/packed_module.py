"""What the packed modules share: statistics that keep their dtype, parameters from specs, checks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_onebit.formats.mpq import Specs


class KeepsScales(nn.Module):
    """A module whose statistics keep their dtype under ``.to(dtype)``, ``.half()`` and the like."""

    @property
    def scale_names(self) -> tuple[str, ...]:
        """Names of the float16 parameters that this module has."""
        raise NotImplementedError(f"{type(self).__name__} does not say what its scales are")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # .to(bfloat16) would round the scales; they follow the device only.
        scales = [getattr(self, name) for name in self.scale_names]
        kept = {id(t) for p in scales for t in (p, p.grad) if t is not None}

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if id(tensor) in kept and moved.dtype != tensor.dtype:
                return tensor.to(moved.device)
            return moved

        return super()._apply(keep_dtype, recurse)


def register_packed(module: nn.Module, specs: Specs, names: tuple[str, ...], device: Any) -> None:
    """Uninitialised frozen parameters of ``specs``, and None for the names that are not among them."""
    for name in names:
        if name not in specs:
            module.register_parameter(name, None)
            continue
        shape, dtype = specs[name]
        empty = torch.empty(shape, dtype=dtype, device=device)
        module.register_parameter(name, nn.Parameter(empty, requires_grad=False))
    # Transformers' weight initialisation must leave packed words alone, even when a checkpoint lacks them: the loader
    # then reports what is missing.
    module._is_hf_initialized = True  # type: ignore[assignment]


def copy_tensors(module: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Copy tensors into the parameters of the same names.

    Raises:
        ValueError: the module has no such parameter.
    """
    own = dict(module.named_parameters(recurse=False))
    unknown = sorted(set(tensors) - set(own))
    if unknown:
        raise ValueError(f"{where}: got {', '.join(unknown)}, this module has {', '.join(own)}")
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)


def begin_linear(module: Any, in_features: int, out_features: int, source: str) -> None:
    """Set the sizes of a new linear layer; ValueError if there are no such layers."""
    what = type(module).__name__
    check_whole(what, "in_features", in_features, 1)
    check_whole(what, "out_features", out_features, 1)
    if source not in ("Linear", "Conv1D"):
        raise ValueError(f"{what} got source={source!r}: expected 'Linear' or 'Conv1D'")
    module.in_features, module.out_features, module.source = in_features, out_features, source


def check_index(what: str, name: str, given: Any, in_features: int) -> bool | Tensor:
    """True, False, or a tensor of one integer for each input; ValueError for anything else."""
    if isinstance(given, bool):
        return given
    integers = isinstance(given, Tensor) and not given.is_floating_point() and not given.is_complex()
    if not integers or tuple(given.shape) != (in_features,):
        got = f"{given.dtype} {tuple(given.shape)}" if isinstance(given, Tensor) else repr(given)
        raise ValueError(f"{what} got {name}={got}: expected True, False, or ({in_features},) integers")
    found: Tensor = given
    return found


def check_whole(what: str, name: str, value: Any, least: int, most: int | None = None) -> None:
    """ValueError unless ``value`` is a whole number from ``least`` to ``most``."""
    if type(value) is not int or value < least or (most is not None and value > most):
        limits = f">= {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{what} got {name}={value!r}: expected a whole number {limits}")
