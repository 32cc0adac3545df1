"""Loads the compiled CPU kernels (csrc/), where they were built: nothing is compiled here.

They lie beside this file (setup.py), or in the user's cache (``hf-onebit doctor --build``). Loading registers them for
the dispatch key CPU, so they answer for tensors on the CPU in place of reference.py, under the same schemas, fakes and
autograd formulas. Without them nothing is missing but speed.

``HF_ONEBIT_ISA`` forces one of the instruction sets that the machine has, or is ``off``: then the kernels are not
loaded. ``HF_ONEBIT_ACTIVATIONS`` is ``exact``, the default, or ``int8``: see :func:`set_activations`;
without the kernels it changes nothing. ``HF_ONEBIT_TILE_ROWS`` is the fewest rows for which products with codes go by
tiles of bfloat16: see :func:`select_tile_rows`.
"""

import ctypes
import os
import warnings
from pathlib import Path

import torch

from hf_onebit.ops import build, kernel_cache

_FOLDER = Path(__file__).resolve().parent
_VARIABLE = "HF_ONEBIT_ISA"
_OPERATORS = "onebit and mpq layers"
_OFF = f"{_VARIABLE}=off"
_ACTIVATIONS_VARIABLE = "HF_ONEBIT_ACTIVATIONS"
_ACTIVATIONS = ("exact", "int8")
_TILE_ROWS_VARIABLE = "HF_ONEBIT_TILE_ROWS"
_MOST_TILE_ROWS = 1 << 62

_library: ctypes.CDLL | None = None
_origin: Path | None = None
_refused = ""
_warned = False


def status() -> str:
    """Where this implementation answers and with which instructions, or why not and how to build it."""
    if _library is None:
        return "not in use: " + (_refused if _refused == _OFF else f"{_refused}; {build_command()}")
    cached = "" if _origin is None or _origin.parent == _FOLDER else f", from {_origin}"
    digits = " and int8 activations" if activations() == "int8" else ""
    return f"in use for {_OPERATORS} on the CPU, with {isa()} (of {', '.join(isas())}){digits}{cached}"


def build_command() -> str:
    """What to type to build the kernels of this installation, and what to do before."""
    if not build.CSRC.is_dir():
        command = "python -m pip install --no-build-isolation --no-deps --force-reinstall --no-binary :all: hf_onebit"
    else:
        command = "hf-onebit doctor --build"
    missing = build.obstacle()
    return f"{build.remedy(missing)}, then build them: {command}" if missing else f"build them: {command}"


def warn_if_missing() -> None:
    """Say, once a process, that the reference answers for want of compiled kernels, unless that was asked for."""
    global _warned  # noqa: PLW0603  (once a process)
    if _warned or _library is not None or _refused == _OFF:
        return
    _warned = True
    warnings.warn(
        f"hf_onebit runs packed layers on the CPU without its compiled kernels, which are many times faster "
        f"({_refused}); {build_command()}",
        stacklevel=2,
    )


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


def activations() -> str:
    """How many digits of their inputs the compiled kernels keep: ``"exact"`` or ``"int8"``."""
    return "exact" if _library is None else _library.hf_onebit_activations().decode()


def set_activations(mode: str) -> None:
    """Set how many digits of their inputs the compiled kernels keep, in this process from now on.

    ``"int8"`` lets them round b ⊙ x to 8 bits wherever that is faster: with avx2, avx512vnni or amx and enough rows.
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
        raise ValueError(
            f"int8 activations need the compiled kernels, which are not in use: {_refused}; {build_command()}"
        )


def tile_rows() -> int | None:
    """The fewest rows that :func:`select_tile_rows` asked for; None where the measured table decides."""
    return None if _library is None else _library.hf_onebit_tile_rows() or None


def select_tile_rows(rows: int | None) -> None:
    """Set from how many rows of x on products with codes go by tiles of bfloat16, where the processor has AMX.

    For tests and benchmarks, with no kernel running meanwhile; without the kernels, or without AMX, it changes nothing.

    Args:
        rows: 1 or more, a huge number for never; None for the table of docs/kernels.md.

    Raises:
        ValueError: rows are fewer than 1, or more than 2^62.
    """
    if rows is not None and not 1 <= rows <= _MOST_TILE_ROWS:
        raise ValueError(f"rows must be between 1 and 2^62, or None for the usual choice, got {rows}")
    if _library is not None:
        _library.hf_onebit_select_tile_rows(ctypes.c_int64(rows or 0))


def _why_not_built() -> str:
    record = _FOLDER / "_cpu_not_built.txt"
    return record.read_text(encoding="utf-8").strip() if record.is_file() else "the kernels were not built"


def _open(binary: Path) -> str:
    """Load one binary; the reason why not, or an empty string."""
    global _library, _origin
    # Before loading, which cannot be undone.
    if build.CSRC.is_dir() and build.embedded().encode() not in binary.read_bytes():
        return f"{binary.name} was built from other sources than those that are installed"
    try:
        library = ctypes.CDLL(str(binary))
    except OSError as error:
        return f"{binary.name} does not load with torch {torch.__version__} ({error})"
    for name in ("isa", "isas", "activations"):
        getattr(library, f"hf_onebit_{name}").restype = ctypes.c_char_p
    library.hf_onebit_tile_rows.restype = ctypes.c_int64
    library.hf_onebit_select_tile_rows.restype = None
    _library, _origin = library, binary
    return ""


def _open_cached() -> str:
    """Load the binary of the user's cache; the reason why not, "none" where there is none, or an empty string."""
    binary = kernel_cache.binary()
    if binary is None or not os.path.lexists(binary):
        return "none"
    # The path without symbolic links is what was examined, so it is what is loaded.
    return kernel_cache.distrust(binary) or _open(binary.resolve())


def load() -> str:
    """Load the kernels where there are some and they are not loaded; the reason why not, or an empty string.

    Raises:
        ValueError: HF_ONEBIT_ISA names what this machine cannot run, HF_ONEBIT_ACTIVATIONS no mode, or
            HF_ONEBIT_TILE_ROWS no number of rows.
    """
    global _refused  # noqa: PLW0603  (what status() says)
    forced = os.environ.get(_VARIABLE, "").strip().lower()
    if _library is not None:
        return ""
    if forced == "off":
        _refused = _OFF
        return _refused
    packaged = _FOLDER / build.BINARY
    _refused = _open(packaged) if packaged.is_file() else _why_not_built()
    if _refused:
        cached = _open_cached()
        _refused = "" if not cached else _refused if cached == "none" else f"{_refused}; in the cache: {cached}"
    if forced and not _refused:
        if forced not in isas():
            raise ValueError(
                f"{_VARIABLE}={forced}, but this machine runs {', '.join(isas())}; unset it, or set one of those"
            )
        select_isa(forced)
    mode = os.environ.get(_ACTIVATIONS_VARIABLE, "").strip().lower()
    if mode and mode not in _ACTIVATIONS:
        raise ValueError(f"{_ACTIVATIONS_VARIABLE}={mode}, expected exact or int8; unset it, or set one of those")
    if mode and not _refused:
        set_activations(mode)
    rows = os.environ.get(_TILE_ROWS_VARIABLE, "").strip()
    if rows and not (rows.isdecimal() and 1 <= int(rows) <= _MOST_TILE_ROWS):
        raise ValueError(f"{_TILE_ROWS_VARIABLE}={rows}, expected a number of rows from 1 on; unset it, or set one")
    select_tile_rows(int(rows) if rows else None)
    return _refused


load()
