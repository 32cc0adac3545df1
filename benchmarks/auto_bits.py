"""Automatic bits beside uniform layouts of as many bits or more, on one model.

    python benchmarks/auto_bits.py MODEL --calibration FILE --data FILE --work DIR -o OUT.json [--only ROW ...]

Rows, each packed and evaluated beside the float model on text that did not calibrate it:

    auto X         MPQConfig(bits="auto", target_bpw=X): at most X stored bits per weight of the linear layers
    within X       the same with several widths within a layer among the choices
    weights X      the same without text: costs are relative errors of weights
    uniform NAME   every layer alike, by the names of hf_onebit.choices: "3g64", "2p", ...

Beside each X stand uniform layouts whose bits are X or the next above that a group size gives: on rows of 576 and 1536
inputs, "4g-1" is 4.04 bits and "3g32" 4.00; "3g-1" 3.04 and "2g32" 3.00; "2g64" 2.50; "2p" 2.09 and "2g-1" 2.04;
"1g64" 1.50. The exact figure of each is in the output.

Sensitivities are measured once for all rows. --fit says how layers are fitted, once for each layer and choice that a
row asks for: `outputs` (error feedback on the inputs of the float model, --rounds of refinement after it) or `closed`
(nearest weights, inputs weighed by their mean square). Everything is kept in DIR, part by part: the same command goes
on where it was stopped, and --seconds stops it between parts.
"""

import argparse
import json
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_onebit import MPQConfig, evaluation, loading
from hf_onebit.algorithms.closed_form import closed_form_planes, importance_from_hessian
from hf_onebit.algorithms.signs import Curvature, fit_signs
from hf_onebit.bits.auto_bits import AutoBudget, choose, plan_auto
from hf_onebit.bits.auto_sensitivity import HeadCosts, costs_of_weights, costs_on_text
from hf_onebit.bits.sensitivity import Sensitivity
from hf_onebit.calibration import CalibrationData, load_calibration, read_text
from hf_onebit.choices import Choice
from hf_onebit.formats.onebit import pack_planes
from hf_onebit.formats.table import TableEntry
from hf_onebit.nn.heads import HeadPlan
from hf_onebit.nn.replace import LayerPlan, float_weight, set_packed
from hf_onebit.quantization.group_tensors import fit_entry, pack_fit, round_entry
from hf_onebit.quantization.planning import plan_layers
from hf_onebit.quantization.records import mean_bits
from hf_onebit.rungs.walk import walk

TARGETS = ("4.0", "3.0", "2.5", "2.0", "1.5")
UNIFORM = ("4g-1", "3g-1", "2g64", "2g-1", "1g64", "2p", "2g32", "3g32")
ROWS = [row for x, u in zip(TARGETS, UNIFORM, strict=False) for row in (f"auto {x}", f"uniform {u}")]
ROWS += [f"uniform {u}" for u in UNIFORM[5:]]
_SHRINKAGE = 0.15


class Clock:
    """Stops the work between parts once the time is up."""

    def __init__(self, seconds: float | None) -> None:
        self.start, self.seconds = time.perf_counter(), seconds

    def spent(self) -> float:
        """Seconds so far."""
        return time.perf_counter() - self.start

    def check(self, part: str) -> None:
        """End the program before ``part`` where the time is up."""
        if self.seconds is not None and self.spent() > self.seconds:
            raise SystemExit(f"time is up before {part}: run the same command again to go on")


def config_of(row: str) -> MPQConfig:
    """The config of an automatic row."""
    kind, target = row.split()
    return MPQConfig(bits="auto", target_bpw=float(target), within_layer=kind == "within")


def measured(
    kind: str, model: Any, plan: LayerPlan, data: CalibrationData, args: argparse.Namespace, row: str
) -> tuple[AutoBudget, tuple[Sensitivity, HeadCosts]]:
    """The budget of a row, and the costs of its choices, kept for all rows of its kind."""
    auto = plan_auto(model, plan, config_of(row), closed=args.fit == "closed")
    file = args.work / f"sensitivity-{args.fit}-{kind}.json"
    if not file.exists():
        start = time.perf_counter()
        about = model, auto.names, HeadPlan(), auto.fit
        found, _ = (
            costs_of_weights(*about) if kind == "weights" else costs_on_text(*about, data.batches, seed=args.seed)
        )
        entries = {n: {c: e.to_dict() for c, e in known.items()} for n, known in auto.fit.entries.items()}
        content = {"tokens": found.tokens, "seconds": time.perf_counter() - start, "costs": found.costs}
        file.write_text(json.dumps({**content, "entries": entries}))
        print(f"sensitivity, {kind}: {content['seconds']:.0f} s", flush=True)
    kept = json.loads(file.read_text())
    for name, known in kept["entries"].items():
        auto.fit.entries[name] = {choice: TableEntry.from_dict(entry) for choice, entry in known.items()}
    return auto, (Sensitivity(kept["costs"], kept["tokens"]), HeadCosts())


def entries_of(
    row: str, model: Any, plan: LayerPlan, data: CalibrationData, args: argparse.Namespace
) -> dict[str, TableEntry]:
    """How a row packs each layer."""
    kind, what = row.split()
    if kind == "uniform":
        found = {name: Choice.parse(what).entry(shape.in_features) for name, shape in plan.selected.items()}
        return {name: entry for name, entry in found.items() if entry is not None}
    auto, costs = measured(kind, model, plan, data, args, row)
    record = choose(auto, model, plan, costs, depth_prior=args.depth_prior)
    (args.work / f"plan-{row.replace(' ', '-')}.json").write_text(json.dumps(record, indent=1))
    return {name: TableEntry.from_dict(layer["entry"]) for name, layer in record["layers"].items()}


def pack(name: str, W: Tensor, H: Tensor, entry: TableEntry, args: argparse.Namespace) -> dict[str, Tensor]:
    """Packed tensors of one layer."""
    if args.fit == "closed":
        if entry.method == "onebit":
            return pack_planes(closed_form_planes(W, entry.planes, layer=name, importance=importance_from_hessian(H)))
        return pack_fit(round_entry(W, entry, name, H.diagonal(), "mse"), entry)
    curvature = Curvature(H, _SHRINKAGE)
    if entry.method == "onebit":
        return pack_planes(fit_signs(W, curvature, planes=entry.planes, rounds=args.rounds, layer=name).planes)
    return pack_fit(fit_entry(W, curvature, entry, args.rounds, name), entry)


def key_of(entry: TableEntry) -> str:
    """What an entry's tensors are kept under."""
    return json.dumps(entry.to_dict(), sort_keys=True)


def fit_rows(
    model: Any,
    plans: Mapping[str, Mapping[str, TableEntry]],
    data: CalibrationData,
    args: argparse.Namespace,
    clock: Clock,
) -> None:
    """Fit each layer with every entry that a row asks for, and keep the packed tensors, a file for each block."""

    def visit(block: str, statistics: Mapping[str, Tensor | None]) -> None:
        file = args.work / f"packed-{args.fit}-{block or 'outside'}.safetensors"
        tensors = load_file(file) if file.exists() else {}
        known = {key.rpartition("|")[0] for key in tensors}
        added = False
        for name, H in statistics.items():
            W = float_weight(model.get_submodule(name)).float()
            for entry in {key_of(plan[name]): plan[name] for plan in plans.values()}.values():
                stem = f"{name}|{key_of(entry)}"
                if stem in known:
                    continue
                if not added:
                    clock.check(f"fitting {name}")
                packed = pack(name, W, torch.eye(W.shape[1]) if H is None else H, entry, args)
                tensors |= {f"{stem}|{key}": tensor for key, tensor in packed.items()}
                added = True
        if added:
            save_file(tensors, file)
        print(f"{block} {clock.spent():.0f} s", flush=True)

    walk(model, list(next(iter(plans.values()))), data.batches, visit)


def packed_model(model: Any, entries: Mapping[str, TableEntry], args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Put a row's packed layers into the model; their records."""
    files = {f: load_file(f) for f in args.work.glob(f"packed-{args.fit}-*.safetensors")}
    where = {key: f for f, tensors in files.items() for key in tensors}
    records = {}
    for name, entry in entries.items():
        stem = f"{name}|{key_of(entry)}|"
        tensors = {key.removeprefix(stem): files[f][key] for key, f in where.items() if key.startswith(stem)}
        module = set_packed(model, name, tensors, entry)
        records[name] = {
            "in_features": module.in_features,
            "out_features": module.out_features,
            "bits_per_weight": module.bits_per_weight(),
        }
    return records


def main() -> None:
    """Measure every row; write JSON after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True, help="text to calibrate on")
    parser.add_argument("--data", required=True, help="text to evaluate on, never calibrated on")
    parser.add_argument("--work", required=True, type=Path, help="folder that keeps all parts")
    parser.add_argument(
        "-o", "--output", required=True, type=Path, help="JSON file; rows that it holds already are kept"
    )
    parser.add_argument("--only", nargs="+", default=ROWS, metavar="ROW", help=f"default: {', '.join(ROWS)}")
    parser.add_argument("--fit", choices=("outputs", "closed"), default="outputs")
    parser.add_argument("--rounds", type=int, default=0, help="of refinement with --fit outputs (default 0)")
    parser.add_argument("--depth-prior", type=float, default=0.6)
    parser.add_argument("--calibration-tokens", type=int, default=16384)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=8192, help="of the data that are scored")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, help="begin no further part after so many")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    clock = Clock(args.seconds)

    results: list[dict[str, Any]] = []
    if args.output.exists():
        results = json.loads(args.output.read_text())["rows"]
    rows = [row for row in args.only if row not in {found["row"] for found in results}]
    tokenizer = loading.load_tokenizer(args.model)
    about = {"max_tokens": args.calibration_tokens, "context": args.context, "seed": args.seed}
    data = load_calibration(args.calibration, tokenizer, **about)
    windows = evaluation.token_windows(read_text(args.data), tokenizer, args.context, args.tokens)
    model = loading.load_float(args.model, dtype=torch.bfloat16).eval()
    plan = plan_layers(model, config_of("auto 4.0"))
    plans = {row: entries_of(row, model, plan, data, args) for row in rows}
    if plans:
        fit_rows(model, plans, data, args, clock)
    reference = loading.load_float(args.model, dtype=torch.bfloat16).eval() if plans else None
    originals = {name: model.get_submodule(name) for name in plan.selected}
    for row, entries in plans.items():
        clock.check(row)
        records = packed_model(model, entries, args)
        figures = evaluation.compare(model, reference, windows)
        for name, module in originals.items():
            model.set_submodule(name, module)
        results.append({"row": row, "linear_bpw": mean_bits(records), **figures})
        print(
            f"{row:14} {results[-1]['linear_bpw']:.4f} bpw  KL {figures['kl']:.4f}  {clock.spent():.0f} s", flush=True
        )
        content = {
            "model": Path(args.model).name,
            "fit": args.fit,
            "rounds": args.rounds,
            "depth_prior": args.depth_prior,
            "calibration": Path(args.calibration).name,
            "calibration_tokens": data.tokens,
            "data": Path(args.data).name,
            "context": args.context,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "machine": platform.processor(),
        }
        args.output.write_text(json.dumps({**content, "rows": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
