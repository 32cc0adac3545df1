"""Loads the compiled CPU kernels (csrc/), where they were built: nothing is compiled here.

Loading registers them for the dispatch key CPU, so they answer for tensors on the CPU in place of reference.py,
under the same schemas, fakes and autograd formulas. Without them nothing is missing but speed.

``HF_ONEBIT_ISA`` forces one of the instruction sets that the machine has, or is ``off``: then the kernels are not
loaded.
"""

import ctypes
import hashlib
import os
from pathlib import Path

import torch

_FOLDER = Path(__file__).parent
_BINARY = _FOLDER / "_cpu.abi3.so"
_CSRC = _FOLDER / "csrc"
_VARIABLE = "HF_ONEBIT_ISA"

_library: ctypes.CDLL | None = None
_refused = ""


def status() -> str:
    """Where this implementation answers and with which instructions, or why not and how to build it."""
    if _library is None:
        return f"not in use: {_refused}"
    return f"in use for onebit_linear on the CPU, with {isa()} (of {', '.join(isas())})"


def build_command() -> str:
    """A line to copy that builds the kernels of this installation."""
    root = _FOLDER.parents[1]
    if (root / "setup.py").is_file():
        return f"python -m pip install --no-build-isolation --no-deps -e {root}"
    return "python -m pip install --no-build-isolation --no-deps --force-reinstall --no-binary :all: hf_onebit"


def library() -> ctypes.CDLL | None:
    """The loaded binary, for its functions that are no operators; None without the compiled kernels."""
    return _library


def isa() -> str | None:
    """The instruction set in use; None without the compiled kernels."""
    return None if _library is None else _library.hf_onebit_isa().decode()


def isas() -> tuple[str, ...]:
    """All instruction sets that this machine can run, the best last; empty without the compiled kernels."""
    return () if _library is None else tuple(_library.hf_onebit_isas().decode().split(","))


def select_isa(name: str) -> None:
    """Use another instruction set from now on; for tests and benchmarks, with no kernel running meanwhile.

    Raises:
        ValueError: this machine cannot run it, or there are no compiled kernels.
    """
    if _library is None:
        raise ValueError(f"there are no compiled kernels ({_refused}), asked for {name}")
    if _library.hf_onebit_select_isa(name.encode()):
        raise ValueError(f"this CPU runs {', '.join(isas())}, asked for {name}")


def _why_not_built() -> str:
    record = _FOLDER / "_cpu_not_built.txt"
    reason = record.read_text(encoding="utf-8").strip() if record.is_file() else "the kernels were not built"
    return f"{reason}; build them: {build_command()}"


def _source_hash() -> str:
    # As in setup.py.
    digest = hashlib.sha256()
    for file in sorted(_CSRC.iterdir()):
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _load() -> str:
    """Load the binary; the reason why not, or an empty string.

    Raises:
        ValueError: HF_ONEBIT_ISA names what this machine cannot run.
    """
    global _library  # noqa: PLW0603  (loading registers an operator, which happens once a process)
    forced = os.environ.get(_VARIABLE, "").strip().lower()
    if forced == "off":
        return f"{_VARIABLE}=off"
    if not _BINARY.is_file():
        return _why_not_built()
    # Before loading, which cannot be undone.
    if _CSRC.is_dir() and f"hf_onebit sources {_source_hash()}".encode() not in _BINARY.read_bytes():
        return f"{_BINARY.name} was built from other sources than those beside it; build again: {build_command()}"
    try:
        library = ctypes.CDLL(str(_BINARY))
    except OSError as error:
        return f"{_BINARY.name} does not load with torch {torch.__version__} ({error}); build again: {build_command()}"
    library.hf_onebit_isa.restype = library.hf_onebit_isas.restype = ctypes.c_char_p
    _library = library
    if forced and forced not in isas():
        raise ValueError(
            f"{_VARIABLE}={forced}, but this machine runs {', '.join(isas())}; unset it, or set one of those"
        )
    if forced:
        select_isa(forced)
    return ""


_refused = _load()
