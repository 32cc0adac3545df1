"""Adapters and packed base made one model: in floating point, or packed anew with an error that is reported.

PEFT does the merging, on a float twin of one layer at a time, so whatever method made the adapter, the sum is the one
that PEFT defines. PEFT itself is not imported: its layers are known by what they offer.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from hf_onebit.argument_checks import checked_dtype, checked_number, require_module, shown
from hf_onebit.counts import counted
from hf_onebit.nn.heads import undo_tie
from hf_onebit.nn.mpq import MPQEmbedding
from hf_onebit.nn.replace import PACKED, PackedModule, dequantize_layers
from hf_onebit.progress import logger
from hf_onebit.quantization.repacking import repack

__all__ = ["MergedLayer", "adapted_layers", "merge_and_dequantize", "merge_and_requantize"]

MAX_LOST = 0.5
_SHOWN = 5


@dataclass(frozen=True)
class MergedLayer:
    """What packing did to one layer whose adapter was merged. W is the sum of base and adapter, Ŵ what is packed.

    Attributes:
        change: ‖W - base‖ / ‖W‖, how much the adapter changes.
        error: ‖W - Ŵ‖ / ‖W‖.
        lost: ‖W - Ŵ‖ / ‖W - base‖, the share of the adapter's change that is gone: at 1 it is as if there had been no
            adapter; 0 where the adapter changes nothing.
    """

    change: float
    error: float
    lost: float


@dataclass(frozen=True)
class _Tie:
    """A float weight that several modules share, at least one of them with an adapter.

    Attributes:
        weight: what they share.
        merged: {name: copy of an adapted module with its adapters merged, not yet in the model}.
        holds: whether all of the modules still have the same weight then.
    """

    weight: nn.Parameter
    merged: dict[str, Any]
    holds: bool


def merge_and_dequantize(
    model: Any, dtype: torch.dtype | None = None, adapter_names: Sequence[str] | None = None
) -> Any:
    """Make a float model of a packed base and the adapters on it. The packed model is used up.

    Args:
        model: what ``get_peft_model`` or ``PeftModel.from_pretrained`` gave, or a Transformers model with adapters.
        dtype: of the result; None: the dtype that the model's unpacked parameters have. Sums are float32.
        adapter_names: adapters to merge, the active ones if None.

    Returns:
        The model without PEFT around it and without packed layers; it saves and loads as any float model.

    Raises:
        TypeError: the model is no module.
        ValueError: no packed layer has an adapter, or none of a name; a layer is offloaded, its method has no merge, or
            dtype is not floating; merging would part a head and an embedding that this model cannot untie.
    """
    dtype = checked_dtype("merge_and_dequantize", dtype)
    base, layers = _adapted("merge_and_dequantize", model)
    _check_adapters("merge_and_dequantize", model, adapter_names)
    if dtype is None:
        dtype = cast(torch.dtype, getattr(base, "dtype", torch.float32))
    ties = _merge_ties(base, adapter_names)
    sources = {}
    for name, layer in layers.items():
        packed = layer.get_base_layer()
        if getattr(packed, "source", "Linear") != "Linear":
            sources[name] = packed.source
        base.set_submodule(name, merged_twin(layer, name, adapter_names).to(dtype))
    _place_ties(base, ties)
    _untie(base, layers)
    model = _unload(model, base, adapter_names)
    for name in sources:  # what PEFT saw as linear layers were Conv1D ones in the float model
        model.set_submodule(name, _conv1d(model.get_submodule(name)))
    if getattr(model, "hf_quantizer", None) is not None:
        return model.dequantize(dtype)
    return dequantize_layers(model, dtype)


def merge_and_requantize(
    model: Any, *, max_lost: float = MAX_LOST, force: bool = False, adapter_names: Sequence[str] | None = None
) -> tuple[Any, dict[str, MergedLayer]]:
    """Merge adapters and pack the sums in the format that the base has, if enough of the adapters survives.

    A few bits hold few different weights, and what an adapter changes is mostly less than half a step between them:
    then packing again throws it away. So the loss is measured layer by layer (:class:`MergedLayer`), and nothing is
    changed where any layer loses more than ``max_lost``. No data is used; to pack with data, quantize the model that
    :func:`merge_and_dequantize` gives.

    Args:
        model: as of :func:`merge_and_dequantize`.
        max_lost: the largest share of any layer's change that may be lost, at least 0.
        force: merge whatever is lost; what is lost is logged.
        adapter_names: adapters to merge, the active ones if None.

    Returns:
        The packed model without PEFT around it, and {layer: what it lost}.

    Raises:
        TypeError: the model is no module.
        ValueError: a layer loses more than ``max_lost`` and ``force`` is not set, ``max_lost`` is no number >= 0, or as
            of :func:`merge_and_dequantize`. The model is as it was.
    """
    checked_number("merge_and_requantize", "max_lost", max_lost)
    if not isinstance(force, bool):
        raise ValueError(f"merge_and_requantize got force={shown(force)}, expected True or False")
    base, layers = _adapted("merge_and_requantize", model)
    _check_adapters("merge_and_requantize", model, adapter_names)
    if tied := sorted(_tied_names(base) & set(layers)):
        raise ValueError(
            f"{tied[0]} is packed as one with the module that it is tied to, and its adapter changes only one of the "
            "two: make a float model with hf_onebit.merge_and_dequantize(model)"
        )
    ties = _merge_ties(base, adapter_names)
    made: dict[str, PackedModule] = {}
    report: dict[str, MergedLayer] = {}
    for name, layer in layers.items():
        twin, packed = merged_twin(layer, name, adapter_names), cast(PackedModule, layer.get_base_layer())
        W, before = twin.weight.detach(), packed.dequantize()
        made[name], dense = repack(packed, W, name)
        if not isinstance(packed, MPQEmbedding) and packed.bias is not None:
            made[name].get_parameter("bias").data = twin.bias.detach().to(packed.bias.dtype)
        report[name] = _judge(W, before, dense)
    over = {name: merged for name, merged in report.items() if merged.lost > max_lost}
    if over:
        worst = sorted(over.items(), key=lambda item: -item[1].lost)[:_SHOWN]
        named = "; ".join(f"{n} loses {m.lost:.0%} of a change of {m.change:.1%}" for n, m in worst)
        text = (
            f"Packing the merged weights again loses more than {max_lost:.0%} of what the adapter changes in "
            f"{len(over)} of {len(report)} layers ({named})"
        )
        if not force:
            raise ValueError(
                f"{text}. Nothing was changed. Keep the adapter beside the model, make a float model of both with "
                "hf_onebit.merge_and_dequantize(model) and quantize that with data, or accept the loss with force=True"
            )
        logger.warning(text)
    for name, packed in made.items():
        base.set_submodule(name, packed)
    _place_ties(base, ties)
    return _unload(model, base, adapter_names), report


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """PEFT's layers on packed ones, by full name."""
    return {name: module for name, module in model.named_modules() if _is_adapted(module)}


@torch.no_grad()
def merged_twin(layer: Any, name: str, adapter_names: Sequence[str] | None = None) -> Any:
    """A float32 linear layer or embedding with the sum of a packed or float one and its adapters; ``layer`` stays.

    Raises:
        ValueError: PEFT cannot merge this kind of layer.
    """
    packed = layer.get_base_layer()
    twin = _twin(packed)
    # What the layer was made with is not copied: where PEFT ties adapters it has results of autograd, which cannot be.
    made_with = getattr(layer, "kwargs", None)
    # A copy of the adapters around the twin: merging leaves marks in the layer that it merges.
    copied = copy.deepcopy(layer, {id(packed): twin, id(made_with): made_with})
    if getattr(copied, "quantization_backend", None) is not None:
        copied.quantization_backend = None
    try:
        copied.merge(adapter_names=None if adapter_names is None else list(adapter_names))
    except (NotImplementedError, AttributeError) as error:
        raise ValueError(
            f"PEFT cannot merge {name}, a {type(layer).__module__}.{type(layer).__name__}: keep this adapter beside "
            "the model"
        ) from error
    return twin.requires_grad_(False)


def _check_adapters(what: str, model: Any, names: Any) -> None:
    """ValueError unless each name is that of an adapter; PEFT passes over names that it does not know."""
    known = sorted(getattr(model, "peft_config", None) or ())
    if names is None or not known:
        return
    listed = isinstance(names, Sequence) and not isinstance(names, str)
    if not listed or not names or any(name not in known for name in names):
        raise ValueError(
            f"{what} got adapter_names={shown(names)}, expected None (the active ones) or a list of some of "
            f"{', '.join(known)}"
        )


def _adapted(what: str, model: Any) -> tuple[Any, dict[str, Any]]:
    require_module(what, model)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers = adapted_layers(base)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no adapter on a packed layer: expected what get_peft_model or "
            "PeftModel.from_pretrained gives for a packed base, with a method that adapts layers (prompts merge into "
            "nothing)"
        )
    offloaded = [name for name, layer in layers.items() if layer.get_base_layer().weight.is_meta]
    if offloaded:
        raise ValueError(
            f"The model is offloaded in part ({counted(len(offloaded), 'packed layer')}, the first is {offloaded[0]}): "
            "load it whole"
        )
    return base, layers


def _is_adapted(module: Any) -> bool:
    return isinstance(_base_layer(module), PACKED)


def _base_layer(module: Any) -> Any:
    """What PEFT's layer is around; None for any other module."""
    get_base_layer = getattr(module, "get_base_layer", None)
    return get_base_layer() if callable(get_base_layer) else None


def _twin(packed: Any) -> Any:
    if not isinstance(packed, PACKED):
        twin = copy.deepcopy(packed)
        for parameter in twin.parameters():
            parameter.data = parameter.data.float()
        return twin
    if isinstance(packed, MPQEmbedding):
        holder = nn.ModuleDict({"twin": packed})
        return dequantize_layers(holder, torch.float32).get_submodule("twin")
    with torch.device("meta"):
        twin = nn.Linear(packed.in_features, packed.out_features, packed.bias is not None)
    twin.weight = nn.Parameter(packed.dequantize())
    if packed.bias is not None:
        twin.bias = nn.Parameter(packed.bias.detach().float().clone())
    return twin.train(packed.training)


def _conv1d(linear: Any) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        module = Conv1D(linear.out_features, linear.in_features)
    module.weight = nn.Parameter(linear.weight.detach().t().contiguous())
    module.bias = nn.Parameter(torch.zeros_like(linear.weight[:, 0]) if linear.bias is None else linear.bias.detach())
    return module.train(linear.training)


def _unload(model: Any, base: Any, adapter_names: Sequence[str] | None) -> Any:
    """What is left of PEFT: adapters on float layers are merged, wrappers go."""
    names = None if adapter_names is None else list(adapter_names)
    if hasattr(model, "merge_and_unload"):
        return model.merge_and_unload(adapter_names=names)
    gone: list[str] = []
    for name, module in list(base.named_modules()):
        if name.startswith(tuple(gone)):  # it was a part of a wrapper that was merged whole
            continue
        if hasattr(module, "unload_and_optionally_merge_module"):
            part = module.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=names)
        elif hasattr(module, "base_layer"):
            module.merge(adapter_names=names)
            part = module.get_base_layer()
        else:
            continue
        base.set_submodule(name, part)
        gone.append(f"{name}.")
    base._hf_peft_config_loaded = False
    if hasattr(base, "peft_config"):
        del base.peft_config
    return base


def _merge_ties(base: Any, adapter_names: Sequence[str] | None) -> list[_Tie]:
    """Merge the adapters on float layers that share their weight, each into a copy of its own; ``base`` stays.

    PEFT adds to the weight in place: a module that shares it would get what the other's adapter changes, and one with
    an adapter too would get both sums.

    Raises:
        ValueError: a layer is offloaded, its method has no merge, or what cannot be untied is no longer the same.
    """
    ties = []
    for weight, owners, layers in _shared_weights(base):
        if weight.is_meta:
            raise ValueError(f"{next(iter(layers))} is offloaded: load the model whole")
        merged = {name: _merged_float(layer, name, adapter_names) for name, layer in layers.items()}
        weights = [module.weight for module in merged.values()]
        if owners > len(merged):  # and those without an adapter
            weights.append(weight)
        holds = all(torch.equal(other, weights[0]) for other in weights[1:])
        if not holds:
            _check_can_untie(base, next(iter(layers)))
        ties.append(_Tie(weight, merged, holds))
    return ties


def _place_ties(base: Any, ties: Sequence[_Tie]) -> None:
    """Put merged modules where the adapted ones were: sharing one weight as before where that holds, else untied."""
    for tie in ties:
        if tie.holds:
            tie.weight.data = next(iter(tie.merged.values())).weight.data
        for name, module in tie.merged.items():
            if tie.holds:
                module.weight = tie.weight
            base.set_submodule(name, module)
    if not all(tie.holds for tie in ties):
        undo_tie(base)


def _shared_weights(base: Any) -> list[tuple[nn.Parameter, int, dict[str, Any]]]:
    """Weights of adapted float layers that other modules have too: the weight, how many have it, {name: PEFT's layer}.

    The name is that of the outermost module that PEFT put around the float one.
    """
    owners: dict[nn.Parameter, int] = defaultdict(int)
    for module in base.modules():
        for parameter in module.parameters(recurse=False):
            owners[parameter] += 1
    layers: dict[nn.Parameter, dict[str, Any]] = defaultdict(dict)
    for name, module in base.named_modules():
        weight = _float_weight(module)
        if weight is not None and owners[weight] > 1:
            layers[weight][name.removesuffix(".token_adapter")] = module
    return [(weight, owners[weight], found) for weight, found in layers.items()]


def _float_weight(module: Any) -> nn.Parameter | None:
    """The weight under PEFT's layer on a float one; None for any other module."""
    layer = _base_layer(module)
    weight = getattr(layer, "weight", None)
    return weight if isinstance(weight, nn.Parameter) and not isinstance(layer, PACKED) else None


def _merged_float(layer: Any, name: str, adapter_names: Sequence[str] | None) -> Any:
    merged = merged_twin(layer, name, adapter_names)
    for parameter, before in zip(merged.parameters(), layer.get_base_layer().parameters(), strict=True):
        parameter.data = parameter.data.to(before.dtype)
    return merged


def _check_can_untie(base: Any, name: str) -> None:
    """ValueError where the model's config ties more than a head and an embedding: it unties all or nothing."""
    several = len(getattr(base, "all_tied_weights_keys", None) or ()) > 1
    if several or getattr(getattr(base, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"{name} and what it is tied to would differ once their adapters are merged, and they cannot be untied "
            f"alone: the config of {type(base).__name__} ties more than those two. Keep the adapter beside the model"
        )


def _untie(model: Any, layers: Mapping[str, Any]) -> None:
    """A head and an embedding that were packed as one are two matrices once an adapter has changed one of them."""
    if not _tied_names(model) & set(layers):
        return
    del model._tied_weights_keys
    undo_tie(model)


def _tied_names(model: Any) -> set[str]:
    """The modules that are packed as one with another: the model then has a table of ties of its own."""
    own = vars(model).get("_tied_weights_keys") or {}
    return {key.rpartition(".")[0] for item in own.items() for key in item}


def _judge(W: Tensor, before: Tensor, after: Tensor) -> MergedLayer:
    size, change, error = (float(t.double().norm()) for t in (W, W - before, W - after))
    size = size or 1.0
    # Below what float32 sums leave there was no change.
    lost = error / change if change > 1e-6 * size else 0.0
    return MergedLayer(change / size, error / size, lost)
