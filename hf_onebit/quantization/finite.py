"""Float models whose tensors hold NaN or inf are refused before any work goes into them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from hf_onebit.counts import counted

_REMEDY = (
    "the float checkpoint is damaged, or was loaded in a dtype that cannot hold its values. Download it again, or load "
    "it in float32 or bfloat16"
)


def check_finite(parameter: Tensor, name: str) -> None:
    """Refuse a parameter that holds NaN or inf; one without values (on the meta device) passes.

    Args:
        parameter: of any shape and dtype.
        name: its full name.

    Raises:
        ValueError: naming it, how many values, and the remedy.
    """
    if not _has_values(parameter):
        return
    # Neither is finite where any value is not, and they take no second tensor of that size.
    if not all(math.isfinite(float(value)) for value in torch.aminmax(parameter)):
        bad = parameter.numel() - int(parameter.isfinite().sum())
        raise ValueError(f"{name} holds {counted(bad, 'NaN or inf value')} of {parameter.numel()}: {_REMEDY}")


def check_buffer(buffer: Tensor, name: str) -> None:
    """The same of a buffer, in which inf may have a meaning (attention masks) and NaN has none."""
    if _has_values(buffer) and math.isnan(float(torch.aminmax(buffer).min)):
        bad = int(buffer.isnan().sum())
        raise ValueError(f"{name} holds {counted(bad, 'NaN value')} of {buffer.numel()}: {_REMEDY}")


def check_finite_model(model: nn.Module) -> None:
    """Refuse a model any of whose parameters holds NaN or inf, or of whose stored buffers NaN.

    Raises:
        ValueError: as ``check_finite``.
    """
    for name, parameter in model.named_parameters():
        check_finite(parameter.detach(), name)
    for prefix, module in model.named_modules():
        for key, buffer in module._buffers.items():
            # What the model's own code makes is no part of a checkpoint, and may be memory not written yet.
            if buffer is not None and key not in module._non_persistent_buffers_set:
                check_buffer(buffer, f"{prefix}.{key}" if prefix else key)


def _has_values(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and not tensor.is_meta and tensor.numel() > 0
