"""The per-module table of config.json: how one module is packed, and the tensors that follow from it.

An entry is a JSON object. Both methods have ``method`` and ``bits``::

    onebit   {"method": "onebit", "bits": 1, "planes": 1, "group_size": null}
    mpq      {"method": "mpq", "bits": 4, "group_size": 64, "symmetric": true, "in_features": 576}

An mpq entry may also hold ``"kind": "embedding"`` (a token embedding, stored as the matrix with a row per token as its
outputs; else a linear layer) and ``"tied_to": NAME`` (the module whose packed tensors this one shares; the file holds
them once, under that name).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_onebit.formats import mpq, onebit
from hf_onebit.formats.packing import WORD_BITS

KEYS: dict[str, tuple[str, ...]] = {
    "onebit": ("method", "bits", "planes", "group_size"),
    "mpq": ("method", "bits", "planes", "group_size", "symmetric", "in_features", "kind", "tied_to"),
}
KINDS = ("linear", "embedding")


@dataclass(frozen=True)
class TableEntry:
    """One module's entry, its values already checked (``OneBitConfig`` does).

    Attributes:
        method: "onebit" or "mpq".
        bits: width of one code; 1 for onebit.
        planes: sign matrices; onebit only.
        group_size: inputs that share a scale, or -1 for all; mpq only.
        symmetric: without ``zeros``; mpq only.
        in_features: inputs of the layer, which packed words alone tell to the next 32; mpq only.
        kind: "linear" or "embedding".
        tied_to: module whose packed tensors this one shares, or None.
    """

    method: str = "onebit"
    bits: int = 1
    planes: int = 1
    group_size: int = -1
    symmetric: bool = True
    in_features: int | None = None
    kind: str = "linear"
    tied_to: str | None = None

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> TableEntry:
        """The values of a JSON entry; null and absent mean the same."""
        return cls(**{key: value for key, value in entry.items() if value is not None})

    def to_dict(self) -> dict[str, Any]:
        """The JSON entry."""
        if self.method == "onebit":
            return {"method": "onebit", "bits": 1, "planes": self.planes, "group_size": None}
        entry: dict[str, Any] = {key: getattr(self, key) for key in ("method", "bits", "group_size", "symmetric")}
        entry |= {"in_features": self.in_features} if self.in_features is not None else {}
        entry |= {"kind": self.kind} if self.kind != "linear" else {}
        return entry | ({"tied_to": self.tied_to} if self.tied_to is not None else {})

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """Names of the packed tensors, ``weight`` first."""
        if self.method == "mpq":
            return mpq.tensor_names(self.symmetric)
        return tuple(name for plane in range(self.planes) for name in onebit.plane_names(plane))

    def tensor_specs(self, in_features: int, out_features: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of every packed tensor, by name.

        Raises:
            ValueError: a size or a value of the entry is out of range.
        """
        if self.method == "mpq":
            return mpq.tensor_specs(in_features, out_features, self.bits, self.group_size, self.symmetric)
        return onebit.tensor_specs(in_features, out_features, self.planes)

    def validate_tensors(self, tensors: Mapping[str, Tensor], in_features: int, out_features: int, where: str) -> None:
        """Check that ``tensors`` are exactly such a module's; see the functions of that name in both formats.

        Raises:
            ValueError: the first fault found.
        """
        if self.method == "mpq":
            mpq.validate_tensors(tensors, in_features, out_features, self.bits, self.group_size, self.symmetric, where)
        else:
            onebit.validate_tensors(tensors, in_features, out_features, self.planes, where)

    def bits_per_weight(self, in_features: int, out_features: int, bias_bits: int = 0) -> float:
        """Stored bits of the packed tensors (and of a bias, at ``bias_bits`` an output) per weight."""
        if self.method == "mpq":
            return mpq.bits_per_weight(in_features, out_features, self.bits, self.group_size, self.symmetric, bias_bits)
        return onebit.bits_per_weight(in_features, out_features, self.planes, bias_bits)

    def sizes(self, shapes: Mapping[str, tuple[int, ...] | None]) -> tuple[int, int] | None:
        """(in_features, out_features) from the shapes of the stored tensors by name, or None where they do not tell.

        Only the tensors that tell a size are looked at; ``tensor_specs`` of the result says what all must be.
        """
        if self.method == "mpq":
            weight, scales = shapes.get("weight"), shapes.get("scales")
            if weight is None or scales is None or len(weight) != 2 or len(scales) != 2:
                return None
            padded = weight[0] // self.bits * WORD_BITS
            return self.in_features if self.in_features is not None else padded, scales[1]
        a, b = shapes.get("a"), shapes.get("b")
        return None if a is None or b is None or len(a) != 1 or len(b) != 1 else (b[0], a[0])
