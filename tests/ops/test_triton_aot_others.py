"""The other GPU kernels compiled ahead of time for sm_80, sm_90, sm_100: no spills, shared memory fits.

A dtype of x changes a kernel's loads and stores alone, and ``multiply_experts`` has the loop of ``multiply``: every
day each is compiled for one architecture of the three, in turn, and for all of them in the long tier.
"""

import itertools

import pytest
from compiled_kernels import (
    ARCHITECTURES,
    EXPERTS,
    HALF,
    KINDS,
    MOVE,
    POINTERS,
    SINGLE,
    SMALL,
    STEP,
    check_resources,
    compile_experts,
    compile_few_rows,
    compile_indexed,
    compile_kernel,
    count,
    listing,
    require_triton,
)

require_triton()


def in_turn(*values):
    """Every combination with every architecture; all but one architecture of each in the long tier."""
    made = []
    for number, each in enumerate(itertools.product(*values)):
        daily = (number + number // 3) % 3
        for place, architecture in enumerate(ARCHITECTURES):
            marks = () if place == daily else pytest.mark.long
            made.append(pytest.param(*each, architecture, marks=marks))
    return made


FEW = [(1, 1, 8, HALF), (1, 4, 8, HALF), (2, 1, 8, HALF), (1, 2, 8, SINGLE), (2, 2, 8, SINGLE), (2, 4, 4, "*bf16"),
       (1, 1, 4, HALF), (1, 4, 4, HALF), (1, 2, 4, SINGLE), (2, 4, 8, HALF), (1, 1, 2, HALF), (1, 4, 2, "*bf16"),
       (1, 1, 1, HALF)]  # fmt: skip


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("planes", "rows", "warps", "dtype"), FEW)
def test_few_rows(planes, rows, warps, dtype, architecture, tmp_path):
    """No spills, integer tensor cores; for one row all instructions of the kernel, not only those of its loop."""
    kernel = compile_few_rows(architecture, planes, rows, warps, dtype)
    used = check_resources(kernel, architecture, tmp_path)
    assert used["SHARED"] <= 48 << 10  # what a kernel may have that is not asked for it
    assert used["REG"] * 32 * warps <= 65536
    found = count(listing(kernel, tmp_path))
    assert not {"LDL", "STL"} & set(found)
    assert found["IMMA"] == 32 * planes
    if rows == 1:  # a thread has 16 words of each plane at a time
        assert sum(found.values()) / (16 * 32 * planes) <= 1.6


@pytest.mark.parametrize("block_c", [8, pytest.param(16, marks=pytest.mark.long)])
@pytest.mark.parametrize(("kind", "architecture"), in_turn(list(KINDS)[1:]))
def test_codes_whose_inputs_name_their_groups(kind, architecture, block_c, tmp_path):
    kernel = compile_indexed(kind, architecture, block_c)
    used = check_resources(kernel, architecture, tmp_path)
    assert used["REG"] >= 40
    assert kernel.asm["ptx"].count("mma.sync") >= 32


@pytest.mark.parametrize(("kind", "block_c", "architecture"), in_turn(KINDS, [8, 16, 32]))
def test_experts(kind, block_c, architecture, tmp_path):
    kernel = compile_experts(kind, architecture, block_c)
    used = check_resources(kernel, architecture, tmp_path)
    assert used["REG"] >= 40
    assert kernel.asm["ptx"].count("mma.sync") >= 32


@pytest.mark.parametrize("architecture", [SMALL[0], pytest.param(SMALL[1], marks=pytest.mark.long)])
@pytest.mark.parametrize("kind", ["signs", "4 bits, zeros", pytest.param("8 bits, zeros", marks=pytest.mark.long)])
def test_experts_where_shared_memory_is_small(kind, architecture, tmp_path):
    kernel = compile_experts(kind, architecture, 32)
    check_resources(kernel, architecture, tmp_path)
    assert kernel.metadata.num_stages == 2


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("signs", [True, False])
def test_rows_of_experts(signs, architecture, tmp_path):
    constants = {"PARTS": 2 if signs else 1, "HAS_B": signs, "UNITS": 128}
    check_resources(compile_kernel("prepare_experts", architecture, EXPERTS, constants, 8, 3), architecture, tmp_path)
    constants = {"ROOM": 16, "MPQ": not signs, "BIAS": True, "BLOCK": 128}
    check_resources(compile_kernel("reduce_experts", architecture, EXPERTS, constants, 4, 3), architecture, tmp_path)


@pytest.mark.parametrize(("dtype", "architecture"), in_turn([HALF, "*bf16", SINGLE]))
def test_prepare_and_reduce(dtype, architecture, tmp_path):
    pointers = {"x": dtype, "b": HALF, "b_1": HALF, "u": HALF, "norm": SINGLE}
    for parts in (1, 2):
        constants = {"HAS_B": parts == 2, "PARTS": parts, "UNITS": 128}
        check_resources(compile_kernel("prepare", architecture, pointers, constants, 8, 3), architecture, tmp_path)
    pointers = {"partial": SINGLE, "norm": SINGLE, "a": HALF, "a_1": HALF, "bias": dtype, "y": dtype}
    for planes, mpq in ((1, False), (2, False), (1, True)):
        for room in (1, 16, 128):
            constants = {"PLANES": planes, "ROOM": room, "MPQ": mpq, "BIAS": mpq, "BLOCK": 128}
            check_resources(compile_kernel("reduce", architecture, pointers, constants, 4, 3), architecture, tmp_path)


COMMON = {"BLOCK": 256, "CODES": False, "INDEXED": False}


@pytest.mark.parametrize(("dtype", "architecture"), in_turn([HALF, "*bf16", SINGLE]))
def test_expanded_signs_and_codes_themselves(dtype, architecture, tmp_path):
    pointers = POINTERS | {"scales_1": HALF, "inner": HALF, "inner_1": HALF, "out": dtype, "index": "*i32"}
    for planes, outer, inner in ((1, True, True), (2, True, True), (1, False, True), (1, True, False)):
        constants = KINDS["signs"] | COMMON | {"PLANES": planes, "OUTER": outer, "INNER": inner}
        check_resources(compile_kernel("expand", architecture, pointers, constants, 2, 3), architecture, tmp_path)
    pointers |= {"out": "*u8"} | dict.fromkeys(("scales", "scales_1", "inner", "inner_1"), "*i32")
    constants = COMMON | {"BITS": 3, "MPQ": False, "ZEROS": False, "PLANES": 1, "OUTER": False, "INNER": False}
    constants |= {"CODES": True}
    check_resources(compile_kernel("expand", architecture, pointers, constants, 2, 3), architecture, tmp_path)


@pytest.mark.parametrize(("kind", "dtype", "architecture"), in_turn(list(KINDS)[1:], [HALF, "*bf16", SINGLE]))
def test_expanded_codes_and_embeddings(kind, dtype, architecture, tmp_path):
    pointers = POINTERS | {"scales_1": HALF, "inner": HALF, "inner_1": HALF, "out": dtype, "index": "*i32",
                           "ids": "*i64"}  # fmt: skip
    for indexed in (False, True):
        constants = KINDS[kind] | COMMON | {"PLANES": 1, "OUTER": True, "INNER": True, "INDEXED": indexed}
        check_resources(compile_kernel("expand", architecture, pointers, constants, 2, 3), architecture, tmp_path)
    constants = {"BITS": KINDS[kind]["BITS"], "ZEROS": KINDS[kind]["ZEROS"], "UNITS": 16}
    check_resources(compile_kernel("look_up", architecture, pointers, constants, 4, 3), architecture, tmp_path)


@pytest.mark.parametrize(("bits", "architecture"), in_turn(list(range(1, 9))))
def test_packing(bits, architecture, tmp_path):
    kernel = compile_kernel(
        "pack_units", architecture, {"codes": "*u8", "words": "*i32"}, {"BITS": bits, "BLOCK": 64}, 2, 3
    )
    check_resources(kernel, architecture, tmp_path)


MOVES = [(bits, "*fp32", {}) for bits in range(1, 9)] + [
    (4, "*bf16", {"PERM": True, "TALLY": True}),
    (3, "*fp16", {"ALIGNED": False, "ZEROS": 2}),
    (2, "*fp32", {"STOCHASTIC": False, "DIRECTION": True, "FIRST": False, "SECOND": False}),
    (1, "*bf16", {"SIGNS": True}),
]


@pytest.mark.parametrize(("move", "architecture"), in_turn(MOVES))
def test_the_step_of_codes(move, architecture, tmp_path):
    bits, dtype, about = move
    dtypes = STEP | {"gradient": dtype, "first": dtype, "second": dtype}
    kernel = compile_kernel("move", architecture, dtypes, MOVE | {"BITS": bits} | about, 4, 3)
    check_resources(kernel, architecture, tmp_path)
    assert "div.full" not in kernel.asm["ptx"]  # the quotients and roots of the CPU, to the bit
    assert "approx" not in kernel.asm["ptx"]
    assert "fma.rn.f32" not in kernel.asm["ptx"]


@pytest.mark.parametrize(("inertia", "signs", "architecture"), in_turn([True, False], [True, False]))
def test_flips(inertia, signs, architecture, tmp_path):
    common = {"DIRECTION": False, "FIRST": True, "PERM": not signs, "SIGNS": signs, "BLOCK": 128}
    check_resources(compile_kernel("begin_flips", architecture, STEP, common, 4, 3), architecture, tmp_path)
    constants = common | {"INERTIA": inertia, "TALLY": inertia}
    kernel = compile_kernel("flip", architecture, STEP, constants, 4, 3)
    check_resources(kernel, architecture, tmp_path)
    assert "approx" not in kernel.asm["ptx"]
    assert "fma.rn.f32" not in kernel.asm["ptx"]
