"""Pack small unsigned codes into 32-bit words, and back. The one bit order of this package.

A matrix of codes ``(out, in)`` with ``bits`` bits each becomes int32 words ``(ceil(in / 32) * bits, out)``:
words run down the input dimension and lie side by side over the outputs. The 32 codes of inputs 32k .. 32k+31
of one output are one little-endian bit stream of ``32 * bits`` bits, cut into ``bits`` words; word row
``k * bits + w`` holds word w. Code i takes stream bits ``i * bits`` to ``i * bits + bits - 1``, its least
significant bit first. Codes past the last input are zero. Bit 31 of a word is the sign bit of its int32.

One column, inputs 32k .. 32k+31, most significant bit on the left; a number is the input (minus 32k) that
owns the bit::

    1 bit                bit 31  30  29  28  27  26  25  24   ...    7   6   5   4   3   2   1   0
      word row k             31  30  29  28  27  26  25  24   ...    7   6   5   4   3   2   1   0

    2 bits               bit 31  30  29  28  27  26  25  24   ...    7   6   5   4   3   2   1   0
      word row 2k            15  15  14  14  13  13  12  12   ...    3   3   2   2   1   1   0   0
      word row 2k+1          31  31  30  30  29  29  28  28   ...   19  19  18  18  17  17  16  16

    3 bits               bit 31  30  29  28  27  26  25  24   ...    7   6   5   4   3   2   1   0
      word row 3k            10  10   9   9   9   8   8   8   ...    2   2   1   1   1   0   0   0
      word row 3k+1          21  20  20  20  19  19  19  18   ...   13  12  12  12  11  11  11  10
      word row 3k+2          31  31  31  30  30  30  29  29   ...   23  23  23  22  22  22  21  21

At 3, 5, 6 and 7 bits some codes straddle two words, as codes 10 and 21 do above: the low bits end one word,
the high bits begin the next.
"""

import torch
from torch import Tensor

WORD_BITS = 32
# min and max exist for few of the wide unsigned dtypes.
_REDUCIBLE = {torch.uint16: torch.int32, torch.uint32: torch.int64, torch.uint64: torch.int64}


def word_rows(in_features: int, bits: int = 1) -> int:
    """Rows of 32-bit words that ``in_features`` codes of ``bits`` bits take: ceil(in_features / 32) * bits.

    Raises:
        ValueError: ``bits`` is outside 1..8 or ``in_features`` is negative.
    """
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be between 1 and 8, got {bits}")
    if in_features < 0:
        raise ValueError(f"in_features must not be negative, got {in_features}")
    return (in_features + WORD_BITS - 1) // WORD_BITS * bits


def pack(codes: Tensor, bits: int, check: bool = True) -> Tensor:
    """Pack codes into words.

    Args:
        codes: ``(..., out, in)``, bool or any integer dtype, values 0 .. 2^bits - 1, any strides.
        bits: width of one code, 1..8.
        check: look at the values. It reads the whole tensor and waits for the device, so code that is traced,
            or that has just clamped the codes, passes False; values out of range then corrupt their
            neighbours. Meta tensors have no values and are never looked at.

    Returns:
        int32 ``(..., ceil(in / 32) * bits, out)``, contiguous.

    Raises:
        ValueError: wrong dtype, fewer than two dimensions, ``bits`` outside 1..8, or a value out of range.
    """
    if codes.is_floating_point() or codes.is_complex():
        raise ValueError(
            f"pack: codes must be bool or integers, got {codes.dtype}; round them first, e.g. codes.to(torch.uint8)"
        )
    if codes.dim() < 2:
        raise ValueError(f"pack: codes must have shape (..., out, in), got {tuple(codes.shape)}")
    *batch, out_features, in_features = codes.shape
    rows = word_rows(in_features, bits)
    if check:
        check_codes(codes, bits)

    # Transposed once as bytes, so that each of the 32 steps below reads and writes whole contiguous rows.
    columns = codes.to(torch.uint8).transpose(-1, -2).contiguous()
    words = torch.zeros(*batch, rows, out_features, dtype=torch.int32, device=codes.device)
    blocks = words.view(*batch, rows // bits, bits, out_features)
    for i in range(WORD_BITS):
        code = columns[..., i::WORD_BITS, :].to(torch.int32)
        filled = blocks[..., : code.shape[-2], :, :]  # the last block of 32 inputs may end before input i
        word, shift = divmod(i * bits, WORD_BITS)
        filled[..., word, :] |= code << shift
        if shift + bits > WORD_BITS:
            filled[..., word + 1, :] |= code >> (WORD_BITS - shift)
    return words


def unpack(words: Tensor, bits: int, in_features: int) -> Tensor:
    """Undo :func:`pack`.

    Args:
        words: int32 ``(..., ceil(in_features / 32) * bits, out)``, any strides.
        bits: width of one code, 1..8.
        in_features: how many codes each column holds; what the last words hold beyond it is ignored.

    Returns:
        uint8 ``(..., out, in_features)``, contiguous.

    Raises:
        ValueError: wrong dtype or shape of ``words``, or ``bits`` outside 1..8.
    """
    return unpack_rows(words, bits, in_features).transpose(-1, -2).contiguous()


def unpack_rows(words: Tensor, bits: int, in_features: int) -> Tensor:
    """:func:`unpack` in the words' order: uint8 ``(..., in_features, out)``, contiguous, one copy less."""
    rows = word_rows(in_features, bits)
    if words.dtype != torch.int32:
        raise ValueError(f"unpack: words must be torch.int32, got {words.dtype}")
    if words.dim() < 2 or words.shape[-2] != rows:
        raise ValueError(
            f"unpack: {in_features} inputs of {bits} bits take {rows} word rows, shape (..., {rows}, out), got "
            f"{tuple(words.shape)}"
        )
    *batch, _, out_features = words.shape
    codes = torch.empty(*batch, in_features, out_features, dtype=torch.uint8, device=words.device)
    for i in range(WORD_BITS):
        target = codes[..., i::WORD_BITS, :]
        blocks = target.shape[-2]
        word, shift = divmod(i * bits, WORD_BITS)
        here = min(bits, WORD_BITS - shift)  # bits of this code in this word
        # int32 shifts drag the sign bit along: mask after shifting right.
        code = words[..., word::bits, :][..., :blocks, :] >> shift & ((1 << here) - 1)
        if here < bits:
            rest = words[..., word + 1 :: bits, :][..., :blocks, :] & ((1 << (bits - here)) - 1)
            code = code | rest << here
        target.copy_(code)
    return codes


def check_codes(codes: Tensor, bits: int) -> None:
    """Refuse codes that do not lie within ``bits`` bits; ValueError. It reads them all, and waits for the device."""
    if codes.dtype == torch.bool or codes.is_meta or codes.numel() == 0:
        return
    values = codes.to(_REDUCIBLE.get(codes.dtype, codes.dtype))
    low, high = int(values.min()), int(values.max())
    if low < 0 or high >= 1 << bits:
        raise ValueError(
            f"pack: codes of {bits} bits must lie in 0..{(1 << bits) - 1}, got values from {low} to {high}; clamp them "
            "or raise bits"
        )
