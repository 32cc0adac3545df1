"""What a packed checkpoint holds, read from its headers: no weights are loaded."""

from __future__ import annotations

import math
import os
from typing import Any

import torch
from torch import nn

from hf_onebit import checkpoint, loading
from hf_onebit.config import OneBitConfig
from hf_onebit.formats import onebit as fmt
from hf_onebit.headers import TensorInfo, check_packed_headers, packed_shapes, read_headers
from hf_onebit.nn.replace import find_layers

_NOT_IN_TABLE = "left in floating point when the checkpoint was made"


def inspect(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Layers, bits per weight, coverage, and what stayed in floating point and why.

    Args:
        folder: a local packed checkpoint.

    Returns:
        A JSON-ready dict: method, format_version, planes, preset, architecture, layers {name: in_features,
        out_features, method, planes, bits_per_weight}, skipped {name: reason, weights}, coverage, linear_bpw, file_bpw,
        file_bytes, total_weights, checksums (whether the checkpoint carries them), provenance.

    Raises:
        ValueError: the folder is no onebit checkpoint, or its headers do not match its config.
    """
    raw, config = checkpoint.read_config(folder)
    headers = read_headers(checkpoint.weight_files(folder))
    shapes = packed_shapes(config, headers)
    check_packed_headers(headers, shapes)
    layers: dict[str, dict[str, Any]] = {}
    for name, (in_features, out_features, planes) in shapes.items():
        bias = headers.get(f"{name}.bias")
        bias_bits = 8 * bias.bytes // out_features if bias is not None else 0
        layers[name] = {
            "in_features": in_features,
            "out_features": out_features,
            "method": "onebit",
            "planes": planes,
            "bits_per_weight": fmt.bits_per_weight(in_features, out_features, planes, bias_bits),
        }
    weights = sum(i * o for i, o, _ in shapes.values())
    bits = sum(layer["bits_per_weight"] * layer["in_features"] * layer["out_features"] for layer in layers.values())
    total = weights + _float_weights(headers, set(shapes))
    skipped = _skipped(folder, config, set(config.modules or {}))
    left = None if skipped is None else sum(s["weights"] for s in skipped.values() if not s["head"])
    side = checkpoint.read_side_file(folder) or {}
    return {
        "method": config.quant_method,
        "format_version": config.format_version,
        "preset": config.preset,
        "planes": config.planes,
        "architecture": (raw.get("architectures") or [None])[0],
        "layers": layers,
        "skipped": {n: {"reason": s["reason"], "weights": s["weights"]} for n, s in (skipped or {}).items()},
        "coverage": None if left is None else weights / (weights + left),
        "linear_bpw": bits / weights if weights else None,
        **checkpoint.file_figures(folder, total),
        "total_weights": total,
        "checksums": bool(side.get("files")),
        "provenance": side.get("provenance"),
    }


def _float_weights(headers: dict[str, TensorInfo], packed: set[str]) -> int:
    """Numbers stored outside of the packed tensors: embeddings, norms, biases."""
    total = 0
    packed_tensors = {name for plane in range(fmt.MAX_PLANES) for name in fmt.plane_names(plane)}
    for key, info in headers.items():
        owner, _, tensor = key.rpartition(".")
        if not (owner in packed and tensor in packed_tensors):
            total += math.prod(info.shape)
    return total


def _skipped(
    folder: str | os.PathLike[str], config: OneBitConfig, packed: set[str]
) -> dict[str, dict[str, Any]] | None:
    """Linear layers that stayed float, with the reason; None where the architecture is not one of Transformers' own."""
    model = _skeleton(folder)
    if model is None:
        return None
    plan = find_layers(model, config.modules_to_not_convert)
    skipped: dict[str, dict[str, Any]] = {
        name: {"reason": s.reason, "weights": s.weights, "head": s.is_head} for name, s in plan.skipped.items()
    }
    for name, shape in plan.selected.items():
        if name not in packed:
            skipped[name] = {"reason": _NOT_IN_TABLE, "weights": shape.weights, "head": False}
    return {name: entry for name, entry in skipped.items() if name not in packed}


def _skeleton(folder: str | os.PathLike[str]) -> nn.Module | None:
    """The float model on the meta device, from the config alone."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(os.fspath(folder))
    except StrictDataclassError as error:
        raise ValueError(f"{os.fspath(folder)!r} has a config.json that does not fit its model: {error}") from error
    except ValueError:
        return None
    for part in (config, config.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    cls = loading.model_class(config)
    with torch.device("meta"):
        model = cls._from_config(config) if hasattr(cls, "_from_config") else cls.from_config(config)
    assert isinstance(model, nn.Module)
    return model
