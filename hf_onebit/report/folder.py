"""The report as files: ``report.json`` and its plots."""

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hf_onebit.report.plots import plot_drift, plot_layer_errors, plot_quality, plot_tuning, tuning_logs

REPORT_FOLDER = "report"


def write_report(report: Mapping[str, Any], folder: str | os.PathLike[str]) -> tuple[list[str], list[str]]:
    """Write ``report.json``, and of its plots those that it has figures for.

    Each file is complete or absent: it is written beside its place and renamed. A plot of an earlier report that this
    one has no figures for is removed.

    Args:
        report: a report; ``evaluations``, a list of what ``hf-onebit eval`` measured, may be among its keys.
        folder: folder to make or to write into.

    Returns:
        paths of the files that were written, and notes on what was not, in whole sentences: matplotlib is missing.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / "report.json"
    text = json.dumps(json_safe(report), indent=1, allow_nan=False) + "\n"
    _replace(target, lambda path: path.write_text(text, encoding="utf-8"))
    written = [str(target)]
    for name, draw in _plots(report).items():
        path = folder / name
        if draw is None:
            path.unlink(missing_ok=True)
            continue
        try:
            _replace(path, draw)
        except ImportError as error:
            return written, [f"{error}. The report has no plots."]
        written.append(str(path))
    return written, []


def _plots(report: Mapping[str, Any]) -> dict[str, Callable[[Path], object] | None]:
    """What draws each file; None where the report has nothing for it."""
    evaluations = [e for e in report.get("evaluations") or [] if e.get("linear_bpw") is not None]
    drift = (report.get("fit") or {}).get("drift")
    return {
        "layer_errors.svg": (lambda path: plot_layer_errors(report, path)) if report.get("layers") else None,
        "drift.svg": (lambda path: plot_drift(report, path)) if drift else None,
        "tuning.svg": (lambda path: plot_tuning(report, path)) if any(tuning_logs(report)) else None,
        "quality.svg": (lambda path: plot_quality(evaluations, path)) if evaluations else None,
    }


def _replace(target: Path, write: Callable[[Path], object]) -> None:
    """Write a file beside its place, then put it there."""
    temporary = target.with_name(f".{target.stem}.partial{target.suffix}")
    try:
        write(temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def json_safe(value: Any) -> Any:
    """The same with null for NaN and infinity, which JSON lacks."""
    if isinstance(value, Mapping):
        return {str(key): json_safe(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_safe(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
