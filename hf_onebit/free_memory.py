"""How much memory a process can still take, by every limit that the system tells of."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch
from torch import Tensor


def available_memory(where: Tensor | None = None) -> int | None:
    """Bytes that this process can still take, or None where the system does not tell.

    The least of what the machine has left (``MemAvailable``), what its control groups allow and what the process's own
    limits do (``ulimit -d``, ``-v``); of a tensor on a GPU, what that has left.
    """
    if where is not None and where.is_cuda:
        return int(torch.cuda.mem_get_info(where.device)[0])
    found = [size for size in (_machine_memory(), *_group_memory(), *own_limits()) if size is not None]
    return min(found, default=None)


def _machine_memory(file: str = "/proc/meminfo") -> int | None:
    try:
        match = re.search(r"^MemAvailable:\s+(\d+) kB", Path(file).read_text(encoding="ascii"), re.MULTILINE)
    except OSError:
        return None
    return int(match[1]) * 1024 if match else None


def _group_memory(root: str = "/sys/fs/cgroup", own: str = "/proc/self/cgroup") -> list[int | None]:
    """What each control group that this process is in has left, from its own to the outermost."""
    try:
        lines = Path(own).read_text(encoding="ascii").splitlines()
    except OSError:
        lines = []
    path = next((line.split(":", 2)[2] for line in lines if ":memory:" in line or line.startswith("0::")), "/")
    left = []
    for base, limit, usage in (
        (root, "memory.max", "memory.current"),
        (os.path.join(root, "memory"), "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        folder = Path(base, path.strip("/"))
        for each in [folder, *folder.parents][: len(folder.parts) - len(Path(base).parts) + 1]:
            left.append(_left(each / limit, each / usage, each / "memory.stat"))
    return left


def _left(limit: Path, usage: Path, statistics: Path) -> int | None:
    try:
        total = int(limit.read_text(encoding="ascii"))  # "max" is no number: no limit
        used = int(usage.read_text(encoding="ascii"))
        # Cached files are given back when memory is asked for.
        match = re.search(r"^(?:total_)?inactive_file (\d+)", statistics.read_text(encoding="ascii"), re.MULTILINE)
    except (OSError, ValueError):
        return None
    return max(0, total - used + (int(match[1]) if match else 0))


def own_limits(status: str = "/proc/self/status") -> list[int | None]:
    """What this process may still take by its own limits of data and of addresses."""
    try:
        import resource

        text = Path(status).read_text(encoding="ascii")
    except (ImportError, OSError):
        return []
    left: list[int | None] = []
    for limit, key in ((resource.RLIMIT_DATA, "VmData"), (resource.RLIMIT_AS, "VmSize")):
        soft, used = resource.getrlimit(limit)[0], re.search(rf"^{key}:\s+(\d+) kB", text, re.MULTILINE)
        if soft != resource.RLIM_INFINITY and used:
            left.append(max(0, soft - int(used[1]) * 1024))
    return left
