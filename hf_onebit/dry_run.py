"""What quantizing would do, said before anything runs: the plan of the layers, time, memory and disk."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from typing import Any

from torch import nn

from hf_onebit import loading, sources
from hf_onebit.bits.auto_bits import ask_again
from hf_onebit.calibration import CalibrationData
from hf_onebit.choices import name_of
from hf_onebit.conducting.calibrating import calibration_of, writing_of
from hf_onebit.conducting.low_memory import streamed_recipe, streamed_source
from hf_onebit.disk_space import free_space
from hf_onebit.nn.experts import join_experts
from hf_onebit.nn.replace import module_shape
from hf_onebit.preflight.estimates import estimate, estimate_loading, estimate_streamed, stand_in
from hf_onebit.preflight.timing import closed_seconds
from hf_onebit.quantization.planning import plan_float_model, plan_layers, require_text
from hf_onebit.quantization.records import mean_bits
from hf_onebit.quantizer import Quantizer


def dry_run(
    quantizer: Quantizer, save_dir: str | os.PathLike[str] | None = None, *, tokenizer: Any = None
) -> dict[str, Any]:
    """The plan of ``quantizer.quantize(save_dir)``, with nothing quantized and nothing written.

    Automatic bits are measured for it, on the calibration text, as the run itself would; text that the model would have
    to write first is not written, and the plan then is that of weights alone.

    Args:
        quantizer: bound to a model (``from_pretrained``).
        save_dir: where the free space is looked up; None for the working directory.
        tokenizer: as of ``quantize``.

    Returns:
        A JSON-ready dict: ``layers`` {name: in_features, out_features, choice, bits_per_weight} and ``heads`` likewise,
        ``skipped``, ``coverage``, ``linear_bpw``, ``allocation`` (as in the report), ``preflight`` (as in the report),
        ``calibration``, ``free_disk_bytes``, and ``notes``, sentences for a reader.

    Raises:
        ValueError: as ``quantize`` would, where that can be told before.
    """
    try:
        return _planned(quantizer, save_dir, tokenizer)
    finally:
        if quantizer._model is not None:
            join_experts(quantizer._model)  # planning separates them


def _planned(quantizer: Quantizer, save_dir: str | os.PathLike[str] | None, tokenizer: Any) -> dict[str, Any]:
    config, notes = quantizer.config, []
    place = save_dir if save_dir is not None else "."
    ask_again(config)  # an earlier run has settled its "auto"
    by_block = streams = False
    model = quantizer._model
    if model is None:
        if quantizer.source is None:
            raise ValueError(
                f"This quantizer is bound to no model: make it with {type(quantizer).__name__}.from_pretrained"
            )
        tokenizer = tokenizer if tokenizer is not None else loading.load_tokenizer(quantizer.source)
        by_block = streamed_source(quantizer, quantizer.source, quantizer._ranks) is not None
        streams = by_block or (not config.whole and not sources.is_gguf(quantizer.source))
        model = sources.empty_model(quantizer.source) if streams else loading.load_float(quantizer.source)
    plan = plan_layers(model, config) if streams else plan_float_model(model, config)
    require_text(config)
    budget = quantizer._budget(model, plan)
    data = writing = None
    if config.calibrates and not config.writes_itself:
        data = calibration_of(quantizer, model, tokenizer)
    elif config.writes_itself:
        writing = writing_of(quantizer, model, tokenizer)
        notes.append(
            "The calibration text that the model wrote is in the cache."
            if writing is None
            else f"The model writes {config.tokens_wanted} tokens of calibration text first, once for all runs."
        )
    allocation, measuring = None, 0.0
    if budget is not None:
        if data is None and not config.chooses_bits:
            notes.append(
                "Which layers get a second plane is measured on that text: here each has what it has at the least."
            )
        else:
            start = time.perf_counter()
            allocation = quantizer._allocate(model, plan, budget, data)
            quantizer._settle(model, plan, allocation)
            measuring = time.perf_counter() - start
            if config.writes_itself:
                notes.append("Bits are by the errors of weights alone here; the run itself measures them on that text.")
    recipe = quantizer.recipes.get(config.preset)
    found = data
    if found is None and config.calibrates:
        found = stand_in(model, config)
    if by_block:
        recipe = None if recipe is None else streamed_recipe(recipe)
        expected = estimate_streamed(model, plan, found, recipe, place)
        notes.append("The model is read block by block, with one block in memory at a time.")
        if recipe is not None:
            notes.append("Distillation, which takes the whole model twice, is left out.")
    elif config.whole:
        expected = estimate(model, plan, found or CalibrationData([], "", 0, ""), recipe, place, config.spill)
    else:
        expected = estimate_loading(model, plan)
    if writing is not None:
        expected = expected.with_writing(*writing)
    seconds, disk_bytes = expected.seconds, expected.disk_bytes
    if recipe is None:
        seconds = closed_seconds(model, plan, None if by_block else data, quantizer._quantize_layer)
    if seconds is not None:
        seconds += measuring + (0.0 if writing is None or recipe is not None else writing.seconds)
    if allocation is not None and allocation["target"] == "size":
        disk_bytes = allocation["planned"]
    free = free_space(place)
    expected = replace(expected, seconds=seconds, disk_bytes=disk_bytes, free_disk_bytes=free)
    notes += expected.warnings()
    layers = {name: _row(model, name, plan.entry(name)) for name in plan.selected}
    heads = {name: _row(model, name, entry) for name, entry in plan.heads.entries.items()}
    return {
        "dry_run": True,
        "method": config.quant_method,
        "preset": config.preset,
        "layers": layers,
        "heads": heads,
        "skipped": {name: {"reason": s.reason, "weights": s.weights} for name, s in plan.skipped.items()},
        "coverage": plan.coverage,
        "linear_bpw": mean_bits(layers) or 0.0,
        "allocation": allocation,
        "calibration": None if data is None else {"source": data.source, "tokens": data.tokens, "sha256": data.sha256},
        "preflight": expected.to_dict(),
        "free_disk_bytes": free,
        "notes": notes,
    }


def _row(model: nn.Module, name: str, entry: Any) -> dict[str, Any]:
    module = model.get_submodule(name)
    shape = module_shape(module)
    assert shape is not None
    bias = getattr(module, "bias", None)
    bias_bits = 0 if bias is None else 8 * bias.element_size()
    return {
        "in_features": shape.in_features,
        "out_features": shape.out_features,
        "choice": name_of(entry),
        "bits_per_weight": entry.bits_per_weight(shape.in_features, shape.out_features, bias_bits),
    }
