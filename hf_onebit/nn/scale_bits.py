"""Scales as their bytes, uint8 ``(..., 2)`` for float16 ``(...)``, which nothing casts (``nn.fsdp``).

Bytes, since neither gloo nor NCCL has integers of 16 bits; in a dimension of their own, so that no shard cuts a value.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["BYTES", "SCALES", "as_bytes", "as_scales"]

SCALES = ("a", "b", "a_1", "b_1", "scales", "zeros")
"""Names of the parameters that are scales."""
BYTES = "_bytes"
"""What is added to the name of a scale that is stored as its bytes."""


def as_bytes(scales: Tensor) -> Tensor:
    """The bytes of float16 values; shares memory where they are contiguous."""
    return scales.detach().contiguous().view(torch.uint8).view(*scales.shape, 2)


def as_scales(stored: Tensor) -> Tensor:
    """Undo :func:`as_bytes`; shares memory. Of a sharded tensor, sharded likewise."""
    local: Any = getattr(stored, "to_local", None)
    if local is None:
        return stored.detach().view(torch.float16).squeeze(-1)
    from torch.distributed.tensor import DTensor

    whole: Any = stored
    shape = torch.Size(stored.shape[:-1])
    stride = torch.empty(shape, device="meta").stride()
    mesh, placements = whole.device_mesh, whole.placements
    return DTensor.from_local(as_scales(local()), mesh, placements, run_check=False, shape=shape, stride=stride)
