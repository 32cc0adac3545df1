"""``hf-onebit verify``: its arguments, the call, what is printed."""

from __future__ import annotations

import argparse

from hf_onebit.commands.options import Result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``hf-onebit verify``."""
    parser.add_argument("folder", metavar="DIR")


def run(options: argparse.Namespace) -> Result:
    """``hf-onebit verify``."""
    from hf_onebit.storage.verification import verify

    result = verify(options.folder)
    said = {
        "match": "checksums match",
        "mismatch": "checksums do not match",
        "none": "no checksums (only hf_onebit's own save writes them); shapes and values were checked",
    }
    # Where no tensor was found, nothing was checked: the problems say why.
    what = f", {result['tensors']} tensors, {said[result['checksums']]}" if result["tensors"] else ""
    print(f"{options.folder}: {'good' if result['ok'] else 'BAD'}{what}")
    for problem in result["problems"]:
        print(f"  - {problem}")
    return result, 0 if result["ok"] else 1
