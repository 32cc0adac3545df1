"""A preset's ladder in two parts on a GPU, and the scores of what they made, by the study's protocol, on any machine.

    python benchmarks/ladder_on_gpu.py walk FLOAT --calibration FILE --planes 1 --seed 0 -o walked.safetensors
    python benchmarks/ladder_on_gpu.py distil FLOAT --calibration FILE --walked walked.safetensors -o made.safetensors
    python benchmarks/ladder_on_gpu.py score FLOAT --data DATA --work WORK NAME=made.safetensors ...
    python benchmarks/ladder_on_gpu.py table

The parts are what `hf-onebit quantize --preset` does, with the same recipe: the walk that fits layers and tunes
blocks, then distillation and flips. Apart they can be given to a machine that is lent for minutes, several models at a
time. Of what they made only the packed tensors, gains and biases are kept: everything else is the float model's. DATA
and WORK are the study's (study.py), which scores the float model once; `table` writes docs/results.md's parts.
"""

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from ladder_study.protocol import Places, evaluate
from ladder_study.tables import domain
from result_pages import add_page_options, fill_page, write_page
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from signs_in_distillation import packed

from hf_onebit import OneBitConfig, loading
from hf_onebit.calibration import load_calibration, mixed
from hf_onebit.config import CALIBRATION_TOKENS
from hf_onebit.quantization.planning import plan_layers
from hf_onebit.report import format_table
from hf_onebit.rungs.ladder import PrefixResult, quantize_on_prefix
from hf_onebit.rungs.recipes import RECIPES
from hf_onebit.rungs.sequences import prefix_batches
from hf_onebit.rungs.upper_rungs import distill_scales

DOCS = Path(__file__).resolve().parents[1] / "docs"
RESULTS = DOCS / "results" / "best_on_gpu.json"
CONTEXT = 2048
TEXTS = ("test_8k", "alice", "test")


def main(arguments: list[str] | None = None) -> int:
    """One part, or the scores."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, about in (("walk", "fit layers, tune blocks"), ("distil", "distil what a walk left, flip signs")):
        part = commands.add_parser(name, help=about)
        part.add_argument("model", metavar="FLOAT")
        part.add_argument("--calibration", required=True, metavar="FILE")
        part.add_argument("--preset", default="best", choices=[*RECIPES])
        part.add_argument("--device", default="cuda")
        part.add_argument("--seed", type=int, default=0)
        part.add_argument("-o", "--output", type=Path, required=True)
        if name == "walk":
            part.add_argument("--planes", type=int, default=1)
            part.add_argument("--prefix-lengths", type=int, nargs="+", metavar="N", help="default: the preset's")
        else:
            part.add_argument("--walked", type=Path, required=True)
            part.add_argument("--lengths", type=int, nargs="+", metavar="N", help="default: the preset's")
    score = commands.add_parser("score", help="score models beside the float model")
    score.add_argument("model", metavar="FLOAT")
    score.add_argument("made", nargs="+", metavar="NAME=FILE")
    score.add_argument("--data", type=Path, required=True)
    score.add_argument("--work", type=Path, required=True)
    score.add_argument("--texts", nargs="+", default=TEXTS, choices=TEXTS)
    score.add_argument("--json", type=Path, default=RESULTS, help="figures that it holds already are kept")
    table = commands.add_parser("table", help="write the parts of docs/results.md")
    add_page_options(table, DOCS / "results.md")
    table.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    if options.command == "table":
        found = json.loads(options.json.read_text(encoding="utf-8"))
        titled = {name: {**row, "title": title(row), "status": "done"} for name, row in found.items()}
        tables = {"best": lambda: rows_of(found), "domain": lambda: domain(titled)}
        return write_page(options, lambda page: fill_page(page, "gpu", tables))
    {"walk": walk, "distil": distil, "score": score_all}[options.command](options)
    return 0


def rows_of(found: dict[str, Any]) -> str:
    """The figures of WikiText-2 test as a table."""
    headers = ["", "bits/weight (linear)", "perplexity", "× float", "first 8 x 1024", "× float", "KL", "top-1",
               "minutes: walk", "distillation"]  # fmt: skip
    cells = []
    for row in found.values():
        test, near = row["evaluation"]["test"], row["evaluation"]["test_8k"]
        cells.append([title(row), f"{row['linear_bpw']:.3f}", f"{test['perplexity']:.2f}", f"{test['multiple']:.2f}",
                      f"{near['perplexity']:.2f}", f"{near['multiple']:.2f}", f"{test['kl']:.3f}",
                      f"{100 * test['top1']:.1f}%", f"{row['walk_seconds'] / 60:.1f}",
                      f"{row['distil_seconds'] / 60:.1f}"])  # fmt: skip
    return format_table(headers, cells, markdown=True)


def title(row: dict[str, Any]) -> str:
    """What a row is."""
    return f"{row['preset']}, {row['planes']} plane{'s' * (row['planes'] > 1)}, seed {row['seed']}"


def walk(options: argparse.Namespace) -> None:
    """The rungs up to block tuning."""
    recipe = RECIPES[options.preset]
    if options.prefix_lengths:
        recipe = dataclasses.replace(recipe, prefix_lengths=tuple(options.prefix_lengths))
    model, data = start(options)
    layers = list(plan_layers(model, OneBitConfig()).selected)
    begin = time.perf_counter()
    walked = quantize_on_prefix(
        model, layers, prefix_batches(data.batches, recipe), planes=options.planes, rounds=recipe.rounds,
        block=recipe.block, keep_margins=True,
    )  # fmt: skip
    flat = {f"packed/{name}/{key}": t for name, tensors in walked.packed.items() for key, t in tensors.items()}
    flat |= {f"vectors/{name}": t for name, t in walked.vectors.items()}
    flat |= {f"margins/{name}": t for name, t in walked.margins.items()}
    keep(flat, options, {"planes": options.planes, "walk_seconds": time.perf_counter() - begin})


def distil(options: argparse.Namespace) -> None:
    """The rungs above."""
    walked, about = read(options.walked)
    recipe = RECIPES[options.preset]
    if options.lengths:
        recipe = dataclasses.replace(recipe, lengths=tuple(options.lengths))
    model, data = start(options)
    student, teacher = packed(model, walked).to(options.device), model.to(torch.bfloat16)
    begin = time.perf_counter()
    done = distill_scales(
        student, teacher, data.batches, recipe, options.seed, judged=print, margins=walked.margins
    )  # fmt: skip
    if done is None:
        raise SystemExit(f"{options.calibration}: too short to distil on, expected two sequences at least")
    parameters = dict(student.named_parameters()) | dict(student.named_buffers())
    found = {f"packed/{layer}/{short}": parameters[f"{layer}.{short}"]
             for layer, shorts in walked.packed.items() for short in shorts}  # fmt: skip
    found |= {f"vectors/{name}": p for name, p in student.named_parameters() if p.dim() == 1
              and not name.startswith(tuple(f"{layer}." for layer in walked.packed))}  # fmt: skip
    kl = {"before": done["kl_before"], "distilled": done["kl_after"], "flips": (done["flips"] or {}).get("kl_after")}
    keep(found, options, about | {"distil_seconds": time.perf_counter() - begin, "heldout_kl": kl,
                                  "lengths": recipe.lengths, "steps": recipe.steps})  # fmt: skip


def start(options: argparse.Namespace) -> tuple[Any, Any]:
    """The float model on its device, and the calibration's sequences."""
    model = loading.load_float(options.model, dtype=torch.float32).eval().to(options.device)
    tokens = CALIBRATION_TOKENS[options.preset]
    tokenizer = loading.load_tokenizer(options.model)
    data = load_calibration(options.calibration, tokenizer, max_tokens=tokens, context=CONTEXT, seed=options.seed)
    return model, mixed(data, options.seed)


def keep(tensors: dict[str, torch.Tensor], options: argparse.Namespace, about: dict[str, Any]) -> None:
    """Tensors, and what is known of them."""
    device = torch.cuda.get_device_name() if options.device.startswith("cuda") else "cpu"
    about = {**about, "device": device, "preset": options.preset, "seed": options.seed, "torch": torch.__version__}
    found = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(found, options.output, metadata={"about": json.dumps(about)})


def read(file: Path) -> tuple[PrefixResult, dict[str, Any]]:
    """What `keep` wrote."""
    found = PrefixResult()
    for key, tensor in load_file(file).items():
        kind, _, name = key.partition("/")
        if kind == "packed":
            layer, _, short = name.rpartition("/")
            found.packed.setdefault(layer, {})[short] = tensor
        else:
            getattr(found, kind)[name] = tensor
    with safe_open(file, framework="pt") as opened:
        return found, json.loads((opened.metadata() or {}).get("about", "{}"))


def score_all(options: argparse.Namespace) -> None:
    """Each model on each text; the JSON is written after each."""
    places = Places(Path(options.model).absolute(), options.data.absolute(), options.work.absolute())
    results = json.loads(options.json.read_text(encoding="utf-8")) if options.json.is_file() else {}
    for name, _, file in (text.partition("=") for text in options.made):
        model, about = rebuilt(options.model, Path(file))
        row = results.setdefault(name, {**about, "evaluation": {}})
        for text in options.texts:
            if text in row["evaluation"]:
                continue
            row["evaluation"][text] = evaluate(model, places, text)
            scored = row["evaluation"][text]
            print(f"{name} {text}: {scored['multiple']:.3f} times the float model's, KL {scored['kl']:.3f}", flush=True)
            options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def rebuilt(folder: str, file: Path) -> tuple[Any, dict[str, Any]]:
    """The packed model, and what is known of it."""
    float_model = loading.load_float(folder).eval()
    made, about = read(file)
    made.vectors = {name: tensor.to(float_model.get_parameter(name).dtype) for name, tensor in made.vectors.items()}
    weights = sum(float_model.get_submodule(layer).weight.numel() for layer in made.packed)
    bits = sum(8 * tensor.nbytes for tensors in made.packed.values() for tensor in tensors.values())
    return packed(float_model, made).eval(), {**about, "linear_bpw": bits / weights}


if __name__ == "__main__":
    sys.exit(main())
