"""What an ``MPQWeightParameter`` may be made of, what its training attributes may say, and what ``update`` takes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hf_onebit.algorithms.moments import BlockwiseMoment, FactoredMoment
from hf_onebit.algorithms.update import ROUNDINGS
from hf_onebit.argument_checks import checked_number, shown
from hf_onebit.formats.weight_layout import check_rows
from hf_onebit.nn.update_step import Rounding, Step

__all__ = [
    "FLOATS",
    "NUMBERS",
    "TENSORS",
    "check_arguments",
    "check_gradient",
    "check_update",
    "checked_gradient",
    "checked_rounding",
    "largest_magnitude",
]

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
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""What arithmetic, gradients and plain moments may be of."""
_FLOATS = "float16, bfloat16, float32 or float64"
# Types that count: in narrower ones adding 1 wraps around or does nothing before a run is over.
_COUNTS = (torch.int32, torch.int64, torch.float32, torch.float64)


def checked_rounding(weight: Any) -> Rounding:
    """The training attributes of a weight; ValueError where one says nothing that there is."""
    if weight.rounding not in ROUNDINGS:
        raise ValueError(f"the weight's rounding is {weight.rounding!r}, expected one of {', '.join(ROUNDINGS)}")
    for name, bits in (("seed", 64), ("stream", 32)):
        value = getattr(weight, name)
        if type(value) is not int or not 0 <= value < 1 << bits:
            raise ValueError(f"the weight's {name} is {value!r}, expected a whole number from 0 to 2^{bits} - 1")
    inertia = checked_number("the weight", "inertia", weight.inertia)
    return Rounding(weight.rounding, weight.seed, weight.stream, inertia)


def check_gradient(grad: Any, weight: Tensor, name: str = "grad") -> None:
    """TypeError or ValueError for what is no gradient of a packed weight; its shape is looked at elsewhere."""
    if not isinstance(grad, Tensor):
        raise TypeError(f"update got {name}={shown(grad)}, expected a tensor (in, out)")
    _require_dense(name, grad, weight, "the gradient of the float weight that the words stand for")


def check_update(weight: Tensor, grad: Any, step: Step, flips: bool, name: str = "grad") -> dict[str, Any]:
    """Look at what ``MPQWeightParameter.update`` was given, before anything is touched. No tensor is read but ``step``.

    Args:
        weight: the packed words.
        grad: its gradient, or the one that the caller gave.
        step: the other arguments as they were given.
        flips: whether rounding is "inertia".
        name: of the gradient.

    Returns:
        {field of ``step``: its value as a plain number}.

    Raises:
        TypeError: an argument of another type.
        ValueError: a number out of range, or a tensor of a dtype, layout or device that it cannot have.
    """
    if weight.is_meta:
        raise ValueError("update got packed words on the meta device: load the model whole to train it")
    check_gradient(grad, weight, name)
    first, second = step.exp_avg_l, step.exp_avg_s
    if first is not None:
        _check_moment("exp_avg_l", first, weight, True)
    if second is not None:
        _check_moment("exp_avg_s", second, weight, flips)
        if second is first:
            raise ValueError("update got one object as exp_avg_s and exp_avg_l: give each moment memory of its own")
    if (first is grad and first is not None) or (second is grad and second is not None):
        raise ValueError(f"update got {name} as a moment too: give each moment memory of its own")
    if step.step is not None:
        _check_step(step.step)
    if not isinstance(step.dtype, torch.dtype):
        raise TypeError(f"update got dtype={shown(step.dtype)}, expected a torch.dtype: torch.float32, for one")
    if step.dtype not in FLOATS:
        raise ValueError(f"update got dtype={step.dtype}, expected {_FLOATS} (of torch)")
    correct = step.correct_bias
    if correct is not None and not (isinstance(correct, (bool, int)) and correct in (0, 1)):
        raise TypeError(f"update got correct_bias={shown(correct)}, expected True, False or None")
    if step.projector is not None and not callable(getattr(step.projector, "project_back", None)):
        raise TypeError(
            f"update got projector={shown(step.projector)}, expected None or an object with project_back(tensor), and "
            "with project(tensor, step) where the gradient is not projected yet"
        )
    return {
        "lr": checked_number("update", "lr", step.lr),
        "weight_decay": checked_number("update", "weight_decay", step.weight_decay),
        "beta1": checked_number("update", "beta1", step.beta1, 0.0, 1.0),
        "beta2": checked_number("update", "beta2", step.beta2, 0.0, 1.0),
        "eps": checked_number("update", "eps", step.eps),
        "correct_bias": bool(correct),
    }


def checked_gradient(gradient: Tensor, shape: tuple[int, int], step: Step, flipped: int | None) -> tuple[Tensor, float]:
    """The gradient, projected if it must be, and the largest magnitude in what came. With :func:`check_update` before,
    everything is refused here, before anything is written. That one number is waited for.

    Args:
        gradient: float ``(in, out)``, or the projected one.
        shape: (in, out).
        step: the other arguments of ``update``.
        flipped: the weight's largest code where rounding is "inertia", else None.

    Raises:
        TypeError: a projector without ``project`` that needs it.
        ValueError: shapes that do not belong together, or a gradient that is not finite.
    """
    if step.projector is None and tuple(gradient.shape) != shape:
        raise ValueError(f"update got a gradient of shape {tuple(gradient.shape)}, expected (in, out) = {shape}")
    flips = flipped is not None
    if flipped is not None and flipped > 1:
        raise ValueError(f"rounding='inertia' flips signs, got codes up to {flipped}; set rounding to 'stochastic'")
    largest = largest_magnitude(gradient)
    if step.projector is not None and tuple(gradient.shape) == shape:
        like = step.exp_avg_s if step.exp_avg_l is None and not flips else step.exp_avg_l
        if like is None or tuple(like.shape) != shape:  # not projected yet
            gradient = _projected(gradient, step)
    if gradient.dim() != 2:
        raise ValueError(f"update got a gradient of shape {tuple(gradient.shape)}, expected two dimensions")
    for name, state in (("exp_avg_s", step.exp_avg_s), ("exp_avg_l", step.exp_avg_l)):
        wanted = shape if flips and name == "exp_avg_s" else tuple(gradient.shape)
        if state is not None and tuple(state.shape) != wanted:
            whose = "the weight's" if flips and name == "exp_avg_s" else "the gradient's"
            raise ValueError(f"{name} has shape {tuple(state.shape)}, expected {whose} {wanted}")
    return gradient, largest


def largest_magnitude(gradient: Tensor) -> float:
    """The largest magnitude in a gradient, 0 of an empty one.

    Raises:
        ValueError: a value that is not finite.
    """
    if not gradient.numel():
        return 0.0
    # Neither is finite where any value is not, and they take no second tensor of the weight's size.
    largest = float(torch.stack(torch.aminmax(gradient)).abs().max())
    if not math.isfinite(largest):
        raise ValueError(
            "update got a gradient with inf or nan; nothing was changed. Skip this step, and lower the learning rate "
            "or clip gradients if it comes again"
        )
    return largest


def _projected(gradient: Tensor, step: Step) -> Tensor:
    project = getattr(step.projector, "project", None)
    if not callable(project):
        raise TypeError(
            f"update got a gradient of the weight's shape {tuple(gradient.shape)} and a projector without "
            "project(tensor, step): give the projected gradient, or a projector that has it"
        )
    low = project(gradient, step.t)
    if not isinstance(low, Tensor) or low.dim() != 2 or not low.is_floating_point():
        raise ValueError(f"the projector's project gave {shown(low)}, expected a floating tensor of two dimensions")
    return low


def _check_step(step: Any) -> None:
    expected = "expected None or a tensor of one number, of the steps that there were, to which 1 is added in place"
    remedy = "torch.tensor(0) at the start, or None: then the weight counts"
    if not isinstance(step, Tensor):
        raise TypeError(f"update got step={shown(step)}, {expected}: {remedy}")
    if step.numel() != 1 or step.dtype not in _COUNTS or step.is_meta:
        raise ValueError(f"update got step={shown(step)}, {expected} (int32, int64, float32 or float64): {remedy}")
    count = step.item()
    if not 0 <= count < math.inf or count % 1:
        raise ValueError(f"update got step={count}, expected a whole number >= 0: {remedy}")


def _check_moment(name: str, state: Any, weight: Tensor, signed: bool) -> None:
    if isinstance(state, Tensor):
        _require_dense(name, state, weight, "a moment: zeros of the gradient's shape at the start")
        if 0 in state.stride() and state.numel() > 1:
            raise ValueError(f"update got {name} with numbers that share memory (expand?): give it as .clone()")
    elif isinstance(state, FactoredMoment) and signed:
        raise ValueError(
            f"update got {name} as a FactoredMoment, which has no signs: give a tensor or a BlockwiseMoment"
        )
    elif isinstance(state, BlockwiseMoment) and signed and state.codes.dtype != torch.int8:
        raise ValueError(f"update got {name} as a BlockwiseMoment without signs: make it with signed=True")
    elif not all(hasattr(state, part) for part in ("shape", "begin", "advance")):
        raise TypeError(
            f"update got {name}={shown(state)}, expected None, a tensor, or a moment of hf_onebit.algorithms.moments"
        )


def _require_dense(name: str, tensor: Tensor, weight: Tensor, what: str) -> None:
    if tensor.dtype not in FLOATS or tensor.layout != torch.strided:
        got = tensor.dtype if tensor.layout == torch.strided else tensor.layout
        raise ValueError(f"update got {name} of {got}, expected a dense tensor of {_FLOATS}, {what}")
    if tensor.device != weight.device:
        raise ValueError(f"update got {name} on {tensor.device}, expected {weight.device}, where the words are")


def check_arguments(weight: Tensor, given: dict[str, Any]) -> None:
    """TypeError or ValueError for an argument of ``MPQWeightParameter`` that is none."""
    what = "MPQWeightParameter"
    for name in TENSORS:
        if given[name] is not None and not isinstance(given[name], Tensor):
            raise TypeError(f"{what} got {name} of type {type(given[name]).__name__}, expected a tensor or None")
    for name in NUMBERS:
        if type(given[name]) is not int:
            raise TypeError(f"{what} got {name}={given[name]!r}, expected a whole number")
    if given["group_size"] < 1 and given["group_size"] != -1:
        raise ValueError(f"{what} got group_size={given['group_size']}, expected at least 1, or -1 for all inputs")
    for name in ("requires_grad", "asym"):
        if not isinstance(given[name], bool):
            raise TypeError(f"{what} got {name}={given[name]!r}, expected True or False")
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
    for name, tensor in (
        ("scales", scales),
        ("zeros", zeros if zeros is not None and zeros.is_floating_point() else None),
    ):
        if tensor is not None and weight.dim() == 2 and (tensor.dim() != 2 or tensor.shape[1] != weight.shape[1]):
            raise ValueError(
                f"{what} got {name} of shape {tuple(tensor.shape)}, expected (groups, {weight.shape[1]}): one column "
                "for each column of the data"
            )
    if scales is not None and zeros is not None and zeros.is_floating_point() and zeros.shape != scales.shape:
        raise ValueError(f"{what} got zeros of shape {tuple(zeros.shape)}, expected scales' {tuple(scales.shape)}")
    if zeros is not None and not zeros.is_floating_point() and not given["asym"]:
        raise ValueError(
            f"{what} got integer zeros with asym=False, expected asym=True: packed zero points are asymmetric"
        )
