"""What the headers of weight files say, and whether it is what the config promises; no weights are read."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from hf_onebit.config import OneBitConfig
from hf_onebit.formats import onebit as fmt


@dataclass(frozen=True)
class TensorInfo:
    """What a safetensors header says of one tensor."""

    file: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Bytes in the file; a dtype's name starts with its width in bits (BF16, I32, F8_E4M3), and BOOL takes 8."""
        width = re.search(r"\d+", self.dtype)
        return math.prod(self.shape) * (int(width[0]) if width else 8) // 8


def read_headers(files: list[Path] | list[str]) -> dict[str, TensorInfo]:
    """Names, dtypes and shapes of every tensor in safetensors files; reads no weights.

    Raises:
        ValueError: a file is truncated or damaged, or two files hold the same tensor.
    """
    headers: dict[str, TensorInfo] = {}
    for file in map(Path, files):
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118  a safe_open handle is no mapping
                    piece = opened.get_slice(name)
                    if name in headers:
                        raise ValueError(
                            f"{name!r} is in both {headers[name].file} and {file.name}: delete the stale file"
                        )
                    headers[name] = TensorInfo(file.name, piece.get_dtype(), tuple(piece.get_shape()))
        except FileNotFoundError as error:
            raise ValueError(
                f"{file} is not there, although the checkpoint's index names it: copy or download it again"
            ) from error
        except SafetensorError as error:
            size = file.stat().st_size
            raise ValueError(
                f"{file.name} is truncated or damaged ({size} bytes on disk; {error}): copy or download it again"
            ) from error
    return headers


_SAFETENSORS_NAMES = {torch.int32: "I32", torch.float16: "F16"}


def check_packed_headers(
    headers: Mapping[str, TensorInfo], shapes: Mapping[str, tuple[int, int, int]], base_model_prefix: str = ""
) -> None:
    """Compare a checkpoint's headers with what its packed layers must hold, before anything is loaded.

    Args:
        headers: see ``read_headers``.
        shapes: {module name: (in_features, out_features, planes)}.
        base_model_prefix: names may come with or without it.

    Raises:
        ValueError: a packed tensor is missing, has another dtype or shape, or belongs to no packed layer.
    """
    names = {name: _name_on_disk(name, headers, base_model_prefix) for name in shapes}
    renamed = _renamed_layers([n for n, found in names.items() if not found], filter(None, names.values()), headers)
    problems = []
    expected = {f"{name}.weight" for name in renamed}
    for name, (in_features, out_features, planes) in shapes.items():
        stored = names[name] or name
        if names[name] is None and renamed:
            continue  # which one it is, only the loader knows: what is missing then is told after the load
        for tensor, (shape, dtype) in fmt.tensor_specs(in_features, out_features, planes).items():
            key = f"{stored}.{tensor}"
            expected.add(key)
            problems += _compare(key, headers.get(key), shape, _SAFETENSORS_NAMES[dtype])
        bias = headers.get(f"{stored}.bias")
        if bias is not None:
            problems += _compare(f"{stored}.bias", bias, (out_features,), bias.dtype)
    problems += [
        f"{key} in {info.file} is a packed weight of a layer that the config's table of modules does not name"
        for key, info in headers.items()
        if key not in expected and _looks_packed(key, info, headers)
    ]
    second = tuple(f".{tensor}" for tensor in fmt.plane_names(1))
    extra_planes = [k for k in headers if k not in expected and k.endswith(second) and k[:-2] in expected]
    problems += [
        f"{key} is the second plane of a layer whose entry in the config says planes=1" for key in extra_planes
    ]
    if problems:
        shown = "\n".join(f"  - {p}" for p in problems[:8])
        more = f"\n  ... and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(
            f"The checkpoint does not match its own config:\n{shown}{more}\n"
            "It was edited or is incomplete: copy or download it again, or quantize the model again"
        )


def _name_on_disk(name: str, headers: Mapping[str, TensorInfo], prefix: str) -> str | None:
    candidates = [name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"] if prefix else [name]
    tensors = ("weight", "a", "b")
    return next((c for c in candidates if any(f"{c}.{tensor}" in headers for tensor in tensors)), None)


def _renamed_layers(unnamed: list[str], named: Iterable[str], headers: Mapping[str, TensorInfo]) -> list[str]:
    """Packed layers in the files that stand for those of the table (`unnamed`) whose names the files do not hold.

    Some models rename modules between file and memory. Where as many packed layers in the files are without an entry
    in the table as entries are without a layer, those are taken for each other; else nothing is.
    """
    known = set(named)
    stored = [key.removesuffix(".weight") for key, info in headers.items() if _looks_packed(key, info, headers)]
    strangers = [name for name in stored if name not in known]
    return strangers if len(strangers) == len(unnamed) else []


def _compare(key: str, info: TensorInfo | None, shape: tuple[int, ...], dtype: str) -> list[str]:
    if info is None:
        return [f"{key} is missing: expected {dtype} {list(shape)}"]
    if (info.dtype, info.shape) != (dtype, tuple(shape)):
        return [f"{key} in {info.file} is {info.dtype} {list(info.shape)}: expected {dtype} {list(shape)}"]
    return []


def _looks_packed(key: str, info: TensorInfo, headers: Mapping[str, TensorInfo]) -> bool:
    owner, _, tensor = key.rpartition(".")
    return tensor == "weight" and info.dtype == "I32" and f"{owner}.a" in headers and f"{owner}.b" in headers


def packed_shapes(config: OneBitConfig, headers: Mapping[str, TensorInfo]) -> dict[str, tuple[int, int, int]]:
    """(in_features, out_features, planes) of every packed layer by its name in the files, from its scales' lengths.

    Where a model renames its modules between file and memory, the table's names are not the files': there, the layers
    are told by their tensors.

    Raises:
        ValueError: a layer of the table has no scales in the files.
    """
    table = dict(config.modules or {})
    named = [name for name in table if _name_on_disk(name, headers, "")]
    unnamed = [name for name in table if name not in named]
    if renamed := _renamed_layers(unnamed, named, headers):
        table = {name: table[name] for name in named}
        table |= {name: {"planes": 1 + (f"{name}.weight_1" in headers)} for name in renamed}
    shapes = {}
    for name, entry in table.items():
        a, b = headers.get(f"{name}.a"), headers.get(f"{name}.b")
        if a is None or b is None or len(a.shape) != 1 or len(b.shape) != 1:
            raise ValueError(
                f"{name} is packed according to config.json, but the files hold no scales {name}.a and {name}.b for "
                "it: copy or download the checkpoint again, or quantize the model again"
            )
        shapes[name] = (b.shape[0], a.shape[0], int(entry["planes"]))
    return shapes
