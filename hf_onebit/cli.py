"""``hf-onebit``: parses, calls, prints.

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

from hf_onebit.algorithms.groupwise import SEARCHES
from hf_onebit.calibration import read_text
from hf_onebit.config import AUTO, CALIBRATION_TOKENS, HEAD_BITS, PRESETS, SELF
from hf_onebit.mpq_config import MPQ_CALIBRATION_TOKENS, MPQ_PRESETS
from hf_onebit.report import json_safe
from hf_onebit.version import __version__

# What the commands quantize with where nothing is said; a bare ``OneBitConfig()``, which takes no text, is ``closed``.
DEFAULT_PRESET = "fast"

Result = tuple[dict[str, Any], int]
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
    except _EXPECTED as error:
        if os.environ.get("HF_ONEBIT_TRACEBACK"):
            traceback.print_exc()
        result, status = {"error": str(error)}, 1
        print(f"hf-onebit: error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("hf-onebit: interrupted; nothing was left half-written", file=sys.stderr)
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
        name: str, text: str, run: Callable[[argparse.Namespace], Result], **json: Any
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        help = "print one JSON object, and nothing else, on standard output"
        sub.add_argument("--json", **{"action": "store_true", "help": help, **json})
        return sub

    add_quantize_arguments(command("quantize", "Quantize a float model and save it packed.", run_quantize))
    _add_eval_arguments(command("eval", "Perplexity of a model, and how far it is from its float model.", run_eval))
    inspect = command("inspect", "Layers, bits per weight and coverage of a packed checkpoint.", run_inspect)
    inspect.add_argument("folder", metavar="DIR")
    verify = command("verify", "Check a packed checkpoint: checksums, shapes, finite values.", run_verify)
    verify.add_argument("folder", metavar="DIR")
    to_file = {"action": "store", "nargs": "?", "const": True, "metavar": "FILE"}
    to_file["help"] = (
        "write all figures to FILE; without FILE print one JSON object, and nothing else, on standard output"
    )
    _add_bench_arguments(command("bench", "Speed of packed layers and models beside others.", run_bench, **to_file))
    doctor = command("doctor", "Versions, kernels and a self-test.", run_doctor)
    doctor.add_argument(
        "--build", action="store_true", help="first compile the CPU kernels into your cache, where none are in use"
    )
    report = command("report", "The report of packed checkpoints: JSON and plots.", run_report)
    report.add_argument(
        "folder", metavar="DIR", nargs="+", help="a packed checkpoint; several are drawn beside one another"
    )
    report.add_argument("-o", "--output", metavar="DIR", help="folder to write to (default: report in the first DIR)")
    _add_import_arguments(
        command("import", "Convert a GPTQ, bitorch or OneComp checkpoint into a packed one.", run_import)
    )
    _add_export_arguments(command("export-gguf", "Write a packed checkpoint as a GGUF file.", run_export_gguf))
    _add_demo_arguments(command("demo", "The main job on a small real model, measured.", run_demo))
    return parser


def add_quantize_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``quantize``."""
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
        "--calibration-context", type=int, default=2048, metavar="N", help="tokens a sequence (default 2048)"
    )
    parser.add_argument(
        "--skip",
        action="append",
        metavar="NAME",
        help="leave these layers in floating point (may be repeated; replaces the default list: name the head too)",
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
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="largest weight file (default 5GB)")
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="which calibration sequences are used, and what the model writes (default 0)",
    )


def _add_eval_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL_OR_DIR", help="a folder, a hub id, or a .gguf file; packed or float")
    parser.add_argument("--data", metavar="FILE", required=True, help="text file to score")
    parser.add_argument("--context", type=int, default=2048, metavar="N", help="tokens a window (default 2048)")
    parser.add_argument("--tokens", type=int, default=None, metavar="N", help="score the first N tokens only")
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


def _add_import_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="the folder of the other program's checkpoint")
    parser.add_argument(
        "-o", "--output", metavar="DIR", required=True, help="folder to make, or an older packed checkpoint to replace"
    )
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="largest weight file (default 5GB)")


def _add_export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR")
    parser.add_argument("-o", "--output", metavar="FILE", required=True, help="the .gguf file to make or replace")
    parser.add_argument(
        "--fallback",
        choices=("f16", "bf16", "q8_0"),
        help="type of layers that no type of few bits holds (default: they are refused)",
    )
    parser.add_argument(
        "--no-vocabulary", action="store_true", help="leave the tokenizer out: llama.cpp then takes token ids only"
    )


def _add_demo_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", metavar="DIR", default="hf-onebit-demo", help="folder for the checkpoints")
    parser.add_argument("--model", metavar="MODEL", help="another model than SmolLM2-135M-Instruct")
    parser.add_argument("--data", metavar="FILE", help="text to evaluate on (default: the float model writes one)")
    parser.add_argument("--calibration", metavar="FILE", help="as for quantize")
    parser.add_argument(
        "--preset", default=DEFAULT_PRESET, help=", ".join(PRESETS) + f": as for quantize (default {DEFAULT_PRESET})"
    )
    parser.add_argument("--tokens", type=int, default=8192, metavar="N", help="tokens to score (default 8192)")
    parser.add_argument("--context", type=int, default=1024, metavar="N", help="tokens a window (default 1024)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of all that is random (default 0)")


def _add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", nargs="+", metavar="OUTxIN", help="layers to time (default: five, without --model)")
    parser.add_argument("--batch", nargs="+", type=int, metavar="N", help="rows of x (default 1 4 16 64 512)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="threads of all contenders (default 1)")
    parser.add_argument(
        "--model", metavar="DIR", help="also time a whole packed checkpoint; llama-0.8b makes a random one of that size"
    )
    parser.add_argument(
        "--against", default="bf16,ggml", metavar="LIST", help="of bf16, fp32, reference, ggml (default bf16,ggml)"
    )
    parser.add_argument(
        "--dtype",
        default="bfloat16",
        choices=("bfloat16", "float16", "float32"),
        help="activations of the packed layer (default bfloat16)",
    )
    parser.add_argument("--isa", metavar="NAME", help="instruction set of the packed layer (default: the best)")
    parser.add_argument("--mode", nargs="+", choices=("hot", "stream"), help="one layer again and again; many in turn")
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="timings of each contender (default 15)")
    parser.add_argument(
        "--working-set",
        type=float,
        default=1.1,
        metavar="GIB",
        help="weights of each contender in mode stream (default 1.1)",
    )
    parser.add_argument("--prompt", type=int, default=128, metavar="N", help="tokens to prefill (default 128)")
    parser.add_argument("--new-tokens", type=int, default=32, metavar="N", help="tokens to decode (default 32)")
    parser.add_argument(
        "--gguf", default="q1_0,tq2_0", metavar="LIST", help="linear layers of llama.cpp: q1_0, tq2_0, q4_0, f16"
    )
    parser.add_argument(
        "--packed", default="1p", metavar="LIST", help="how llama-0.8b is packed: 1p, 2p, 4g64, 2g64, ... (default 1p)"
    )


def run_quantize(options: argparse.Namespace) -> Result:
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
    from hf_onebit.mpq_quantizer import MPQQuantizer
    from hf_onebit.quantize import OneBitQuantizer, Quantizer
    from hf_onebit.report import REPORT_FOLDER, layer_summary, write_report
    from hf_onebit.storage.checkpoint import full_report, read_side_file

    quantizers: dict[str, type[Quantizer]] = {"onebit": OneBitQuantizer, "mpq": MPQQuantizer}
    method = quantizers.get(options.method)
    if method is None:
        known = " or ".join(map(repr, quantizers))
        raise ValueError(f"Unknown method {options.method!r}: expected {known}")
    own = _options_of_method(options)
    # Of several processes on one machine, each has a GPU of its own.
    several = options.device == "cuda" and "LOCAL_RANK" in os.environ
    device = _device(f"cuda:{os.environ['LOCAL_RANK']}" if several else options.device)
    if options.calibration not in (None, SELF):
        read_text(options.calibration)  # before the model is loaded for nothing
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
    next_command = ["hf-onebit", "eval", options.output, "--data", "FILE", "--against", options.model, "--write-card"]
    print(layer_summary(report, next_command=shlex.join(next_command)))
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
            raise ValueError(f"{flag} is an option of --method {method}, and this is --method {options.method}")
    own = given[options.method]
    if "planes_per_layer" in own:
        own["planes_per_layer"] = _planes_per_layer(own["planes_per_layer"])
    return own


def _bits(text: str) -> int | str:
    """A number of bits, or "auto"."""
    return AUTO if text == AUTO else int(text)


def _planes_per_layer(given: Sequence[str] | None) -> dict[str, int] | None:
    """{NAME: N} of some texts NAME=N."""
    planes: dict[str, int] = {}
    for text in given or ():
        name, _, number = text.rpartition("=")
        if not name or not number.isdecimal():
            raise ValueError(f"--planes-per-layer is {text!r}: expected NAME=N, such as down_proj=2")
        planes.setdefault(name, int(number))
    return planes or None


def run_eval(options: argparse.Namespace) -> Result:
    """``hf-onebit eval``."""
    import torch

    from hf_onebit import evaluation, loading, sources
    from hf_onebit.storage.checkpoint import sha256_of_file

    text = read_text(options.data)
    dtype = options.dtype if options.dtype == "auto" else getattr(torch, options.dtype)
    device = _device(options.device)
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
        quality: dict[str, Any] = dict(evaluation.compare(model, reference, windows, progress=_progress))
    else:
        quality = {**evaluation.perplexity(model, windows, progress=_progress), "kl": None, "top1": None}
    quality["context"] = options.context
    result = {"model": options.model, "data": options.data, "against": options.against, **quality, **figures}
    result["sha256"] = sha256_of_file(options.data)
    if options.write_card:
        _write_card(options, result)
    _print_figures({k: v for k, v in result.items() if k != "layers" and v is not None})
    return result, 0


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


def run_report(options: argparse.Namespace) -> Result:
    """``hf-onebit report``."""
    from hf_onebit.report import REPORT_FOLDER, write_report
    from hf_onebit.storage.checkpoint import SIDE_FILE, full_report, read_side_file

    reports = []
    for folder in options.folder:
        side = read_side_file(folder)
        if side is None or not side.get("report"):
            raise ValueError(f"{folder!r} has no {SIDE_FILE} with a report: expected a folder of hf-onebit quantize")
        reports.append(full_report(side))
    output = options.output or os.path.join(options.folder[0], REPORT_FOLDER)
    if len(reports) == 1:
        report = reports[0]
    else:
        report = {"evaluations": [e for found in reports for e in found.get("evaluations") or []]}
        if not report["evaluations"]:
            raise ValueError("none of these folders was evaluated: hf-onebit eval DIR --data FILE --write-card first")
    files, notes = write_report(report, output)
    print("\n".join([*files, *notes]))
    return {"files": files, "notes": notes, "evaluations": report.get("evaluations") or []}, 0


def run_inspect(options: argparse.Namespace) -> Result:
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
    _print_figures(
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


def run_import(options: argparse.Namespace) -> Result:
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


def run_export_gguf(options: argparse.Namespace) -> Result:
    """``hf-onebit export-gguf``."""
    from hf_onebit.interchange.gguf_file import export_gguf
    from hf_onebit.report import format_table

    result = export_gguf(
        options.folder, options.output, fallback=options.fallback, vocabulary=not options.no_vocabulary
    )
    rows = [
        [
            name,
            tensor["type"],
            "exact" if tensor["exact"] else f"{tensor['max_error']:.1e}",
            "; ".join(filter(None, (tensor["folded"] and f"column scales in {tensor['folded']}", tensor["why"]))),
        ]
        for name, tensor in result["tensors"].items()
    ]
    print(format_table(["tensor", "type", "largest error", ""], rows))
    types = ", ".join(f"{count} {kind}" for kind, count in result["types"].items())
    print(f"\n{result['exact']} of {len(rows)} tensors exactly; {types}; {result['file_bytes']:,} bytes")
    return result, 0


def run_verify(options: argparse.Namespace) -> Result:
    """``hf-onebit verify``."""
    from hf_onebit.storage.verification import verify

    result = verify(options.folder)
    said = {
        "match": "checksums match",
        "mismatch": "checksums do not match",
        "none": "no checksums (only hf_onebit's own save writes them); shapes and values were checked",
    }
    print(
        f"{options.folder}: {'good' if result['ok'] else 'BAD'}, {result['tensors']} tensors, "
        f"{said[result['checksums']]}"
    )
    for problem in result["problems"]:
        print(f"  - {problem}")
    return result, 0 if result["ok"] else 1


def run_bench(options: argparse.Namespace) -> Result:
    """``hf-onebit bench``."""
    from hf_onebit import bench

    if isinstance(options.json, str):
        bench.check_writable(options.json)  # before minutes of work
    result = bench.run(
        shapes=options.shape,
        batches=options.batch,
        model=options.model,
        against=options.against.split(","),
        gguf=options.gguf.split(","),
        packed=options.packed.split(","),
        dtype=options.dtype,
        isa=options.isa,
        modes=options.mode,
        rounds=options.rounds,
        threads=options.threads,
        working_set=int(options.working_set * 2**30),
        prompt_tokens=options.prompt,
        new_tokens=options.new_tokens,
        say=lambda line: print(line, file=sys.stderr),
    )
    result["command"] = options.command_line
    print(bench.as_text(result))
    if isinstance(options.json, str):
        with open(options.json, "w", encoding="utf-8") as file:
            file.write(json.dumps(json_safe(result), indent=1, allow_nan=False) + "\n")
    return result, 0


def run_doctor(options: argparse.Namespace) -> Result:
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
    _print_figures(flat)
    return result, 0 if result["ok"] else 1


def run_demo(options: argparse.Namespace) -> Result:
    """``hf-onebit demo``."""
    from hf_onebit import demo

    for path in (options.data, None if options.calibration == SELF else options.calibration):
        if path is not None:
            read_text(path)
    result = demo.run(
        options.output,
        model=options.model,
        data=options.data,
        calibration=options.calibration,
        preset=options.preset,
        tokens=options.tokens,
        context=options.context,
        seed=options.seed,
        say=lambda line: print(line, file=sys.stderr),
    )
    print(_demo_text(result))
    return result, 0


def _demo_text(result: dict[str, Any]) -> str:
    from hf_onebit.report import format_table

    names = {"float": "float (bf16)", "onebit": "one bit, packed", "onebit_cached": "one bit, signs cached"}
    rows = [
        [
            names[key],
            f"{figures['file_bytes'] / 1e6:.1f} MB",
            f"{figures['linear_bpw']:.3f}",
            f"{figures['file_bpw']:.2f}",
            f"{figures['perplexity']:,.1f}",
            f"{figures['tokens_per_second']:.1f}",
            f"{figures['tensor_bytes'] / 1e6:.0f} MB",
            f"{figures['peak_memory_mb']:.0f} MB",
        ]
        for key, figures in ((key, result[key]) for key in names)
    ]
    headers = [
        "",
        "file",
        "bits/weight (linear)",
        "bits/weight (file)",
        "perplexity",
        "decode tokens/s",
        "tensors",
        "peak memory",
    ]
    samples = "\n".join(f"{names[key]}: {result[key]['sample']!r}" for key in ("float", "onebit"))
    calibration = result["calibration"]
    return "\n".join(
        [
            "",
            format_table(headers, rows),
            "",
            f"Perplexity on the first {result['tokens']} scored tokens of: {result['text']} (context "
            f"{result['context']}); KL {result['kl']:.2f} nats per token, top-1 agreement {100 * result['top1']:.1f} "
            "%.",
            f"Preset {result['preset']}, calibrated on {calibration['tokens']} tokens of: {calibration['source']}."
            if calibration
            else f"Preset {result['preset']}, no calibration.",
            f"The float model itself comes from {result['model']}.",
            "",
            samples,
            "",
            f"Checkpoint: {result['onebit_folder']}   (float model: {result['float_folder']}; {result['seconds']:.0f} "
            "s in all)",
        ]
    )


def _device(name: str | None) -> Any:
    """The device of that name, once it is clear that there is one."""
    import torch

    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for the device
        reason = str(error).splitlines()[0]
        raise ValueError(f"Cannot run on --device {name!r} ({reason}): leave it out, or try --device cpu") from error
    return device


def _packed_figures(model: str) -> dict[str, Any]:
    """Size and coverage of a packed local checkpoint; None for every key of any other model."""
    from hf_onebit.inspection import inspect
    from hf_onebit.loading import is_packed_folder

    keys = ("linear_bpw", "file_bpw", "file_bytes", "coverage", "layers")
    info = inspect(model) if is_packed_folder(model) else {}
    return {key: info.get(key) for key in keys}


def _progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{done}/{total} tokens", end="" if done < total else "\n", file=sys.stderr)


def _print_figures(figures: dict[str, Any]) -> None:
    width = max(map(len, figures), default=0)
    for key, value in figures.items():
        print(f"{key:<{width}}  {f'{value:,.4f}' if isinstance(value, float) else value}")


if __name__ == "__main__":
    sys.exit(main())
