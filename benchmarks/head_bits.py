"""What a packed output head and embedding cost in quality and save in bytes, with all other layers in floating point.

    python benchmarks/head_bits.py MODEL --data FILE [--calibration FILE] [--json OUT]

Every row packs its own copy of the bfloat16 model's head and embedding alone, and is evaluated beside that model, on
text that did not calibrate it. The sizes are those of a whole checkpoint: once with the other layers in floating point,
as evaluated, and once with them at one bit.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

import hf_onebit
from hf_onebit import OneBitConfig, OneBitQuantizer, demo, evaluation, loading
from hf_onebit.calibration import read_text
from hf_onebit.inspection import inspect
from hf_onebit.nn import find_layers
from hf_onebit.report import format_table

ROWS = ((None, None), (8, 8), (4, 4), (4, 8), (8, None), (4, None), (3, 3), (2, 2))  # head, embedding


def packed(source: str, folder: Path, keep_linears: bool, options: dict[str, Any], tokenizer: Any) -> Any:
    """The model with head and embedding packed, saved to ``folder``; and what is stored there."""
    model = loading.load_float(source)
    if keep_linears:
        options = {**options, "modules_to_not_convert": list(find_layers(model).selected)}
    quantizer = OneBitQuantizer(OneBitConfig(**options))
    quantizer.quantize_model(model, tokenizer)
    hf_onebit.save(model, folder, report=quantizer.report)
    return model, inspect(folder)


def measure(
    head: int | None, embedding: int | None, source: str, windows: list[torch.Tensor], arguments: argparse.Namespace
) -> dict[str, Any]:
    """One row."""
    row: dict[str, Any] = {"lm_head_bits": head, "embedding_bits": embedding}
    options = {"lm_head_bits": head, "embedding_bits": embedding, "head_group_size": arguments.group_size}
    reference, tokenizer = loading.load_float(source), loading.load_tokenizer(source)
    with tempfile.TemporaryDirectory() as folder:
        _, stored = packed(source, Path(folder, "one-bit"), False, {**options, "iters": 0}, tokenizer)  # for its size
        row |= {f"onebit_{key}": stored[key] for key in ("file_bytes", "linear_bpw", "file_bpw")}
        if head is None and embedding is None:
            size = sum(path.stat().st_size for path in Path(source).glob("*.safetensors"))
            quality = evaluation.perplexity(reference, windows)
            row |= {"file_bytes": size, "file_bpw": 8 * size / stored["total_weights"], "untied": False}
            return {**row, "perplexity": quality["perplexity"], "kl": 0.0, "top1": 1.0, "tokens": quality["tokens"]}
        if arguments.calibration:
            calibration = {"dataset": arguments.calibration, "calibration_tokens": arguments.calibration_tokens}
            options |= calibration
        model, stored = packed(source, Path(folder, "float"), True, options, tokenizer)
        row |= {key: stored[key] for key in ("file_bytes", "file_bpw", "untied")}
    quality = evaluation.compare(model, reference, windows)
    return {**row, **{key: quality[key] for key in ("perplexity", "kl", "top1", "tokens")}}


def main() -> None:
    """Measure every row; print a table, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", metavar="MODEL", help="a float model: folder, hub id or .gguf file")
    parser.add_argument("--data", metavar="FILE", required=True, help="text to evaluate on")
    parser.add_argument("--calibration", metavar="FILE", help="text whose activations weigh the head's errors")
    parser.add_argument("--calibration-tokens", type=int, default=4096, metavar="N")
    parser.add_argument("--group-size", type=int, default=64, metavar="N")
    parser.add_argument("--tokens", type=int, default=8192, metavar="N")
    parser.add_argument("--context", type=int, default=1024, metavar="N")
    parser.add_argument("--json", metavar="OUT")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        source = str(Path(folder, "float"))
        demo.save_float(arguments.model, source)
        text, tokenizer = read_text(arguments.data), loading.load_tokenizer(source)
        windows = evaluation.token_windows(text, tokenizer, arguments.context, arguments.tokens)
        rows = [measure(head, embedding, source, windows, arguments) for head, embedding in ROWS]
    study = {
        "model": Path(arguments.model).name,
        "data": Path(arguments.data).name,
        "calibration": arguments.calibration and Path(arguments.calibration).name,
        "group_size": arguments.group_size,
        "context": arguments.context,
        "versions": {"hf_onebit": hf_onebit.__version__, "torch": torch.__version__},
        "rows": rows,
    }
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(study, indent=1) + "\n", encoding="utf-8")
    headers = ["head", "embedding", "file", "bits/weight", "perplexity", "KL", "top-1", "one-bit file", "bits/weight"]
    cells = [
        [
            r["lm_head_bits"] or "float",
            r["embedding_bits"] or "float",
            f"{r['file_bytes'] / 1e6:.1f} MB",
            f"{r['file_bpw']:.2f}",
            f"{r['perplexity']:.2f}",
            f"{r['kl']:.4f}",
            f"{100 * r['top1']:.1f}",
            f"{r['onebit_file_bytes'] / 1e6:.1f} MB",
            f"{r['onebit_file_bpw']:.2f}",
        ]
        for r in rows
    ]
    print(format_table(headers, cells, markdown=True))


if __name__ == "__main__":
    main()
