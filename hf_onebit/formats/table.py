"""The per-module table of config.json: how one module is packed, and the tensors that follow from it.

An entry is a JSON object. Both methods have ``method`` and ``bits``::

    onebit   {"method": "onebit", "bits": 1, "planes": 1, "group_size": null}
    mpq      {"method": "mpq", "bits": 4, "group_size": 64, "symmetric": true, "in_features": 576}

The inputs of an mpq layer may have an order of their own::

    "g_idx": true                            there is a tensor that names the group of each input
    "q_perm": true                           there is a tensor with the input of each packed row (formats/mbwq.py)
    "blocks": [[4, 128, 64], [2, 448, 64]]   (bits, rows, group_size) of its row blocks; bits and group_size are then
                                             those of the first

    "double_quant": {"scale_bits": 5, "zero_bits": 4, "block": 256}
                                             the file holds scales and zeros in few bits (formats/double_quant.py); the
                                             module has them as ever

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

from hf_onebit.formats import double_quant, mbwq, mpq, onebit
from hf_onebit.formats.double_quant import DoubleQuant
from hf_onebit.formats.packing import WORD_BITS

KEYS: dict[str, tuple[str, ...]] = {
    "onebit": ("method", "bits", "planes", "group_size"),
    "mpq": (
        *("method", "bits", "planes", "group_size", "symmetric", "in_features", "kind", "tied_to"),
        *("g_idx", "q_perm", "blocks", "double_quant"),
    ),
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
        g_idx: with a tensor that names the group of each input; mpq only.
        q_perm: with a tensor that names the input of each packed row; mpq only.
        blocks: (bits, rows, group_size) of row blocks, if there are several; mpq only.
        double_quant: how the file holds scales and zeros, or None: as they are; mpq only.
    """

    method: str = "onebit"
    bits: int = 1
    planes: int = 1
    group_size: int = -1
    symmetric: bool = True
    in_features: int | None = None
    kind: str = "linear"
    tied_to: str | None = None
    g_idx: bool = False
    q_perm: bool = False
    blocks: tuple[mbwq.Block, ...] | None = None
    double_quant: DoubleQuant | None = None

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> TableEntry:
        """The values of a JSON entry; null and absent mean the same."""
        values = {key: value for key, value in entry.items() if value is not None}
        if "blocks" in values:
            values["blocks"] = mbwq.check_blocks(values["blocks"])
        if "double_quant" in values:
            values["double_quant"] = DoubleQuant.from_dict(values["double_quant"])
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The JSON entry."""
        if self.method == "onebit":
            return {"method": "onebit", "bits": 1, "planes": self.planes, "group_size": None}
        entry: dict[str, Any] = {key: getattr(self, key) for key in ("method", "bits", "group_size", "symmetric")}
        entry |= {"in_features": self.in_features} if self.in_features is not None else {}
        entry |= {"kind": self.kind} if self.kind != "linear" else {}
        entry |= {key: True for key in ("g_idx", "q_perm") if getattr(self, key)}
        entry |= {"blocks": [list(block) for block in self.blocks]} if self.blocks is not None else {}
        entry |= {"double_quant": self.double_quant.to_dict()} if self.double_quant is not None else {}
        return entry | ({"tied_to": self.tied_to} if self.tied_to is not None else {})

    @property
    def in_blocks(self) -> bool:
        """Whether the layer is one of row blocks (formats/mbwq.py, ``MBWQLinear``)."""
        return self.q_perm or self.blocks is not None

    def row_blocks(self, in_features: int) -> tuple[mbwq.Block, ...]:
        """The row blocks of such a layer."""
        return ((self.bits, in_features, self.group_size),) if self.blocks is None else self.blocks

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """Names of the packed tensors, ``weight`` first."""
        if self.in_blocks:
            return mbwq.tensor_names(self.symmetric, self.q_perm)
        if self.method == "mpq":
            return mpq.tensor_names(self.symmetric, self.g_idx)
        return tuple(name for plane in range(self.planes) for name in onebit.plane_names(plane))

    def tensor_specs(self, in_features: int, out_features: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of every packed tensor, by name.

        Raises:
            ValueError: a size or a value of the entry is out of range.
        """
        if self.in_blocks:
            blocks = self.row_blocks(in_features)
            return mbwq.tensor_specs(in_features, out_features, blocks, self.symmetric, self.q_perm)
        if self.method == "mpq":
            return mpq.tensor_specs(in_features, out_features, self.bits, self.group_size, self.symmetric, self.g_idx)
        return onebit.tensor_specs(in_features, out_features, self.planes)

    def validate_tensors(self, tensors: Mapping[str, Tensor], in_features: int, out_features: int, where: str) -> None:
        """Check that ``tensors`` are exactly such a module's; see the functions of that name in both formats.

        Raises:
            ValueError: the first fault found.
        """
        about = self.bits, self.group_size, self.symmetric
        if self.in_blocks:
            blocks = self.row_blocks(in_features)
            mbwq.validate_tensors(tensors, in_features, out_features, blocks, self.symmetric, self.q_perm, where)
        elif self.method == "mpq":
            mpq.validate_tensors(tensors, in_features, out_features, *about, where, self.g_idx)
        else:
            onebit.validate_tensors(tensors, in_features, out_features, self.planes, where)

    def bits_per_weight(self, in_features: int, out_features: int, bias_bits: int = 0) -> float:
        """Stored bits of the packed tensors (and of a bias, at ``bias_bits`` an output) per weight."""
        if self.double_quant is not None:
            specs = self.stored_specs(in_features, out_features).values()
            total = sum(torch.Size(shape).numel() * dtype.itemsize * 8 for shape, dtype in specs)
            return (total + bias_bits * out_features) / (in_features * out_features)
        if self.in_blocks:
            blocks = self.row_blocks(in_features)
            return mbwq.bits_per_weight(in_features, out_features, blocks, self.symmetric, self.q_perm, bias_bits)
        if self.method == "mpq":
            about = self.bits, self.group_size, self.symmetric, bias_bits, self.g_idx
            return mpq.bits_per_weight(in_features, out_features, *about)
        return onebit.bits_per_weight(in_features, out_features, self.planes, bias_bits)

    def stored_specs(self, in_features: int, out_features: int) -> mpq.Specs:
        """:meth:`tensor_specs` of what the file holds, which ``double_quant`` makes others than the module has."""
        specs = self.tensor_specs(in_features, out_features)
        if self.double_quant is None:
            return specs
        groups = specs["scales"][0][0]
        kept = {name: about for name, about in specs.items() if name not in ("scales", "zeros")}
        return kept | double_quant.tensor_specs(groups, out_features, self.symmetric, self.double_quant)

    def to_stored(self, tensors: Mapping[str, Tensor], in_features: int) -> dict[str, Tensor]:
        """A module's tensors as the file holds them; other names (a bias) stay."""
        if self.double_quant is None:
            return dict(tensors)
        kept = {name: tensor for name, tensor in tensors.items() if name not in ("scales", "zeros")}
        middle = self.middle(in_features, tensors["scales"].device)
        return kept | double_quant.compress(tensors["scales"], tensors.get("zeros"), middle, self.double_quant)

    def from_stored(
        self, tensors: Mapping[str, Tensor], in_features: int, out_features: int, where: str
    ) -> dict[str, Tensor]:
        """Undo :meth:`to_stored`; exact.

        Raises:
            ValueError: a tensor of the statistics is missing, or has another dtype or shape.
        """
        if self.double_quant is None:
            return dict(tensors)
        groups = self.tensor_specs(in_features, out_features)["scales"][0][0]
        names = double_quant.tensor_names(self.symmetric)
        device = next(iter(tensors.values())).device
        middle = self.middle(in_features, device)
        about = groups, out_features, self.symmetric, middle, self.double_quant, where
        scales, zeros = double_quant.expand(tensors, *about)
        found = {name: tensor for name, tensor in tensors.items() if name not in names} | {"scales": scales}
        return found if zeros is None else found | {"zeros": zeros}

    def middle(self, in_features: int, device: torch.device | None = None) -> float | Tensor:
        """The code that means 0 in a symmetric layer, or ``(groups, 1)`` of them where widths differ."""
        if self.blocks is not None:
            return mbwq.zero_points(self.row_blocks(in_features), device)
        return mpq.zero_point(self.bits)

    def sizes(self, shapes: Mapping[str, tuple[int, ...] | None]) -> tuple[int, int] | None:
        """(in_features, out_features) from the shapes of the stored tensors by name, or None where they do not tell.

        Only the tensors that tell a size are looked at; ``tensor_specs`` of the result says what all must be.
        """
        if self.method == "mpq":
            weight, scales = shapes.get("weight"), shapes.get("scales")
            if weight is None or scales is None or len(weight) != 2 or len(scales) != 2:
                return None
            if self.in_features is not None:
                return self.in_features, scales[1]
            if self.blocks is not None:
                return sum(rows for _, rows, _ in self.blocks), scales[1]
            return weight[0] // self.bits * WORD_BITS, scales[1]
        a, b = shapes.get("a"), shapes.get("b")
        return None if a is None or b is None or len(a) != 1 or len(b) != 1 else (b[0], a[0])
