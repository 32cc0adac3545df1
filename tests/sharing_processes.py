"""What tests of data-parallel quantization run in each of two processes, and by itself for comparison."""

import functools
import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from tiny import tiny_ids, tiny_llama, tiny_qwen3_moe

import hf_onebit
from hf_onebit.algorithms.blockwise import BlockOptions
from hf_onebit.conducting import packing
from hf_onebit.rungs import recipes

ROWS = [{"input_ids": tiny_ids(1, 24 + 8 * (i % 2), seed=i)} for i in range(9)]
PLAIN: dict[str, Any] = {"rounds": 1, "prefix_tokens": 288, "heldout_tokens": 32, "steps": 0, "lengths": (32,)}
TUNED = PLAIN | {"block": BlockOptions(epochs=1, sign_rate=0.003, learning_rate=0.003), "steps": 2, "step_tokens": 64}


def llama():
    return tiny_llama(hidden=32, intermediate=64, heads=2, kv_heads=1)


def experts():
    return tiny_qwen3_moe(experts=3)


# {name: (model, quantizer, recipe, options)}
RUNS: dict[str, tuple[Any, str, dict[str, Any], dict[str, Any]]] = {
    "closed": (llama, "OneBitQuantizer", PLAIN, {"preset": "closed", "lm_head_bits": 8}),
    "signs": (llama, "OneBitQuantizer", PLAIN, {"preset": "fast"}),
    "codes": (llama, "MPQQuantizer", PLAIN, {"preset": "fast", "bits": 3, "group_size": 32}),
    "experts": (experts, "MPQQuantizer", PLAIN, {"preset": "closed", "bits": 4, "search": "min-max"}),
    "tuned": (llama, "OneBitQuantizer", TUNED, {"preset": "fast"}),
}


def quantized(name: str, **more: Any) -> tuple[Any, Any]:
    """A tiny model quantized as one of ``RUNS`` says, and its quantizer."""
    make, quantizer, recipe, options = RUNS[name]
    conductor_class = getattr(hf_onebit, quantizer)
    work_dir = more.pop("work_dir", None)
    conductor = conductor_class(dataset=ROWS, **options, **more)
    conductor.recipes = {**conductor_class.recipes, "fast": recipes.Recipe(**recipe)}
    original = packing.quantize_on_prefix
    # In bfloat16 the last digit of a sum is soon the last digit of many hidden states.
    packing.quantize_on_prefix = functools.partial(original, arithmetic=None)
    try:
        return conductor.quantize_model(make(), work_dir=work_dir), conductor
    finally:
        packing.quantize_on_prefix = original


def write(name: str, folder: Path, rank: int, **more: Any) -> None:
    """The tensors and the errors of such a model, as files."""
    model, conductor = quantized(name, **more)
    save_file({key: value.clone() for key, value in model.state_dict().items()}, folder / f"{name}-{rank}.safetensors")
    (folder / f"{name}-{rank}.json").write_text(json.dumps(conductor.report), encoding="utf-8")


def read(name: str, folder: Path, rank: int) -> tuple[dict[str, Any], dict[str, Any]]:
    return load_file(folder / f"{name}-{rank}.safetensors"), json.loads((folder / f"{name}-{rank}.json").read_text())
