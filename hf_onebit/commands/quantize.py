"""``hf-onebit quantize``: its arguments, which of them are of one method alone, the call, what is printed."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from hf_onebit.algorithms.groupwise import SEARCHES
from hf_onebit.calibration import read_text
from hf_onebit.commands.options import DEFAULT_PRESET, Result, UsageError, add_max_shard_size, device_of
from hf_onebit.config import AUTO, CALIBRATION_CONTEXT, CALIBRATION_TOKENS, PRESETS, SELF
from hf_onebit.config_checks import HEAD_BITS
from hf_onebit.mpq_config import MPQ_CALIBRATION_TOKENS, MPQ_PRESETS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``hf-onebit quantize``."""
    parser.add_argument("model", metavar="MODEL", help="a folder, a hub id, or a .gguf file")
    parser.add_argument(
        "-o",
        "--output",
        metavar="DIR",
        required=True,
        help="folder to make, or an older checkpoint to replace",
    )
    parser.add_argument(
        "--method",
        default="onebit",
        help="onebit (signs with scales, default) or mpq (codes of 1 to 8 bits in groups)",
    )
    parser.add_argument(
        "--preset",
        default=DEFAULT_PRESET,
        help="; ".join(f"{name} ({text})" for name, text in PRESETS.items())
        + f" (default {DEFAULT_PRESET}); for mpq "
        + "; ".join(f"{name} ({text})" for name, text in MPQ_PRESETS.items()),
    )
    parser.add_argument(
        "--bits",
        type=_bits,
        metavar="N",
        help="mpq: width of one code, 1 to 8 (default 4); auto: layer by layer, within --target-bpw or --target-size",
    )
    parser.add_argument(
        "--choices",
        type=lambda text: text.split(","),
        metavar="LIST",
        help="mpq with --bits auto: what there is to choose from, such as 1p,2p,2g64,4g64 (default: signs, 1 to 8 bit)",
    )
    parser.add_argument(
        "--consistent-groups", action="store_true", help="mpq with --bits auto: q/k/v alike, and gate/up alike"
    )
    parser.add_argument(
        "--within-layer", action="store_true", help="mpq with --bits auto: several widths within a layer too"
    )
    parser.add_argument(
        "--group-size",
        type=int,
        metavar="N",
        help="mpq: inputs that share a scale: a multiple of 32, or -1 for whole rows (default 64)",
    )
    parser.add_argument("--symmetric", action="store_true", help="mpq: no zeros")
    parser.add_argument("--act-order", action="store_true", help="mpq: groups of inputs of like importance")
    parser.add_argument("--double-quant", action="store_true", help="mpq: store scales and zeros as codes themselves")
    parser.add_argument("--search", choices=SEARCHES, help="mpq: how preset closed finds scales (default mse)")
    parser.add_argument("--planes", type=int, metavar="N", help="onebit: sign matrices per layer, 1 or 2 (default 1)")
    parser.add_argument(
        "--planes-per-layer",
        action="append",
        metavar="NAME=N",
        help="another number of them for these layers, named as for --skip; of several that match, the first counts",
    )
    parser.add_argument(
        "--target-bpw",
        type=float,
        metavar="X",
        help="bits per weight of the packed layers: onebit gives a second plane to those that need it most (not with "
        "preset closed alone: it takes text to measure), mpq with --bits auto chooses each layer's bits",
    )
    parser.add_argument(
        "--target-size", metavar="SIZE", help="the same by the size of the weight files, such as 60MB or 1.5GiB"
    )
    for flag, what in (("--lm-head-bits", "output head"), ("--embedding-bits", "token embedding")):
        bits = ", ".join(map(str, HEAD_BITS))
        parser.add_argument(
            flag,
            type=_bits,
            metavar="N",
            help=f"pack the {what} at N bits: {bits}; auto with --bits auto --target-size (default: floating point)",
        )
    parser.add_argument(
        "--head-group-size",
        type=int,
        default=64,
        metavar="N",
        help="inputs that share a scale in head and embedding: a multiple of 32, or -1 for whole rows (default 64)",
    )
    parser.add_argument(
        "--calibration",
        metavar="FILE",
        help="text or .jsonl file to calibrate on, or self: text that the model writes (default: none with preset "
        "closed, else self)",
    )
    parser.add_argument(
        "--calibration-tokens",
        type=int,
        metavar="N",
        help="tokens of it to use (default by preset: "
        + ", ".join(f"{tokens} for {name}" for name, tokens in CALIBRATION_TOKENS.items())
        + "; for mpq "
        + ", ".join(f"{tokens} for {name}" for name, tokens in MPQ_CALIBRATION_TOKENS.items())
        + ")",
    )
    parser.add_argument(
        "--calibration-context",
        type=int,
        default=CALIBRATION_CONTEXT,
        metavar="N",
        help=f"tokens a sequence (default {CALIBRATION_CONTEXT})",
    )
    parser.add_argument(
        "--skip",
        action="append",
        metavar="NAME",
        help="leave these modules in floating point, and all in them, by name or a part of it such as mlp or layers.0 "
        "(may be repeated; replaces the default list: name the head too)",
    )
    parser.add_argument(
        "--no-resume",
        action="store_true",
        help="start afresh where an interrupted run to the same folder left its work (default: go on with it)",
    )
    parser.add_argument(
        "--spill", action="store_true", help="keep the hidden states of the calibration text in files, not in memory"
    )
    parser.add_argument(
        "--low-memory",
        action=argparse.BooleanOptionalAction,
        help="read the model from its files block by block, with one block in memory at a time, and leave out what "
        "takes all of it (default: where memory is short and nothing has to be left out)",
    )
    parser.add_argument(
        "--device", default="cpu", help="where to calibrate: cpu, cuda, ... (default cpu, where runs repeat to the bit)"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the plan, time, memory and disk that it would take, and stop there",
    )
    add_max_shard_size(parser)
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="which calibration sequences are used, and what the model writes (default 0)",
    )


def run(options: argparse.Namespace) -> Result:
    """``hf-onebit quantize``, alone or as one of several processes; the first of them prints."""
    from transformers.utils import logging

    from hf_onebit.ranks import launched_group

    with launched_group() as rank:
        if rank:
            logging.disable_progress_bar()
            logging.set_verbosity_error()
            options.json = False
        return _quantize(options, silent=rank > 0)


def _quantize(options: argparse.Namespace, silent: bool) -> Result:
    from hf_onebit.conducting.low_memory import require_streamable
    from hf_onebit.mpq_quantizer import MPQQuantizer
    from hf_onebit.quantization.planning import require_text
    from hf_onebit.quantize import OneBitQuantizer
    from hf_onebit.quantizer import Quantizer
    from hf_onebit.report import REPORT_FOLDER, layer_summary, write_report
    from hf_onebit.sources import read_model_config, writes_text
    from hf_onebit.storage.checkpoint import full_report, read_side_file

    quantizers: dict[str, type[Quantizer]] = {"onebit": OneBitQuantizer, "mpq": MPQQuantizer}
    method = quantizers.get(options.method)
    if method is None:
        known = " or ".join(map(repr, quantizers))
        raise UsageError(f"Unknown method {options.method!r}: expected {known}")
    own = _options_of_method(options)
    # Of several processes on one machine, each has a GPU of its own.
    several = options.device == "cuda" and "LOCAL_RANK" in os.environ
    device = device_of(f"cuda:{os.environ['LOCAL_RANK']}" if several else options.device)
    if options.calibration not in (None, SELF):
        read_text(options.calibration)  # before the model is loaded for nothing
    try:
        quantizer = method.from_pretrained(
            options.model,
            preset=options.preset,
            **own,
            lm_head_bits=options.lm_head_bits,
            embedding_bits=options.embedding_bits,
            head_group_size=options.head_group_size,
            dataset=options.calibration,
            calibration_tokens=options.calibration_tokens,
            calibration_context=options.calibration_context,
            modules_to_not_convert=options.skip,
            seed=options.seed,
            spill=options.spill,
            low_memory=options.low_memory,
        )
        require_text(quantizer.config)
        require_streamable(quantizer.config)
    except ValueError as error:  # nothing was read yet: it is the options that cannot be
        raise UsageError(str(error)) from error
    if options.dry_run:
        if silent:
            return {}, 0
        from hf_onebit.dry_run import dry_run
        from hf_onebit.report import plan_summary

        planned = {**dry_run(quantizer, options.output), "command": options.command_line}
        print(plan_summary(planned))
        return planned, 0
    quantizer.quantize(
        options.output,
        max_shard_size=options.max_shard_size,
        provenance={"command": options.command_line},
        resume=not options.no_resume,
        device=device,
        load=False,
    )
    if silent:
        return {}, 0
    report = {**(quantizer.report or {}), "command": options.command_line, "output": options.output}
    side = read_side_file(options.output)
    assert side is not None  # it has just been written
    report["files"], report["notes"] = write_report(full_report(side), os.path.join(options.output, REPORT_FOLDER))
    evaluate = ["hf-onebit", "eval", options.output, "--data", "FILE", "--against", options.model, "--write-card"]
    next_command = shlex.join(evaluate) if writes_text(read_model_config(options.output)) else None
    print(layer_summary(report, next_command=next_command))
    for note in report["notes"]:
        print(note, file=sys.stderr)
    return report, 0


# Options of one method alone, by their fields.
_OWN: dict[str, tuple[str, ...]] = {
    "onebit": ("planes", "planes_per_layer", "target_bpw", "target_size"),
    "mpq": (
        *("bits", "group_size", "symmetric", "act_order", "double_quant", "search", "target_bpw", "target_size"),
        *("choices", "consistent_groups", "within_layer"),
    ),
}


def _options_of_method(options: argparse.Namespace) -> dict[str, Any]:
    """What was given of the method's own options; those of another are refused, not passed over."""
    given = {
        method: {
            field: value for field in fields if (value := getattr(options, field)) is not None and value is not False
        }
        for method, fields in _OWN.items()
    }
    for method, fields in given.items():
        foreign = [field for field in fields if field not in _OWN[options.method]]
        if foreign:
            flag = "--" + foreign[0].replace("_", "-")
            raise UsageError(f"{flag} is an option of --method {method}, and this is --method {options.method}")
    own = given[options.method]
    if "planes_per_layer" in own:
        own["planes_per_layer"] = _planes_per_layer(own["planes_per_layer"])
    return own


def _bits(text: str) -> int | str:
    """A number of bits, or "auto"."""
    try:
        return AUTO if text == AUTO else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of bits: expected a whole number or {AUTO}") from None


def _planes_per_layer(given: Sequence[str] | None) -> dict[str, int] | None:
    """{NAME: N} of some texts NAME=N."""
    planes: dict[str, int] = {}
    for text in given or ():
        name, _, number = text.rpartition("=")
        if not name or not number.isdecimal():
            raise UsageError(f"--planes-per-layer is {text!r}: expected NAME=N, such as down_proj=2")
        planes.setdefault(name, int(number))
    return planes or None
