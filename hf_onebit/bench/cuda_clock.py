"""The clock of layers on a GPU: a CUDA graph that is replayed, single calls, the profiler; memory's bandwidth."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hf_onebit.bench.cuda_peers import Call
from hf_onebit.ops.gpu_clock import capture

# Replays of a graph: at least, and at most.
_REPLAYS = (5, 200)


def triton_version() -> str:
    """Of the Triton that compiles the kernels."""
    import triton

    return str(triton.__version__)


def device_name(device: torch.device) -> str:
    """As its driver calls it."""
    return torch.cuda.get_device_name(device)


def l2_bytes(device: torch.device) -> int:
    """Of the second-level cache."""
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


def bandwidth(device: torch.device) -> float:
    """Bytes per second that a copy of 1 GiB reads and writes."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / (_do_bench(lambda: target.copy_(source)) * 1e-3)


def graph_microseconds(calls: Sequence[Call], x: Tensor, milliseconds: float) -> float:
    """A call's time in a CUDA graph that holds all ``calls``: the median of replays, divided by the calls.

    Args:
        calls: one for each copy of the weights, so that a replay reads more than the cache holds.
        x: (rows, in).
        milliseconds: to replay for.
    """
    for call in calls[:2]:
        call(x)
    torch.cuda.synchronize()
    kept: list[Tensor] = []
    graph = capture(lambda: kept.extend(call(x) for call in calls))
    for _ in range(3):
        graph.replay()
    times: list[float] = []
    least, most = _REPLAYS
    start = time.perf_counter()
    while len(times) < least or ((time.perf_counter() - start) * 1e3 < milliseconds and len(times) < most):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    kept.clear()
    return statistics.median(times) * 1e3 / len(calls)


def eager_microseconds(calls: Sequence[Call], x: Tensor, milliseconds: float) -> float:
    """The median of single calls with a flushed cache, launches included."""
    return 1e3 * _do_bench(lambda: calls[0](x), warmup=max(int(milliseconds / 2), 1), rep=max(int(milliseconds), 1))


def kernel_microseconds(calls: Sequence[Call], x: Tensor) -> dict[str, float]:
    """Of each kernel of a call, by the profiler, without the gaps between them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for call in calls:
            call(x)
        torch.cuda.synchronize()
    return {
        event.key[:60]: event.self_device_time_total / len(calls)
        for event in profile.key_averages()
        if event.self_device_time_total > 0
    }


def _do_bench(call: Callable[[], object], **options: int) -> float:
    """Median milliseconds of a call, by Triton."""
    from triton.testing import do_bench

    return float(do_bench(call, return_mode="median", **options))
