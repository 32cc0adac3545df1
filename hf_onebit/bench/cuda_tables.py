"""What ``hf-onebit bench --device cuda`` prints."""

from __future__ import annotations

from typing import Any

from hf_onebit.report import format_table

_HEADERS = ("out x in", "dtype", "layer", "rows", "graph µs", "x float", "eager µs", "floor µs", "error")


def as_text(result: dict[str, Any]) -> str:
    """A table of what ``cuda.run`` returned, or of a file of it, for a terminal."""
    plans = "plans searched for" if result["autotune"] else "usual plans"
    parts = [f"{result['device']}, torch {result['torch']}, triton {result['triton']}, {plans}; medians"]
    timed = [row for row in result["results"] if "not_timed" not in row]
    if timed:
        parts.append(format_table(list(_HEADERS), [_cells(row) for row in timed]))
    parts += [row_line(row) for row in result["results"] if "not_timed" in row]
    # Files of older runs have no such key where nothing was refused.
    parts += [
        f"REFUSED, so that plain torch was timed: {what}: {why}" for what, why in result.get("refused", {}).items()
    ]
    return "\n\n".join(parts)


def row_line(row: dict[str, Any]) -> str:
    """One line of progress: the figures of one layer at one batch, or why there are none."""
    about = f"{row['shape']} {row['dtype']} {row['kind']}"
    if "not_timed" in row:
        rows = "" if row["rows"] is None else f", {row['rows']} rows"
        return f"skipped: {about}{rows}: {row['not_timed']}"
    kernels = "".join(f"\n    {name}: {time:.2f} µs" for name, time in row.get("kernels_us", {}).items())
    return (
        f"{about}, {row['rows']} rows: graph {row['graph_us']:.2f} µs ({row['float_over_packed']:.2f}x float), "
        f"eager {row['eager_us']:.2f} µs, floor {row['floor_us']:.2f} µs, error {row['error']:.1e}{kernels}"
    )


def _cells(row: dict[str, Any]) -> list[Any]:
    return [
        row["shape"], row["dtype"], row["kind"], row["rows"], f"{row['graph_us']:.2f}",
        f"{row['float_over_packed']:.2f}", f"{row['eager_us']:.2f}", f"{row['floor_us']:.2f}", f"{row['error']:.1e}",
    ]  # fmt: skip
