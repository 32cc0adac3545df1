"""A call's time on a GPU, without what launching it takes on the host: a CUDA graph of it, replayed."""

import functools
import statistics
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["capture", "device_microseconds"]


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Where captures on a device are recorded: torch's own stream is on the device that captured first."""
    return torch.cuda.Stream(device)


def capture(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """What a call launches on the current device. Other threads may go on with what a capture does not allow.

    Raises:
        RuntimeError: the call cannot be captured. The stream from before is the current one again.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    graph = torch.cuda.CUDAGraph()
    side = torch.cuda.graph(graph, stream=_stream(device), capture_error_mode="thread_local")
    # A capture that fails leaves its stream in charge.
    with torch.cuda.stream(torch.cuda.current_stream(device)), side:
        call()
    return graph


def device_microseconds(call: Callable[[], Tensor], repeats: int = 15) -> float:
    """A call's time on the current device with cold caches."""
    device = torch.device("cuda", torch.cuda.current_device())
    size = int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0))
    flush = torch.empty(max(2 * size, 64 << 20), dtype=torch.uint8, device=device)
    call()
    torch.cuda.synchronize(device)
    # The host takes longer for the launches of one call than the device for all of them: replayed, they follow each
    # other at once.
    graph = capture(call)
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for begin, end in pairs:
        for _ in range(3):  # the device is busy until begin, replay and end are in its queue
            flush.zero_()
        begin.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize(device)
    return statistics.median(float(begin.elapsed_time(end)) for begin, end in pairs) * 1e3
