"""The options of ``DiodeMix``: what they may be, and which kind of parameter a learning rate is for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from hf_onebit.algorithms.update import ROUNDINGS
from hf_onebit.nn.parameter import MPQWeightParameter
from hf_onebit.nn.sign_parameter import SignWeightParameter

__all__ = ["STATES", "check_options", "split_groups"]

STATES = ("8bit", "factored", "float32")
_ORDER = ("float", "packed", "signs", "scales")
_STATISTICS = ("scales", "zeros", "a", "b")


def check_options(options: Mapping[str, Any]) -> None:
    """ValueError for an option of ``DiodeMix`` out of range."""
    numbers = {"lr": (0, None), "eps": (0, None), "weight_decay": (0, None), "scale": (None, None)}
    for name, (least, _) in numbers.items():
        value = float(options[name])
        if not value < float("inf") or (least is not None and value < least):
            raise ValueError(f"DiodeMix got {name}={options[name]!r}, expected a finite number >= 0")
    betas = options["betas"]
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"DiodeMix got betas={betas!r}, expected two numbers from 0 to below 1")
    if options["states"] not in STATES:
        raise ValueError(f"DiodeMix got states={options['states']!r}, expected one of {', '.join(STATES)}")
    if options["rounding"] is not None and options["rounding"] not in ROUNDINGS:
        raise ValueError(f"DiodeMix got rounding={options['rounding']!r}, expected None or one of {ROUNDINGS}")
    for name, most in (("rank", None), ("update_proj_gap", None), ("seed", 1 << 64)):
        value = options[name]
        if name in ("rank", "seed") and value is None:
            continue
        least = 0 if name == "seed" else 1
        if isinstance(value, bool) or not isinstance(value, int) or value < least or (most and value >= most):
            raise ValueError(f"DiodeMix got {name}={value!r}, expected a whole number >= {least}")
    if not isinstance(options["dtype"], torch.dtype) or not options["dtype"].is_floating_point:
        raise ValueError(f"DiodeMix got dtype={options['dtype']!r}, expected a floating torch.dtype")


def split_groups(params: Iterable[Any], rates: Mapping[str, float]) -> list[Any]:
    """Groups by kind of parameter, where a kind has a learning rate of its own.

    Args:
        params: what an optimizer takes.
        rates: learning rates by kind: "packed", "signs", "scales" (statistics of packed weights among ``params``).

    Returns:
        ``params`` as they are if there are no rates; else a group for each kind that each given group has.
    """
    given = list(params)
    if not rates:
        return given
    groups = given if given and isinstance(given[0], dict) else [{"params": given}]
    groups = [{**group, "params": _listed(group["params"])} for group in groups]
    everything = [_tensor(item) for group in groups for item in group["params"]]
    packed = [p for p in everything if isinstance(p, MPQWeightParameter)]
    statistics = {id(getattr(p, name, None)) for p in packed for name in _STATISTICS}
    split = []
    for group in groups:
        kinds = {kind: [] for kind in _ORDER}  # type: dict[str, list[Any]]
        for item in group["params"]:
            kinds[_kind(_tensor(item), statistics)].append(item)
        for kind in _ORDER:
            if kinds[kind]:
                rate = {"lr": rates[kind]} if kind in rates else {}
                split.append({**group, **rate, "params": kinds[kind]})
    return split


def _listed(params: Any) -> list[Any]:
    return [params] if isinstance(params, torch.Tensor) else list(params)


def _tensor(item: Any) -> Any:
    return item[1] if isinstance(item, tuple) else item


def _kind(p: Any, statistics: set[int]) -> str:
    if isinstance(p, SignWeightParameter):
        return "signs"
    if isinstance(p, MPQWeightParameter) and p.is_packed:
        return "packed"
    return "scales" if id(p) in statistics else "float"
