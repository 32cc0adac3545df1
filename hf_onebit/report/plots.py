"""Plots. Matplotlib is imported when something is drawn."""

import os
from collections.abc import Mapping, Sequence
from typing import Any


def plot_layer_errors(report: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Draw the relative error of every packed layer, in the model's order; one colour for each kind of layer.

    Args:
        report: a report; its key ``layers`` is drawn.
        path: file to write; its ending (.png, .svg, .pdf) says the format.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the report has no layer.
    """
    layers = report["layers"]
    if not layers:
        raise ValueError("the report has no packed layer, expected at least one to draw. Quantize a model first.")
    names = list(layers)
    kinds = list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names))
    measured = all(layers[name].get("relative_output_error") is not None for name in names)
    key = "relative_output_error" if measured else "relative_weight_error"
    figure = _figure(min(24.0, max(6.0, 0.12 * len(names))), 4.0)
    axes = figure.add_subplot()
    for number, kind in enumerate(kinds):
        places = [i for i, name in enumerate(names) if name.rsplit(".", 1)[-1] == kind]
        heights = [layers[names[i]][key] or 0.0 for i in places]
        axes.bar(places, heights, color=_color(number), label=kind)
    axes.set_xlabel("layer, in the model's order")
    axes.set_ylabel("relative error of the outputs" if measured else "relative error of the weights")
    axes.set_ylim(bottom=0)
    axes.legend(title="kind of layer", fontsize="small", ncols=2)
    figure.savefig(path)


def plot_drift(report: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Draw how far the hidden states were off after each block of the walk: ``fit.drift``, ‖x − x̂‖² / ‖x‖², on the
    sequences that layers were fitted on, before distillation.

    Args:
        report: a report.
        path: file to write.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the report has no drift, since its preset does not walk on the quantized prefix.
    """
    drift = (report.get("fit") or {}).get("drift")
    if not drift:
        raise ValueError("the report has no fit.drift, expected one: quantize with a preset above 'closed'.")
    figure = _figure(6.0, 4.0)
    axes = figure.add_subplot()
    axes.plot(range(1, len(drift) + 1), list(drift.values()), marker="o", markersize=3)
    axes.set_xlabel("blocks passed")
    axes.set_ylabel("relative error of the hidden states,\nbefore distillation")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    figure.savefig(path)


def plot_tuning(report: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Draw the tuning curves: each block's held-out loss by epoch, and the distillation's held-out KL by tokens.

    Args:
        report: a report; ``fit.blocks`` {block: {start, log [{epoch, loss_heldout}]}} and
            ``fit.distillation`` {kl_before, log [{tokens, kl_heldout}]} are drawn, whichever are there.
        path: file to write.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the report has neither.
    """
    blocks, distilled = tuning_logs(report)
    if not blocks and not distilled:
        raise ValueError("the report has no tuning log, expected fit.blocks or fit.distillation: quantize with a text.")
    figure = _figure(5.5 * (bool(blocks) + bool(distilled)), 4.0)
    panels = iter(figure.subplots(1, bool(blocks) + bool(distilled), squeeze=False)[0])
    if blocks:
        axes = next(panels)
        for number, (epochs, losses) in enumerate(blocks.values()):
            axes.plot(epochs, losses, color=_shade(number / max(1, len(blocks) - 1)), linewidth=1)
        axes.set(xlabel="epoch", ylabel="held-out loss of the block", title=f"{len(blocks)} blocks, the last brightest")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    if distilled:
        axes = next(panels)
        axes.plot(*distilled, marker="o", markersize=3)
        axes.set(xlabel="tokens", ylabel="held-out KL, nats per token", title="distillation")
        axes.grid(alpha=0.3)
    figure.savefig(path)


def plot_curves(curves: Mapping[str, Sequence[Mapping[str, Any]]], path: str | os.PathLike[str]) -> None:
    """Draw held-out loss, and KL where it is known, over the tokens that several ways of training saw.

    Args:
        curves: by name, entries with ``tokens``, ``nll`` and perhaps ``kl``, as ``evaluation.perplexity`` and
            ``compare`` have them; an entry without a finite value is left out.
        path: file to write.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is no curve.
    """
    if not any(curves.values()):
        raise ValueError("there is no curve, expected at least one entry of one: score the model while it trains.")
    labels = {"nll": "held-out loss, nats per token", "kl": "held-out KL to the float model, nats per token"}
    keys = [key for key in labels if any(key in entry for curve in curves.values() for entry in curve)]
    figure = _figure(5.5 * len(keys), 4.0)
    for axes, key in zip(figure.subplots(1, len(keys), squeeze=False)[0], keys, strict=True):
        for number, (name, curve) in enumerate(curves.items()):
            known = [entry for entry in curve if entry.get(key) is not None]
            x, y = ([entry[what] for entry in known] for what in ("tokens", key))
            axes.plot(x, y, marker="o", markersize=3, color=_color(number), label=name)
        axes.set(xlabel="tokens", ylabel=labels[key])
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(path)


def tuning_logs(
    report: Mapping[str, Any],
) -> tuple[dict[str, tuple[list[int], list[float]]], tuple[list[int], list[float]] | None]:
    """Per block the epochs and held-out losses; the tokens and held-out KL of the distillation, or None."""
    fit = report.get("fit") or {}
    blocks = {
        name: _curve(block["start"], block["log"], "epoch", "loss_heldout")
        for name, block in (fit.get("blocks") or {}).items()
    }
    distillation = fit.get("distillation") or {}
    if not distillation.get("log"):
        return blocks, None
    return blocks, _curve(distillation["kl_before"], distillation["log"], "tokens", "kl_heldout")


def _curve(start: float, log: Sequence[Mapping[str, Any]], x: str, y: str) -> tuple[list[int], list[float]]:
    """From the start on, without the entries of a run that had lost its way."""
    known = [entry for entry in log if entry[y] is not None]
    return [0, *(entry[x] for entry in known)], [start, *(entry[y] for entry in known)]


def plot_quality(evaluations: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Draw perplexity and KL over the bits per weight of the packed layers: a line for each text, a point a model.

    Args:
        evaluations: what ``hf-onebit eval --json`` printed, one or more of them: ``model``, ``data``, ``linear_bpw``,
            ``perplexity``, and with ``--against`` also ``reference_perplexity`` and ``kl``.
        path: file to write.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: none of them is of a packed model.
    """
    points = [e for e in evaluations if e.get("linear_bpw") is not None and e.get("perplexity") is not None]
    if not points:
        raise ValueError(
            "there is no evaluation of a packed model to draw, expected one or more: hf-onebit eval DIR --data FILE "
            "--against MODEL --write-card"
        )
    with_kl = any(point.get("kl") is not None for point in points)
    figure = _figure(5.5 * (1 + with_kl), 4.0)
    panels = figure.subplots(1, 1 + with_kl, squeeze=False)[0]
    texts = list(dict.fromkeys(_text_of(point) for point in points))
    for axes, key, title in zip(panels, ("perplexity", "kl"), ("perplexity", "KL, nats per token"), strict=False):
        for number, text in enumerate(texts):
            shown = [p for p in points if _text_of(p) == text and p.get(key) is not None]
            shown.sort(key=lambda point: point["linear_bpw"])
            bits, values = [p["linear_bpw"] for p in shown], [p[key] for p in shown]
            axes.plot(bits, values, marker="o", color=_color(number), label=text)
            for point, x, y in zip(shown, bits, values, strict=True):
                label = os.path.basename(os.path.normpath(str(point.get("model", ""))))
                axes.annotate(label, (x, y), fontsize="x-small", xytext=(3, 3), textcoords="offset points")
            floats = {p["reference_perplexity"] for p in shown if p.get("reference_perplexity") is not None}
            if key == "perplexity":
                for value in sorted(floats):
                    axes.axhline(value, linestyle="--", linewidth=0.8, color=_color(number))
        axes.set(xlabel="bits per weight, packed layers", ylabel=title, yscale="log")
        axes.grid(alpha=0.3, which="both")
    panels[0].legend(title="dashed: the float model", fontsize="x-small")
    figure.savefig(path)


def _text_of(evaluation: Mapping[str, Any]) -> str:
    text = os.path.basename(str(evaluation.get("data") or "unnamed text"))
    return f"{text}, context {evaluation['context']}" if evaluation.get("context") else text


def _figure(width: float, height: float) -> Any:
    """An empty figure. Not pyplot's: no window system is touched and no figure stays open."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Plots need matplotlib, which is not installed: pip install "hf_onebit[plots]"') from error
    return Figure(figsize=(width, height), layout="constrained")


def _color(number: int) -> Any:
    from matplotlib import colormaps

    return colormaps["tab10"](number % 10)


def _shade(share: float) -> Any:
    from matplotlib import colormaps

    return colormaps["viridis"](share)


def plot_roofline(
    results: Sequence[Mapping[str, Any]], path: str | os.PathLike[str], shape: Sequence[int] = (4096, 4096)
) -> None:
    """Draw multiply-adds per second over the rows of x, with the limit that reading the weights sets to each contender.

    One row of panels for each result, one panel for each mode. A dashed line is what the contender would reach if it
    took no longer than to read its weights, at the bandwidth measured in the same rounds with one row of x. With one
    thread, time that other programs had the processor for does not count.

    Args:
        results: what ``hf-onebit bench --json`` wrote.
        path: file to write; its ending (.png, .svg, .pdf) says the format.
        shape: (out, in) of the layer to draw.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: a result has no figures of that layer, or none of the bandwidth.
    """
    modes = list(dict.fromkeys(entry["mode"] for result in results for entry in result["layers"]))
    size = f"{shape[0]}x{shape[1]}"
    figure = _figure(5.5 * max(1, len(modes)), 4.5 * len(results))
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
                color = _color(number)
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
