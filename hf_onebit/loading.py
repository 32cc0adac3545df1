"""Getting models in: packed checkpoints through our own door, float ones from a folder, a hub id or a .gguf file."""

from __future__ import annotations

import contextlib
import os
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_onebit.argument_checks import path_of
from hf_onebit.counts import counted
from hf_onebit.mpq_config import CONFIGS, config_from_dict
from hf_onebit.nn.replace import module_shape
from hf_onebit.nn.roles import find_module
from hf_onebit.sources import check_source, existing, is_gguf, method_of, model_class, read_model_config
from hf_onebit.storage import checkpoint
from hf_onebit.storage.headers import packed_shapes, read_headers

_METHODS = " or ".join(map(repr, CONFIGS))
_HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "subfolder")


def load(
    path: str | os.PathLike[str],
    *,
    dequantize: bool = False,
    fuse_projections: bool = False,
    dtype: torch.dtype | str | None = None,
    **kwargs: Any,
) -> Any:
    """Load a packed checkpoint with the model class its config names.

    A checkpoint of GPTQ, bitorch or OneComp is converted first, in a temporary folder that takes as much room as the
    packed model; ``hf-onebit import`` converts it once and for all.

    ``AutoModelForCausalLM.from_pretrained`` and the like do the same for their task; this door also checks a local
    folder's files first, so that a truncated or edited checkpoint is named before Transformers meets it.

    Args:
        path: a local folder or a hub id.
        dequantize: load into float layers instead.
        fuse_projections: compute layers that read the same tensor, q/k/v and gate/up, in one call; results and files
            stay as they are (``hf_onebit.nn.fuse_projections``).
        dtype: dtype of everything that is not packed; the checkpoint's own when None.
        **kwargs: passed on to ``from_pretrained`` (device_map, attn_implementation, ...).

    Raises:
        TypeError: the path is none.
        ValueError: no such folder, not a packed checkpoint, or a damaged one; or both switches are on.
    """
    from hf_onebit.interchange import importing  # it reads packed folders, and so imports this file

    older = kwargs.pop("torch_dtype", None)  # its older name
    dtype = dtype or older
    if dequantize and fuse_projections:
        raise ValueError(
            "dequantize=True leaves no packed layers that fuse_projections=True could fuse: drop one of the two"
        )
    path = path_of("load", "path", path)
    if os.path.isdir(path):
        if subfolder := kwargs.pop("subfolder", None):
            path = os.path.join(path, subfolder)
        if importing.is_foreign(path):
            return _load_foreign(path, dequantize, fuse_projections, dtype, **kwargs)
        checkpoint.read_config(path)
        if kwargs.get("variant") is None:  # names its files in its own way
            read_headers(checkpoint.weight_files(path))
    config = read_model_config(path, **_hub_options(kwargs))
    quantization = getattr(config, "quantization_config", None)
    if isinstance(quantization, dict) and importing.is_foreign_config(quantization):
        options = _hub_options(kwargs)
        return _load_foreign(fetched(path, **options), dequantize, fuse_projections, dtype, **kwargs)
    if not isinstance(quantization, dict) or quantization.get("quant_method") not in CONFIGS:
        raise ValueError(f"{path!r} is no packed checkpoint: its config has no quantization_config of {_METHODS}")
    config_from_dict(quantization, path)
    if dequantize:
        quantization["dequantize"] = True
    if fuse_projections:
        quantization["fuse_projections"] = True
    wants_info = kwargs.pop("output_loading_info", False)
    model, info = model_class(config).from_pretrained(
        path, config=config, dtype=dtype or "auto", output_loading_info=True, **kwargs
    )
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(
            f"{path!r} lacks {counted(len(missing), 'tensor')} of {type(model).__name__} (the first is {missing[0]}), "
            "which would be random: it was edited or is incomplete. Copy or download it again, or quantize the model "
            "again"
        )
    return (model, info) if wants_info else model


def _load_foreign(
    path: str, dequantize: bool, fuse_projections: bool, dtype: torch.dtype | str | None, **kwargs: Any
) -> Any:
    """Another program's checkpoint, through a packed one that is gone when this returns."""
    from hf_onebit.interchange import importing

    kwargs = {key: value for key, value in kwargs.items() if key not in _HUB_OPTIONS}
    with tempfile.TemporaryDirectory(prefix="hf_onebit-", ignore_cleanup_errors=True) as place:
        folder = os.path.join(place, "model")
        importing.import_checkpoint(path, folder)
        loaded = load(folder, dequantize=dequantize, fuse_projections=fuse_projections, dtype=dtype, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if any(parameter.is_meta for parameter in model.parameters()):
            raise ValueError(
                f"{path!r} does not fit in memory with this device_map, and what is offloaded would be read from a "
                f"temporary folder that is gone by then: expected it to fit. Import it once, then load DIR: hf-onebit "
                f"import {path} -o DIR"
            )
    model.config._name_or_path = model.name_or_path = os.path.normpath(path)
    return loaded


def fetched(repository: str, **options: Any) -> str:
    """The local folder of a model on the hub, its pickles left there."""
    from huggingface_hub import snapshot_download

    subfolder = options.pop("subfolder", None) or ""
    patterns = [
        "*.json",
        "*.safetensors",
        "*.txt",
        "*.model",
        "*.tiktoken",
        "*.jinja",
        "LICENSE*",
        "NOTICE*",
        "README.md",
    ]
    patterns = [os.path.join(subfolder, pattern) for pattern in patterns]
    folder: str = snapshot_download(repository, allow_patterns=patterns, **options)
    return os.path.join(folder, subfolder) if subfolder else folder


def load_float(source: str | os.PathLike[str], *, dtype: torch.dtype | str = "auto", **kwargs: Any) -> Any:
    """Load a float model from a folder, a hub id, or a .gguf file (dequantized to float32).

    Args:
        source: where it is.
        dtype: dtype to load in.
        **kwargs: passed on to ``from_pretrained``; with ``quantization_config`` the model is quantized while it loads.

    Raises:
        ValueError: there is no such folder or file, or the model is quantized already.
    """
    source = os.fspath(source)
    if is_gguf(source):
        return _load_gguf(source, torch.float32 if dtype == "auto" else dtype, **kwargs)
    config = read_model_config(source, **_hub_options(kwargs))
    if getattr(config, "quantization_config", None) is not None:
        method = method_of(config.quantization_config)
        raise ValueError(f"{source!r} is quantized already (quant_method {method!r}): expected a float model")
    return model_class(config).from_pretrained(source, config=config, dtype=dtype, **kwargs)


def load_any(source: str | os.PathLike[str], *, dtype: torch.dtype | str = "auto") -> Any:
    """Load a model for evaluation, packed or float."""
    source = os.fspath(source)
    if is_packed_folder(source):
        return load(source, dtype=None if dtype == "auto" else dtype)
    if is_gguf(source):
        return load_float(source, dtype=dtype)
    config = read_model_config(source)
    return model_class(config).from_pretrained(source, config=config, dtype=dtype)


def load_tokenizer(source: str | os.PathLike[str]) -> Any:
    """The tokenizer beside a model, or None where there is none."""
    from transformers import AutoTokenizer

    source = os.fspath(source)
    try:
        if is_gguf(source):
            folder, file = os.path.split(source)
            with _reading_gguf(source):
                return AutoTokenizer.from_pretrained(folder or ".", gguf_file=file)
        return AutoTokenizer.from_pretrained(existing(source))
    except (OSError, KeyError, TypeError):
        return None
    except ValueError as error:
        # Transformers says so when a folder simply has no tokenizer files.
        if "tokenizer" in str(error).lower():
            return None
        raise


def is_packed_folder(source: str | os.PathLike[str]) -> bool:
    """Whether this is a local folder that holds a packed checkpoint.

    Raises:
        ValueError: it is one, but its config is not readable.
    """
    config = Path(source) / "config.json"
    if not config.is_file():
        return False
    if method_of(checkpoint.read_json(config).get("quantization_config")) not in CONFIGS:
        return False
    checkpoint.read_config(source)
    return True


def _load_gguf(source: str, dtype: Any, **kwargs: Any) -> Any:
    import transformers

    folder, file = os.path.split(source)
    check_source(source)
    try:
        import gguf  # noqa: F401  Transformers reads such files with this package
    except ImportError as error:
        raise ImportError("Reading a .gguf file needs the gguf package: pip install 'hf_onebit[gguf]'") from error
    gguf_config = getattr(transformers, "GgufConfig", None)
    if gguf_config is not None:  # newer Transformers keep the blocks packed unless told
        kwargs.setdefault("quantization_config", gguf_config(dequantize=True))
    folder = folder or "."
    with _reading_gguf(source):
        config = transformers.AutoConfig.from_pretrained(folder, gguf_file=file)
        model = model_class(config).from_pretrained(folder, gguf_file=file, dtype=dtype, **kwargs)
    # The weights are float now; what some releases of Transformers leave on the model says otherwise.
    for owner, name in ((model.config, "quantization_config"), (model, "hf_quantizer")):
        if name in vars(owner):
            delattr(owner, name)
    model.is_quantized = False
    return model


@contextlib.contextmanager
def _reading_gguf(source: str) -> Iterator[None]:
    """Name the file in what its reader raises, which is whatever the first missing byte leads to."""
    try:
        yield
    except (struct.error, IndexError, ValueError) as error:
        raise ValueError(f"Cannot read {source!r} ({error}): if it is incomplete, copy or download it again") from error


def _hub_options(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: kwargs[name] for name in _HUB_OPTIONS if name in kwargs}


def load_quantized_model(
    model: nn.Module,
    save_folder: str | os.PathLike[str],
    *,
    device_map: Any = None,
    dtype: torch.dtype | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Load a packed checkpoint into a model of the same architecture, as Optimum's function of this name does.

    Args:
        model: a model built from the same config, empty (on the meta device) or not; its weights are not used.
        save_folder: the packed checkpoint.
        device_map, dtype, **kwargs: as for ``from_pretrained`` (max_memory, offload_folder, ...).

    Returns:
        A packed model of ``type(model)``.

    Raises:
        ValueError: the folder is no packed checkpoint, is damaged, or is another architecture's.
    """
    _, config = checkpoint.read_config(save_folder)
    headers = read_headers(checkpoint.weight_files(save_folder))
    absent = [name for name in config.modules or {} if find_module(model, name) is None]
    if absent:
        raise ValueError(
            f"{type(model).__name__} has no module {absent[0]!r} ({len(absent)} of {len(config.modules or {})} packed "
            f"layers of {str(save_folder)!r} are not in it): build the model from the checkpoint's own config.json"
        )
    for name, stored in packed_shapes(config, headers).items():
        # Files may name a module otherwise than the model does: there, from_pretrained compares.
        module = find_module(model, name)
        shape = None if module is None else module_shape(module)
        sizes = stored.in_features, stored.out_features
        if shape is not None and (shape.in_features, shape.out_features) != sizes:
            raise ValueError(
                f"{name} is {shape.out_features}x{shape.in_features} in this {type(model).__name__} and "
                f"{stored.out_features}x{stored.in_features} in {str(save_folder)!r}: build the model from the "
                "checkpoint's own config.json"
            )
    cls: Any = type(model)
    loaded: nn.Module = cls.from_pretrained(Path(save_folder), device_map=device_map, dtype=dtype, **kwargs)
    return loaded
