"""``IndexParameter``: the order and groups of inputs as a parameter that never learns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["INDICES", "IndexParameter"]

INDICES = ("g_idx", "q_perm")
"""Names of the parameters that are indices."""


class IndexParameter(nn.Parameter):
    """Integers ``(in,)``: ``g_idx`` or ``q_perm`` of a packed layer.

    PyTorch raises where integers are asked to require gradients, and ``model.requires_grad_(True)`` asks every
    parameter. This one stays as it is, as one that cannot learn: ``requires_grad`` is False whatever is assigned.
    """

    def __new__(cls, data: Tensor, requires_grad: bool = False) -> Any:
        return torch.Tensor._make_subclass(cls, data.detach(), False)

    @classmethod
    def adopt(cls, parameter: nn.Parameter) -> None:
        """Make a plain parameter of integers one of these, without a new object: others may hold it too."""
        parameter.__class__ = cls
        # As for parameters of PyTorch's own class: sizes are no variables of a compiled graph.
        vars(parameter)["_dynamo_static_indices"] = set(range(parameter.dim()))

    @property
    def requires_grad(self) -> bool:
        return False

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        """Nothing to set."""

    def requires_grad_(self, requires_grad: bool = True) -> IndexParameter:
        """Nothing changes; returns the parameter."""
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        return type(self), (self.data,)
