"""Checkpoint folders: atomic saves, the side file ``hf_onebit.json``, headers without tensors, and verification."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from hf_onebit.config import OneBitConfig
from hf_onebit.formats import onebit as fmt
from hf_onebit.nn import packed_layers
from hf_onebit.report import model_card
from hf_onebit.version import __version__

SIDE_FILE = "hf_onebit.json"
_CHUNK = 1 << 20


@dataclass(frozen=True)
class TensorInfo:
    """What a safetensors header says of one tensor."""

    file: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        size = _DTYPE_BYTES.get(self.dtype, 4)
        for dim in self.shape:
            size *= dim
        return size


_DTYPE_BYTES = {
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "F32": 4,
    "I32": 4,
    "U32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "U16": 2,
}
_DTYPE_BYTES |= {"U8": 1, "I8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}


@contextlib.contextmanager
def atomic_folder(target: str | os.PathLike[str]) -> Iterator[Path]:
    """A fresh folder beside ``target`` that takes its place when the block ends well, and vanishes when it does not.

    An existing ``target`` stays complete until the new folder is, then goes.

    Raises:
        ValueError: ``target`` is a file, or a folder that holds something other than a checkpoint.
    """
    target = Path(target)
    _check_replaceable(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    try:
        yield temporary
        os.chmod(temporary, 0o777 & ~_umask())
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
            os.rename(target, old / "checkpoint")
            try:
                os.rename(temporary, target)
            except OSError:
                os.rename(old / "checkpoint", target)
                raise
            finally:
                shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _check_replaceable(target: Path) -> None:
    if target.is_file():
        raise ValueError(f"Cannot save to {str(target)!r}: it is a file. Pass a folder")
    if target.is_dir() and any(target.iterdir()) and not (target / "config.json").is_file():
        raise ValueError(
            f"Will not save to {str(target)!r}: it holds files that are no checkpoint (there is no config.json). "
            "Pass an empty or a new folder"
        )


def save(
    model: nn.Module,
    save_dir: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    report: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
    max_shard_size: int | str = "5GB",
) -> dict[str, Any]:
    """Save a packed model: weights, config, tokenizer, model card, and ``hf_onebit.json`` with checksums of all of
    them.

    Everything is written to a folder beside ``save_dir``, which is renamed at the end: there is never half a
    checkpoint.

    Args:
        model: a quantized Transformers model.
        save_dir: folder to make, or an older checkpoint to replace.
        tokenizer: saved beside the model when given.
        report: what quantization reported (``OneBitQuantizer.report``); stored, and shown on the card.
        provenance: where the model came from: base_model, base_model_license, command, seed, calibration, ...
        max_shard_size: as in ``save_pretrained``.

    Returns:
        What was written to ``hf_onebit.json``.

    Raises:
        ValueError: the model holds no packed layers, or ``save_dir`` cannot be replaced.
    """
    packed = packed_layers(model)
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if not packed or not isinstance(config, OneBitConfig):
        raise ValueError(
            f"{type(model).__name__} holds {len(packed)} packed layers and "
            f"{'a' if isinstance(config, OneBitConfig) else 'no'} OneBitConfig: there is nothing to save as a "
            f"onebit checkpoint. "
            "Quantize it first: OneBitQuantizer(OneBitConfig()).quantize_model(model)"
        )
    report = dict(report or {})
    with atomic_folder(save_dir) as folder:
        model.save_pretrained(folder, max_shard_size=max_shard_size)  # type: ignore[operator]
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        report |= {
            key: value for key, value in file_figures(folder, report.get("total_weights")).items() if value is not None
        }
        info = {**report, "provenance": dict(provenance or {})}
        (folder / "README.md").write_text(model_card(info), encoding="utf-8")
        side = _side_file(folder, report, provenance or {})
        (folder / SIDE_FILE).write_text(json.dumps(side, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return side


def file_figures(folder: str | os.PathLike[str], total_weights: int | None) -> dict[str, Any]:
    """Bytes of the weight files, and bits per weight of the whole file where the number of weights is known."""
    size = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
    return {"file_bytes": size, "file_bpw": 8 * size / total_weights if total_weights else None}


def _side_file(folder: Path, report: Mapping[str, Any], provenance: Mapping[str, Any]) -> dict[str, Any]:
    files, tensors = {}, {}
    for path in sorted(folder.iterdir()):
        files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}
        if path.suffix == ".safetensors":
            tensors.update({name: sha256_of_tensor(tensor) for name, tensor in _tensors(path)})
    return {
        "format_version": fmt.FORMAT_VERSION,
        "hf_onebit": __version__,
        "provenance": dict(provenance),
        "report": dict(report),
        "files": files,
        "tensors": tensors,
    }


def _tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  a safe_open handle is no mapping
            yield name, file.get_tensor(name)


def sha256_of_tensor(tensor: Tensor) -> str:
    """Digest of a tensor's bytes as safetensors stores them (row by row, little end first)."""
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().tobytes()).hexdigest()


def sha256_of_file(path: str | os.PathLike[str]) -> str:
    """Digest of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def read_side_file(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """``hf_onebit.json`` of a checkpoint, or None where it has none.

    Raises:
        ValueError: the file is no JSON object.
    """
    path = Path(folder) / SIDE_FILE
    return read_json(path) if path.is_file() else None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a checkpoint.

    Raises:
        ValueError: the file is no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not readable JSON ({error}): copy or download it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {type(value).__name__}: expected a JSON object. Copy or download it again")
    return value


def read_config(folder: str | os.PathLike[str]) -> tuple[dict[str, Any], OneBitConfig]:
    """A checkpoint's config.json, and the quantization config in it.

    Raises:
        ValueError: there is no such folder or config.json, or it is no (readable) onebit checkpoint.
    """
    path = Path(folder) / "config.json"
    if not Path(folder).is_dir():
        raise ValueError(f"There is no folder {str(folder)!r}")
    if not path.is_file():
        raise ValueError(f"{str(folder)!r} holds no config.json: expected the folder of a saved model")
    config = read_json(path)
    quantization = config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config")
    if not isinstance(quantization, dict):
        raise ValueError(
            f"{path} has no quantization_config: this is a float model. Quantize it: hf-onebit quantize MODEL -o DIR"
        )
    if quantization.get("quant_method") != "onebit":
        raise ValueError(
            f"{path} has quant_method {quantization.get('quant_method')!r}: hf_onebit {__version__} reads 'onebit'"
        )
    return config, OneBitConfig.from_dict(quantization)


def weight_files(folder: str | os.PathLike[str]) -> list[Path]:
    """The safetensors files that make up a checkpoint, checked against its index where it has one.

    Raises:
        ValueError: there are none, or the index names a file that is not there, or one outside of the folder.
    """
    folder = Path(folder)
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():  # Transformers, too, prefers it to an index beside it
        return [single]
    if not index.is_file():
        raise ValueError(f"{str(folder)!r} holds no model.safetensors: copy or download the checkpoint again")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise ValueError(f"{index} has no usable weight_map: copy or download it again")
    names = sorted(set(weight_map.values()))
    for name in names:
        if os.path.basename(name) != name:
            raise ValueError(
                f"{index} names the file {name!r}, which is outside of the checkpoint's folder: do not trust it"
            )
        if not (folder / name).is_file():
            raise ValueError(f"{index} names {name!r}, which is not there: copy or download that file again")
    return [folder / name for name in names]


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
    problems += [
        f"{key} in {info.file} is a packed weight of a layer that the config's table of modules does not name"
        for key, info in headers.items()
        if key not in expected and _looks_packed(key, info, headers)
    ]
    extra_planes = [k for k in headers if k not in expected and k.endswith(".weight_1") and f"{k[:-2]}" in expected]
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
                f"{name} is packed according to config.json, but the files hold no scales {name}.a and {name}.b "
                f"for it: "
                "copy or download the checkpoint again, or quantize the model again"
            )
        shapes[name] = (b.shape[0], a.shape[0], int(entry["planes"]))
    return shapes


def verify(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Check a checkpoint folder: config, headers, shapes, finite scales, clean padding, and checksums where it has
    them.

    Args:
        folder: a local checkpoint.

    Returns:
        {"ok": bool, "checksums": "match" | "mismatch" | "none", "tensors": int, "problems": [str]}. Nothing is raised
        for what is wrong inside the folder: every problem is listed.

    Raises:
        ValueError: ``folder`` is no folder.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"There is no folder {str(folder)!r} to verify")
    problems: list[str] = []
    tensors = 0
    checksums = "none"
    try:
        side = read_side_file(folder)
        if side is not None:
            mismatches = _check_files(Path(folder), side)
            checksums = "mismatch" if mismatches else "match"
            problems += mismatches
        _, config = read_config(folder)
        if not config.modules:
            problems.append(
                "config.json has no table of packed modules: the checkpoint was edited. Copy or download it again"
            )
        files = weight_files(folder)
        headers = read_headers(files)
        tensors = len(headers)
        shapes = packed_shapes(config, headers)
        check_packed_headers(headers, shapes)
        problems += _check_values(Path(folder), shapes, headers)
    except ValueError as error:
        problems.append(str(error))
    return {"ok": not problems, "checksums": checksums, "tensors": tensors, "problems": problems}


def _check_files(folder: Path, side: Mapping[str, Any]) -> list[str]:
    problems = []
    recorded_tensors = side.get("tensors") or {}
    files = side.get("files") or {}
    if not isinstance(files, dict) or not isinstance(recorded_tensors, dict):
        return [f"{SIDE_FILE} holds no usable checksums: it was edited. Copy or download it again"]
    for name, recorded in files.items():
        path = folder / os.path.basename(name)
        if not isinstance(recorded, dict) or not {"bytes", "sha256"} <= recorded.keys():
            problems.append(f"{SIDE_FILE} holds no usable checksum of {name}: it was edited. Copy or download it again")
            continue
        if not path.is_file():
            problems.append(f"{name} is missing: it was saved with {recorded['bytes']} bytes")
        elif path.stat().st_size != recorded["bytes"]:
            problems.append(f"{name} has {path.stat().st_size} bytes: it was saved with {recorded['bytes']}")
        elif sha256_of_file(path) != recorded["sha256"]:
            problems.append(f"{name} was changed after it was saved{_changed_tensors(path, recorded_tensors)}")
    return problems


def _changed_tensors(path: Path, recorded: Mapping[str, str]) -> str:
    if path.suffix != ".safetensors":
        return ""
    try:
        changed = [name for name, tensor in _tensors(path) if recorded.get(name) != sha256_of_tensor(tensor)]
    except SafetensorError as error:
        return f": its header is damaged ({error})"
    return f": tensors {', '.join(changed[:8])}" if changed else ": its header differs, its tensors do not"


def _check_values(
    folder: Path, shapes: Mapping[str, tuple[int, int, int]], headers: Mapping[str, TensorInfo]
) -> list[str]:
    problems = []
    for name, (in_features, out_features, planes) in shapes.items():
        tensors = {}
        for tensor in fmt.tensor_specs(in_features, out_features, planes):
            key = f"{name}.{tensor}"
            with safe_open(folder / headers[key].file, framework="pt") as file:
                tensors[tensor] = file.get_tensor(key)
        try:
            fmt.validate_tensors(tensors, in_features, out_features, planes, name)
        except ValueError as error:
            problems.append(str(error))
    packed = {f"{name}.{t}" for name, (i, o, p) in shapes.items() for t in fmt.tensor_specs(i, o, p)}
    for file in sorted({info.file for info in headers.values()}):
        for key, value in _tensors(folder / file):
            if key not in packed and value.is_floating_point() and not bool(torch.isfinite(value).all()):
                problems.append(f"{key} in {file} holds NaN or inf")
    return problems
