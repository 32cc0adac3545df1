"""What is known of a model before its weights are read: where it is, its config, its class, its origin."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


def check_source(source: str | os.PathLike[str]) -> None:
    """Make sure that there is a model, without reading it.

    Raises:
        ValueError, OSError: there is none; see ``read_model_config``.
    """
    if not is_gguf(source):
        read_model_config(source)
    elif not os.path.isfile(source):
        raise ValueError(f"There is no file {os.fspath(source)!r}: pass the path of a .gguf file")


def check_apart(source: str, save_dir: str | os.PathLike[str]) -> None:
    """Refuse to save over the float model that is being read: what replaces it cannot give it back.

    Raises:
        ValueError: naming both.
    """
    if os.path.exists(source) and Path(source).resolve().is_relative_to(Path(save_dir).resolve()):
        raise ValueError(
            f"Will not save to {os.fspath(save_dir)!r}: it holds the float model {source!r}, which would be lost. Pass "
            "another folder"
        )


def read_model_config(source: str | os.PathLike[str], **options: Any) -> Any:
    """Transformers' config of a model.

    Args:
        source: a folder or a hub id.
        **options: revision, token and the like.

    Raises:
        ValueError: there is no such folder, or its config has values of the wrong type.
        OSError: there is no such model on the hub, or no hub.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(existing(os.fspath(source)), **options)
    except StrictDataclassError as error:
        raise ValueError(f"The config.json of {source!r} does not fit its model: {error}. Copy it again") from error
    except OSError as error:
        if why := _no_such_model(source, error):
            raise OSError(why) from error
        raise


def _no_such_model(source: str | os.PathLike[str], error: BaseException) -> str | None:
    """One line for a name that is neither a folder nor a model that the hub gives; None for other errors."""
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    causes: list[BaseException] = []
    found: BaseException | None = error
    while found is not None and found not in causes:
        causes.append(found)
        found = found.__cause__ or found.__context__
    if os.path.isdir(source) or any(isinstance(cause, GatedRepoError) for cause in causes):
        return None
    line = f"There is no model {os.fspath(source)!r}: no local folder has that name, and the hub"
    if any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
        return f"{line} has no model of that name, or none for this account"
    if any(isinstance(cause, (LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError)) for cause in causes):
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        return f"{line} cannot be reached{offline}, nor is it in the hub's local cache"
    return None


def processor_files(source: str | os.PathLike[str]) -> list[Path]:
    """What images, sounds and videos are prepared by, of a model in a folder or on the hub: files that are there."""
    from transformers.utils import cached_file

    if is_gguf(source):
        return []
    if os.path.isdir(source):
        return [file for name in _PROCESSOR_FILES if (file := Path(source) / name).is_file()]
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    found = [cached_file(os.fspath(source), name, **quiet) for name in _PROCESSOR_FILES]
    return [Path(file) for file in found if file is not None]


def empty_model(source: str | os.PathLike[str]) -> Any:
    """The float model of a folder or hub id without its weights, on the meta device.

    Raises:
        ValueError: as ``load_float``.
    """
    config = read_model_config(source)
    if getattr(config, "quantization_config", None) is not None:
        method = method_of(config.quantization_config)
        raise ValueError(f"{str(source)!r} is quantized already (quant_method {method!r}): expected a float model")
    cls = model_class(config)
    with torch.device("meta"):
        make = getattr(cls, "from_config", None) or cls._from_config
        return make(config, dtype=getattr(config, "dtype", None) or torch.float32).eval()


def skeleton(folder: str | os.PathLike[str]) -> nn.Module | None:
    """The float model on the meta device, from the config alone; None where Transformers has no such architecture."""
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
    cls = model_class(config)
    with torch.device("meta"):
        model = cls._from_config(config) if hasattr(cls, "_from_config") else cls.from_config(config)
    assert isinstance(model, nn.Module)
    return model


def model_class(config: Any) -> Any:
    """The class that saved the model, if Transformers has it (never code from a checkpoint); else a causal LM."""
    import transformers

    for name in getattr(config, "architectures", None) or ():
        cls = getattr(transformers, name, None)
        if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel):
            return cls
    return transformers.AutoModelForCausalLM


def writes_text(config: Any) -> bool:
    """Whether a model predicts the next token from those before it alone, so that it has a perplexity."""
    can_generate = getattr(model_class(config), "can_generate", lambda: True)  # a class of no model is a causal LM's
    return bool(can_generate()) and not config.is_encoder_decoder


def is_gguf(source: str | os.PathLike[str]) -> bool:
    """Whether this names a .gguf file."""
    return os.fspath(source).endswith(".gguf")


def provenance_of(source: str | os.PathLike[str]) -> dict[str, Any]:
    """What can be known of a float model's origin.

    Returns:
        base_model (its id on the hub, None for local ones), source (the id, or the last part of a local path), and
        base_model_license (where a model card beside it states one).
    """
    source = os.fspath(source)
    local = os.path.exists(source)
    return {
        "base_model": None if local else source,
        "source": os.path.basename(os.path.normpath(source)) if local else source,
        "base_model_license": _license(source),
    }


def _license(source: str) -> str | None:
    card = Path(source) / "README.md"
    if not card.is_file():
        return None
    from huggingface_hub import ModelCard

    try:
        license_name = ModelCard.load(card).data.license
    except ValueError:
        return None
    return license_name if isinstance(license_name, str) else None


def existing(source: str) -> str:
    """The source itself, where it is a model folder or may be a hub id.

    Raises:
        ValueError: it is neither.
    """
    looks_local = source.startswith((".", os.sep, "~")) or source.count("/") > 1
    if os.path.isdir(source):
        if not (Path(source) / "config.json").is_file():
            raise ValueError(f"{source!r} holds no config.json: expected the folder of a saved model")
    elif os.path.exists(source):
        raise ValueError(f"{source!r} is a file: expected a model folder, a hub id, or a .gguf file")
    elif looks_local:
        raise ValueError(f"There is no folder {source!r}")
    return source


def method_of(quantization: Any) -> Any:
    """The method that a quantization config names, as an object or as JSON; None where it names none."""
    return (
        quantization.get("quant_method")
        if isinstance(quantization, dict)
        else getattr(quantization, "quant_method", None)
    )
