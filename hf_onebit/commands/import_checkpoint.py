"""``hf-onebit import``: its arguments, the call, what is printed."""

from __future__ import annotations

import argparse
import shlex

from hf_onebit.commands.options import Result, add_max_shard_size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``hf-onebit import``."""
    parser.add_argument("source", metavar="SRC", help="the folder of the other program's checkpoint")
    parser.add_argument(
        "-o", "--output", metavar="DIR", required=True, help="folder to make, or an older packed checkpoint to replace"
    )
    add_max_shard_size(parser)


def run(options: argparse.Namespace) -> Result:
    """``hf-onebit import``."""
    from hf_onebit.interchange.importing import import_checkpoint

    result = import_checkpoint(
        options.source, options.output, max_shard_size=options.max_shard_size, command=options.command_line
    )
    layers = result["layers"]
    exact = f"{result['exact']} of {len(layers)} layers exactly"
    print(f"{result['format']}: {exact}, {result['linear_bpw']:.3f} bits per weight")
    if result["max_error"]:
        step = max(layer["step"] for layer in layers.values())
        print(
            f"The others differ by {result['max_error']:.2e} at the most, where levels are up to {step:.2e} apart: "
            "scales times zero points are stored in float16"
        )
    for name in result["kept_float"]:
        print(f"In floating point: {name}")
    print(f"Next: {shlex.join(['hf-onebit', 'eval', options.output, '--data', 'FILE', '--write-card'])}")
    return result, 0
