"""Triton kernels of one optimizer step on packed words: read, moved, packed and written in one pass.

The rule is that of algorithms/update.py, in float32 and in the order of operations of nn/packed_update.py, and the
random words are those of algorithms/counter_random.py (Philox 4x32-10, a function of seed, step, stream, row and column
alone): so codes and moments come out as on the CPU, to the bit. Roundings count, hence exact roots and quotients, and
launches that fuse no multiplication with an addition.

A program takes a *unit*, 32 packed rows, of BLOCK columns: ``bits`` words in, ``bits`` words out. Its codes are taken
one after the other, so every shift is known when the kernel is compiled; one call of the generator serves four rows.
"""

import triton
import triton.language as tl


@triton.jit
def _fraction(word):
    """A random word as a number of [0, 1]."""
    return word.to(tl.float32) * 2.3283064365386963e-10  # 2^-32


@triton.jit
def _average(state, at, value, inside, beta, rest, HAS: tl.constexpr):
    """β state + (1 - β) value, written to the state and rounded to its dtype; from zero where there is none."""
    if HAS:
        moved = tl.load(state + at, mask=inside, other=0.0).to(tl.float32) * beta
        moved = (moved + value * rest).to(state.dtype.element_ty)
        tl.store(state + at, moved, mask=inside)
        return moved.to(tl.float32)
    return value * rest


@triton.jit
def _draw(row, column, step, stream, seed, seed_high):
    """The four random words of rows 4 · (row // 4) and following."""
    zero = tl.zeros_like(column)
    c0 = (zero + (row >> 2)).to(tl.uint32, bitcast=True)
    c1 = column.to(tl.uint32, bitcast=True)
    c2 = (zero + step).to(tl.uint32, bitcast=True)
    c3 = (zero + stream).to(tl.uint32, bitcast=True)
    k0 = (zero + seed).to(tl.uint32, bitcast=True)
    k1 = (zero + seed_high).to(tl.uint32, bitcast=True)
    return tl.philox_impl(c0, c1, c2, c3, k0, k1)


@triton.jit
def _lane(w0, w1, w2, w3, lane):
    return tl.where(lane < 2, tl.where(lane == 0, w0, w1), tl.where(lane == 2, w2, w3))


@triton.jit
def _scale(scales, scales_stride, inner, group, row, n, inside, valid, SIGNS: tl.constexpr):
    """The distance of two codes in a row, and of signs half of it too."""
    if SIGNS:
        b = tl.load(inner + row, mask=valid, other=0.0).to(tl.float32)
        half = tl.load(scales + n, mask=inside, other=0.0).to(tl.float32) * b
        return half * 2, half
    g = tl.load(group + row, mask=valid, other=0).to(tl.int64)
    scale = tl.load(scales + g * scales_stride + n, mask=inside, other=0.0).to(tl.float32)
    return scale, scale


@triton.jit
def _code(word, following, shift: tl.constexpr, BITS: tl.constexpr):
    """The code that begins at bit ``shift`` of a word and may go on in the next."""
    # An arithmetic shift drags the sign along; the mask takes it away again.
    if shift + BITS <= 32:
        q = (word >> shift) & ((1 << BITS) - 1)
    else:
        q = (word >> shift) & ((1 << (32 - shift)) - 1)
        q = (q | (following << (32 - shift))) & ((1 << BITS) - 1)
    return q


# Numbers that change from layer to layer and step to step make no variants of the kernels.
@triton.jit(do_not_specialize=["N", "rows", "held", "row0", "column0", "seed", "seed_high", "step", "stream"])
def move(
    words,
    gradient,
    first,
    second,
    perm,
    group,
    scales,
    zeros,
    inner,
    tally,
    N,
    rows,
    held,
    row0,
    column0,
    words_stride,
    gradient_stride,
    first_stride,
    second_stride,
    scales_stride,
    seed,
    seed_high,
    step,
    stream,
    beta1,
    rest1,
    beta2,
    rest2,
    eps,
    eta,
    decay,
    middle,
    BITS: tl.constexpr,
    DIRECTION: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    PERM: tl.constexpr,
    SIGNS: tl.constexpr,
    ZEROS: tl.constexpr,
    DECAY: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ALIGNED: tl.constexpr,
    TALLY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The step of one row block: ``rows`` codes of BITS bits a column, packed rows row0 and following.

    ``words`` begin with the block, everything else with the layer. ``gradient`` is a direction if DIRECTION. Of the
    moments those are kept that FIRST and SECOND say. ZEROS: 0 for a code ``middle`` that means 0, 1 for offsets, 2 for
    offsets in codes. ``tally`` float32 (programs, 5): codes changed, at an end; Σ|d|, Σd², Σ variance of the rounding.
    """
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    unit = tl.program_id(1)
    column = n < N
    at_word = words + (unit * BITS).to(tl.int64) * words_stride + n
    zero = tl.zeros((BLOCK,), tl.float32)
    changed, at_end, moved_by, squares, variance = zero, zero, zero, zero, zero
    word = tl.load(at_word, mask=column & (unit * BITS < held), other=0)
    following = word
    packed = tl.zeros((BLOCK,), tl.int32)
    w0 = tl.zeros((BLOCK,), tl.uint32)
    w1, w2, w3 = w0, w0, w0
    for slot in tl.static_range(32):
        row = row0 + unit * 32 + slot
        valid = unit * 32 + slot < rows
        inside = column & valid
        source = row.to(tl.int64)
        if PERM:
            source = tl.load(perm + row, mask=valid, other=0).to(tl.int64)
        u = tl.load(gradient + source * gradient_stride + n, mask=inside, other=0.0).to(tl.float32)
        if not DIRECTION:
            v = _average(second, source * second_stride + n, u * u, inside, beta2, rest2, SECOND)
            m = _average(first, source * first_stride + n, u, inside, beta1, rest1, FIRST)
            u = tl.div_rn(m, tl.sqrt_rn(v) + eps)
        u = u * eta
        scale, half = _scale(scales, scales_stride, inner, group, row, n, inside, valid, SIGNS)
        if slot * BITS % 32 + BITS > 32:
            following = tl.load(
                at_word + (slot * BITS // 32 + 1) * words_stride,
                mask=column & (unit * BITS + slot * BITS // 32 + 1 < held),
                other=0,
            )
        q = _code(word, following, slot * BITS % 32, BITS)
        code = q.to(tl.float32)
        if DECAY:
            if SIGNS:
                offset = half
            elif ZEROS == 0:
                offset = scale * middle
            else:
                g = tl.load(group + row, mask=valid, other=0).to(tl.int64)
                offset = tl.load(zeros + g * scales_stride + n, mask=inside, other=0.0).to(tl.float32)
                if ZEROS == 2:
                    offset = scale * offset
            u = u + (code * scale - offset) * decay
        d = tl.where(scale == 0, 0.0, tl.div_rn(-u, tl.where(scale == 0, 1.0, scale)))
        size = tl.abs(d)
        if TALLY:
            rest = size - tl.floor(size)
            moved_by += tl.where(inside, size, 0.0)
            squares += tl.where(inside, size * size, 0.0)
            variance += tl.where(inside, rest * (1 - rest), 0.0)
        # No code has more levels. NaN, of no scale and no step, moves nothing.
        size = tl.where(size == size, tl.minimum(size, 256.0), 0.0)
        if STOCHASTIC:
            if ALIGNED:
                if slot % 4 == 0:
                    w0, w1, w2, w3 = _draw(row, n + column0, step, stream, seed, seed_high)
                if slot % 4 == 0:
                    drawn = w0
                elif slot % 4 == 1:
                    drawn = w1
                elif slot % 4 == 2:
                    drawn = w2
                else:
                    drawn = w3
            else:
                r0, r1, r2, r3 = _draw(row, n + column0, step, stream, seed, seed_high)
                drawn = _lane(r0, r1, r2, r3, row & 3)
            whole = tl.floor(size)
            size = whole + tl.where(_fraction(drawn) < size - whole, 1.0, 0.0)
        else:
            size = (size + 8388608.0) - 8388608.0  # 2^23: to the nearest, halves to even
        new = tl.where(d < 0, code - size, code + size)
        new = tl.minimum(tl.maximum(new, 0.0), (1 << BITS) - 1).to(tl.int32)
        new = tl.where(inside, new, 0)  # padding is zeros
        if TALLY:
            changed += tl.where(inside & (new != q), 1.0, 0.0)
            at_end += tl.where(inside & ((new == 0) | (new == (1 << BITS) - 1)), 1.0, 0.0)
        packed = packed | (new << (slot * BITS % 32))
        if slot * BITS % 32 + BITS >= 32:
            tl.store(
                at_word + (slot * BITS // 32) * words_stride,
                packed,
                mask=column & (unit * BITS + slot * BITS // 32 < held),
            )
            if slot * BITS % 32 + BITS > 32:
                word = following
                packed = new >> (32 - slot * BITS % 32)
            elif slot < 31:
                packed = tl.zeros((BLOCK,), tl.int32)
                word = tl.load(
                    at_word + (slot * BITS // 32 + 1) * words_stride,
                    mask=column & (unit * BITS + slot * BITS // 32 + 1 < held),
                    other=0,
                )
    if TALLY:
        place = tally + (unit * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * 5
        tl.store(place, tl.sum(changed, 0))
        tl.store(place + 1, tl.sum(at_end, 0))
        tl.store(place + 2, tl.sum(moved_by, 0))
        tl.store(place + 3, tl.sum(squares, 0))
        tl.store(place + 4, tl.sum(variance, 0))


@triton.jit(do_not_specialize=["N", "K"])
def begin_flips(
    gradient,
    first,
    perm,
    group,
    scales,
    inner,
    squares,
    N,
    K,
    gradient_stride,
    first_stride,
    scales_stride,
    beta1,
    rest1,
    DIRECTION: tl.constexpr,
    FIRST: tl.constexpr,
    PERM: tl.constexpr,
    SIGNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The first moment of all rows, and float32 ``squares`` (units, N): of its 32 rows where the scale is not 0."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    unit = tl.program_id(1)
    total = tl.zeros((BLOCK,), tl.float32)
    for slot in range(32):
        row = unit * 32 + slot
        valid = row < K
        inside = (n < N) & valid
        source = row.to(tl.int64)
        if PERM:
            source = tl.load(perm + row, mask=valid, other=0).to(tl.int64)
        m = tl.load(gradient + source * gradient_stride + n, mask=inside, other=0.0).to(tl.float32)
        if not DIRECTION:
            m = _average(first, source * first_stride + n, m, inside, beta1, rest1, FIRST)
        scale, _ = _scale(scales, scales_stride, inner, group, row, n, inside, valid, SIGNS)
        total += tl.where(scale == 0, 0.0, m * m)
    tl.store(squares + unit.to(tl.int64) * N + n, total, mask=n < N)


@triton.jit(do_not_specialize=["N", "K", "column0", "seed", "seed_high", "step", "stream"])
def flip(
    words,
    gradient,
    first,
    inertia,
    perm,
    group,
    scales,
    inner,
    root,
    tally,
    N,
    K,
    column0,
    words_stride,
    gradient_stride,
    first_stride,
    inertia_stride,
    scales_stride,
    seed,
    seed_high,
    step,
    stream,
    rest1,
    keep,
    rest_keep,
    rest2,
    share,
    eps,
    lr,
    start,
    DIRECTION: tl.constexpr,
    FIRST: tl.constexpr,
    INERTIA: tl.constexpr,
    PERM: tl.constexpr,
    SIGNS: tl.constexpr,
    TALLY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Votes, inertia and flips of one-bit codes; ``begin_flips`` moved ``first``, ``root`` is made of its squares.

    ``share`` is what a vote is multiplied with before rest_keep, so that both together are 1 - β₂; without INERTIA n
    is at its start, ``start`` times a random fraction against the sign. ``tally`` as in ``move``: changed, at an end,
    votes against the sign.
    """
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    unit = tl.program_id(1)
    column = n < N
    at_word = words + unit.to(tl.int64) * words_stride + n
    word = tl.load(at_word, mask=column, other=0)
    size = tl.load(root + n, mask=column, other=0.0) * 1.0
    packed = tl.zeros((BLOCK,), tl.int32)
    zero = tl.zeros((BLOCK,), tl.float32)
    changed, at_end, against = zero, zero, zero
    w0 = tl.zeros((BLOCK,), tl.uint32)
    w1, w2, w3 = w0, w0, w0
    for slot in tl.static_range(32):
        row = unit * 32 + slot
        valid = row < K
        inside = column & valid
        source = row.to(tl.int64)
        if PERM:
            source = tl.load(perm + row, mask=valid, other=0).to(tl.int64)
        if FIRST and not DIRECTION:
            m = tl.load(first + source * first_stride + n, mask=inside, other=0.0).to(tl.float32)
        else:
            m = tl.load(gradient + source * gradient_stride + n, mask=inside, other=0.0).to(tl.float32)
            if not DIRECTION:
                m = m * rest1
        scale, _ = _scale(scales, scales_stride, inner, group, row, n, inside, valid, SIGNS)
        m = tl.where(scale > 0, m, tl.where(scale < 0, -m, 0.0))
        below = tl.abs(m) + size * eps
        vote = tl.where(below == 0, 0.0, tl.div_rn(m, tl.where(below == 0, 1.0, below))) * lr
        q = (word >> slot) & 1
        sign = 1.0 - 2.0 * q.to(tl.float32)
        if INERTIA:
            at = inertia + row.to(tl.int64) * inertia_stride + n
            state = tl.load(at, mask=inside, other=0.0).to(tl.float32) * keep
            state = (state + vote * share * rest_keep).to(inertia.dtype.element_ty)
            tl.store(at, state, mask=inside)
            state = state.to(tl.float32)
        else:
            if slot % 4 == 0:
                w0, w1, w2, w3 = _draw(row, n + column0, step, stream, seed, seed_high)
                drawn = w0
            elif slot % 4 == 1:
                drawn = w1
            elif slot % 4 == 2:
                drawn = w2
            else:
                drawn = w3
            state = _fraction(drawn) * start * sign * keep + vote * rest2
        new = tl.where(state > 0, 0, tl.where(state < 0, 1, q))
        new = tl.where(inside, new, 0)  # padding is zeros
        if TALLY:
            changed += tl.where(inside & (new != q), 1.0, 0.0)
            at_end += tl.where(inside, 1.0, 0.0)
            against += tl.where(inside & (m * sign < 0), 1.0, 0.0)
        packed = packed | (new << slot)
    tl.store(at_word, packed, mask=column)
    if TALLY:
        place = tally + (unit * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * 5
        tl.store(place, tl.sum(changed, 0))
        tl.store(place + 1, tl.sum(at_end, 0))
        tl.store(place + 2, tl.sum(against, 0))
        tl.store(place + 3, 0.0)
        tl.store(place + 4, 0.0)
