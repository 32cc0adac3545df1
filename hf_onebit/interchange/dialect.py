"""What a reader of another program's format gives: its layers as packed ones of this package."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from hf_onebit.config import PackingConfig
from hf_onebit.formats.table import TableEntry
from hf_onebit.interchange.source import ForeignFolder
from hf_onebit.mpq_config import MPQConfig


@dataclass
class Converted:
    """One layer, converted.

    Attributes:
        tensors: by short name, bias included; of a float layer ``weight`` alone.
        entry: of the table in config.json; None for a layer that stays float.
        in_features, out_features: its sizes.
        exact: whether every weight is the number that the other program's formula gives.
        max_error: the largest difference from that; 0.0 where exact.
        step: the largest distance of two neighbouring levels, which ``max_error`` is to be seen beside.
        notes: what a user should know of this layer.
    """

    tensors: dict[str, Tensor]
    entry: TableEntry | None
    in_features: int
    out_features: int
    exact: bool = True
    max_error: float = 0.0
    step: float = 0.0
    notes: list[str] = field(default_factory=list)


class Dialect:
    """A reader of one format. Subclasses say what their format is.

    Attributes:
        title: the format's name, for people.
        method: of this package, that its layers become.
        marker: the tensor that every packed layer has.
        parts: names of a packed layer's tensors, bias apart.
        folder: what is read.
        warnings: what a user must know of the whole checkpoint.
    """

    title: str
    method: str = "mpq"
    marker: str
    parts: tuple[str, ...]

    def __init__(self, folder: ForeignFolder) -> None:
        self.folder = folder
        self.warnings: list[str] = []

    @classmethod
    def recognizes(cls, folder: ForeignFolder) -> bool:
        """Whether the folder is of this format; says nothing of whether all in it can be read."""
        raise NotImplementedError

    def check(self) -> None:
        """Refuse what the format allows and this reader cannot read; asked before anything is written.

        Raises:
            ValueError: what, where, got, expected and what to do.
        """
        raise NotImplementedError

    def convert(self, name: str, tensors: dict[str, Tensor], in_features: int | None) -> Converted:
        """One layer.

        Args:
            name: of the module, for errors.
            tensors: those of its ``parts`` that the file has, by short name.
            in_features: as the model's architecture has it, or None where that is unknown.

        Raises:
            ValueError: the tensors do not belong together, or hold what has no counterpart here.
        """
        raise NotImplementedError

    def packing_config(self, table: dict[str, dict[str, Any]], untied: bool) -> PackingConfig:
        """The quantization config of the converted checkpoint: its own values are those of the first layer, and
        ``table`` has those of all.
        """
        entry = TableEntry.from_dict(next(iter(table.values())))
        about: dict[str, Any] = {"bits": entry.bits, "group_size": entry.group_size, "symmetric": entry.symmetric}
        return MPQConfig(**about, modules=table, untied=untied)
