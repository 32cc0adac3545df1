"""The tables of docs/training.md, from the rows' JSON; nothing between their markers is written by hand."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ladder_study.running import read
from result_pages import fill_page

from hf_onebit.report import format_table

from .rows import ROWS

NOTHING = "No row of this table is measured yet."
Rows = dict[str, dict[str, Any]]


def load_rows(results: Path) -> Rows:
    """The rows' JSON, in the study's order."""
    return {name: read(file) for name in ROWS if (file := results / f"{name}.json").is_file()}


def fill(page: str, rows: Rows) -> str:
    """The page with every table between its markers rendered anew.

    Raises:
        ValueError: a marker has an unknown name, or a table has no marker.
    """
    return fill_page(page, "finetune", {name: partial(table, rows) for name, table in TABLES.items()})


def of_family(rows: Rows, family: str) -> Rows:
    """The rows of one table."""
    return {name: row for name, row in rows.items() if row["family"] == family}


def text(rows: Rows) -> str:
    """Next-token training from the float model and from 4 bits."""
    shown = of_family(rows, "text")
    best = shown.get("text-adamw")
    headers = ["", "learning, M", "held-out loss, start", "end", "end, × AdamW's", "improvement, of AdamW's",
               "s a step", "of these the optimizer's"]  # fmt: skip
    cells = []
    for row in shown.values():
        start, end = _ends(row)
        against = best and _ends(best)
        cells.append(
            [
                row["title"],
                f"{row['learning'] / 1e6:.1f}",
                f"{start:.4f}",
                f"{end:.4f}",
                f"{end / against[1]:.4f}" if against else None,
                _percent((start - end) / (against[0] - against[1])) if against else None,
                *_seconds(row),
            ]
        )
    return format_table(headers, cells, markdown=True) if cells else NOTHING


def _recovery(family: str) -> Callable[[Rows], str]:
    def table(rows: Rows) -> str:
        headers = ["", "learning, M", "held-out loss, start", "end", "of the gap to float", "KL, start", "end",
                   "s a step"]  # fmt: skip
        cells = []
        for row in of_family(rows, family).values():
            first, last = row["curve"][0], row["curve"][-1]
            cells.append(
                [
                    row["title"],
                    f"{row['learning'] / 1e6:.1f}",
                    f"{first['loss']:.4f}",
                    f"{last['loss']:.4f}",
                    _percent(recovered(row)),
                    f"{first['kl']:.4f}",
                    f"{last['kl']:.4f}",
                    _seconds(row)[0],
                ]
            )
        return format_table(headers, cells, markdown=True) if cells else NOTHING

    return table


def recovered(row: dict[str, Any]) -> float:
    """Share of what packing cost in held-out loss that training won back."""
    first, last = row["curve"][0], row["curve"][-1]
    share: float = (first["loss"] - last["loss"]) / (first["loss"] - first["teacher_loss"])
    return share


def memory(rows: Rows) -> str:
    """Bytes per weight of the linear layers."""
    shown = of_family(rows, "memory")
    base = shown.get("memory-lora-4")
    headers = ["", "model", "between steps", "of a step besides", "peak", "peak, beside LoRA on 4 bits",
               "gradients after backward"]  # fmt: skip
    cells = []
    for row in shown.values():
        found = row["memory"]
        cells.append(
            [
                row["title"],
                *(f"{found[name]:.2f}" for name in ("model", "training", "step", "peak")),
                f"{found['peak'] - base['memory']['peak']:+.2f}" if base else None,
                f"{found['gradients']:.2f}",
            ]
        )
    if not cells:
        return NOTHING
    sizes = {(row["protocol"]["blocks"], row["protocol"]["length"]) for row in shown.values()}
    said = " and ".join(
        f"{'all' if blocks is None else blocks} blocks with {length} tokens" for blocks, length in sizes
    )
    return f"{format_table(headers, cells, markdown=True)}\n\nMeasured on {said}."


def standing(rows: Rows) -> str:
    """What was aimed at, and what came out."""
    lines = []
    for name, weights in (("text-adamw-bf16", "bf16 weights"), ("text-adamw", "float32 weights")):
        if {name, "text-packed-4"} <= set(rows):
            ours, theirs = _ends(rows["text-packed-4"]), _ends(rows[name])
            gap, share = ours[1] / theirs[1] - 1, (ours[0] - ours[1]) / (theirs[0] - theirs[1])
            lines.append(
                f"- 4-bit codes end {_percent(gap, sign=True)} from AdamW's held-out loss on {weights} (aim: within "
                f"2 %), with {_percent(share)} of its improvement over the start (aim: 80 %)."
            )
    if "twobits-packed" in rows:
        share = _percent(recovered(rows["twobits-packed"]))
        lines.append(f"- 2 bits win back {share} of what packing cost (aim: half).")
    if {"onebit-packed", "onebit-scales"} <= set(rows):
        packed, scales = (rows[name]["curve"][-1]["loss"] for name in ("onebit-packed", "onebit-scales"))
        word = "below" if packed < scales else "**not below**"
        lines.append(f"- One-bit signs that learn end at {packed:.4f}, {word} scales alone, {scales:.4f}.")
    for name, what in (("memory-packed-4", "Codes"), ("memory-packed-4-scales", "Codes with scales")):
        if {"memory-lora-4", name} <= set(rows):
            ours, base = (rows[key]["memory"] for key in (name, "memory-lora-4"))
            gap = ours["peak"] - base["peak"]
            lines.append(
                f"- {what} and moments in eight bits take {ours['training']:.2f} bytes a weight, the gradient of one "
                f"layer comes and goes (aim: at most 3 for all). A step on them peaks {gap:+.2f} bytes a weight beside "
                "LoRA on 4 bits (aim: at most +2.2)."
            )
    if {"memory-lora-4", "memory-packed-4-rank"} <= set(rows):
        gap = rows["memory-packed-4-rank"]["memory"]["peak"] - rows["memory-lora-4"]["memory"]["peak"]
        lines.append(f"- With moments of rank 16 it peaks {gap:+.2f} bytes a weight beside it (aim: below).")
    if missing := [name for name in ROWS if name not in rows]:
        lines.append(f"- Not measured yet: {', '.join(f'`{name}`' for name in missing)}.")
    return "\n".join(lines)


def rates(rows: Rows) -> str:
    """What was tried for each row, on the tuning tokens."""
    lines = []
    for name, row in rows.items():
        if row["family"] == "memory":
            continue
        shown = ", ".join(f"{what} {rate:g}" for what, rate in row["rates"].items())
        tried = "; ".join(f"{_rate(entry['rates'], row['tried'])}: {_ended(entry)}" for entry in row["tried"])
        lines.append(f"- `{name}`: {shown}" + (f" (tried: {tried})." if tried else " (nothing else was tried)."))
    return "\n".join(lines) or NOTHING


def _ended(entry: dict[str, Any]) -> str:
    return "diverged" if entry["end"] is None else f"{entry['start']:.4f} → {entry['end']:.4f}"


def _rate(given: dict[str, float], tried: list[dict[str, Any]]) -> str:
    """The rates that differ between what was tried."""
    differing = [name for name in given if len({entry["rates"][name] for entry in tried}) > 1]
    return ", ".join(f"{given[name]:g}" for name in differing[:1] or [*given][:1])


def _ends(row: dict[str, Any]) -> tuple[float, float]:
    return row["curve"][0]["loss"], row["curve"][-1]["loss"]


def _seconds(row: dict[str, Any]) -> tuple[str, str]:
    steps = row["curve"][-1]["step"]
    return f"{row['seconds'] / steps:.1f}", f"{row['optimizer_seconds'] / steps:.1f}"


def _percent(share: float, sign: bool = False) -> str:
    return f"{100 * share:{'+' if sign else ''}.1f} %"


TABLES: dict[str, Callable[[Rows], str]] = {
    "standing": standing,
    "text": text,
    "two_bits": _recovery("two_bits"),
    "one_bit": _recovery("one_bit"),
    "memory": memory,
    "rates": rates,
}
