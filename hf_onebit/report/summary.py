"""What a user reads when quantization has ended."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from hf_onebit.byte_sizes import shown_size
from hf_onebit.durations import shown_duration
from hf_onebit.report.table import format_table

WORST_LAYERS = 5


def coverage_line(report: Mapping[str, Any]) -> str:
    """One sentence: how many linear layers are packed, what share of their weights that is, and at how many
    bits.

    Args:
        report: a report with the keys ``layers``, ``skipped``, ``coverage`` and ``linear_bpw``.
    """
    packed, skipped = len(report["layers"]), len(report["skipped"])
    onebit, linear = report.get("onebit_bpw"), report["linear_bpw"]
    bits = f"{linear:.3f} bits per weight"
    if onebit not in (None, linear):
        bits = f"{onebit:.3f} bits per weight, {linear:.3f} with the output head"
    return (
        f"Packed {packed} of {packed + skipped} linear layers: {_percent(report['coverage'])} of their weights (output "
        f"head apart), at {bits}."
    )


def layer_summary(report: Mapping[str, Any], next_command: str | None = None) -> str:
    """What a user reads when quantization has ended: layers, bits, sizes, time, the worst layers, what to do
    next.

    Args:
        report: see the top of this file.
        next_command: a command to copy, shown on the last line.

    Returns:
        Several lines for a terminal, without a line end after the last.
    """
    known = facts(report)
    width = max(len(name) for name, _ in known)
    parts = [coverage_line(report), "\n".join(f"{name:<{width}}  {value}" for name, value in known)]
    if report["skipped"]:
        parts.append("Kept in floating point:\n" + skipped_table(report["skipped"]))
    if report["layers"]:
        parts.append("Largest relative errors:\n" + worst_table(report["layers"]))
    if next_command:
        parts.append(f"Next: {next_command}")
    return "\n\n".join(parts)


def facts(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, value) of all that the report knows, in the order of reading."""
    known = {
        "method": _method(report),
        "bits per weight": _bits(report),
        "target": target_line(report.get("allocation")),
        "widths": _widths(report.get("allocation")),
        "output head": _grouped(_head_of(report)),
        "embedding": _grouped(report.get("embeddings")),
        "untied": _untied(report.get("untied")),
        "size": _sizes(report.get("float_bytes"), report.get("file_bytes")),
        "time": None if (seconds := report.get("seconds")) is None else shown_duration(seconds),
        "peak memory": _megabytes(report.get("peak_memory_mb")),
        "imported from": report.get("imported"),
        "calibration": None if report.get("imported") else _calibration(report.get("calibration")),
        "distillation": _distillation((report.get("fit") or {}).get("distillation")),
    }
    return [(name, value) for name, value in known.items() if value]


def _method(report: Mapping[str, Any]) -> str:
    parts = [str(report.get("method", "onebit"))]
    if report.get("preset"):
        parts.append(f"preset {report['preset']}")
    if report.get("bits") == "auto":
        return ", ".join([*parts, "bits chosen layer by layer"])
    if report.get("bits"):
        kind = "symmetric " if report.get("symmetric") else ""
        return ", ".join([*parts, f"{report['bits']} bits in {kind}{_groups(report['group_size'])}"])
    layers = (report.get("layers") or {}).values()
    counts = Counter(layer["planes"] for layer in layers if layer.get("planes"))
    if len(counts) > 1:
        parts.append(f"1 plane in {counts[1]} layers and 2 in {counts[2]}")
    elif planes := next(iter(counts), report.get("planes")):
        parts.append(f"{planes} plane{'s' if planes > 1 else ''}")
    return ", ".join(parts)


def target_line(allocation: Mapping[str, Any] | None) -> str | None:
    """What a target asked for and what the plan takes; None without one."""
    if not allocation:
        return None
    unit = shown_size if allocation["target"] == "size" else "{:.3f} bits per weight".format
    what = "bits" if "heads" in allocation else "planes"
    spread = f"{what} by sensitivity on {allocation['tokens']} tokens"
    if not allocation["tokens"]:
        spread = f"{what} by the errors of weights alone"
    if trials := allocation.get("trials"):
        spread += f", the best of {len(trials['plans'])} plans on {trials['tokens']} held-out tokens"
    return f"{unit(allocation['wanted'])}, {unit(allocation['planned'])} planned; {spread}"


def _widths(allocation: Mapping[str, Any] | None) -> str | None:
    """How many layers got which choice of automatic bits, the most first."""
    if not allocation or "heads" not in allocation:
        return None
    counts = Counter(layer["choice"] for layer in allocation["layers"].values())
    return ", ".join(f"{choice} in {count}" for choice, count in counts.most_common()) + " layers"


def _bits(report: Mapping[str, Any]) -> str | None:
    parts = []
    onebit, linear = report.get("onebit_bpw"), report.get("linear_bpw")
    if linear is not None and onebit not in (None, linear):
        parts.append(f"{onebit:.3f} in the packed layers, {linear:.3f} with the output head")
    elif linear is not None:
        parts.append(f"{linear:.3f} in the packed layers")
    if report.get("file_bpw") is not None:
        parts.append(f"{report['file_bpw']:.3f} over the whole file")
    return ", ".join(parts) or None


def _head_of(report: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    """The record of the output head, where it is packed in groups."""
    layers, head = report.get("layers") or {}, report.get("head")
    if report.get("bits"):  # all layers are packed in groups
        return {head: layers[head]} if head else {}
    return layers


def _groups(size: int) -> str:
    return "whole rows" if size == -1 else f"groups of {size}"


def _grouped(modules: Mapping[str, Mapping[str, Any]] | None) -> str | None:
    """The modules packed in groups, which are a head or an embedding: one of each at the most."""
    for record in (modules or {}).values():
        if record.get("method") == "mpq":
            weights = record["in_features"] * record["out_features"]
            size = shown_size(weights * record["bits_per_weight"] / 8)
            groups = _groups(record["group_size"])
            return f"{record['bits']} bits in {groups}: {record['bits_per_weight']:.3f} bits per weight, {size}"
    return None


def _untied(cost: Mapping[str, Any] | None) -> str | None:
    if not cost:
        return None
    return f"head and embedding, since {cost['reason']}: a matrix more to store, {shown_size(cost['bytes'])}"


def _sizes(before: int | None, after: int | None) -> str | None:
    if before and after:
        return f"{shown_size(before)} before, {shown_size(after)} after ({before / after:.1f} times smaller)"
    if before:
        return f"{shown_size(before)} before"
    return f"{shown_size(after)} on disk" if after else None


def _megabytes(count: float | None) -> str | None:
    return None if count is None else shown_size(count * 1e6)


def _percent(share: float) -> str:
    """A share in percent with one decimal, never rounded up to a 100 that it is not."""
    percent = f"{100 * share:.1f}"
    return "99.9%" if percent == "100.0" and share < 1 else f"{percent}%"


def _calibration(data: Mapping[str, Any] | None) -> str:
    if data is None:
        return "none: the method saw the weights alone"
    tokens = f", {data['tokens']} tokens" if data.get("tokens") is not None else ""
    digest = f", sha256 {data['sha256'][:12]}" if data.get("sha256") else ""
    return f"{data.get('source') or 'unnamed text'}{tokens}{digest}"


def _distillation(log: Mapping[str, Any] | None) -> str | None:
    if not log:
        return None
    return f"held-out KL {log['kl_before']:.3g} before, {log['kl_after']:.3g} after {log['tokens']} tokens"


def skipped_table(skipped: Mapping[str, Mapping[str, Any]], markdown: bool = False) -> str:
    """The skipped layers grouped by reason, the most weights first."""
    groups: dict[str, list[str]] = {}
    for name, entry in skipped.items():
        groups.setdefault(entry["reason"], []).append(name)
    weights = {reason: sum(skipped[name]["weights"] for name in names) for reason, names in groups.items()}
    rows = [
        (reason, len(groups[reason]), weights[reason], _some(groups[reason]))
        for reason in sorted(groups, key=lambda reason: (-weights[reason], reason))
    ]
    return format_table(["reason", "layers", "weights", "which"], rows, markdown=markdown)


def _some(names: Sequence[str], shown: int = 2) -> str:
    more = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {more} more" if more > 0 else "")


def worst_table(layers: Mapping[str, Mapping[str, Any]], markdown: bool = False) -> str:
    """The layers with the largest error: of the outputs where it was measured, else of the weights."""
    worst = sorted(layers, key=lambda name: (-_error(layers[name]), name))[:WORST_LAYERS]
    rows = [
        (
            name,
            f"{layers[name]['in_features']} × {layers[name]['out_features']}",
            layers[name]["relative_weight_error"],
            layers[name].get("relative_output_error"),
        )
        for name in worst
    ]
    return format_table(["layer", "inputs × outputs", "weight error", "output error"], rows, markdown=markdown)


def _error(layer: Mapping[str, Any]) -> float:
    """Nothing can be lost of a layer of zeros, which has no relative error."""
    output = layer.get("relative_output_error")
    error = layer["relative_weight_error"] if output is None else output
    return 0.0 if error is None else float(error)
