"""Sizes in bytes, as people write and read them."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

_UNITS = {"": 1, "b": 1} | {f"{letter}{suffix}": base ** (power + 1)
          for suffix, base in (("b", 1000), ("ib", 1024)) for power, letter in enumerate("kmgt")}  # fmt: skip


def shown_size(count: float) -> str:
    """Bytes for a reader, such as "184.6 kB"; units are powers of 1000."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"


def parse_size(value: Any) -> int:
    """Bytes of a size such as "60MB", "1.5 GiB" (kB, MB, GB, TB are powers of 1000, KiB, MiB, ... of 1024) or 60000000.

    Raises:
        ValueError: it is not of that form, or not at least one byte.
    """
    expected = 'expected a number of bytes above 0, or a text like "60MB" or "1.5GiB"'
    if type(value) is int:
        size = value
    else:
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([a-zA-Z]*)\s*", value) if isinstance(value, str) else None
        unit = None if found is None else _UNITS.get(found[2].lower())
        if found is None or unit is None:
            raise ValueError(expected)
        size = int(Fraction(found[1]) * unit)
    if size < 1:
        raise ValueError(expected)
    return size
