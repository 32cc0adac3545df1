"""Separate experts in Transformers' loader: which of a model's conversions still hold, and files with fused experts."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter

from hf_onebit.nn.experts import FusedLayout, SeparateExperts, merging_conversions, separated
from hf_onebit.nn.replace import PACKED


class SplitExperts(ConversionOps):
    """Loader operation: one fused parameter in, a tensor for each expert's layer out.

    Args:
        layout: of the module.
        parameter: which of its parameters.
        targets: {(part, number): target pattern}, the part as of ``FusedLayout.parts``.
        packed: those of ``targets`` that are packed next; the others get memory of their own.
    """

    def __init__(
        self, layout: FusedLayout, parameter: str, targets: dict[tuple[str, int], str], packed: set[tuple[str, int]]
    ) -> None:
        self.layout, self.parameter, self.targets, self.packed = layout, parameter, targets, packed

    def convert(  # type: ignore[override]  # by keyword only, as the loader calls it
        self, input_dict: dict[str, Any], **kwargs: Any
    ) -> dict[str, Tensor]:
        """{pattern: [fused]} -> {target pattern: tensor}."""
        (value,) = input_dict.values()
        parts = self.layout.parts(self.parameter, value[0] if isinstance(value, list) else value)
        found = {}
        for key, target in self.targets.items():
            tensor = parts[key[0]][key[1]]
            found[target] = tensor if key in self.packed else tensor.clone()
        return found


def expert_conversions(model: Any, conversions: list[Any], splitting: bool) -> list[Any]:
    """A model's weight conversions as its separate experts need them.

    What would fuse their tensors goes, since files that hold a tensor for each expert have the layers' names already.

    Args:
        model: before its weights are loaded.
        conversions: the model's own.
        splitting: the files are those of the float model, which may hold experts fused.
    """
    modules = separated(model)
    if not modules:
        return conversions
    merging = merging_conversions(modules, conversions)
    kept = [c for c in conversions if not any(c is m for m in merging)]
    if splitting:
        for name, module in modules.items():
            if not module.layout.merged:
                kept += [_splitting(model, name, module, parameter, merging) for parameter in _parameters(module)]
    return kept


def restore_conversions(model: Any, names: list[str]) -> None:
    """After experts were joined again: save them as the model's own checkpoints have them.

    Args:
        model: with fused experts.
        names: of the modules.
    """
    conversions = getattr(model, "_weight_conversions", None)
    if not names or conversions is None:
        return
    own = merging_conversions(names, get_model_conversion_mapping(model, add_legacy=False))
    known = [tuple(c.source_patterns) for c in conversions]
    model._weight_conversions = [*conversions, *(c for c in own if tuple(c.source_patterns) not in known)]


def splits_experts(conversion: Any) -> bool:
    """Whether a conversion is one of :func:`expert_conversions`, which nothing is to be saved by."""
    return any(isinstance(op, SplitExperts) for op in getattr(conversion, "operations", ()))


def _parameters(module: SeparateExperts) -> list[str]:
    return [name for name, _ in module.fused.named_parameters(recurse=False)]


def _splitting(model: Any, name: str, module: SeparateExperts, parameter: str, merging: list[Any]) -> Any:
    """The conversion that reads one fused parameter of the files as the layers of all experts."""
    prefix = getattr(model, "base_model_prefix", "")
    short = name.removeprefix(f"{prefix}.") if prefix else name  # the files may come with it or without
    parts = module.layout.parts(parameter, getattr(module.fused, parameter).detach().to("meta"))
    layers = {
        (part, number): f"{number}.{module.layout.names[part.partition('.')[0]]}"
        for part in parts
        for number in range(module.num_experts)
    }
    packed = {
        key
        for key, layer in layers.items()
        if key[0].endswith(".weight") and isinstance(module.get_submodule(layer), PACKED)
    }
    # The loader asks of the first target whether the conversion ends in quantization.
    ordered = sorted(layers.items(), key=lambda item: item[0] not in packed)
    targets = {key: f"{short}.{layer}.{key[0].partition('.')[2]}" for key, layer in ordered}
    own = next((c for c in merging if merging_conversions([name], [c]) and _of(c, parameter)), None)
    before = [] if own is None else list(own.operations)
    source = re.escape(f"{short}.{parameter}")
    split = SplitExperts(module.layout, parameter, targets, packed)
    return WeightConverter(source, list(targets.values()), [*before, split])


def _of(conversion: Any, parameter: str) -> bool:
    return any(re.search(rf"\b{parameter}$", target) for target in conversion.target_patterns)
