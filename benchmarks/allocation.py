"""What choosing layers for a second plane by measured sensitivity is worth, at one budget, beside simpler choices.

    python benchmarks/allocation.py MODEL --calibration FILE --data FILE [--target-bpw X] [--fit prefix] [--json OUT]

Every row packs the model within the same bits and is evaluated packed, beside the float model, on text that did not
calibrate it. The rows differ in which layers get a second plane:

    sensitivity   measured cost times the depth ramp, the choice of target_bpw
    no ramp       measured cost alone
    ramp X        measured cost times a ramp of strength X, for each of --ramps
    depth         the last layers first
    first         the first layers first
    random N      in an order that the seed N draws
    one, two      no layer, and every layer: the ends between which the budget lies

--fit says how layers are fitted: `prefix` is preset fast without block tuning and distillation, a run for each row;
`signs` and `closed` fit each layer once with one and once with two planes, on the inputs of the float model, for all
rows together.
"""

import argparse
import copy
import json
import random
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from ladder_study.protocol import cpu_name
from torch import Tensor

from hf_onebit import OneBitConfig, __version__, evaluation, loading
from hf_onebit.algorithms.allocation import DEPTH_PRIOR
from hf_onebit.algorithms.closed_form import closed_form_planes, importance_from_hessian
from hf_onebit.algorithms.curvature import Curvature
from hf_onebit.algorithms.signs import fit_signs
from hf_onebit.bits.budget import Budget, choose_planes, plan_budget
from hf_onebit.bits.sensitivity import closed_fit, measure_sensitivity, sign_fit
from hf_onebit.calibration import load_calibration, read_text
from hf_onebit.formats.onebit import pack_planes
from hf_onebit.nn.replace import float_weight, set_packed
from hf_onebit.quantization.planning import plan_layers
from hf_onebit.report import format_table
from hf_onebit.rungs.ladder import quantize_on_prefix
from hf_onebit.rungs.recipes import RECIPES
from hf_onebit.rungs.sequences import prefix_batches
from hf_onebit.rungs.walk import walk

Packed = dict[str, dict[str, Tensor]]


def fill(budget: Budget, order: list[str]) -> dict[str, int]:
    """Second planes in that order, each that fits; none where ``order`` is empty."""
    planes, left = dict.fromkeys(budget.options, 1), budget.bits - sum(bits[1] for bits in budget.options.values())
    for name in order:
        more = budget.options[name][2] - budget.options[name][1]
        if more <= left:
            planes[name], left = 2, left - more
    return planes


def choices(
    budget: Budget, model: Any, batches: list[Any], arguments: argparse.Namespace
) -> tuple[dict[str, dict[str, int]], dict[str, Any], float]:
    """{row: {layer: planes}}, the record of the measured choice, and the seconds that measuring took."""
    names = list(budget.options)
    fit = closed_fit(use_balancing=False) if arguments.fit == "closed" else sign_fit()
    start = time.perf_counter()
    measured = measure_sensitivity(model, names, batches, fit, tokens=arguments.sensitivity_tokens, seed=arguments.seed)
    seconds = time.perf_counter() - start
    chosen, record = choose_planes(budget, model, measured)
    rows = {"sensitivity": chosen, "no ramp": choose_planes(budget, model, measured, depth_prior=0.0)[0]}
    rows |= {f"ramp {s:g}": choose_planes(budget, model, measured, depth_prior=s)[0] for s in arguments.ramps}
    rows |= {"depth": fill(budget, names[::-1]), "first": fill(budget, names)}
    for seed in range(arguments.random):
        rows[f"random {seed}"] = fill(budget, random.Random(seed).sample(names, len(names)))
    return rows | {"one": dict.fromkeys(names, 1), "two": dict.fromkeys(names, 2)}, record, seconds


def fitted_once(model: Any, names: list[str], batches: list[Any], closed: bool) -> dict[int, Packed]:
    """Packed tensors of every layer, with one plane and with two, on the float model's inputs."""
    found: dict[int, Packed] = {1: {}, 2: {}}

    def visit(_block: str, statistics: Mapping[str, Tensor | None]) -> None:
        for name, H in statistics.items():
            W = float_weight(model.get_submodule(name)).float()
            H = torch.eye(W.shape[1]) if H is None else H
            curvature = None if closed else Curvature(H, 0.15)
            for count, packed in found.items():
                packed[name] = pack_planes(
                    closed_form_planes(W, count, importance=importance_from_hessian(H), use_balancing=False)
                    if curvature is None
                    else fit_signs(W, curvature, planes=count, layer=name).planes
                )

    walk(model, names, batches, visit)
    return found


def packer(
    model: Any, names: list[str], batches: list[Any], arguments: argparse.Namespace
) -> Callable[[dict[str, int]], Packed]:
    """What turns {layer: planes} into packed tensors."""
    if arguments.fit == "prefix":
        recipe = RECIPES["fast"]
        some = prefix_batches(batches, recipe)
        return lambda planes: quantize_on_prefix(model, names, some, planes=planes, rounds=recipe.rounds).packed
    found = fitted_once(model, names, batches, arguments.fit == "closed")
    return lambda planes: {name: found[planes[name]][name] for name in names}


def main() -> None:
    """Measure every row; print a table, and write JSON where asked, anew after each row."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", metavar="MODEL", help="a float model: folder, hub id or .gguf file")
    parser.add_argument("--calibration", required=True, metavar="FILE")
    parser.add_argument("--data", required=True, metavar="FILE")
    parser.add_argument("--target-bpw", type=float, default=1.5, metavar="X")
    parser.add_argument("--fit", choices=("prefix", "signs", "closed"), default="prefix")
    parser.add_argument("--calibration-tokens", type=int, default=24576, metavar="N")
    parser.add_argument("--calibration-context", type=int, default=1024, metavar="N")
    parser.add_argument("--sensitivity-tokens", type=int, default=4096, metavar="N")
    parser.add_argument("--random", type=int, default=2, metavar="N", help="rows with a random choice")
    parser.add_argument("--ramps", nargs="+", type=float, default=[], metavar="X", help="rows with other depth priors")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="leave out the other rows")
    parser.add_argument("--tokens", type=int, default=8192, metavar="N", help="tokens of the data that are scored")
    parser.add_argument("--context", type=int, default=1024, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--json", metavar="OUT")
    arguments = parser.parse_args()
    reference, tokenizer = loading.load_float(arguments.model).eval(), loading.load_tokenizer(arguments.model)
    data = load_calibration(
        arguments.calibration,
        tokenizer,
        max_tokens=arguments.calibration_tokens,
        context=arguments.calibration_context,
        seed=arguments.seed,
    )
    windows = evaluation.token_windows(read_text(arguments.data), tokenizer, arguments.context, arguments.tokens)
    config = OneBitConfig(target_bpw=arguments.target_bpw)
    budget = plan_budget(reference, plan_layers(reference, config), config)
    assert budget is not None
    rows, record, seconds = choices(budget, reference, data.batches, arguments)
    pack = packer(reference, list(budget.options), data.batches, arguments)
    study: dict[str, Any] = {
        "model": Path(arguments.model).name,
        "calibration": Path(arguments.calibration).name,
        "calibration_sha256": data.sha256,
        "calibration_tokens": data.tokens,
        "data": Path(arguments.data).name,
        "context": arguments.context,
        "fit": arguments.fit,
        "target_bpw": arguments.target_bpw,
        "depth_prior": DEPTH_PRIOR,
        "seed": arguments.seed,
        "device": cpu_name(),
        "threads": torch.get_num_threads(),
        "versions": {"hf_onebit": __version__, "torch": torch.__version__},
        "sensitivity_seconds": round(seconds, 1),
        "allocation": record,
        "rows": [],
    }
    for row, planes in rows.items():
        if arguments.only and row not in arguments.only:
            continue
        bits = sum(budget.options[name][count] for name, count in planes.items()) + budget.fixed
        packed = pack(planes)
        model = copy.deepcopy(reference)
        for name, tensors in packed.items():
            set_packed(model, name, tensors)
        figures = evaluation.compare(model, reference, windows)
        quality = {key: figures[key] for key in ("kl", "perplexity", "reference_perplexity", "top1", "tokens")}
        second = sum(count == 2 for count in planes.values())
        study["rows"].append({"row": row, "second_planes": second, "linear_bpw": bits / budget.weights, **quality})
        print(json.dumps(study["rows"][-1]), flush=True)
        if arguments.json:
            Path(arguments.json).write_text(json.dumps(study, indent=1) + "\n", encoding="utf-8")
    keys = ["row", "second_planes", "linear_bpw", "kl", "perplexity", "top1"]
    print(format_table(keys, [[row[key] for key in keys] for row in study["rows"]], markdown=True))


if __name__ == "__main__":
    main()
