"""``MPQQuantizer``: the conductor of quantize.py with the steps of group quantization."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hf_onebit.group_fitting import GroupMethod
from hf_onebit.mpq_config import MPQConfig
from hf_onebit.nn.replace import LayerPlan
from hf_onebit.quantize import Quantizer
from hf_onebit.recipes import MPQ_RECIPES, Recipe
from hf_onebit.weights import quantize_group_weight


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

    def _quantize_layer(
        self, weight: Tensor, name: str, plan: LayerPlan, hessian: Tensor | None
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return quantize_group_weight(weight, plan.entries[name], name, hessian, self.config.search)

    def _method(self, plan: LayerPlan, recipe: Recipe) -> dict[str, Any]:
        return {"method": GroupMethod(plan.entries, recipe.rounds, recipe.block is not None, recipe.sign_rate > 0)}
