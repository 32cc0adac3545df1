"""Tensor parallelism: how packed layers are cut, in the terms of Transformers' plans.

A plan has a style for each module, and styles cut every parameter as if it were a float weight (out, in). Packed words
lie (words, out), so each packed parameter gets a rule of its own::

    cut by outputs ("colwise")     weight, scales, zeros (·, out) and a (out,) along the outputs; b whole
    cut by inputs ("rowwise")      weight (words, ·), scales, zeros (groups, ·) and b (in,) along the inputs; a whole

A rank's part of a layer is then a packed layer of fewer outputs or inputs, computed by the same kernels. Of inputs a
part must be whole words and whole groups: what does not divide so is refused here, on every rank alike, before the
first collective that a lone rank would wait in.
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers.distributed.parallel_utils import replace_layer_number_by_wildcard

from hf_onebit.formats.packing import WORD_BITS
from hf_onebit.nn.linear import OneBitLinear
from hf_onebit.nn.mbwq import MBWQLinear
from hf_onebit.nn.mpq import MPQEmbedding
from hf_onebit.nn.replace import PackedModule, packed_layers

# Styles of modules whose outputs, or whose inputs, are split over the ranks.
BY_OUTPUTS = frozenset({"colwise", "colwise_rep", "colwise_gather_output"})
BY_INPUTS = frozenset({"rowwise", "rowwise_rep", "rowwise_split_input"})
# What cuts a parameter along its last dimension, along the one before, and not at all.
_LAST, _FIRST, _WHOLE = "rowwise", "colwise", "replicate"
_REMEDY = "load it without tensor parallelism (device_map='auto' works)"


def parallel_size(model: nn.Module) -> int:
    """How many ranks share each layer; 1 without tensor parallelism."""
    distributed = getattr(getattr(model, "config", None), "distributed_config", None)
    return getattr(distributed, "tp_size", None) or 1


def parameter_styles(module: PackedModule, style: str) -> dict[str, str]:
    """The style of each parameter of a packed linear layer.

    Args:
        module: the layer.
        style: of the module, one of ``BY_OUTPUTS`` or ``BY_INPUTS``.
    """
    styles = {}
    for name, parameter in module.named_parameters(recurse=False):
        along_inputs = name in ("b", "b_1", "g_idx", "q_perm")
        if name == "bias":
            continue  # Transformers' own rule: cut with the outputs, or added once
        if style in BY_OUTPUTS:
            styles[name] = _WHOLE if along_inputs else _LAST
        elif parameter.dim() == 1:
            styles[name] = _LAST if along_inputs else _WHOLE
        elif name in ("scales", "zeros") and parameter.shape[0] == 1:
            styles[name] = _WHOLE  # one group for all inputs
        else:
            styles[name] = _FIRST
    return styles


def cut_packed(model: Any, plan: dict[str, str], size: int) -> None:
    """Add the rules of packed parameters to a plan, and make the modules ready for it.

    Args:
        model: before its weights are loaded.
        plan: {module or parameter name, numbers of layers as ``*``: style}; changed in place.
        size: ranks.

    Raises:
        ValueError: a layer cannot be cut in that many parts.
    """
    override = getattr(model.config.distributed_config, "tp_plan", None)
    effective = plan | (override if isinstance(override, dict) else {})
    kinds: dict[str, set[bool]] = {}
    packed = packed_layers(model)
    for name, _ in model.named_modules():
        kinds.setdefault(replace_layer_number_by_wildcard(name), set()).add(name in packed)
    for name, module in packed.items():
        key = replace_layer_number_by_wildcard(name)
        style = effective.get(key)
        if style is None:
            _refuse_inside(name, effective)
            continue
        if len(kinds[key]) > 1:
            raise ValueError(
                f"Some of the layers {key} are packed and some are not, and one rule ({style!r}) cuts them all: "
                f"{_REMEDY}, or quantize all of them"
            )
        check_cut(name, module, style, size)
        plan |= {f"{key}.{parameter}": rule for parameter, rule in parameter_styles(module, style).items()}
        _make_ready(module, style, size)


def check_cut(name: str, module: PackedModule, style: str, size: int) -> None:
    """Refuse to cut a layer where no word or group may be cut.

    Args:
        name: full name, for errors.
        module: the packed layer.
        style: its style.
        size: parts.

    Raises:
        ValueError: with the sizes and a remedy.
    """
    if isinstance(module, MPQEmbedding) or style not in BY_OUTPUTS | BY_INPUTS:
        raise ValueError(
            f"{name} is packed, and the tensor-parallel style {style!r} knows float weights only: {_REMEDY}"
        )
    if style in BY_OUTPUTS:
        if module.out_features % size:
            raise ValueError(f"{name} has {module.out_features} outputs, which {size} ranks cannot share: {_REMEDY}")
        return
    if getattr(module, "g_idx", None) is not None or isinstance(module, MBWQLinear):
        raise ValueError(f"The inputs of {name} have an order of their own, which cannot be cut: {_REMEDY}")
    unit, why = WORD_BITS, f"a word holds {WORD_BITS} inputs"
    if not isinstance(module, OneBitLinear) and 0 < module.group_size < module.in_features:
        unit, why = math.lcm(unit, module.group_size), f"{why}, a group {module.group_size}"
    if module.in_features % (unit * size):
        raise ValueError(
            f"{name} has {module.in_features} inputs, which cannot be shared by {size} ranks: each part must be a "
            f"multiple of {unit} ({why}). Take fewer ranks, or {_REMEDY}"
        )


def local(parameter: Tensor) -> Tensor:
    """This rank's part of a parameter, or the parameter where it is not cut."""
    part: Tensor = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return part


def _make_ready(module: Any, style: str, size: int) -> None:
    module._hf_quantized_needs_local_tp = True  # the operators take no distributed tensors
    if style in BY_INPUTS:
        module.local_in_features = module.in_features // size
    weight = module._parameters["weight"]
    # Of the plain class, which can be distributed.
    plain = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
    module._parameters["weight"] = nn.Parameter(plain, requires_grad=False)


def _refuse_inside(name: str, plan: dict[str, str]) -> None:
    """A layer without a rule is whole on every rank, but not within a module that sums over the ranks."""
    parts = replace_layer_number_by_wildcard(name).split(".")
    for depth in range(1, len(parts)):
        style = plan.get(".".join(parts[:depth]))
        if style is not None and re.match("moe|ep_|grouped", style):
            raise ValueError(f"{name} is one of an expert's packed layers, which are not cut yet: {_REMEDY}")
