"""Automatic bits beside uniform layouts of as many bits or more, on one model.

    python benchmarks/auto_bits.py MODEL --calibration FILE --data FILE --work DIR -o OUT.json [--only ROW ...]

Rows, each packed and evaluated beside the float model on text that did not calibrate it:

    auto X         MPQConfig(bits="auto", target_bpw=X): at most X stored bits per weight of the linear layers
    within X       the same with several widths within a layer among the choices
    weights X      the same without text: costs are relative errors of weights
    added X        the same on text, but the plan of least added cost with the depth prior, and none tried
    uniform NAME   every layer alike, by the names of hf_onebit.choices: "3g64", "2p", ...
    llama TYPE     what llama.cpp makes of these layers as TYPE, from the --gguf that the model came from, dequantized

Beside each X stand uniform layouts whose bits are X or the next above that a group size gives: on rows of 576 and 1536
inputs, "4g-1" is 4.04 bits and "3g32" 4.00; "3g-1" 3.04 and "2g32" 3.00; "2g64" 2.50; "2p" 2.09 and "2g-1" 2.04;
"1g64" 1.50. The exact figure of each is in the output. --leave names layers that stay float in all rows, as those whose
rows llama.cpp's types of few bits cannot take.

Sensitivities are measured once for all rows, and plans are tried on sequences of the calibration text that nothing was
fitted on. --fit says how layers are fitted, once for each layer and choice that a plan asks for: `outputs` (error
feedback on the inputs of the float model, --rounds of refinement after it) or `closed` (nearest weights, inputs weighed
by their mean square). Everything is kept in DIR, part by part: the same command goes on where it was stopped, and
--seconds stops it between parts.
"""

import argparse
import json
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from ladder_study.gguf_layers import llama_layers
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from hf_onebit import MPQConfig, evaluation, loading
from hf_onebit.algorithms.curvature import Curvature
from hf_onebit.algorithms.signs import fit_signs
from hf_onebit.bits.auto_bits import AutoBudget, choose, plan_auto
from hf_onebit.bits.auto_sensitivity import ChoiceFit, HeadCosts, choices_of, costs_of_weights, costs_on_text
from hf_onebit.bits.selection import choices_of_record, choose_by_trial
from hf_onebit.bits.sensitivity import Sensitivity
from hf_onebit.bits.trials import PackedChoices
from hf_onebit.calibration import Batch, CalibrationData, load_calibration, read_text
from hf_onebit.formats.onebit import pack_planes
from hf_onebit.formats.table import TableEntry
from hf_onebit.nn.heads import HeadPlan
from hf_onebit.nn.replace import LayerPlan
from hf_onebit.quantization.group_tensors import fit_entry, pack_fit
from hf_onebit.quantization.planning import plan_layers

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


def config_of(row: str, leave: Sequence[str] = ()) -> MPQConfig:
    """The config of an automatic row."""
    kind, target = row.split()
    skipped = [*leave, "lm_head"] if leave else None
    return MPQConfig(
        bits="auto", target_bpw=float(target), within_layer=kind == "within", modules_to_not_convert=skipped
    )


class KeptChoices(PackedChoices):
    """Fitted layers, kept in a folder: a file for each layer and choice."""

    def __init__(
        self, model: Any, fit: ChoiceFit, data: CalibrationData, args: argparse.Namespace, clock: Clock
    ) -> None:
        super().__init__(model, self._pack, data.batches)
        self.own, self.rounds, self.clock = fit, args.rounds, clock
        self.folder = args.work / f"packed-{args.fit}"
        self.folder.mkdir(exist_ok=True)

    def fit(self, plans: Sequence[Mapping[str, str]]) -> None:
        """Read what is there, and fit the rest."""
        for name, choice in {pair for plan in plans for pair in plan.items()} - set(self.known):
            file = self._file(name, choice)
            if file.exists():
                with safe_open(file, "pt") as kept:
                    entry = TableEntry.from_dict(json.loads(kept.metadata()["entry"]))
                    self.put(name, choice, entry, {key: kept.get_tensor(key) for key in kept.keys()})  # noqa: SIM118
        super().fit(plans)

    def _pack(self, name: str, W: Tensor, H: Tensor | None, choice: str) -> tuple[TableEntry, dict[str, Tensor]]:
        self.clock.check(f"fitting {name}")
        entry, tensors = self.own.pack(name, W, H, choice)
        if self.rounds and not self.own.closed:
            tensors = _refined(name, W, H, entry, self.rounds)
        save_file(tensors, self._file(name, choice), {"entry": json.dumps(entry.to_dict())})
        return entry, tensors

    def _file(self, name: str, choice: str) -> Path:
        return Path(self.folder / f"{name}.{choice}.safetensors")


def _refined(name: str, W: Tensor, H: Tensor | None, entry: TableEntry, rounds: int) -> dict[str, Tensor]:
    curvature = Curvature(torch.eye(W.shape[1]) if H is None else H, _SHRINKAGE)
    if entry.method == "onebit":
        return pack_planes(fit_signs(W, curvature, planes=entry.planes, rounds=rounds, layer=name).planes)
    return pack_fit(fit_entry(W, curvature, entry, rounds, name), entry)


def measured(
    kind: str, model: Any, auto: AutoBudget, data: CalibrationData, args: argparse.Namespace
) -> tuple[Sensitivity, HeadCosts]:
    """The costs of all choices, kept for all rows of a kind."""
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
        auto.fit.entries[name] |= {choice: TableEntry.from_dict(entry) for choice, entry in known.items()}
    return Sensitivity(kept["costs"], kept["tokens"]), HeadCosts()


def plan_of(
    row: str,
    plan: LayerPlan,
    packed: KeptChoices,
    data: CalibrationData,
    judges: list[Batch],
    args: argparse.Namespace,
) -> tuple[dict[str, str], dict[str, Any]]:
    """The choice of each layer in a row, and of an automatic row what the result says of how it was found."""
    kind, what = row.split()
    if kind == "uniform":
        return dict.fromkeys(plan.selected, what), {}
    file = args.work / f"plan-{args.fit}-{row.replace(' ', '-')}.json"
    if not file.exists():
        model, start = packed.model, time.perf_counter()
        auto = plan_auto(model, plan, config_of(row, args.leave), closed=args.fit == "closed")
        costs = measured("auto" if kind == "added" else kind, model, auto, data, args)
        packed.own.entries.update(auto.fit.entries)
        if kind in ("weights", "added"):
            record = choose(auto, model, plan, costs)
        else:
            record = choose_by_trial(auto, model, plan, costs, packed, judges)
        file.write_text(json.dumps({**record, "seconds": time.perf_counter() - start}, indent=1))
    record = json.loads(file.read_text())
    return choices_of_record(record), {key: record[key] for key in ("trials", "seconds") if key in record}


def held_out(data: CalibrationData, tokenizer: Any, args: argparse.Namespace) -> list[Batch]:
    """Sequences of the calibration text that nothing is fitted on."""
    about = {"max_tokens": 2 * args.calibration_tokens, "context": args.context, "seed": args.seed + 1}
    more = load_calibration(args.calibration, tokenizer, **about).batches
    used = {tuple(batch["input_ids"][0].tolist()) for batch in data.batches}
    free = [batch for batch in more if tuple(batch["input_ids"][0].tolist()) not in used]
    return free[: max(1, args.held_out_tokens // args.context)]


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
    parser.add_argument("--leave", nargs="+", default=[], metavar="NAME", help="layers that stay float")
    parser.add_argument("--gguf", type=Path, help="the file that the model came from, for rows `llama TYPE`")
    parser.add_argument("--fit", choices=("outputs", "closed"), default="outputs")
    parser.add_argument("--rounds", type=int, default=0, help="of refinement with --fit outputs (default 0)")
    parser.add_argument("--held-out-tokens", type=int, default=2048, help="of the calibration text, to try plans on")
    parser.add_argument("--calibration-tokens", type=int, default=16384)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=8192, help="of the data that are scored")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, help="begin no further part after so many")
    args = parser.parse_args()
    if args.gguf is None and any(row.startswith("llama ") for row in args.only):
        parser.error("rows `llama TYPE` need --gguf, the GGUF file that the model came from")
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
    reference = loading.load_float(args.model, dtype=torch.bfloat16).eval()
    plan = plan_layers(model, config_of("auto 4.0", args.leave))
    fit = plan_auto(model, plan, config_of("within 4.0", args.leave), closed=args.fit == "closed").fit
    names = dict.fromkeys(row.split()[1] for row in rows if row.startswith("uniform"))
    found = choices_of(plan, tuple(names), {"symmetric": False})
    fit.entries = {name: fit.entries[name] | found[name] for name in plan.selected}
    packed = KeptChoices(model, fit, data, args, clock)
    judges = held_out(data, tokenizer, args)
    originals = {name: model.get_submodule(name) for name in plan.selected}
    for row in rows:
        clock.check(row)
        if row.startswith("llama "):
            modules, bpw, how = llama_layers(args.gguf, row.split()[1], reference, originals, data.batches, args.work)
        else:
            choices, how = plan_of(row, plan, packed, data, judges, args)
            modules = packed.modules(choices)
            bits = sum(module.bits_per_weight() * plan.selected[name].weights for name, module in modules.items())
            bpw = bits / sum(shape.weights for shape in plan.selected.values())
        for name, module in modules.items():
            model.set_submodule(name, module)
        figures = evaluation.compare(model, reference, windows)
        for name, module in originals.items():
            model.set_submodule(name, module)
        results.append({"row": row, "linear_bpw": bpw, **figures, **how})
        print(f"{row:14} {bpw:.4f} bpw  KL {figures['kl']:.4f}  {clock.spent():.0f} s", flush=True)
        content = {
            "model": Path(args.model).name,
            "fit": args.fit,
            "rounds": args.rounds,
            "leave": args.leave,
            "held_out_tokens": sum(judge["input_ids"].numel() for judge in judges),
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
