"""A float64 product that errs less than the kernels that are held to it, whatever library multiplies."""

import torch
from torch import Tensor
from torch.nn import functional as F

# Rows of 16 bits from which instruction sets take inputs as codes, with a wider bound: the table of docs/kernels.md.
CODES_FROM = {"avx2": 32, "avx512vnni": 128, "amx": 6}

_PIECE = 32


def product(A: Tensor, B: Tensor) -> Tensor:
    """A @ B for float64 (rows, n) and (n, columns), summed in pieces of few terms and then over the pieces.

    Some libraries add up all n terms in turn: where every rounding goes in one direction, that errs by n half units.
    """
    pieces = -(-A.shape[1] // _PIECE)
    extra = pieces * _PIECE - A.shape[1]
    left = F.pad(A, (0, extra)).reshape(A.shape[0], pieces, _PIECE).transpose(0, 1)
    right = F.pad(B, (0, 0, 0, extra)).reshape(pieces, _PIECE, B.shape[1])
    return torch.bmm(left, right).sum(0)
