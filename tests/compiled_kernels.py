"""Compiles the GPU kernels ahead of time, without a device, and reads what comes out.

    python tests/compiled_kernels.py    writes docs/results/sass/ again

Used by tests/ops/test_triton_aot.py, test_triton_aot_others.py and test_sass.py.
"""

import json
import os
import platform
import re
import subprocess
import sys
from collections import Counter
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hf_onebit.ops import gpu_plans
from hf_onebit.ops.gpu_plans import Plan

SASS = Path(__file__).parents[1] / "docs" / "results" / "sass"
# What a block may take of the shared memory of a multiprocessor, in bytes.
SHARED = {80: 163 << 10, 86: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10, "gfx942": 64 << 10}
ARCHITECTURES = (80, 90, 100)
SMALL = (86, 120)  # less shared memory, hence other launches of some tiles
AMD = "gfx942"  # Triton's compiler for it needs no ROCm
KINDS = {"signs": {"BITS": 1, "MPQ": False, "ZEROS": False}} | {
    f"{bits} bits{', zeros' * zeros}": {"BITS": bits, "MPQ": True, "ZEROS": zeros}
    for bits in range(1, 9)
    for zeros in (True, False)
}
HALF, SINGLE = "*fp16", "*fp32"
POINTERS = {"weight": "*i32", "weight_1": "*i32", "scales": HALF, "zeros": HALF, "u": HALF}
EXPERTS = dict.fromkeys(("inner", "weights", "scales", "zeros", "outer", "biases", "tokens", "experts", "tile_expert",
                         "tile_begin", "tile_end"), "*i64")  # fmt: skip
EXPERTS |= {"x": HALF, "like": HALF, "u": HALF, "norm": SINGLE, "like_weight": "*i32", "like_scale": HALF,
            "like_bias": HALF, "result": SINGLE, "partial": SINGLE, "y": HALF}  # fmt: skip
STEP = {"words": "*i32", "gradient": SINGLE, "first": SINGLE, "second": SINGLE, "inertia": SINGLE, "perm": "*i64",
        "group": "*i64", "scales": HALF, "zeros": HALF, "inner": HALF, "tally": SINGLE, "squares": SINGLE,
        "root": SINGLE} | dict.fromkeys(("beta1", "rest1", "beta2", "rest2", "eps", "eta", "decay", "middle", "keep",
                                         "rest_keep", "share", "lr", "start"), "fp32")  # fmt: skip
MOVE = {"DIRECTION": False, "FIRST": True, "SECOND": True, "PERM": False, "SIGNS": False, "ZEROS": 1, "DECAY": True,
        "STOCHASTIC": True, "ALIGNED": True, "TALLY": False, "BLOCK": 128}  # fmt: skip
# Sizes and counts that need not be multiples of 16.
_NOT_DIVISIBLE = {"M", "C", "TERMS", "splits", "group_units", "bias", "rows", "held", "groups", "row0", "column0",
                  "seed", "P", "E", "seed_high", "step", "stream", "inner"}  # fmt: skip
_UPDATES = {"move", "begin_flips", "flip"}


def triton_required() -> bool:
    """Whether a missing triton is a failure: HF_ONEBIT_REQUIRE_TRITON, where the development environment has it."""
    here = sys.platform == "linux" and platform.machine() == "x86_64"
    return here and os.environ.get("HF_ONEBIT_REQUIRE_TRITON", "") not in {"", "0"}


def require_triton() -> None:
    """Skip the module that calls this, or fail, where triton is not installed, or was imported for its interpreter."""
    import pytest

    if find_spec("triton") is None:
        if triton_required():
            raise RuntimeError("triton is not installed, and HF_ONEBIT_REQUIRE_TRITON is set: pip install -e '.[dev]'")
        pytest.skip("triton is not installed", allow_module_level=True)
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the interpreter was chosen when triton was imported", allow_module_level=True)


def compile_kernel(
    name: str,
    architecture: int | str,
    dtypes: dict[str, str],
    constants: dict[str, Any],
    warps: int,
    stages: int,
    options: dict[str, Any] | None = None,
) -> Any:
    """The compiled kernel; pointers and sizes are multiples of 16 where layers of usual sizes have them so.

    Raises:
        LookupError: there is no kernel of that name.
        ValueError: the kernel has no such constant, or lacks one.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from hf_onebit.ops import (
        triton_experts,
        triton_few_rows,
        triton_indexed,
        triton_kernels,
        triton_pack,
        triton_update,
    )

    modules = (triton_kernels, triton_few_rows, triton_update, triton_experts, triton_indexed, triton_pack)
    kernel = next((getattr(m, name) for m in modules if hasattr(m, name)), None)
    if not isinstance(kernel, triton.JITFunction):
        names = ", ".join(m.__name__.removeprefix("hf_onebit.ops.") for m in modules)
        raise LookupError(f"no kernel is named {name!r}; looked in {names}")
    names = kernel.arg_names
    wanted = {p.name for p in kernel.params if p.is_constexpr}
    if wanted != set(constants):
        raise ValueError(f"{name} has the constants {sorted(wanted)}, got {sorted(constants)}")
    signature = {n: "constexpr" if n in constants else dtypes.get(n, "i32") for n in names}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(names)
        if n not in constants and n not in _NOT_DIVISIBLE and dtypes.get(n) != "fp32"
    }
    source = ASTSource(kernel, signature, {(names.index(n),): v for n, v in constants.items()}, attributes)
    given = {"num_warps": warps, "num_stages": stages} | (options or {})
    given |= {"enable_fp_fusion": False} if name in _UPDATES else {}
    target = GPUTarget("hip", AMD, 64) if architecture == AMD else GPUTarget("cuda", architecture, 32)
    return triton.compile(source, target=target, options=given)


def shared_of(kind: str, block_n: int, block_c: int) -> int:
    """What ``gpu_plans`` says that a tile takes with two stages."""
    bits, is_mpq, zeros = KINDS[kind].values()
    return gpu_plans.shared_of(block_n, block_c, bits, (2 + 2 * zeros) * is_mpq)


def _major(architecture: int | str) -> int:
    """The first number of the compute capability, or 0."""
    return 0 if architecture == AMD else int(architecture) // 10


def _stages(kind: str, architecture: int | str, block_n: int, block_c: int) -> int:
    """Those of a launch."""
    if architecture == AMD:
        return 1
    bits, is_mpq, zeros = KINDS[kind].values()
    return gpu_plans.stages_of(block_n, block_c, bits, (2 + 2 * zeros) * is_mpq, SHARED[architecture])


def compile_multiply(kind: str, architecture: int | str, block_c: int, tile: tuple[int, int] | None = None) -> Any:
    """``multiply`` for a tile of so many columns, by default the one of ``plan_for``, as ``product`` launches it."""
    bits, is_mpq, zeros = KINDS[kind].values()
    major = _major(architecture)
    block_n, warps = tile or gpu_plans.tile_for(block_c, bits, is_mpq, major)
    stages = _stages(kind, architecture, block_n, block_c)
    options = gpu_plans.registers_of_product(Plan(block_n, block_c, 1, warps, stages), bits, is_mpq, zeros, major)
    constants = KINDS[kind] | {"BLOCK_N": block_n, "BLOCK_C": block_c, "ASM": major > 0}
    return compile_kernel("multiply", architecture, POINTERS | {"result": SINGLE}, constants, warps, stages, options)


def compile_experts(kind: str, architecture: int | str, block_c: int) -> Any:
    """``multiply_experts`` for a tile of so many columns, as it is launched."""
    bits, is_mpq, _ = KINDS[kind].values()
    major = _major(architecture)
    block_n, warps = gpu_plans.tile_for(block_c, bits, is_mpq, major)
    stages = _stages(kind, architecture, block_n, block_c)
    options = gpu_plans.registers_of(warps, major)
    constants = KINDS[kind] | {"PARTS": 1 if is_mpq else 2, "BLOCK_N": block_n, "BLOCK_C": block_c, "ASM": major > 0}
    return compile_kernel("multiply_experts", architecture, EXPERTS, constants, warps, stages, options)


def compile_indexed(kind: str, architecture: int | str, block_c: int) -> Any:
    """``multiply_indexed`` for a tile of so many columns, as it is launched."""
    from hf_onebit.ops.triton_indexed_launch import BLOCK_N, WARPS  # needs triton

    bits, _, zeros = KINDS[kind].values()
    major = _major(architecture)
    constants = {"BITS": bits, "ZEROS": zeros, "BLOCK_N": BLOCK_N, "BLOCK_C": block_c, "ASM": major > 0}
    pointers = POINTERS | {"index": "*i64", "result": SINGLE}
    options = gpu_plans.registers_of(WARPS, major)
    return compile_kernel("multiply_indexed", architecture, pointers, constants, WARPS, 1, options)


def compile_few_rows(architecture: int, planes: int, rows: int, warps: int, dtype: str) -> Any:
    """``few_rows`` of so many rows a program."""
    constants = {"PLANES": planes, "BIAS": True, "ROWS": rows, "DIGITS": 3 if rows <= 2 else 2, "WARPS": warps,
                 "ASM": True}  # fmt: skip
    pointers = POINTERS | dict.fromkeys(("a", "a_1", "b", "b_1"), HALF) | dict.fromkeys(("x", "y", "bias"), dtype)
    return compile_kernel("few_rows", architecture, pointers, constants, warps, 1)


def tool(name: str) -> Path:
    """A program of the CUDA toolkit that triton brings."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def resources(kernel: Any, folder: Path) -> dict[str, int]:
    """What cuobjdump says of the cubin: {"REG", "STACK", "LOCAL", "SHARED", ...}; ``folder`` is for its file."""
    file = folder / "kernel.cubin"
    file.write_bytes(kernel.asm["cubin"])
    said = subprocess.run(
        [tool("cuobjdump"), "-res-usage", file], capture_output=True, text=True, check=True, timeout=120
    )
    return {k: int(v) for k, v in re.findall(r"([A-Z]+):(\d+)", said.stdout)}


def check_resources(kernel: Any, architecture: int, folder: Path) -> dict[str, int]:
    """`resources`; no thread spills, which would be on its stack, and shared memory is within the device's."""
    used = resources(kernel, folder)
    assert used["STACK"] == used["LOCAL"] == 0, used
    assert kernel.metadata.shared <= SHARED[architecture]
    return used


def amd_resources(kernel: Any) -> dict[str, int]:
    """The same of a kernel for AMD's devices, by its assembly: registers, bytes on the stack, matrix instructions."""
    text = kernel.asm["amdgcn"]
    names = ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
    found = {name: re.search(rf"\.{name}:\s*(\d+)", text) for name in names}
    return {name: int(each[1]) for name, each in found.items() if each} | {"mfma": len(re.findall(r"v_mfma_", text))}


def listing(kernel: Any, folder: Path) -> str:
    """The instructions with their labels, as nvdisasm prints them."""
    file = folder / "kernel.cubin"
    file.write_bytes(kernel.asm["cubin"])
    return subprocess.run(
        [tool("nvdisasm"), "-c", file], capture_output=True, text=True, check=True, timeout=120
    ).stdout


def instructions(text: str) -> list[tuple[str, str]]:
    """(name, operands) of every instruction of a listing, in order."""
    return [(name, rest) for _, name, rest in _lines(text) if name]


def count(text: str) -> Counter[str]:
    """How often each instruction occurs."""
    return Counter(name for name, _ in instructions(text))


def loop(text: str) -> list[str]:
    """The lines of the shortest loop of a listing that multiplies by tensor cores, its label first.

    Raises:
        ValueError: there is none.
    """
    lines, labels, found = text.splitlines(), {}, []
    for number, (label, name, rest) in enumerate(_lines(text)):
        if label:
            labels[label] = number
        target = re.search(r"\.L_x_\d+", rest) if name == "BRA" else None
        start = labels.get(target[0]) if target else None
        if start is not None and re.search(r"\b(HMMA|HGMMA|IMMA)\b", "\n".join(lines[start:number])):
            found.append(lines[start : number + 1])
    if not found:
        raise ValueError("no loop of this listing multiplies by tensor cores")
    return min(found, key=len)


def _lines(text: str) -> list[tuple[str, str, str]]:
    """(label, instruction, operands) of each line; empty strings where there is none."""
    parts = []
    for line in text.splitlines():
        label = re.match(r"(\.L_x_\d+):", line)
        code = re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z0-9]+)(.*)", line)
        parts.append((label[1] if label else "", code[1] if code else "", code[2] if code else ""))
    return parts


# {row of the table in docs/kernels.md: (how the kernel is compiled, weights of a thread that are counted, the part)}
STATIC = {
    "`few_rows`, 1 row of x": (lambda: compile_few_rows(90, 1, 1, 8, HALF), 512, "kernel"),
    "`few_rows`, 4 rows of x": (lambda: compile_few_rows(90, 1, 4, 8, HALF), 512, "kernel"),
    "`multiply`, signs": (lambda: compile_multiply("signs", 90, 8), 1024, "loop"),
    "`multiply`, 2 bits, zeros": (lambda: compile_multiply("2 bits, zeros", 90, 8), 1024, "loop"),
    "`multiply`, 4 bits, zeros": (lambda: compile_multiply("4 bits, zeros", 90, 8), 1024, "loop"),
    "`multiply_experts`, signs": (lambda: compile_experts("signs", 90, 8), 1024, "loop"),
    "`multiply_experts`, 3 bits": (lambda: compile_experts("3 bits", 90, 8), 1024, "loop"),
    "`move`, 4 bits, zeros, float32 moments": (
        lambda: compile_kernel("move", 90, STEP, MOVE | {"BITS": 4}, 4, 3), 32, "kernel",
    ),
    "`flip`, signs, float32 moments": (
        lambda: compile_kernel(
            "flip", 90, STEP, {"DIRECTION": False, "FIRST": True, "PERM": False, "SIGNS": True, "BLOCK": 128,
                               "INERTIA": True, "TALLY": True}, 4, 3,
        ), 32, "kernel",
    ),
}  # fmt: skip
# {file in docs/results/sass: row of the table}
LISTINGS = {
    "few_rows_1_row_sm_90.sass": "`few_rows`, 1 row of x",
    "multiply_signs_loop_sm_90.sass": "`multiply`, signs",
}


def measure(row: str, folder: Path) -> tuple[dict[str, Any], str]:
    """What the table says of a kernel, from a fresh compile; and the instructions that were counted."""
    make, weights, part = STATIC[row]
    kernel = make()
    used, text = resources(kernel, folder), listing(kernel, folder)
    counted = "\n".join(loop(text)) if part == "loop" else text
    return {
        "kernel": kernel.metadata.name,
        "row": row,
        "target": f"sm_{kernel.metadata.target.arch}",
        "registers": used["REG"],
        # What the kernel itself declares, less the 1024 bytes that the device keeps, or what Triton gives it.
        "shared_bytes": max(used["SHARED"] - 1024, kernel.metadata.shared),
        "stack_bytes": used["STACK"],
        "counted": part,
        "instructions": len(instructions(counted)),
        "weights_of_a_thread": weights,
        "instructions_a_weight": round(len(instructions(counted)) / weights, 2),
    }, counted


def write(folder: Path) -> None:
    """The table as JSON, and the listings, into docs/results/sass."""
    SASS.mkdir(parents=True, exist_ok=True)
    found = {row: measure(row, folder) for row in STATIC}
    about = {"triton": version("triton"), "kernels": [figures for figures, _ in found.values()]}
    (SASS / "static.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    for name, row in LISTINGS.items():
        figures, text = found[row]
        part = "the whole kernel" if figures["counted"] == "kernel" else "its inner loop"
        head = f"// {row.replace('`', '')}: {part}, {figures['target']}, Triton {about['triton']}, by nvdisasm -c.\n"
        head += f"// {figures['instructions']} instructions for {figures['weights_of_a_thread']} weights of a thread.\n"
        lines = (line.rstrip() for line in text.splitlines())
        (SASS / name).write_text(head + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        write(Path(scratch))
