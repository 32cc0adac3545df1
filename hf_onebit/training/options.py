"""The options of ``DiodeMix``: what they may be, and which kind of parameter a learning rate is for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from hf_onebit.algorithms.update import ROUNDINGS
from hf_onebit.argument_checks import checked_number, shown
from hf_onebit.nn.packed_module import check_whole
from hf_onebit.nn.parameter import MPQWeightParameter
from hf_onebit.nn.parameter_checks import FLOATS
from hf_onebit.nn.sign_parameter import SignWeightParameter

__all__ = [
    "STATES",
    "check_group",
    "check_options",
    "check_parameters",
    "check_rates",
    "check_state_dict",
    "listed_groups",
    "split_groups",
]

STATES = ("8bit", "factored", "float32")
OPTIONS = (
    *("lr", "betas", "eps", "weight_decay", "correct_bias", "dtype", "states", "rank", "update_proj_gap", "scale"),
    *("rounding", "seed", "metrics"),
)
"""What every group has."""
ONLY_WHOLE = ("lr_packed", "lr_signs", "lr_scales", "fused")
"""What no group has."""
_ORDER = ("float", "packed", "signs", "scales")
_STATISTICS = ("scales", "zeros", "a", "b")


def check_options(options: Mapping[str, Any], what: str = "DiodeMix") -> None:
    """Look at the options of ``DiodeMix``, or of one of its groups, which ``what`` names.

    Raises:
        ValueError: an option that is missing, of another type or out of range.
    """
    missing = [name for name in OPTIONS if name not in options]
    if missing:
        raise ValueError(
            f"{what} got no {' and no '.join(missing)}: expected all of DiodeMix's options; groups and states "
            "of another optimizer cannot be taken over"
        )
    for name in ("lr", "eps", "weight_decay", "scale"):
        checked_number(what, name, options[name])
    betas = options["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"{what} got betas={shown(betas)}, expected two numbers from 0 to below 1, like (0.9, 0.99)")
    for number, beta in enumerate(betas):
        checked_number(what, f"betas[{number}]", beta, 0.0, 1.0)
    for name, choices in (("states", STATES), ("rounding", ROUNDINGS)):
        value = options[name]
        if not (isinstance(value, str) and value in choices) and (name == "states" or value is not None):
            none = "" if name == "states" else "None or "
            raise ValueError(f"{what} got {name}={shown(value)}, expected {none}one of {', '.join(choices)}")
    check_whole(what, "update_proj_gap", options["update_proj_gap"], 1)
    if options["rank"] is not None:
        check_whole(what, "rank", options["rank"], 1)
    if options["seed"] is not None:
        check_whole(what, "seed", options["seed"], 0, (1 << 64) - 1)
    for name in ("correct_bias", "metrics"):
        if not isinstance(options[name], bool):
            raise ValueError(f"{what} got {name}={shown(options[name])}, expected True or False")
    if options["dtype"] not in FLOATS:
        raise ValueError(
            f"{what} got dtype={shown(options['dtype'])}, expected a floating torch.dtype: one of "
            f"{', '.join(map(str, FLOATS))}"
        )


def check_rates(rates: Mapping[str, Any]) -> dict[str, float]:
    """{kind: learning rate} of those that are given; ``rates`` are the options ``lr_packed`` and so on, by kind.

    Raises:
        ValueError: one that is no finite number >= 0.
    """
    return {kind: checked_number("DiodeMix", f"lr_{kind}", rate) for kind, rate in rates.items() if rate is not None}


def listed_groups(params: Any) -> list[Any]:
    """What an optimizer takes, as a list of parameters, named parameters or groups.

    Raises:
        TypeError: it is none of these.
        ValueError: a group without parameters, or with an option that only the whole optimizer has.
    """
    if isinstance(params, torch.Tensor) or not isinstance(params, Iterable):
        raise TypeError(
            f"DiodeMix got params={shown(params)}, expected parameters in a list, model.parameters(), or groups"
        )
    given = list(params)
    for number, group in enumerate(given):
        if isinstance(group, dict):
            check_group(group, f"DiodeMix's param group {number}")
    return given


def check_group(group: Any, what: str) -> None:
    """TypeError or ValueError for what is no group, before its options are filled up with the optimizer's."""
    if not isinstance(group, dict):
        raise TypeError(f"{what} is {shown(group)}, expected a dict like {{'params': [...], 'lr': 1e-4}}")
    if "params" not in group:
        raise ValueError(f"{what} has the keys {', '.join(map(str, group)) or 'none'}, expected params among them")
    if whole := [name for name in ONLY_WHOLE if name in group]:
        raise ValueError(
            f"{what} got {whole[0]}, which only DiodeMix as a whole takes: give it there, or a group its own lr"
        )


def check_parameters(group: Mapping[str, Any], what: str) -> None:
    """ValueError for a parameter of a group that cannot be trained, or not by its rounding."""
    for p in group["params"]:
        packed = isinstance(p, MPQWeightParameter) and p.is_packed
        if not packed and not p.is_floating_point():
            raise ValueError(
                f"{what} got a parameter of {p.dtype} {tuple(p.shape)} that is no MPQWeightParameter; leave it out, or "
                "hold it in a module of hf_onebit.nn"
            )
        if packed and group["rounding"] == "inertia" and not isinstance(p, SignWeightParameter) and p.w_bit > 1:
            raise ValueError(
                f"{what} got rounding='inertia', which flips signs, for codes of {p.w_bit} bits {tuple(p.shape)}: "
                "leave rounding at None, or put signs into a group of their own"
            )


def check_state_dict(state_dict: Any) -> None:
    """ValueError for a state that ``DiodeMix`` cannot go on from: another optimizer's, or options out of range."""
    if not isinstance(state_dict, dict) or not {"state", "param_groups"} <= state_dict.keys():
        raise ValueError(
            f"DiodeMix got the state {shown(state_dict)}, expected what DiodeMix.state_dict() gave: a dict with state "
            "and param_groups"
        )
    for number, group in enumerate(state_dict["param_groups"]):
        check_options(group, f"DiodeMix's state, param group {number},")
    for number, state in state_dict["state"].items():
        if "step" not in state or (int(state["step"]) and "exp_avg_l" not in state):
            raise ValueError(
                f"DiodeMix's state of parameter {number} has {', '.join(map(str, state)) or 'nothing'}, expected "
                "step and moments by the names that DiodeMix.state_dict() gives them"
            )


def split_groups(params: Iterable[Any], rates: Mapping[str, float]) -> list[Any]:
    """Groups by kind of parameter, where a kind has a learning rate of its own.

    Args:
        params: what an optimizer takes.
        rates: learning rates by kind: "packed", "signs", "scales" (statistics of packed weights among ``params``).

    Returns:
        ``params`` as they are if there are no rates; else a group for each kind that each given group has.
    """
    given = listed_groups(params)
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
