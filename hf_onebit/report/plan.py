"""What a user reads of a dry run."""

from collections.abc import Mapping
from typing import Any

from hf_onebit.byte_sizes import shown_size
from hf_onebit.counts import counted
from hf_onebit.durations import shown_estimate
from hf_onebit.report.summary import skipped_table, target_line
from hf_onebit.report.table import format_table


def plan_summary(planned: Mapping[str, Any]) -> str:
    """The plan of a quantization that was not run: layers by the way they would be packed, time, memory, disk.

    Args:
        planned: what ``hf_onebit.dry_run.dry_run`` returned.

    Returns:
        Several lines for a terminal, without a line end after the last.
    """
    layers, expected = planned["layers"], planned["preflight"]
    parts = [
        f"Would pack {counted(len(layers), 'linear layer')} at {planned['linear_bpw']:.4f} bits per weight, head apart:"
    ]
    rows = _rows(layers) + _rows(planned["heads"], full_names=True)
    parts.append(format_table(["choice", "layers", "weights", "bits per weight", "which"], rows))
    if line := target_line(planned["allocation"]):
        parts.append(f"Target: {line}")
    if planned["skipped"]:
        parts.append("Would stay in floating point:\n" + skipped_table(planned["skipped"]))
    seconds = expected["seconds"]
    writing = expected.get("writing_seconds")
    of_it = "" if writing is None else f", of it {shown_estimate(writing)} to write the calibration text"
    known = [("time", ("not known" if seconds is None else f"about {shown_estimate(seconds)}") + of_it)]
    free = expected["available_bytes"]
    left = "" if free is None else f" ({shown_size(free)} more are free)"
    known.append(("memory", f"{shown_size(expected['memory_bytes'])}{left}"))
    work = expected.get("work_bytes")
    meanwhile = f" and, until the end, up to {shown_size(work)} more" if work else ""
    disk = f"{shown_size(expected['disk_bytes'])}{meanwhile} ({shown_size(planned['free_disk_bytes'])} are free)"
    known.append(("disk", disk))
    width = max(len(name) for name, _ in known)
    parts.append("\n".join(f"{name:<{width}}  {value}" for name, value in known))
    return "\n\n".join([*parts, *planned["notes"], "Nothing was quantized or written (--dry-run)."])


def _rows(layers: Mapping[str, Mapping[str, Any]], full_names: bool = False) -> list[list[Any]]:
    """A row for each way of packing, the fewest bits first."""
    groups: dict[str, list[tuple[str, Mapping[str, Any]]]] = {}
    for name, layer in layers.items():
        groups.setdefault(layer["choice"], []).append((name, layer))
    rows = []
    for choice, group in groups.items():
        weights = [layer["in_features"] * layer["out_features"] for _, layer in group]
        bits = sum(layer["bits_per_weight"] * count for (_, layer), count in zip(group, weights, strict=True))
        names = [name for name, _ in group]
        which = ", ".join(names) if full_names else _kinds(names)
        rows.append([choice, len(group), sum(weights), bits / sum(weights), which])
    return sorted(rows, key=lambda row: row[3])


def _kinds(names: list[str]) -> str:
    """Last parts of the layers' names, with how many there are of each."""
    counts: dict[str, int] = {}
    for name in names:
        kind = name.rpartition(".")[2]
        counts[kind] = counts.get(kind, 0) + 1
    return ", ".join(f"{count} {kind}" for kind, count in counts.items())
