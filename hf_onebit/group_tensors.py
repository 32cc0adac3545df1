"""Codes and statistics of a group-quantized layer as the tensors that its entry promises, and back."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from hf_onebit.algorithms.gptq import GroupFit
from hf_onebit.formats import mpq
from hf_onebit.formats.packing import pack
from hf_onebit.formats.table import TableEntry


def pack_fit(fit: GroupFit, entry: TableEntry) -> dict[str, Tensor]:
    """Packed tensors by the names of docs/formats.md."""
    tensors = {"weight": pack(fit.codes, entry.bits, check=False), "scales": fit.scales}
    return tensors if fit.zeros is None else tensors | {"zeros": fit.zeros}


def dequantize_entry(tensors: Mapping[str, Tensor], entry: TableEntry, in_features: int) -> Tensor:
    """(out, in) float32, what packed tensors of an entry stand for."""
    return mpq.dequantize(
        tensors["weight"], tensors["scales"], tensors.get("zeros"), in_features, entry.bits, entry.group_size
    )
