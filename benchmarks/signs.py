"""What each step of sign refinement is worth on layers of a real model, measured on text that it did not see.

    python benchmarks/signs.py MODEL --calibration FILE [--tokens N] [--layer NAME ...] [--json OUT]

The sequences are split in three parts: one gives the Hessian, a small one chooses its shrinkage, and the last one is
what every figure is measured with: the relative squared output error tr((W - Q) H (W - Q)') / tr(W H W').
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_onebit import __version__, loading
from hf_onebit.algorithms.closed_form import closed_form_planes
from hf_onebit.algorithms.curvature import Curvature
from hf_onebit.algorithms.heldout_choices import choose_shrinkage
from hf_onebit.algorithms.signs import fit_signs, output_loss
from hf_onebit.calibration import load_calibration
from hf_onebit.nn.replace import find_layers, float_weight
from hf_onebit.report import format_table
from hf_onebit.rungs.walk import walk


def hessians(model: Any, layers: list[str], batches: list[Any]) -> dict[str, Tensor]:
    """The Hessian of each layer's float inputs."""
    found: dict[str, Tensor] = {}
    walk(
        model,
        layers,
        batches,
        lambda _, statistics: found.update({k: v for k, v in statistics.items() if v is not None}),
    )
    return found


def measure(name: str, W: Tensor, H: Tensor, heldout: Tensor, unseen: Tensor) -> dict[str, Any]:
    """One layer: held-out errors after each step, and seconds."""
    closed = closed_form_planes(W, 1, importance=H.diagonal(), use_balancing=False)
    start = time.perf_counter()
    chosen, _ = choose_shrinkage(W, H, heldout)
    choosing = time.perf_counter() - start
    start = time.perf_counter()
    refined = fit_signs(W, chosen)
    refining = time.perf_counter() - start
    plain = Curvature(H)
    return {
        "layer": name,
        "shape": list(W.shape),
        "closed": output_loss(W, closed, unseen),
        "feedback": output_loss(W, fit_signs(W, plain, rounds=0).planes, unseen),
        "refined": output_loss(W, fit_signs(W, plain).planes, unseen),
        "shrunk": output_loss(W, refined.planes, unseen),
        "shrinkage": chosen.shrinkage,
        "two_planes": output_loss(W, fit_signs(W, chosen, planes=2).planes, unseen),
        "seconds_choosing": choosing,
        "seconds": refining,
    }


def main() -> None:
    """Measure; print a table, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", metavar="MODEL", help="a float model: folder, hub id or .gguf file")
    parser.add_argument("--calibration", required=True, metavar="FILE")
    parser.add_argument("--tokens", type=int, default=24576, metavar="N")
    parser.add_argument("--layer", nargs="+", metavar="NAME", help="full names; one of each kind by default")
    parser.add_argument("--json", metavar="OUT")
    arguments = parser.parse_args()
    model, tokenizer = loading.load_float(arguments.model).float(), loading.load_tokenizer(arguments.model)
    data = load_calibration(arguments.calibration, tokenizer, max_tokens=arguments.tokens, context=1024)
    layers = arguments.layer or one_of_each(list(find_layers(model).selected))
    fit, choose = len(data.batches) * 5 // 8, len(data.batches) * 6 // 8
    parts = (data.batches[:fit], data.batches[fit:choose], data.batches[choose:])
    found = [hessians(model, layers, part) for part in parts]
    rows = []
    for name in layers:
        W = float_weight(model.get_submodule(name)).float()
        rows.append(measure(name, W, *(part[name] for part in found)))
        print(name, flush=True)
    keys = ["layer", "closed", "feedback", "refined", "shrunk", "shrinkage", "two_planes", "seconds"]
    print(format_table(keys, [[row[key] for key in keys] for row in rows], markdown=True))
    if arguments.json:
        study = {"model": Path(arguments.model).name, "calibration": Path(arguments.calibration).name,
                 "tokens": data.tokens, "hf_onebit": __version__, "torch": torch.__version__,
                 "layers": rows}  # fmt: skip
        Path(arguments.json).write_text(json.dumps(study, indent=1) + "\n", encoding="utf-8")


def one_of_each(names: list[str]) -> list[str]:
    """For each kind of layer, the one in the middle of the model."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(name.rpartition(".")[2], []).append(name)
    return [group[len(group) // 2] for group in kinds.values()]


if __name__ == "__main__":
    main()
