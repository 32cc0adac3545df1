"""What the attributes of an ``MPQWeightParameter`` say of its words: where each code is, its width, group and input.

The attributes come from this package's modules or from other programs', so nothing of them is trusted: they are read
once, checked against each other, and become a :class:`WeightLayout`.

==========  =====================================  ==============================================================
layer_type  1                                      2
==========  =====================================  ==============================================================
rows        inputs in their own order              packed order: row r is input ``q_perm[r]``, or r without q_perm
widths      ``w_bit``                              ``w_bit``, or by ``rows``: blocks of 8, 6, 5, 4, 3, 2 bits
groups      ``g_idx``, else neighbours             ``q_group_map``, else neighbours
==========  =====================================  ==============================================================

Floating ``zeros`` are already multiplied by the scales: W = scales q - zeros. Integer ``zeros`` are GPTQ's: codes of
``w_bit`` bits packed along the outputs, one less than the zero point, W = scales (q - zero point). Without ``zeros``
code 2^(bits - 1) means 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from hf_onebit.formats import mpq
from hf_onebit.formats.mbwq import MIXED_BITS, check_permutation
from hf_onebit.formats.packing import WORD_BITS, pack, unpack, unpack_rows, word_rows

__all__ = [
    "WeightAttributes",
    "WeightLayout",
    "check_rows",
    "layout_of",
    "pack_zero_points",
    "require_supported",
    "unpack_zero_points",
    "unsigned",
]


class WeightAttributes(Protocol):
    """The attributes that are read; see ``MPQWeightParameter``."""

    data: Tensor
    scales: Tensor | None
    zeros: Tensor | None
    g_idx: Tensor | None
    w_bit: int
    group_size: int
    layer_type: int
    q_perm: Tensor | None
    q_group_map: Tensor | None
    rows: list[int] | None


@dataclass(frozen=True)
class WeightLayout:
    """Where the codes of a packed weight ``(in, out)`` are and what they mean.

    Attributes:
        in_features: K, rows of the matrix.
        blocks: (bits, packed rows, word rows) of each row block.
        group: int64 ``(in,)``, the group of each packed row.
        perm: int64 ``(in,)``, the input of each packed row; None where that is the row itself.
        scales: ``(groups, out)``, float.
        zeros: ``(groups, out)``, float, already multiplied by the scales. One of these three is not None.
        zero_points: ``(groups, out)``, float, in units of codes.
        middle: ``(in, 1)``, float: in a symmetric layer, the code of each packed row that means 0.
    """

    in_features: int
    blocks: tuple[tuple[int, int, int], ...]
    group: Tensor
    perm: Tensor | None
    scales: Tensor
    zeros: Tensor | None
    zero_points: Tensor | None
    middle: Tensor | None

    def unpack(self, words: Tensor) -> Tensor:
        """Codes uint8 ``(in, columns)`` in packed order, of some columns of the words."""
        parts = []
        for part, (bits, rows, held) in zip(words.split([b[2] for b in self.blocks]), self.blocks, strict=True):
            whole = word_rows(rows, bits)
            padding = part.new_zeros(whole - held, part.shape[1])
            parts.append(unpack_rows(torch.cat((part, padding)) if whole > held else part, bits, rows))
        return torch.cat(parts)

    def pack(self, codes: Tensor) -> Tensor:
        """Undo :meth:`unpack`."""
        parts = []
        for part, (bits, _, held) in zip(codes.split([b[1] for b in self.blocks]), self.blocks, strict=True):
            parts.append(pack(part.T, bits, check=False)[:held])
        return torch.cat(parts)

    def levels(self) -> Tensor:
        """uint8 ``(in, 1)``: the largest code of each packed row."""
        device = self.group.device
        parts = [torch.full((n, 1), (1 << bits) - 1, dtype=torch.uint8, device=device) for bits, n, _ in self.blocks]
        return torch.cat(parts)

    def affine(self, columns: slice, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(scale, offset) of each packed row and some columns, so that W = scale * code - offset."""
        scale = self.scales[:, columns].to(dtype).index_select(0, self.group)
        if self.zeros is not None:
            return scale, self.zeros[:, columns].to(dtype).index_select(0, self.group)
        if self.zero_points is not None:
            return scale, scale * self.zero_points[:, columns].to(dtype).index_select(0, self.group)
        assert self.middle is not None
        return scale, scale * self.middle.to(dtype)


def layout_of(weight: WeightAttributes, in_features: int | None = None) -> WeightLayout:
    """Read the attributes of a packed weight.

    Args:
        weight: the parameter.
        in_features: rows of the float matrix where known; the words alone tell it to the next 32.

    Raises:
        NotImplementedError: a ``layer_type`` other than 1 and 2, or a width outside of 1..8.
        ValueError: an attribute is missing, or two do not belong together; the text says which.
    """
    mixed = require_supported(weight)
    words = weight.data
    if words.dtype != torch.int32 or words.dim() != 2:
        raise ValueError(f"the packed data must be int32 (words, out), got {words.dtype} {tuple(words.shape)}")
    if weight.scales is None:
        raise ValueError("scales is None: a packed weight without scales stands for nothing; bind it to its module")
    count, outputs = weight.scales.shape[0], words.shape[1]
    if weight.scales.dim() != 2 or weight.scales.shape[1] != outputs:
        raise ValueError(f"scales has shape {tuple(weight.scales.shape)}, expected (groups, {outputs})")
    index = weight.q_perm if weight.layer_type == 2 else weight.g_idx
    K = _in_features(weight, index, in_features, mixed)
    blocks = _blocks(weight, K, mixed)
    perm = None
    if weight.layer_type == 2 and weight.q_perm is not None:
        perm = unsigned(weight.q_perm)
        check_permutation(perm, "q_perm")
    group = _groups(weight, K, count)
    given = weight.g_idx if weight.layer_type == 1 else weight.q_group_map
    if given is not None:  # groups of neighbours are in range, and looking at them would wait for the device
        mpq.check_range(group, count, "g_idx" if weight.layer_type == 1 else "q_group_map")
    zeros, points, middle = weight.zeros, None, None
    if zeros is None:
        values = [torch.full((rows, 1), mpq.zero_point(bits), device=words.device) for bits, rows, _ in blocks]
        middle = torch.cat(values)
    elif not zeros.is_floating_point():
        if mixed:
            raise ValueError("integer zeros have one width, got codes of several: give zeros as floats times scales")
        points = unpack_zero_points(zeros, weight.w_bit, outputs).float()
        zeros = None
    for tensor in (zeros, points):
        if tensor is not None and tuple(tensor.shape) != (count, outputs):
            raise ValueError(f"zeros has shape {tuple(tensor.shape)}, expected {(count, outputs)}")
    return WeightLayout(K, blocks, group, perm, weight.scales, zeros, points, middle)


def require_supported(weight: WeightAttributes) -> bool:
    """Whether the codes have several widths.

    Raises:
        NotImplementedError: a ``layer_type`` other than 1 and 2, or a width outside of 1..8.
    """
    if weight.layer_type not in (1, 2):
        raise NotImplementedError(
            f"layer_type {weight.layer_type!r} is not implemented: 1 is MPQLinear, 2 is MBWQLinear"
        )
    mixed = weight.layer_type == 2 and weight.rows is not None
    if not mixed and weight.w_bit not in range(mpq.MIN_BITS, mpq.MAX_BITS + 1):
        raise NotImplementedError(
            f"w_bit {weight.w_bit!r} is not implemented: codes have {mpq.MIN_BITS} to {mpq.MAX_BITS} bits"
        )
    return mixed


def unsigned(index: Tensor) -> Tensor:
    """int64 values of an index; int16 is read as unsigned, since other programs store up to 65535 in it."""
    return index.long() & 0xFFFF if index.dtype == torch.int16 else index.long()


def check_rows(rows: Any) -> tuple[tuple[int, int], ...]:
    """((bits, packed rows), ...) of the blocks that ``rows`` tells.

    Args:
        rows: seven whole numbers: where the blocks of 8, 6, 5, 4, 3 and 2 bits end, and a mask with bit b - 1 set for
            each width b that there is.

    Raises:
        ValueError: something else.
    """
    whole = isinstance(rows, (list, tuple)) and all(type(v) is int for v in rows)
    if not whole or len(rows) != len(MIXED_BITS) + 1:
        raise ValueError(f"rows must be a list of 7 whole numbers, got {rows!r}")
    ends, mask = list(rows[:-1]), rows[-1]
    counts = [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    if min(counts) < 0 or ends[-1] < 1:
        raise ValueError(f"rows must be ends of blocks, rising to the number of inputs, got {ends}")
    blocks = tuple((bits, n) for bits, n in zip(MIXED_BITS, counts, strict=True) if n)
    wanted = sum(1 << (bits - 1) for bits, _ in blocks)
    if mask != wanted:
        raise ValueError(f"the last of rows is a mask of the widths, expected {wanted} for {blocks}, got {mask}")
    return blocks


def pack_zero_points(points: Tensor, bits: int) -> Tensor:
    """Zero points as GPTQ stores them: ``(groups, out)`` integers to int32 ``(groups, ceil(out / 32) * bits)``.

    Raises:
        ValueError: a zero point outside of 1..2^bits: what is stored is one less, so 0 has no code.
    """
    low, high = (int(points.min()), int(points.max())) if points.numel() else (1, 1)
    if low < 1 or high > 1 << bits:
        raise ValueError(
            f"zero points of {bits} bits stored as one less must lie in 1..{1 << bits}, got values from {low} to "
            f"{high}; store such a layer with float zeros"
        )
    return pack(points - 1, bits).T.contiguous()


def unpack_zero_points(zeros: Tensor, bits: int, out_features: int) -> Tensor:
    """Undo :func:`pack_zero_points`: int64 ``(groups, out)``, 1..2^bits.

    Raises:
        ValueError: wrong dtype or shape.
    """
    expected = word_rows(out_features, bits)
    tight = -(-out_features * bits // WORD_BITS)  # other programs leave no padding beyond the last word
    if zeros.dtype != torch.int32 or zeros.dim() != 2 or zeros.shape[1] not in (expected, tight):
        raise ValueError(
            f"packed zeros must be int32 (groups, {expected}) for {out_features} outputs of {bits} bits, got "
            f"{zeros.dtype} {tuple(zeros.shape)}"
        )
    padding = zeros.new_zeros(zeros.shape[0], expected - zeros.shape[1])
    return unpack(torch.cat((zeros, padding), 1).T, bits, out_features).long() + 1


def _in_features(weight: WeightAttributes, index: Tensor | None, given: int | None, mixed: bool) -> int:
    sizes: dict[str, int] = {} if given is None else {"in_features": given}
    if index is not None:
        sizes["q_perm" if weight.layer_type == 2 else "g_idx"] = index.numel()
    if weight.layer_type == 2 and weight.q_group_map is not None:
        sizes["q_group_map"] = weight.q_group_map.numel() // 2
    if mixed:
        sizes["rows"] = sum(n for _, n in check_rows(weight.rows))
    if len(set(sizes.values())) > 1:
        raise ValueError(f"the attributes tell different numbers of inputs: {sizes}")
    return next(iter(sizes.values())) if sizes else weight.data.shape[0] * WORD_BITS // weight.w_bit


def _blocks(weight: WeightAttributes, K: int, mixed: bool) -> tuple[tuple[int, int, int], ...]:
    held = weight.data.shape[0]
    widths = check_rows(weight.rows) if mixed else ((weight.w_bit, K),)
    whole = tuple((bits, rows, word_rows(rows, bits)) for bits, rows in widths)
    if sum(words for _, _, words in whole) == held:
        return whole
    # Other programs end a block after 16 rows where that fills whole words.
    tight = tuple((bits, rows, rows * bits // WORD_BITS) for bits, rows in widths)
    cut = [(bits, rows) for bits, rows in widths if rows * bits % WORD_BITS]
    if sum(words for _, _, words in tight) == held and not cut:
        return tight
    raise ValueError(
        f"the data has {held} word rows, expected {sum(words for _, _, words in whole)}: blocks of (bits, rows) "
        f"{widths}" + (f", of which {cut} fill no whole words" if cut else "")
    )


def _groups(weight: WeightAttributes, K: int, count: int) -> Tensor:
    device = weight.data.device
    if weight.layer_type == 1 and weight.g_idx is not None:
        return weight.g_idx.long()
    if weight.layer_type == 2 and weight.q_group_map is not None:
        return unsigned(weight.q_group_map)[0::2].contiguous()
    size = weight.group_size if weight.group_size > 0 else -(-K // max(count, 1))
    if -(-K // size) != count:
        raise ValueError(f"scales has {count} groups, expected {-(-K // size)}: {K} inputs in groups of {size}")
    return torch.arange(K, device=device) // size
