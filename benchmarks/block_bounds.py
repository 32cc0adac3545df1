"""What bounds a tuned block: its format, its updates, or its text. One block of a float model, tuned in many ways.

    python benchmarks/block_bounds.py FLOAT --calibration FILE --judge FILE [--block 5] [--runs 2p:12288:20 ...]

A run is FORMAT:TOKENS:EPOCHS: `1p` and `2p` are planes of signs, `2g64` codes of two bits in groups of 64, with zeros.
The blocks before stay in floats. The error is the loss of docs/methods/blockwise.md, of what is stored, on a text that
no run has read. With --json OUT runs that are there already are not made again.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from hf_onebit import OneBitConfig, loading
from hf_onebit.algorithms.block_loss import BlockLoss, Example
from hf_onebit.calibration import Batch, load_calibration
from hf_onebit.formats.table import TableEntry
from hf_onebit.quantization.planning import plan_layers
from hf_onebit.quantization.records import mean_bits
from hf_onebit.rungs.fitting import LayerMethod
from hf_onebit.rungs.group_fitting import GroupMethod
from hf_onebit.rungs.ladder import PrefixResult, SignMethod, quantize_on_prefix
from hf_onebit.rungs.recipes import MPQ_RECIPES, RECIPES
from hf_onebit.rungs.sequences import judging_sequences

WORK = ((12288, 0), (12288, 5), (12288, 20), (12288, 80), (49152, 0), (49152, 5), (49152, 20))
RUNS = [f"{form}:{tokens}:{epochs}" for form in ("2p", "2g64") for tokens, epochs in WORK]
ROUNDS = 1  # of flips and scales, or of codes and scales, in each layer
CODES = TableEntry(method="mpq", bits=2, group_size=64, symmetric=False)


def main() -> None:
    """Every run; a line each, and JSON where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("model", metavar="FLOAT")
    parser.add_argument("--calibration", required=True, metavar="FILE")
    parser.add_argument("--judge", required=True, metavar="FILE", help="text that no run reads")
    parser.add_argument("--judge-tokens", type=int, default=16384)
    parser.add_argument("--block", type=int, default=5)
    parser.add_argument("--runs", nargs="+", default=RUNS, metavar="FORMAT:TOKENS:EPOCHS")
    parser.add_argument("--json", type=Path, metavar="OUT")
    options = parser.parse_args()
    tokenizer = loading.load_tokenizer(options.model)
    model = loading.load_float(options.model, dtype=torch.float32).eval()
    stack: Any = model.base_model
    stack.layers = stack.layers[: options.block + 2]  # behind the last one stands a norm
    model.config.num_hidden_layers = len(stack.layers)
    inside = f".layers.{options.block}."
    names = [name for name in plan_layers(model, OneBitConfig()).selected if inside in name]
    judges = load_calibration(options.judge, tokenizer, max_tokens=options.judge_tokens, context=512, seed=0)
    floats = hidden_states(model, judges.batches, options.block)
    found = []
    if options.json is not None and options.json.exists():
        found = json.loads(options.json.read_text("utf-8"))["runs"]
    calibration = cache(
        lambda tokens: load_calibration(options.calibration, tokenizer, max_tokens=tokens, context=512, seed=0)
    )
    for text in options.runs:
        if text in [run["run"] for run in found]:
            continue
        form, tokens, epochs = text.split(":")
        data = calibration(int(tokens))
        begin = time.perf_counter()
        walked = tune_one(model, names, data.batches, form, int(epochs))
        [tuned] = walked.blocks.values()
        stored = hidden_states(model, judges.batches, options.block, values_of(model, walked, form))
        found.append(
            {
                "run": text,
                "bits_per_weight": mean_bits(walked.records),
                "tokens": data.tokens,
                "updates": int(epochs) * (len(data.batches) - len(judging_sequences(len(data.batches)))),
                "error": error(floats, [behind for _, behind in stored]),
                "heldout": tuned.best,
                "best_epoch": tuned.best_epoch,
                "training": tuned.log[-1]["loss_train"] if tuned.log else None,
                "changed": tuned.flipped,
                "seconds": time.perf_counter() - begin,
            }
        )
        print(found[-1], flush=True)
        if options.json is not None:
            about = {"model": Path(options.model).name, "block": options.block, "judge_tokens": judges.tokens}
            options.json.write_text(json.dumps({**about, "runs": found}, indent=1) + "\n", encoding="utf-8")


def tune_one(model: Any, names: Sequence[str], batches: Sequence[Batch], form: str, epochs: int) -> PrefixResult:
    """The layers of one block, fitted and tuned on the float prefix, by the recipe of `best` but for its epochs."""
    signs = form != "2g64"
    usual = (RECIPES if signs else MPQ_RECIPES)["best"].block
    assert usual is not None
    block = dataclasses.replace(usual, epochs=epochs)
    method = method_of(form, names)
    return quantize_on_prefix(model, names, batches, method=method, block=block, arithmetic=None)


def method_of(form: str, names: Sequence[str]) -> LayerMethod:
    """How layers of this form are fitted."""
    if form == "2g64":
        return GroupMethod(dict.fromkeys(names, CODES), rounds=ROUNDS)
    return SignMethod(int(form.removesuffix("p")), ROUNDS, tunes=True, keep_margins=False)


def values_of(model: Any, walked: PrefixResult, form: str) -> dict[str, Tensor]:
    """{parameter of the base model: value} of the block as it is stored: weights dequantized, gains and biases."""
    method = method_of(form, list(walked.packed))
    found = dict(walked.vectors)
    for name, tensors in walked.packed.items():
        found[f"{name}.weight"] = method.dense(name, tensors, model.get_submodule(name).in_features)
    return {name.removeprefix(f"{model.base_model_prefix}."): value for name, value in found.items()}


@torch.no_grad()
def hidden_states(
    model: Any, batches: Sequence[Batch], block: int, values: Mapping[str, Tensor] | None = None
) -> list[tuple[Tensor, Tensor]]:
    """(rows, hidden) in front of a block and behind it, for each sequence; with other ``values`` of some parameters."""
    found = []
    for batch in batches:
        inputs = {**batch, "output_hidden_states": True, "use_cache": False}
        states = functional_call(model.base_model, dict(values or {}), kwargs=inputs).hidden_states
        found.append((states[block][0], states[block + 1][0]))
    return found


def error(floats: Sequence[tuple[Tensor, Tensor]], outputs: Sequence[Tensor]) -> float:
    """L of docs/methods/blockwise.md, over all sequences."""
    examples = [
        Example(lambda output=output: output, target, float_input)
        for (float_input, target), output in zip(floats, outputs, strict=True)
    ]
    loss = BlockLoss.of(examples)
    return sum(float(loss.error(example)) for example in examples) / loss.unit(examples)


if __name__ == "__main__":
    main()
