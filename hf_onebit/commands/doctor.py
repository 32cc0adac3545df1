"""``hf-onebit doctor``: its arguments, the call, what is printed."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from hf_onebit.commands.options import Result
from hf_onebit.commands.printing import print_figures


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``hf-onebit doctor``."""
    parser.add_argument(
        "--build", action="store_true", help="first compile the CPU kernels into your cache, where none are in use"
    )
    parser.add_argument(
        "--all-kernels", action="store_true", help="examine every variant of the GPU kernels: all widths in all dtypes"
    )


def run(options: argparse.Namespace) -> Result:
    """``hf-onebit doctor``."""
    from hf_onebit.doctor import examine

    result = examine(
        build=options.build, all_kernels=options.all_kernels, say=lambda line: print(line, file=sys.stderr)
    )
    if result["built"] is not None:
        print(f"Compiled the CPU kernels in {result['build_seconds']:.1f} s: {result['built']}\n")
    elif options.build:
        print("The CPU kernels are in use already: nothing was compiled.\n")
    shown = {key: value for key, value in result.items() if key not in ("built", "build_seconds")}
    flat = {key: value for key, value in shown.items() if not isinstance(value, (dict, list))}
    for group in ("packages", "optional", "devices", "kernels"):
        flat |= {f"{group}: {key}": value or "not installed" for key, value in result[group].items()}
    print_figures(flat | _self_test(result["self_test"]))
    return result, 0 if result["ok"] else 1


def _self_test(tests: list[dict[str, Any]]) -> dict[str, str]:
    """A line for each product; the kernels of a GPU that are right take one line a kind, the others one each."""
    lines: dict[str, str] = {}
    right: dict[str, int] = {}
    for test in tests:
        name = f"self-test: {test['device']} {test['op']}"
        if test["error"] is not None:
            lines[f"{name} {test['about']}"] = f"{'ok' if test['ok'] else 'WRONG'} ({test['error']:.1e})"
        elif test["ok"]:
            right[name] = right.get(name, 0) + 1
            lines[name] = f"ok ({right[name]} examined)"
        else:
            lines[f"{name} {test['about']}".strip()] = f"REFUSED: {test['reason']}"
    return lines
