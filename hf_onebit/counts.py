"""Numbers of things as people write them."""

from __future__ import annotations


def counted(count: int, what: str) -> str:
    """``"1 layer"``, ``"2 layers"``: a number and what there is so much of, given in the singular."""
    return f"{count} {what}{'' if count == 1 else 's'}"
