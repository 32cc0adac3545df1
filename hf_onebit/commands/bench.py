"""``hf-onebit bench``: its arguments, the call, what is printed."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from hf_onebit.commands.options import Result, UsageError
from hf_onebit.report import json_safe

# Its --json, which takes a file.
JSON_TO_FILE: dict[str, Any] = {
    "action": "store",
    "nargs": "?",
    "const": True,
    "metavar": "FILE",
    "help": "write all figures to FILE; without FILE print one JSON object, and nothing else, on standard output",
}


class _ForOne(argparse.Action):
    """Stores the value, and notes the option: it is for the processor, or for a GPU, alone."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, True if self.nargs == 0 else values)
        noted = getattr(namespace, "for_one", [])
        namespace.for_one = [*noted, self.option_strings[0]]


_GPU_ONLY = ("--milliseconds", "--profile")
_OF_A_MODEL = ("--gguf", "--prompt", "--new-tokens")  # and on the CPU --packed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``hf-onebit bench``."""
    parser.add_argument(
        "--device",
        default="cpu",
        metavar="DEVICE",
        help="cpu, or cuda or cuda:N for the kernels of a GPU (default cpu)",
    )
    parser.add_argument("--shape", nargs="+", metavar="OUTxIN", help="layers to time (default: five, without --model)")
    parser.add_argument("--batch", nargs="+", type=int, metavar="N", help="rows of x (default 1 4 16 64 512)")
    parser.add_argument(
        "--against",
        metavar="LIST",
        help="of bf16, fp32, reference, ggml (default bf16,ggml); on a GPU of float, gemlite1, gemlite2, gemlite4, "
        "bnb4, gptqmodel4 (default: what is installed)",
    )
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        help="activations of the packed layer (default bfloat16; on a GPU float16 and bfloat16, in turn)",
    )
    parser.add_argument(
        "--packed",
        metavar="LIST",
        help="1p, 2p, 4g64, 2g64, ...: how llama-0.8b is packed (default 1p), on a GPU the layers to time "
        "(default 1p,2p,4g64,2g64)",
    )
    cpu = parser.add_argument_group("on the CPU only")
    cpu.add_argument(
        "--threads", action=_ForOne, type=int, default=1, metavar="N", help="threads of all contenders (default 1)"
    )
    cpu.add_argument(
        "--model",
        action=_ForOne,
        metavar="DIR",
        help="also time a whole packed checkpoint; llama-0.8b makes a random one of that size",
    )
    cpu.add_argument(
        "--isa", action=_ForOne, metavar="NAME", help="instruction set of the packed layer (default: the best)"
    )
    cpu.add_argument(
        "--mode", action=_ForOne, nargs="+", choices=("hot", "stream"), help="one layer again and again; many in turn"
    )
    cpu.add_argument(
        "--rounds", action=_ForOne, type=int, default=15, metavar="N", help="timings of each contender (default 15)"
    )
    cpu.add_argument(
        "--working-set",
        action=_ForOne,
        type=float,
        default=1.1,
        metavar="GIB",
        help="weights of each contender in mode stream (default 1.1)",
    )
    cpu.add_argument(
        "--prompt", action=_ForOne, type=int, default=128, metavar="N", help="tokens to prefill (default 128)"
    )
    cpu.add_argument(
        "--new-tokens", action=_ForOne, type=int, default=32, metavar="N", help="tokens to decode (default 32)"
    )
    cpu.add_argument(
        "--gguf",
        action=_ForOne,
        default="q1_0,tq2_0",
        metavar="LIST",
        help="linear layers of llama.cpp: q1_0, tq2_0, q4_0, f16",
    )
    gpu = parser.add_argument_group("on a GPU only")
    gpu.add_argument("--milliseconds", action=_ForOne, type=float, metavar="MS", help="for each figure (default 20)")
    gpu.add_argument(
        "--profile", action=_ForOne, nargs=0, default=False, help="also the time of each kernel, by torch's profiler"
    )


def run(options: argparse.Namespace) -> Result:
    """``hf-onebit bench``."""
    from hf_onebit import bench
    from hf_onebit.bench.arguments import WrongArgument

    on_gpu = options.device != "cpu"
    wrong = [name for name in getattr(options, "for_one", ()) if (name in _GPU_ONLY) is not on_gpu]
    if wrong:
        raise UsageError(f"--device {options.device}: {', '.join(dict.fromkeys(wrong))} cannot stand beside it")
    if not on_gpu and options.model is None:
        idle = [name for name in getattr(options, "for_one", ()) if name in _OF_A_MODEL]
        idle += ["--packed"] if options.packed else []
        if idle:
            raise UsageError(f"{', '.join(dict.fromkeys(idle))}: for whole models, name one with --model")
    if isinstance(options.json, str):
        bench.check_writable(options.json)  # before minutes of work
    try:
        result = _run_on_gpu(options) if on_gpu else _run_on_cpu(options)
    except WrongArgument as error:
        raise UsageError(str(error)) from error
    _write(result, options)
    return result, 0


def _run_on_cpu(options: argparse.Namespace) -> dict[str, Any]:
    from hf_onebit import bench

    result = bench.run(
        shapes=options.shape,
        batches=options.batch,
        model=options.model,
        against=(options.against or "bf16,ggml").split(","),
        gguf=options.gguf.split(","),
        packed=(options.packed or "1p").split(","),
        dtype=options.dtype or "bfloat16",
        isa=options.isa,
        modes=options.mode,
        rounds=options.rounds,
        threads=options.threads,
        working_set=int(options.working_set * 2**30),
        prompt_tokens=options.prompt,
        new_tokens=options.new_tokens,
        say=_say,
    )
    print(bench.as_text(result))
    return result


def _run_on_gpu(options: argparse.Namespace) -> dict[str, Any]:
    from hf_onebit.bench import cuda, cuda_tables

    if reason := cuda.obstacle(options.device):
        raise UsageError(f"--device {options.device}: {reason}")
    if options.dtype not in (None, *cuda.DTYPES):
        raise UsageError(f"--device {options.device}: --dtype is {options.dtype}, expected {' or '.join(cuda.DTYPES)}")
    result = cuda.run(
        device=options.device,
        shapes=options.shape,
        batches=options.batch,
        packed=options.packed and options.packed.split(","),
        against=options.against and options.against.split(","),
        dtypes=options.dtype and [options.dtype],
        milliseconds=cuda.MILLISECONDS if options.milliseconds is None else options.milliseconds,
        profile=options.profile,
        say=_say,
        keep=lambda result: _write(result, options),
    )
    print(cuda_tables.as_text(result))
    return result


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _write(result: dict[str, Any], options: argparse.Namespace) -> None:
    """Into the file of --json, where one was named."""
    result["command"] = options.command_line
    if isinstance(options.json, str):
        with open(options.json, "w", encoding="utf-8") as file:
            file.write(json.dumps(json_safe(result), indent=1, allow_nan=False) + "\n")
