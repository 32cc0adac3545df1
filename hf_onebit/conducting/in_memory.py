"""A plan carried out on a model that is whole in memory: a target shared out, layers packed and put in place."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from torch import nn

from hf_onebit.calibration import CalibrationData
from hf_onebit.conducting.installing import follow, install
from hf_onebit.conducting.method import QuantizationMethod
from hf_onebit.conducting.packing import pack_layers
from hf_onebit.conducting.restoring import restored_on_failure
from hf_onebit.durations import shown_estimate
from hf_onebit.nn.experts import release_experts
from hf_onebit.nn.replace import LayerPlan
from hf_onebit.preflight.estimates import estimate, stand_in, tell
from hf_onebit.preflight.timing import closed_seconds
from hf_onebit.progress import say
from hf_onebit.quantization.planning import attach, packing_table, settle_tie
from hf_onebit.quantization.records import announce, build_report
from hf_onebit.quantization.resume import WorkFolder
from hf_onebit.ranks import Ranks
from hf_onebit.rungs.recipes import Recipe
from hf_onebit.texts.self_time import Writing


def allocated(
    method: QuantizationMethod,
    model: nn.Module,
    plan: LayerPlan,
    budget: Any,
    data: CalibrationData | None,
    sharing: Ranks,
    work: WorkFolder | None = None,
) -> dict[str, Any] | None:
    """What a target gives to each layer, put into the plan: measured, or taken up from an interrupted run."""
    if budget is None:
        return None
    kept = None if work is None else work.load("allocation")
    allocation = sharing.value_of_first(
        sharing.alone(lambda: method._allocate(model, plan, budget, data) if kept is None else kept[1])
    )
    assert allocation is not None
    if work is not None and kept is None:
        work.save("allocation", {}, allocation)
    method._settle(model, plan, allocation)
    return allocation


def pack_in_memory(
    method: QuantizationMethod,
    model: nn.Module,
    plan: LayerPlan,
    data: CalibrationData | None,
    start: float,
    allocation: dict[str, Any] | None,
    sharing: Ranks,
    work: WorkFolder | None = None,
    expected: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Pack the layers of a plan in place and make the model whole for Transformers; the report.

    The float model is back if anything goes wrong.

    Args:
        start: a ``time.perf_counter()``.
        allocation: see ``allocated``.
        expected: what this will take, where that has been said already (``expect_writing``).
    """
    parameters = list(model.parameters())
    float_bytes = sum(p.numel() * p.element_size() for p in parameters)
    total = sum(p.numel() for p in parameters)
    recipe = method.recipes.get(method.config.preset)
    if data is not None:
        spill = method.config.spill
        expected = sharing.alone(lambda: expected or _expect(model, plan, data, recipe, work, spill))
    packing = pack_layers(method, model, plan, data, sharing, work)
    table = packing_table(plan)
    with restored_on_failure(model, method.config):
        # Gains and biases, which packed modules share with the float ones, change in place while distilling.
        sharing.alone(lambda: install(method, model, packing, table, data, work))
        follow(model, table, sharing)
        settle_tie(model, plan, method.config)
        method.config.modules = {name: entry.to_dict() for name, entry in table.items()}
        attach(model, method.config)
        report: dict[str, Any] = {}
        if sharing.is_first:
            report = build_report(method.config, packing.records, plan, model, data, start)
            report |= {"float_bytes": float_bytes, "total_weights": total, "allocation": allocation}
            report |= {"preflight": expected, "fit": packing.fit, "output_errors": packing.output_errors}
            report["seconds"] += 0.0 if work is None else work.spent
            announce(report)
        report = sharing.value_of_first(report)
        release_experts(model)  # last: the float experts are views of what it lets go
    return report


def expect_writing(
    method: QuantizationMethod,
    model: nn.Module,
    plan: LayerPlan,
    budget: Any,
    writing: Writing,
    work_dir: str | os.PathLike[str] | None,
) -> dict[str, Any] | None:
    """Say what all of it will take before the model starts to write its calibration text.

    Args:
        method, model, plan: what is to be done.
        budget: of a target, or None.
        writing: what that takes.
        work_dir: the work folder, if there is one.

    Returns:
        The same for the report; None where a target's bits are chosen by that text, so that the rest is told later.
    """
    if budget is not None:
        say(
            f"Estimate: about {shown_estimate(writing.seconds)} to write the calibration text; then bits are chosen by "
            "it, and the rest is estimated"
        )
        return None
    recipe, data = method.recipes.get(method.config.preset), stand_in(model, method.config)
    expected = estimate(model, plan, data, recipe, work_dir, method.config.spill)
    if recipe is None:
        expected = replace(expected, seconds=closed_seconds(model, plan, data, method._quantize_layer))
    expected = expected.with_writing(*writing)
    tell(expected)
    return expected.to_dict()


def _expect(
    model: nn.Module,
    plan: LayerPlan,
    data: CalibrationData,
    recipe: Recipe | None,
    work: WorkFolder | None,
    spill: bool,
) -> dict[str, Any]:
    """Say what this will take, and warn where it is more than there is; the same for the report."""
    expected = estimate(model, plan, data, recipe, None if work is None else work.folder, spill)
    tell(expected, begun=work is not None and work.kept > 0)
    return expected.to_dict()
