"""The signs of a ``onebit`` plane as codes, for what works on codes: W[k, n] = 2 a[n] b[k] q[k, n] - a[n] b[k]."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_onebit.formats.packing import pack, unpack_rows

__all__ = ["SignLayout"]


@dataclass(frozen=True)
class SignLayout:
    """One plane ``(in, out)``.

    Attributes:
        in_features: K, rows of the matrix.
        a: ``(out,)``, float.
        b: ``(in,)``, float.
    """

    in_features: int
    a: Tensor
    b: Tensor

    @property
    def perm(self) -> Tensor | None:
        """Inputs are in their own order."""
        return None

    def unpack(self, words: Tensor) -> Tensor:
        """Codes uint8 ``(in, columns)``, 1 for +, of some columns of the words."""
        return unpack_rows(words, 1, self.in_features)

    def pack(self, codes: Tensor) -> Tensor:
        """Undo :meth:`unpack`."""
        return pack(codes.T, 1, check=False)

    def levels(self) -> Tensor:
        """uint8 ``(in, 1)``: ones."""
        return torch.ones(self.in_features, 1, dtype=torch.uint8, device=self.b.device)

    def affine(self, columns: slice, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(scale, offset) ``(in, columns)``, so that W = scale * code - offset."""
        offset = self.b.to(dtype)[:, None] * self.a[columns].to(dtype)[None, :]
        return 2 * offset, offset
