"""Loads the compiled CPU kernels (csrc/), where they were built: nothing is compiled here.

Loading registers them for the dispatch key CPU, so they answer for tensors on the CPU in place of reference.py,
under the same schemas, fakes and autograd formulas. Without them nothing is missing but speed.

``HF_ONEBIT_ISA`` forces one of the instruction sets that the machine has, or is ``off``: then the kernels are not
loaded. ``HF_ONEBIT_ACTIVATIONS`` is ``exact``, the default, or ``int8``: see :func:`set_activations`;
without the kernels it changes nothing.
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
_ACTIVATIONS_VARIABLE = "HF_ONEBIT_ACTIVATIONS"
_ACTIVATIONS = ("exact", "int8")

_library: ctypes.CDLL | None = None
_refused = ""


def status() -> str:
    """Where this implementation answers and with which instructions, or why not and how to build it."""
    if _library is None:
        return f"not in use: {_refused}"
    digits = " and int8 activations" if activations() == "int8" else ""
    return f"in use for onebit_linear on the CPU, with {isa()} (of {', '.join(isas())}){digits}"


def build_command() -> str:
    """A line to copy that builds the kernels of this installation."""
    root = _FOLDER.parents[1]
    if (root / "setup.py").is_file():
        return f"python -m pip install --no-build-isolation --no-deps -e {root}"
    return "python -m pip install --no-build-isolation --no-deps --force-reinstall --no-binary :all: hf_onebit"


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


def activations() -> str:
    """How many digits of their inputs the compiled kernels keep: ``"exact"`` or ``"int8"``."""
    return "exact" if _library is None else _library.hf_onebit_activations().decode()


def set_activations(mode: str) -> None:
    """Set how many digits of their inputs the compiled kernels keep, in this process from now on.

    ``"int8"`` lets them round b ⊙ x to 8 bits wherever that is faster: with avx512vnni or amx and more than a few rows.
    The step is 1/127 of the largest magnitude in each row's block of at most 1024 inputs, so every input is off by at
    most half of that (docs/kernels.md). No kernel may be running meanwhile.

    Args:
        mode: ``"exact"``, the default, or ``"int8"``.

    Raises:
        ValueError: another mode, or ``"int8"`` without the compiled kernels.
    """
    if mode not in _ACTIVATIONS:
        raise ValueError(f'activations are "exact" or "int8", got {mode!r}')
    if _library is not None:
        _library.hf_onebit_select_activations(mode.encode())
    elif mode != "exact":
        raise ValueError(f"int8 activations need the compiled kernels, which are not in use: {_refused}")


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
        ValueError: HF_ONEBIT_ISA names what this machine cannot run, or HF_ONEBIT_ACTIVATIONS no mode.
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
    for name in ("isa", "isas", "activations"):
        getattr(library, f"hf_onebit_{name}").restype = ctypes.c_char_p
    _library = library
    if forced and forced not in isas():
        raise ValueError(
            f"{_VARIABLE}={forced}, but this machine runs {', '.join(isas())}; unset it, or set one of those"
        )
    if forced:
        select_isa(forced)
    mode = os.environ.get(_ACTIVATIONS_VARIABLE, "").strip().lower()
    if mode and mode not in _ACTIVATIONS:
        raise ValueError(f"{_ACTIVATIONS_VARIABLE}={mode}, expected exact or int8; unset it, or set one of those")
    if mode:
        set_activations(mode)
    return ""


_refused = _load()
