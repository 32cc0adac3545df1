"""The tables of docs/mpq_results.md, from the peers' JSON and the one that benchmarks/mpq.py writes of our own rows."""

import re
from functools import partial
from typing import Any

from result_pages import fill_page

from hf_onebit.report import format_table

NOTHING = "Nothing of this table is measured yet."
Content = dict[str, Any]


def fill(page: str, peers: Content, ours: Content | None) -> str:
    """The page with every table between its markers rendered anew.

    Args:
        page: Markdown with a pair of markers for each of `TABLES`.
        peers: what `mpq_peers.py run` writes.
        ours: what `mpq.py` writes, or None while there is none.

    Raises:
        ValueError: a marker has an unknown name, or a table has no marker.
    """
    return fill_page(page, "peers", {name: partial(table, peers, ours) for name, table in TABLES.items()})


def joint_rows(peers: Content, ours: Content | None) -> list[Content]:
    """One list of both files: widest first, then by perplexity.

    How fast a model decodes and loads is a matter of its format, not of how its numbers were found: our presets have
    those columns from our row without data at the same bits. Two files that hold a row without data each
    give it once, from `mpq.py`.
    """
    base = peers["rows"].get("float", {}).get("perplexity")
    rows: list[Content] = []
    presets = [] if ours is None else [run for run in ours["runs"] if _is_shown(run["run"])]
    without_data = {run["run"] for run in presets}
    for name, row in peers["rows"].items():
        if row["reason"] or (row["peer"] == "ours" and str(row["bits"]) in without_data):
            continue
        multiple = row["perplexity"] / base if base else None
        rows.append({**row, "name": name, "multiple": multiple})
    for run in presets:
        bits = int(run["run"].partition(":")[0])
        twin = peers["rows"].get(f"ours-{bits}") or {}
        rows.append(
            {
                "name": f"ours {run['run']}",
                "peer": "ours",
                "title": _title(run["run"]),
                "bits": bits,
                "linear_bpw": run["linear_bpw"],
                "perplexity": run["perplexity"],
                "multiple": run["ratio"],
                "decode": twin.get("decode"),
                "load_mb": twin.get("load_mb"),
                "saved": True,
                "dequantized": False,
                "quantize_seconds": run["seconds"],
            }
        )
    return sorted(rows, key=lambda row: (-row["bits"], row["perplexity"]))


# The runs of mpq.py that are presets; its others compare searches.
SHOWN = {"": "closed, no data", "calibrate=1": "closed, with data"}


def _is_shown(run: str) -> bool:
    options = run.partition(":")[2]
    return options in SHOWN or re.fullmatch(r"preset=\w+", options) is not None


def _title(run: str) -> str:
    options = run.partition(":")[2]
    return "ours, " + (SHOWN.get(options) or options.removeprefix("preset="))


def quality(peers: Content, ours: Content | None) -> str:
    """All rows that were measured."""
    rows = joint_rows(peers, ours)
    if not rows:
        return NOTHING
    headers = ["bits", "method", "bits/weight (linear)", "perplexity", "× float", "decode, × bf16", "load, MB",
               "quantizing, s"]  # fmt: skip
    cells = []
    for row in rows:
        title = f"**{row['title']}**" if row["peer"] == "ours" else row["title"]
        cells.append(
            [
                row["bits"],
                title + (" (evaluated dequantized)" if row["dequantized"] else ""),
                f"{row['linear_bpw']:.3f}",
                _perplexity(row["perplexity"]),
                None if row["multiple"] is None else _perplexity(row["multiple"]),
                None if row["decode"] is None else f"{row['decode']['by_bf16']:.2f}",
                None if row["load_mb"] is None else f"{row['load_mb']:.0f}" + ("" if _loads(row) else " *"),
                None if row["quantize_seconds"] is None else f"{row['quantize_seconds']:.0f}",
            ]
        )
    return format_table(headers, cells, markdown=True)


def standing(peers: Content, ours: Content | None) -> str:
    """Beside each of our rows, the best peer of its bits."""
    rows = joint_rows(peers, ours)
    lines = []
    for bits in sorted({row["bits"] for row in rows if row["peer"] == "ours"}, reverse=True):
        mine = min((r for r in rows if r["bits"] == bits and r["peer"] == "ours"), key=lambda r: r["perplexity"])
        others = [r for r in rows if r["bits"] == bits and r["peer"] != "ours"]
        fair = [r for r in others if r["linear_bpw"] <= mine["linear_bpw"] + 0.05]
        if not others:
            lines.append(f"- {bits} bits: {_one(mine)}; no peer was measured.")
        elif not fair:
            best = min(others, key=lambda r: r["perplexity"])
            lines.append(f"- {bits} bits: {_one(mine)}; no peer takes as few bits. Of more bits: {_one(best)}.")
        else:
            best = min(fair, key=lambda r: r["perplexity"])
            word = "at or below" if mine["perplexity"] <= best["perplexity"] else "**above**"
            lines.append(f"- {bits} bits: {_one(mine)}, {word} the best peer of no more bits: {_one(best)}.")
    return "\n".join(lines) or NOTHING


def _one(row: Content) -> str:
    return f"{row['title']} at {row['linear_bpw']:.3f} bits, {_perplexity(row['perplexity'])}"


def details(peers: Content, ours: Content | None) -> str:
    """Versions and notes of each row, and why some cannot run."""
    lines = []
    for name, row in peers["rows"].items():
        if row["reason"]:
            lines.append(f"- `{name}` has no figures: {row['reason']}.")
        elif said := "; ".join(filter(None, [row["version"], *row["notes"]])):
            lines.append(f"- `{name}`: {said}.")
    return "\n".join(lines) or NOTHING


def _loads(row: Content) -> bool:
    return row["peer"] == "float" or bool(row["saved"])


def _perplexity(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3f}"


TABLES = {"quality": quality, "standing": standing, "details": details}
