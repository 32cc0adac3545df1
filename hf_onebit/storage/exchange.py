"""Two folders that change places in one step."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from pathlib import Path
from typing import Any

_HERE = -100  # AT_FDCWD: paths are as of the working directory
_EXCHANGE = 2  # RENAME_EXCHANGE


def exchange(one: Path, other: Path) -> bool:
    """Let two files or folders change places, so that at no moment either name is missing.

    Returns:
        whether it was done: only Linux has this (renameat2), and not on every file system.
    """
    call = _renameat2()
    return call is not None and call(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0


@functools.cache
def _renameat2() -> Any:
    """The function of the C library; None where it has none."""
    if sys.platform != "linux":
        return None
    call = getattr(ctypes.CDLL(None), "renameat2", None)
    if call is not None:
        call.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    return call
