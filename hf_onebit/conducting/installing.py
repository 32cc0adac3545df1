"""Packed layers put in place of the float ones, distilled and measured there; the same in the other processes."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from hf_onebit.arithmetic import product_dtype
from hf_onebit.calibration import CalibrationData
from hf_onebit.casting import cast
from hf_onebit.conducting.method import QuantizationMethod
from hf_onebit.conducting.packing import Packing
from hf_onebit.formats.table import TableEntry
from hf_onebit.modes import evaluating
from hf_onebit.nn.replace import set_packed
from hf_onebit.progress import logger
from hf_onebit.quantization.layer_errors import measure_records
from hf_onebit.quantization.resume import WorkFolder
from hf_onebit.ranks import Ranks
from hf_onebit.rungs.blocks import device_of
from hf_onebit.rungs.recipes import Recipe
from hf_onebit.rungs.upper_rungs import distill_scales


def install(
    method: QuantizationMethod,
    model: nn.Module,
    packing: Packing,
    table: Mapping[str, TableEntry],
    data: CalibrationData | None,
    work: WorkFolder | None,
) -> None:
    """Put packed layers in place, distill and measure them."""
    recipe = method.recipes.get(method.config.preset)
    teacher = None
    if recipe is not None and recipe.steps:
        teacher = cast(copy.deepcopy(model), product_dtype(device_of(model)))
    originals = {name: model.get_submodule(name) for name in packing.tensors}
    for name, tensors in packing.tensors.items():
        set_packed(model, name, tensors, table[name])
    for name, value in packing.vectors.items():
        parameter = model.get_parameter(name)
        parameter.data = value.to(parameter.device)
    if recipe is not None and data is not None and packing.fit is not None:
        if teacher is not None:
            packing.fit["distillation"] = _distill(
                model, teacher, data, recipe, method.config.seed, packing.margins, table, work
            )
        packing.output_errors = measure_records(model, originals, data.batches, packing.records)


def follow(model: nn.Module, table: Mapping[str, TableEntry], sharing: Ranks) -> None:
    """Have the other processes take over what the first one has put in place."""
    if sharing.size == 1:
        return
    found: dict[str, Tensor] = {}
    if sharing.is_first:
        layers = {name: model.get_submodule(name) for name in table}
        found = {f"{n}.{key}": getattr(layers[n], key) for n, e in table.items() for key in e.tensor_names}
        found |= {name: p.data for name, p in model.named_parameters() if p.dim() == 1 and name not in found}
    shared = dict(sharing.tensors_of_first(found))
    if sharing.is_first:
        return
    for name, entry in table.items():
        set_packed(model, name, {key: shared.pop(f"{name}.{key}") for key in entry.tensor_names}, entry)
    for name, value in shared.items():
        parameter = model.get_parameter(name)
        parameter.data = value.to(parameter.device)


def _distill(
    model: nn.Module,
    teacher: nn.Module,
    data: CalibrationData,
    recipe: Recipe,
    seed: int,
    margins: Mapping[str, Tensor],
    table: Mapping[str, TableEntry],
    work: WorkFolder | None,
) -> dict[str, Any] | None:
    """What comes after the ladder's walk, in place; for the report."""

    def judged(entry: dict[str, Any]) -> None:
        kl = "not finite" if entry["kl_heldout"] is None else f"{entry['kl_heldout']:.3g}"
        done = f"{entry['tokens']} tokens" if "tokens" in entry else f"{entry['flips']} signs flipped"
        logger.info(f"Distilling: {done}, held-out KL {kl}")

    with evaluating(model):
        return distill_scales(model, teacher, data.batches, recipe, seed, judged, margins, work, entries=table)
