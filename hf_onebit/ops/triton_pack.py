"""A Triton kernel that packs codes into words."""

import triton
import triton.language as tl


@triton.jit
def pack_units(codes, words, N, K, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """Codes ``(N, K)`` uint8, each within ``BITS`` bits, to words ``(units * BITS, N)``: one unit of BLOCK outputs a
    program. Inputs that fill up the last unit are 0."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    unit = tl.program_id(1)
    inside = n < N
    rows = codes + n.to(tl.int64) * K
    out = words + unit.to(tl.int64) * BITS * N + n
    for w in tl.static_range(BITS):
        word = tl.zeros((BLOCK,), tl.int32)
        for slot in tl.static_range(32):
            first = slot * BITS - 32 * w  # of the code's bits, within this word
            if first > -BITS and first < 32:
                k = unit * 32 + slot
                q = tl.load(rows + k, mask=inside & (k < K), other=0).to(tl.int32)
                if first >= 0:
                    word |= q << first
                else:  # it began in the word before
                    word |= q >> -first
        tl.store(out + w * N, word, mask=inside)
