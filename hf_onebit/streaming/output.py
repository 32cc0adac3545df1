"""The folder of a packed model that is written module by module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from hf_onebit.formats.table import TableEntry
from hf_onebit.nn.replace import module_shape
from hf_onebit.storage.headers import header_metadata
from hf_onebit.storage.shards import ShardWriter
from hf_onebit.streaming.disk_model import DiskModel


@dataclass
class Output:
    """The folder that is written: packed layers and whatever stays in floating point.

    Args:
        disk: the float model.
        folder: where to; it exists.
        table: how each module is packed.
        max_shard_bytes: see ``ShardWriter``.
        method: of the config.
    """

    disk: DiskModel
    folder: Path
    table: Mapping[str, TableEntry]
    max_shard_bytes: int
    method: str
    _writer: ShardWriter = field(init=False)

    def __post_init__(self) -> None:
        self._writer = ShardWriter(self.folder, self.max_shard_bytes, header_metadata(self.method))

    def __enter__(self) -> Output:
        return self

    def __exit__(self, *about: Any) -> None:
        self._writer.__exit__(*about)

    def add(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write a packed module; one that is tied to another under the other's name."""
        entry = self.table[name]
        shape = module_shape(self.disk.model.get_submodule(name))
        assert shape is not None
        entry.validate_tensors(tensors, shape.in_features, shape.out_features, name)
        for key, tensor in entry.to_stored(dict(tensors), shape.in_features).items():
            self._writer.add(f"{entry.tied_to or name}.{key}", tensor)

    def add_floats(self, module: str, vectors: Mapping[str, Tensor]) -> None:
        """Write the parameters of a block ("" for those outside) that are not packed; ``vectors`` have changed."""
        packed = {f"{name}.weight" for name in self.table}
        for names, read in self.disk.parameters_of(module):
            rest = [name for name in names if name not in packed]
            if len(rest) == len(names):
                rest = names[:1]  # what is tied is written once
            for name in rest:
                self._writer.add(name, vectors[name] if name in vectors else read())

    def finish(self) -> None:
        """Write buffers and what belongs together with the weights: the index, config.json, generation settings."""
        model = self.disk.model
        for prefix, module in model.named_modules():
            for key, buffer in module._buffers.items():
                if buffer is not None and key not in module._non_persistent_buffers_set:
                    self._writer.add(f"{prefix}.{key}" if prefix else key, buffer)
        self._writer.finish()
        model.config.dtype = str(model.dtype).partition(".")[2]  # what save_pretrained does
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(self.folder)
        if model.can_generate():
            settings = self.disk.folder / "generation_config.json"
            if settings.is_file():
                model.generation_config = type(model.generation_config).from_pretrained(self.disk.folder)
            model.generation_config.save_pretrained(self.folder)
