"""A model's parameters in another dtype, its buffers as exact as they were."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

__all__ = ["cast"]


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Have a model compute in ``dtype``, in place, and return it in eval mode.

    Its parameters are cast. Its float buffers keep what ``dtype`` cannot hold, in their own dtype: the angles of rotary
    embeddings, for example, are frequencies times positions. Only where the model would not compute in ``dtype`` then
    are they rounded too.
    """
    buffers = _float_buffers(model)
    model.to(dtype).eval()
    rounded = _float_buffers(model)
    exact = {key: value for key, value in buffers.items() if not torch.equal(rounded[key].to(value.dtype), value)}
    if exact:
        expected = _answered_dtype(model)
        _set_buffers(exact)
        if _answered_dtype(model) != expected:
            _set_buffers(rounded)
    return model


def _float_buffers(model: nn.Module) -> dict[tuple[nn.Module, str], Tensor]:
    """By the module that has it, and its name there."""
    return {
        (module, name): buffer
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False)
        if buffer.is_floating_point()
    }


def _set_buffers(buffers: Mapping[tuple[nn.Module, str], Tensor]) -> None:
    for (module, name), buffer in buffers.items():
        setattr(module, name, buffer)


@torch.no_grad()
def _answered_dtype(model: nn.Module) -> torch.dtype | None:
    """Of what a model says to two tokens; None where it fails."""
    device = next(model.parameters()).device
    # What goes wrong where dtypes do not fit depends on the model; any other error comes up again where it is used.
    with contextlib.suppress(Exception):
        found: Tensor = model(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=device))[0]
        return found.dtype
    return None
