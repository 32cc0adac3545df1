"""Triton kernels for codes whose inputs name their groups (``g_idx``): products with few rows of x."""

import triton
import triton.language as tl

from hf_onebit.ops.triton_kernels import _values


@triton.jit(do_not_specialize=["C", "splits"])
def multiply_indexed(
    u,
    weight,
    scales,
    zeros,
    index,
    result,
    C,
    N,
    K,
    KU,
    KUP,
    groups,
    splits,
    units_a_split,
    BITS: tl.constexpr,
    ZEROS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ASM: tl.constexpr,
):
    """As ``multiply`` for codes, with the scale of group ``index[k]`` for input k; NaN where there is no such group.

    The scales of a tile's outputs are a few KiB, which stay in the nearest cache: each is read again for every input.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    slice_ = tl.program_id(2)
    begin = slice_ * units_a_split
    end = tl.minimum(begin + units_a_split, KU)
    unit = tl.arange(0, 16)
    filled = c < C
    u += c.to(tl.int64)[None, :] * (32 * KUP) + unit[:, None]
    accumulator = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    MIDDLE: tl.constexpr = (1 << BITS) // 2 if BITS > 1 else 0
    OFFSET: tl.constexpr = ZEROS or BITS == 1
    for start in range(begin, end, 16):
        at = start + unit
        inside = (at < end)[None, :] & (n < N)[:, None]
        rows = weight + (at * BITS)[None, :] * N + n[:, None]
        column = u + start * 32
        word = tl.load(rows, mask=inside, other=0)
        for w in tl.static_range(BITS):
            following = word
            if w + 1 < BITS:
                following = tl.load(rows + (w + 1) * N, mask=inside, other=0)
            low = word.to(tl.int16)
            high = (word >> 16).to(tl.int16)
            next_low = following.to(tl.int16)
            for slot in tl.static_range(32):
                if slot * BITS // 32 == w:
                    k = at * 32 + slot
                    real = (at < end) & (k < K)  # the last unit may be filled up: those codes count nothing
                    group = tl.load(index + k, mask=real, other=0).to(tl.int32)
                    known = real & (group >= 0) & (group < groups)
                    place = tl.where(known, group, 0)[None, :] * N + n[:, None]
                    s = tl.load(scales + place, mask=known[None, :] & (n < N)[:, None], other=0.0)
                    scale = tl.where((real & ~known)[None, :], float("nan"), s.to(tl.float32)).to(tl.float16)
                    offset = scale
                    if ZEROS:
                        z = tl.load(zeros + place, mask=known[None, :] & (n < N)[:, None], other=0.0)
                        offset = (s.to(tl.float32) * MIDDLE - z.to(tl.float32)).to(tl.float16)
                    elif BITS == 1:
                        offset = (s.to(tl.float32) * -0.5).to(tl.float16)
                    first = low if slot * BITS % 32 < 16 else high
                    second = high if slot * BITS % 32 < 16 else next_low
                    A = _values(first, second, scale, offset, slot * BITS % 16, BITS, MIDDLE, OFFSET, ASM)
                    X = tl.load(column + slot * 16, mask=filled[None, :], other=0.0)
                    accumulator = tl.dot(A, X, accumulator)
            word = following
    out = result + (slice_ * C + c).to(tl.int64)[None, :] * N + n[:, None]
    tl.store(out, accumulator, mask=(n < N)[:, None] & (c < C)[None, :])
