"""Tables in plain text and in Markdown."""

import re
from collections.abc import Iterable, Sequence

_NUMBER = re.compile(r"[-+]?\d[\d.,]*(e[-+]?\d+)?( ?(%|×|x|s|[kMG]?B))?", re.IGNORECASE)


def format_table(headers: Sequence[str], rows: Iterable[Sequence[object]], *, markdown: bool = False) -> str:
    """Lay out a table; columns of numbers are aligned to the right, all others to the left.

    Args:
        headers: one title a column.
        rows: cells; None is shown as a dash, a float with four significant digits, the rest by ``str``.
        markdown: a Markdown table, rather than aligned columns for a terminal.

    Returns:
        The lines of the table, without a line end after the last.

    Raises:
        ValueError: there is no column, or a row has more or fewer cells than ``headers``.
    """
    if not headers:
        raise ValueError("headers is empty, expected at least one column title.")
    cells = [[_cell(value) for value in row] for row in rows]
    for number, row in enumerate(cells):
        if len(row) != len(headers):
            raise ValueError(f"row {number} has {len(row)} cells, expected {len(headers)}, one for each header.")
    right = [_holds_numbers([row[column] for row in cells]) for column in range(len(headers))]
    table = [list(headers), *cells]
    return _markdown_table(table, right) if markdown else _plain_table(table, right)


def _cell(value: object) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _holds_numbers(column: Sequence[str]) -> bool:
    shown = [cell for cell in column if cell != "–"]
    return bool(shown) and all(_NUMBER.fullmatch(cell) for cell in shown)


def _plain_table(table: list[list[str]], right: list[bool]) -> str:
    widths = [max(len(row[column]) for row in table) for column in range(len(right))]
    table = [table[0], ["-" * width for width in widths], *table[1:]]
    return "\n".join("  ".join(_aligned(row, widths, right)).rstrip() for row in table)


def _markdown_table(table: list[list[str]], right: list[bool]) -> str:
    # A bar would end the cell and a line end the row.
    table = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in table]
    rule = ["---:" if side else "---" for side in right]
    return "\n".join(f"| {' | '.join(row)} |" for row in [table[0], rule, *table[1:]])


def _aligned(row: list[str], widths: list[int], right: list[bool]) -> list[str]:
    return [
        cell.rjust(width) if side else cell.ljust(width) for cell, width, side in zip(row, widths, right, strict=True)
    ]
