"""Distil a packed model from its float teacher, and measure what that is worth: curves, perplexities, seconds.

    python benchmarks/distill.py PACKED FLOAT --calibration FILE --data FILE [--data FILE] [--json OUT] [--save DIR]

The held-out sequences of the calibration text decide which state is kept; the texts of --data are only evaluated. All
that depends on the clock are the seconds.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from hf_onebit import __version__, evaluation, loading
from hf_onebit.algorithms.distill import DistillOptions
from hf_onebit.algorithms.flips import FlipOptions, gated_flips
from hf_onebit.algorithms.sign_linear import sign_planes
from hf_onebit.calibration import load_calibration, read_text
from hf_onebit.distillation import distill_model, joined


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("packed", metavar="PACKED")
    parser.add_argument("teacher", metavar="FLOAT")
    parser.add_argument("--calibration", required=True, metavar="FILE")
    parser.add_argument("--data", required=True, action="append", metavar="FILE")
    parser.add_argument("--length", type=int, default=512, metavar="N", help="tokens of a training sequence")
    parser.add_argument("--rows", type=int, default=4, metavar="N", help="sequences of one update")
    parser.add_argument("--steps", type=int, default=60, metavar="N")
    parser.add_argument("--learning-rate", type=float, default=0.02, metavar="X")
    parser.add_argument("--warmup", type=int, default=5, metavar="N")
    parser.add_argument("--evaluate-every", type=int, default=15, metavar="N")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="X")
    parser.add_argument("--heldout", type=int, default=16, metavar="N", help="sequences that only judge")
    parser.add_argument("--multiplicative", action="store_true", help="train the logarithms of the scales")
    parser.add_argument("--no-norms", action="store_true", help="train scales and biases only")
    parser.add_argument("--flip-rounds", type=int, default=0, metavar="N", help="rounds of gated sign flips afterwards")
    parser.add_argument("--flip-fraction", type=float, default=1e-4, metavar="X")
    parser.add_argument("--tokens", type=int, default=8192, metavar="N", help="tokens of each text that are scored")
    parser.add_argument("--context", type=int, default=1024, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--json", metavar="OUT")
    parser.add_argument("--save", metavar="DIR")
    return parser.parse_args()


def perplexities(model: Any, tokenizer: Any, arguments: argparse.Namespace) -> dict[str, float]:
    """By the name of the text."""
    return {
        Path(file).name: evaluation.perplexity(
            model, evaluation.token_windows(read_text(file), tokenizer, arguments.context, arguments.tokens)
        )["perplexity"]
        for file in arguments.data
    }


def main() -> None:
    """Distil, flip if asked, evaluate the packed model; print each entry, and write JSON where asked."""
    arguments = parse()
    model, tokenizer = loading.load(arguments.packed), loading.load_tokenizer(arguments.teacher)
    teacher = loading.load_float(arguments.teacher, dtype=torch.bfloat16).eval()
    everything = load_calibration(
        arguments.calibration, tokenizer, max_tokens=1 << 40, context=arguments.length, seed=arguments.seed
    )
    generator = torch.Generator().manual_seed(arguments.seed)
    order = torch.randperm(len(everything.batches), generator=generator).tolist()
    sequences = [everything.batches[i] for i in order]
    heldout, batches = (
        [joined(part[start : start + arguments.rows]) for start in range(0, len(part), arguments.rows)]
        for part in (sequences[: arguments.heldout], sequences[arguments.heldout :])
    )
    options = DistillOptions(
        steps=arguments.steps,
        learning_rate=arguments.learning_rate,
        warmup=arguments.warmup,
        evaluate_every=arguments.evaluate_every,
        temperature=arguments.temperature,
        seed=arguments.seed,
    )
    before = perplexities(model, tokenizer, arguments)
    started, worked = time.perf_counter(), time.process_time()
    run, form = distill_model(
        model,
        teacher,
        batches,
        heldout,
        options,
        norms=not arguments.no_norms,
        multiplicative=arguments.multiplicative,
    )
    result = run.run(callback=lambda entry: print(json.dumps(entry), flush=True))
    seconds, processor = time.perf_counter() - started, time.process_time() - worked
    flips = None
    if arguments.flip_rounds:
        flips = gated_flips(
            run.pair,
            sign_planes(form.student),
            batches,
            run.evaluate,
            FlipOptions(rounds=arguments.flip_rounds, fraction=arguments.flip_fraction),
            callback=lambda entry: print(json.dumps(entry), flush=True),
            first_batch=run.step,
        )
    form.write_back(run.stored())
    study = {
        "model": Path(arguments.packed).name,
        "calibration": Path(arguments.calibration).name,
        "calibration_sha256": everything.sha256,
        "options": {k: v for k, v in vars(arguments).items() if k not in ("packed", "teacher", "json", "save", "data")},
        "version": __version__,
        "threads": torch.get_num_threads(),
        "seconds": round(seconds, 1),
        "processor_seconds": round(processor, 1),
        "tokens": result.tokens,
        "kl_heldout": {"before": result.start, "after": flips.best if flips else result.best},
        "perplexity": {"before": before, "after": perplexities(model, tokenizer, arguments)},
        "distill": result.log,
        "flips": flips.log if flips else [],
    }
    print(json.dumps({key: study[key] for key in ("seconds", "processor_seconds", "kl_heldout", "perplexity")}))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(study, indent=1) + "\n", encoding="utf-8")
    if arguments.save:
        model.save_pretrained(arguments.save)
        tokenizer.save_pretrained(arguments.save)


if __name__ == "__main__":
    main()
