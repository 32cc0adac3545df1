"""``SignWeightParameter``: the packed signs of a ``OneBitLinear`` as a parameter that can be trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_onebit.formats.onebit import dequantize
from hf_onebit.formats.packing import word_rows
from hf_onebit.formats.sign_layout import SignLayout
from hf_onebit.nn.parameter import MPQWeightParameter
from hf_onebit.nn.update_step import Layout

__all__ = ["SignWeightParameter"]


class SignWeightParameter(MPQWeightParameter):
    """One plane of signs, int32 ``(ceil(in / 32), out)``, standing for W[k, n] = a[n] s[k, n] b[k].

    Gradients, moves and copies are those of ``MPQWeightParameter``: ``privileged_grad`` is the gradient of the float
    weight ``(in, out)``. ``update`` flips signs by double momentum with inertia, unless ``rounding`` says "stochastic"
    or "nearest", where the float weight steps and its codes, 2 |a b| apart, are drawn or rounded.

    Attributes:
        a: ``(out,)`` float, of the module.
        b: ``(in,)`` float, of the module.
        in_features: rows of the float weight.
    """

    a: Tensor | None
    b: Tensor | None
    in_features: int
    rounding: str = "inertia"

    def float_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The float weight ``(in, out)`` of this plane."""
        self._require_updatable()
        layout = self._update_layout(None)
        assert isinstance(layout, SignLayout)
        return dequantize([(self.data, layout.a, layout.b)], layout.in_features, dtype).T

    def _require_updatable(self) -> None:
        a, b = vars(self).get("a"), vars(self).get("b")
        if a is None or b is None:
            raise ValueError("a or b is None: signs without scales stand for nothing; bind them to their module")
        words = word_rows(b.numel(), 1)
        if self.dtype != torch.int32 or tuple(self.shape) != (words, a.numel()):
            raise ValueError(
                f"packed signs must be int32 ({words}, {a.numel()}) for {b.numel()} inputs, got {self.dtype} "
                f"{tuple(self.shape)}"
            )

    def _update_layout(self, in_features: int | None) -> Layout:
        a, b = self.a, self.b
        assert a is not None  # both were looked at before
        assert b is not None
        return SignLayout(b.numel(), a.detach(), b.detach())

    def weight_layout(self, in_features: int | None = None) -> Any:
        """The signs as codes; see ``formats.sign_layout``."""
        self._require_updatable()
        return self._update_layout(in_features)
