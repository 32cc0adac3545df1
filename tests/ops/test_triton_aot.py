"""The tiles of ``multiply`` compiled ahead of time for sm_80, sm_90, sm_100, without a device: no spills, memory fits.

And for gfx942, of AMD's, which is compiled for in the same way.

The other kernels are in test_triton_aot_others.py.
"""

import itertools
import re

import pytest
from compiled_kernels import (
    AMD,
    ARCHITECTURES,
    KINDS,
    SHARED,
    SMALL,
    amd_resources,
    check_resources,
    compile_experts,
    compile_indexed,
    compile_kernel,
    compile_multiply,
    count,
    listing,
    require_triton,
    resources,
    shared_of,
)

from hf_onebit.ops import gpu_plans, gpu_tuning

require_triton()


def check(kernel, architecture, folder):
    """No spills, shared memory within the device's, and products by tensor cores.

    What a thread spills is on its stack. Reading the listing takes longer than the other checks: long tests do, too.
    """
    used = check_resources(kernel, architecture, folder)
    assert used["REG"] >= 40, used  # a trap has four
    products = re.findall(r"\b(?:mma\.sync|wgmma\.mma_async)", kernel.asm["ptx"])
    assert len(products) >= 32  # one a slot at least


def check_listing(kernel, folder):
    """The same of the instructions themselves."""
    found = count(listing(kernel, folder))
    assert not {"LDL", "STL"} & set(found)
    assert found["HMMA"] + found["HGMMA"] >= 32


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("block_c", [8, 16, 32, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_the_usual_tiles(kind, block_c, architecture, tmp_path):
    check(compile_multiply(kind, architecture, block_c), architecture, tmp_path)


# Those that spill with one stage, of each number of columns.
DAILY = {("signs", 64), ("4 bits", 32), ("8 bits", 16), ("8 bits", 64)}
# The one tile that has room for one stage alone on devices of compute capability 8.6; a few of its registers spill.
NO_ROOM = ("8 bits, zeros", 64, 86)


@pytest.mark.parametrize("architecture", SMALL)
@pytest.mark.parametrize(
    ("kind", "block_c"),
    [pytest.param(kind, block_c, marks=() if (kind, block_c) in DAILY else pytest.mark.long)
     for kind in KINDS for block_c in (8, 16, 32, 64)],
)  # fmt: skip
def test_the_usual_tiles_where_shared_memory_is_small(kind, block_c, architecture, tmp_path):
    kernel = compile_multiply(kind, architecture, block_c)
    if (kind, block_c, architecture) == NO_ROOM:
        assert kernel.metadata.num_stages == 1
        assert resources(kernel, tmp_path)["STACK"] <= 48
    else:
        assert kernel.metadata.num_stages == 2
        check(kernel, architecture, tmp_path)


def test_all_but_one_tile_have_room_for_two_stages():
    """Of the usual ones and those that the search may choose."""
    short = set()
    for architecture, kind, block_c in itertools.product((*ARCHITECTURES, *SMALL), KINDS, (8, 16, 32, 64)):
        bits, is_mpq, _ = KINDS[kind].values()
        usual = gpu_plans.tile_for(block_c, bits, is_mpq, architecture // 10)
        for block_n, _ in {usual, *gpu_tuning.tiles_of(block_c, bits, is_mpq, architecture // 10)}:
            if shared_of(kind, block_n, block_c) > SHARED[architecture]:
                short.add((kind, block_c, architecture))
    assert short == {NO_ROOM}


@pytest.mark.parametrize(("kind", "block_c"), [("signs", 8), ("3 bits", 32), ("4 bits, zeros", 16), ("8 bits", 64)])
def test_what_two_stages_take_of_shared_memory_is_as_computed(kind, block_c):
    block_n, _ = gpu_plans.tile_for(block_c, *list(KINDS[kind].values())[:2], 8)
    kernel = compile_multiply(kind, 80, block_c)
    assert kernel.metadata.num_stages == 2
    assert kernel.metadata.shared == shared_of(kind, block_n, block_c)


@pytest.mark.parametrize("kind", ["signs", "8 bits, zeros"])
def test_the_listing_says_the_same(kind, tmp_path):
    check_listing(compile_multiply(kind, 90, 16), tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("block_c", [8, 16, 32, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_what_the_search_may_choose(kind, block_c, architecture, tmp_path):
    bits, is_mpq, _ = KINDS[kind].values()
    tiles = gpu_tuning.tiles_of(block_c, bits, is_mpq, architecture // 10)
    for tile in {gpu_plans.tile_for(block_c, bits, is_mpq, architecture // 10), *tiles}:
        kernel = compile_multiply(kind, architecture, block_c, tile)
        check(kernel, architecture, tmp_path)
        check_listing(kernel, tmp_path)


def test_a_spill_is_seen(tmp_path):
    """Why some tiles are told of all registers: left to itself, the compiler spills here."""
    constants = KINDS["8 bits, zeros"] | {"BLOCK_N": 64, "BLOCK_C": 16, "ASM": True}
    pointers = {"weight": "*i32", "weight_1": "*i32", "scales": "*fp16", "zeros": "*fp16", "u": "*fp16"}
    kernel = compile_kernel("multiply", 90, pointers | {"result": "*fp32"}, constants, 2, 2, {"maxnreg": 64})
    assert resources(kernel, tmp_path)["STACK"] > 0
    with pytest.raises(AssertionError):
        check(kernel, 90, tmp_path)
    with pytest.raises(AssertionError):
        check_listing(kernel, tmp_path)


def check_amd(kernel):
    """No spills, shared memory within the device's, and a product by matrix instructions for each slot at least."""
    used = amd_resources(kernel)
    assert used["vgpr_spill_count"] == used["sgpr_spill_count"] == used["private_segment_fixed_size"] == 0, used
    assert used["mfma"] >= 32, used
    assert kernel.metadata.shared <= SHARED[AMD]


def in_both_tiers(kinds, daily):
    """All but the kinds named in the long tier."""
    return [pytest.param(kind, marks=() if kind in daily else pytest.mark.long) for kind in kinds]


@pytest.mark.parametrize("block_c", [16, 32, 64])
@pytest.mark.parametrize("kind", in_both_tiers(KINDS, ["signs", "4 bits, zeros"]))
def test_the_usual_tiles_on_amd(kind, block_c):
    check_amd(compile_multiply(kind, AMD, block_c))


@pytest.mark.parametrize("kind", in_both_tiers(KINDS, ["signs", "4 bits, zeros"]))
def test_experts_and_other_orders_of_inputs_on_amd(kind):
    for block_c in (16, 32):
        check_amd(compile_experts(kind, AMD, block_c))
    if kind != "signs":
        check_amd(compile_indexed(kind, AMD, 16))


@pytest.mark.long
@pytest.mark.parametrize("block_c", [16, 32, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_what_the_search_may_choose_on_amd(kind, block_c):
    bits, is_mpq, _ = KINDS[kind].values()
    for tile in gpu_tuning.tiles_of(block_c, bits, is_mpq, 0):
        check_amd(compile_multiply(kind, AMD, block_c, tile))


def test_too_few_columns_for_amds_matrix_instructions_spill():
    """Why the least tile is larger there."""
    used = amd_resources(compile_multiply("signs", AMD, 8))
    assert used["mfma"] == 0
    assert used["vgpr_spill_count"] > 0


def test_names_and_constants_that_a_kernel_has_not_are_refused():
    with pytest.raises(LookupError, match="no kernel is named 'vector'; looked in triton_kernels"):
        compile_kernel("vector", 90, {}, {}, 4, 2)
    with pytest.raises(LookupError, match="no kernel is named 'triton'"):
        compile_kernel("triton", 90, {}, {}, 4, 2)
    with pytest.raises(ValueError, match=r"look_up has the constants \['BITS', 'UNITS', 'ZEROS'\], got \['BITS'\]"):
        compile_kernel("look_up", 90, {}, {"BITS": 4}, 4, 2)
