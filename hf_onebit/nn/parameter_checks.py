"""What an ``MPQWeightParameter`` may be made of, and what its training attributes may say."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hf_onebit.algorithms.update import ROUNDINGS
from hf_onebit.formats.weight_layout import check_rows
from hf_onebit.nn.update_step import Rounding

__all__ = ["NUMBERS", "TENSORS", "check_arguments", "checked_rounding"]

TENSORS = (
    "privileged_grad",
    "scales",
    "zeros",
    "g_idx",
    "q_perm",
    "qscales_zeros",
    "qscales_scales",
    "qzeros_zeros",
    "qzeros_scales",
    "q_group_map",
)
NUMBERS = ("w_bit", "group_size", "layer_type")


def checked_rounding(weight: Any) -> Rounding:
    """The training attributes of a weight; ValueError where one says nothing that there is."""
    if weight.rounding not in ROUNDINGS:
        raise ValueError(f"the weight's rounding is {weight.rounding!r}, expected one of {', '.join(ROUNDINGS)}")
    for name, bits in (("seed", 64), ("stream", 32)):
        value = getattr(weight, name)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << bits:
            raise ValueError(f"the weight's {name} is {value!r}, expected a whole number from 0 to 2^{bits} - 1")
    return Rounding(weight.rounding, weight.seed, weight.stream, float(weight.inertia))


def check_arguments(weight: Tensor, given: dict[str, Any]) -> None:
    """TypeError or ValueError for an argument of ``MPQWeightParameter`` that is none."""
    what = "MPQWeightParameter"
    for name in TENSORS:
        if given[name] is not None and not isinstance(given[name], Tensor):
            raise TypeError(f"{what} got {name} of type {type(given[name]).__name__}, expected a tensor or None")
    for name in NUMBERS:
        if isinstance(given[name], bool) or not isinstance(given[name], int):
            raise TypeError(f"{what} got {name}={given[name]!r}, expected a whole number")
    if not isinstance(given["asym"], bool):
        raise TypeError(f"{what} got asym={given['asym']!r}, expected True or False")
    if given["rows"] is not None:
        check_rows(given["rows"])
    for name in ("g_idx", "q_perm", "q_group_map"):
        tensor = given[name]
        if tensor is not None and (tensor.is_floating_point() or tensor.is_complex() or tensor.dim() != 1):
            raise ValueError(
                f"{what} got {name} of {tensor.dtype} {tuple(tensor.shape)}, expected integers of one dimension"
            )
    if given["q_group_map"] is not None and given["q_group_map"].numel() % 2:
        raise ValueError(f"{what} got a q_group_map of {given['q_group_map'].numel()} numbers, expected pairs")
    scales, zeros = given["scales"], given["zeros"]
    for name, tensor in (("scales", scales), ("privileged_grad", given["privileged_grad"])):
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"{what} got {name} of {tensor.dtype}, expected floating point")
    if scales is not None and weight.dim() == 2 and (scales.dim() != 2 or scales.shape[1] != weight.shape[1]):
        raise ValueError(
            f"{what} got scales of shape {tuple(scales.shape)}, expected (groups, {weight.shape[1]}): one column for "
            "each column of the data"
        )
    if scales is not None and zeros is not None and zeros.is_floating_point() and zeros.shape != scales.shape:
        raise ValueError(f"{what} got zeros of shape {tuple(zeros.shape)}, expected scales' {tuple(scales.shape)}")
    if zeros is not None and not zeros.is_floating_point() and not given["asym"]:
        raise ValueError(
            f"{what} got integer zeros with asym=False, expected asym=True: packed zero points are asymmetric"
        )
