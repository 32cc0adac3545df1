"""Tensors of safetensors files, each read when it is asked for.

A file begins with 8 bytes that say how long its header is; the header is JSON and says of each tensor its dtype, shape
and bytes behind the header (https://github.com/huggingface/safetensors, "Format"). Nothing is mapped here: what is read
is in memory and belongs to the caller, and nothing else is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

# The format's names of dtypes.
NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in NAMES.items()}
LENGTH_BYTES = 8
_LONGEST_HEADER = 100_000_000  # as the format has it


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor is.

    Attributes:
        file: its file.
        dtype, shape: of the tensor.
        start: its first byte in the file.
    """

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    def read(self) -> Tensor:
        """The tensor, in memory of its own.

        Raises:
            ValueError: the file ends before it does.
        """
        tensor = torch.empty(self.shape, dtype=self.dtype)
        target = tensor.reshape(-1).view(torch.uint8).numpy().data
        with open(self.file, "rb", buffering=0) as file:
            file.seek(self.start)
            done = 0
            while done < len(target):
                count = file.readinto(target[done:])
                if not count:
                    raise ValueError(
                        f"{self.file} ends {len(target) - done} bytes before a tensor does: copy or download it again"
                    )
                done += count
        return tensor


def stored_tensors(files: Iterable[str | os.PathLike[str]]) -> dict[str, StoredTensor]:
    """All tensors of some files, by name; only headers are read.

    Raises:
        ValueError: a file is no safetensors file, is shorter than its header says, or holds a dtype that torch lacks.
    """
    found: dict[str, StoredTensor] = {}
    for path in map(Path, files):
        size = path.stat().st_size
        try:
            with open(path, "rb") as file:
                length = int.from_bytes(file.read(LENGTH_BYTES), "little")
                if not 0 < length <= min(size, _LONGEST_HEADER):
                    raise ValueError(f"its header would have {length} bytes")
                header = json.loads(file.read(length))
            for name, about in header.items():
                if name != "__metadata__":
                    start, end = about["data_offsets"]
                    stored = StoredTensor(
                        path, _DTYPES[about["dtype"]], tuple(about["shape"]), LENGTH_BYTES + length + start
                    )
                    if not 0 <= start <= end or min(stored.shape, default=0) < 0:
                        raise ValueError(f"{name} would be {list(stored.shape)} in bytes {start} to {end}")
                    if LENGTH_BYTES + length + end > size or _bytes(stored) != end - start:
                        raise ValueError(f"{name} would end at byte {end} behind the header, of {size} in the file")
                    found[name] = stored
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"{path} is truncated or damaged ({error}): copy or download it again") from error
    return found


def _bytes(stored: StoredTensor) -> int:
    return torch.Size(stored.shape).numel() * torch.empty((), dtype=stored.dtype).element_size()
