"""A model as a stack of blocks: where it is, on what device, and one run of the whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_onebit.arithmetic import without_slow_products
from hf_onebit.calibration import Batch


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList] | None:
    """The stack of decoder or encoder blocks: the ``ModuleList`` of alike modules with the most parameters.

    Of multimodal models, the language part's.

    Returns:
        (name, blocks), or None where a model has no such list, or more than one stack (encoder-decoder models).
    """
    stacks: list[tuple[str, nn.ModuleList]] = []
    for name, module in model.named_modules():
        inside_another = any(name.startswith(other + ".") for other, _ in stacks)
        alike = isinstance(module, nn.ModuleList) and len(module) > 0 and len({type(block) for block in module}) == 1
        if alike and not inside_another:
            assert isinstance(module, nn.ModuleList)
            stacks.append((name, module))
    size = {name: sum(p.numel() for p in stack.parameters()) for name, stack in stacks}
    large = [(name, stack) for name, stack in stacks if size[name] * 5 > max(size.values())]
    if len(large) > 1:
        text = _language_part(model)
        large = [(name, stack) for name, stack in large if text is not None and name.startswith(f"{text}.")]
    return large[0] if len(large) == 1 else None


def _language_part(model: nn.Module) -> str | None:
    """Name of the part of a multimodal model that reads text; None of any other model."""
    config: Any = getattr(model, "config", None)
    composite = hasattr(config, "get_text_config") and config.get_text_config() is not config
    get: Any = getattr(model, "get_decoder", None)
    if not composite or getattr(config, "is_encoder_decoder", False) or get is None:
        return None
    part = get()
    return next((name for name, module in model.named_modules() if name and module is part), None)


def one_stack(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """``find_blocks`` where a preset cannot do without.

    Raises:
        ValueError: the model has no single stack of blocks.
    """
    found = find_blocks(model)
    if found is None:
        raise ValueError(
            f"{type(model).__name__} has no single stack of blocks to walk through (it has an encoder and a decoder, "
            "or several of one size): use preset='closed' for it (--preset closed), which takes text too"
        )
    return found


def in_features_of(module: nn.Module) -> int:
    """Inputs of a linear layer."""
    # GPT-2's Conv1D keeps (in, out) under other names.
    weight = module.weight
    assert isinstance(weight, Tensor)
    return int(getattr(module, "in_features", weight.shape[0]))


def device_of(model: nn.Module) -> torch.device:
    """Where a model's weights are, or those of them that are anywhere (streaming/disk_model.py)."""
    return next(p.device for p in model.parameters() if not p.is_meta)


def run_model(model: nn.Module, batch: Batch) -> Any:
    """The model's output for one sequence, without a key/value cache; an encoder-decoder reads it on both sides."""
    device = device_of(model)
    inputs = {key: value.to(device) for key, value in batch.items()}
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) and "decoder_input_ids" not in inputs:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    if hasattr(getattr(model, "config", None), "use_cache"):
        inputs["use_cache"] = False  # type: ignore[assignment]
    with without_slow_products(device):
        return model(**inputs)
