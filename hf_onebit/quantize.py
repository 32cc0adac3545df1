"""``OneBitQuantizer``: the conductor of quantizer.py with the steps of sign matrices with scales."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hf_onebit.arithmetic import autocast_dtype
from hf_onebit.bits.budget import Budget, choose_planes, plan_budget
from hf_onebit.bits.sensitivity import closed_fit, measure_sensitivity, sign_fit
from hf_onebit.calibration import CalibrationData
from hf_onebit.config import OneBitConfig
from hf_onebit.nn.replace import LayerPlan
from hf_onebit.progress import Progress
from hf_onebit.quantization.weights import quantize_weight
from hf_onebit.quantizer import Quantizer
from hf_onebit.rungs.blocks import device_of
from hf_onebit.rungs.recipes import RECIPES, Recipe


class OneBitQuantizer(Quantizer):
    """Quantizes a loaded model, with calibration data or without; shaped like Optimum's quantizers.

    >>> quantizer = OneBitQuantizer(OneBitConfig(preset="fast", dataset="calibration.txt"))
    >>> quantizer.quantize_model(model, tokenizer)  # doctest: +SKIP
    >>> quantizer.save(model, "model-onebit", tokenizer=tokenizer)  # doctest: +SKIP

    Args:
        config: how to quantize; None for the defaults.
        **options: fields of ``OneBitConfig`` in place of ``config``.

    Attributes:
        report: after quantization, a JSON-ready dict: a record for every packed layer, every skipped layer with its
            reason, coverage, bits per weight, sizes, time, memory, calibration data and versions.

    Raises:
        ValueError: options are not valid, or both ``config`` and options are given.
    """

    config_class = OneBitConfig
    recipes = RECIPES

    def _budget(self, model: nn.Module, plan: LayerPlan) -> Budget | None:
        return plan_budget(model, plan, self.config)

    def _allocate(
        self, model: nn.Module, plan: LayerPlan, budget: Budget, data: CalibrationData | None
    ) -> dict[str, Any]:
        config = self.config
        assert data is not None  # require_text refused
        closed = closed_fit(config.use_importance_scaling, **config.algorithm_options())
        with Progress(len(budget.options), "Measuring sensitivity") as progress:
            sensitivity = measure_sensitivity(
                model,
                list(budget.options),
                data.batches,
                sign_fit() if config.preset in self.recipes else closed,
                seed=config.seed,
                arithmetic=autocast_dtype(device_of(model)),
                done=progress.step,
            )
        return choose_planes(budget, model, sensitivity)[1]

    def _settle(self, model: nn.Module, plan: LayerPlan, allocation: dict[str, Any]) -> None:
        plan.planes = {name: layer["planes"] for name, layer in allocation["layers"].items()}

    def _quantize_layer(
        self, weight: Tensor, name: str, plan: LayerPlan, hessian: Tensor | None
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return quantize_weight(weight, self.config, name, plan.planes[name], hessian)

    def _method(self, plan: LayerPlan, recipe: Recipe) -> dict[str, Any]:
        return {"planes": plan.planes, "rounds": recipe.rounds, "keep_margins": recipe.sign_rate > 0}
