"""Where the hidden states of calibration sequences live: in memory, or in files that the system may page out.

Pages of a mapped file that were written back can be dropped from memory and read again, so what is spilled bounds the
disk and not the memory. The files have no names any more once they are mapped: they go with the tensors in them, also
when the process is killed.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from hf_onebit.disk_space import told_if_full

_FIRST_BYTES, _MOST_BYTES = 1 << 20, 1 << 28
_REMEDY = (
    "Hidden states are kept there (spill=True, --spill): free some space, keep them in memory, or take fewer "
    "calibration tokens (calibration_tokens=, --calibration-tokens)"
)
_ALIGNMENT = 64  # as torch's own allocator aligns: some products depend on it


class Arena:
    """Keeps tensors that come and go together.

    Args:
        folder: for the files; None keeps everything in memory, as it is.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self._folder = None if folder is None else Path(folder)
        self._segment = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def keep(self, tensor: Tensor) -> Tensor:
        """The tensor itself, or a copy of its values (on the CPU) in a file.

        Raises:
            DiskFullError: the disk is.
        """
        if self._folder is None:
            return tensor
        if self._used + tensor.nbytes > len(self._segment):
            size = max(tensor.nbytes, min(max(_FIRST_BYTES, 2 * len(self._segment)), _MOST_BYTES))
            # Tensors in the old segment keep it mapped for as long as they live.
            with told_if_full(self._folder, _REMEDY):
                self._segment, self._used = _mapped(self._folder, size), 0
        start, end = self._used, self._used + tensor.nbytes
        self._used = -(-end // _ALIGNMENT) * _ALIGNMENT
        kept = self._segment[start:end].view(tensor.dtype).view(tensor.shape)
        return kept.copy_(tensor.detach())


def _mapped(folder: Path, size: int) -> Tensor:
    """``size`` bytes of a new file without a name."""
    folder.mkdir(parents=True, exist_ok=True)
    file, name = tempfile.mkstemp(prefix="spilled-", suffix=".partial", dir=folder)
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file, 0, size)  # a full disk must be an error here: on a mapped page it is a crash
        else:
            os.truncate(file, size)
        return torch.from_file(name, shared=True, size=size, dtype=torch.uint8)
    finally:
        os.close(file)
        os.unlink(name)
