"""Writing safetensors files tensor by tensor, without ever holding more than one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from hf_onebit.storage.tensor_files import LENGTH_BYTES, NAMES


class ShardWriter:
    """Writes ``model.safetensors``, or shards with their index, into a folder.

    A file of this format says in its header what follows, and packs tensors without gaps. So those of one element size
    are collected in a file each, the widest go first, and every tensor lies where its dtype asks for.

    Args:
        folder: where to; it exists.
        max_shard_bytes: start another file before one would have more bytes of tensors.
        metadata: text of the header, by name.
    """

    def __init__(self, folder: Path, max_shard_bytes: int, metadata: dict[str, str]) -> None:
        self._folder, self._limit = folder, max_shard_bytes
        self._metadata = metadata
        self._shards: list[Path] = []
        self._weight_map: dict[str, int] = {}
        self._total = 0
        self._start()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for file in self._parts.values():
            file.close()

    def add(self, name: str, tensor: Tensor) -> None:
        """Write one tensor.

        Raises:
            ValueError: the name was there already, or the dtype has no name in this format.
        """
        if name in self._weight_map:
            raise ValueError(f"{name!r} is written twice: expected every name once")
        if tensor.dtype not in NAMES:
            raise ValueError(f"{name!r} is {tensor.dtype}: expected one of {', '.join(map(str, NAMES))}")
        if self._bytes and self._bytes + tensor.nbytes > self._limit:
            self._end()
            self._start()
        part = self._part(tensor.element_size())
        offset = part.tell()
        part.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        about = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape)}
        self._header.setdefault(tensor.element_size(), {})[name] = (about, offset, offset + tensor.nbytes)
        self._weight_map[name] = len(self._shards)
        self._bytes += tensor.nbytes
        self._total += tensor.nbytes

    def finish(self) -> list[Path]:
        """Complete the files; returns them, in order."""
        self._end()
        count = len(self._shards)
        if count == 1:
            names = ["model.safetensors"]
        else:
            names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
            index = {
                "metadata": {"total_size": self._total},
                "weight_map": {name: names[shard] for name, shard in self._weight_map.items()},
            }
            (self._folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", "utf-8")
        return [path.rename(self._folder / name) for path, name in zip(self._shards, names, strict=True)]

    def _start(self) -> None:
        self._bytes = 0
        self._parts: dict[int, BinaryIO] = {}
        self._header: dict[int, dict[str, tuple[dict[str, Any], int, int]]] = {}

    def _part(self, size: int) -> BinaryIO:
        if size not in self._parts:
            self._parts[size] = open(self._folder / f".{len(self._shards)}.{size}.part", "wb+")  # noqa: SIM115
        return self._parts[size]

    def _end(self) -> None:
        widths = sorted(self._parts, reverse=True)
        header: dict[str, Any] = {"__metadata__": self._metadata}
        base = 0
        for size in widths:
            for name, (about, start, end) in self._header[size].items():
                header[name] = {**about, "data_offsets": [base + start, base + end]}
            base += self._parts[size].tell()
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % LENGTH_BYTES)
        path = self._folder / f".{len(self._shards)}.shard"
        with open(path, "wb") as file:
            file.write(len(text).to_bytes(LENGTH_BYTES, "little") + text)
            for size in widths:
                part = self._parts[size]
                part.seek(0)
                shutil.copyfileobj(part, file, 1 << 20)
                part.close()
                Path(part.name).unlink()
        self._shards.append(path)
