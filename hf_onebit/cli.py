"""``hf-onebit``: the parser of all commands, and one of them run.

Exit status 0: done; 1: it failed, or ``verify`` or ``doctor`` found problems; 2: bad usage; 130: interrupted.

With ``--json`` the only thing on standard output is one JSON object ({"error": ...} on failure); everything else is on
standard error. docs/cli.md lists the keys.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from hf_onebit.commands import (
    bench,
    demo,
    doctor,
    evaluate,
    export_gguf,
    import_checkpoint,
    inspect,
    quantize,
    report,
    verify,
)
from hf_onebit.commands.options import Result, UsageError
from hf_onebit.report import json_safe
from hf_onebit.version import __version__

_EXPECTED = (ValueError, RuntimeError, ImportError, OSError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments, without the program's name; None for the process's own.

    Returns:
        The exit status.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 2
    options.command_line = shlex.join(["hf-onebit", *arguments])
    run: Callable[[argparse.Namespace], Result] = options.run
    try:
        with contextlib.redirect_stdout(sys.stderr) if options.json is True else contextlib.nullcontext():
            result, status = run(options)
    except UsageError as error:
        print(f"hf-onebit: error: {error}", file=sys.stderr)
        return 2
    except _EXPECTED as error:
        if os.environ.get("HF_ONEBIT_TRACEBACK"):
            traceback.print_exc()
        result, status = {"error": str(error)}, 1
        print(f"hf-onebit: error: {error}", file=sys.stderr)
    except KeyboardInterrupt as interrupt:
        kept = f". {interrupt}" if str(interrupt) else ""
        print(f"hf-onebit: interrupted; nothing was left half-written{kept}", file=sys.stderr)
        return 130
    if options.json is True:
        print(json.dumps(json_safe(result), indent=1, allow_nan=False))
    return status


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="hf-onebit", description="Language models of few bits for Hugging Face Transformers."
    )
    parser.add_argument("--version", action="version", version=f"hf-onebit {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    def command(
        name: str,
        text: str,
        run: Callable[[argparse.Namespace], Result],
        add_arguments: Callable[[argparse.ArgumentParser], None],
        **json: Any,
    ) -> None:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        help = "print one JSON object, and nothing else, on standard output"
        sub.add_argument("--json", **{"action": "store_true", "help": help, **json})
        add_arguments(sub)

    command("quantize", "Quantize a float model and save it packed.", quantize.run, quantize.add_arguments)
    text = "Perplexity of a model, and how far it is from its float model."
    command("eval", text, evaluate.run, evaluate.add_arguments)
    text = "Layers, bits per weight and coverage of a packed checkpoint."
    command("inspect", text, inspect.run, inspect.add_arguments)
    command("verify", "Check a packed checkpoint: checksums, shapes, finite values.", verify.run, verify.add_arguments)
    text = "Speed of packed layers and models beside others."
    command("bench", text, bench.run, bench.add_arguments, **bench.JSON_TO_FILE)
    command("doctor", "Versions, kernels and a self-test.", doctor.run, doctor.add_arguments)
    command("report", "The report of packed checkpoints: JSON and plots.", report.run, report.add_arguments)
    text = "Convert a GPTQ, bitorch or OneComp checkpoint into a packed one."
    command("import", text, import_checkpoint.run, import_checkpoint.add_arguments)
    command("export-gguf", "Write a packed checkpoint as a GGUF file.", export_gguf.run, export_gguf.add_arguments)
    command("demo", "The main job on a small real model, measured.", demo.run, demo.add_arguments)
    return parser


if __name__ == "__main__":
    sys.exit(main())
