"""What the allocator gave out while something ran: counted from its own events, not from shapes."""

from __future__ import annotations

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
        peak: the most at once.
        left: still held at the end.
    """

    peak: int
    left: int


def allocated(work: Callable[[], Any]) -> Allocated:
    """Run ``work`` and count what PyTorch's CPU allocator gave out and took back meanwhile.

    Memory of before that is freed meanwhile counts as negative. The profiler behind it makes ``work`` several times as
    slow. Buffers that compiled kernels get elsewhere than from PyTorch are not seen.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        work()
    results = found.profiler
    assert results is not None
    assert results.kineto_results is not None
    events, waiting = [], list(results.kineto_results.experimental_event_tree())
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.tag == _EventType.Allocation:
            events.append((event.start_time_ns, event.extra_fields.alloc_size))
    events.sort()
    now = peak = 0
    for _, size in events:
        now += size
        peak = max(peak, now)
    return Allocated(peak, now)
