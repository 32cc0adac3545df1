"""Triton kernels of a mixture of experts: one launch multiplies each row by the packed weight of its own expert.

Rows (a token and one of its experts) are sorted by expert; a *tile* is up to ROWS of them that share one. The weights
stay where they are: tables hold their addresses. The products are those of triton_kernels.py.
"""

import triton
import triton.language as tl

from hf_onebit.ops.triton_kernels import _prepare_row, accumulate


@triton.jit
def _pointer(table, expert, like):
    """Entry ``expert`` of a table of addresses, as a pointer of the type of ``like``, on 16 bytes."""
    return tl.multiple_of(tl.load(table + expert).to(like.dtype), 16)


@triton.jit(do_not_specialize=["P", "E"])
def prepare_experts(
    x,
    tokens,
    experts,
    inner,
    like,
    u,
    norm,
    K,
    KU,
    x_stride,
    P,
    E,
    HAS_B: tl.constexpr,
    PARTS: tl.constexpr,
    UNITS: tl.constexpr,
):
    """u = (b ⊙ x) · 2^e of each row, of its token's x and its expert's b; as ``prepare``. Rows of no expert: zeros."""
    row = tl.program_id(0)
    expert = tl.load(experts + row)
    known = (expert >= 0) & (expert < E)
    source = x + tl.load(tokens + row).to(tl.int64) * x_stride
    out = u + row.to(tl.int64) * 32 * KU
    back = 0.0
    if known:
        b = source
        if HAS_B:
            b = _pointer(inner, expert, like)
        back = _prepare_row(source, b, out, out + P.to(tl.int64) * 32 * KU, K, KU, HAS_B, PARTS, UNITS * 32)
    tl.store(norm + row, back)


@triton.jit(do_not_specialize=["P", "splits"])
def multiply_experts(
    u,
    weights,
    scales,
    zeros,
    like_weight,
    like_scale,
    tile_expert,
    tile_begin,
    tile_end,
    result,
    P,
    N,
    KU,
    KUP,
    splits,
    units_a_split,
    group_units,
    BITS: tl.constexpr,
    MPQ: tl.constexpr,
    ZEROS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ASM: tl.constexpr,
):
    """Products of the rows of each tile with a slice of units: float32 ``(splits, PARTS, P, N)``.

    Grid: (outputs / BLOCK_N, tiles, splits). A tile that begins where it ends has no rows.
    """
    tile = tl.program_id(1)
    slice_ = tl.program_id(2)
    first = tl.load(tile_begin + tile)
    last = tl.load(tile_end + tile)
    if first < last:
        expert = tl.load(tile_expert + tile)
        ROWS: tl.constexpr = BLOCK_C // PARTS
        n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        column = tl.arange(0, BLOCK_C)
        row = first + column % ROWS
        filled = row < last
        c = column // ROWS * P + row
        begin = slice_ * units_a_split
        end = tl.minimum(begin + units_a_split, KU)
        weight = _pointer(weights, expert, like_weight)
        scale = like_scale
        zero = like_scale
        if MPQ:
            scale = _pointer(scales, expert, like_scale)
            if ZEROS:
                zero = _pointer(zeros, expert, like_scale)
        inputs = u + c.to(tl.int64)[None, :] * (32 * KUP) + tl.arange(0, 16)[:, None]
        total = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
        total = accumulate(
            total, inputs, weight, scale, zero, n, filled, N, begin, end, group_units, BITS, MPQ, ZEROS, ASM
        )
        out = result + (slice_ * PARTS * P + c).to(tl.int64)[None, :] * N + n[:, None]
        tl.store(out, total, mask=(n < N)[:, None] & filled[None, :])


@triton.jit(do_not_specialize=["P", "E", "TERMS"])
def reduce_experts(
    partial,
    norm,
    experts,
    outer,
    biases,
    like_scale,
    like_bias,
    y,
    P,
    E,
    N,
    TERMS,
    ROOM: tl.constexpr,
    MPQ: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y = a · norm · Σ partial + bias of each row, of its expert's a and bias; as ``reduce``. Rows of no expert: 0."""
    row = tl.program_id(0)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(experts + row)
    known = (expert >= 0) & (expert < E)
    inside = (n < N) & known
    term = tl.arange(0, ROOM)
    at = term.to(tl.int64) * P + row
    terms = tl.load(partial + at[:, None] * N + n[None, :], mask=(term < TERMS)[:, None] & inside[None, :], other=0.0)
    total = tl.sum(terms, 0) * tl.load(norm + row)
    entry = tl.where(known, expert, 0)
    if not MPQ:
        total *= tl.load(_pointer(outer, entry, like_scale) + n, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        total += tl.load(_pointer(biases, entry, like_bias) + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row.to(tl.int64) * N + n, total.to(y.dtype.element_ty), mask=n < N)
