"""Every GPU kernel compiled ahead of time for sm_80, sm_90, sm_100, without a device: no spills, shared memory fits."""

import os
import re
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from hf_onebit.ops import gpu_tuning

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter was chosen when triton was imported"
)

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# What a block may take of the shared memory of a multiprocessor, in bytes.
SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
# Each kernel takes seconds to compile: one architecture is for every day, the others for the long tier.
ARCHITECTURES = (pytest.param(80, marks=pytest.mark.long), 90, pytest.param(100, marks=pytest.mark.long))
NOT_DIVISIBLE = {
    "M",
    "C",
    "TERMS",
    "splits",
    "group_units",
    "bias",
    "rows",
    "held",
    "row0",
    "column0",
    "seed",
    "P",
    "E",
}
NOT_DIVISIBLE |= {"seed_high", "step", "stream", "inner"}
UPDATES = {"move", "begin_flips", "flip"}


def compile_kernel(
    name: str, architecture: int, dtypes: dict[str, str], constants: dict[str, Any], warps: int, stages: int
) -> Any:
    """The compiled kernel; pointers and sizes are multiples of 16 where layers of usual sizes have them so."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from hf_onebit.ops import triton_experts, triton_few_rows, triton_kernels, triton_update

    kernel = next(
        getattr(m, name) for m in (triton_kernels, triton_few_rows, triton_update, triton_experts) if hasattr(m, name)
    )
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else dtypes.get(n, "i32") for n in names}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(names)
        if n not in constants and n not in NOT_DIVISIBLE and dtypes.get(n) != "fp32"
    }
    source = ASTSource(kernel, signature, {(names.index(n),): v for n, v in constants.items()}, attributes)
    options = {"num_warps": warps, "num_stages": stages} | ({"enable_fp_fusion": False} if name in UPDATES else {})
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def resources(kernel: Any, folder: Path) -> tuple[dict[str, int], Counter[str]]:
    """What cuobjdump says of the cubin: {"REG", "LOCAL", ...}; how often each instruction occurs."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    usage = subprocess.run(
        [TOOLS / "cuobjdump", "-res-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    listing = subprocess.run([TOOLS / "nvdisasm", cubin], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z0-9]+)", listing, re.MULTILINE)
    return {k: int(v) for k, v in re.findall(r"([A-Z]+):(\d+)", usage)}, Counter(found)


def check(kernel: Any, architecture: int, folder: Path) -> Counter[str]:
    """No spills, shared memory within the device's; the instructions."""
    used, instructions = resources(kernel, folder)
    assert used["LOCAL"] == 0, used
    assert not {"LDL", "STL"} & set(instructions)
    assert kernel.metadata.shared <= SHARED[architecture]
    return instructions


HALF, SINGLE = "*fp16", "*fp32"
POINTERS = {"weight": "*i32", "weight_1": "*i32", "scales": HALF, "zeros": HALF, "u": HALF}
KINDS = {
    "signs": {"BITS": 1, "MPQ": False, "ZEROS": False},
    "mpq2": {"BITS": 2, "MPQ": True, "ZEROS": True},
    "mpq3": {"BITS": 3, "MPQ": True, "ZEROS": False},
    "mpq4": {"BITS": 4, "MPQ": True, "ZEROS": True},
    "mpq8": {"BITS": 8, "MPQ": True, "ZEROS": False},
}
SOME_KINDS = [kind if kind in {"signs", "mpq3"} else pytest.param(kind, marks=pytest.mark.long) for kind in KINDS]
# (block_n, block_c, warps, stages) of plan_for
PRODUCTS = [(64, 8, 1, 2), (64, 16, 2, 2), (64, 32, 2, 2), (128, 64, 4, 2)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("plan", PRODUCTS, ids=str)
@pytest.mark.parametrize("kind", SOME_KINDS)
def test_multiply(kind, plan, architecture, tmp_path):
    block_n, block_c, warps, stages = plan
    if kind == "mpq8" and block_c == 32:
        block_n = 32
    if architecture == 100 and block_c == 64:  # four warps would become a trap, which the count below sees
        block_n, warps = 64 if kind == "signs" else 32, 2
    constants = KINDS[kind] | {"BLOCK_N": block_n, "BLOCK_C": block_c, "ASM": True}
    kernel = compile_kernel("multiply", architecture, POINTERS | {"result": SINGLE}, constants, warps, stages)
    instructions = check(kernel, architecture, tmp_path)
    tensor_cores = sum(n for name, n in instructions.items() if name in {"HMMA", "HGMMA"})
    assert tensor_cores >= 32  # one product a slot at least


@pytest.mark.long
@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("block_c", [8, 16, 32, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_what_the_search_may_choose(kind, block_c, architecture, tmp_path):
    about = KINDS[kind]
    for block_n, warps in gpu_tuning.tiles_of(block_c, about["BITS"], about["MPQ"], architecture // 10):
        constants = about | {"BLOCK_N": block_n, "BLOCK_C": block_c, "ASM": True}
        kernel = compile_kernel("multiply", architecture, POINTERS | {"result": SINGLE}, constants, warps, 2)
        instructions = check(kernel, architecture, tmp_path)
        assert sum(n for name, n in instructions.items() if name in {"HMMA", "HGMMA"}) >= 32, (block_n, warps)


FEW = [(1, 1, 8, HALF), (1, 4, 8, HALF), (2, 1, 8, HALF), (1, 2, 8, SINGLE), (2, 2, 8, SINGLE), (2, 4, 4, "*bf16"),
       (1, 1, 4, HALF), (1, 4, 4, HALF), (1, 2, 4, SINGLE), (2, 4, 8, HALF), (1, 1, 2, HALF), (1, 4, 2, "*bf16"),
       (1, 1, 1, HALF)]  # fmt: skip
SOME_FEW = [FEW[0], *(pytest.param(*few, marks=pytest.mark.long) for few in FEW[1:])]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("planes", "rows", "warps", "dtype"), SOME_FEW)
def test_few_rows(planes, rows, warps, dtype, architecture, tmp_path):
    """No spills, integer tensor cores; for one row all instructions of the kernel, not only those of its loop."""
    constants = {"PLANES": planes, "BIAS": True, "ROWS": rows, "DIGITS": 3 if rows <= 2 else 2, "WARPS": warps,
                 "ASM": True}  # fmt: skip
    pointers = POINTERS | dict.fromkeys(("a", "a_1", "b", "b_1"), HALF) | dict.fromkeys(("x", "y", "bias"), dtype)
    kernel = compile_kernel("few_rows", architecture, pointers, constants, warps, 1)
    instructions = check(kernel, architecture, tmp_path)
    used, _ = resources(kernel, tmp_path)
    assert used["SHARED"] <= 48 << 10  # what a kernel may have that is not asked for it
    assert used["REG"] * 32 * warps <= 65536
    assert instructions["IMMA"] == 32 * planes
    if rows == 1:  # a thread has 16 words of each plane at a time
        assert sum(instructions.values()) / (16 * 32 * planes) <= 1.6


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", ["*fp16", "*bf16", "*fp32"])
@pytest.mark.parametrize("kind", SOME_KINDS)
def test_vector(kind, dtype, architecture, tmp_path):
    planes = 2 if dtype == "*bf16" and kind == "signs" else 1
    parts, warps = (2, 8) if kind == "signs" else (1, 4)
    if kind != "signs" and dtype == "*fp32":
        pytest.skip("codes in groups are expanded for float32")
    constants = KINDS[kind] | {"PLANES": planes, "PARTS": parts, "BIAS": True, "ROWS": 8 // parts, "BLOCK_N": 32,
                               "WARPS": warps, "ASM": True}  # fmt: skip
    pointers = POINTERS | {"norm": SINGLE, "y": dtype, "a_1": HALF, "bias": dtype}
    instructions = check(compile_kernel("vector", architecture, pointers, constants, warps, 2), architecture, tmp_path)
    assert instructions["HMMA"] >= 64


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", ["*fp16", "*bf16", "*fp32"])
def test_prepare_and_reduce(dtype, architecture, tmp_path):
    pointers = {"x": dtype, "b": HALF, "b_1": HALF, "u": HALF, "norm": SINGLE}
    for parts in (1, 2):
        constants = {"HAS_B": parts == 2, "PARTS": parts, "UNITS": 128}
        check(compile_kernel("prepare", architecture, pointers, constants, 8, 3), architecture, tmp_path)
    pointers = {"partial": SINGLE, "norm": SINGLE, "a": HALF, "a_1": HALF, "bias": dtype, "y": dtype}
    for planes, mpq in ((1, False), (2, False), (1, True)):
        for room in (1, 16, 128):
            constants = {"PLANES": planes, "ROOM": room, "MPQ": mpq, "BIAS": mpq, "BLOCK": 128}
            check(compile_kernel("reduce", architecture, pointers, constants, 4, 3), architecture, tmp_path)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", ["*fp16", "*bf16", "*fp32"])
def test_expand_and_look_up(dtype, architecture, tmp_path):
    pointers = POINTERS | {"scales_1": HALF, "inner": HALF, "inner_1": HALF, "out": dtype, "ids": "*i64"}
    pointers["index"] = "*i32"
    common = {"BLOCK": 256, "CODES": False, "INDEXED": False}
    for planes, outer, inner in ((1, True, True), (2, True, True), (1, False, True), (1, True, False)):
        constants = KINDS["signs"] | common | {"PLANES": planes, "OUTER": outer, "INNER": inner}
        check(compile_kernel("expand", architecture, pointers, constants, 2, 3), architecture, tmp_path)
    for kind in ("mpq2", "mpq3", "mpq4", "mpq8"):
        constants = KINDS[kind] | common | {"PLANES": 1, "OUTER": True, "INNER": True}
        check(compile_kernel("expand", architecture, pointers, constants, 2, 3), architecture, tmp_path)
        constants |= {"INDEXED": True}
        check(compile_kernel("expand", architecture, pointers, constants, 2, 3), architecture, tmp_path)
        constants = {"BITS": KINDS[kind]["BITS"], "ZEROS": KINDS[kind]["ZEROS"], "UNITS": 16}
        check(compile_kernel("look_up", architecture, pointers, constants, 4, 3), architecture, tmp_path)
    constants = {"BITS": 3, "MPQ": False, "ZEROS": False, "PLANES": 1, "OUTER": False, "INNER": False}
    pointers |= {"out": "*u8", "scales": "*i32", "scales_1": "*i32", "inner": "*i32", "inner_1": "*i32"}
    check(
        compile_kernel("expand", architecture, pointers, constants | common | {"CODES": True}, 2, 3),
        architecture,
        tmp_path,
    )


STEP = {"words": "*i32", "gradient": SINGLE, "first": SINGLE, "second": SINGLE, "inertia": SINGLE, "perm": "*i64",
        "group": "*i64", "scales": HALF, "zeros": HALF, "inner": HALF, "tally": SINGLE, "squares": SINGLE,
        "root": SINGLE} | dict.fromkeys(("beta1", "rest1", "beta2", "rest2", "eps", "eta", "decay", "middle", "keep",
                                         "rest_keep", "share", "lr", "start"), "fp32")  # fmt: skip
MOVES = [(bits, "*fp32", {}) for bits in range(1, 9)] + [
    (4, "*bf16", {"PERM": True, "TALLY": True}),
    (3, "*fp16", {"ALIGNED": False, "ZEROS": 2}),
    (2, "*fp32", {"STOCHASTIC": False, "DIRECTION": True, "FIRST": False, "SECOND": False}),
    (1, "*bf16", {"SIGNS": True}),
]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    ("bits", "dtype", "about"), [MOVES[3], *(pytest.param(*m, marks=pytest.mark.long) for m in MOVES if m != MOVES[3])]
)
def test_the_step_of_codes(bits, dtype, about, architecture, tmp_path):
    constants = {"BITS": bits, "DIRECTION": False, "FIRST": True, "SECOND": True, "PERM": False, "SIGNS": False,
                 "ZEROS": 1, "DECAY": True, "STOCHASTIC": True, "ALIGNED": True, "TALLY": False,
                 "BLOCK": 128} | about  # fmt: skip
    dtypes = STEP | {"gradient": dtype, "first": dtype, "second": dtype}
    kernel = compile_kernel("move", architecture, dtypes, constants, 4, 3)
    check(kernel, architecture, tmp_path)
    assert "div.full" not in kernel.asm["ptx"]  # the quotients and roots of the CPU, to the bit
    assert "approx" not in kernel.asm["ptx"]
    assert "fma.rn.f32" not in kernel.asm["ptx"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("signs", [True, pytest.param(False, marks=pytest.mark.long)])
@pytest.mark.parametrize("inertia", [True, pytest.param(False, marks=pytest.mark.long)])
def test_flips(inertia, signs, architecture, tmp_path):
    common = {"DIRECTION": False, "FIRST": True, "PERM": not signs, "SIGNS": signs, "BLOCK": 128}
    check(compile_kernel("begin_flips", architecture, STEP, common, 4, 3), architecture, tmp_path)
    constants = common | {"INERTIA": inertia, "TALLY": inertia}
    kernel = compile_kernel("flip", architecture, STEP, constants, 4, 3)
    check(kernel, architecture, tmp_path)
    assert "approx" not in kernel.asm["ptx"]
    assert "fma.rn.f32" not in kernel.asm["ptx"]


def loop_instructions(kernel: Any, folder: Path) -> int:
    """Instructions in the innermost loop that multiplies."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    listing = subprocess.run([TOOLS / "nvdisasm", cubin], capture_output=True, text=True, check=True).stdout
    labels: dict[str, int] = {}
    found: list[tuple[str, str]] = []
    for line in listing.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(found)
        elif instruction := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z0-9]+)(.*)", line):
            found.append((instruction[1], instruction[2]))
    lengths = []
    for end, (name, rest) in enumerate(found):
        target = re.search(r"\.L_x_\d+", rest) if name == "BRA" else None
        start = labels.get(target[0], end + 1) if target else end + 1
        if start <= end and any(name == "HMMA" for name, _ in found[start : end + 1]):
            lengths.append(end + 1 - start)
    return min(lengths)


def test_instructions_for_a_weight(tmp_path):
    """What docs/kernels.md says of the inner loops, for sm_90."""
    signs = KINDS["signs"] | {"ASM": True}
    kernel = compile_kernel("multiply", 90, POINTERS | {"result": SINGLE}, signs | {"BLOCK_N": 64, "BLOCK_C": 8}, 1, 2)
    assert loop_instructions(kernel, tmp_path) / (64 * 16) <= 1.4
    codes = KINDS["mpq4"] | {"ASM": True, "BLOCK_N": 64, "BLOCK_C": 8}
    kernel = compile_kernel("multiply", 90, POINTERS | {"result": SINGLE}, codes, 1, 2)
    assert loop_instructions(kernel, tmp_path) / (64 * 16) <= 2.8


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "block_c", [8, pytest.param(16, marks=pytest.mark.long), pytest.param(32, marks=pytest.mark.long)]
)
@pytest.mark.parametrize("kind", SOME_KINDS)
def test_experts(kind, block_c, architecture, tmp_path):
    signs = kind == "signs"
    common = {"PARTS": 2 if signs else 1}
    block_n, warps = (32 if kind == "mpq8" and block_c == 32 else 64), 1 if block_c == 8 else 2
    pointers = dict.fromkeys(("inner", "weights", "scales", "zeros", "outer", "biases", "tokens", "experts",
                              "tile_expert", "tile_begin", "tile_end"), "*i64")  # fmt: skip
    pointers |= {"x": HALF, "like": HALF, "u": HALF, "norm": SINGLE, "like_weight": "*i32", "like_scale": HALF,
                 "like_bias": HALF, "result": SINGLE, "partial": SINGLE, "y": HALF}  # fmt: skip
    constants = KINDS[kind] | common | {"BLOCK_N": block_n, "BLOCK_C": block_c, "ASM": True}
    kernel = compile_kernel("multiply_experts", architecture, pointers, constants, warps, 2)
    instructions = check(kernel, architecture, tmp_path)
    assert instructions["HMMA"] >= 32
    if block_c == 8:
        assert loop_instructions(kernel, tmp_path) / (64 * 16) <= (1.5 if signs else 3.0)
        constants = common | {"HAS_B": signs, "UNITS": 128}
        check(compile_kernel("prepare_experts", architecture, pointers, constants, 8, 3), architecture, tmp_path)
        constants = {"ROOM": 16, "MPQ": not signs, "BIAS": True, "BLOCK": 128}
        check(compile_kernel("reduce_experts", architecture, pointers, constants, 4, 3), architecture, tmp_path)
