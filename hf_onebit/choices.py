"""The ways to pack a layer that automatic bits choose from: their names, and the table's entry of each.

"1p"       one sign matrix with scales per row and column (onebit); "2p" two of them
"3g64"     codes of 3 bits in groups of 64 inputs (mpq); "3g-1" with one group for the whole row
"2.5g64"   codes of several widths within the layer, 2.5 bits in the mean (formats/mbwq.py)
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from torch import Tensor

from hf_onebit.algorithms.row_blocks import WIDTHS, widths_by_importance
from hf_onebit.formats.double_quant import DoubleQuant
from hf_onebit.formats.mpq import MAX_BITS, MIN_BITS
from hf_onebit.formats.onebit import MAX_PLANES
from hf_onebit.formats.packing import WORD_BITS
from hf_onebit.formats.table import TableEntry

# Tried where nothing else is said: of each width, the group sizes that were ever worth their bits.
CHOICES = (
    *("1p", "2p", "1g64", "2g-1", "2g128", "2g64", "2g32", "3g-1", "3g128", "3g64", "4g-1", "4g128", "4g64"),
    *("5g-1", "5g64", "6g64", "8g64"),
)
# Beside them with several widths within a layer.
WITHIN_LAYER = ("2.25g64", "2.5g64", "2.75g64", "3.25g64", "3.5g64", "4.5g64")

_EXPECTED = (
    'expected "1p" or "2p" (sign matrices), or like "3g64" (bits, and a group size that is a multiple of 32 or -1; '
    '"2.5g64" mixes widths of 2 to 8 within a layer)'
)


@dataclass(frozen=True)
class Choice:
    """One way to pack a layer.

    Attributes:
        planes: sign matrices, 0 for codes.
        bits: of one code in the mean; a whole number but for several widths.
        group_size: inputs that share a scale, or -1.
    """

    planes: int = 0
    bits: float = 1
    group_size: int = -1

    @classmethod
    def parse(cls, name: str) -> Choice:
        """The choice of that name.

        Raises:
            ValueError: it is none, saying what one looks like.
        """
        if planes := re.fullmatch(r"([0-9])p", name):
            if 1 <= int(planes[1]) <= MAX_PLANES:
                return cls(int(planes[1]))
            raise ValueError(_EXPECTED)
        found = re.fullmatch(r"([0-9](?:\.[0-9]+)?)g(-1|[0-9]+)", name)
        if found is None:
            raise ValueError(_EXPECTED)
        bits, size = float(found[1]), int(found[2])
        lowest, highest = (MIN_BITS, MAX_BITS) if bits.is_integer() else (WIDTHS[-1], WIDTHS[0])
        fits = size == -1 or (size > 0 and size % WORD_BITS == 0)
        if not lowest <= bits <= highest or not fits or (size == -1 and not bits.is_integer()):
            raise ValueError(_EXPECTED)
        return cls(0, bits, size)

    @property
    def mixed(self) -> bool:
        """Whether it has several widths within a layer."""
        return not self.planes and not float(self.bits).is_integer()

    def entry(
        self,
        in_features: int,
        symmetric: bool = False,
        act_order: bool = False,
        double_quant: bool = False,
        importance: Tensor | None = None,
    ) -> TableEntry | None:
        """The table's entry of a layer, or None where it cannot be packed so (too few inputs for several widths).

        Args:
            in_features: of the layer.
            symmetric, act_order, double_quant: as of ``MPQConfig``; sign matrices know none of them.
            importance: (in,) of each input, by which several widths are given.
        """
        if self.planes:
            return TableEntry(planes=self.planes)
        if not self.mixed:
            spec = DoubleQuant.default(symmetric) if double_quant else None
            plain = TableEntry("mpq", int(self.bits), 1, self.group_size, symmetric, in_features=in_features)
            return replace(plain, q_perm=act_order, double_quant=spec)
        assert importance is not None
        blocks = widths_by_importance(importance, self.bits, self.group_size)
        if len(blocks) == 1:
            return None
        first = blocks[0]
        plain = TableEntry("mpq", first[0], 1, first[2], symmetric, in_features=in_features)
        return replace(plain, q_perm=True, blocks=blocks)


def name_of(entry: TableEntry) -> str:
    """What an entry is called in tables for readers: the name of its choice, several widths by their mean."""
    if entry.method == "onebit":
        return f"{entry.planes}p"
    if entry.blocks is None:
        return f"{entry.bits}g{entry.group_size}"
    rows = sum(count for _, count, _ in entry.blocks)
    return f"{sum(bits * count for bits, count, _ in entry.blocks) / rows:.3g}g{entry.group_size}"
