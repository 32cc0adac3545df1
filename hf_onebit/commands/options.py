"""What the commands share: options that mean the same, their values, what each gives back."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from hf_onebit.byte_sizes import parse_size

# What the commands quantize with where nothing is said; a bare ``OneBitConfig()``, which takes no text, is ``closed``.
DEFAULT_PRESET = "fast"

# The JSON object of a command, and the exit status.
Result = tuple[dict[str, Any], int]


class UsageError(ValueError):
    """Options that do not go together, or say what cannot be: exit status 2."""


def add_max_shard_size(parser: argparse.ArgumentParser) -> None:
    """``--max-shard-size``."""
    parser.add_argument(
        "--max-shard-size", type=_size, default="5GB", metavar="SIZE", help="largest weight file (default 5GB)"
    )


def _size(text: str) -> str:
    """A size, as it was written."""
    try:
        parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None
    return text


def at_least(least: int) -> Callable[[str], int]:
    """What reads a whole number that is not below ``least``."""

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number, at least {least}")
        return number

    return read


def device_of(name: str | None) -> Any:
    """The device of that name; UsageError if there is none."""
    import torch

    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for the device
        reason = str(error).splitlines()[0]
        raise UsageError(f"Cannot run on --device {name!r} ({reason}): leave it out, or try --device cpu") from error
    return device
