"""What the commands share: options that mean the same, their values, what each gives back."""

from __future__ import annotations

import argparse
from typing import Any

# What the commands quantize with where nothing is said; a bare ``OneBitConfig()``, which takes no text, is ``closed``.
DEFAULT_PRESET = "fast"

# The JSON object of a command, and the exit status.
Result = tuple[dict[str, Any], int]


class UsageError(ValueError):
    """Options that do not go together, or ask for what is not there: one line, and exit status 2."""


def add_max_shard_size(parser: argparse.ArgumentParser) -> None:
    """``--max-shard-size``."""
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="largest weight file (default 5GB)")


def device_of(name: str | None) -> Any:
    """The device of that name, once it is clear that there is one."""
    import torch

    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for the device
        reason = str(error).splitlines()[0]
        raise ValueError(f"Cannot run on --device {name!r} ({reason}): leave it out, or try --device cpu") from error
    return device
