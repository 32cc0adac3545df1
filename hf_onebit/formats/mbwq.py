"""What the tensors of a layer in row blocks mean: codes of one or several widths, inputs in an order of their own.

The inputs of a layer ``y = W x``, W ``(out, in)``, are taken in *packed order*: packed row r is input ``q_perm[r]``
(input r where there is no ``q_perm``). Packed rows are cut into blocks of neighbours. All codes of a block have the
same width, and its groups begin anew::

    blocks   ((bits, rows, group_size), ...)        rows add up to in; not a tensor, but in config.json
    weight   int32    (words, out)                  blocks one after the other, each packed as in packing.py
    scales   float16  (groups, out)                 groups of the first block, then of the second, ...
    zeros    float16  (groups, out)                 as in mpq.py; absent in a symmetric layer
    q_perm   int32    (in,)                         a permutation; absent where packed order is the inputs' own

So ``W[n, q_perm[r]] = scales[g, n] q[n, r] - zeros[g, n]`` with g the group of packed row r. One block may have any
width from 1 to 8; several have widths of 8, 6, 5, 4, 3 and 2, each once, falling.
"""

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hf_onebit.formats import mpq
from hf_onebit.formats.packing import pack, unpack_rows, word_rows

Block = tuple[int, int, int]
"""Bits of one code, packed rows, inputs that share a scale (-1: the whole block)."""
MIXED_BITS = (8, 6, 5, 4, 3, 2)

__all__ = [
    "MIXED_BITS",
    "Block",
    "bits_per_weight",
    "block_group_counts",
    "block_words",
    "check_blocks",
    "check_permutation",
    "dequantize",
    "group_map",
    "groups_of_rows",
    "pack_blocks",
    "rows_of",
    "storage_bits",
    "tensor_names",
    "tensor_specs",
    "unpack_blocks",
    "validate_tensors",
    "zero_points",
]


def check_blocks(blocks: Sequence[Block], in_features: int | None = None) -> tuple[Block, ...]:
    """The blocks as a tuple of tuples of integers, checked.

    Args:
        blocks: see the module's docstring.
        in_features: what the rows must add up to, if known.

    Raises:
        ValueError: no block, a value that is no whole number or out of range, several widths that do not fall or are
            not among 8, 6, 5, 4, 3, 2, or rows that do not add up.
    """
    if not isinstance(blocks, (list, tuple)) or not blocks:
        raise ValueError(f"blocks must be a list of (bits, rows, group_size), at least one, got {blocks!r}")
    for block in blocks:
        whole = isinstance(block, (list, tuple)) and all(type(v) is int for v in block)
        if not whole or len(block) != 3:
            raise ValueError(f"blocks must hold three whole numbers each (bits, rows, group_size), got {block!r}")
        if block[1] < 1:
            raise ValueError(f"blocks must have at least one row each, got {tuple(block)}")
        mpq.zero_point(block[0])  # refuses widths outside of 1..8
        mpq.check_group_size(block[2])
    widths = [block[0] for block in blocks]
    falling = all(a > b for a, b in itertools.pairwise(widths))
    if len(widths) > 1 and not (falling and set(widths) <= set(MIXED_BITS)):
        raise ValueError(f"several blocks must have falling widths among 8, 6, 5, 4, 3 and 2, got {widths}")
    rows = sum(block[1] for block in blocks)
    if in_features is not None and rows != in_features:
        raise ValueError(f"blocks have {rows} rows together, expected {in_features}, one for each input")
    return tuple((int(bits), int(count), int(size)) for bits, count, size in blocks)


def block_words(blocks: Sequence[Block]) -> list[int]:
    """Word rows of each block: ``ceil(rows / 32) * bits``."""
    return [word_rows(rows, bits) for bits, rows, _ in blocks]


def block_group_counts(blocks: Sequence[Block]) -> list[int]:
    """Groups of each block."""
    return [mpq.group_count(rows, group_size) for _, rows, group_size in blocks]


def groups_of_rows(blocks: Sequence[Block], device: torch.device | None = None) -> Tensor:
    """int64 ``(in,)``: the group of each packed row."""
    parts, first = [], 0
    for (_, rows, group_size), count in zip(blocks, block_group_counts(blocks), strict=True):
        size = rows if group_size == -1 else group_size
        parts.append(torch.arange(rows, device=device) // size + first)
        first += count
    return torch.cat(parts)


def zero_points(blocks: Sequence[Block], device: torch.device | None = None) -> Tensor:
    """float32 ``(groups, 1)``: for each group, the code that means 0 in a symmetric layer."""
    counts = torch.tensor(block_group_counts(blocks), device=device)
    points = torch.tensor([mpq.zero_point(bits) for bits, _, _ in blocks], device=device)
    return points.repeat_interleave(counts)[:, None]


def rows_of(blocks: Sequence[Block]) -> list[int]:
    """``rows`` of ``MPQWeightParameter``: where the blocks of 8, 6, 5, 4, 3 and 2 bits end, then a mask of the widths.

    Bit b - 1 of the mask is set where there is a block of b bits.

    Raises:
        ValueError: a width that such a list cannot say (1 or 7).
    """
    counts = {bits: rows for bits, rows, _ in blocks}
    if set(counts) - set(MIXED_BITS):
        raise ValueError(f"rows can tell blocks of 8, 6, 5, 4, 3 and 2 bits, got {sorted(counts)}")
    ends, end = [], 0
    for bits in MIXED_BITS:
        end += counts.get(bits, 0)
        ends.append(end)
    return [*ends, sum(1 << (bits - 1) for bits in counts)]


def group_map(blocks: Sequence[Block], device: torch.device | None = None) -> Tensor:
    """``q_group_map`` of ``MPQWeightParameter``: for each packed row, its group and how many rows of that are left.

    Returns:
        ``(2 * in,)``, pairs; int16, or int32 where a number is too large for that.
    """
    groups = groups_of_rows(blocks, device)
    sizes = torch.bincount(groups)
    ends = sizes.cumsum(0)
    left = ends[groups] - torch.arange(len(groups), device=device)
    small = max(len(sizes), int(sizes.max())) <= torch.iinfo(torch.int16).max
    return torch.stack((groups, left), 1).flatten().to(torch.int16 if small else torch.int32)


def tensor_names(symmetric: bool, q_perm: bool) -> tuple[str, ...]:
    """Names of a layer's packed tensors: ``weight``, ``scales``, if not symmetric ``zeros``, and maybe ``q_perm``."""
    return ("weight", "scales", *([] if symmetric else ["zeros"]), *(["q_perm"] if q_perm else []))


def tensor_specs(
    in_features: int, out_features: int, blocks: Sequence[Block], symmetric: bool, q_perm: bool
) -> mpq.Specs:
    """Shape and dtype of every packed tensor of a layer, by name; a bias is an ordinary float tensor.

    Raises:
        ValueError: a negative size, or blocks that are none of such a layer.
    """
    blocks = check_blocks(blocks, in_features)
    if out_features < 0:
        raise ValueError(f"out_features must not be negative, got {out_features}")
    statistics = (sum(block_group_counts(blocks)), out_features), torch.float16
    others: mpq.Specs = {
        "weight": ((sum(block_words(blocks)), out_features), torch.int32),
        "q_perm": ((in_features,), torch.int32),
    }
    return {name: others.get(name, statistics) for name in tensor_names(symmetric, q_perm)}


def pack_blocks(codes: Tensor, blocks: Sequence[Block], check: bool = True) -> Tensor:
    """Pack codes that are in packed order; see :func:`hf_onebit.formats.packing.pack`.

    Args:
        codes: ``(out, in)``, bool or any integer dtype; column r is packed row r.
        blocks: as above.
        check: look at the values.

    Returns:
        int32 ``(words, out)``.

    Raises:
        ValueError: blocks that do not fit, or a code too large for its block.
    """
    blocks = check_blocks(blocks, codes.shape[-1])
    parts = codes.split([rows for _, rows, _ in blocks], dim=-1)
    return torch.cat([pack(part, bits, check) for part, (bits, _, _) in zip(parts, blocks, strict=True)])


def unpack_blocks(weight: Tensor, blocks: Sequence[Block]) -> Tensor:
    """Undo :func:`pack_blocks`, in the words' order: uint8 ``(in, out)``, rows in packed order."""
    parts = weight.split(block_words(blocks))
    return torch.cat([unpack_rows(part, bits, rows) for part, (bits, rows, _) in zip(parts, blocks, strict=True)])


def dequantize(
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    blocks: Sequence[Block],
    q_perm: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The float matrix that the tensors stand for, its inputs in their own order.

    Args:
        weight, scales, zeros, blocks: see the module's docstring; scales and zeros of any float dtype.
        q_perm: int32 or int64 ``(in,)``, a permutation, or None.
        dtype: of the result. It is computed in float32 (float64 if ``dtype`` is that) and cast once.

    Returns:
        ``(out, in)``, contiguous; differentiable in scales and zeros.

    Raises:
        ValueError: tensors whose shapes do not belong together.
    """
    blocks = check_blocks(blocks)
    in_features = sum(rows for _, rows, _ in blocks)
    expected = sum(block_group_counts(blocks)), weight.shape[-1]
    if weight.dim() != 2 or weight.shape[0] != sum(block_words(blocks)):
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}, expected ({sum(block_words(blocks))}, out): the words of {blocks}"
        )
    for name, statistics in (("scales", scales), ("zeros", zeros)):
        if statistics is not None and tuple(statistics.shape) != expected:
            raise ValueError(f"{name} has shape {tuple(statistics.shape)}, expected {expected}: the groups of {blocks}")
    if q_perm is not None and tuple(q_perm.shape) != (in_features,):
        raise ValueError(f"q_perm has shape {tuple(q_perm.shape)}, expected ({in_features},)")
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    group = groups_of_rows(blocks, weight.device)
    q, s = unpack_blocks(weight, blocks).to(compute), scales.to(compute).index_select(0, group)
    if zeros is None:
        W = q.sub_(zero_points(blocks, weight.device).index_select(0, group)) * s
    else:
        W = q * s - zeros.to(compute).index_select(0, group)
    W = W.to(dtype).T
    if q_perm is None:
        return W.contiguous()
    return torch.empty(W.shape, dtype=dtype, device=W.device).index_copy(1, q_perm.long(), W)


def storage_bits(
    in_features: int,
    out_features: int,
    blocks: Sequence[Block],
    symmetric: bool,
    q_perm: bool = False,
    bias_bits: int = 0,
) -> int:
    """Bits a layer takes in the file, exactly: padded words, float16 scales and zeros; the permutation; bias.

    Args:
        in_features: inputs of the layer.
        out_features: outputs of the layer.
        blocks: as above.
        symmetric: without ``zeros``.
        q_perm: with a permutation.
        bias_bits: bits of one bias entry; 0 if there is no bias.

    Raises:
        ValueError: as :func:`tensor_specs`, or negative ``bias_bits``.
    """
    if bias_bits < 0:
        raise ValueError(f"bias_bits must not be negative, got {bias_bits}")
    specs = tensor_specs(in_features, out_features, blocks, symmetric, q_perm).values()
    return sum(torch.Size(shape).numel() * dtype.itemsize * 8 for shape, dtype in specs) + bias_bits * out_features


def bits_per_weight(
    in_features: int,
    out_features: int,
    blocks: Sequence[Block],
    symmetric: bool,
    q_perm: bool = False,
    bias_bits: int = 0,
) -> float:
    """:func:`storage_bits` over the number of weights, ``in_features * out_features``.

    Raises:
        ValueError: as :func:`storage_bits`, or the layer has no weights.
    """
    if in_features < 1 or out_features < 1:
        raise ValueError(f"a layer of {out_features} x {in_features} has no weights to count bits for")
    total = storage_bits(in_features, out_features, blocks, symmetric, q_perm, bias_bits)
    return total / (in_features * out_features)


def validate_tensors(
    tensors: Mapping[str, Tensor],
    in_features: int,
    out_features: int,
    blocks: Sequence[Block],
    symmetric: bool,
    q_perm: bool,
    where: str,
) -> None:
    """Check that ``tensors`` are exactly a stored layer of this size; other names (a bias) are ignored.

    Values are checked too, but not of meta tensors: padding codes are zero, scales and zeros finite, ``q_perm`` a
    permutation.

    Args:
        tensors: the layer's tensors by their short names.
        in_features, out_features, blocks, symmetric, q_perm: what the config promises.
        where: the module or file, for the error text.

    Raises:
        ValueError: the first fault found.
    """
    specs = tensor_specs(in_features, out_features, blocks, symmetric, q_perm)
    mpq.check_specs(tensors, specs, symmetric, where)
    if tensors["weight"].is_meta:
        return
    for part, (bits, rows, _) in zip(tensors["weight"].split(block_words(blocks)), blocks, strict=True):
        mpq.check_padding(part, rows, bits, f"{where}: 'weight', block of {bits} bits,")
    if q_perm:
        check_permutation(tensors["q_perm"], f"{where}: 'q_perm'")


def check_permutation(q_perm: Tensor, what: str) -> None:
    """Refuse indices that are no permutation; among them all zeros, which other programs write for "none".

    Raises:
        ValueError: they are not.
    """
    if q_perm.is_meta:
        return
    count = q_perm.numel()
    if torch.equal(q_perm.long().sort().values, torch.arange(count, device=q_perm.device)):
        return
    zeros = "; it is all zeros: leave it out where inputs keep their order" if not bool(q_perm.any()) else ""
    raise ValueError(f"{what} is no permutation of 0..{count - 1}{zeros}")
