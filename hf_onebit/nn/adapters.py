"""Whether a model has adapters, asked without PEFT."""

from __future__ import annotations

from torch import nn

__all__ = ["adapted_modules"]


def adapted_modules(model: nn.Module) -> list[str]:
    """Names of the modules that PEFT has put adapters around, packed or float; of the model itself where PEFT is that.

    A layer with an adapter holds the layer that it adapts, and gives it by ``get_base_layer``; a ``PeftModel`` gives
    its model by ``get_base_model``.
    """
    marks = ("get_base_layer", "get_base_model")
    return [
        name or type(model).__name__
        for name, module in model.named_modules()
        if any(callable(getattr(module, mark, None)) for mark in marks)
    ]
