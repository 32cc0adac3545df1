"""What ``hf-onebit bench`` prints."""

from collections.abc import Sequence
from typing import Any

from hf_onebit.report import format_table

# Below this share of the processor, times on the wall's clock say more about others' work than about ours.
LEAST_SHARE = 0.9


def as_text(result: dict[str, Any]) -> str:
    """Tables of what ``run`` returned, for a terminal."""
    parts = [f"{result['cpu']}, {result['isa'] or 'no compiled kernels'}, {result['threads']} thread(s); medians"]
    if result["layers"]:
        parts.append(_layers_table(result["layers"]))
    if busy := _busy_line(result):
        parts.append(busy)
    if result["model"]:
        parts.append(_model_table(result["model"]))
    parts += [skip_line(entry) for entry in result["skipped"]]
    return "\n\n".join(parts)


def _layers_table(results: Sequence[dict[str, Any]]) -> str:
    headers = [
        "out x in", "batch", "mode", "contender", "time", "by packed", "by reading", "CPU time", "by packed",
        "by reading", "GB/s", "weights/ns", "error",
    ]  # fmt: skip
    rows = []
    for result in results:
        shape = "x".join(map(str, result["shape"]))
        for name, figures in result["contenders"].items():
            rate, error = figures["weights_per_s"], figures["error"]
            rows.append([
                shape, result["batch"], result["mode"], name,
                f"{1e6 * figures['seconds']:.1f} µs", _ratio(figures["times_packed"]), _ratio(figures["times_read"]),
                f"{1e6 * figures['cpu_seconds']:.1f} µs", _ratio(figures["cpu_times_packed"]),
                _ratio(figures["cpu_times_read"]), f"{figures['gb_per_s']:.1f}",
                None if rate is None else f"{rate / 1e9:.1f}", None if error is None else f"{error:.0e}",
            ])  # fmt: skip
    return format_table(headers, rows)


def _ratio(value: float | None) -> str | None:
    return None if value is None else f"{value:.2f}"


def _busy_line(result: dict[str, Any]) -> str | None:
    """A warning where other programs had the processor while one thread of ours wanted it."""
    shares = [
        figures["cpu_seconds"] / figures["seconds"]
        for entry in result["layers"]
        for figures in entry["contenders"].values()
    ]
    if result["threads"] > 1 or not shares or min(shares) > LEAST_SHARE:
        return None
    return (
        f"The machine was busy: some contender had the processor for {100 * min(shares):.0f} % of its time only. "
        "Compare CPU times, or measure again on an idle machine."
    )


def _model_table(model: dict[str, Any]) -> str:
    headers = [
        "model", "linear layers", "head", "prefill tokens/s", "time by packed", "decode tokens/s", "time by packed",
        "weights", "resident",
    ]  # fmt: skip
    rows = [
        [
            name, rival["linear"], rival["head"], f"{rival['prefill_tokens_per_s']:.1f}",
            f"{rival['prefill_by_packed']:.2f}", f"{rival['decode_tokens_per_s']:.1f}",
            f"{rival['decode_by_packed']:.2f}", _megabytes(rival["bytes"]), _megabytes(rival["resident_bytes"]),
        ]
        for name, rival in model["rivals"].items()
    ]  # fmt: skip
    said = (
        f"{model['model']}: {model['prompt_tokens']} tokens of prompt, {model['new_tokens']} new ones. All tensors of "
        f"the packed model are {model['tensors_by_file']:.3f} times its file of "
        f"{_megabytes(model['packed_file_bytes'])}."
    )
    skipped = [f"skipped: {entry['contender']}: {entry['reason']}" for entry in model["skipped"]]
    return "\n".join([said, "", format_table(headers, rows), *skipped])


def _megabytes(count: int | None) -> str | None:
    return None if count is None else f"{count / 1e6:.0f} MB"


def skip_line(entry: dict[str, Any]) -> str:
    """What was left out, and why."""
    shape = "" if entry["shape"] is None else f" for {entry['shape'][0]}x{entry['shape'][1]}"
    return f"skipped: {entry['contender']}{shape}: {entry['reason']}"


def layer_line(result: dict[str, Any]) -> str:
    """One line of progress: the times of all contenders at one shape, batch and mode."""
    out_features, in_features = result["shape"]
    parts = [f"{out_features}x{in_features} batch {result['batch']} {result['mode']}:"]
    for name, figures in result["contenders"].items():
        ratio = "" if name == "packed" else f" ({figures['times_packed']:.2f}x)"
        parts.append(f"{name} {1e6 * figures['seconds']:.0f} µs{ratio}")
    return "  ".join(parts)
