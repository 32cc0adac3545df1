"""The tables of docs/mpq_results.md, from the peers' JSON and the one that benchmarks/mpq.py writes of our own rows.

Beside them what was aimed at, with `hf-onebit bench`'s JSON of a larger model, and why peers are ahead (`reasons.py`).
"""

import re
from functools import partial
from typing import Any

from result_pages import fill_page

from hf_onebit.report import format_table
from peer_study.reasons import REASONS

NOTHING = "Nothing of this table is measured yet."
Content = dict[str, Any]


def fill(page: str, peers: Content, ours: Content | None, speed: Content | None = None) -> str:
    """The page with every table between its markers rendered anew.

    Args:
        page: Markdown with a pair of markers for each of `NAMES`.
        peers: what `mpq_peers.py run` writes.
        ours: what `mpq.py` writes, or None while there is none.
        speed: what `hf-onebit bench --model ... --json` writes, or None while there is none.

    Raises:
        ValueError: a marker has an unknown name, or a table has no marker.
    """
    tables = {name: partial(table, peers, ours) for name, table in TABLES.items()}
    return fill_page(page, "peers", {**tables, "targets": partial(targets, ours, speed)})


def joint_rows(peers: Content, ours: Content | None) -> list[Content]:
    """One list of both files: widest first, then by perplexity.

    How fast a model decodes and loads is a matter of its format, not of how its numbers were found: our presets have
    those columns from our row without data at the same bits, where groups are the same. Two files that hold a row
    without data each give it once, from `mpq.py`.
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
        twin = (
            {} if "group_size" in run["run"] or "symmetric" in run["run"] else peers["rows"].get(f"ours-{bits}") or {}
        )
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


# The runs of mpq.py that are shown beside its presets.
SHOWN = {
    "": "closed, no data",
    "group_size=32": "closed, no data, g32",
    "group_size=32:symmetric=1": "closed, no data, g32, symmetric",
    "symmetric=1": "closed, no data, symmetric",
    "search=min-max": "closed, no data, min-max",
    "search=half-quadratic": "closed, no data, half-quadratic",
    "dataset=self": "closed, its own text",
    "calibrate=1": "closed, with data",
}


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


def ahead(peers: Content, ours: Content | None) -> str:
    """Every peer with a lower perplexity than one of our rows of its bits, and why."""
    rows = joint_rows(peers, ours)
    # Rows that only compare searches and layouts are nobody's choice.
    every = [
        row for row in rows if row["peer"] == "ours" and not re.search("min-max|half-quad|symmetric", row["title"])
    ]
    cells = []
    for row in rows:
        mine = [r for r in every if r["bits"] == row["bits"]]
        behind = [r for r in mine if r["perplexity"] > row["perplexity"]]
        if row["peer"] in ("ours", "float") or not behind:
            continue
        titles = "; ".join(r["title"].removeprefix("ours, ") for r in behind)
        smaller = [r for r in every if r["linear_bpw"] <= row["linear_bpw"]]
        best = min(smaller, key=lambda r: r["perplexity"], default=None)
        cells.append(
            [
                row["bits"],
                row["title"],
                f"{row['linear_bpw']:.3f}",
                _perplexity(row["perplexity"]),
                "all" if len(behind) == len(mine) else titles,
                None if best is None else f"{best['bits']} bits, {_one(best).removeprefix('ours, ')}",
                REASONS.get(row["name"], "not explained yet"),
            ]
        )
    headers = [
        "bits",
        "peer",
        "bits/weight",
        "perplexity",
        "ahead of our rows",
        "our best of no more bits/weight",
        "why",
    ]
    return format_table(headers, cells, markdown=True) if cells else NOTHING


# (what, at most how many times the float model's perplexity, the run of mpq.py, what the run sees).
TARGETS = (
    ("8 bits", 1.003, "8", "no text"),
    ("4 bits, without a text of the user's", 1.06, "4:dataset=self", "a text that the model writes itself"),
    ("4 bits, the same without any text", 1.06, "4", "no text"),
    ("4 bits, calibrated", 1.04, "4:preset=fast", "a text"),
    ("3 bits, calibrated", 1.15, "3:preset=fast", "a text"),
    ("2 bits, calibrated, blocks tuned", 1.7, "2:preset=balanced", "a text"),
)


def targets(ours: Content | None, speed: Content | None) -> str:
    """What was aimed at, what came of it, and by which of our rows."""
    runs = {} if ours is None else {run["run"]: run for run in ours["runs"]}
    cells = []
    for what, most, run, sees in TARGETS:
        if run in runs:
            ratio = runs[run]["ratio"]
            verdict = "met" if ratio <= most else "**not met**"
            cells.append([what, f"≤ {most:g} × float", f"{ratio:.4f}", verdict, f"{_title(run)}: {sees}"])
    rivals = {} if speed is None else speed["model"]["rivals"]
    if rivals:
        by_bf16 = {name: rivals[name]["decode_tokens_per_s"] / rivals["bf16"]["decode_tokens_per_s"] for name in rivals}
        four, two = by_bf16["packed"], by_bf16["packed 2g64"]
        where = f"{speed['model']['model']}, {speed['threads']} threads" if speed else ""
        cells.append(["decoding at 4 bits", "≥ 2 × bf16", f"{four:.2f}", "met" if four >= 2 else "**not met**", where])
        verdict = "met" if two > four else "**not met**"
        cells.append(["decoding at 2 bits", "faster than at 4 bits", f"{two:.2f} × bf16", verdict, where])
    return format_table(["target", "aim", "found", "verdict", "by"], cells, markdown=True) if cells else NOTHING


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


TABLES = {"quality": quality, "standing": standing, "ahead": ahead, "details": details}
NAMES = (*TABLES, "targets")
