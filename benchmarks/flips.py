"""Which sign flips lower the held-out divergence: those that gain the most, or those that are the surest.

    python benchmarks/flips.py PACKED FLOAT --calibration FILE

PACKED is a model that was distilled from FLOAT with a preset's recipe. Gradients are taken of one round's tokens, as
the ladder's gated flips take them; then so large a fraction of all signs is flipped by one rule or the other, the KL
is taken on the recipe's held-out tokens, and all is undone. `--json` keeps the figures for docs/methods/distill.md.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from ladder_study.protocol import cpu_name

from hf_onebit import loading
from hf_onebit.algorithms import flips
from hf_onebit.algorithms.distill import DistillOptions
from hf_onebit.algorithms.sign_linear import sign_planes
from hf_onebit.calibration import load_calibration
from hf_onebit.config import CALIBRATION_TOKENS
from hf_onebit.distillation import distill_model
from hf_onebit.report import format_table
from hf_onebit.rungs.recipes import RECIPES
from hf_onebit.rungs.sequences import hold_out, in_steps, tokens_of

CONTEXT = 2048
RULES = {"gain": flips.flip_gains, "certainty": flips.flip_certainty}


def main(arguments: list[str] | None = None) -> int:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("packed", metavar="PACKED")
    parser.add_argument("model", metavar="FLOAT")
    parser.add_argument("--calibration", required=True, metavar="FILE")
    parser.add_argument("--preset", default="fast", choices=[*RECIPES])
    parser.add_argument("--batches", type=int, default=8, help="of the recipe's step_tokens each, for the gradients")
    parser.add_argument("--fractions", type=float, nargs="+", default=[1e-6, 1e-5, 3e-5, 1e-4], metavar="X")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    found = measure(options)
    rows = [[row["rule"], f"{row['fraction']:g}", f"{row['flips']}", f"{-row['predicted']:+.4f}",
             f"{row['kl'] - found['kl_before']:+.4f}"] for row in found["rows"]]  # fmt: skip
    print(f"held-out KL before: {found['kl_before']:.4f}")
    print(format_table(["rule", "fraction", "flips", "predicted change of the KL", "change"], rows, markdown=True))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Each rule and fraction on the gradients of the same tokens."""
    recipe, tokenizer = RECIPES[options.preset], loading.load_tokenizer(options.model)
    data = load_calibration(options.calibration, tokenizer, max_tokens=CALIBRATION_TOKENS[options.preset],
                            context=CONTEXT, seed=options.seed)  # fmt: skip
    rows, heldout = hold_out(data.batches, recipe)
    batches = in_steps(rows, recipe.step_tokens, options.seed)
    teacher = loading.load_float(options.model, dtype=torch.bfloat16).eval()
    run, form = distill_model(loading.load(options.packed), teacher, batches, in_steps(heldout, recipe.step_tokens),
                              DistillOptions(steps=1))  # fmt: skip
    planes = sign_planes(form.student)
    before = run.evaluate()
    first = recipe.steps % len(batches)
    chosen = [batches[(first + i) % len(batches)] for i in range(options.batches)]
    tokens = flips.collect_gradients(run.pair, planes, chosen)
    gains = {name: flips.flip_gains(plane) for name, plane in planes.items()}
    total = sum(plane.signs.numel() for plane in planes.values())
    found = []
    for fraction in options.fractions:
        for rule, score in RULES.items():
            picks = flips.choose_flips(planes, max(1, round(fraction * total)), score)
            predicted = sum(float(gains[name].view(-1)[index].sum()) for name, index in picks.items())
            flips.flip(planes, picks)
            kl = run.evaluate()
            flips.flip(planes, picks)
            count = sum(len(index) for index in picks.values())
            found.append({"rule": rule, "fraction": fraction, "flips": count, "predicted": predicted, "kl": kl})
            print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    return {"preset": options.preset, "seed": options.seed, "signs": total, "tokens": tokens,
            "heldout_tokens": tokens_of(heldout), "kl_before": before, "rows": found, "device": cpu_name(),
            "threads": torch.get_num_threads(), "torch": torch.__version__}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
