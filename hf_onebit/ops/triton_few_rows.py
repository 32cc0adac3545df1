"""Few rows of x times signs in one launch: x as signed 8-bit digits, bits of the words as bytes, exact integer sums.

A program computes 32 outputs from all inputs; each of its warps takes 16 units (of 32 inputs, one word an output) at a
time. It scales its 512 inputs u = b x to whole numbers of 14 or 21 bits by a power of two, splits them into 2 or 3
signed digits, and turns those into operands of ``mma.m16n8k32`` by way of shared memory, which only this warp uses.
``word >> s & 0x01010101`` is the other operand: four inputs, 8 apart, as bytes 0 and 1. A mask alone gives 2, 4 or 8
times that, so four bits share a shift, and the four sums are put together at the end. Sums of digits are exact in
int32; Σ ±u is 2 Σ bit · u - Σ u. Only what 512 inputs yield is added up in float32, in a fixed order.

Lane 4 g + q holds, of each four units, unit q and outputs 4 g to 4 g + 3, as one load of 16 bytes; so its words lie
where the product wants its rows g and g + 8; the product's columns are digits of rows of x. The kernel is for NVIDIA
devices from compute capability 8.0 on; without ``ASM`` the same is said in plain Triton, for the interpreter.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def _shared_asm(size):
    return "{ .shared .align 16 .b8 few_rows_shared[" + str(size) + "]; mov.u32 $0, few_rows_shared; }"


@triton.jit
def _bytes(v, SIGNED: tl.constexpr):
    four = tl.arange(0, 4)
    b = (v[:, None] >> (8 * four)[None, :]) & 255
    if SIGNED:
        b = (b ^ 128) - 128
    return b.to(tl.float32)


@triton.jit
def _mma(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3, WARPS: tl.constexpr, ASM: tl.constexpr):
    """c + A B in each warp, the operands in the registers where the instruction has them."""
    if ASM:
        return tl.inline_asm_elementwise(
            "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};",
            "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r",
            [a0, a1, a2, a3, b0, b1, c0, c1, c2, c3],
            (tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
    A0 = tl.reshape(_bytes(a0, False), (WARPS, 8, 16))
    A1 = tl.reshape(_bytes(a1, False), (WARPS, 8, 16))
    A2 = tl.reshape(_bytes(a2, False), (WARPS, 8, 16))
    A3 = tl.reshape(_bytes(a3, False), (WARPS, 8, 16))
    left = tl.reshape(tl.permute(tl.join(A0, A1), (0, 3, 1, 2)), (WARPS, 16, 16))
    right = tl.reshape(tl.permute(tl.join(A2, A3), (0, 3, 1, 2)), (WARPS, 16, 16))
    A = tl.reshape(tl.permute(tl.join(left, right), (0, 1, 3, 2)), (WARPS, 16, 32))
    B0 = tl.reshape(_bytes(b0, True), (WARPS, 8, 16))
    B1 = tl.reshape(_bytes(b1, True), (WARPS, 8, 16))
    B = tl.permute(tl.reshape(tl.permute(tl.join(B0, B1), (0, 1, 3, 2)), (WARPS, 8, 32)), (0, 2, 1))
    C = tl.dot(A, B).to(tl.int32)
    C = tl.reshape(tl.permute(tl.reshape(C, (WARPS, 2, 8, 4, 2)), (0, 2, 3, 1, 4)), (WARPS * 32, 2, 2))
    even, odd = tl.split(C)
    d0, d2 = tl.split(even)
    d1, d3 = tl.split(odd)
    return c0 + d0, c1 + d1, c2 + d2, c3 + d3


@triton.jit
def _quarters(v, THREADS: tl.constexpr):
    even, odd = tl.split(tl.reshape(v, (THREADS, 2, 2)))
    v0, v2 = tl.split(even)
    v1, v3 = tl.split(odd)
    return v0, v1, v2, v3


@triton.jit
def _warp_max(v, WARPS: tl.constexpr, ASM: tl.constexpr):
    if ASM:
        return tl.inline_asm_elementwise(
            "redux.sync.max.s32 $0, $1, 0xffffffff;", "=r,r", [v], tl.int32, is_pure=True, pack=1
        )
    v = tl.max(tl.reshape(v, (WARPS, 32)), 1)
    return tl.reshape(tl.broadcast_to(v[:, None], (WARPS, 32)), (WARPS * 32,))


@triton.jit
def _warp_sum(v, WARPS: tl.constexpr, ASM: tl.constexpr):
    if ASM:
        return tl.inline_asm_elementwise(
            "redux.sync.add.s32 $0, $1, 0xffffffff;", "=r,r", [v], tl.int32, is_pure=True, pack=1
        )
    v = tl.sum(tl.reshape(v, (WARPS, 32)), 1)
    return tl.reshape(tl.broadcast_to(v[:, None], (WARPS, 32)), (WARPS * 32,))


@triton.jit
def _turn(v0, v1, v2, v3, ASM: tl.constexpr):
    """Bytes 0 of four numbers side by side; bytes 1; bytes 2."""
    if ASM:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 s, t; prmt.b32 s, $3, $4, 0x5140; prmt.b32 t, $5, $6, 0x5140;"
            " prmt.b32 $0, s, t, 0x5410; prmt.b32 $1, s, t, 0x7632;"
            " prmt.b32 s, $3, $4, 0x0062; prmt.b32 t, $5, $6, 0x0062; prmt.b32 $2, s, t, 0x5410; }",
            "=&r,=&r,=&r,r,r,r,r",
            [v0, v1, v2, v3],
            (tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
    d0 = (v0 & 255) | ((v1 & 255) << 8) | ((v2 & 255) << 16) | (v3 << 24)
    d1 = ((v0 >> 8) & 255) | (((v1 >> 8) & 255) << 8) | (((v2 >> 8) & 255) << 16) | ((v3 >> 8) << 24)
    d2 = ((v0 >> 16) & 255) | (((v1 >> 16) & 255) << 8) | (((v2 >> 16) & 255) << 16) | ((v3 >> 16) << 24)
    return d0, d1, d2


@triton.jit
def _store4(at, v0, v1, v2, v3):
    tl.inline_asm_elementwise(
        "st.shared.v4.b32 [$1], {$2,$3,$4,$5}; mov.u32 $0, 0;",
        "=r,r,r,r,r,r",
        [at, v0, v1, v2, v3],
        tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _load4(at):
    return tl.inline_asm_elementwise(
        "ld.shared.v4.b32 {$0,$1,$2,$3}, [$4];",
        "=r,=r,=r,=r,r",
        [at],
        (tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=False,
        pack=1,
    )


@triton.jit
def _load_float(at):
    return tl.inline_asm_elementwise("ld.shared.f32 $0, [$1];", "=f,r", [at], tl.float32, is_pure=False, pack=1)


@triton.jit
def _wait_for_warp(tid):
    tl.inline_asm_elementwise(
        "bar.warp.sync 0xffffffff; mov.u32 $0, 0;", "=r,r", [tid], tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _gather(kept, index: tl.constexpr, source, digit, row, ROWS: tl.constexpr, DIGITS: tl.constexpr):
    """What lane ``source`` keeps of ``row``'s ``digit`` in place ``index``: the exchange without shared memory."""
    out = tl.zeros_like(source)
    for r in tl.static_range(ROWS):
        for d in tl.static_range(DIGITS):
            out = tl.where((row == r) & (digit == d), tl.gather(kept[(r * 4 + index) * DIGITS + d], source, 0), out)
    return out


@triton.jit
def _pick(w, slot: tl.constexpr):
    """Bits slot, 8 + slot, 16 + slot, 24 + slot as bytes, times 1, 2, 4 or 8."""
    return (w >> (slot // 4 * 4)) & (0x01010101 << (slot % 4))


@triton.jit
def _into(sums, a0, a1, a2, a3, b0, b1, place: tl.constexpr, WARPS: tl.constexpr, ASM: tl.constexpr):
    c = _mma(a0, a1, a2, a3, b0, b1, sums[place], sums[place + 1], sums[place + 2], sums[place + 3], WARPS, ASM)
    return sums[:place] + (c[0], c[1], c[2], c[3]) + sums[place + 4 :]


@triton.jit(do_not_specialize=["M"])
def few_rows(
    x,
    b,
    b_1,
    weight,
    weight_1,
    a,
    a_1,
    bias,
    y,
    K,
    N,
    KU,
    x_stride,
    M,
    PLANES: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    DIGITS: tl.constexpr,
    WARPS: tl.constexpr,
    ASM: tl.constexpr,
):
    """y (M, N) = Σ_planes a · (signs · (b x)) + bias; ROWS rows a program: 1 or 2 of three digits, up to 4 of two.

    Grid: (N / 32, M / ROWS). An input that is infinite or NaN makes its row's outputs NaN.
    """
    group = tl.program_id(1)
    x += group.to(tl.int64) * ROWS * x_stride
    y += group.to(tl.int64) * ROWS * N
    M -= group * ROWS
    THREADS: tl.constexpr = WARPS * 32
    CHUNKS: tl.constexpr = 4 if DIGITS == 3 else 2  # columns of a row; the fourth repeats the third
    ROW_BYTES: tl.constexpr = 32 * CHUNKS * 16
    LOG: tl.constexpr = 21 if DIGITS == 3 else 14
    tid = tl.arange(0, THREADS)
    lane = tid & 31
    warp = tid >> 5
    g = lane >> 2
    q = lane & 3
    j = g & 3
    p = g >> 2
    n0 = tl.program_id(0) * 32
    four = tl.arange(0, 4)
    two = tl.arange(0, 2)
    n4 = (n0 + g * 4)[:, None] + four[None, :]
    shared = tid
    if ASM:
        shared = tl.inline_asm_elementwise(
            _shared_asm(WARPS * (ROW_BYTES * ROWS + 512)), "=r,r", [tid], tl.int32, is_pure=True, pack=1
        )
    mine = shared + warp * (ROW_BYTES * ROWS)
    sums_at = shared + WARPS * ROW_BYTES * ROWS
    # Where to read: column g of a product. Places are exchanged (^) so that no two lanes meet in a bank.
    if DIGITS == 3:
        digit = tl.minimum(g & 3, 2)
        row_in = (g >> 2) % ROWS
        turn = (q >> 1) | ((j & 1) << 1)
        even = mine + row_in * ROW_BYTES + q * 64 + (digit ^ (q >> 1)) * 16
        odd = mine + row_in * ROW_BYTES + q * 64 + (digit ^ (q >> 1) ^ 2) * 16
    else:
        digit = g & 1
        row_in = (g >> 1) % ROWS
        turn = j & 1
        even = mine + row_in * ROW_BYTES + q * 32 + digit * 16
        odd = mine + row_in * ROW_BYTES + q * 32 + (digit ^ 1) * 16
    out_at = mine + ((p * 4 + j) * 4 + q) * (CHUNKS * 16)
    zero = tl.zeros((THREADS,), tl.float32)
    none = tl.zeros((THREADS,), tl.int32)
    totals = (zero, zero, zero, zero)
    for plane in tl.static_range(PLANES):
        words = weight if plane == 0 else weight_1
        inner = b if plane == 0 else b_1
        outer = a if plane == 0 else a_1
        if PLANES == 2:
            factor = tl.load(outer + n4, mask=n4 < N, other=0.0).to(tl.float32)
            factors = _quarters(factor, THREADS)
        for start in range(0, KU, WARPS * 16):
            first = start + warp * 16
            w = ()
            for t in tl.static_range(4):
                unit = first + t * 4 + q
                inside = (unit < KU)[:, None] & (n4 < N)
                w += (tl.load(words + unit[:, None] * N + n4, mask=inside, other=0),)
            bs = ()
            xs = ()
            for i in tl.static_range(8):  # inputs 2 j and 2 j + 1 of byte i % 4 of the unit
                k = (first + (i // 4 * 2 + p) * 4 + q) * 32 + (i % 4) * 8 + j * 2
                k2 = k[:, None] + two[None, :]
                bs += (tl.load(inner + k2, mask=k2 < K, other=0.0),)
                for r in tl.static_range(ROWS):
                    row = x + tl.minimum(r, M - 1).to(tl.int64) * x_stride
                    xs += (tl.load(row + k2, mask=k2 < K, other=0.0),)
            if ASM and (start > 0 or plane > 0):
                _wait_for_warp(tid)
            backs = ()
            wholes = ()
            kept = ()
            for r in tl.static_range(ROWS):
                us = ()
                top = zero
                for i in tl.static_range(8):
                    u0, u1 = tl.split(xs[i * ROWS + r].to(tl.float32) * bs[i].to(tl.float32))
                    larger = tl.maximum(tl.abs(u0), tl.abs(u1), propagate_nan=tl.PropagateNan.ALL)
                    top = tl.maximum(top, larger, propagate_nan=tl.PropagateNan.ALL)
                    us += (u0, u1)
                exponent = _warp_max(top.to(tl.int32, bitcast=True) & 0x7FFFFFFF, WARPS, ASM) >> 23
                e = tl.minimum(tl.maximum(exponent, 24), 254)
                scale = ((253 + LOG - e) << 23).to(tl.float32, bitcast=True)  # to 2^(LOG - 1) .. 2^LOG
                back = ((e + 1 - LOG) << 23).to(tl.float32, bitcast=True)
                backs += (tl.where(exponent == 255, float("nan"), back),)
                vs = ()
                whole = none
                for i in tl.static_range(16):
                    # 1.5 · 2^23 more: the float's own bits are then the nearest whole number.
                    v = (us[i] * scale + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
                    whole += v
                    vs += ((v + 0x808080) ^ 0x808080,)  # each byte a signed digit
                wholes += (_warp_sum(whole, WARPS, ASM),)
                D0 = ()
                D1 = ()
                D2 = ()
                for e_ in tl.static_range(2):
                    for m in tl.static_range(2):
                        t0, t1, t2 = _turn(
                            vs[m * 8 + e_], vs[m * 8 + e_ + 2], vs[m * 8 + e_ + 4], vs[m * 8 + e_ + 6], ASM
                        )
                        D0 += (t0,)
                        D1 += (t1,)
                        D2 += (t2,)
                        if not ASM:
                            kept += (t0, t1)
                            if DIGITS == 3:
                                kept += (t2,)
                if ASM:
                    at = out_at + r * ROW_BYTES
                    _store4(at + turn * 16, D0[0], D0[1], D0[2], D0[3])
                    _store4(at + (1 ^ turn) * 16, D1[0], D1[1], D1[2], D1[3])
                    if DIGITS == 3:
                        _store4(at + (2 ^ turn) * 16, D2[0], D2[1], D2[2], D2[3])
            if ASM:
                _wait_for_warp(tid)
            sums = ()
            for _c in tl.static_range(32):
                sums += (none,)
            for pp in tl.static_range(2):
                A0, A1, A2, A3 = _quarters(w[pp], THREADS)
                B0, B1, B2, B3 = _quarters(w[2 + pp], THREADS)
                for jj in tl.static_range(4):
                    if ASM:
                        at = even if jj % 2 == 0 else odd
                        X = _load4(at + (pp * 4 + jj) * 4 * (CHUNKS * 16))
                    else:
                        source = warp * 32 + (pp * 4 + jj) * 4 + q
                        X = ()
                        for z in tl.static_range(4):
                            X += (_gather(kept, z, source, digit, row_in, ROWS, DIGITS),)
                    for e_ in tl.static_range(2):
                        for half in tl.static_range(2):
                            a0 = _pick(A0 if half == 0 else A2, 2 * jj + e_)
                            a1 = _pick(A1 if half == 0 else A3, 2 * jj + e_)
                            a2 = _pick(B0 if half == 0 else B2, 2 * jj + e_)
                            a3 = _pick(B1 if half == 0 else B3, 2 * jj + e_)
                            b0 = X[e_ * 2]
                            b1 = X[e_ * 2 + 1]
                            sums = _into(sums, a0, a1, a2, a3, b0, b1, ((2 * jj + e_) % 4 * 2 + half) * 4, WARPS, ASM)
            # This lane's columns are 2 q and 2 q + 1: digits of row q, or with three of row q / 2.
            back = backs[0]
            less = wholes[0]
            if DIGITS == 3:
                if ROWS == 2:
                    back = tl.where(q >= 2, backs[1], back)
                    less = tl.where(q >= 2, wholes[1], less)
                less = tl.where((q & 1) == 0, less, 0)
            else:
                for r in tl.static_range(1, ROWS):
                    back = tl.where(q == r, backs[r], back)
                    less = tl.where(q == r, wholes[r], less)
            subtract = less.to(tl.float32) * back
            worth = back * 0.25  # twice an eighth
            second = none + 256
            if DIGITS == 3:
                worth = tl.where((q & 1) == 0, worth, worth * 65536.0)
                second = tl.where((q & 1) == 0, 256, 0)
            new = ()
            for o in tl.static_range(4):
                v0 = sums[o // 2 * 4 + o % 2 * 2]
                v1 = sums[o // 2 * 4 + o % 2 * 2 + 1]
                for s in tl.static_range(1, 4):  # they are 1, 2, 4 and 8 times what they should be: now 8 times
                    v0 = v0 * 2 + sums[s * 8 + o // 2 * 4 + o % 2 * 2]
                    v1 = v1 * 2 + sums[s * 8 + o // 2 * 4 + o % 2 * 2 + 1]
                total = (v0 + v1 * second).to(tl.float32) * worth - subtract
                if PLANES == 2:
                    total *= factors[o]
                new += (totals[o] + total,)
            totals = new
    if ASM:  # a sum over warps through shared memory, and a warp for each row
        _store4(
            sums_at + warp * 512 + (q * 8 + g) * 16,
            totals[0].to(tl.int32, bitcast=True),
            totals[1].to(tl.int32, bitcast=True),
            totals[2].to(tl.int32, bitcast=True),
            totals[3].to(tl.int32, bitcast=True),
        )
        n = n0 + lane
        outside = zero + 1.0
        if PLANES == 1:
            outside = tl.load(a + n, mask=n < N, other=0.0).to(tl.float32)
        extra = zero
        if BIAS:
            extra = tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
        tl.inline_asm_elementwise("bar.sync 0; mov.u32 $0, 0;", "=r,r", [tid], tl.int32, is_pure=False, pack=1)
        for again in tl.static_range(0, ROWS, WARPS):
            row = warp + again
            at = sums_at + (row % ROWS) * (256 if DIGITS == 3 else 128) + lane * 4
            total = zero
            for v in tl.static_range(WARPS):
                total += _load_float(at + v * 512)
                if DIGITS == 3:
                    total += _load_float(at + v * 512 + 128)
            total = total * outside + extra
            inside = (n < N) & (row < M) & (row < ROWS)
            tl.store(y + row.to(tl.int64) * N + n, total.to(y.dtype.element_ty), mask=inside)
    else:
        four_outputs = tl.join(tl.join(totals[0], totals[2]), tl.join(totals[1], totals[3]))
        four_outputs = tl.reshape(four_outputs, (THREADS, 4))
        if DIGITS == 3:  # two lanes share a row
            part = tl.sum(tl.sum(tl.reshape(four_outputs, (WARPS, 8, 2, 2, 4)), 0), 2)
            part = tl.reshape(part, (16, 4))
            pair = tl.arange(0, 16)
            row = pair & 1
            n_out = (n0 + (pair >> 1) * 4)[:, None] + four[None, :]
        else:
            part = tl.sum(tl.reshape(four_outputs, (WARPS, 32, 4)), 0)
            each = tl.arange(0, 32)
            row = each & 3
            n_out = (n0 + (each >> 2) * 4)[:, None] + four[None, :]
        if PLANES == 1:
            part *= tl.load(a + n_out, mask=n_out < N, other=0.0).to(tl.float32)
        if BIAS:
            part += tl.load(bias + n_out, mask=n_out < N, other=0.0).to(tl.float32)
        inside = (n_out < N) & ((row < M) & (row < ROWS))[:, None]
        tl.store(y + row.to(tl.int64)[:, None] * N + n_out, part.to(y.dtype.element_ty), mask=inside)
