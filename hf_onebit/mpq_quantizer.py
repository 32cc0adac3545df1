"""``MPQQuantizer``: the conductor of quantizer.py with the steps of group quantization."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hf_onebit.bits.auto_bits import AutoBudget, choose, plan_auto, settle_plan
from hf_onebit.bits.auto_sensitivity import costs_of_weights, costs_on_text
from hf_onebit.bits.selection import choose_by_trial
from hf_onebit.bits.trials import PackedChoices, split
from hf_onebit.calibration import CalibrationData
from hf_onebit.config import OneBitConfig
from hf_onebit.mpq_config import MPQConfig
from hf_onebit.nn.replace import LayerPlan
from hf_onebit.progress import Progress
from hf_onebit.quantization.weights import quantize_group_weight, quantize_weight
from hf_onebit.quantizer import Quantizer
from hf_onebit.rungs.group_fitting import GroupMethod
from hf_onebit.rungs.mixed_fitting import MixedMethod
from hf_onebit.rungs.recipes import MPQ_RECIPES, Recipe


class MPQQuantizer(Quantizer):
    """Quantizes a loaded model in groups of inputs, with calibration data or without; shaped like Optimum's quantizers.

    >>> quantizer = MPQQuantizer(MPQConfig(bits=3, preset="fast", dataset="calibration.txt"))
    >>> quantizer.quantize_model(model, tokenizer)  # doctest: +SKIP
    >>> quantizer.save(model, "model-mpq", tokenizer=tokenizer)  # doctest: +SKIP

    Args:
        config: how to quantize; None for the defaults.
        **options: fields of ``MPQConfig`` in place of ``config``.

    Attributes:
        report: as of ``OneBitQuantizer``.

    Raises:
        ValueError: options are not valid, or both ``config`` and options are given.
    """

    config_class = MPQConfig
    recipes = MPQ_RECIPES

    def _budget(self, model: nn.Module, plan: LayerPlan) -> AutoBudget | None:
        if not self.config.chooses_bits:
            return None
        return plan_auto(model, plan, self.config, closed=self.config.preset not in self.recipes)

    def _allocate(
        self, model: nn.Module, plan: LayerPlan, budget: AutoBudget, data: CalibrationData | None
    ) -> dict[str, Any]:
        about = model, budget.names, budget.packed, budget.fit
        consistent = self.config.consistent_groups
        with Progress(len(budget.names) + len(budget.packed.entries), "Measuring sensitivity") as progress:
            if data is None:
                measured = costs_of_weights(*about, done=progress.step)
            else:
                measured = costs_on_text(*about, data.batches, seed=self.config.seed, done=progress.step)
        if data is None:  # nothing to try plans on
            return choose(budget, model, plan, measured, consistent=consistent)
        fitted, judges = split(data.batches)
        with Progress(2 * len(budget.names), "Trying plans") as progress:
            packed = PackedChoices(model, budget.fit.pack, fitted, progress.step)
            return choose_by_trial(budget, model, plan, measured, packed, judges, consistent=consistent)

    def _settle(self, model: nn.Module, plan: LayerPlan, allocation: dict[str, Any]) -> None:
        settle_plan(plan, allocation, model, self.config)

    def _quantize_layer(
        self, weight: Tensor, name: str, plan: LayerPlan, hessian: Tensor | None
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        entry = plan.entries[name]
        if entry.method == "mpq":
            return quantize_group_weight(weight, entry, name, hessian, self.config.search)
        tensors, record = quantize_weight(weight, OneBitConfig(), name, entry.planes, hessian)
        return tensors, {"method": "onebit", **record}

    def _method(self, plan: LayerPlan, recipe: Recipe) -> dict[str, Any]:
        about = plan.entries, recipe.rounds, recipe.block is not None, recipe.sign_rate > 0
        both = any(entry.method == "onebit" for entry in plan.entries.values())
        return {"method": MixedMethod(*about) if both else GroupMethod(*about)}
