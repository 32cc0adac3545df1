"""Perplexity of a model quantized to mpq at several widths, beside its float model, data-free and calibrated.

    python benchmarks/mpq.py MODEL --calibration calibration.txt --data wikitext-2-test.txt -o mpq.json

Every line is the packed module, evaluated on the first ``--tokens`` tokens of the data in windows of ``--context``.
A run is BITS[:OPTION=VALUE]..., options being fields of ``MPQConfig``; those with a preset other than closed, and those
with ``calibrate=1``, see the calibration text.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import time
from pathlib import Path
from typing import Any

import torch

from hf_onebit import MPQConfig, MPQQuantizer, evaluation, loading

RUNS = (
    "8",
    "4:search=min-max",
    "4:search=half-quadratic",
    "4",
    "4:calibrate=1",
    "4:preset=fast",
    "3",
    "3:preset=fast",
    "3:preset=balanced",
    "2",
    "2:preset=fast",
    "2:preset=balanced",
)
Figures = dict[str, Any]


def options_of(run: str) -> dict[str, Any]:
    """Fields of ``MPQConfig``, and ``calibrate``, from the text of a run.

    >>> options_of("3:preset=fast:symmetric=1")
    {'bits': 3, 'preset': 'fast', 'symmetric': True}
    """
    bits, *pairs = run.split(":")
    options: dict[str, Any] = {"bits": int(bits)}
    for pair in pairs:
        key, _, value = pair.partition("=")
        flag = key in ("symmetric", "act_order", "double_quant", "calibrate")
        options[key] = bool(int(value)) if flag else int(value) if value.lstrip("-").isdecimal() else value
    return options


def measure(model: str, run: str, args: argparse.Namespace, tokenizer: Any, windows: Any) -> Figures:
    """Quantize and evaluate once."""
    options = options_of(run)
    calibrates = options.pop("calibrate", False) or options.get("preset", "closed") != "closed"
    if calibrates:
        options["dataset"] = args.calibration
    loaded = loading.load_float(model, dtype=torch.bfloat16)
    quantizer = MPQQuantizer(MPQConfig(seed=args.seed, **options))
    start = time.perf_counter()
    work = None if args.work is None else args.work / run.replace(":", "_")
    quantizer.quantize_model(loaded, tokenizer, work_dir=work)
    report = quantizer.report or {}
    seconds = max(time.perf_counter() - start, report["seconds"])
    figures: Figures = {"run": run, "seconds": seconds, "linear_bpw": report["linear_bpw"]}
    figures["perplexity"] = evaluation.perplexity(loaded, windows)["perplexity"]
    figures["calibration_tokens"] = (report.get("calibration") or {}).get("tokens")
    figures["peak_memory_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if args.report is not None:
        args.report.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return figures


def main() -> None:
    """Measure the runs named, one after the other, and write after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True, help="text to calibrate on")
    parser.add_argument("--data", required=True, help="text to evaluate on, never calibrated on")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="keep interrupted runs here and go on with them")
    parser.add_argument("--report", type=Path, help="write the report of the last run here")
    parser.add_argument("-o", "--output", type=Path, help="JSON file; runs that it holds already are kept")
    parser.add_argument("--runs", nargs="+", default=RUNS, help=f"default: {' '.join(RUNS)}")
    args = parser.parse_args()

    tokenizer = loading.load_tokenizer(args.model)
    text = Path(args.data).read_text(encoding="utf-8")
    windows = evaluation.token_windows(text, tokenizer, args.context, args.tokens)
    reference = loading.load_float(args.model, dtype=torch.bfloat16)
    base = evaluation.perplexity(reference, windows)["perplexity"]
    del reference
    print(f"float {base:.3f}", flush=True)
    results: list[Figures] = []
    if args.output is not None and args.output.exists():
        results = json.loads(args.output.read_text(encoding="utf-8"))["runs"]
    for run in args.runs:
        figures = measure(args.model, run, args, tokenizer, windows)
        figures["ratio"], figures["float"] = figures["perplexity"] / base, base  # another machine has another one
        results = [*(r for r in results if r["run"] != run), figures]
        print(
            f"{run:32} {figures['linear_bpw']:.3f} bpw  {figures['perplexity']:10.3f}  x{figures['ratio']:.4f}  "
            f"{figures['seconds']:.0f} s",
            flush=True,
        )
        if args.output is not None:
            machine = {"threads": torch.get_num_threads(), "torch": torch.__version__, "machine": platform.processor()}
            content = {"model": Path(args.model).name, "float": base, "tokens": args.tokens, "context": args.context}
            args.output.write_text(json.dumps({**content, **machine, "runs": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
