"""How large: memory of this process, and bytes of a model's tensors."""

from __future__ import annotations

import sys

from torch import nn


def peak_memory_mb() -> float | None:
    """The most memory this process ever held at once, in MB (10^6 bytes of resident set); None where it is
    not told.

    Memory of accelerators is not in it, and files mapped into memory are, as far as they were read.
    """
    linux = _peak_memory_mb_linux()
    if linux is not None:
        return linux
    try:
        import resource
    except ImportError:  # Windows
        return _peak_memory_mb_windows()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts in bytes, others in KiB.
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def _peak_memory_mb_linux() -> float | None:
    """Linux's own figure: it starts anew with each program, where getrusage's is handed down by the parent process."""
    peak = _linux_status("VmHWM:")
    return None if peak is None else peak / 1e6


def resident_bytes() -> int | None:
    """Memory that this process holds now, mapped files included as far as they were read; None outside of Linux."""
    return _linux_status("VmRSS:")


def _linux_status(key: str) -> int | None:
    """Bytes of one line of /proc/self/status; None where there is none."""
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            lines = [line for line in status if line.startswith(key)]
    except OSError:
        return None
    return int(lines[0].split()[1]) * 1024 if lines else None


def _peak_memory_mb_windows() -> float | None:
    try:
        import psutil
    except ImportError:
        return None
    peak = getattr(psutil.Process().memory_info(), "peak_wset", None)
    return None if peak is None else peak / 1e6


def tensor_bytes(model: nn.Module) -> int:
    """Bytes that the parameters and buffers of ``model`` hold, shared storages (tied tensors) counted once."""
    sizes: dict[object, int] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        storage = tensor.untyped_storage()
        # Meta tensors have no address: each one counts.
        key = id(tensor) if tensor.is_meta else (tensor.device, storage.data_ptr())
        sizes[key] = storage.nbytes()
    return sum(sizes.values())
