"""What the allocator gave out while something ran: counted from its own events, not from shapes."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

__all__ = ["Allocated", "allocated"]


@dataclass(frozen=True)
class Allocated:
    """Bytes beyond what was held before.

    Attributes:
        peak: the most at once of what was given out meanwhile.
        left: what of that is still held at the end.
    """

    peak: int
    left: int


def allocated(work: Callable[[], Any]) -> Allocated:
    """Run ``work`` and count what PyTorch's CPU allocator gave out meanwhile, and took back of that.

    Memory of before that is freed meanwhile does not count: the allocator does not know how large it was. Cycles of
    references are collected before and not meanwhile, so that the count is the same each time. The profiler behind it
    makes ``work`` several times as slow. Buffers that compiled kernels get elsewhere than from PyTorch are not seen.
    """
    gc.collect()
    collecting = gc.isenabled()
    gc.disable()
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            work()
    finally:
        if collecting:
            gc.enable()
    results = found.profiler
    assert results is not None
    assert results.kineto_results is not None
    events, waiting = [], list(results.kineto_results.experimental_event_tree())
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.tag == _EventType.Allocation:
            events.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
    held: dict[int, int] = {}
    now = peak = 0
    for _, address, size in sorted(events):
        if size > 0:
            held[address] = size
            now += size
            peak = max(peak, now)
        else:
            now -= held.pop(address, 0)
    return Allocated(peak, now)
