"""The torch-free core compiled for 64-bit Arm and run in an emulator; and, by the same driver, on this machine."""

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from hf_onebit.ops import build
from tests.exact_products import CODES_FROM

DRIVER = Path(__file__).parent / "kernels_driver.cpp"
CROSS = "aarch64-linux-gnu-g++"
EMULATOR = next((name for name in ("qemu-aarch64-static", "qemu-aarch64") if shutil.which(name)), None)
IS_ARM = platform.machine() in ("aarch64", "arm64")

needs_native = pytest.mark.skipif(
    build.obstacle() is not None and "compiler" in str(build.obstacle()), reason=f"{build.obstacle()}"
)
needs_arm = pytest.mark.skipif(
    shutil.which(CROSS) is None or EMULATOR is None,
    reason=f"needs {CROSS} and qemu-aarch64 (on Debian: apt install g++-aarch64-linux-gnu qemu-user-static)",
)


def compile_driver(folder: Path, compiler: list[str], *flags: str) -> Path:
    """All sources but the bindings, which know torch, with the flags of the real build."""
    sources = [str(file) for file in build.sources() if not file.name.startswith("binding_")]
    target = folder / "kernels_driver"
    command = [*compiler, *build.FLAGS, *flags, "-pthread", f"-I{build.CSRC}", *sources, str(DRIVER), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr
    return target


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [str(compile_driver(tmp_path_factory.mktemp("native"), build.compiler()))]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    # Static: the emulator then needs no Arm libraries.
    driver = compile_driver(tmp_path_factory.mktemp("arm"), [CROSS], "-static")
    return [str(EMULATOR), str(driver)]


def run(driver: list[str], *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*driver, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=900)


def check(driver: list[str], isa: str, seed: int, cases: int) -> None:
    done = run(driver, isa, seed, cases, 1e-6, 2e-4)
    assert done.returncode == 0, done.stdout + done.stderr
    said = re.fullmatch(
        rf"{isa}: {cases} cases, worst error (\S+), (\d+) by codes, worst error (\S+), "
        r"(\d+) with other bits than scalar\n",
        done.stdout,
    )
    assert said, done.stdout
    assert 0 < float(said[1]) <= 1e-6
    if isa in CODES_FROM:
        assert int(said[2]) > 0, done.stdout
        assert 0 < float(said[3]) <= 2e-4
    else:
        assert said[2] == "0", done.stdout
    if isa == "neon":
        assert said[4] == "0", done.stdout


@needs_native
@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512"] if not IS_ARM else ["scalar", "neon"])
def test_on_this_machine(native: list[str], isa: str) -> None:
    if isa not in run(native, "list").stdout.strip().split(","):
        pytest.skip(f"this CPU has no {isa}")
    check(native, isa, 1, 200)


@needs_native
def test_the_driver_finds_what_is_wrong(native: list[str]) -> None:
    done = run(native, "scalar", 1, 200, 1e-9, 2e-4)
    assert done.returncode == 1
    assert re.search(r"scalar: case \d+ \(rows .*\): output \d+ of row \d+ is .*, expected", done.stderr)
    assert run(native, "vax", 1, 1, 1e-6, 2e-4).returncode == 2


@needs_native
def test_the_driver_finds_what_is_wrong_with_codes(native: list[str]) -> None:
    if "avx2" not in run(native, "list").stdout.strip().split(","):
        pytest.skip("this CPU has no avx2")
    done = run(native, "avx2", 1, 200, 1e-6, 1e-7)
    assert done.returncode == 1
    assert re.search(r"avx2: case \d+ \(rows 65, .*, dtype [01], .*\): output \d+ of row \d+ is", done.stderr)


@needs_arm
def test_arm_has_neon(emulated: list[str]) -> None:
    assert run(emulated, "list").stdout == "scalar,neon\n"


@needs_arm
@pytest.mark.parametrize("file", [file.name for file in build.sources() if file.name.startswith("binding_")])
def test_bindings_are_valid_for_arm(file: str) -> None:
    """Compiled, not run: there is no Arm build of torch to run them with."""
    torch = build.torch_folder()
    assert torch is not None
    includes = [f"-I{folder}" for folder in build.include_dirs(torch)]
    macros = [f"-D{name}={value}" for name, value in build.define_macros()]
    command = [CROSS, *build.FLAGS, "-fsyntax-only", *includes, *macros, str(build.CSRC / file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@needs_arm
@pytest.mark.parametrize(("isa", "cases"), [("scalar", 50), ("neon", 200)])
def test_emulated_arm(emulated: list[str], isa: str, cases: int) -> None:
    check(emulated, isa, 1000, cases)


@needs_arm
@pytest.mark.long
def test_emulated_arm_at_length(emulated: list[str]) -> None:
    check(emulated, "neon", 100000, 5000)
