"""``hf-onebit demo``: its arguments, the call, what is printed."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from hf_onebit.calibration import read_text
from hf_onebit.commands.options import DEFAULT_PRESET, Result, at_least
from hf_onebit.config import PRESETS, SELF


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``hf-onebit demo``."""
    parser.add_argument("-o", "--output", metavar="DIR", default="hf-onebit-demo", help="folder for the checkpoints")
    parser.add_argument("--model", metavar="MODEL", help="another model than SmolLM2-135M-Instruct")
    parser.add_argument("--data", metavar="FILE", help="text to evaluate on (default: the float model writes one)")
    parser.add_argument("--calibration", metavar="FILE", help="as for quantize")
    parser.add_argument(
        "--preset",
        default=DEFAULT_PRESET,
        choices=tuple(PRESETS),
        help=", ".join(PRESETS) + f": as for quantize (default {DEFAULT_PRESET})",
    )
    parser.add_argument("--tokens", type=at_least(2), default=8192, metavar="N", help="tokens to score (default 8192)")
    parser.add_argument("--context", type=at_least(2), default=1024, metavar="N", help="tokens a window (default 1024)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of all that is random (default 0)")


def run(options: argparse.Namespace) -> Result:
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
        command=options.command_line,
        say=lambda line: print(line, file=sys.stderr),
    )
    print(as_text(result))
    return result, 0


def as_text(result: dict[str, Any]) -> str:
    """What is printed of the figures of ``demo.run``."""
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
