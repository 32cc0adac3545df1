"""Codes and statistics of a group-quantized layer as the tensors that its entry promises, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from hf_onebit.algorithms.gptq import GroupFit, Round, nearest_codes
from hf_onebit.formats import double_quant, mbwq, mpq
from hf_onebit.formats.packing import pack, unpack
from hf_onebit.formats.table import TableEntry


def pack_fit(fit: GroupFit, entry: TableEntry) -> dict[str, Tensor]:
    """Packed tensors by the names of docs/formats.md."""
    tensors = {"scales": fit.scales} | ({} if fit.zeros is None else {"zeros": fit.zeros})
    if not entry.q_perm:
        return {"weight": pack(fit.codes, entry.bits, check=False), **tensors}
    n = fit.codes.shape[1]
    order = torch.arange(n, device=fit.codes.device)
    if fit.g_idx is not None:  # groups of the whole row have none
        order = fit.g_idx.argsort(stable=True)
    weight = mbwq.pack_blocks(fit.codes[:, order], entry.row_blocks(n))
    return {"weight": weight, **tensors, "q_perm": order.to(torch.int32)}


def unpack_fit(tensors: Mapping[str, Tensor], entry: TableEntry, in_features: int) -> GroupFit | None:
    """Undo `pack_fit`; None for layers whose codes have several widths."""
    scales, zeros, g_idx = tensors["scales"], tensors.get("zeros"), tensors.get("g_idx")
    if not entry.in_blocks:
        codes = unpack(tensors["weight"], entry.bits, in_features)
        return GroupFit(codes, scales, zeros, g_idx)
    blocks = entry.row_blocks(in_features)
    if len(blocks) > 1:
        return None
    rows, group = mbwq.unpack_blocks(tensors["weight"], blocks), mbwq.groups_of_rows(blocks, scales.device)
    order = tensors["q_perm"].long() if "q_perm" in tensors else torch.arange(in_features, device=scales.device)
    codes, g_idx = torch.empty_like(rows), torch.empty_like(group)
    codes[order], g_idx[order] = rows, group
    return GroupFit(codes.t().contiguous(), scales, zeros, g_idx.to(torch.int32))


def dequantize_entry(tensors: Mapping[str, Tensor], entry: TableEntry, in_features: int) -> Tensor:
    """(out, in) float32, what packed tensors of an entry stand for."""
    weight, scales, zeros = tensors["weight"], tensors["scales"], tensors.get("zeros")
    if entry.in_blocks:
        return mbwq.dequantize(weight, scales, zeros, entry.row_blocks(in_features), tensors.get("q_perm"))
    return mpq.dequantize(weight, scales, zeros, in_features, entry.bits, entry.group_size, g_idx=tensors.get("g_idx"))


def rounding_of(entry: TableEntry) -> Round | None:
    """What the file does to the statistics of an entry's layer beyond float16; None where it keeps them."""
    spec = entry.double_quant
    if spec is None:
        return None
    middle = mpq.zero_point(entry.bits)

    def rounding(scales: Tensor, zeros: Tensor | None) -> tuple[Tensor, Tensor | None]:
        s, z = double_quant.through(scales.half(), None if zeros is None else zeros.half(), middle, spec)
        return s.float(), None if z is None else z.float()

    return rounding


def settle(fit: GroupFit, W: Tensor, entry: TableEntry) -> GroupFit:
    """A fit with statistics as the file keeps them, and the codes nearest to W (out, in) under them."""
    rounding = rounding_of(entry)
    if rounding is None:
        return fit
    scales, zeros = rounding(fit.scales.float(), None if fit.zeros is None else fit.zeros.float())
    settled = replace(fit, scales=scales.half(), zeros=None if zeros is None else zeros.half())
    return replace(settled, codes=nearest_codes(W, settled, entry.bits, entry.group_size))
