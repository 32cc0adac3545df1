"""What quantization did, for people: tables, a summary, the model card, a plot. Plain dicts in, text out.

The report that `OneBitQuantizer` leaves is plain JSON with these keys. A value that is not known is None or
absent, and is then left out or said to be unknown, never made up:

    method, preset, planes, seed, command, versions {package: version}
    layers      {name: {in_features, out_features, planes, bits_per_weight, relative_weight_error,
                        relative_output_error or None, seconds}}; a head packed in groups: bits and group_size
                        in place of planes, and method "mpq"
    embeddings  the same of the token embedding, where it is packed
    untied      {reason, bytes}: head and embedding were one in the float model; what the second one takes
    skipped     {name: {reason, weights}}: linear layers that stay in floating point
    coverage    share of the weights of linear layers, output head apart, that are packed: 0 to 1
    linear_bpw, file_bpw             bits per weight of the packed layers, and of the whole file
    onebit_bpw                       of the packed layers without a head packed in groups
    float_bytes, file_bytes          size of the model in floating point, and of the weights on disk
    total_weights, seconds, peak_memory_mb
    calibration {source, tokens, sha256}
    allocation  {target, wanted, planned, tokens, depth_prior, cost, least_cost, layers}: how a target was turned into
                planes per layer (budget.py); None without a target

Relative errors are ‖difference‖² / ‖float‖² (Frobenius): of the weights, and of the layer's outputs on the
calibration data.
"""

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

WORST_LAYERS = 5
TAGS = ("hf_onebit", "onebit", "1-bit")
_NUMBER = re.compile(r"[-+]?\d[\d.,]*(e[-+]?\d+)?( ?(%|×|x|s|[kMG]?B))?", re.IGNORECASE)

# ----------------------------------------------------------------------------------------------------- tables


def format_table(headers: Sequence[str], rows: Iterable[Sequence[object]], *, markdown: bool = False) -> str:
    """Lay out a table; columns of numbers are aligned to the right, all others to the left.

    Args:
        headers: one title a column.
        rows: cells; None is shown as a dash, a float with four significant digits, the rest by `str`.
        markdown: a Markdown table, rather than aligned columns for a terminal.

    Returns:
        The lines of the table, without a line end after the last.

    Raises:
        ValueError: there is no column, or a row has more or fewer cells than `headers`.
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


# ---------------------------------------------------------------------------------------------------- summary


def coverage_line(report: Mapping[str, Any]) -> str:
    """One sentence: how many linear layers are packed, what share of their weights that is, and at how many
    bits.

    Args:
        report: a report with the keys `layers`, `skipped`, `coverage` and `linear_bpw`.
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
    facts = _facts(report)
    width = max(len(name) for name, _ in facts)
    parts = [coverage_line(report), "\n".join(f"{name:<{width}}  {value}" for name, value in facts)]
    if report["skipped"]:
        parts.append("Kept in floating point:\n" + _skipped_table(report["skipped"]))
    if report["layers"]:
        parts.append("Largest relative errors:\n" + _worst_table(report["layers"]))
    if next_command:
        parts.append(f"Next: {next_command}")
    return "\n\n".join(parts)


def _facts(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, value) of all that the report knows, in the order of reading."""
    facts = {
        "method": _method(report),
        "bits per weight": _bits(report),
        "target": _target(report.get("allocation")),
        "output head": _grouped(report.get("layers")),
        "embedding": _grouped(report.get("embeddings")),
        "untied": _untied(report.get("untied")),
        "size": _sizes(report.get("float_bytes"), report.get("file_bytes")),
        "time": _duration(report.get("seconds")),
        "peak memory": _megabytes(report.get("peak_memory_mb")),
        "calibration": _calibration(report.get("calibration")),
    }
    return [(name, value) for name, value in facts.items() if value]


def _method(report: Mapping[str, Any]) -> str:
    parts = [str(report.get("method", "onebit"))]
    if report.get("preset"):
        parts.append(f"preset {report['preset']}")
    layers = (report.get("layers") or {}).values()
    counts = Counter(layer["planes"] for layer in layers if layer.get("planes"))
    if len(counts) > 1:
        parts.append(f"1 plane in {counts[1]} layers and 2 in {counts[2]}")
    elif planes := next(iter(counts), report.get("planes")):
        parts.append(f"{planes} plane{'s' if planes > 1 else ''}")
    return ", ".join(parts)


def _target(allocation: Mapping[str, Any] | None) -> str | None:
    if not allocation:
        return None
    unit = _bytes if allocation["target"] == "size" else "{:.3f} bits per weight".format
    spread = f"planes by sensitivity on {allocation['tokens']} tokens"
    return f"{unit(allocation['wanted'])}, {unit(allocation['planned'])} planned; {spread}"


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


def _grouped(modules: Mapping[str, Mapping[str, Any]] | None) -> str | None:
    """The modules packed in groups, which are a head or an embedding: one of each at the most."""
    for record in (modules or {}).values():
        if record.get("method") == "mpq":
            weights = record["in_features"] * record["out_features"]
            size = _bytes(weights * record["bits_per_weight"] / 8)
            groups = "whole rows" if record["group_size"] == -1 else f"groups of {record['group_size']}"
            return f"{record['bits']} bits in {groups}: {record['bits_per_weight']:.3f} bits per weight, {size}"
    return None


def _untied(cost: Mapping[str, Any] | None) -> str | None:
    if not cost:
        return None
    return f"head and embedding, since {cost['reason']}: a matrix more to store, {_bytes(cost['bytes'])}"


def _sizes(before: int | None, after: int | None) -> str | None:
    if before and after:
        return f"{_bytes(before)} before, {_bytes(after)} after ({before / after:.1f} times smaller)"
    if before:
        return f"{_bytes(before)} before"
    return f"{_bytes(after)} on disk" if after else None


def _bytes(count: float) -> str:
    """A size in decimal units, as disks and hubs count."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"


def _megabytes(count: float | None) -> str | None:
    return None if count is None else _bytes(count * 1e6)


def _duration(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


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


def _skipped_table(skipped: Mapping[str, Mapping[str, Any]], markdown: bool = False) -> str:
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


def _worst_table(layers: Mapping[str, Mapping[str, Any]], markdown: bool = False) -> str:
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
    output = layer.get("relative_output_error")
    return float(layer["relative_weight_error"] if output is None else output)


# ------------------------------------------------------------------------------------------------- model card


def model_card(info: Mapping[str, Any]) -> str:
    """The README.md of a packed checkpoint: how to load it, what was done, what was measured, what it cannot
    do.

    Args:
        info: the report (see the top of this file), and besides, each of them optional:
            `repo_id`, where the checkpoint will be published;
            `provenance`, its origin: base_model, base_model_license, command, calibration, seed;
            `evaluation`, what `hf_onebit.evaluation.compare` or `perplexity` returned, to which may be added
            `data` (name of the text), `sha256` (of the text) and `reference` (what the reference model was).

    Returns:
        Markdown with a YAML head. The licence is the base model's; where that is unknown there is none in the
        head, and a sentence says so.
    """
    from huggingface_hub import ModelCard

    info = {**info, **{key: value for key, value in _provenance(info).items() if value is not None}}
    parts = [
        f"# {info.get('repo_id') or _title(info)}",
        _introduction(info),
        _loading(info),
        "## What was done\n\n" + _what_was_done(info),
        "## Measured\n\n" + _measured(info.get("evaluation")),
        "## Limits\n\n" + _limits(info),
        "## Licence\n\n" + _licence(info),
    ]
    head = _card_data(info).to_yaml()
    return str(ModelCard(f"---\n{head}\n---\n\n" + "\n\n".join(parts) + "\n"))


def _provenance(info: Mapping[str, Any]) -> dict[str, Any]:
    """What the provenance knows better than the report."""
    provenance = info.get("provenance") or {}
    keys = ("base_model", "base_model_license", "source", "command", "calibration", "seed")
    return {key: provenance.get(key) for key in keys}


def _card_data(info: Mapping[str, Any]) -> Any:
    from huggingface_hub import ModelCardData

    base = info.get("base_model")
    known: dict[str, Any] = {}
    if _is_repository(base):
        known = {"base_model": base, "base_model_relation": "quantized"}
    return ModelCardData(
        library_name="transformers",
        license=info.get("base_model_license"),
        tags=list(TAGS),
        **known,
    )


def _is_repository(name: str | None) -> bool:
    """Whether a base model is named as on the hub; a folder on a disk says nothing to anybody else."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    if not name or os.path.exists(name):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _base_name(info: Mapping[str, Any]) -> str | None:
    base = info.get("base_model")
    if not base:
        source = info.get("source")  # where it was read from, which is no name on the hub
        return str(source) if source else None
    if _is_repository(base):
        return str(base)
    return os.path.basename(os.path.normpath(base))


def _title(info: Mapping[str, Any]) -> str:
    base = _base_name(info)
    method = info.get("method", "onebit")
    return f"{base.split('/')[-1]}, {method}" if base else f"A {method} model"


def _introduction(info: Mapping[str, Any]) -> str:
    base = _base_name(info)
    public = _is_repository(info.get("base_model"))
    link = f"[{base}](https://huggingface.co/{base})" if public else f"`{base}`"
    of = f" of {link}" if base else ""
    bpw = info.get("linear_bpw")
    bits = "" if bpw is None else f" at {bpw:.3f} bits per weight in its packed layers"
    return f"A quantized version{of}{bits}, packed by hf_onebit. It stays packed on disk and in memory."


def _loading(info: Mapping[str, Any]) -> str:
    where = info.get("repo_id") or "path/to/this/folder"
    return (
        "```python\n"
        "import hf_onebit  # registers the method; without it this model does not load\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "\n"
        f'model = AutoModelForCausalLM.from_pretrained("{where}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{where}")\n'
        "```\n"
        "\n"
        "`pip install hf_onebit` installs what it needs."
    )


def _what_was_done(info: Mapping[str, Any]) -> str:
    facts = _facts(info)
    if info.get("seed") is not None:
        facts.append(("seed", str(info["seed"])))
    data = info.get("calibration")
    if data and data.get("sha256"):
        facts.append(("calibration data, sha256", f"`{data['sha256']}`"))
    facts += [(f"version of {name}", version) for name, version in (info.get("versions") or {}).items()]
    parts = [coverage_line(info)] if {"layers", "skipped", "coverage", "linear_bpw"} <= set(info) else []
    parts.append(format_table(["", ""], facts, markdown=True))
    if info.get("command"):
        parts.append(f"Made by this command:\n\n```bash\n{info['command']}\n```")
    if info.get("skipped"):
        parts.append("Linear layers kept in floating point:\n\n" + _skipped_table(info["skipped"], markdown=True))
    if info.get("layers"):
        parts.append("The layers with the largest relative errors:\n\n" + _worst_table(info["layers"], markdown=True))
    return "\n\n".join(parts)


_MEASURES = {
    "perplexity": "perplexity",
    "reference_perplexity": "perplexity of the reference",
    "kl": "KL(reference, this model), nats per token",
    "top1": "same most probable token as the reference",
    "tokens": "tokens scored",
    "context": "context, tokens",
}


def _measured(evaluation: Mapping[str, Any] | None) -> str:
    if not evaluation:
        return "Not evaluated. `hf-onebit eval` measures perplexity and the distance from the float model."
    rows = [(title, evaluation[key]) for key, title in _MEASURES.items() if evaluation.get(key) is not None]
    for key, title in (("data", "text"), ("sha256", "text, sha256"), ("reference", "reference")):
        if evaluation.get(key):
            rows.append((title, evaluation[key]))
    return format_table(["measure", "value"], rows, markdown=True)


def _limits(info: Mapping[str, Any]) -> str:
    calibrated = (
        "The signs and scales were fitted to the calibration text above: on other kinds of text the model may be worse."
        if info.get("calibration")
        else "No calibration data was used, which costs much quality at so few bits."
    )
    return (
        "- About one bit per weight costs quality. Compare with the base model on your own task before you "
        "rely on it.\n"
        f"- {calibrated}\n"
        "- What the base model must not be used for, this one must not either; refusals it has learned may "
        "be weaker.\n"
        "- Programs that do not know hf_onebit refuse this checkpoint: its packed weights do not have the shapes that "
        "they expect."
    )


def _licence(info: Mapping[str, Any]) -> str:
    licence = info.get("base_model_license")
    if licence:
        return f"That of the base model: {licence}."
    return (
        "The licence of the base model is not known to the program that wrote this card, so none is stated. The base "
        "model's licence applies to this model too: look it up before you use or share it."
    )


# ------------------------------------------------------------------------------------------------------- plot


def plot_layer_errors(report: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Draw the relative error of every packed layer, in the model's order; one colour for each kind of layer.

    Args:
        report: a report; its key `layers` is drawn.
        path: file to write; its ending (.png, .svg, .pdf) says the format.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the report has no layer.
    """
    layers = report["layers"]
    if not layers:
        raise ValueError("the report has no packed layer, expected at least one to draw. Quantize a model first.")
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Plots need matplotlib, which is not installed: pip install "hf_onebit[plots]"') from error

    names = list(layers)
    kinds = list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names))
    measured = all(layers[name].get("relative_output_error") is not None for name in names)
    key = "relative_output_error" if measured else "relative_weight_error"
    # Figure, not pyplot: no window system is touched and no figure stays open.
    figure = Figure(figsize=(min(24.0, max(6.0, 0.12 * len(names))), 4.0), layout="constrained")
    axes = figure.add_subplot()
    for number, kind in enumerate(kinds):
        places = [i for i, name in enumerate(names) if name.rsplit(".", 1)[-1] == kind]
        axes.bar(places, [layers[names[i]][key] for i in places], color=colormaps["tab10"](number % 10), label=kind)
    axes.set_xlabel("layer, in the model's order")
    axes.set_ylabel("relative error of the outputs" if measured else "relative error of the weights")
    axes.set_ylim(bottom=0)
    axes.legend(title="kind of layer", fontsize="small", ncols=2)
    figure.savefig(path)


def plot_roofline(
    results: Sequence[Mapping[str, Any]], path: str | os.PathLike[str], shape: Sequence[int] = (4096, 4096)
) -> None:
    """Draw multiply-adds per second over the rows of x, with the limit that reading the weights sets to each contender.

    One row of panels for each result, one panel for each mode. A dashed line is what the contender would reach if it
    took no longer than to read its weights, at the bandwidth measured in the same rounds with one row of x. With one
    thread, time that other programs had the processor for does not count.

    Args:
        results: what `hf-onebit bench --json` wrote.
        path: file to write; its ending (.png, .svg, .pdf) says the format.
        shape: (out, in) of the layer to draw.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: a result has no figures of that layer, or none of the bandwidth.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Plots need matplotlib, which is not installed: pip install "hf_onebit[plots]"') from error

    modes = list(dict.fromkeys(entry["mode"] for result in results for entry in result["layers"]))
    size = f"{shape[0]}x{shape[1]}"
    figure = Figure(figsize=(5.5 * max(1, len(modes)), 4.5 * len(results)), layout="constrained")
    panels = figure.subplots(max(1, len(results)), max(1, len(modes)), squeeze=False, sharey=True)
    for row, result in zip(panels, results, strict=True):
        for axes, mode in zip(row, modes, strict=True):
            entries = [e for e in result["layers"] if e["mode"] == mode and list(e["shape"]) == list(shape)]
            entries.sort(key=lambda entry: entry["batch"])
            if not entries or "read" not in entries[0]["contenders"]:
                raise ValueError(
                    f"a result has no bandwidth and times of {size} in mode {mode}: measure them with "
                    f"hf-onebit bench --shape {size} --json FILE, where the kernels are compiled"
                )
            batches = [entry["batch"] for entry in entries]
            bandwidth = entries[0]["contenders"]["read"]["gb_per_s"] * 1e9
            bandwidth *= _slowdown(result, entries[0]["contenders"]["read"])
            top = 0.0
            for number, name in enumerate(name for name in entries[0]["contenders"] if name != "read"):
                found = [entry["contenders"][name] for entry in entries]
                rates = [
                    batch * figures["weights_per_s"] * _slowdown(result, figures)
                    for batch, figures in zip(batches, found, strict=True)
                ]
                roof = [batch * bandwidth / (found[0]["bits_per_weight"] / 8) for batch in batches]
                color = colormaps["tab10"](number % 10)
                axes.plot(batches, rates, marker="o", color=color, label=name)
                axes.plot(batches, roof, linestyle="--", linewidth=0.8, color=color)
                top = max(top, *rates)
            axes.set(xscale="log", yscale="log", xlabel="rows of x", ylim=(None, 3 * top))
            axes.set_xticks(batches, labels=[str(batch) for batch in batches], minor=False)
            axes.set_title(
                f"{size}, {mode}, {result['threads']} thread(s), {bandwidth / 1e9:.0f} GB/s", fontsize="medium"
            )
            axes.grid(alpha=0.3)
        row[0].set_ylabel("multiply-adds per second")
    panels[0][0].legend(title="dashed: reading its weights", fontsize="x-small", loc="lower right", ncols=2)
    figure.savefig(path)


def _slowdown(result: Mapping[str, Any], figures: Mapping[str, Any]) -> float:
    """How much longer a contender of one thread took because other programs had the processor; else 1."""
    return float(figures["seconds"] / figures["cpu_seconds"]) if result["threads"] == 1 else 1.0
