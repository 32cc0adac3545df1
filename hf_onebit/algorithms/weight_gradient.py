"""The gradient of the loss by a layer's weight, from the layer's inputs and the gradient of its outputs."""

from __future__ import annotations

import torch
from torch import Tensor

# Fewer tokens than these are read fast enough across their rows.
_MANY = 1024


def weight_gradient(gy: Tensor, x: Tensor) -> Tensor:
    """∂L/∂W = Σ_t gy_t x_tᵀ, float32 (out, in), rounded once to the factors' dtype.

    The product of many tokens reads both factors along tokens, a row apart each. The narrower one is turned round
    first, which costs little, and on a CPU halves the time.

    Args:
        gy: (..., out), and x: (..., in), of one dtype and as many tokens.
    """
    rows, columns = gy.reshape(-1, gy.shape[-1]), x.reshape(-1, x.shape[-1])
    if len(rows) < _MANY:
        return (rows.t() @ columns).float()
    out_features, in_features = rows.shape[1], columns.shape[1]
    if out_features <= in_features:
        return (rows.t().contiguous() @ columns).float()
    turned = columns.t().contiguous() @ rows
    return torch.empty(out_features, in_features, device=x.device).copy_(turned.t())
