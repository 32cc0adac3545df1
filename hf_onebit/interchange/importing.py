"""A checkpoint of another program as a packed one of this package, layer by layer."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_onebit.config import PackingConfig
from hf_onebit.counts import counted
from hf_onebit.interchange.bitorch import Bitorch
from hf_onebit.interchange.dialect import Converted, Dialect
from hf_onebit.interchange.gptq import GPTQ
from hf_onebit.interchange.onecomp import OneComp
from hf_onebit.interchange.source import ForeignFolder, open_folder, quantization_of
from hf_onebit.nn.replace import module_shape, resolve_names
from hf_onebit.progress import Progress, logger
from hf_onebit.quantization.records import mean_bits
from hf_onebit.sources import provenance_of, skeleton
from hf_onebit.storage.checkpoint import (
    CHAT_TEMPLATES,
    atomic_folder,
    check_replaceable,
    finish_folder,
    parse_shard_size,
    read_json,
    weight_files,
)
from hf_onebit.storage.headers import check_packed_headers, header_metadata, packed_shapes, read_headers
from hf_onebit.storage.shards import ShardWriter

DIALECTS: tuple[type[Dialect], ...] = (OneComp, Bitorch, GPTQ)
# Files beside the weights that go along: tokenizer, generation settings, licence.
_ALONG = (*("*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", f"{CHAT_TEMPLATES}/*.jinja", "LICENSE*", "NOTICE*"),)
_LEFT = ("config.json", "quantize_config.json", "quant_strategy.json", "hf_onebit.json", "quant_log.csv")


def is_foreign(folder: str | os.PathLike[str]) -> bool:
    """Whether a local folder holds a checkpoint of another program that :func:`import_checkpoint` reads.

    Raises:
        ValueError: its config.json is not readable.
    """
    config = Path(folder) / "config.json"
    if not config.is_file():
        return False
    said = quantization_of(Path(folder), read_json(config))
    if "quant_method" not in said and not any(Path(folder).glob("*.safetensors")):
        return False
    if said.get("quant_method") in (None, "bitorch"):  # only the tensors can tell
        try:
            return Bitorch.recognizes(open_folder(folder))
        except ValueError:  # damaged, whatever it is: whoever reads it says so
            return False
    return is_foreign_config(said)


def is_foreign_config(quantization: Mapping[str, Any]) -> bool:
    """The same of a config's ``quantization_config`` alone."""
    stand_in = ForeignFolder(Path(), {}, dict(quantization), {})
    return any(dialect.recognizes(stand_in) for dialect in (GPTQ, OneComp))


def import_checkpoint(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    max_shard_size: int | str = "5GB",
    command: str | None = None,
) -> dict[str, Any]:
    """Convert a GPTQ, bitorch or OneComp checkpoint into a packed one of this package.

    One layer is in memory at a time. ``output`` appears complete or not at all.

    Args:
        source: the folder of the checkpoint.
        output: folder to make, or an older packed checkpoint to replace.
        max_shard_size: largest weight file, in bytes or as "5GB".
        command: how it was called, for the side file.

    Returns:
        JSON types: format, method, layers {name: in_features, out_features, method, bits, bits_per_weight, exact,
        max_error, step}, exact (how many layers are), max_error, kept_float (names of layers), warnings, linear_bpw,
        file_bytes, file_bpw, seconds, output.

    Raises:
        ValueError: there is no such folder, it is of no format that is read, or holds what has no counterpart here.
    """
    folder = open_folder(source)
    dialect = _dialect_of(folder)
    if Path(source).resolve().is_relative_to(Path(output).resolve()):
        raise ValueError(
            f"Will not write to {os.fspath(output)!r}: it holds what is read, {os.fspath(source)!r}, and would be "
            "replaced. Pass another folder"
        )
    check_replaceable(output, packed_only=True)
    shard_bytes = parse_shard_size(max_shard_size)
    dialect.check()
    with atomic_folder(output) as target:
        return _convert(dialect, target, str(output), shard_bytes, command)


def _dialect_of(folder: ForeignFolder) -> Dialect:
    for cls in DIALECTS:
        if cls.recognizes(folder):
            return cls(folder)
    got = folder.quantization.get("quant_method")
    known = ", ".join(cls.title for cls in DIALECTS)
    if got is None:
        raise ValueError(
            f"{str(folder.path)!r} is a float model, its config has no quantization_config: expected a checkpoint of "
            f"{known}. Quantize it: hf-onebit quantize MODEL -o DIR"
        )
    ours = " It is packed by hf_onebit already: hf_onebit.load reads it" if got in ("onebit", "mpq") else ""
    raise ValueError(
        f"{str(folder.path)!r} has quant_method {got!r}: expected a checkpoint of {known}."
        + (ours or " Quantize the float model instead: hf-onebit quantize MODEL -o DIR")
    )


def _convert(dialect: Dialect, target: Path, output: str, max_shard_bytes: int, command: str | None) -> dict[str, Any]:
    start = time.perf_counter()
    folder = dialect.folder
    names = folder.owners(dialect.marker)
    if not names:
        raise ValueError(
            f"{str(folder.path)!r} names {dialect.title} in its config, and its files have no tensor "
            f"'*.{dialect.marker}': expected one for each packed layer. Copy or download the checkpoint again"
        )
    model = skeleton(folder.path)
    modules = _modules_of(model, names, folder)
    owned = {f"{name}.{part}": name for name in names for part in (*dialect.parts, "bias")}
    table: dict[str, dict[str, Any]] = {}
    records: dict[str, dict[str, Any]] = {}
    kept_float: list[str] = []
    warnings = list(dialect.warnings)
    total = 0
    with (
        ShardWriter(target, max_shard_bytes, header_metadata(dialect.method)) as writer,
        Progress(len(names), f"Importing {dialect.title}") as progress,
    ):
        for key, info in folder.headers.items():
            name = owned.get(key)
            if name is None:
                writer.add(key, folder.read(key))
                total += torch.Size(info.shape).numel()
            elif key == f"{name}.{dialect.marker}":
                module = modules[name]
                layer = _read_layer(dialect, name, module)
                bias = _bias(folder, name, module)
                total += layer.in_features * layer.out_features + (0 if bias is None else bias.numel())
                warnings += layer.notes
                if layer.entry is None:
                    kept_float.append(name)
                    layer.tensors["weight"] = layer.tensors["weight"].to(_float_dtype(folder))
                else:
                    table[name], records[name] = layer.entry.to_dict(), _record(layer, bias)
                for part, tensor in (layer.tensors | ({} if bias is None else {"bias": bias})).items():
                    writer.add(f"{name}.{part}", tensor)
                progress.step(name)
        writer.finish()
    if not table:
        raise ValueError(f"{str(folder.path)!r} has no layer that can be packed here: load the float model instead")
    config, untied = _config(dialect, table, model)
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    _copy_along(folder.path, target)
    _check_written(target, dialect.packing_config(table, untied))
    for warning in warnings:
        logger.warning(warning)
    said = {
        "format": dialect.title,
        "method": config["quantization_config"]["quant_method"],
        "exact": sum(record["exact"] for record in records.values()),
        "max_error": max(record["max_error"] for record in records.values()),
        "kept_float": kept_float,
        "warnings": warnings,
        "linear_bpw": mean_bits(records),
    }
    report = said | {
        "imported": f"{dialect.title}, {said['exact']} of {len(records)} layers exactly",
        "total_weights": total,
        **{key: config["quantization_config"].get(key) for key in ("bits", "group_size", "symmetric", "planes")},
    }
    provenance = provenance_of(folder.path) | ({} if command is None else {"command": command})
    side = finish_folder(target, report, provenance)
    return {
        **said,
        "layers": records,
        "file_bytes": side["report"]["file_bytes"],
        "file_bpw": side["report"]["file_bpw"],
        "seconds": time.perf_counter() - start,
        "output": output,
    }


def _modules_of(model: nn.Module | None, names: list[str], folder: ForeignFolder) -> dict[str, nn.Module | None]:
    """The float module that each packed layer stands for; None for each where Transformers has no such architecture."""
    if model is None:
        return dict.fromkeys(names)
    found = resolve_names(model, names)
    absent = [name for name, there in found.items() if there is None]
    if absent:
        raise ValueError(
            f"{str(folder.path)!r} packs {counted(len(absent), 'layer')} that Transformers' {type(model).__name__} "
            f"does not have as modules of their own (the first is {absent[0]!r}): expected linear layers of the model. "
            "Experts that Transformers keeps as one matrix cannot be imported: quantize the float model with hf-onebit "
            "quantize"
        )
    modules: dict[str, nn.Module | None] = {}
    for name, there in found.items():
        assert there is not None
        modules[name] = model.get_submodule(there)
        if module_shape(modules[name]) is None:  # type: ignore[arg-type]
            raise ValueError(
                f"{name} is packed in {str(folder.path)!r}, and a {type(modules[name]).__name__} in the model: "
                "expected a linear layer. The config is another model's: copy or download the checkpoint again"
            )
    return modules


def _read_layer(dialect: Dialect, name: str, module: nn.Module | None) -> Converted:
    folder = dialect.folder
    tensors = {part: folder.read(f"{name}.{part}") for part in folder.parts(name, dialect.parts)}
    shape = None if module is None else module_shape(module)
    layer = dialect.convert(name, tensors, None if shape is None else shape.in_features)
    if shape is not None and (shape.in_features, shape.out_features) != (layer.in_features, layer.out_features):
        raise ValueError(
            f"{name} is {layer.out_features} x {layer.in_features} in the files and {shape.out_features} x "
            f"{shape.in_features} in the model of config.json: expected the same. Copy or download the checkpoint again"
        )
    if layer.entry is not None:
        layer.entry.validate_tensors(layer.tensors, layer.in_features, layer.out_features, name)
    return layer


def _bias(folder: ForeignFolder, name: str, module: nn.Module | None) -> Tensor | None:
    """The layer's bias. Some programs write one of zeros where the model has none."""
    if f"{name}.bias" not in folder.headers:
        return None
    bias = folder.read(f"{name}.bias")
    if module is None or getattr(module, "bias", None) is not None:
        return bias
    if bool(bias.any()):
        raise ValueError(
            f"{name}.bias holds values up to {float(bias.abs().max()):.4g}, and the model of config.json has no bias "
            "there: expected zeros or none. The config is another model's: copy or download the checkpoint again"
        )
    return None


def _record(layer: Converted, bias: Tensor | None) -> dict[str, Any]:
    entry = layer.entry
    assert entry is not None
    bias_bits = 0 if bias is None else 8 * bias.element_size()
    return {
        "in_features": layer.in_features,
        "out_features": layer.out_features,
        "method": entry.method,
        "bits": entry.bits,
        "group_size": entry.group_size if entry.method == "mpq" else None,
        "symmetric": entry.symmetric if entry.method == "mpq" else None,
        "bits_per_weight": entry.bits_per_weight(layer.in_features, layer.out_features, bias_bits),
        "exact": layer.exact,
        "max_error": layer.max_error,
        "step": layer.step,
    }


def _config(dialect: Dialect, table: dict[str, dict[str, Any]], model: nn.Module | None) -> tuple[dict[str, Any], bool]:
    """config.json of the result, and whether head and embedding were one in the float model and are two now."""
    config = json.loads(json.dumps(dialect.folder.config))
    tied = bool(config.get("tie_word_embeddings", _ties_by_default(model)))
    untied = tied and any(name.rpartition(".")[2] == "lm_head" for name in table)
    if untied:
        config["tie_word_embeddings"] = False
    owner = config if "quantization_config" in config or not isinstance(config.get("text_config"), dict) else None
    if owner is None and "quantization_config" in config["text_config"]:
        del config["text_config"]["quantization_config"]
    config["quantization_config"] = dialect.packing_config(table, untied).to_dict()
    return config, untied


def _ties_by_default(model: nn.Module | None) -> bool:
    return bool(getattr(getattr(model, "config", None), "tie_word_embeddings", False))


def _float_dtype(folder: ForeignFolder) -> torch.dtype:
    name = folder.config.get("dtype") or folder.config.get("torch_dtype") or "float32"
    found = getattr(torch, str(name).removeprefix("torch."), torch.float32)
    return found if isinstance(found, torch.dtype) and found.is_floating_point else torch.float32


def _copy_along(source: Path, target: Path) -> None:
    for pattern in _ALONG:
        for file in source.glob(pattern):
            if file.is_file() and file.name not in _LEFT and not file.name.endswith(".safetensors.index.json"):
                copy = target / file.relative_to(source)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, copy)


def _check_written(target: Path, config: PackingConfig) -> None:
    headers = read_headers(weight_files(target))
    check_packed_headers(headers, packed_shapes(config, headers))
