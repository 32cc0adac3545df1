"""What several commands print."""

from __future__ import annotations

import sys
from typing import Any


def print_figures(figures: dict[str, Any]) -> None:
    """A line for each figure, values in one column."""
    width = max(map(len, figures), default=0)
    for key, value in figures.items():
        print(f"{key:<{width}}  {f'{value:,.4f}' if isinstance(value, float) else value}")


def print_progress(done: int, total: int) -> None:
    """Tokens so far, in place, where somebody is watching."""
    if sys.stderr.isatty():
        print(f"\r{done}/{total} tokens", end="" if done < total else "\n", file=sys.stderr)
