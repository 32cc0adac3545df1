"""Is a checkpoint folder whole: config, headers, values and checksums."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

import torch
from safetensors import safe_open

from hf_onebit.digests import sha256_of_file, sha256_of_tensor
from hf_onebit.storage.checkpoint import (
    SIDE_FILE,
    read_config,
    read_side_file,
    tensors_of,
    weight_files,
)
from hf_onebit.storage.headers import PackedShape, TensorInfo, check_packed_headers, packed_shapes, read_headers


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
    except ValueError as error:
        problems.append(str(error))
    try:
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
        if _leads_outside(name):
            problems.append(
                f"{SIDE_FILE} names the file {name!r}, which is outside of the checkpoint's folder: do not trust it"
            )
            continue
        path = folder / name
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


def _leads_outside(name: str) -> bool:
    """Whether a relative path is none, or goes up; by the rules of Windows, which know every separator."""
    path = PureWindowsPath(name)
    return bool(path.anchor) or ".." in path.parts


def _changed_tensors(path: Path, recorded: Mapping[str, str]) -> str:
    if path.suffix != ".safetensors":
        return ""
    try:
        changed = [name for name, tensor in tensors_of(path) if recorded.get(name) != sha256_of_tensor(tensor)]
    except ValueError as error:
        return f": {error}"
    return f": tensors {', '.join(changed[:8])}" if changed else ": its header differs, its tensors do not"


def _check_values(folder: Path, shapes: Mapping[str, PackedShape], headers: Mapping[str, TensorInfo]) -> list[str]:
    problems = []
    packed = set()
    for name, shape in shapes.items():
        keys = {tensor: f"{name}.{tensor}" for tensor in shape.tensor_specs()}
        if shape.entry.tied_to is not None and keys["weight"] not in headers:
            continue  # its tensors are another module's
        packed |= set(keys.values())
        tensors = {}
        for tensor, key in keys.items():
            with safe_open(folder / headers[key].file, framework="pt") as file:
                tensors[tensor] = file.get_tensor(key)
        try:
            sizes = shape.in_features, shape.out_features
            shape.entry.validate_tensors(shape.entry.from_stored(tensors, *sizes, name), *sizes, name)
        except ValueError as error:
            problems.append(str(error))
    for file in sorted({info.file for info in headers.values()}):
        for key, value in tensors_of(folder / file):
            if key not in packed and value.is_floating_point() and not bool(torch.isfinite(value).all()):
                problems.append(f"{key} in {file} holds NaN or inf")
    return problems
