"""Moments of an optimizer in less than a float a weight: eight bits in blocks, or factored into rows and columns.

**Eight bits.** A block is 128 neighbouring rows of one column, with one float32 p, the largest magnitude in it. What is
stored of a value x is a code of x / p:

* signed (first moments): c in -127..127 stands for p c |c| / 127². Near zero the levels are close together.
* unsigned (second moments): c in 1..255 stands for p times the float32 with the bits (c + 761) << 20, five bits of
  exponent and three of mantissa, so each level is at most an eighth above the last; 0 stands for 0. What is smaller
  than the first level is stored as that level: a second moment of 0 would be a division by ε.

Both are rounded stochastically between the two levels around x, and the mean of what is stored is x. To the nearest, a
slow average would stand still: with β = 0.9999 one step changes a value by less than a level, always.

The random bits are those of a word w of ``algorithms.counter_random`` for each value: of lane 0 ``w mod 2^16``, of
lane 1 the high bits of ``w * 0x9E3779B1 mod 2^32``: 16 of them for signed codes, 20 for unsigned ones.

**Factored** (Shazeer and Stern, "Adafactor", 2018): of a second moment only the means of rows R and columns C are kept,
in float32, and v = R Cᵀ / mean(R).
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_onebit.algorithms.update import root

__all__ = ["BLOCK", "BlockwiseMoment", "FactoredMoment", "Factors"]

BLOCK = 128
_MIX = 0x9E3779B1
_SIGNED_PEAK = 127
_OFFSET = 761
_MANTISSA_DROPPED = 20
_SMALLEST = 1e-30


class BlockwiseMoment:
    """A moment (rows, columns) in eight bits a value.

    Args:
        codes: int8 for a signed moment, uint8 for one of squares; changed in place.
        peaks: float32 ``(ceil(rows / 128), columns)``; changed in place.
        lane: which random bits of a word it takes.
    """

    def __init__(self, codes: Tensor, peaks: Tensor, lane: int = 0) -> None:
        self.codes, self.peaks, self.lane = codes, peaks, lane

    @classmethod
    def zeros(
        cls, shape: tuple[int, int], signed: bool, lane: int, device: torch.device | str | None = None
    ) -> BlockwiseMoment:
        """All zero."""
        codes = torch.zeros(shape, dtype=torch.int8 if signed else torch.uint8, device=device)
        return cls(codes, torch.zeros(-(-shape[0] // BLOCK), shape[1], device=device), lane)

    @property
    def shape(self) -> torch.Size:
        """(rows, columns)."""
        return self.codes.shape

    def rows(self, part: slice) -> BlockwiseMoment:
        """Some rows, which start where a block does: what is advanced of them is of this one."""
        first, last, _ = part.indices(self.codes.shape[0])
        return BlockwiseMoment(self.codes[first:last], self.peaks[first // BLOCK : -(-last // BLOCK)], self.lane)

    def begin(self, values: Tensor, square: bool, beta: float) -> None:
        """Nothing: the pieces are enough."""

    def advance(self, columns: slice, value: Tensor, beta: float, words: Tensor) -> Tensor:
        """β state + (1 - β) value of some columns, not rounded; the state is it, rounded.

        Args:
            columns: which.
            value: float ``(rows, len(columns))``.
            beta: β.
            words: int64 random words as ``value``.
        """
        moved = self.read(columns).to(value.dtype).mul_(beta).add_(value * (1 - beta))
        self.write(columns, moved, words)
        return moved

    def read(self, columns: slice = slice(None)) -> Tensor:
        """float32 ``(rows, len(columns))``."""
        codes = self.codes[:, columns]
        if self.codes.dtype == torch.int8:
            values = codes.to(torch.float32)
            values = values.mul_(values.abs()).mul_(1 / _SIGNED_PEAK**2)
        else:
            bits = codes.to(torch.int32).add_(_OFFSET).bitwise_left_shift_(_MANTISSA_DROPPED)
            values = bits.view(torch.float32).masked_fill_(codes == 0, 0.0)
        return values.mul_(self._spread(self.peaks[:, columns]))

    def write(self, columns: slice, value: Tensor, words: Tensor) -> None:
        """Store ``value`` in place of some columns."""
        x = value.to(torch.float32, copy=True)
        rows, width = x.shape
        whole = rows // BLOCK * BLOCK
        magnitude = x.abs()
        tops = [magnitude[:whole].view(-1, BLOCK, width).amax(1)] if whole else []
        if whole < rows:
            tops.append(magnitude[whole:].amax(0, keepdim=True))
        peaks = torch.cat(tops)
        self.peaks[:, columns] = peaks
        share = magnitude.div_(self._spread(torch.where(peaks > 0, peaks, 1.0)))
        self.codes[:, columns] = (
            self._signed(x, share, words) if self.codes.dtype == torch.int8 else self._unsigned(share, words)
        )

    def _signed(self, x: Tensor, share: Tensor, words: Tensor) -> Tensor:
        y = share.mul_(_SIGNED_PEAK**2)
        low = root(y).floor_().clamp_(max=_SIGNED_PEAK)
        # From c² to (c + 1)² there are 2c + 1.
        chance = y.sub_(low.square()).div_(low.mul(2).add_(1))
        up = self._bits(words, 16).to(torch.float32).mul_(2.0**-16) < chance
        return low.add_(up).clamp_(max=_SIGNED_PEAK).copysign_(x).to(torch.int8)

    def _unsigned(self, share: Tensor, words: Tensor) -> Tensor:
        zero = share == 0
        bits = share.view(torch.int32).add_(self._bits(words, _MANTISSA_DROPPED).to(torch.int32))
        codes = bits.bitwise_right_shift_(_MANTISSA_DROPPED).sub_(_OFFSET).clamp_(1, 255)
        return codes.masked_fill_(zero, 0).to(torch.uint8)

    def _bits(self, words: Tensor, count: int) -> Tensor:
        if self.lane == 0:
            return words & ((1 << count) - 1)
        return (words * _MIX).bitwise_and_(0xFFFFFFFF).bitwise_right_shift_(32 - count)

    def _spread(self, peaks: Tensor) -> Tensor:
        rows = self.codes.shape[0]
        return peaks.repeat_interleave(min(BLOCK, rows), 0)[:rows]


class FactoredMoment:
    """A second moment (rows, columns) as the means of its rows and of its columns.

    Args:
        row: float32 ``(rows,)``; changed in place.
        col: float32 ``(columns,)``; changed in place.
    """

    def __init__(self, row: Tensor, col: Tensor) -> None:
        self.row, self.col = row, col

    @classmethod
    def zeros(cls, shape: tuple[int, int], device: torch.device | str | None = None) -> FactoredMoment:
        """All zero."""
        return cls(torch.zeros(shape[0], device=device), torch.zeros(shape[1], device=device))

    @property
    def shape(self) -> torch.Size:
        """(rows, columns)."""
        return torch.Size((self.row.numel(), self.col.numel()))

    def begin(self, values: Tensor, square: bool, beta: float) -> None:
        """Average the means of ``values``' squares into the state.

        Raises:
            ValueError: a first moment: the product of means tells no signs.
        """
        if not square:
            raise ValueError("a factored moment holds squares; give the first moment as a tensor or in eight bits")
        for state, dim in ((self.row, 1), (self.col, 0)):
            mean = torch.linalg.vector_norm(values, dim=dim, dtype=torch.float32).square_().div_(values.shape[dim])
            state.mul_(beta).add_(mean.add_(_SMALLEST), alpha=1 - beta)

    def rows(self, part: slice) -> Factors:
        """v of some rows; :meth:`begin` has seen them already."""
        row, col = self.factors()
        return Factors(row[part], col)

    def advance(self, columns: slice, value: Tensor, beta: float, words: Tensor) -> Tensor:
        """v of some columns; :meth:`begin` has seen them already."""
        return Factors(*self.factors(value.dtype)).advance(columns, value, beta, words)

    def factors(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """What v is the product of: one number a row, one a column."""
        row = self.row.to(dtype)
        return row / row.mean().clamp_(min=_SMALLEST), self.col.to(dtype)


class Factors:
    """A second moment that is known already, as the product of a column and a row.

    Args:
        row: float ``(rows,)``.
        col: float ``(columns,)``.
    """

    def __init__(self, row: Tensor, col: Tensor) -> None:
        self.row, self.col = row, col

    @property
    def shape(self) -> torch.Size:
        """(rows, columns)."""
        return torch.Size((self.row.numel(), self.col.numel()))

    def begin(self, values: Tensor, square: bool, beta: float) -> None:
        """Nothing: it has been done."""

    def advance(self, columns: slice, value: Tensor, beta: float, words: Tensor) -> Tensor:
        """v of some columns."""
        return self.row[:, None] * self.col[None, columns]
