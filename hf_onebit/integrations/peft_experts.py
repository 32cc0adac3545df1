"""LoRA on models whose experts are separate layers: PEFT is told that they are not fused there.

Since Transformers 5 fuses the experts of a layer into 3-D parameters, PEFT rewrites what names an expert's layer: in
the config to those parameters (``target_parameters``), in an adapter's tensors to one adapter for all experts. Where
``SeparateExperts`` stand, each expert has its layers, by the names that the user and the files give them: there neither
is rewritten. The router is no linear layer in memory, so what PEFT does with it still holds: "gate" means the parameter
``gate.weight``.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import nn

from hf_onebit.nn.experts import merging_conversions, separated
from hf_onebit.nn.replace import PACKED
from hf_onebit.progress import logger

_ALL_LINEAR = "all-linear"
_OF_AN_EXPERT = re.compile(r"\.experts\.\d+\..*\.lora_")
# Of LoRA, what PEFT cannot do where the adapter is on a parameter.
_NOT_ON_PARAMETERS = ("lora_dropout", "use_dora", "lora_bias")


def keeping_expert_names(original: Any) -> Any:
    """PEFT's ``convert_peft_config_for_transformers``, which leaves the names of separate experts as they are.

    Raises:
        ValueError: the config names parameters that only fused experts have, or a router for a kind of LoRA that cannot
            adapt one. Nothing is changed.
    """

    def convert(peft_config: Any, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        if not separated(model):
            original(peft_config, model, *args, **kwargs)
            return
        _require_layers(peft_config, model)
        names = list(_not_linear(model))
        as_parameters = set()
        for name in {_leaf(name) for name in names}:
            asked = copy.copy(peft_config)
            asked.target_modules, asked.target_parameters = {name}, None
            original(asked, model, *args, **kwargs)
            if f"{name}.weight" in (asked.target_parameters or ()):
                as_parameters.add(name)
        _target_routers(peft_config, model, [name for name in names if _leaf(name) in as_parameters])

    return convert


def without_fusing_experts(original: Any) -> Any:
    """Transformers' ``get_model_conversion_mapping``, less what fuses experts that are separate."""

    def mapping(model: Any, *args: Any, **kwargs: Any) -> Any:
        conversions = original(model, *args, **kwargs)
        fusing = merging_conversions(separated(model), conversions)
        return [c for c in conversions if not any(c is f for f in fusing)]

    return mapping


def telling_what_is_dropped(original: Any) -> Any:
    """PEFT's ``convert_peft_adapter_state_dict_for_transformers``, which warns of tensors that PEFT leaves out.

    Where an adapter for each expert comes to a model with fused experts, PEFT adapts those, but no linear layer that
    has the name of an expert's, as shared experts have. It says nothing of their tensors.
    """

    def convert(model: Any, peft_config: Any, adapter_state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        converted = original(model, peft_config, adapter_state_dict, *args, **kwargs)
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        if not any(_OF_AN_EXPERT.search(key) for key in adapter_state_dict) or separated(base):
            return converted
        named = {key.removeprefix("base_model.model.").partition(".lora_")[0] for key in converted}
        plain = {name for name, module in base.named_modules() if not isinstance(module, BaseTunerLayer)}
        if dropped := sorted(named & plain):
            logger.warning(
                f"PEFT drops a part of this adapter on {type(base).__name__}: {len(dropped)} layers that have the "
                f"name of an expert's (the first is {dropped[0]}) get none of it. The adapter is whole on a model "
                "whose experts are packed; hf_onebit.merge_and_dequantize(model) makes a float model of both there"
            )
        return converted

    return convert


def _require_layers(config: Any, model: nn.Module) -> None:
    targets = sorted(getattr(config, "target_parameters", None) or ())
    for name, module in separated(model).items():
        held = [f"{name}.{parameter}" for parameter in module.fused._parameters]
        named = [t for t in targets if any(f".{key}".endswith(f".{t}") for key in held)]
        if named:
            raise ValueError(
                f"target_parameters={named} names parameters of fused experts, and {name} has none: each matrix of "
                f"each expert is a layer there. Name the layers, target_modules={list(module.layout.names.values())} "
                "or 'all-linear'. An adapter that was trained on the float model's fused experts cannot be put on them"
            )


def _not_linear(model: nn.Module) -> Iterator[str]:
    """Full names of modules beside separate experts that have a matrix and are no linear layers: routers."""
    for parent in dict.fromkeys(name.rpartition(".")[0] for name in separated(model)):
        for child, module in model.get_submodule(parent).named_children():
            base: Any = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
            weight = None if isinstance(base, (nn.Linear, *PACKED)) else base._parameters.get("weight")
            if weight is not None and weight.dim() == 2:
                yield f"{parent}.{child}" if parent else child


def _target_routers(config: Any, model: nn.Module, routers: Sequence[str]) -> None:
    """Where a config names routers as modules, name their weights as parameters instead."""
    targets = config.target_modules if routers else None
    if targets is None:
        return
    all_linear = isinstance(targets, str) and targets.lower() == _ALL_LINEAR
    asked = copy.copy(config)
    if all_linear:
        asked.target_modules = {_leaf(name) for name in routers}
    chosen = [name for name in routers if check_target_module_exists(asked, name)]
    if not chosen:
        return
    for option in _NOT_ON_PARAMETERS:
        if getattr(config, option, None):
            raise ValueError(
                f"{option}={getattr(config, option)!r} cannot be used on the router {chosen[0]}: PEFT adapts it as a "
                f"parameter, where LoRA has no {option}. Leave routers out, exclude_modules={[_leaf(chosen[0])]} "
                f"beside target_modules='all-linear', or leave {option} at its default"
            )
    names = [name for name, _ in model.named_modules() if name]
    if isinstance(targets, str) and not all_linear:
        config.target_modules = {
            name for name in names if name not in chosen and check_target_module_exists(asked, name)
        }
    elif not all_linear:
        ends = {suffix for name in chosen for suffix in _suffixes(name)}
        config.target_modules = {target for target in targets if target not in ends}
    alike = {_leaf(name) for name in chosen}
    every = {name for name in names if _leaf(name) in alike} == set(chosen)
    parameters = {f"{_leaf(name) if every else name}.weight" for name in chosen}
    config.target_parameters = parameters | set(config.target_parameters or ())


def _suffixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]
