"""Triton kernels on packed words: tensor-core products, expansion to a float matrix, look-ups.

Everything here reads the words of formats/packing.py as they are. A *unit* is 32 inputs of one output, ``bits`` words;
*slot* s is the code of input 32 · unit + s. The kernels unpack slot by slot: a tile of words, loaded once, yields 32
tiles of codes by shifts and masks alone, without any exchange between threads. So the inputs are met in the order
(slot, unit), and ``prepare`` puts x into that order.

Outputs are the rows of the tensor-core product (y transposed), which lets the expanded codes stay in registers.
With ``ASM`` two codes are expanded at a time, in the halves of a register; without, the same is said in plain Triton,
for other compilers and for the interpreter.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def _sign_asm(slot):
    # Bit ``slot`` of each half to its sign; 0xBC00 is -1.0, so a set bit makes +1.0.
    shift = f"shl.b32 t, $1, {15 - slot % 16};"
    return "{ .reg .b32 t; " + shift + " lop3.b32 $0, t, 0x80008000, 0xBC00BC00, 0x6A; }"


@triton.constexpr_function
def _code_asm(shift, bits, middle, offset):
    # 0x6400 | q is 1024 + q in float16; minus 1024 + middle it is exact. Then times the scale, plus the offset.
    mask = ((1 << bits) - 1) * 0x10001
    first = min(bits, 16 - shift)
    low = ((1 << first) - 1) * 0x10001
    lines = [".reg .b32 t;", f"shr.b32 t, $1, {shift};" if shift else "mov.b32 t, $1;"]
    if first < bits:  # the code goes on in the next half
        lines += [
            f"and.b32 t, t, {low:#010x};",
            f".reg .b32 r; shl.b32 r, $2, {first};",
            f"lop3.b32 t, r, {mask - low:#010x}, t, 0xEA;",
            "or.b32 t, t, 0x64006400;",
        ]
    else:
        lines += [f"lop3.b32 t, t, {mask:#010x}, 0x64006400, 0xEA;"]
    lines += [f".reg .b32 m; mov.b32 m, {(0x6400 + middle) * 0x10001:#010x}; sub.f16x2 t, t, m;"]
    lines += ["fma.rn.f16x2 $0, t, $3, $4;" if offset else "mul.f16x2 $0, t, $3;"]
    return "{ " + " ".join(lines) + " }"


@triton.jit
def _signs(half, slot: tl.constexpr, ASM: tl.constexpr):
    """±1 in float16 from bit ``slot % 16`` of each int16."""
    if ASM:
        return tl.inline_asm_elementwise(_sign_asm(slot), "=r,r", [half], tl.float16, is_pure=True, pack=2)
    return (((half << (15 - slot % 16)) & -32768) ^ -17408).to(tl.float16, bitcast=True)


@triton.jit
def _values(
    first,
    second,
    scale,
    offset,
    shift: tl.constexpr,
    BITS: tl.constexpr,
    MIDDLE: tl.constexpr,
    OFFSET: tl.constexpr,
    ASM: tl.constexpr,
):
    """scale · (q - MIDDLE) + offset in float16; q begins at bit ``shift`` of ``first`` and may end in ``second``."""
    if ASM:
        return tl.inline_asm_elementwise(
            _code_asm(shift, BITS, MIDDLE, OFFSET),
            "=r,r,r,r,r",
            [first, second, scale, offset],
            tl.float16,
            is_pure=True,
            pack=2,
        )
    q = first >> shift
    if shift + BITS > 16:
        q = (q & ((1 << (16 - shift)) - 1)) | (second << (16 - shift))
    q = (q & ((1 << BITS) - 1)) | 0x6400
    value = (q.to(tl.float16, bitcast=True) - (1024 + MIDDLE)) * scale
    if OFFSET:
        value += offset
    return value


@triton.jit
def _prepare_row(x, b, high_out, low_out, K, KUP, HAS_B: tl.constexpr, PARTS: tl.constexpr, CHUNK: tl.constexpr):
    """(b ⊙ x) · 2^e of one row in float16, as ``prepare`` says; returns 2^-e."""
    lane = tl.arange(0, CHUNK)
    top = tl.zeros((CHUNK,), tl.float32)
    for start in range(0, KUP * 32, CHUNK):
        k = start + lane
        value = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
        if HAS_B:
            value *= tl.load(b + k, mask=k < K, other=0.0).to(tl.float32)
        top = tl.maximum(top, tl.abs(value))
    # The exponent of the largest, in its own bits; of zero and of subnormals that of the smallest normal number.
    exponent = (tl.max(top, 0).to(tl.int32, bitcast=True) >> 23) & 255
    exponent = tl.minimum(tl.maximum(exponent, 15), 240)
    scale = ((268 - exponent) << 23).to(tl.float32, bitcast=True)  # to 2^14 .. 2^15
    for start in range(0, KUP * 32, CHUNK):
        k = start + lane
        value = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
        if HAS_B:
            value *= tl.load(b + k, mask=k < K, other=0.0).to(tl.float32)
        value *= scale
        value = tl.permute(tl.reshape(value, (CHUNK // 512, 16, 32)), (0, 2, 1))
        value = tl.reshape(value, (CHUNK,))
        high = value.to(tl.float16)
        tl.store(high_out + k, high, mask=k < KUP * 32)
        if PARTS == 2:
            low = (value - high.to(tl.float32)).to(tl.float16)
            tl.store(low_out + k, low, mask=k < KUP * 32)
    return ((exponent - 14) << 23).to(tl.float32, bitcast=True)


# Counts that change from call to call: no variant of the kernel for each 1 and each multiple of 16.
@triton.jit(do_not_specialize=["M"])
def prepare(
    x,
    b,
    b_1,
    u,
    norm,
    K,
    KU,
    x_stride,
    M,
    HAS_B: tl.constexpr,
    PARTS: tl.constexpr,
    UNITS: tl.constexpr,
):
    """u = (b ⊙ x) · 2^e in float16, one program a row: ``(PARTS · M, KU / 16, 32, 16)``.

    So for 16 units at a time, KU a multiple of that, their first inputs lie side by side, then their second ones.

    2^-e goes to ``norm``; e brings the largest magnitude of the row to 2^13 .. 2^15. With two parts, the second holds
    what rounding took from the first.
    """
    row = tl.program_id(0)
    plane = tl.program_id(1)
    if plane == 1:
        b = b_1
    out = u + (plane * PARTS * M + row).to(tl.int64) * 32 * KU
    back = _prepare_row(
        x + row.to(tl.int64) * x_stride, b, out, out + M.to(tl.int64) * 32 * KU, K, KU, HAS_B, PARTS, UNITS * 32
    )
    tl.store(norm + plane * M + row, back)


@triton.jit
def accumulate(
    accumulator,
    u,
    weight,
    scales,
    zeros,
    n,
    filled,
    N,
    begin,
    end,
    group_units,
    BITS: tl.constexpr,
    MPQ: tl.constexpr,
    ZEROS: tl.constexpr,
    ASM: tl.constexpr,
):
    """Add the products of outputs ``n`` with units ``begin`` to ``end``; u points at (unit of 16, column)."""
    unit = tl.arange(0, 16)
    MIDDLE: tl.constexpr = (1 << BITS) // 2 if BITS > 1 else 0
    OFFSET: tl.constexpr = ZEROS or BITS == 1
    for start in range(begin, end, 16):
        at = start + unit
        inside = (at < end)[None, :] & (n < N)[:, None]
        rows = weight + (at * BITS)[None, :] * N + n[:, None]
        column = u + start * 32
        word = tl.load(rows, mask=inside, other=0)
        if MPQ:
            place = (at // group_units)[None, :] * N + n[:, None]
            s = tl.load(scales + place, mask=inside, other=0.0)
            scale = s.to(tl.float16)
            offset = scale
            if ZEROS:
                z = tl.load(zeros + place, mask=inside, other=0.0)
                offset = (s.to(tl.float32) * MIDDLE - z.to(tl.float32)).to(tl.float16)
            elif BITS == 1:
                offset = (s.to(tl.float32) * -0.5).to(tl.float16)
        for w in tl.static_range(BITS):
            following = word
            if w + 1 < BITS:
                following = tl.load(rows + (w + 1) * N, mask=inside, other=0)
            low = word.to(tl.int16)
            high = (word >> 16).to(tl.int16)
            next_low = following.to(tl.int16)
            for slot in tl.static_range(32):
                if slot * BITS // 32 == w:
                    first = low if slot * BITS % 32 < 16 else high
                    second = high if slot * BITS % 32 < 16 else next_low
                    if MPQ:
                        A = _values(first, second, scale, offset, slot * BITS % 16, BITS, MIDDLE, OFFSET, ASM)
                    else:
                        A = _signs(first, slot, ASM)
                    X = tl.load(column + slot * 16, mask=filled[None, :], other=0.0)
                    accumulator = tl.dot(A, X, accumulator)
            word = following
    return accumulator


@triton.jit(do_not_specialize=["C", "splits"])
def multiply(
    u,
    weight,
    weight_1,
    scales,
    zeros,
    result,
    C,
    N,
    KU,
    KUP,
    splits,
    units_a_split,
    group_units,
    BITS: tl.constexpr,
    MPQ: tl.constexpr,
    ZEROS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ASM: tl.constexpr,
):
    """Products of u's C columns with a slice of units: float32 ``(planes · splits, C, N)``, one slice a program.

    Grid: (outputs / BLOCK_N, columns / BLOCK_C, planes · splits). ``group_units`` is how many units share a scale.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    slice_ = tl.program_id(2)
    plane = slice_ // splits
    begin = (slice_ % splits) * units_a_split
    end = tl.minimum(begin + units_a_split, KU)
    if plane == 1:
        weight = weight_1
    unit = tl.arange(0, 16)
    u += (plane * C + c).to(tl.int64)[None, :] * (32 * KUP) + unit[:, None]
    accumulator = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    accumulator = accumulate(
        accumulator, u, weight, scales, zeros, n, c < C, N, begin, end, group_units, BITS, MPQ, ZEROS, ASM
    )
    out = result + (slice_ * C + c).to(tl.int64)[None, :] * N + n[:, None]
    tl.store(out, accumulator, mask=(n < N)[:, None] & (c < C)[None, :])


@triton.jit(do_not_specialize=["M", "TERMS"])
def reduce(
    partial,
    norm,
    a,
    a_1,
    bias,
    y,
    M,
    N,
    y_stride,
    TERMS,
    PLANES: tl.constexpr,
    ROOM: tl.constexpr,
    MPQ: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y = Σ_planes a · norm · Σ partial + bias, the TERMS = splits · parts added in one fixed order.

    ROOM is the power of two from TERMS on: all are loaded at once.
    """
    # Rows along the first dimension of the grid: the others end at 65535.
    row = tl.program_id(0)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = n < N
    term = tl.arange(0, ROOM)
    total = tl.zeros((BLOCK,), tl.float32)
    for plane in tl.static_range(PLANES):
        at = (plane * TERMS + term).to(tl.int64) * M + row
        terms = tl.load(
            partial + at[:, None] * N + n[None, :], mask=(term < TERMS)[:, None] & inside[None, :], other=0.0
        )
        part_sum = tl.sum(terms, 0) * tl.load(norm + plane * M + row)
        if not MPQ:
            factor = a if plane == 0 else a_1
            part_sum *= tl.load(factor + n, mask=inside, other=0.0).to(tl.float32)
        total += part_sum
    if BIAS:
        total += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row.to(tl.int64) * y_stride + n, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def expand(
    weight,
    weight_1,
    scales,
    scales_1,
    inner,
    inner_1,
    index,
    out,
    N,
    K,
    group_units,
    BITS: tl.constexpr,
    MPQ: tl.constexpr,
    ZEROS: tl.constexpr,
    PLANES: tl.constexpr,
    OUTER: tl.constexpr,
    INNER: tl.constexpr,
    CODES: tl.constexpr,
    INDEXED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A float matrix (K, N), neighbours in N, from the words; one unit of BLOCK outputs a program.

    Without MPQ: Σ_planes of the signs, times a (``scales``) if OUTER, times b (``inner``) if INNER. With MPQ:
    scales · q - zeros, where ``scales_1`` are the zeros, of the group that ``index`` names for each input if INDEXED
    (of ``group_units`` groups; NaN where there is none), else of neighbours. With CODES: q itself. In float32, rounded
    once.
    """
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    unit = tl.program_id(1)
    inside = n < N
    MIDDLE: tl.constexpr = 0.5 if BITS == 1 else (1 << BITS) // 2
    out += unit.to(tl.int64) * 32 * N
    rows = weight + unit.to(tl.int64) * BITS * N + n
    if MPQ and not INDEXED:
        place = (unit // group_units).to(tl.int64) * N + n
        scale = tl.load(scales + place, mask=inside, other=0.0).to(tl.float32)
        if ZEROS:
            zero = tl.load(scales_1 + place, mask=inside, other=0.0).to(tl.float32)
    elif OUTER and not MPQ:
        scale = tl.load(scales + n, mask=inside, other=0.0).to(tl.float32)
        if PLANES == 2:
            scale_1 = tl.load(scales_1 + n, mask=inside, other=0.0).to(tl.float32)
    if PLANES == 2:
        other = tl.load(weight_1 + unit.to(tl.int64) * N + n, mask=inside, other=0)
    word = tl.load(rows, mask=inside, other=0)
    for w in tl.static_range(BITS):
        following = word
        if w + 1 < BITS:
            following = tl.load(rows + (w + 1) * N, mask=inside, other=0)
        for slot in tl.static_range(32):
            if slot * BITS // 32 == w:
                # An arithmetic shift drags the sign along; the mask takes it away again.
                if slot * BITS % 32 + BITS <= 32:
                    q = (word >> (slot * BITS % 32)) & ((1 << BITS) - 1)
                else:  # the code goes on in the next word
                    q = (word >> (slot * BITS % 32)) & ((1 << (32 - slot * BITS % 32)) - 1)
                    q = (q | (following << (32 - slot * BITS % 32))) & ((1 << BITS) - 1)
                k = unit * 32 + slot
                if CODES:
                    value = q
                elif MPQ:
                    if INDEXED:
                        group = tl.load(index + k, mask=k < K, other=0).to(tl.int64)
                        known = inside & (group >= 0) & (group < group_units)
                        scale = tl.load(scales + group * N + n, mask=known, other=float("nan")).to(tl.float32)
                        if ZEROS:
                            zero = tl.load(scales_1 + group * N + n, mask=known, other=0.0).to(tl.float32)
                    if ZEROS:
                        value = q.to(tl.float32) * scale - zero
                    else:
                        value = (q.to(tl.float32) - MIDDLE) * scale
                else:
                    value = (q * 2 - 1).to(tl.float32)
                    if INNER:
                        value *= tl.load(inner + k, mask=k < K, other=0.0).to(tl.float32)
                    if OUTER:
                        value *= scale
                    if PLANES == 2:
                        value_1 = (((other >> slot) & 1) * 2 - 1).to(tl.float32)
                        if INNER:
                            value_1 *= tl.load(inner_1 + k, mask=k < K, other=0.0).to(tl.float32)
                        if OUTER:
                            value_1 *= scale_1
                        value += value_1
                tl.store(out + slot * N + n, value.to(out.dtype.element_ty), mask=inside & (k < K))
        word = following


@triton.jit
def look_up(
    ids,
    weight,
    scales,
    zeros,
    out,
    N,
    K,
    group_units,
    BITS: tl.constexpr,
    ZEROS: tl.constexpr,
    UNITS: tl.constexpr,
):
    """Rows ``ids`` of a group-quantized matrix: UNITS units of one row a program. Ids out of range give NaN."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.load(ids + row).to(tl.int64)
    known = (n >= 0) & (n < N)
    unit = tl.program_id(1) * UNITS + tl.arange(0, UNITS)
    k = unit[:, None] * 32 + tl.arange(0, 32)[None, :]
    inside = (k < K) & known
    first = tl.arange(0, 32)[None, :] * BITS
    at = weight + (unit[:, None] * BITS + first // 32).to(tl.int64) * N + n
    q = tl.load(at, mask=inside, other=0)
    shift = first % 32
    # An arithmetic shift drags the sign along; the mask takes it away again.
    q = q >> shift
    if 32 % BITS != 0:
        straddles = shift + BITS > 32
        rest = tl.load(at + N, mask=inside & straddles, other=0)
        here = 32 - shift
        q = tl.where(straddles, (q & ((1 << (here & 31)) - 1)) | (rest << (here & 31)), q)
    q = (q & ((1 << BITS) - 1)).to(tl.float32)
    place = (unit // group_units).to(tl.int64) * N + n
    used = (unit * 32 < K) & known
    scale = tl.load(scales + place, mask=used, other=0.0).to(tl.float32)[:, None]
    MIDDLE: tl.constexpr = 0.5 if BITS == 1 else (1 << BITS) // 2
    if ZEROS:
        value = q * scale - tl.load(zeros + place, mask=used, other=0.0).to(tl.float32)[:, None]
    else:
        value = (q - MIDDLE) * scale
    value = tl.where(known, value, float("nan"))
    tl.store(out + row * K + k, value.to(out.dtype.element_ty), mask=k < K)
