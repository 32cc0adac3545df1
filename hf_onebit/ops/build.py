"""What compiling the CPU kernels (csrc/) takes: sources, flags, compiler, and a hash that ties a binary to them.

Standard library only, and nothing of the package: setup.py loads this file by its path, where there may be no torch.
"""

import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

CSRC = Path(__file__).resolve().parent / "csrc"
BINARY = "_cpu.abi3.so"
# The oldest torch whose stable ABI is used: the binary runs with it and with all later ones.
TARGET_VERSION = "0x020a000000000000"
FLAGS = (
    "-std=c++17",
    "-O3",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    # Neither changes a result; without them no loop with a root or a comparison becomes one over vectors.
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    # gcc's own AVX-512 header copies undefined registers on purpose.
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
)


def torch_folder() -> Path | None:
    """Where torch is installed, or None; torch is not imported, which takes seconds."""
    spec = importlib.util.find_spec("torch")
    return Path(spec.origin).parent if spec and spec.origin else None


def compiler() -> list[str]:
    """The command of the C++ compiler: CXX where it is set, else the first of the usual ones that is there.

    Where none is there, the name of the one that was looked for first.
    """
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    usual = [shlex.split(name) for name in (sysconfig.get_config_var("CXX"), "c++", "g++", "clang++") if name]
    return next((command for command in usual if shutil.which(command[0])), usual[0])


def obstacle() -> str | None:
    """Why there is nothing to compile, or None."""
    if sys.platform == "win32":
        return "the kernels are written for gcc and clang, and this is Windows"
    torch = torch_folder()
    if torch is None:
        return "torch was not installed where the package was built"
    if not (torch / "include/torch/csrc/stable/ops.h").is_file():
        return "the torch of the build has no stable ABI headers; 2.10 or newer is needed"
    command = compiler()[0]
    if shutil.which(command) is None:
        return f"the C++ compiler {command} was not found"
    return None


def remedy(reason: str) -> str:
    """What to do about an obstacle of an installation that has torch."""
    if "compiler" in reason:
        return "install g++ or clang++ (on Debian: apt install g++), or set CXX to one"
    if "headers" in reason:
        return "install torch 2.10 or newer"
    return "use Linux or macOS (WSL on Windows)"


def source_hash() -> str:
    """One hash of all sources and flags; a binary that does not carry it was built from others."""
    digest = hashlib.sha256(" ".join((*FLAGS, TARGET_VERSION)).encode() + b"\0")
    for file in sorted(CSRC.iterdir()):
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def embedded() -> str:
    """The words that a binary of these sources holds."""
    return f"hf_onebit sources {source_hash()}"


def sources() -> list[Path]:
    """All files that are compiled."""
    return sorted(CSRC.glob("*.cpp"))


def include_dirs(torch: Path) -> list[str]:
    """Folders of torch's headers."""
    return [str(torch / "include"), str(torch / "include/torch/csrc/api/include")]


def define_macros() -> list[tuple[str, str]]:
    """Macros that the sources are compiled with."""
    return [("TORCH_TARGET_VERSION", TARGET_VERSION), ("HF_ONEBIT_SOURCES", f'"{embedded()}"')]


def link_args(torch: Path) -> list[str]:
    """Of torch only the symbols of its stable C interface are linked, and none of Python."""
    return [f"-L{torch / 'lib'}", "-ltorch_cpu"]


def compile_binary(target: Path) -> None:
    """Compile the sources into one shared library, by one command, without setuptools.

    Raises:
        RuntimeError: there is an obstacle, or the compiler failed; with its last words.
    """
    reason, torch = obstacle(), torch_folder()
    if reason or torch is None:
        raise RuntimeError(f"The CPU kernels cannot be compiled: {reason}")
    shared = ["-dynamiclib", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
    command = [*compiler(), *FLAGS, "-fPIC", *shared]
    command += [f"-D{name}={value}" for name, value in define_macros()]
    command += [f"-I{folder}" for folder in include_dirs(torch)]
    command += [*map(str, sources()), "-o", str(target), *link_args(torch)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr or done.stdout).strip()[-2000:]
        raise RuntimeError(
            f"Compiling the CPU kernels failed, with status {done.returncode} of\n{shlex.join(command)}\n{said}"
        )
