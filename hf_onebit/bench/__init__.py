"""How fast packed layers and models run, beside others, in one process: ``hf-onebit bench``.

Correctness first: a contender outside of its bound ends the run. Then all run in turn, round by round, and medians over
rounds, and of the ratios within a round, are reported.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from hf_onebit.bench.arguments import WrongArgument
from hf_onebit.bench.ggml import TYPES, Ggml, GgmlDot
from hf_onebit.bench.layers import DTYPES, MODES, Dense, Packed, Reference, Rival, measure
from hf_onebit.bench.model import bench_model
from hf_onebit.bench.rounds import Threads
from hf_onebit.bench.tables import as_text, layer_line, skip_line
from hf_onebit.ops import cpu
from hf_onebit.version import __version__

# out x in: a square one to compare with others' figures, then the layers of SmolLM2-135M.
SHAPES = ("4096x4096", "576x576", "192x576", "1536x576", "576x1536")
BATCHES = (1, 4, 16, 64, 512)
AGAINST = ("bf16", "fp32", "reference", "ggml")

__all__ = ["as_text", "bench_layers", "bench_model", "check_writable", "run"]

Say = Callable[[str], None]


def run(
    *,
    shapes: Sequence[str] | None = None,
    batches: Sequence[int] | None = None,
    model: str | None = None,
    against: Sequence[str] = ("bf16", "ggml"),
    gguf: Sequence[str] = ("q1_0", "tq2_0"),
    packed: Sequence[str] = ("1p",),
    dtype: str = "bfloat16",
    isa: str | None = None,
    modes: Sequence[str] | None = None,
    rounds: int = 15,
    threads: int = 1,
    working_set: int = int(1.1 * 2**30),
    prompt_tokens: int = 128,
    new_tokens: int = 32,
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Time layers, a whole model, or both.

    Args:
        shapes: as for ``bench_layers``; None for ``SHAPES``, or for none where there is a model.
        batches: as there; None for ``BATCHES``.
        model: as for ``bench.model.bench_model``, whose lengths and formats are ``prompt_tokens``, ``new_tokens``,
            ``gguf`` and ``packed``; None for none. ``dtype``, ``modes`` and ``working_set`` do not matter to it.
        isa: instruction set of the packed layers; None for the best.
        against, dtype, modes, rounds, threads, working_set, say: as for ``bench_layers``.

    Returns:
        {**about_machine(), dtype, rounds, working_set_bytes, layers, skipped, model}; ``model`` is None where none was
        asked for.

    Raises:
        ValueError: an argument is out of range.
        layers.WrongResult: a contender computes something wrong.
    """
    _check_choice("against", against, AGAINST)
    shapes = ((() if model else SHAPES) if shapes is None else shapes) or ()
    before = cpu.isa()
    if isa is not None:
        try:
            cpu.select_isa(isa)
        except ValueError as error:
            raise WrongArgument(f"isa is {isa!r}: {error}") from error
    try:
        result = about_machine(threads) | {"dtype": dtype, "rounds": rounds, "working_set_bytes": working_set}
        result |= bench_layers(
            shapes, batches or BATCHES, against=against, dtype=dtype, modes=modes or MODES, rounds=rounds,
            threads=threads, working_set=working_set, say=say,
        )  # fmt: skip
        result["model"] = None
        if model is not None:
            with _torch_threads(threads):
                result["model"] = bench_model(
                    model, against=against, gguf=gguf, packed=packed, prompt_tokens=prompt_tokens,
                    new_tokens=new_tokens, rounds=rounds, threads=threads, say=say,
                )  # fmt: skip
    finally:
        if isa is not None and before is not None:
            cpu.select_isa(before)
    return result


def about_machine(threads: int) -> dict[str, Any]:
    """What figures depend on: processor, instruction sets, threads, versions."""
    versions: dict[str, str | None] = {
        "hf_onebit": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for package in ("transformers", "llama-cpp-python"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "platform": platform.platform(),
        "isa": cpu.isa(),
        "isas": list(cpu.isas()),
        "threads": threads,
        "versions": versions,
    }


def bench_layers(
    shapes: Sequence[str],
    batches: Sequence[int],
    *,
    against: Sequence[str] = ("bf16", "ggml"),
    dtype: str = "bfloat16",
    modes: Sequence[str] = MODES,
    rounds: int = 15,
    threads: int = 1,
    working_set: int = int(1.1 * 2**30),
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Time one layer of each shape against others.

    Args:
        shapes: "OUTxIN" each.
        batches: rows of x.
        against: of ``AGAINST``; "ggml" stands for its q1_0, tq2_0 and q4_0.
        dtype: of the packed layer's activations.
        modes: "hot" repeats one layer; "stream" walks through copies of it.
        rounds: timings of each contender.
        threads: of torch, of the reader and of ggml.
        working_set: bytes of each contender's copies in mode "stream".
        say: is given a line as each figure comes.

    Returns:
        {"layers": [{shape, batch, mode, contenders}], "skipped": [{contender, shape, reason}]}; contenders as returned
        by ``layers.measure``.

    Raises:
        ValueError: a shape, batch or name is not one.
        layers.WrongResult: a contender computes something wrong.
    """
    _check_choice("dtype", [dtype], tuple(DTYPES))
    sizes = [parse_shape(shape) for shape in shapes]
    _check_choice("against", against, AGAINST)
    _check_choice("mode", modes, MODES)
    for name, values in (("batch", batches), ("rounds", [rounds]), ("threads", [threads])):
        if any(value < 1 for value in values):
            raise WrongArgument(f"{name} is {min(values)}, expected at least 1")
    ggml, skipped = _load_ggml() if "ggml" in against else (None, [])
    for entry in skipped:
        say(skip_line(entry))
    results = []
    pool = Threads(threads)
    with torch.inference_mode(), _torch_threads(threads), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for shape in sizes:
            refused = _refused(ggml, shape)
            for entry in refused:
                say(skip_line(entry))
            skipped += refused
            for mode in modes:
                rivals = _rivals(shape, working_set if mode == "stream" else 0, against, DTYPES[dtype], ggml, pool)
                for batch in batches:
                    contenders = measure(rivals, batch, rounds, pool)
                    results.append({"shape": list(shape), "batch": batch, "mode": mode, "contenders": contenders})
                    say(layer_line(results[-1]))
    return {"layers": results, "skipped": skipped}


def _rivals(
    shape: tuple[int, int],
    working_set: int,
    against: Sequence[str],
    dtype: torch.dtype,
    ggml: Ggml | None,
    pool: Threads,
) -> list[Rival]:
    """Ours first."""
    packed = Packed(*shape, working_set, dtype)
    rivals: list[Rival] = [packed]
    if "bf16" in against:
        rivals.append(Dense("bf16", *shape, working_set, torch.bfloat16))
    if "fp32" in against:
        rivals.append(Dense("fp32", *shape, working_set, torch.float32))
    if "reference" in against:
        rivals.append(Reference(packed))
    if ggml is not None:
        kinds = [kind for kind in TYPES if not ggml.obstacle(kind, shape[1])]
        rivals += [GgmlDot(ggml, kind, *shape, working_set, pool) for kind in kinds]
    return rivals


def _load_ggml() -> tuple[Ggml | None, list[dict[str, Any]]]:
    if cpu.isa() is None:
        reason = f"its loop is in the compiled kernels, which are {cpu.status()}"
        return None, [{"contender": "ggml", "shape": None, "reason": reason}]
    try:
        return Ggml(), []
    except ImportError as error:
        return None, [{"contender": "ggml", "shape": None, "reason": str(error)}]


def _refused(ggml: Ggml | None, shape: tuple[int, int]) -> list[dict[str, Any]]:
    if ggml is None:
        return []
    reasons = {kind: ggml.obstacle(kind, shape[1]) for kind in TYPES}
    return [{"contender": f"ggml {kind}", "shape": list(shape), "reason": r} for kind, r in reasons.items() if r]


@contextlib.contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check_choice(name: str, got: Sequence[str], known: Sequence[str]) -> None:
    for value in got:
        if value not in known:
            raise WrongArgument(f"{name} is {value!r}, expected {', '.join(known)}")


def _cpu_name() -> str:
    """As the operating system calls it; platform.processor() says no more than "x86_64" on Linux."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def parse_shape(text: str) -> tuple[int, int]:
    """(out, in) from "OUTxIN".

    Raises:
        ValueError: it is no such text.
    """
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise WrongArgument(f"shape is {text!r}, expected OUTxIN with two whole numbers >= 1, such as 4096x4096")
    return int(parts[0]), int(parts[1])


def check_writable(path: str) -> None:
    """Refuse a file that could not be written at the end.

    Raises:
        ValueError: its folder does not exist, or it is a folder itself.
    """
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder) or os.path.isdir(path):
        raise ValueError(f"cannot write {path!r}: expected a file name in a folder that exists")
