"""``hf-onebit eval``: its arguments, the call, what is printed."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from hf_onebit.calibration import read_text
from hf_onebit.commands.options import Result, at_least, device_of
from hf_onebit.commands.printing import print_figures, print_progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``hf-onebit eval``."""
    parser.add_argument("model", metavar="MODEL_OR_DIR", help="a folder, a hub id, or a .gguf file; packed or float")
    parser.add_argument("--data", metavar="FILE", required=True, help="text file to score")
    parser.add_argument("--context", type=at_least(2), default=2048, metavar="N", help="tokens a window (default 2048)")
    parser.add_argument("--tokens", type=at_least(2), default=None, metavar="N", help="score the first N tokens only")
    parser.add_argument(
        "--against",
        metavar="MODEL",
        help="float model to compare with on the same tokens: KL and top-1 agreement",
    )
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="dtype to run in (default: the files')",
    )
    parser.add_argument("--device", default=None, help="cpu, cuda, ... (default: cuda where there is one)")
    parser.add_argument(
        "--write-card",
        action="store_true",
        help="add the figures to the packed folder's hf_onebit.json, model card and report",
    )


def run(options: argparse.Namespace) -> Result:
    """``hf-onebit eval``."""
    import torch

    from hf_onebit import evaluation, loading, sources
    from hf_onebit.digests import sha256_of_file

    text = read_text(options.data)
    dtype = options.dtype if options.dtype == "auto" else getattr(torch, options.dtype)
    device = device_of(options.device)
    for source in filter(None, (options.model, options.against)):
        sources.check_source(source)  # a model that is not there has no tokenizer either: say the former
    figures = _packed_figures(options.model)
    if options.write_card and figures["layers"] is None:
        raise ValueError(f"--write-card writes into a packed local folder, and {options.model!r} is none: leave it out")
    tokenizer = loading.load_tokenizer(options.model) or (options.against and loading.load_tokenizer(options.against))
    if not tokenizer:
        raise ValueError(f"{options.model!r} has no tokenizer beside it, and no --against model that has one was given")
    model = loading.load_any(options.model, dtype=dtype).to(device)
    windows = evaluation.token_windows(text, tokenizer, options.context, options.tokens)
    if options.against:
        reference = loading.load_any(options.against, dtype=dtype).to(device)
        quality: dict[str, Any] = dict(evaluation.compare(model, reference, windows, progress=print_progress))
    else:
        quality = {**evaluation.perplexity(model, windows, progress=print_progress), "kl": None, "top1": None}
    quality["context"] = options.context
    result = {"model": options.model, "data": options.data, "against": options.against, **quality, **figures}
    result["sha256"] = sha256_of_file(options.data)
    if options.write_card:
        _write_card(options, result)
    print_figures({k: v for k, v in result.items() if k != "layers" and v is not None})
    return result, 0


def _packed_figures(model: str) -> dict[str, Any]:
    """Size and coverage of a packed local checkpoint; None for every key of any other model."""
    from hf_onebit.inspection import inspect
    from hf_onebit.loading import is_packed_folder

    keys = ("linear_bpw", "file_bpw", "file_bytes", "coverage", "layers")
    info = inspect(model) if is_packed_folder(model) else {}
    return {key: info.get(key) for key in keys}


def _write_card(options: argparse.Namespace, result: dict[str, Any]) -> None:
    """Figures go where the model goes: by names, not by paths of this machine."""
    from hf_onebit.report import REPORT_FOLDER, write_report
    from hf_onebit.storage.checkpoint import record_evaluation

    entry = {key: value for key, value in result.items() if key not in ("layers", "against")}
    entry |= {"model": _basename(options.model), "data": os.path.basename(options.data)}
    entry["reference"] = options.against and _basename(options.against)
    entry["dtype"], entry["command"] = options.dtype, options.command_line
    report = record_evaluation(options.model, entry)
    _, notes = write_report(report, os.path.join(options.model, REPORT_FOLDER))
    for note in notes:
        print(note, file=sys.stderr)


def _basename(model: str) -> str:
    """A folder's own name; a hub id stays as it is."""
    return os.path.basename(os.path.abspath(model)) if os.path.exists(model) else model
