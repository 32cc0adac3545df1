"""Every layer of a plan packed, with data or without, while the model stays as it was."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from hf_onebit.arithmetic import autocast_dtype
from hf_onebit.calibration import CalibrationData
from hf_onebit.conducting.method import QuantizationMethod
from hf_onebit.modes import evaluating
from hf_onebit.nn.replace import LayerPlan, float_weight
from hf_onebit.progress import Progress
from hf_onebit.quantization.resume import WorkFolder
from hf_onebit.quantization.weights import quantize_group_weight
from hf_onebit.ranks import Ranks
from hf_onebit.rungs.blocks import device_of
from hf_onebit.rungs.ladder import quantize_on_prefix
from hf_onebit.rungs.sequences import prefix_batches
from hf_onebit.rungs.walk import walk


@dataclass
class Packing:
    """Layers packed but not yet in the model.

    Attributes:
        tensors: {layer: packed tensors}.
        records: {layer: what the report says of it}.
        vectors: {parameter: new value} of gains and biases.
        margins: see ``PrefixResult``.
        fit: choices and errors on the way, for the report; None for the closed form.
        output_errors: whose inputs the records' output errors were taken on, for the report; None without data.
    """

    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    vectors: dict[str, Tensor] = field(default_factory=dict)
    margins: dict[str, Tensor] = field(default_factory=dict)
    fit: dict[str, Any] | None = None
    output_errors: dict[str, Any] | None = None


def pack_layers(
    method: QuantizationMethod,
    model: nn.Module,
    plan: LayerPlan,
    data: CalibrationData | None,
    sharing: Ranks,
    work: WorkFolder | None = None,
) -> Packing:
    """Every selected layer packed; the model stays as it was."""
    packing = Packing()
    packed, records = packing.tensors, packing.records
    recipe = method.recipes.get(method.config.preset)
    heads = plan.heads
    spill = None
    if method.config.spill:
        spill = Path(tempfile.gettempdir()) if work is None else work.folder
    # The embedding's inputs are ids, which say nothing of its columns: none of them matters more than another.
    watched = [name for name in heads.entries if name == heads.head]
    with Progress(len(plan.selected) + len(heads.entries), "Quantizing") as progress:

        def visit(_block: str, statistics: Mapping[str, Tensor | None]) -> None:
            for name, hessian in statistics.items():
                weight = float_weight(model.get_submodule(name))
                if name in heads.entries:
                    packed[name], records[name] = quantize_group_weight(weight, heads.entries[name], name, hessian)
                else:
                    packed[name], records[name] = method._quantize_layer(weight, name, plan, hessian)
                progress.step(name, err=_shown_error(records[name]))

        with evaluating(model):
            if data is None:
                visit("", dict.fromkeys([*plan.selected, *heads.entries]))
            elif recipe is not None:
                fitted = quantize_on_prefix(
                    model,
                    list(plan.selected),
                    prefix_batches(data.batches, recipe),
                    block=recipe.block,
                    arithmetic=autocast_dtype(device_of(model)),
                    done=lambda name, record: progress.step(name, err=_shown_error(record)),
                    work=work,
                    spill=spill,
                    ranks=sharing,
                    **method._method(plan, recipe),
                )
                packed |= fitted.packed
                records |= fitted.records
                packing.vectors, packing.margins = fitted.vectors, fitted.margins
                for record in fitted.records.values():  # on the prefix as it was then; measured again at the end
                    record["prefix_output_error"] = record["relative_output_error"]
                packing.fit = fitted.fit_report(records)
                sharing.alone(lambda: visit("", dict.fromkeys(heads.entries)))
            else:
                head = next(iter(watched), None)
                starved = walk(model, list(plan.selected), data.batches, visit, head=head, spill=spill, ranks=sharing)
                for name, tokens in starved.items():
                    records[name]["starved_tokens"] = tokens
                packing.output_errors = {"inputs": "float model", "tokens": data.tokens}
                rest = dict.fromkeys(name for name in heads.entries if name not in packed)
                sharing.alone(lambda: visit("", rest))
    if not sharing.is_first:
        return packing
    if heads.tied and heads.head is not None and heads.embedding is not None:
        packed[heads.embedding] = packed[heads.head]  # the same matrix: the head's inputs weighed its columns
        records[heads.embedding] = {**records[heads.head], "seconds": 0.0}
    order = [*plan.selected, *heads.entries]
    packing.tensors = {name: packed[name] for name in order}
    packing.records = {name: records[name] for name in order}
    return packing


def _shown_error(record: Mapping[str, Any]) -> str:
    error = (
        record["relative_output_error"]
        if record["relative_output_error"] is not None
        else record["relative_weight_error"]
    )
    return "0" if error is None else f"{error:.3f}"
