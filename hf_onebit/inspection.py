"""What a packed checkpoint holds, read from its headers: no weights are loaded."""

from __future__ import annotations

import math
import os
from collections.abc import Container
from typing import Any

from torch import nn

from hf_onebit import sources
from hf_onebit.config import PackingConfig
from hf_onebit.formats.table import TableEntry
from hf_onebit.nn.experts import join_experts, separate_experts
from hf_onebit.nn.heads import HeadPlan
from hf_onebit.nn.replace import find_layers
from hf_onebit.nn.roles import output_heads
from hf_onebit.quantization.records import mean_bits
from hf_onebit.storage import checkpoint
from hf_onebit.storage.headers import PackedShape, TensorInfo, check_packed_headers, packed_shapes, read_headers

_NOT_IN_TABLE = "left in floating point when the checkpoint was made"


def inspect(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Layers, bits per weight, coverage, and what stayed in floating point and why.

    Args:
        folder: a local packed checkpoint.

    Returns:
        A JSON-ready dict: method, format_version, planes, preset, architecture, layers {name: in_features,
        out_features, method, planes or bits and group_size, bits_per_weight}, embeddings (the same), untied (whether
        the float model tied head and embedding, which are two here), skipped {name: reason, weights}, coverage,
        linear_bpw, onebit_bpw (without a head of the other method), file_bpw, file_bytes, total_weights, checksums
        (whether the checkpoint carries them), provenance.

    Raises:
        ValueError: the folder is no packed checkpoint, or its headers do not match its config.
    """
    raw, config = checkpoint.read_config(folder)
    headers = read_headers(checkpoint.weight_files(folder))
    shapes = packed_shapes(config, headers)
    check_packed_headers(headers, shapes)
    packed = {name: _figures(name, shape, headers) for name, shape in shapes.items()}
    embeddings = {name: packed[name] for name, shape in shapes.items() if shape.entry.kind == "embedding"}
    layers = {name: figures for name, figures in packed.items() if name not in embeddings}
    model = sources.skeleton(folder)
    heads = _heads(config, model)
    inner = {name: figures for name, figures in layers.items() if name not in heads}
    weights = sum(shape.weights for name, shape in shapes.items() if name in inner)
    total = _total_weights(config, shapes, headers, heads)
    skipped = None if model is None else _skipped(model, config, heads)
    left = None if skipped is None else sum(s["weights"] for s in skipped.values() if not s["head"])
    side = checkpoint.read_side_file(folder) or {}
    return {
        "method": config.quant_method,
        "format_version": config.format_version,
        "preset": config.preset,
        "planes": getattr(config, "planes", None),
        "architecture": (raw.get("architectures") or [None])[0],
        "layers": layers,
        "embeddings": embeddings,
        "untied": config.untied,
        "skipped": {n: {"reason": s["reason"], "weights": s["weights"]} for n, s in (skipped or {}).items()},
        "coverage": None if left is None or not weights + left else weights / (weights + left),
        "linear_bpw": mean_bits(layers),
        "onebit_bpw": mean_bits(inner),
        **checkpoint.file_figures(folder, total),
        "total_weights": total,
        "checksums": bool(side.get("files")),
        "provenance": side.get("provenance"),
    }


def _figures(name: str, shape: PackedShape, headers: dict[str, TensorInfo]) -> dict[str, Any]:
    """One packed module as JSON types."""
    bias = headers.get(f"{name}.bias")
    bias_bits = 8 * bias.bytes // shape.out_features if bias is not None else 0
    entry = shape.entry
    how: dict[str, Any] = {"planes": entry.planes}
    if entry.method == "mpq":
        how = {"planes": None, "bits": entry.bits, "group_size": entry.group_size, "symmetric": entry.symmetric}
        how |= {"blocks": None if entry.blocks is None else [list(block) for block in entry.blocks]}
        how |= {"act_order": entry.q_perm or entry.g_idx, "double_quant": entry.double_quant is not None}
        how |= {"tied_to": entry.tied_to}
    return {
        "in_features": shape.in_features,
        "out_features": shape.out_features,
        "method": entry.method,
        **how,
        "bits_per_weight": entry.bits_per_weight(shape.in_features, shape.out_features, bias_bits),
    }


def _heads(config: PackingConfig, model: nn.Module | None) -> dict[str, TableEntry]:
    """The packed output head and token embedding among the table's entries."""
    table = {name: TableEntry.from_dict(entry) for name, entry in (config.modules or {}).items()}
    if config.method != "mpq":
        return {name: entry for name, entry in table.items() if entry.method == "mpq"}
    known = {"lm_head"} if model is None else output_heads(model)
    return {n: e for n, e in table.items() if e.kind == "embedding" or e.tied_to is not None or n in known}


def _total_weights(
    config: PackingConfig, shapes: dict[str, PackedShape], headers: dict[str, TensorInfo], heads: Container[str]
) -> int:
    """Weights of the float model: a matrix that it tied counts once, whether it is stored once here or twice."""
    packed_tensors = {f"{name}.{tensor}" for name, shape in shapes.items() for tensor in shape.tensor_specs()}
    total = sum(math.prod(info.shape) for key, info in headers.items() if key not in packed_tensors)
    total += sum(shape.weights for shape in shapes.values() if shape.entry.tied_to is None)
    if config.untied:  # head and embedding have one size: the packed one of them, or one of the packed two, is extra
        total -= next(shape.weights for name, shape in shapes.items() if name in heads)
    return total


def _skipped(model: nn.Module, config: PackingConfig, heads: dict[str, TableEntry]) -> dict[str, dict[str, Any]]:
    """Linear layers that stayed float, with the reason."""
    packed = set(config.modules or {})
    separate = separate_experts(model)
    if not any(name.startswith(f"{experts}.") for experts in separate for name in packed):
        join_experts(model)
    plan = find_layers(model, config.modules_to_not_convert, HeadPlan(entries=heads))
    skipped: dict[str, dict[str, Any]] = {
        name: {"reason": s.reason, "weights": s.weights, "head": s.is_head} for name, s in plan.skipped.items()
    }
    for name, shape in plan.selected.items():
        if name not in packed:
            skipped[name] = {"reason": _NOT_IN_TABLE, "weights": shape.weights, "head": False}
    return {name: entry for name, entry in skipped.items() if name not in packed}
