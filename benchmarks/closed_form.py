"""What each option of the closed form is worth on a real model: errors of weights and outputs, and of predictions.

    python benchmarks/closed_form.py MODEL --calibration FILE --data FILE [--json OUT]

Rows go from the bare closed form to importance weighting, each with balancing on and off. Every row quantizes its own
copy of the float model and is evaluated packed, beside that float model, on text that did not calibrate it. `output
error` is tr(ΔHΔᵀ)/tr(WHWᵀ) with H from the calibration text, the mean over layers; a row without importance is measured
with the same H.
"""

import argparse
import copy
import json
import statistics
from pathlib import Path
from typing import Any

import torch

from hf_onebit import OneBitConfig, OneBitQuantizer, __version__, evaluation, loading
from hf_onebit.calibration import read_text
from hf_onebit.report import format_table

ROWS = [
    {"use_importance_scaling": importance, "use_balancing": balancing, "planes": planes}
    for planes, importance, balancing in (
        (1, False, True),
        (1, False, False),
        (1, True, True),
        (1, True, False),
        (2, True, False),
    )
]


def measure(
    options: dict[str, Any], reference: Any, tokenizer: Any, windows: list[torch.Tensor], arguments: argparse.Namespace
) -> dict[str, Any]:
    """One row: quantize a copy, evaluate it against the float model."""
    model = copy.deepcopy(reference)
    quantizer = OneBitQuantizer(
        OneBitConfig(dataset=arguments.calibration, calibration_tokens=arguments.calibration_tokens, **options)
    )
    quantizer.quantize_model(model, tokenizer)
    assert quantizer.report is not None
    layers = quantizer.report["layers"].values()
    quality = evaluation.compare(model, reference, windows)
    return {
        **options,
        "linear_bpw": quantizer.report["linear_bpw"],
        "weight_error": statistics.mean(layer["relative_weight_error"] for layer in layers),
        "output_error": statistics.mean(layer["relative_output_error"] for layer in layers),
        **{key: quality[key] for key in ("perplexity", "kl", "top1", "reference_perplexity", "tokens")},
    }


def main() -> None:
    """Measure every row; print a table, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", metavar="MODEL", help="a float model: folder, hub id or .gguf file")
    parser.add_argument("--calibration", required=True, metavar="FILE")
    parser.add_argument("--data", required=True, metavar="FILE")
    parser.add_argument("--calibration-tokens", type=int, default=16384, metavar="N")
    parser.add_argument("--tokens", type=int, default=8192, metavar="N")
    parser.add_argument("--context", type=int, default=1024, metavar="N")
    parser.add_argument("--json", metavar="OUT")
    arguments = parser.parse_args()
    reference, tokenizer = loading.load_float(arguments.model), loading.load_tokenizer(arguments.model)
    reference = reference.to(torch.bfloat16)
    windows = evaluation.token_windows(read_text(arguments.data), tokenizer, arguments.context, arguments.tokens)
    rows = [measure(options, reference, tokenizer, windows, arguments) for options in ROWS]
    headers = ["planes", "importance", "balancing", "bits/weight", "weight error", "output error", "KL", "perplexity"]
    keys = ["planes", "use_importance_scaling", "use_balancing", "linear_bpw", "weight_error", "output_error", "kl"]
    print(format_table(headers, [[row[key] for key in [*keys, "perplexity"]] for row in rows], markdown=True))
    print(f"\nfloat perplexity {rows[0]['reference_perplexity']:.2f} on {rows[0]['tokens']} tokens")
    if arguments.json:
        study = {
            "model": Path(arguments.model).name,
            "calibration": Path(arguments.calibration).name,
            "data": Path(arguments.data).name,
            "calibration_tokens": arguments.calibration_tokens,
            "context": arguments.context,
            "versions": {"hf_onebit": __version__, "torch": torch.__version__},
            "rows": rows,
        }
        Path(arguments.json).write_text(json.dumps(study, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
