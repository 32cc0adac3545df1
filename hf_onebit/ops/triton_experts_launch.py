"""Launches the kernels of triton_experts.py: which rows form a tile, tables of addresses, workspaces."""

from typing import NamedTuple

import torch
from torch import Tensor

from hf_onebit.formats.packing import WORD_BITS
from hf_onebit.ops import gpu_plans
from hf_onebit.ops import triton_experts as kernels
from hf_onebit.ops.gpu_plans import ASM, TILE, Alike, Layers, ceil, count_units, power_of_2

_REDUCE_BLOCK = 128


class Rows(NamedTuple):
    """Which rows there are, sorted by expert; made by :func:`sort_rows`."""

    tokens: Tensor  # (P,) int64, whose x
    experts: Tensor  # (P,) int64; the number of experts and more for none
    order: Tensor  # (P,) int64: place of each sorted row in what was sorted
    ends: Tensor  # (E,) int64: where the rows of each expert end


def sort_rows(top_k_index: Tensor, experts: int) -> Rows:
    """Rows of ``top_k_index`` (tokens, k), by expert and then as they are; nothing waits for the device."""
    flat = top_k_index.flatten().long()
    flat = torch.where((flat < 0) | (flat > experts), experts, flat)
    order = flat.argsort(stable=True)
    sorted_experts = flat[order]
    ends = torch.searchsorted(sorted_experts, torch.arange(experts, device=flat.device), right=True)
    return Rows(order // top_k_index.shape[1], sorted_experts, order, ends)


def product(x: Tensor, rows: Rows, layers: Layers, direct: bool = False) -> Tensor:
    """y of each row: its expert's layer of its token's x, in rows' order.

    Args:
        x: ``(tokens, in)``, neighbours in the last dimension; with ``direct`` (P, in), already in rows' order.
        rows: by expert.
        layers: of all experts.
        direct: what x is.

    Returns:
        ``(P, out)`` in x's dtype; zeros for rows of no expert.
    """
    P, E, K = rows.experts.shape[0], len(layers.weight.addresses), layers.in_features
    N, is_mpq = layers.weight.like.shape[1], layers.group_size != 0
    KU = count_units(K)
    KUP = ceil(KU, TILE) * TILE
    parts = 2 if x.dtype == torch.float32 or not is_mpq else 1
    average = ceil(P, E)
    block_n, block_c, warps, stages = tile_of(average * parts, layers, x.device)
    splits = _splits(ceil(N, block_n) * min(E, P) * warps, KU, x.device)
    u = torch.empty((parts * P, WORD_BITS, KUP), dtype=torch.float16, device=x.device)
    norm = torch.empty((P,), dtype=torch.float32, device=x.device)
    y = torch.empty((P, N), dtype=x.dtype, device=x.device)
    tokens = torch.arange(P, device=x.device) if direct else rows.tokens
    like = x if layers.b is None else layers.b.like
    kernels.prepare_experts[(P,)](
        x, tokens, rows.experts, table(layers.b, x.device), like, u, norm, K, KUP, x.stride(0), P, E,
        HAS_B=layers.b is not None, PARTS=parts, UNITS=min(128, power_of_2(KUP)), num_warps=8 if KUP >= 64 else 4,
    )  # fmt: skip
    units_a_split = ceil(KUP // TILE, splits) * TILE
    splits = ceil(KU, units_a_split)
    partial = torch.empty((splits * parts, P, N), dtype=torch.float32, device=x.device)
    tiles = tiles_of(rows, block_c // parts, P, E)
    scales = table(layers.scales, x.device)
    group = KU if layers.group_size <= 0 or layers.group_size >= K else layers.group_size // WORD_BITS
    kernels.multiply_experts[(ceil(N, block_n), tiles[0].shape[0], splits)](
        u, table(layers.weight, x.device), scales, table(layers.zeros, x.device), layers.weight.like,
        layers.scales.like, *tiles, partial, P, N, KU, KUP, splits, units_a_split, max(group, 1),
        BITS=layers.bits, MPQ=is_mpq, ZEROS=layers.zeros is not None, PARTS=parts, BLOCK_N=block_n, BLOCK_C=block_c,
        ASM=ASM, num_warps=warps, num_stages=stages, **gpu_plans.registers_of(warps, gpu_plans.major(x.device)),
    )  # fmt: skip
    terms = splits * parts
    kernels.reduce_experts[(P, ceil(N, _REDUCE_BLOCK))](
        partial, norm, rows.experts, scales, table(layers.bias, x.device), layers.scales.like,
        x if layers.bias is None else layers.bias.like, y, P, E, N, terms, ROOM=power_of_2(terms), MPQ=is_mpq,
        BIAS=layers.bias is not None, BLOCK=_REDUCE_BLOCK, num_warps=4,
    )  # fmt: skip
    return y


def tile_of(columns: int, layers: Layers, device: torch.device) -> tuple[int, int, int, int]:
    """(outputs, columns, warps, stages) for so many columns of an expert, of the tiles that ``plan_for`` uses."""
    operand, block_c = layers.first, gpu_plans.columns_of_tile(columns, 32)
    block_n, warps = gpu_plans.tile_for(block_c, operand.bits, operand.is_mpq, gpu_plans.major(device))
    return block_n, block_c, warps, gpu_plans.stages_for(operand, block_n, block_c, device)


def tiles_of(rows: Rows, size: int, P: int, E: int) -> tuple[Tensor, Tensor, Tensor]:
    """(expert, first row, end) int64 of each tile of at most ``size`` rows.

    There are as many as rows could need, so that nothing waits for the device; those that are left over are empty.
    """
    counts = torch.diff(rows.ends, prepend=rows.ends.new_zeros(1))
    tiles = (counts + size - 1) // size
    ends = tiles.cumsum(0)
    number = torch.arange(P // size + min(E, P), device=rows.ends.device)
    expert = torch.searchsorted(ends, number, right=True).clamp(max=E - 1)
    begin = (rows.ends - counts)[expert] + (number - (ends - tiles)[expert]) * size
    end = torch.minimum(begin + size, rows.ends[expert])
    used = number < ends[-1]
    return expert, torch.where(used, begin, 0), torch.where(used, end, 0)


# {addresses: the table on the device}: filling one waits for a copy, and the addresses of a model stay. Those that a
# captured graph reads are never let go, since it may be replayed at any time.
_captured: dict[tuple[str, tuple[int, ...]], Tensor] = {}
_tables: dict[tuple[str, tuple[int, ...]], Tensor] = {}
_MOST_TABLES = 4096


def table(tensors: Alike | None, device: torch.device) -> Tensor:
    """Their addresses, int64, on the device."""
    key = (str(device), () if tensors is None else tensors.addresses)
    if key in _captured:
        return _captured[key]
    if key not in _tables:
        if len(_tables) >= _MOST_TABLES:
            _tables.clear()
        _tables[key] = torch.tensor(key[1] or (0,), dtype=torch.int64, device=device)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _captured[key] = _tables.pop(key)
        return _captured[key]
    return _tables[key]


def _splits(warps: int, KU: int, device: torch.device) -> int:
    """Slices of the inputs that keep every multiprocessor busy: a power of two."""
    wanted = max(gpu_plans.multiprocessors(device) * 8 // warps, 1)
    return min(power_of_2(wanted), power_of_2(ceil(KU, TILE)), 16)
