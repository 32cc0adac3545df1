"""Operations of Transformers' loader: float weights to packed tensors, statistics of few bits to scales and zeros."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor
from transformers.core_model_loading import ConversionOps

from hf_onebit.formats.table import TableEntry
from hf_onebit.nn.replace import module_shape


class LoadingQuantizer(Protocol):
    """What the operations ask of the quantizer that the loader works for."""

    entries: dict[str, TableEntry]

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether this float parameter becomes packed tensors."""
        ...

    def quantize_parameter(self, model: Any, name: str, weight: Tensor) -> dict[str, Tensor]:
        """Packed tensors of one module by full parameter name."""
        ...

    def trim_memory(self) -> None:
        """Called after each operation."""
        ...


class ExpandStatistics(ConversionOps):
    """Loader operation: the stored statistics of one layer in, its scales and zeros out (formats/double_quant.py)."""

    def __init__(self, hf_quantizer: LoadingQuantizer) -> None:
        self.hf_quantizer = hf_quantizer  # Transformers leaves dtypes alone where an operation has this attribute

    def convert(  # type: ignore[override]  # by keyword only, as the loader calls it
        self, input_dict: dict[str, Any], *, model: Any = None, full_layer_name: str = "", **kwargs: Any
    ) -> dict[str, Any]:
        """{".qscales": [tensor], ...} -> {"<layer>.scales": tensor, "<layer>.zeros": tensor}."""
        name = full_layer_name.rpartition(".")[0]
        shape = module_shape(model.get_submodule(name))
        assert shape is not None
        stored = {key.rpartition(".")[2]: value[0] for key, value in input_dict.items()}
        entry = self.hf_quantizer.entries[name]
        expanded = entry.from_stored(stored, shape.in_features, shape.out_features, name)
        return {f"{name}.{key}": value for key, value in expanded.items()}


class QuantizeOnLoad(ConversionOps):
    """Loader operation: float weights in, packed tensors out."""

    def __init__(self, hf_quantizer: LoadingQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(  # type: ignore[override]  # by keyword only, as the loader calls it
        self, input_dict: dict[str, Any], *, model: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """{"<layer>.weight": tensor or [tensor]} -> the same, with packed tensors for each packed layer's weight."""
        result: dict[str, Any] = {}
        for key in list(input_dict):
            value = input_dict.pop(key)
            module_name = key.rpartition(".")[0]
            if self.hf_quantizer.param_needs_quantization(model, key):
                weight = value[0] if isinstance(value, list) else value
                result |= self.hf_quantizer.quantize_parameter(model, module_name, weight)
            else:
                result[key] = value
        self.hf_quantizer.trim_memory()
        return result
