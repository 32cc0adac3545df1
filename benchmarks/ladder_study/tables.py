"""docs/results.md from the rows' JSON: what stands between its markers is written by this file alone."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from result_pages import fill_page

from hf_onebit.report import format_table

from .rows import ROWS
from .running import read

NOTHING = "No row of this table is measured yet."


def load_rows(results: Path) -> dict[str, dict[str, Any]]:
    """The rows' JSON, in the study's order."""
    return {name: read(file) for name in ROWS if (file := results / f"{name}.json").is_file()}


def fill(page: str, rows: dict[str, dict[str, Any]]) -> str:
    """The page with every table between its markers rendered anew.

    Raises:
        ValueError: a marker has an unknown name, or a table has no marker.
    """
    return fill_page(page, "study", {name: partial(table, rows) for name, table in TABLES.items()})


def ladder(rows: dict[str, dict[str, Any]]) -> str:
    """The float model and our presets."""
    return _quality(rows, ("float", "ladder"))


def ablation(rows: dict[str, dict[str, Any]]) -> str:
    """Rung by rung, on fewer tokens than the other tables."""
    headers = ["", "bits/weight (linear)", "perplexity", "× float", "KL", "KL by the row above's", "top-1",
               "Alice: × float", "Alice: KL", "minutes"]  # fmt: skip
    shown = [row for row in rows.values() if row["family"] in ("float", "ablation") and row["status"] == "done"]
    if not any(row["family"] == "ablation" for row in shown):
        return NOTHING
    cells, above = [], None
    for row in shown:
        near, far = row["evaluation"]["slice"], row["evaluation"]["alice_8k"]
        cells.append(
            [
                row["title"],
                f"{row['linear_bpw']:.3f}",
                _number(near["perplexity"]),
                _number(near["multiple"]),
                f"{near['kl']:.3f}",
                f"{near['kl'] / above:.3f}" if above else None,
                f"{100 * near['top1']:.1f}%",
                _number(far["multiple"]),
                f"{far['kl']:.3f}",
                None if row["minutes"] is None else f"{row['minutes']:.1f}",
            ]
        )
        above = near["kl"]
    return format_table(headers, cells, markdown=True)


def peers(rows: dict[str, dict[str, Any]]) -> str:
    """Other methods on the same weights, tokens and windows."""
    return _quality(rows, ("float", "peers"))


def _quality(rows: dict[str, dict[str, Any]], families: Sequence[str]) -> str:
    headers = ["", "bits/weight (linear)", "bits/weight (file)", "file", "perplexity", "× float", "first 8 x 1024",
               "× float", "KL", "top-1", "minutes", "tokens"]  # fmt: skip
    shown = [row for row in rows.values() if row["family"] in families and row["status"] == "done"]
    if not any(row["family"] == families[-1] for row in shown):
        return NOTHING
    cells = [
        [
            row["title"],
            f"{row['linear_bpw']:.3f}",
            f"{row['file_bpw']:.2f}",
            f"{row['file_bytes'] / 1e6:.1f} MB",
            _number(row["evaluation"]["test"]["perplexity"]),
            _number(row["evaluation"]["test"]["multiple"]),
            _number(row["evaluation"]["test_8k"]["perplexity"]),
            _number(row["evaluation"]["test_8k"]["multiple"]),
            f"{row['evaluation']['test']['kl']:.3f}",
            f"{100 * row['evaluation']['test']['top1']:.1f}%",
            None if row["minutes"] is None else f"{row['minutes']:.1f}",
            row["calibration"]["tokens"] if row["calibration"] else None,
        ]
        for row in shown
    ]
    return format_table(headers, cells, markdown=True)


def domain(rows: dict[str, dict[str, Any]]) -> str:
    """The text that never calibrated anything, beside the in-domain one."""
    headers = ["", "Alice: perplexity", "× float", "KL", "top-1", "WikiText-2: × float", "Alice's × by WikiText-2's ×"]
    shown = [row for row in rows.values() if row["status"] == "done" and "alice" in row["evaluation"]]
    if not shown:
        return NOTHING
    cells = []
    for row in shown:
        far, near = row["evaluation"]["alice"], row["evaluation"]["test"]
        both = far["multiple"] is not None and near["multiple"] is not None
        cells.append(
            [
                row["title"],
                _number(far["perplexity"]),
                _number(far["multiple"]),
                f"{far['kl']:.3f}",
                f"{100 * far['top1']:.1f}%",
                _number(near["multiple"]),
                f"{far['multiple'] / near['multiple']:.2f}" if both else None,
            ]
        )
    return format_table(headers, cells, markdown=True)


def details(rows: dict[str, dict[str, Any]]) -> str:
    """What each row is, and why some cannot run."""
    lines = []
    for row in rows.values():
        if row["status"] == "done":
            notes = "; ".join([f"seed {row['seed']}", *row["notes"], f"`{row['command']}`"])
            lines.append(f"- **{row['title']}**: {notes}. {row['device']}, {row['threads']} thread(s).")
        else:
            lines.append(f"- **{row['title']}** cannot run: {row['reason']}.")
    return "\n".join(lines) or NOTHING


def _number(value: float | None) -> str | None:
    """Null is an infinity, which JSON lacks."""
    if value is None:
        return "∞"
    if value >= 1e9:
        return f"{value:.1e}"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.2f}"


TABLES = {"ladder": ladder, "ablation": ablation, "peers": peers, "domain": domain, "details": details}
