"""What the headers of weight files say, and whether it is what the config promises; no weights are read."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from hf_onebit.config import PackingConfig
from hf_onebit.formats import onebit as fmt
from hf_onebit.formats.table import TableEntry
from hf_onebit.storage.tensor_files import NAMES
from hf_onebit.version import __version__


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


@dataclass(frozen=True)
class PackedShape:
    """A packed module's sizes, and its entry in the config's table."""

    in_features: int
    out_features: int
    entry: TableEntry

    @property
    def weights(self) -> int:
        """Weights that the module stands for."""
        return self.in_features * self.out_features

    def tensor_specs(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of every packed tensor in the file, by name."""
        return self.entry.stored_specs(self.in_features, self.out_features)


def header_metadata(method: str) -> dict[str, str]:
    """The strings that every save writes into the header of each file; ``method`` is the config's."""
    return {
        "format": "pt",
        "quant_library": "hf_onebit",
        "quant_library_version": __version__,
        "quant_method": method,
        "quant_format_version": str(fmt.FORMAT_VERSION),
    }


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


def check_packed_headers(
    headers: Mapping[str, TensorInfo], shapes: Mapping[str, PackedShape], base_model_prefix: str = ""
) -> None:
    """Compare a checkpoint's headers with what its packed layers must hold, before anything is loaded.

    Args:
        headers: see ``read_headers``.
        shapes: {module name: sizes and entry}; tensors of a module tied to another may be absent.
        base_model_prefix: names may come with or without it.

    Raises:
        ValueError: a packed tensor is missing, has another dtype or shape, or belongs to no packed layer.
    """
    names = {name: _name_on_disk(name, headers, base_model_prefix) for name in shapes}
    unnamed = [name for name, found in names.items() if not found and shapes[name].entry.tied_to is None]
    renamed = _renamed_layers(unnamed, filter(None, names.values()), headers)
    problems = []
    expected = {f"{name}.weight" for name in renamed}
    for name, shape in shapes.items():
        stored = names[name] or name
        if names[name] is None and (renamed or shape.entry.tied_to is not None):
            continue  # which one it is, only the loader knows: what is missing then is told after the load
        for tensor, (expected_shape, dtype) in shape.tensor_specs().items():
            key = f"{stored}.{tensor}"
            expected.add(key)
            problems += _compare(key, headers.get(key), expected_shape, NAMES[dtype])
        bias = headers.get(f"{stored}.bias")
        if bias is not None:
            problems += _compare(f"{stored}.bias", bias, (shape.out_features,), bias.dtype)
        if shape.entry.method == "mpq" and shape.entry.symmetric and f"{stored}.zeros" in headers:
            problems.append(f"{stored}.zeros belongs to a layer whose entry in the config says symmetric=true")
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
    tensors = ("weight", "a", "b", "scales", "qscales")
    return next((c for c in candidates if any(f"{c}.{tensor}" in headers for tensor in tensors)), None)


def _renamed_layers(unnamed: list[str], named: Iterable[str], headers: Mapping[str, TensorInfo]) -> list[str]:
    """Packed layers in the files that stand for those of the table (``unnamed``) whose names the files do not hold.

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
    has_scales = any(f"{owner}.{name}" in headers for name in ("scales", "qscales")) or (
        f"{owner}.a" in headers and f"{owner}.b" in headers
    )
    return tensor == "weight" and info.dtype == "I32" and has_scales


def packed_shapes(config: PackingConfig, headers: Mapping[str, TensorInfo]) -> dict[str, PackedShape]:
    """Sizes of every packed module by its name in the files, from its scales' lengths.

    Where a model renames its modules between file and memory, the table's names are not the files': there, the layers
    are told by their tensors. A module tied to another has the other's sizes.

    Raises:
        ValueError: a layer of the table has no scales in the files.
    """
    table = {name: TableEntry.from_dict(entry) for name, entry in (config.modules or {}).items()}
    owners = [name for name, entry in table.items() if entry.tied_to is None]
    named = [name for name in owners if _name_on_disk(name, headers, "")]
    unnamed = [name for name in owners if name not in named]
    if renamed := _renamed_layers(unnamed, named, headers):
        unknown = {name: table[name] for name in unnamed}
        table = {name: entry for name, entry in table.items() if name not in unknown}
        table |= {name: _entry_of_stranger(name, unknown, headers) for name in renamed}
    shapes = {}
    for name, entry in table.items():
        if entry.tied_to is not None and not _name_on_disk(name, headers, ""):
            continue
        found = {t: headers[f"{name}.{t}"].shape for t in entry.tensor_names if f"{name}.{t}" in headers}
        if entry.double_quant is not None and "weight" in found:
            found["scales"] = found["weight"]  # the words tell as many outputs
        sizes = entry.sizes(found)
        if sizes is None:
            needed = ("weight", "scales") if entry.method == "mpq" else ("a", "b")
            what = "tensors" if entry.method == "mpq" else "scales"
            raise ValueError(
                f"{name} is packed according to config.json, but the files hold no {what} {name}.{needed[0]} and "
                f"{name}.{needed[1]} for it: copy or download the checkpoint again, or quantize the model again"
            )
        shapes[name] = PackedShape(*sizes, entry)
    for name, entry in table.items():
        if entry.tied_to in shapes and name not in shapes:
            shapes[name] = PackedShape(shapes[entry.tied_to].in_features, shapes[entry.tied_to].out_features, entry)
    return shapes


def _entry_of_stranger(name: str, unknown: dict[str, TableEntry], headers: Mapping[str, TensorInfo]) -> TableEntry:
    """The entry of a packed module whose name the table does not hold: of its own method, and best of its last name."""
    if not any(f"{name}.{scales}" in headers for scales in ("scales", "qscales")):
        return TableEntry(planes=1 + (f"{name}.weight_1" in headers))
    candidates = [known for known, entry in unknown.items() if entry.method == "mpq"]
    alike = [known for known in candidates if known.rpartition(".")[2] == name.rpartition(".")[2]]
    chosen = next(iter([*alike, *candidates]), None)
    if chosen is None:
        raise ValueError(
            f"{name} has scales of groups in the files, and no entry of config.json says its bits: copy or download "
            "the checkpoint again, or quantize the model again"
        )
    return unknown.pop(chosen)
