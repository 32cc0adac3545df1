"""What an argument is, checked and shown in messages: a number in its range, a dtype, a module, a path, any value."""

from __future__ import annotations

import math
import numbers
import os
from typing import Any

import torch
from torch import Tensor, nn


def checked_number(what: str, name: str, value: Any, least: float = 0.0, below: float = math.inf) -> float:
    """The finite number that a value is, from ``least`` to less than ``below``; a tensor of one number is one.

    Raises:
        ValueError: it is none.
    """
    if type(value) is float and least <= value < below:
        return value
    found, kind = math.nan, type(value)
    if kind is not bool and issubclass(kind, numbers.Real):
        try:
            found = float(value)
        except OverflowError:
            found = math.inf
    elif isinstance(value, Tensor) and value.numel() == 1 and _is_real(value) and not value.is_meta:
        found = float(value)
    if not least <= found < below:
        span = f"a finite number >= {least:g}" if below == math.inf else f"a number from {least:g} to below {below:g}"
        raise ValueError(f"{what} got {name}={shown(value)}, expected {span}")
    return found


def require_module(what: str, model: Any) -> None:
    """TypeError unless a model is a module."""
    if not isinstance(model, nn.Module):
        hint = ": give the model that from_pretrained makes of it" if isinstance(model, (str, os.PathLike)) else ""
        raise TypeError(f"{what} got model={shown(model)}, expected a torch module{hint}")


def checked_dtype(what: str, dtype: Any) -> torch.dtype | None:
    """A floating dtype, or None as it is; ValueError where an argument is neither."""
    if dtype is not None and (not isinstance(dtype, torch.dtype) or not dtype.is_floating_point):
        raise ValueError(f"{what} got dtype={shown(dtype)}, expected None or like torch.bfloat16")
    return dtype


def path_of(what: str, name: str, value: Any) -> str:
    """A path as text; TypeError where an argument is none."""
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"{what} got {name}={shown(value)}, expected the path of a folder, as text or a Path")
    return os.fspath(value)


def shown(value: Any) -> str:
    """A value in few words, for a message."""
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype} {tuple(value.shape)}"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _is_real(value: Tensor) -> bool:
    return not value.is_complex() and value.dtype != torch.bool
