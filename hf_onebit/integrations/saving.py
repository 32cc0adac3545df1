"""What Transformers saves of a packed model: float16 scales, statistics of few bits, words under their own names."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightConverter
from transformers.integrations.accelerate import load_offloaded_parameter

from hf_onebit.counts import counted
from hf_onebit.formats.table import TableEntry
from hf_onebit.integrations.experts import splits_experts
from hf_onebit.integrations.load_operations import ExpandStatistics
from hf_onebit.nn.replace import PackedModule, module_shape, packed_layers, resolve_names
from hf_onebit.progress import logger


def as_stored(
    model: Any, table: dict[str, dict[str, Any]], state: dict[str, Tensor] | None
) -> dict[str, Tensor] | None:
    """What to save of a model where it is not its state dict; else None. ``state``: what to take for that.

    Where scales or zeros of few bits have changed since they were rounded (they were trained), rounding them again
    would cost what was learned: such a layer is stored plainly from then on, and its entry in ``table`` says so.

    Raises:
        ValueError: float16 cannot hold a scale.
    """
    state = _with_half_scales(model, state)
    names = resolve_names(model, [name for name, entry in table.items() if entry.get("double_quant")])
    changed = []
    for name, found in names.items():
        if found is None:
            continue
        state = model.state_dict() if state is None else state
        module = model.get_submodule(found)
        shape, entry = module_shape(module), TableEntry.from_dict(table[name])
        assert shape is not None
        own = {key: state.pop(f"{found}.{key}") for key in entry.tensor_names}
        statistics = [key for key in ("scales", "zeros") if key in own]
        for key in statistics:
            if own[key].is_meta:  # offloaded; codes stay so, as their tensors keep their names
                own[key] = load_offloaded_parameter(model, f"{found}.{key}")
        stored = entry.to_stored(own, shape.in_features)
        again = entry.from_stored(stored, shape.in_features, shape.out_features, name)
        if all(torch.equal(again[key], own[key]) for key in statistics):
            state |= {f"{found}.{key}": value for key, value in stored.items()}
        else:
            state |= {f"{found}.{key}": value for key, value in own.items()}
            changed.append(name)
    for name in changed:
        table[name].pop("double_quant")
    if changed:
        logger.warning(
            f"{counted(len(changed), 'layer')} (the first is {changed[0]}) saved without double_quant: scales or zeros "
            "have changed since they were rounded to few bits, and rounding them again would lose that"
        )
    return state


def _with_half_scales(model: nn.Module, state: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
    """What to save of a model some of whose scales are wider than float16, as they may be while they train; else
    ``state``.

    Raises:
        ValueError: float16 cannot hold one of them.
    """
    wide = [
        f"{name}.{scale}"
        for name, layer in packed_layers(model).items()
        for scale in layer.scale_names
        if getattr(layer, scale).dtype != torch.float16 and not getattr(layer, scale).is_meta
    ]
    if not wide:
        return state
    given, state = state, model.state_dict() if state is None else state
    wide = [key for key in wide if given is None or key in given]  # of ties, one is given
    halves: dict[int, Tensor] = {}  # by address, so that tied scales stay one tensor and are saved once
    worst = 0.0
    for key in wide:
        exact = state[key].float()
        state[key] = halves.setdefault(state[key].data_ptr(), state[key].half())
        if not bool(torch.isfinite(state[key]).all()):
            raise ValueError(
                f"{key} holds values that float16 cannot (at most 65504), and scales are stored in float16: lower the "
                "learning rate, or leave this layer in floating point"
            )
        size = float(exact.norm())
        worst = max(worst, float((state[key].float() - exact).norm()) / size) if size else worst
    logger.warning(
        f"{len(wide)} scales that are in float32 while they train are saved in float16 (at most {worst:.1e} of their "
        "norm is lost): hf_onebit.freeze_scales(model) rounds the model in memory too, hf_onebit.save_scales keeps "
        "float32 to go on from"
    )
    return state


def drop_converters_of_packed(model: Any, layers: dict[str, PackedModule]) -> None:
    """Save packed layers under their module names.

    Some models split or fuse matrices between file and memory (fused q/k/v, say); undoing that on save would cut
    packed words as if they were rows of weights.
    """
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:  # the model was not loaded: these are the ones that its saving would make up
        mapping = get_model_conversion_mapping(model, add_legacy=False)
        conversions = [c for c in mapping if not isinstance(c, PrefixChange)]
    packed = {f"{name}.weight" for name in layers}

    def touches_packed(conversion: Any) -> bool:
        if not isinstance(conversion, WeightConverter):
            return False
        reverse = copy.deepcopy(conversion).reverse_transform()
        return any(reverse.rename_source_key(key)[1] is not None for key in packed)

    def expands(conversion: Any) -> bool:
        return any(isinstance(op, ExpandStatistics) for op in getattr(conversion, "operations", ()))

    model._weight_conversions = [c for c in conversions if not (expands(c) or splits_experts(c) or touches_packed(c))]
