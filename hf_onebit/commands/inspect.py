"""``hf-onebit inspect``: its arguments, the call, what is printed."""

from __future__ import annotations

import argparse
from typing import Any

from hf_onebit.commands.options import Result
from hf_onebit.commands.printing import print_figures


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``hf-onebit inspect``."""
    parser.add_argument("folder", metavar="DIR")


def run(options: argparse.Namespace) -> Result:
    """``hf-onebit inspect``."""
    from hf_onebit.inspection import inspect
    from hf_onebit.report import format_table

    info = inspect(options.folder)
    rows = [
        [
            name,
            f"{layer['out_features']}x{layer['in_features']}",
            layer["method"],
            _how_packed(layer),
            f"{layer['bits_per_weight']:.3f}",
        ]
        for name, layer in (info["embeddings"] | info["layers"]).items()
    ]
    print(format_table(["layer", "out x in", "method", "planes or bits", "bits per weight"], rows))
    if info["skipped"]:
        print("\nLeft in floating point:")
        print(
            format_table(
                ["layer", "weights", "reason"],
                [[n, s["weights"], s["reason"]] for n, s in info["skipped"].items()],
            )
        )
    print()
    print_figures(
        {k: v for k, v in info.items() if k not in ("layers", "embeddings", "skipped", "provenance") and v is not None}
    )
    return info, 0


_MANNERS = {"symmetric": "symmetric", "act_order": "act-order", "double_quant": "statistics in few bits"}


def _how_packed(layer: dict[str, Any]) -> str:
    if layer["method"] == "onebit":
        return str(layer["planes"])
    if layer["blocks"] is not None:  # bits, inputs and group size of each
        said = ["+".join(f"{bits} bits of {rows}" for bits, rows, _ in layer["blocks"])]
    else:
        said = [f"{layer['bits']} bits" + ("" if layer["group_size"] == -1 else f" / {layer['group_size']}")]
    said += [word for key, word in _MANNERS.items() if layer[key]]
    return ", ".join([*said, *([f"tied to {layer['tied_to']}"] if layer["tied_to"] else [])])
