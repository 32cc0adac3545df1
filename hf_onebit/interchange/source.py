"""The folder of a checkpoint that another program wrote: its configs, headers, and one tensor at a time."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from hf_onebit.storage.checkpoint import read_json, weight_files
from hf_onebit.storage.headers import TensorInfo, read_headers

# Files that unpickle: reading one may run code.
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_INDEX = "*.safetensors.index.json"


@dataclass
class ForeignFolder:
    """A checkpoint folder, opened by :func:`open_folder`.

    Attributes:
        path: the folder.
        config: its config.json.
        quantization: what config.json, or quantize_config.json beside it, says of the quantization; {} if nothing.
        headers: {tensor name: where it is, its dtype and shape}.
    """

    path: Path
    config: dict[str, Any]
    quantization: dict[str, Any]
    headers: dict[str, TensorInfo]
    _opened: dict[str, Any] = field(default_factory=dict, repr=False)

    def read(self, name: str) -> Tensor:
        """One tensor; the caller's own, nothing of it is kept here."""
        file = self.headers[name].file
        if file not in self._opened:
            # One file at a time: the pages of a mapped file count as memory for as long as it is open.
            self._opened.clear()
            self._opened[file] = safe_open(self.path / file, framework="pt")
        tensor: Tensor = self._opened[file].get_tensor(name).clone()
        return tensor

    def owners(self, marker: str) -> list[str]:
        """Names of the modules that have a tensor ``marker``, in the order of the files."""
        end = f".{marker}"
        return [key.removesuffix(end) for key in self.headers if key.endswith(end)]

    def parts(self, owner: str, names: Iterable[str]) -> dict[str, TensorInfo]:
        """Headers of those of a module's tensors that are there, by their short names."""
        return {name: self.headers[f"{owner}.{name}"] for name in names if f"{owner}.{name}" in self.headers}


def open_folder(path: str | os.PathLike[str]) -> ForeignFolder:
    """Read a folder's configs and headers; no weights.

    Raises:
        ValueError: there is no such folder, no config.json or no safetensors files in it, or a file is damaged.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"There is no folder {str(path)!r}: pass the folder of a saved model")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{str(path)!r} holds no config.json: expected the folder of a saved model")
    config = read_json(folder / "config.json")
    files = _weight_files(folder)
    return ForeignFolder(folder, config, quantization_of(folder, config), read_headers(files))


def quantization_of(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """What a folder says of its quantization: in config.json, else in auto-gptq's quantize_config.json."""
    said = config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config")
    if isinstance(said, dict):
        return said
    beside = folder / "quantize_config.json"
    return {"quant_method": "gptq"} | read_json(beside) if beside.is_file() else {}


def _weight_files(folder: Path) -> list[Path]:
    if any(folder.glob("model.safetensors")) or any(folder.glob("model.safetensors.index.json")):
        return weight_files(folder)
    # auto-gptq names its file after the bits, as in gptq_model-4bit-128g.safetensors.
    files, indices = sorted(folder.glob("*.safetensors")), sorted(folder.glob(_INDEX))
    if len(files) == 1 or (files and indices):
        return files
    if files:
        raise ValueError(
            f"{str(folder)!r} holds {len(files)} safetensors files and no index that says which belong together: got "
            f"{files[0].name}, {files[1].name}, ...; expected one, or model.safetensors.index.json. Keep one of them"
        )
    pickled = sorted(file.name for pattern in _PICKLED for file in folder.glob(pattern))
    if pickled:
        raise ValueError(
            f"{str(folder)!r} holds its weights as {pickled[0]}, a pickle, which can run any code when it is read: "
            "expected .safetensors files. Load it with the program that wrote it, on a machine that may run such code, "
            "and save it again with safe serialization (save_pretrained(DIR, safe_serialization=True))"
        )
    raise ValueError(f"{str(folder)!r} holds no .safetensors file: copy or download the checkpoint again")
