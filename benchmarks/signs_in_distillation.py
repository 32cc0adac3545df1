"""What signs are worth that learn while the whole model is distilled: one walk, then one run for each pair of rates.

    python benchmarks/signs_in_distillation.py FLOAT --calibration FILE --data FILE --rates 0:0.02 0.004:0.02

FLOAT is a float folder. A pair is SIGN_RATE:LEARNING_RATE; all else is the recipe of --preset, without its flips. The
JSON is that of docs/results/signs_in_distillation_h100.json.
"""

import argparse
import copy
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from hf_onebit import OneBitConfig, evaluation, loading
from hf_onebit.calibration import CalibrationData, load_calibration, read_text
from hf_onebit.config import CALIBRATION_TOKENS
from hf_onebit.nn.replace import set_packed
from hf_onebit.quantization.planning import plan_layers
from hf_onebit.rungs.ladder import PrefixResult, quantize_on_prefix
from hf_onebit.rungs.recipes import RECIPES, Recipe
from hf_onebit.rungs.sequences import prefix_batches
from hf_onebit.rungs.upper_rungs import distill_scales


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", metavar="FLOAT")
    parser.add_argument("--calibration", required=True, metavar="FILE")
    parser.add_argument("--data", required=True, action="append", metavar="FILE", help="score the first tokens of it")
    parser.add_argument("--rates", nargs="+", default=["0:0.02", "0.004:0.02"], metavar="SIGN:LEARNING")
    parser.add_argument("--preset", default="best", choices=[*RECIPES])
    parser.add_argument("--steps", type=int, metavar="N", help="updates (default: the preset's)")
    parser.add_argument("--calibration-tokens", type=int, metavar="N", help="default: the preset's")
    parser.add_argument("--length", type=int, default=1024, metavar="N", help="tokens of a calibration sequence")
    parser.add_argument("--tokens", type=int, default=8192, metavar="N", help="tokens of each text that are scored")
    parser.add_argument("--context", type=int, default=1024, metavar="N")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, metavar="OUT")
    return parser.parse_args()


def packed(model: Any, walked: PrefixResult) -> Any:
    """A copy of the float model with the walk's layers, gains and biases."""
    student = copy.deepcopy(model)
    for name, tensors in walked.packed.items():
        set_packed(student, name, {key: tensor.clone() for key, tensor in tensors.items()})
    for name, value in walked.vectors.items():
        parameter = student.get_parameter(name)
        parameter.data = value.to(parameter.device, copy=True)
    return student


def run(
    arguments: argparse.Namespace,
    model: Any,
    tokenizer: Any,
    data: CalibrationData,
    walked: PrefixResult,
    recipe: Recipe,
) -> dict[str, Any]:
    """One distillation from where the walk ended, and its packed model's scores."""
    student = packed(model, walked)
    teacher = copy.deepcopy(model).to(torch.bfloat16)
    done = distill_scales(student, teacher, data.batches, recipe, seed=0, judged=print, margins=walked.margins)
    if done is None:
        raise ValueError(f"{arguments.calibration}: too short to distil on, expected two sequences at least")
    scores = {}
    for file in arguments.data:
        windows = evaluation.token_windows(read_text(file), tokenizer, arguments.context, arguments.tokens)
        found = dict(evaluation.compare(student, model, windows))
        scores[Path(file).name] = {key: found[key] for key in ("perplexity", "reference_perplexity", "kl", "top1")}
        scores[Path(file).name]["x"] = found["perplexity"] / found["reference_perplexity"]
    return {
        "sign_rate": recipe.sign_rate,
        "learning_rate": recipe.learning_rate,
        "steps": recipe.steps,
        "kl_before": done["kl_before"],
        "log": [{key: entry[key] for key in ("step", "kl_train", "kl_heldout")} for entry in done["log"]],
        "signs_changed": done["signs_changed"],
        "evaluation": scores,
    }


def main() -> None:
    """Walk once, distil for each pair of rates, print, and write JSON where asked."""
    arguments = parse()
    tokenizer = loading.load_tokenizer(arguments.model)
    model = loading.load_float(arguments.model, dtype=torch.float32).eval().to(arguments.device)
    recipe = dataclasses.replace(RECIPES[arguments.preset], flip_rounds=0)
    if arguments.steps is not None:
        recipe = dataclasses.replace(recipe, steps=arguments.steps)
    tokens = arguments.calibration_tokens or CALIBRATION_TOKENS[arguments.preset]
    data = load_calibration(arguments.calibration, tokenizer, max_tokens=tokens, context=arguments.length, seed=0)
    layers = list(plan_layers(model, OneBitConfig()).selected)
    start = time.perf_counter()
    walked = quantize_on_prefix(
        model, layers, prefix_batches(data.batches, recipe), rounds=recipe.rounds, block=recipe.block, keep_margins=True
    )
    seconds = time.perf_counter() - start
    print(f"Walk: {seconds:.0f} s")
    runs = []
    for pair in arguments.rates:
        sign_rate, learning_rate = map(float, pair.split(":"))
        rates = dataclasses.replace(recipe, sign_rate=sign_rate, learning_rate=learning_rate)
        runs.append(run(arguments, model, tokenizer, data, walked, rates))
        print(json.dumps({key: value for key, value in runs[-1].items() if key != "log"}))
    device = torch.device(arguments.device)
    study = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "model": Path(arguments.model).name,
        "calibration": Path(arguments.calibration).name,
        "walk_seconds": seconds,
        "runs": runs,
    }
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(study, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
