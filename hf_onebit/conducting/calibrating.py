"""The calibration data of a run: made for the model, held against it, and the same in all processes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from hf_onebit import loading
from hf_onebit.calibration import CalibrationData, load_calibration, mixed
from hf_onebit.conducting.fingerprints import run_options
from hf_onebit.conducting.method import QuantizationMethod
from hf_onebit.config import PackingConfig
from hf_onebit.nn.roles import embedding_sizes
from hf_onebit.progress import logger
from hf_onebit.quantization.planning import require_reader, require_text, warn_of_noise
from hf_onebit.ranks import Ranks
from hf_onebit.rungs.blocks import one_stack
from hf_onebit.texts.self_cache import self_calibration, to_be_written
from hf_onebit.texts.self_time import Writing, estimate_writing


def shared_calibration(
    method: QuantizationMethod,
    model: nn.Module,
    tokenizer: Any,
    sharing: Ranks,
    starts: Callable[[Writing], None] | None = None,
) -> CalibrationData | None:
    """The calibration data of the first process on all of them.

    Args:
        starts: as of ``calibration_of``, in the first process.

    Raises:
        ValueError: they were not started alike.
    """
    data = sharing.alone(lambda: calibration_of(method, model, tokenizer, starts))
    if sharing.size == 1:
        return data
    mine = {
        "model": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "options": json.loads(json.dumps(run_options(method.config), default=str)),
    }
    for rank, theirs in enumerate(sharing.gather(mine)):
        if different := [f"{key} {theirs[key]} / {mine[key]}" for key in mine if theirs[key] != mine[key]]:
            raise ValueError(
                f"Processes {rank} and {sharing.rank} are to quantize different things: {'; '.join(different)}. "
                "Start all of them alike"
            )
    own = [] if data is None else data.batches
    source, tokens, sha256 = sharing.value_of_first(
        ("", 0, "") if data is None else (data.source, data.tokens, data.sha256)
    )
    count = sharing.value_of_first(len(own))
    found = sharing.tensors_of_first({f"{i}.{key}": t for i, batch in enumerate(own) for key, t in batch.items()})
    batches: list[dict[str, Tensor]] = [{} for _ in range(count)]
    for name, tensor in found.items():
        index, _, key = name.partition(".")
        batches[int(index)][key] = tensor
    return CalibrationData(batches, source, tokens, sha256)


def calibration_of(
    method: QuantizationMethod,
    model: nn.Module,
    tokenizer: Any,
    starts: Callable[[Writing], None] | None = None,
) -> CalibrationData | None:
    """What the config names, as the model reads it; None where it calibrates on nothing.

    Args:
        starts: called with what it will take before the model writes the text itself, if it does.

    Raises:
        ValueError: a target is set without a text, the model reads no text or has no token embedding, or the text does
            not fit it.
    """
    config = method.config
    if not config.calibrates:
        require_text(config)
        warn_of_noise(config)
        return None
    require_reader(model)
    rows = _vocabulary(model)
    if config.preset in method.recipes:
        one_stack(model)  # before minutes of writing for nothing
    positions = _positions(model)
    tokenizer = tokenizer if tokenizer is not None else config.tokenizer
    wanted = _wanted(config, positions)
    if config.writes_itself:
        own = _tokenizer_of(model, tokenizer)

        def about_to_write(tokens: int, longest: int) -> None:
            if starts is not None:
                starts(estimate_writing(model, own, tokens, longest=longest, seed=config.seed))

        data = self_calibration(model, own, **wanted, starts=about_to_write)
    else:
        data = load_calibration(config.dataset, _tokenizer_of(model, tokenizer), **wanted)
        _warn_of_few(config, data, wanted["context"])
        if config.preset in method.recipes:
            data = mixed(data, config.seed)
    _check_fits(model, data, rows, positions)
    return data


def writing_of(method: QuantizationMethod, model: nn.Module, tokenizer: Any) -> Writing | None:
    """What it will take the model to write its own calibration text; None where that is in the cache.

    Raises:
        ValueError: the model cannot write.
    """
    config = method.config
    own = _tokenizer_of(model, tokenizer if tokenizer is not None else config.tokenizer)
    missing = to_be_written(model, own, **_wanted(config, _positions(model)))
    return None if missing is None else estimate_writing(model, own, missing[0], longest=missing[1], seed=config.seed)


def _wanted(config: PackingConfig, positions: int | None) -> dict[str, int]:
    """How much text, in which pieces."""
    context = min(config.calibration_context, positions or config.calibration_context)
    return {"max_tokens": config.tokens_wanted, "context": context, "seed": config.seed}


def _warn_of_few(config: PackingConfig, data: CalibrationData, context: int) -> None:
    """Say where there is less text than was asked for, or much less than the preset is made for."""
    asked, wanted = config.calibration_tokens is not None, config.tokens_wanted
    # Of a long text whole sequences are taken.
    least = wanted // min(context, wanted) * min(context, wanted) if asked else 0.9 * wanted
    if data.whole and data.tokens < least:
        by = "were asked for" if asked else f"are what preset {config.preset!r} is made for"
        logger.warning(
            f"The calibration text ({data.source}) gives {data.tokens} tokens, and {wanted} {by}: all of them are used "
            "(calibration_tokens=, --calibration-tokens)"
        )


def _tokenizer_of(model: Any, tokenizer: Any) -> Any:
    """A tokenizer given as an object or by name, else the one beside the model's files, or None."""
    if tokenizer is None:
        source = getattr(model.config, "_name_or_path", "")
        return loading.load_tokenizer(source) if source else None
    return loading.load_tokenizer(tokenizer) if isinstance(tokenizer, (str, os.PathLike)) else tokenizer


def _positions(model: Any) -> int | None:
    """The longest sequence a model was made for, where its config tells."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 1 else None


def _vocabulary(model: nn.Module) -> int:
    """How many token ids a model knows.

    Raises:
        ValueError: it has no token embedding.
    """
    rows, _ = embedding_sizes(model)
    if not rows:
        raise ValueError(
            f"{type(model).__name__} has no token embedding, and calibration data is text: quantize it without data "
            "(preset='closed' and dataset=None; --preset closed)"
        )
    return rows


def _check_fits(model: nn.Module, data: CalibrationData, rows: int, positions: int | None) -> None:
    """Refuse token ids and lengths without an embedding, which deep inside the model are an IndexError or worse."""
    for index, batch in enumerate(data.batches):
        ids = batch["input_ids"]
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= rows:
            raise ValueError(
                f"Calibration sequence {index} holds the token id {low if low < 0 else high}, and "
                f"{type(model).__name__} knows the ids 0 to {rows - 1}: pass the tokenizer that belongs to this model"
            )
        if positions is not None and ids.shape[1] > positions:
            raise ValueError(
                f"Calibration sequence {index} has {ids.shape[1]} tokens, and {type(model).__name__} takes {positions} "
                "(max_position_embeddings): cut the rows, or pass text"
            )
