"""Whether a model is quantized block by block from its files, and what is left of a recipe where it is."""

from __future__ import annotations

import os
from dataclasses import replace

from hf_onebit import loading, sources
from hf_onebit.conducting.method import QuantizationMethod
from hf_onebit.config import PackingConfig
from hf_onebit.preflight.estimates import estimate_whole
from hf_onebit.progress import logger
from hf_onebit.quantization.planning import plan_layers
from hf_onebit.ranks import Ranks
from hf_onebit.rungs.recipes import Recipe


def obstacles(config: PackingConfig) -> str | None:
    """Why a quantization cannot go block by block, or None where it can."""
    if config.writes_itself:
        return (
            "the model would write the calibration text itself, which takes all of it in memory: pass a text "
            "(dataset=FILE, --calibration FILE)"
        )
    if config.target_bpw is not None or config.target_size is not None or config.chooses_bits:
        return (
            "a target is shared out by measuring the whole model: name the bits yourself (bits=, planes_per_layer=; "
            "--bits, --planes-per-layer), without target_bpw, target_size and bits='auto' (--target-bpw, "
            "--target-size, --bits auto)"
        )
    return None


def require_streamable(config: PackingConfig) -> None:
    """Refuse ``low_memory=True`` beside what takes the whole model.

    Raises:
        ValueError: naming what does, and the remedies.
    """
    if config.low_memory and (why := obstacles(config)):
        raise ValueError(
            f"low_memory is True, but {why}; or quantize the model whole: low_memory=False (--no-low-memory)"
        )


def streamed_recipe(recipe: Recipe) -> Recipe:
    """What is left of a recipe where only one block is in memory: the walk, without distillation and flips."""
    return replace(recipe, steps=0, sign_rate=0.0, flip_rounds=0)


def streamed_source(method: QuantizationMethod, source: str, ranks: Ranks) -> str | None:
    """The folder to read block by block, or None: the model is quantized whole.

    Args:
        source: a folder, a hub id or a .gguf file.
        ranks: the processes, of which the first one decides.

    Raises:
        ValueError: ``low_memory=True``, and something takes the whole model.
    """
    config = method.config
    if config.low_memory is False:
        return None
    if sources.is_gguf(source):
        if config.low_memory:
            raise ValueError(
                f"{source!r} cannot be read block by block: expected safetensors files. Save it as such once, with "
                "save_pretrained, or leave low_memory (--low-memory) out"
            )
        return None
    if config.low_memory is None:
        why = obstacles(config)
        model = sources.empty_model(source)
        plan = plan_layers(model, config, warn=False)
        expected = ranks.value_of_first(estimate_whole(model, plan, config, method.recipes))
        if expected is None:
            return None
        if why:
            logger.warning(f"{expected} It would go block by block (low_memory), but {why}")
            return None
        logger.warning(f"{expected} It goes block by block, with one block in memory at a time")
    else:
        require_streamable(config)
    return source if os.path.isdir(source) else loading.fetched(source)
