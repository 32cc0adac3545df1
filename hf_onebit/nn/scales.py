"""Scales and zeros that learn: turned on and off, and what an optimizer needs to know of them.

The packed words stay as they are, and so do file and format: scales are float16 in files and in memory, and float32
parameters only while they train. Their gradients come from the packed words, by the backward operators.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_onebit.argument_checks import checked_number, require_module, shown
from hf_onebit.nn.replace import packed_layers

__all__ = [
    "freeze_scales",
    "is_rounded_in_files",
    "scale_groups",
    "scale_parameters",
    "scales_to_train",
    "train_scales",
]

KINDS = ("a", "b", "scales", "zeros")
"""The names that ``train_scales`` takes; "a" stands for "a_1" too, the second plane's."""
_IN_FILES = "dtype_in_files"


def train_scales(model: nn.Module, names: Sequence[str] | None = None) -> dict[str, nn.Parameter]:
    """Let the scales and zeros of packed layers learn: float32 parameters that require gradients.

    Nothing else changes: other parameters keep their ``requires_grad``, and those scales that are not named stay
    frozen. Call it after ``get_peft_model``, which freezes whatever it finds. :func:`freeze_scales` is the way back.

    Args:
        model: any module that holds packed layers.
        names: some of "a", "b" (of onebit layers, both planes), "scales" and "zeros" (of mpq layers); None for all.

    Returns:
        {full name: parameter} of those that learn now; one that is tied to another is named once.

    Raises:
        TypeError: the model is no module.
        ValueError: another name, or the model has no such scale; one is offloaded to the meta device, or was made ready
            for FSDP2.
    """
    found = scales_to_train(model, names)
    for parameter in found.values():
        _set_dtype(parameter, torch.float32)
        vars(parameter)[_IN_FILES] = torch.float16
        parameter.requires_grad_(True)
    return found


def scales_to_train(
    model: nn.Module, names: Sequence[str] | None = None, asked: tuple[str, str] = ("train_scales", "names")
) -> dict[str, nn.Parameter]:
    """What :func:`train_scales` would let learn; it raises what that raises, and changes nothing.

    Args:
        model, names: as there.
        asked: function and argument that messages name.
    """
    what, argument = asked
    require_module(what, model)
    listed = names is None or (isinstance(names, Iterable) and not isinstance(names, (str, bytes, Tensor)))
    wanted = KINDS if names is None else tuple(names) if listed else ()
    if not wanted or any(name not in KINDS for name in wanted):
        raise ValueError(
            f"{what} got {argument}={shown(names)}, expected some of {', '.join(KINDS)} in a list, or None"
        )
    found = {name: p for name, p in scale_parameters(model).items() if _kind(name) in wanted}
    if not found:
        raise ValueError(
            f"{what} found no {' or '.join(wanted)} in {type(model).__name__}: expected a model with packed "
            "layers; onebit layers have a and b, mpq layers scales and, unless symmetric, zeros"
        )
    offloaded = [name for name, parameter in found.items() if parameter.is_meta]
    if offloaded:
        raise ValueError(f"{offloaded[0]} is offloaded ({len(offloaded)} such scales): load the model whole to train")
    fixed = [name for name, parameter in found.items() if not isinstance(parameter, nn.Parameter)]
    if fixed:
        raise ValueError(f"{fixed[0]} was made ready for FSDP2: call train_scales before nn.prepare_for_fsdp")
    return found


def is_rounded_in_files(parameter: Tensor) -> bool:
    """Whether a model file would hold fewer digits of it than it has: a scale that learns."""
    narrow: torch.dtype = vars(parameter).get(_IN_FILES, parameter.dtype)
    return narrow != parameter.dtype


def freeze_scales(model: nn.Module) -> dict[str, float]:
    """End the training of scales: round them to float16, as files hold them, and freeze them.

    From then on the model computes with what a checkpoint of it holds, bit for bit. Rounding changes a value by at most
    2⁻¹¹ of itself, or by 2⁻²⁵ where it is below 2⁻¹⁴.

    Returns:
        {full name: ‖rounded − trained‖ / ‖trained‖} of the scales that were wider than float16.

    Raises:
        ValueError: float16 cannot hold a value; nothing was changed then.
    """
    require_module("freeze_scales", model)
    parameters = scale_parameters(model)
    wide = {name: p for name, p in parameters.items() if p.dtype != torch.float16 and not p.is_meta}
    for name, parameter in wide.items():
        if not bool(torch.isfinite(parameter.detach().half()).all()):
            raise ValueError(
                f"{name} holds values that float16 cannot (at most 65504), and scales are stored in float16: lower the "
                "learning rate, or leave this layer in floating point"
            )
    errors = {}
    for name, parameter in wide.items():
        trained = parameter.detach().float().clone()
        _set_dtype(parameter, torch.float16)
        size = float(trained.norm())
        errors[name] = float((parameter.detach().float() - trained).norm()) / size if size else 0.0
    for parameter in parameters.values():
        parameter.requires_grad_(False)
        parameter.grad = None
    return errors


def scale_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Scales and zeros of packed layers by full name, whether they learn or not; tied ones once, by the first name."""
    found: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for name, layer in packed_layers(model).items():
        for scale in layer.scale_names:
            parameter = getattr(layer, scale)
            if id(parameter) not in seen:
                seen.add(id(parameter))
                found[f"{name}.{scale}" if name else scale] = parameter
    return found


def scale_groups(model: nn.Module, lr: float, **more: Any) -> list[dict[str, Any]]:
    """Parameter groups of the scales that learn, for any optimizer of PyTorch.

    Steps of Adam and its like are as large as the learning rate, whatever the parameter; scales differ by orders of
    magnitude between layers and kinds (a one-bit layer's ``a`` is near 0.2, a 4-bit layer's ``scales`` near 0.005). So
    ``lr`` is relative: each group's rate is ``lr`` times the root mean square of its values. Values within a factor of
    two of each other share a group, so there are few.

    Args:
        model: any module that holds packed layers whose scales learn.
        lr: relative learning rate; 1e-3 moves a scale by about a thousandth of itself in a step.
        more: other entries of each group. ``weight_decay`` is 0 unless given: smaller scales are no simpler model.

    Raises:
        TypeError: the model is no module.
        ValueError: no scale learns, lr is not a positive number, or weight_decay is below 0.
    """
    require_module("scale_groups", model)
    if not isinstance(lr, (int, float)) or isinstance(lr, bool) or not 0 < lr < math.inf:
        raise ValueError(f"scale_groups got lr={shown(lr)}, expected a positive number, such as 1e-3")
    if "params" in more:
        raise ValueError("scale_groups got params: it finds the scales in the model by itself")
    if "weight_decay" in more:
        checked_number("scale_groups", "weight_decay", more["weight_decay"])
    learning = [p for p in scale_parameters(model).values() if p.requires_grad]
    if not learning:
        raise ValueError("scale_groups found no scale that learns: call hf_onebit.train_scales(model) first")
    groups: dict[int, list[nn.Parameter]] = {}
    for parameter in learning:
        groups.setdefault(_octave(parameter), []).append(parameter)
    return [
        {"params": groups[octave], "weight_decay": 0.0, **more, "lr": lr * _root_mean_square(groups[octave])}
        for octave in sorted(groups)
    ]


def plain_name(name: str) -> str:
    """The name that a module or parameter has without adapters around it."""
    parts = [part for part in name.removeprefix("base_model.model.").split(".") if part != "base_layer"]
    return ".".join(parts)


def set_scales(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Copy values into scales by their plain names (:func:`plain_name`), in the dtype that the parameters have.

    Raises:
        ValueError: a name or shape that the model does not have, or a value that the parameter's dtype cannot hold;
            nothing was changed then.
    """
    own = {plain_name(name): parameter for name, parameter in scale_parameters(model).items()}
    for name, value in values.items():
        if name not in own or own[name].shape != value.shape:
            has = "no such scale" if name not in own else f"it with shape {tuple(own[name].shape)}"
            raise ValueError(
                f"{name} of shape {tuple(value.shape)} is of another model: {type(model).__name__} has {has}"
            )
        if not bool(torch.isfinite(value.to(own[name].dtype)).all()):
            raise ValueError(f"{name} holds values that {own[name].dtype} cannot")
    with torch.no_grad():
        for name, value in values.items():
            own[name].copy_(value)


def _kind(name: str) -> str:
    return name.rpartition(".")[2].removesuffix("_1")


def _set_dtype(parameter: nn.Parameter, dtype: torch.dtype) -> None:
    """In place: others may hold this very parameter, as a tied layer or the weight whose attribute it is."""
    if parameter.dtype == dtype:
        return
    learns = parameter.requires_grad
    parameter.requires_grad_(False)
    parameter.grad = None
    parameter.data = parameter.data.to(dtype)
    parameter.requires_grad_(learns)


def _octave(parameter: nn.Parameter) -> int:
    size = _root_mean_square([parameter])
    return round(math.log2(size)) if size > 0 else -1000


def _root_mean_square(parameters: Sequence[nn.Parameter]) -> float:
    total = sum(float(p.detach().double().square().sum()) for p in parameters)
    count = sum(p.numel() for p in parameters)
    # Zeros of a layer without an offset have no size to go by.
    return math.sqrt(total / count) if total > 0 else 1e-3
