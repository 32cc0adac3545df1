"""Pieces that formats of codes in groups share: sizes from shapes, orders of inputs, statistics as float16."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hf_onebit.formats.mbwq import pack_blocks
from hf_onebit.formats.packing import WORD_BITS, unpack_rows, word_rows


def agreed(name: str, what: str, sizes: dict[str, int | None]) -> int:
    """The one number that several sources tell.

    Args:
        name: the layer, for the error.
        what: what they tell, for the error.
        sizes: {source: number, or None where it is silent}.

    Raises:
        ValueError: they differ, or none tells.
    """
    told = {source: size for source, size in sizes.items() if size is not None}
    if len(set(told.values())) != 1:
        got = ", ".join(f"{source}: {size}" for source, size in told.items()) or "nothing that tells"
        raise ValueError(
            f"{name} tells different {what} ({got}): expected one number. The file is damaged, or its config is "
            "another model's: copy or download it again"
        )
    return next(iter(told.values()))


def whole_words(words: Tensor, in_features: int, bits: int, where: str) -> Tensor:
    """Words as this package keeps them: other programs end after the last input, not after the last 32 of them.

    Args:
        words: int32 ``(ceil(in_features * bits / 32), out)``, or with as many rows as here.
        in_features: inputs of the layer.
        bits: width of one code.
        where: for the error.

    Raises:
        ValueError: the number of rows is neither, or codes past the last input are set.
    """
    expected, tight = word_rows(in_features, bits), -(-in_features * bits // WORD_BITS)
    if words.dtype != torch.int32 or words.dim() != 2 or words.shape[0] not in (expected, tight):
        raise ValueError(
            f"{where} is {words.dtype} {tuple(words.shape)}: expected torch.int32 ({expected}, outputs), {in_features} "
            f"inputs of {bits} bits. The file is damaged, or its config is another model's: copy or download it again"
        )
    missing = expected - words.shape[0]
    return torch.cat((words, words.new_zeros(missing, words.shape[1]))) if missing else words


def size_of_groups(name: str, in_features: int, groups: int, said: int | None, g_idx: Tensor | None) -> int:
    """How many inputs share a scale; -1 for all of them.

    Args:
        name: the layer, for errors.
        in_features: inputs of the layer.
        groups: rows of its scales.
        said: what the config says, or None.
        g_idx: the group of each input, or None.

    Raises:
        ValueError: no group size gives so many groups, or it is no multiple of 32.
    """
    if groups == 1:
        return -1
    candidates = [said] if said is not None and said > 0 else []
    if g_idx is not None:
        candidates.append(int(torch.bincount(g_idx.long(), minlength=groups).max()))
    candidates += [in_features // groups] if in_features % groups == 0 else []
    size = next((c for c in candidates if c > 0 and -(-in_features // c) == groups), None)
    if size is None:
        raise ValueError(
            f"{name} has {groups} groups for {in_features} inputs, and its config says group_size {said}: expected "
            "ceil(inputs / group_size) groups. The file is damaged or was edited: copy or download it again"
        )
    if size % WORD_BITS:
        raise ValueError(
            f"{name} has groups of {size} inputs: expected a multiple of {WORD_BITS}, which kernels here need. "
            "Quantize the float model with group_size 32, 64 or 128, or one for the whole row"
        )
    return size


def order_of_groups(g_idx: Tensor | None, group_size: int, in_features: int) -> tuple[str, Tensor | None]:
    """How inputs and groups lie: ("neighbours", None), ("q_perm", the input of each packed row) or ("g_idx", g_idx).

    Groups that are full can be brought together, which computes faster; others keep the list of each input's group.
    """
    if g_idx is None or group_size == -1:
        return "neighbours", None
    own = torch.arange(in_features) // group_size
    if torch.equal(g_idx.long(), own):
        return "neighbours", None
    perm = torch.argsort(g_idx.long(), stable=True)
    if torch.equal(g_idx.long()[perm], own):
        return "q_perm", perm.to(torch.int32)
    return "g_idx", g_idx.to(torch.int32)


def packed_in_order(words: Tensor, perm: Tensor, bits: int, group_size: int) -> Tensor:
    """The same codes with packed row r holding input ``perm[r]``."""
    in_features = perm.numel()
    codes = unpack_rows(words, bits, in_features)
    return pack_blocks(codes[perm.long()].T.contiguous(), ((bits, in_features, group_size),))


def half(values: Tensor, where: str) -> Tensor:
    """float16, once it is clear that float16 can hold the values.

    Raises:
        ValueError: a value is not finite, or not finite any more in float16.
    """
    result = values.to(torch.float16)
    if not bool(torch.isfinite(result).all()):
        bad = int(torch.isfinite(result).logical_not().sum())
        raise ValueError(
            f"{where} has {bad} values that are inf or nan, or that float16 cannot hold: expected at most 65504. The "
            "file is damaged, or such a layer must stay in floating point: quantize the float model without it"
        )
    return result


def require(name: str, tensors: Mapping[str, Tensor], needed: Sequence[str]) -> None:
    """Refuse a layer that lacks a tensor.

    Raises:
        ValueError: naming it.
    """
    missing = [part for part in needed if part not in tensors]
    if missing:
        raise ValueError(
            f"{name} has no tensor {missing[0]!r} in the files: expected {', '.join(needed)}. The file is incomplete: "
            "copy or download it again"
        )
