"""What is refused before and after Transformers loads a packed model: plans that cannot work, files that do not fit."""

from __future__ import annotations

from typing import Any

import torch

from hf_onebit.config import PackingConfig
from hf_onebit.counts import counted
from hf_onebit.formats.table import TableEntry
from hf_onebit.integrations.tensor_parallel import local, parallel_size
from hf_onebit.nn.replace import PackedModule, module_shape
from hf_onebit.storage.headers import PackedShape, check_packed_headers, read_headers


def check_places(config: PackingConfig, pre_quantized: bool, device_map: Any) -> None:
    """Refuse device maps that the work to be done cannot be spread over.

    Raises:
        ValueError: with the remedy.
    """
    places = {str(place) for place in device_map.values()} if isinstance(device_map, dict) else {str(device_map)}
    if pre_quantized:
        if config.dequantize and "disk" in places:
            raise ValueError(
                "dequantize=True cannot be combined with a device_map that holds 'disk': drop one of the two"
            )
        return
    if "disk" in places:
        raise ValueError(
            "Quantizing while loading cannot offload to disk (the loader would write float tensors there). "
            "Quantize without offload, save, and load the packed checkpoint with this device_map"
        )
    if config.whole and len(places) > 1:
        what = "Calibrated quantization" if config.calibrates else "bits='auto'"
        raise ValueError(
            f"{what} needs the model on one device, got a device_map over {sorted(places)}. Load "
            "it whole, quantize, save, and load the packed checkpoint with this device_map"
        )


def check_parallelism(model: Any, config: PackingConfig, pre_quantized: bool) -> None:
    """Refuse what tensor parallelism, or FSDP2 by Transformers itself, cannot be combined with.

    Raises:
        ValueError: with the remedy.
    """
    if parallel_size(model) == 1:
        check_sharding(getattr(model.config, "distributed_config", None), config, pre_quantized)
        return
    remedy = "load without tensor parallelism (device_map='auto' works)"
    if not pre_quantized:
        raise ValueError(
            f"Tensor parallelism takes packed checkpoints: quantize, save, load that with this plan, or {remedy}"
        )
    if config.dequantize:
        raise ValueError(f"dequantize=True cannot be combined with tensor parallelism: {remedy}")
    if any(entry.get("double_quant") for entry in (config.modules or {}).values()):
        raise ValueError(f"Statistics of few bits (double_quant) cannot be cut over ranks: {remedy}")


def check_sharding(distributed: Any, config: PackingConfig, pre_quantized: bool) -> None:
    """Refuse what FSDP2 by Transformers itself, where its ``DistributedConfig`` asks for it, cannot be combined with.

    Raises:
        ValueError: with the remedy.
    """
    if (getattr(distributed, "fsdp_size", None) or 1) == 1:
        return
    remedy = "load without fsdp_size, and shard with fully_shard (docs/peft.md)"
    if not pre_quantized or config.dequantize:
        raise ValueError("FSDP2 takes packed checkpoints as they are: quantize or dequantize, save, and load that")
    if getattr(distributed, "fsdp_mixed_precision", False):
        raise ValueError(
            "fsdp_mixed_precision would round float16 scales to bfloat16: leave it out and load with "
            f"dtype=torch.bfloat16, or {remedy}"
        )
    if any(entry.get("double_quant") for entry in (config.modules or {}).values()):
        raise ValueError(f"Statistics of few bits (double_quant) cannot be loaded in shards: {remedy}")


def check_files(model: Any, names: dict[str, str | None], table: dict[str, dict[str, Any]], files: list[Any]) -> None:
    """Hold the headers of safetensors files to what a model's packed modules need; ``names``: in the table, in the
    model, None for what this class does not have.

    Raises:
        ValueError: a tensor is missing, or of another shape or dtype.
    """
    shapes = {
        name: _packed_shape(model, found, TableEntry.from_dict(table[name]))
        for name, found in names.items()
        if found is not None
    }
    headers = read_headers(files)
    strangers = {name for name, found in names.items() if found is None}
    known = {k: v for k, v in headers.items() if k.rpartition(".")[0] not in strangers}
    check_packed_headers(known, shapes, getattr(model, "base_model_prefix", ""))


def _packed_shape(model: Any, name: str, entry: TableEntry) -> PackedShape:
    shape = module_shape(model.get_submodule(name))
    assert shape is not None
    return PackedShape(shape.in_features, shape.out_features, entry)


def check_loaded(layers: dict[str, PackedModule], quantized_now: bool) -> None:
    """Name tensors of packed layers that no file held, and scales and biases that are not finite."""
    missing, broken = [], []
    for name, layer in layers.items():
        for tensor, parameter in layer.named_parameters():
            if parameter.is_meta:
                continue  # offloaded: it is read when it is used
            if not getattr(parameter, "_is_hf_initialized", False):
                missing.append(f"{name}.{tensor}")
            elif parameter.is_floating_point() and not bool(torch.isfinite(local(parameter)).all()):
                broken.append(f"{name}.{tensor}")
    if missing and quantized_now:
        names = sorted({key.rpartition(".")[0] for key in missing})
        what = "weight" if any(key.endswith(".weight") for key in missing) else "bias"
        raise ValueError(
            f"The float checkpoint has no {what} for {counted(len(names), 'layer')} (the first is {names[0]}), which "
            f"would be random: leave them in floating point with modules_to_not_convert={names[:4]!r}"
        )
    if missing:
        raise ValueError(
            f"The checkpoint lacks {counted(len(missing), 'tensor')} of packed layers (the first is {missing[0]}): it "
            "was edited or is incomplete. Copy or download it again, or quantize the model again"
        )
    if broken:
        raise ValueError(
            f"{broken[0]} holds NaN or inf ({counted(len(broken), 'such tensor')}): the checkpoint is damaged. Copy or "
            "download it again, or quantize the model again"
        )
