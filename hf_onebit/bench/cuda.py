"""Packed layers beside torch's float layer on a GPU: ``hf-onebit bench --device cuda``.

Each contender is checked against float64 first, then timed. It walks through copies of its weights that together are
three times the second-level cache, so that each call reads its weights from memory, as in a model. *graph*: one CUDA
graph holds a call of every copy, and is replayed. *eager*: single calls, launches included. *floor*: the bytes of
weights, x and y over the bandwidth of a large copy on the same device.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from hf_onebit.bench import cuda_clock, cuda_layers, parse_shape
from hf_onebit.bench.arguments import WrongArgument
from hf_onebit.bench.cuda_layers import FLOAT, CudaLayer, kind_of, peers_of
from hf_onebit.bench.cuda_tables import row_line
from hf_onebit.bench.layers import WrongResult
from hf_onebit.ops import gpu, gpu_tuning
from hf_onebit.version import __version__

SHAPES = ("4096x4096", "11008x4096", "28672x8192")
BATCHES = (1, 4, 16, 64, 512)
PACKED = ("1p", "2p", "4g64", "2g64")
DTYPES = ("float16", "bfloat16")
MILLISECONDS = 20.0

__all__ = ["BATCHES", "DTYPES", "MILLISECONDS", "PACKED", "SHAPES", "obstacle", "run"]

Say = Callable[[str], None]
Keep = Callable[[dict[str, Any]], None]


def obstacle(device: str) -> str:
    """Why nothing can be timed on a device; an empty string where it can.

    Args:
        device: "cuda", or "cuda:N" for one of several.
    """
    found = re.fullmatch(r"cuda(?::(\d+))?", device)
    if found is None:
        return "expected cpu, cuda or cuda:N"
    if reason := gpu.obstacle():
        return f"the GPU kernels are not in use: {reason}"
    if not torch.cuda.is_available():
        return "torch finds no GPU here"
    count = torch.cuda.device_count()
    if int(found[1] or 0) >= count:
        return f"there are {count} GPUs here, counted from 0"
    return ""


def run(
    *,
    device: str = "cuda",
    shapes: Sequence[str] | None = None,
    batches: Sequence[int] | None = None,
    packed: Sequence[str] | None = None,
    against: Sequence[str] | None = None,
    dtypes: Sequence[str] | None = None,
    milliseconds: float = MILLISECONDS,
    profile: bool = False,
    say: Say = lambda line: None,
    keep: Keep = lambda result: None,
) -> dict[str, Any]:
    """Time one layer of each shape on a GPU, packed and in float.

    Args:
        device: "cuda" or "cuda:N".
        shapes: "OUTxIN" each; None for ``SHAPES``.
        batches: rows of x; None for ``BATCHES``.
        packed: our layers, as ``choices.Choice`` names them; None for ``PACKED``.
        against: contenders beside torch's float layer, of ``cuda_peers.PEERS``; None for those that are installed.
        dtypes: of x and of the float layer, of ``DTYPES``; None for both.
        milliseconds: to time each figure for.
        profile: also the time of each kernel, by torch's profiler.
        say: is given a line as each figure comes.
        keep: is given what there is so far after each figure, so that a run that is cut off is not lost.

    Returns:
        {device, torch, triton, hf_onebit, l2_bytes, copy_gb_per_s, autotune, milliseconds, seconds, refused: {kernel:
        why}, results: [{shape, dtype, kind, rows, graph_us, eager_us, float_over_packed, floor_us, error, copies}]}.
        Of another library's layer that cannot be made, is wrong or does not run there is {shape, dtype, kind, rows,
        not_timed}, with rows None where that holds for all. With ``profile`` a result has ``kernels_us`` too.

    Raises:
        ValueError: an argument is out of range, or another library is not installed.
        RuntimeError: there is no such device, or the GPU kernels are not in use.
        WrongResult: one of our layers computes something wrong.
    """
    sizes = [parse_shape(shape) for shape in shapes or SHAPES]
    rows = list(batches or BATCHES)
    if min(rows) < 1:
        raise WrongArgument(f"batch is {min(rows)}, expected at least 1")
    if not milliseconds > 0:
        raise WrongArgument(f"milliseconds is {milliseconds}, expected a number above 0")
    for name in (names := list(dtypes or DTYPES)):
        if name not in DTYPES:
            raise WrongArgument(f"dtype is {name!r}, expected {', '.join(DTYPES)} with --device cuda")
    kinds = {kind_of(choice): choice for choice in packed or PACKED}
    peers = peers_of(against)
    if reason := obstacle(device):
        raise RuntimeError(f"{device}: {reason}")
    place = _device(device)
    start = time.perf_counter()
    with _on(place), torch.no_grad(), torch.random.fork_rng(devices=[] if place.index is None else [place.index]):
        torch.manual_seed(0)
        result = _about(place) | {"milliseconds": milliseconds, "seconds": 0.0, "refused": {}, "results": []}
        say(f"{result['device']}: a large copy moves {result['copy_gb_per_s']:.0f} GB/s")

        def note(row: dict[str, Any]) -> None:
            result["results"].append(row)
            result["seconds"] = time.perf_counter() - start
            result["refused"] = _refused(place)
            say(row_line(row))
            keep(result)

        for out, in_ in sizes:
            for name in names:
                timing = _Timing(place, out, in_, name, rows, milliseconds, profile, result, note)
                for kind in (FLOAT, *kinds, *peers):
                    timing.time(kind, kinds.get(kind))
                    torch.cuda.empty_cache()  # the copies of a contender must not stand in the way of the next
    return result


class _Timing:
    """The contenders of one shape and dtype."""

    def __init__(
        self,
        device: torch.device,
        out: int,
        in_: int,
        dtype: str,
        batches: Sequence[int],
        milliseconds: float,
        profile: bool,
        about: dict[str, Any],
        note: Keep,
    ) -> None:
        self._device, self._out, self._in, self._name = device, out, in_, dtype
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._batches, self._milliseconds, self._profile, self._note = batches, milliseconds, profile, note
        self._l2, self._speed = about["l2_bytes"], about["copy_gb_per_s"] * 1e9
        self._float: dict[int, float] = {}  # by rows

    def time(self, kind: str, packed: str | None) -> None:
        """One contender at every batch; ``packed`` is the name of ours, or None."""
        ours = kind == FLOAT or packed is not None
        try:
            layer = self._layer(kind, packed)
        except Exception as why:  # whatever another library raises; ours must run
            if ours:
                raise
            self._note(self._about(kind, None) | {"not_timed": f"{type(why).__name__}: {why}"})
            return
        for rows in self._batches:
            about = self._about(kind, rows)
            try:
                figures = self._figures(layer, kind, rows)
            except Exception as why:
                if ours and isinstance(why, WrongResult):
                    raise WrongResult(f"{about['shape']} {self._name} {kind}, {rows} rows: {why}") from why
                if ours:
                    raise
                figures = {"not_timed": f"{type(why).__name__}: {why}"}
            self._note(about | figures)

    def _layer(self, kind: str, packed: str | None) -> CudaLayer:
        if kind == FLOAT:
            return cuda_layers.float_layer(self._out, self._in, self._dtype, self._device, self._l2)
        if packed is not None:
            return cuda_layers.packed_layer(packed, self._out, self._in, self._device, self._l2)
        return cuda_layers.peer_layer(kind, self._out, self._in, self._dtype, self._device, self._l2)

    def _about(self, kind: str, rows: int | None) -> dict[str, Any]:
        return {"shape": f"{self._out}x{self._in}", "dtype": self._name, "kind": kind, "rows": rows}

    def _figures(self, layer: CudaLayer, kind: str, rows: int) -> dict[str, Any]:
        x = torch.randn(rows, self._in, device=self._device).to(self._dtype)
        error = cuda_layers.check(layer, x)
        graph = cuda_clock.graph_microseconds(layer.calls, x, self._milliseconds)
        eager = cuda_clock.eager_microseconds(layer.calls, x, self._milliseconds)
        if kind == FLOAT:
            self._float[rows] = graph
        moved = layer.nbytes + x.nbytes + rows * self._out * x.element_size()
        figures: dict[str, Any] = {
            "graph_us": graph, "eager_us": eager, "float_over_packed": self._float[rows] / graph,
            "floor_us": moved / self._speed * 1e6, "error": error, "copies": len(layer.calls),
        }  # fmt: skip
        if self._profile:
            figures["kernels_us"] = cuda_clock.kernel_microseconds(layer.calls, x)
        return figures


def _device(name: str) -> torch.device:
    """With its number, which launches and the names of examined kernels have."""
    device = torch.device(name)
    return device if device.index is not None else torch.device(name, torch.cuda.current_device())


def _on(device: torch.device) -> Any:
    """A context for launches: Triton launches on the current device."""
    return contextlib.nullcontext() if device.index is None else torch.cuda.device(device)


def _about(device: torch.device) -> dict[str, Any]:
    """What figures depend on."""
    return {
        "device": cuda_clock.device_name(device),
        "torch": torch.__version__,
        "triton": cuda_clock.triton_version(),
        "hf_onebit": __version__,
        "l2_bytes": cuda_clock.l2_bytes(device),
        "copy_gb_per_s": cuda_clock.bandwidth(device) / 1e9,
        "autotune": gpu_tuning.enabled(),
    }


def _refused(device: torch.device) -> dict[str, str]:
    """Kernels that disagree with the reference, which was timed instead."""
    return {what: why for (where, what), why in gpu.examined().items() if why and where == str(device)}
