"""A stand-in for vLLM: as much of its interface as a quantization plug-in meets, on the CPU and in one process.

Written from vLLM's documentation of plug-ins and of custom quantization; it computes nothing by itself. Layers have its
names, sizes and order of calls: the config is asked for a method, the method makes parameters, the loader brings each
tensor of a file to the ``weight_loader`` of the parameter of that name, with the shard's name for fused layers, and
then every method may process what was loaded. Ranks are simulated: ``install(rank, ranks)`` says which one this is.
"""

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

STACKED = {"q_proj": ("qkv_proj", "q"), "k_proj": ("qkv_proj", "k"), "v_proj": ("qkv_proj", "v")}
STACKED |= {"gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1)}
MAPPING = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


class QuantizationConfig(ABC):
    def __init__(self) -> None:
        self.packed_modules_mapping: dict[str, list[str]] = {}

    @abstractmethod
    def get_name(self) -> str: ...

    @abstractmethod
    def get_supported_act_dtypes(self) -> list[torch.dtype]: ...

    @classmethod
    @abstractmethod
    def get_min_capability(cls) -> int: ...

    @staticmethod
    @abstractmethod
    def get_config_filenames() -> list[str]: ...

    @classmethod
    @abstractmethod
    def from_config(cls, config: dict[str, Any]) -> "QuantizationConfig": ...

    @abstractmethod
    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any: ...


class LinearMethodBase(ABC):
    @abstractmethod
    def create_weights(self, layer: nn.Module, *sizes: Any, **more: Any) -> None: ...

    @abstractmethod
    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor: ...

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        return


class UnquantizedLinearMethod(LinearMethodBase):
    def create_weights(self, layer: Any, inputs: int, outputs: list[int], *_: Any, **more: Any) -> None:
        layer.weight = nn.Parameter(torch.empty(sum(outputs), inputs), requires_grad=False)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return nn.functional.linear(x, layer.weight, bias)


class LinearBase(nn.Module):
    """A linear layer of which this rank holds ``inputs`` and ``outputs``; with ``bias`` it has one."""

    rank, ranks = 0, 1
    tells_rank = True  # older versions keep it to themselves

    def __init__(self, config: Any, prefix: str, whole: tuple[int, int], inputs: int, outputs: list[int],
                 bias: bool, dtype: torch.dtype) -> None:  # fmt: skip
        super().__init__()
        self.output_partition_sizes = outputs
        if self.tells_rank:
            self.tp_rank, self.tp_size = LinearBase.rank, LinearBase.ranks
        self.quant_method = config.get_quant_method(self, prefix=prefix)
        assert self.quant_method is not None, "every linear layer has a method"
        self.quant_method.create_weights(
            self, inputs, outputs, whole[0], whole[1], dtype, weight_loader=self.weight_loader
        )
        own = nn.Parameter(torch.zeros(sum(outputs), dtype=dtype), requires_grad=False)
        self.register_parameter("bias", own if bias else None)

    def weight_loader(self, parameter: nn.Parameter, tensor: Tensor, shard: Any = None) -> None:
        raise AssertionError("packed parameters have loaders of their own")

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.quant_method.apply(self, x, self.bias)
        return result


class VocabParallelEmbedding(nn.Module):
    pass


def column(config: Any, prefix: str, inputs: int, outputs: list[int], bias: bool = False,
           kv_heads: int | None = None, dtype: torch.dtype = torch.float32) -> LinearBase:  # fmt: skip
    """Outputs shared by the ranks, those of each module by themselves; ``kv_heads`` heads of k and v at the most."""
    ranks = LinearBase.ranks
    shares = [ranks, *([min(ranks, kv_heads)] * (len(outputs) - 1))] if kv_heads else [ranks] * len(outputs)
    here = [size // share for size, share in zip(outputs, shares, strict=True)]
    return LinearBase(config, prefix, (inputs, sum(here) * ranks), inputs, here, bias, dtype)


def row(config: Any, prefix: str, inputs: int, outputs: int, bias: bool = False,
        dtype: torch.dtype = torch.float32) -> LinearBase:  # fmt: skip
    """Inputs shared by the ranks."""
    return LinearBase(config, prefix, (inputs, outputs), inputs // LinearBase.ranks, [outputs], bias, dtype)


def load(layers: dict[str, LinearBase], tensors: Iterable[tuple[str, Tensor]], stacked: Any = STACKED) -> None:
    """Bring tensors to the layers that have them, as the models' loaders do; then let every method finish."""
    parameters = {f"{name}.{key}": p for name, layer in layers.items() for key, p in layer.named_parameters()}
    for name, tensor in tensors:
        module, _, key = name.rpartition(".")
        parent, _, last = module.rpartition(".")
        if last in stacked and f"{parent}.{stacked[last][0]}.{key}" in parameters:
            parameter = parameters[f"{parent}.{stacked[last][0]}.{key}"]
            parameter.weight_loader(parameter, tensor, stacked[last][1])
        elif name in parameters:
            parameters[name].weight_loader(parameters[name], tensor)
    for layer in layers.values():
        layer.quant_method.process_weights_after_loading(layer)


def install(monkeypatch: pytest.MonkeyPatch, rank: int = 0, ranks: int = 1, without: str = "") -> SimpleNamespace:
    """Put it in place of vLLM until the test ends.

    Args:
        monkeypatch: the test's.
        rank, ranks: what the layers are told.
        without: a name that this version lacks.

    Returns:
        ``configs``, what was registered by name, and ``platform``.
    """
    monkeypatch.setattr(LinearBase, "rank", rank)
    monkeypatch.setattr(LinearBase, "ranks", ranks)
    configs: dict[str, type] = {}
    methods = ["awq", "gptq"]

    def register_quantization_config(name: str) -> Any:
        def keep(cls: type) -> type:
            if name in methods:
                raise ValueError(f"{name} is there already")
            assert issubclass(cls, QuantizationConfig)
            methods.append(name)
            configs[name] = cls
            return cls

        return keep

    platform = SimpleNamespace(supported_quantization=["awq"])
    base = "vllm.model_executor.layers"
    modules: dict[str, dict[str, Any]] = {
        "vllm": {"__version__": "0.0.stand-in"},
        "vllm.platforms": {"current_platform": platform},
        "vllm.distributed": {
            "get_tensor_model_parallel_rank": lambda: rank,
            "get_tensor_model_parallel_world_size": lambda: ranks,
        },
        "vllm.model_executor": {},
        base: {},
        f"{base}.quantization": {
            "QUANTIZATION_METHODS": methods,
            "register_quantization_config": register_quantization_config,
        },
        f"{base}.quantization.base_config": {"QuantizationConfig": QuantizationConfig},
        f"{base}.linear": {
            "LinearBase": LinearBase,
            "LinearMethodBase": LinearMethodBase,
            "UnquantizedLinearMethod": UnquantizedLinearMethod,
        },
        f"{base}.vocab_parallel_embedding": {"VocabParallelEmbedding": VocabParallelEmbedding},
    }
    for name, contents in modules.items():
        module = ModuleType(name)
        module.__dict__.update({key: value for key, value in contents.items() if key != without})
        module.__path__ = []
        monkeypatch.setitem(sys.modules, name, module)
    return SimpleNamespace(configs=configs, platform=platform)
