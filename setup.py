"""Compiles the CPU kernels where that is possible. Everything else about the package is in pyproject.toml.

An install never fails for want of them: without torch in the build environment (pip's isolated builds), without a
compiler, or when compiling fails, the package is plain Python, and the reason is written beside the kernels' loader,
where `hf-onebit doctor` finds it.

    python setup.py build_ext --inplace                  in a source tree
    pip install --no-build-isolation --no-deps .         against the torch of this environment
"""

import importlib.util
import os
import shlex
from pathlib import Path
from types import ModuleType

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
RECORD = Path("hf_onebit", "ops", "_cpu_not_built.txt")


def load_recipe() -> ModuleType:
    """hf_onebit/ops/build.py by its path: the package around it needs torch."""
    spec = importlib.util.spec_from_file_location("hf_onebit_build", ROOT / "hf_onebit/ops/build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RECIPE = load_recipe()
OBSTACLE = RECIPE.obstacle()


def extension() -> Extension:
    """The binary: no symbols of Python, of torch only those of the stable C interface."""
    torch = RECIPE.torch_folder()
    os.environ["CXX"] = shlex.join(RECIPE.compiler())  # the one that was found to be there
    return Extension(
        "hf_onebit.ops._cpu",
        [str(file.relative_to(ROOT)) for file in RECIPE.sources()],
        depends=sorted(str(file.relative_to(ROOT)) for file in RECIPE.CSRC.glob("*.h")),
        include_dirs=RECIPE.include_dirs(torch),
        define_macros=RECIPE.define_macros(),
        extra_compile_args=list(RECIPE.FLAGS),
        extra_link_args=RECIPE.link_args(torch),
        language="c++",
        optional=True,
        py_limited_api=True,
    )


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
        if OBSTACLE is not None:
            self.warn(f"the CPU kernels are not compiled: {OBSTACLE}")
            record(self.record_folder, OBSTACLE)
        super().run()

    def build_extension(self, ext: Extension) -> None:
        try:
            super().build_extension(ext)
        except Exception as error:
            # Raised again: setuptools reports it, and goes on because the extension is optional.
            record(self.record_folder, f"compiling failed: {' '.join(str(error).split())[:500]}")
            raise
        record(self.record_folder, None)


class BuildWheel(bdist_wheel):
    """Names the wheel after what is in it: one whose kernels failed to compile runs on every platform."""

    def run(self) -> None:
        self.run_command("build")
        folder = Path(self.get_finalized_command("build").build_lib)
        if not (folder / "hf_onebit/ops" / RECIPE.BINARY).is_file():
            self.root_is_pure = True
            self.distribution.ext_modules = []
        super().run()


setup(
    ext_modules=[] if OBSTACLE else [extension()],
    cmdclass={"build_py": BuildPython, "build_ext": BuildExtension, "bdist_wheel": BuildWheel},
    options={} if OBSTACLE else {"bdist_wheel": {"py_limited_api": "cp310"}},
)
