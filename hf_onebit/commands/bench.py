"""``hf-onebit bench``: its arguments, the call, what is printed."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from hf_onebit.commands.options import Result
from hf_onebit.report import json_safe

# Its --json, which takes a file.
JSON_TO_FILE: dict[str, Any] = {
    "action": "store",
    "nargs": "?",
    "const": True,
    "metavar": "FILE",
    "help": "write all figures to FILE; without FILE print one JSON object, and nothing else, on standard output",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``hf-onebit bench``."""
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


def run(options: argparse.Namespace) -> Result:
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
