"""Compiles the CPU kernels where that is possible. Everything else about the package is in pyproject.toml.

An install never fails for want of them: without torch in the build environment (pip's isolated builds), without a
compiler, or when compiling fails, the package is plain Python, and the reason is written beside the kernels' loader,
where `hf-onebit doctor` finds it.

    python setup.py build_ext --inplace                  in a source tree
    pip install --no-build-isolation --no-deps .         against the torch of this environment
"""

import hashlib
import importlib.util
import os
import shlex
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "hf_onebit" / "ops" / "csrc"
RECORD = Path("hf_onebit", "ops", "_cpu_not_built.txt")
# The oldest torch whose stable ABI is used: the binary runs with it and with all later ones.
TARGET_VERSION = "0x020a000000000000"


def torch_folder() -> Path | None:
    """Where torch is installed; torch is not imported, which takes seconds."""
    spec = importlib.util.find_spec("torch")
    return Path(spec.origin).parent if spec and spec.origin else None


def obstacle() -> str | None:
    """Why there is nothing to compile, or None."""
    if sys.platform == "win32":
        return "the kernels are written for gcc and clang, and this is Windows"
    torch = torch_folder()
    if torch is None:
        return "torch was not installed where the package was built"
    if not (torch / "include/torch/csrc/stable/ops.h").is_file():
        return "the torch of the build has no stable ABI headers; 2.10 or newer is needed"
    compiler = shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++")[0]
    if shutil.which(compiler) is None:
        return f"the C++ compiler {compiler} was not found"
    return None


def source_hash() -> str:
    """One hash of all sources; hf_onebit/ops/cpu.py computes the same and refuses a binary built from others."""
    digest = hashlib.sha256()
    for file in sorted(CSRC.iterdir()):
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def extension() -> Extension:
    """The binary: no symbols of Python, of torch only those of the stable C interface."""
    torch = torch_folder()
    assert torch is not None
    flags = ["-std=c++17", "-O3", "-fvisibility=hidden", "-ffp-contract=off", "-Wall"]
    # gcc's own AVX-512 header copies undefined registers on purpose.
    flags += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
    return Extension(
        "hf_onebit.ops._cpu",
        sorted(str(file.relative_to(ROOT)) for file in CSRC.glob("*.cpp")),
        depends=sorted(str(file.relative_to(ROOT)) for file in CSRC.glob("*.h")),
        include_dirs=[str(torch / "include"), str(torch / "include/torch/csrc/api/include")],
        define_macros=[
            ("TORCH_TARGET_VERSION", TARGET_VERSION),
            ("HF_ONEBIT_SOURCES", f'"hf_onebit sources {source_hash()}"'),
        ],
        extra_compile_args=flags,
        extra_link_args=[f"-L{torch / 'lib'}", "-ltorch_cpu"],
        language="c++",
        optional=True,
        py_limited_api=True,
    )


OBSTACLE = obstacle()


def record(folder: Path, reason: str | None) -> None:
    """Write why there is no binary, or remove what an earlier build wrote."""
    file = folder / RECORD
    if reason is None:
        file.unlink(missing_ok=True)
    else:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(reason + "\n", encoding="utf-8")


class BuildPython(build_py):
    """Copies the modules, and records an obstacle."""

    def run(self) -> None:
        super().run()
        if OBSTACLE is not None:
            record(ROOT if self.editable_mode else Path(self.build_lib), OBSTACLE)


class BuildExtension(build_ext):
    """Compiles, and records a failure."""

    def run(self) -> None:
        # setuptools clears `inplace` while it builds and copies afterwards.
        self.record_folder = ROOT if self.inplace or self.editable_mode else Path(self.build_lib)
        super().run()

    def build_extension(self, ext: Extension) -> None:
        try:
            super().build_extension(ext)
        except Exception as error:
            # Raised again: setuptools reports it, and goes on because the extension is optional.
            record(self.record_folder, f"compiling failed: {' '.join(str(error).split())[:500]}")
            raise
        record(self.record_folder, None)


setup(
    ext_modules=[] if OBSTACLE else [extension()],
    cmdclass={"build_py": BuildPython, "build_ext": BuildExtension},
    options={} if OBSTACLE else {"bdist_wheel": {"py_limited_api": "cp310"}},
)
