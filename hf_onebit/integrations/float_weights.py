"""The float weights that a packed model's layers were made of, one at a time, from the float model or its files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from hf_onebit.nn.experts import separated
from hf_onebit.nn.replace import float_weight

# (full name of a tensor, which of its first dimension or None for all) -> the tensor, None where there is none.
_Find = Callable[[str, int | None], Tensor | None]


def float_weights_of(base: nn.Module, source: nn.Module | str | os.PathLike[str], what: str) -> Callable[..., Tensor]:
    """A function (layer's full name, packed layer) -> float32 (out, in) on the packed layer's device.

    Args:
        base: the packed model, without PEFT's around it.
        source: the float model, or the folder of its safetensors files; experts fused or not.
        what: the function that needs them, for messages.

    Raises:
        ValueError: the folder holds no such files; by the function: no float weight of that name and shape.
    """
    find = _in_module(source) if isinstance(source, nn.Module) else _in_folder(base, Path(source))
    experts = separated(base)

    def find_layer(name: str) -> Tensor | None:
        weight = find(f"{name}.weight", None)
        owner, _, layer = name.rpartition(".")
        prefix, _, number = owner.rpartition(".")
        if weight is not None or prefix not in experts:
            return weight
        parameter, part = experts[prefix].place_of(layer)
        fused = find(f"{prefix}.{parameter}", int(number))
        return None if fused is None else experts[prefix].layout.parts(parameter, fused[None])[part][0]

    def read(name: str, packed: Any) -> Tensor:
        weight = find_layer(name)
        expected = (packed.out_features, packed.in_features)
        oriented = None if weight is None else float_weight(packed, weight)
        if oriented is None or tuple(oriented.shape) != expected or not oriented.is_floating_point():
            got = "nothing" if oriented is None else f"{oriented.dtype} {tuple(oriented.shape)}"
            raise ValueError(
                f"{what} needs the float weight {expected} of {name}, found {got} in "
                f"{type(source).__name__ if isinstance(source, nn.Module) else str(source)!r}: give the float model "
                "that was packed"
            )
        return oriented.to(packed.weight.device, torch.float32)

    return read


def _in_module(model: nn.Module) -> _Find:
    modules = dict(model.named_modules())

    def find(name: str, number: int | None) -> Tensor | None:
        owner, _, own = name.rpartition(".")
        tensor = getattr(modules.get(owner), own, None)
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            return None
        return tensor if number is None else tensor[number]

    return find


def _in_folder(base: nn.Module, folder: Path) -> _Find:
    files = _tensor_files(folder)
    own = get_model_conversion_mapping(base) if isinstance(base, PreTrainedModel) else []
    renamings = [c for c in own if isinstance(c, WeightRenaming)]
    keys = {rename_source_key(key, renamings, [])[0]: key for key in files} | {key: key for key in files}

    def find(name: str, number: int | None) -> Tensor | None:
        key = next((keys[k] for k in (name, name.partition(".")[2]) if k in keys), None)
        if key is None:
            return None
        with safe_open(files[key], framework="pt") as file:
            tensor: Tensor = file.get_tensor(key) if number is None else file.get_slice(key)[number]
            return tensor

    return find


def _tensor_files(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise ValueError(f"There is no folder {str(folder)!r}: expected that of the float model")
    index = folder / "model.safetensors.index.json"
    if not (folder / "model.safetensors").is_file() and index.is_file():
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {key: folder / os.path.basename(name) for key, name in names.items()}
    files: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            files.update(dict.fromkeys(file.keys(), path))
    if not files:
        raise ValueError(f"{str(folder)!r} holds no safetensors files: expected the folder of the float model")
    return files
