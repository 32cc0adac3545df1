"""What a quantization method is to those who conduct it: a config, and its steps for a plan and for a layer."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from hf_onebit.calibration import CalibrationData
from hf_onebit.config import PackingConfig
from hf_onebit.nn.replace import LayerPlan
from hf_onebit.rungs.recipes import Recipe

if TYPE_CHECKING:
    from typing_extensions import Self  # typing has it from Python 3.11 on


class QuantizationMethod:
    """A method with its config; ``Quantizer`` conducts it, in memory or block by block.

    Args:
        config: how to quantize; None for the defaults.
        **options: fields of the config in place of ``config``.

    Raises:
        ValueError: options are not valid, or both ``config`` and options are given.
    """

    config_class: type[PackingConfig]
    recipes: Mapping[str, Recipe]
    config: Any

    def __init__(self, config: PackingConfig | None = None, **options: Any) -> None:
        own, wanted = type(self).__name__, self.config_class.__name__
        if config is not None and options:
            raise ValueError(f"{own} got a config and also {sorted(options)}: put them into the config")
        if config is not None and not isinstance(config, self.config_class):
            got, expected = (f"{'an' if n.startswith('M') else 'a'} {n}" for n in (type(config).__name__, wanted))
            raise ValueError(f"{own} got {got}: expected {expected} (for a dict: from_dict)")
        self.config = copy.copy(config) if config is not None else self.config_class(**options)
        self.config.validate()  # a field may have been changed since

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any]) -> Self:
        """The quantizer that ``to_dict`` described."""
        return cls(cls.config_class.from_dict(dict(config_dict)))

    def to_dict(self) -> dict[str, Any]:
        """The config as JSON types (without dataset and tokenizer)."""
        return self.config.to_dict()

    def _budget(self, model: nn.Module, plan: LayerPlan) -> Any:
        """What a target leaves to the layers; None without one."""
        raise NotImplementedError

    def _allocate(self, model: nn.Module, plan: LayerPlan, budget: Any, data: CalibrationData | None) -> dict[str, Any]:
        """The JSON-ready record of what each layer gets within the budget."""
        raise NotImplementedError

    def _settle(self, model: nn.Module, plan: LayerPlan, allocation: dict[str, Any]) -> None:
        """Put such a record into the plan."""
        raise NotImplementedError

    def _quantize_layer(
        self, weight: Tensor, name: str, plan: LayerPlan, hessian: Tensor | None
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """One selected layer without the ladder: packed tensors and its record."""
        raise NotImplementedError

    def _method(self, plan: LayerPlan, recipe: Recipe) -> dict[str, Any]:
        """How ``quantize_on_prefix`` fits layers."""
        raise NotImplementedError
