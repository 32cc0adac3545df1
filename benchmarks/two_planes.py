"""What it brings that the two signs of a weight learn as one, in block tuning: the first blocks of a model, two planes.

    python benchmarks/two_planes.py FLOAT --calibration FILE [--runs as_one:0.1 alone:0.1 alone:0.03] [--json OUT]

A run is HOW:RATE. `as_one` has one latent a weight (algorithms/pair_latents.py), `alone` one for each sign; RATE is the
`sign_rate` of block tuning. Each run walks from the start, so that later blocks stand on what it made of those before.
"""

import argparse
import copy
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch

from hf_onebit import OneBitConfig, loading
from hf_onebit.algorithms import blockwise
from hf_onebit.algorithms.latents import SignLatents
from hf_onebit.algorithms.pair_latents import sign_latents
from hf_onebit.calibration import load_calibration
from hf_onebit.quantization.planning import plan_layers
from hf_onebit.rungs.ladder import quantize_on_prefix
from hf_onebit.rungs.recipes import RECIPES

HOW = {"as_one": sign_latents, "alone": SignLatents}


def main() -> None:
    """Every run; a table, and JSON where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("model", metavar="FLOAT")
    parser.add_argument("--calibration", required=True, metavar="FILE")
    parser.add_argument("--runs", nargs="+", default=["as_one:0.1", "alone:0.1", "alone:0.03"], metavar="HOW:RATE")
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=12288)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="OUT")
    options = parser.parse_args()
    tokenizer = loading.load_tokenizer(options.model)
    model = loading.load_float(options.model, dtype=torch.float32).eval()
    stack: Any = model.base_model
    stack.layers = stack.layers[: options.blocks]
    model.config.num_hidden_layers = options.blocks
    data = load_calibration(options.calibration, tokenizer, max_tokens=options.tokens, context=512, seed=0)
    found = [run(copy.deepcopy(model), data.batches, *text.split(":"), options.epochs) for text in options.runs]
    if options.json is not None:
        about = {"model": Path(options.model).name, "tokens": data.tokens, "epochs": options.epochs}
        options.json.write_text(json.dumps({**about, "runs": found}, indent=1) + "\n", encoding="utf-8")


def run(model: Any, batches: Any, how: str, rate: str, epochs: int) -> dict[str, Any]:
    """One walk, and each block's losses."""
    blockwise.sign_latents = HOW[how]  # type: ignore[assignment]
    usual = RECIPES["best"].block
    assert usual is not None
    block = dataclasses.replace(usual, epochs=epochs, sign_rate=float(rate))
    begin = time.perf_counter()
    walked = quantize_on_prefix(
        model, list(plan_layers(model, OneBitConfig()).selected), batches, planes=2, rounds=1, block=block
    )
    blocks = [
        {"start": b.start, "best": b.best, "train": b.log[-1]["loss_train"], "flipped": b.flipped}
        for b in walked.blocks.values()
    ]
    for number, each in enumerate(blocks):
        print(how, rate, number, {key: round(value, 4) for key, value in each.items()}, flush=True)
    drift = [depth.relative_error for depth in walked.depths]
    return {"how": how, "sign_rate": float(rate), "blocks": blocks, "drift": drift,
            "seconds": time.perf_counter() - begin}  # fmt: skip


if __name__ == "__main__":
    main()
