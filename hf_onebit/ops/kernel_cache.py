"""The user's own place for compiled CPU kernels, for installs that could not compile them, and whether it is safe.

``<cache>/kernels/<key>/_cpu.abi3.so``, where the cache is ``HF_ONEBIT_CACHE``, else the platform's cache folder, and
the key names sources, torch's stable ABI and the platform. Loading a library runs its code, so nothing is loaded that
anybody but this user (or root) could have put there.
"""

import os
import stat
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

from hf_onebit.ops import build

_VARIABLE = "HF_ONEBIT_CACHE"


def folder() -> Path | None:
    """The cache of this user; None where there is no home to hold one."""
    forced = os.environ.get(_VARIABLE)
    if forced:
        return Path(os.path.abspath(os.path.expanduser(forced)))
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(xdg):  # others are to be ignored, by its specification
        return Path(xdg) / "hf_onebit"
    home = os.path.expanduser("~")
    if not os.path.isabs(home):
        return None
    return Path(home) / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "hf_onebit"


def binary() -> Path | None:
    """Where the binary of the installed sources is, or would be; None without sources or without a cache."""
    cache = folder()
    if cache is None or not build.CSRC.is_dir():
        return None
    abi = f"torch{int(build.TARGET_VERSION[2:4], 16)}.{int(build.TARGET_VERSION[4:6], 16)}"
    return cache / "kernels" / f"{build.source_hash()}-{abi}-{sysconfig.get_platform()}" / build.BINARY


def distrust(path: Path) -> str:
    """Why what lies at ``path`` may be somebody else's work; an empty string where nobody else can have put it there.

    It and each folder above belong to this user or to root, and nobody else may write to them. A folder like /tmp,
    where all may write but nobody may replace what is another's, is good enough on the way.
    """
    try:
        path = path.resolve(strict=True)
        for each in (path, *path.parents):
            status = each.stat()
            if status.st_uid not in (os.geteuid(), 0):
                return f"{each} belongs to user {status.st_uid}, not to you"
            kept = stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX and each != path
            if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not kept:
                return f"others can write to {each}; take that away: chmod go-w {each}"
    except (OSError, RuntimeError) as error:  # RuntimeError: symbolic links in a circle, until Python 3.12
        return f"{path} cannot be examined ({error})"
    return ""


def build_binary() -> tuple[Path, float]:
    """Compile the installed sources into the cache, all or nothing.

    Returns:
        The file, and the seconds it took.

    Raises:
        RuntimeError: no sources, no safe place, no compiler, or compiling failed.
    """
    start = time.monotonic()
    target = binary()
    if target is None:
        what = f"a home folder (set {_VARIABLE})" if build.CSRC.is_dir() else f"the sources in {build.CSRC}"
        raise RuntimeError(f"The CPU kernels cannot be built without {what}")
    reason = build.obstacle()
    if reason:
        raise RuntimeError(f"The CPU kernels cannot be compiled: {reason}; {build.remedy(reason)}")
    try:
        _make(target.parent)
        unsafe = distrust(target.parent)
        if unsafe:
            raise RuntimeError(f"The CPU kernels are not built where others could change them: {unsafe}")
        with tempfile.TemporaryDirectory(dir=target.parent) as workplace:
            fresh = Path(workplace) / build.BINARY
            build.compile_binary(fresh)
            fresh.chmod(0o700)  # whatever the umask says: a file that others can write is refused
            fresh.replace(target)
    except OSError as error:
        raise RuntimeError(f"Cannot write to {target.parent} ({error}); set {_VARIABLE} to another folder") from error
    return target, time.monotonic() - start


def _make(path: Path) -> None:
    """A folder and the missing ones above it, for this user alone."""
    if not path.is_dir():
        _make(path.parent)
        path.mkdir(mode=0o700, exist_ok=True)
