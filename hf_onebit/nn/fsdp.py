"""Packed models under FSDP2, ``torch.distributed.fsdp.fully_shard``: what it must know, and whole state dicts of it.

FSDP2 shards integers as it does floats, along their first dimension, and gathers them for as long as a block runs: so
words, indices and scales of a frozen packed base take their share of memory on each rank, and nothing is computed
otherwise. Two things it does are wrong for packed models, and :func:`prepare_for_fsdp` is for them:

* Its mixed precision casts every floating parameter, and scales are float16 and stay so: in bfloat16 they would be
  rounded to eight bits. So frozen scales become their own bytes, under another name (``a_bytes`` for ``a``): casts pass
  over integers, and no state dict that holds bytes can be taken for one that holds scales. ``layer.a`` is a view.
* Transformers asks the quantizer what to save and forgets ``save_pretrained(state_dict=...)``. That argument counts
  again, and without it every rank takes part in gathering what rank 0 writes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hf_onebit.argument_checks import require_module
from hf_onebit.nn.binding import BoundWeight
from hf_onebit.nn.scale_bits import BYTES, SCALES, as_bytes, as_scales

__all__ = ["full_state_dict", "is_sharded", "prepare_for_fsdp", "state_to_save"]

_STATE = "_full_state_to_save"
_TIES = ("_tied_weights_keys", "all_tied_weights_keys")


def prepare_for_fsdp(model: Any) -> Any:
    """Make a packed model ready for ``fully_shard``; call it after ``get_peft_model``, before anything is sharded.

    Accelerate and the Trainer call ``fully_shard`` themselves: give them the prepared model. Adapters, norms and scales
    that learn (``train_scales``) are sharded as any float parameter; packed words must be frozen. Scales that learn are
    cast by a mixed-precision policy, so they need one without ``param_dtype``; frozen ones do not care.

    Args:
        model: a model with packed layers, with or without adapters; changed in place. It computes what it did. Calling
            this again changes nothing.

    Returns:
        The model.

    Raises:
        TypeError: the model is no module.
        ValueError: there are no packed layers, packed words that learn, or the model is sharded already; nothing was
            changed then.
    """
    require_module("prepare_for_fsdp", model)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, BoundWeight)}
    if not layers:
        raise ValueError(
            f"prepare_for_fsdp got a {type(model).__name__} without packed layers: call fully_shard as it is"
        )
    if is_sharded(model):
        raise ValueError("prepare_for_fsdp got a model that is sharded already: call it before fully_shard")
    learning = [f"{name}.{own}" for name, module in layers.items() for own, p in _words(module) if p.requires_grad]
    if learning:
        raise ValueError(
            f"{learning[0]} learns ({len(learning)} such weights): packed words that learn cannot be sharded. Train "
            "them under DistributedDataParallel, or freeze them (weight.requires_grad_(False)) and train adapters"
        )
    stored: dict[int, nn.Parameter] = {}  # by the scale's id, so that tied ones stay one parameter
    for module in layers.values():
        for name in SCALES:
            scale = module._parameters.get(name)
            if scale is not None and scale.dtype == torch.float16 and not scale.requires_grad:
                own = nn.Parameter(as_bytes(scale), requires_grad=False)
                del module._parameters[name]
                module._parameters[name + BYTES] = stored.setdefault(id(scale), own)
                vars(own).setdefault("scale", scale)  # keeps the id taken until all are through
        module.bind()
    for own in stored.values():
        del vars(own)["scale"]
    for module in model.modules():
        for ties in _TIES:
            pairs = getattr(module, ties, None)
            if isinstance(pairs, Mapping) and pairs:
                setattr(module, ties, {_now(module, a): _now(module, b) for a, b in pairs.items()})
        if "hf_quantizer" in vars(module):  # not a PEFT model, which saves adapters and takes their state as it is
            # Not a bound method: that is pickled by its function's name, as an attribute that the model does not have.
            module.save_pretrained = functools.partial(_save_pretrained, module)
    return model


def is_sharded(model: nn.Module) -> bool:
    """Whether ``fully_shard`` has been at packed words of a model."""
    return any(hasattr(p, "full_tensor") for m in model.modules() if isinstance(m, BoundWeight) for _, p in _words(m))


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The whole state dict of a model that FSDP2 has sharded, as an unsharded one has it: on rank 0, on the CPU.

    Every rank must call it. ``model.save_pretrained(folder)`` does, too; of a PEFT model, whose adapters alone are
    saved, it is ``model.save_pretrained(folder, state_dict=full_state_dict(model))``.

    Returns:
        {name: tensor} on rank 0, scales by their own names and in float16; empty on the others.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    require_module("full_state_dict", model)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state: dict[str, Any] = get_model_state_dict(model, options=options)
    return _plain(state)


def state_to_save(model: nn.Module) -> dict[str, Tensor] | None:
    """What ``save_pretrained`` of a prepared model was given or has gathered, without its ties' copies; else None.

    Raises:
        ValueError: the model is sharded and was not prepared.
    """
    state: dict[str, Tensor] | None = vars(model).get(_STATE)
    native = getattr(getattr(model, "config", None), "distributed_config", None)  # Transformers gathers by itself
    if state is None and native is None and is_sharded(model):
        raise ValueError(
            f"{type(model).__name__} is sharded, and Transformers would save this rank's part of it. Call "
            "hf_onebit.nn.prepare_for_fsdp(model) before fully_shard; then save_pretrained on every rank saves it whole"
        )
    return state


def _save_pretrained(
    model: Any, save_directory: Any, is_main_process: bool = True, state_dict: Any = None, **more: Any
) -> Any:
    """The class's ``save_pretrained`` with what is to be saved: ``state_dict``, or all of the model, which every rank
    of a sharded one must then call."""
    gathers = state_dict is None and is_sharded(model)
    state = full_state_dict(model) if gathers else _plain(model.state_dict() if state_dict is None else state_dict)
    try:
        if gathers and dist.get_rank() != 0:
            return None
        ties = getattr(model, _TIES[1], None) or {}
        for target, source in ((_plain_name(a), _plain_name(b)) for a, b in ties.items()):
            if source in state:
                state.pop(target, None)
        vars(model)[_STATE] = state
        return type(model).save_pretrained(model, save_directory, is_main_process, **more)
    finally:
        vars(model).pop(_STATE, None)
        if gathers:
            dist.barrier()


def _words(module: BoundWeight) -> Iterator[tuple[str, Any]]:
    """(name, parameter) of a module's packed words."""
    for name in module.packed_names:
        parameter = module._parameters.get(name)
        if parameter is not None:
            yield name, parameter


def _plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with scales by their own names."""
    return {_plain_name(key): as_scales(value) if key != _plain_name(key) else value for key, value in state.items()}


def _plain_name(key: str) -> str:
    name = key.rpartition(".")[2]
    return key.removesuffix(BYTES) if name.endswith(BYTES) and name.removesuffix(BYTES) in SCALES else key


def _now(model: nn.Module, key: str) -> str:
    """The name that a parameter has now."""
    owner, _, name = key.rpartition(".")
    try:
        held = model.get_submodule(owner)._parameters
    except AttributeError:
        return key
    return key + BYTES if name + BYTES in held else key
