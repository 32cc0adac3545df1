"""``hf-onebit doctor``: its arguments, the call, what is printed."""

from __future__ import annotations

import argparse

from hf_onebit.commands.options import Result
from hf_onebit.commands.printing import print_figures


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``hf-onebit doctor``."""
    parser.add_argument(
        "--build", action="store_true", help="first compile the CPU kernels into your cache, where none are in use"
    )


def run(options: argparse.Namespace) -> Result:
    """``hf-onebit doctor``."""
    from hf_onebit.doctor import examine

    result = examine(build=options.build)
    if result["built"] is not None:
        print(f"Compiled the CPU kernels in {result['build_seconds']:.1f} s: {result['built']}\n")
    elif options.build:
        print("The CPU kernels are in use already: nothing was compiled.\n")
    shown = {key: value for key, value in result.items() if key not in ("built", "build_seconds")}
    flat = {key: value for key, value in shown.items() if not isinstance(value, (dict, list))}
    for group in ("packages", "optional", "devices", "kernels"):
        flat |= {f"{group}: {key}": value or "not installed" for key, value in result[group].items()}
    for test in result["self_test"]:
        flat[f"self-test: {test['device']} {test['shape']} planes={test['planes']}"] = (
            f"{'ok' if test['ok'] else 'WRONG'} ({test['error']:.1e})"
        )
    print_figures(flat)
    return result, 0 if result["ok"] else 1
