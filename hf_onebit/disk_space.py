"""What a disk has left, and a full one told in words."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from hf_onebit.byte_sizes import shown_size

# No space, no more of it for this user, and a file larger than this process may write.
_FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}


class DiskFullError(OSError):
    """There is no room for what was to be written; the message says where, and what to do."""


def free_space(place: str | os.PathLike[str]) -> int:
    """Bytes that are free on the disk of a folder that is there, or is to be made."""
    path = Path(place).resolve()
    return shutil.disk_usage(next(p for p in (path, *path.parents) if p.is_dir())).free


@contextlib.contextmanager
def told_if_full(place: str | os.PathLike[str], remedy: str) -> Iterator[None]:
    """Have what fails inside for want of space say where that was.

    Args:
        place: folder or file that is written.
        remedy: what to do; a sentence without its full stop.

    Raises:
        DiskFullError: in place of the system's or safetensors' own error.
        OSError: another failed write of safetensors, whose errors are no OSError.
    """
    try:
        yield
    except DiskFullError:
        raise
    except (OSError, SafetensorError) as error:
        number = error.errno if isinstance(error, OSError) else _number_of(error)
        if number is not None and number in _FULL:
            raise DiskFullError(
                f"Cannot write {str(place)!r}: {os.strerror(number)} ({shown_size(free_space(place))} are free there). "
                + remedy
            ) from error
        if isinstance(error, SafetensorError) and number is not None:
            raise OSError(number, os.strerror(number), str(place)) from error
        raise


def _number_of(error: SafetensorError) -> int | None:
    """The system's number of an error, which safetensors has in its text alone."""
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None
