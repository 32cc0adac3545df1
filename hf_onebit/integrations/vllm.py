"""vLLM: packed checkpoints of both methods as quantization methods of its linear layers.

vLLM calls ``register`` in each of its processes (entry point group ``vllm.general_plugins``); it then takes the method
from a checkpoint's ``config.json``::

    vllm serve ./smol-onebit

Layers compute with the operators of this package: Triton kernels on GPUs, compiled ones on CPUs, plain torch elsewhere.
``HF_ONEBIT_VLLM=dense`` unpacks every layer when it is loaded, as much memory as the float model, for devices or
questions where that helps. What may be served, and what was tested: docs/vllm.md.

Importing this file imports no vLLM: everything that needs it is in functions.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from hf_onebit.formats.table import KEYS, TableEntry
from hf_onebit.integrations.vllm_layers import PackedLayer, Part
from hf_onebit.mpq_config import config_from_dict

VARIABLE = "HF_ONEBIT_VLLM"
# What is taken from vLLM, by module. The parameters' own loaders do the rest, so no class of parameters is needed.
NEEDED: dict[str, tuple[str, ...]] = {
    "vllm.model_executor.layers.quantization": ("QUANTIZATION_METHODS", "register_quantization_config"),
    "vllm.model_executor.layers.quantization.base_config": ("QuantizationConfig",),
    "vllm.model_executor.layers.linear": ("LinearBase", "LinearMethodBase", "UnquantizedLinearMethod"),
    "vllm.model_executor.layers.vocab_parallel_embedding": ("VocabParallelEmbedding",),
    "vllm.distributed": ("get_tensor_model_parallel_rank", "get_tensor_model_parallel_world_size"),
}
# Parts of fused layers, for models that do not say (``packed_modules_mapping``).
_USUAL_PARTS = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
# CUDA devices below are none of vLLM's; where Triton is older than a device needs, plain torch answers.
_MIN_CAPABILITY = 70


def register() -> None:
    """Register both methods with vLLM; again and again does nothing more.

    A vLLM that lacks what this needs gets a warning that says so, since it may serve other models well; checkpoints of
    ours are then refused with the same words.

    Raises:
        ImportError: vLLM is not installed.
    """
    vllm, missing = _interface()
    problem = _problem(missing) if missing else ""
    if problem:
        warnings.warn(problem, RuntimeWarning, stacklevel=2)
    if not hasattr(vllm, "register_quantization_config") or not hasattr(vllm, "QuantizationConfig"):
        return
    _allow_on_platform()
    for method in KEYS:
        if method in getattr(vllm, "QUANTIZATION_METHODS", ()):
            continue
        made = _refusing_config(vllm, method, problem) if problem else _config_class(vllm, method)
        vllm.register_quantization_config(method)(made)


def _interface() -> tuple[SimpleNamespace, list[str]]:
    """What is needed of vLLM, by name; and the names that it lacks."""
    try:
        importlib.import_module("vllm")
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise
        raise ImportError(
            "vLLM is not installed, so hf_onebit has nothing to register with: pip install vllm"
        ) from None
    found, missing = SimpleNamespace(), []
    for module_name, names in NEEDED.items():
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is None or not module_name.startswith(error.name):
                raise  # one of vLLM's own dependencies
            missing += [f"{module_name}.{name}" for name in names]
            continue
        for name in names:
            if hasattr(module, name):
                setattr(found, name, getattr(module, name))
            else:
                missing.append(f"{module_name}.{name}")
    return found, missing


def _problem(missing: Iterable[str]) -> str:
    version = getattr(importlib.import_module("vllm"), "__version__", "of unknown version")
    return (
        f"hf_onebit cannot serve packed checkpoints with vLLM {version}, which lacks {', '.join(missing)}. Install "
        "another version of vLLM (pip install -U vllm), or run the model with Transformers; VLLM_PLUGINS='' keeps vLLM "
        "from loading plug-ins"
    )


def _allow_on_platform() -> None:
    """Some platforms (CPU, ROCm) have a list of the methods they take; newer versions extend it by themselves."""
    try:
        platform = importlib.import_module("vllm.platforms").current_platform
    except (ImportError, AttributeError):
        return  # versions without such lists
    allowed = getattr(platform, "supported_quantization", None)
    if isinstance(allowed, list) and allowed:
        allowed += [method for method in KEYS if method not in allowed]


def _refusing_config(vllm: Any, method: str, problem: str) -> type:
    """A config that tells, for a checkpoint of ours, why it cannot be served."""

    class RefusingConfig(_basics(vllm, method)):  # type: ignore[misc]  # a base that exists at run time
        @classmethod
        def from_config(cls, config: dict[str, Any]) -> Any:
            raise ImportError(problem)

        def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
            raise ImportError(problem)

    return RefusingConfig


def _basics(vllm: Any, method: str) -> type:
    class Basics(vllm.QuantizationConfig):
        def get_name(self) -> str:
            return method

        def get_supported_act_dtypes(self) -> list[torch.dtype]:
            return [torch.float16, torch.bfloat16, torch.float32]

        @classmethod
        def get_min_capability(cls) -> int:
            return _MIN_CAPABILITY

        @staticmethod
        def get_config_filenames() -> list[str]:
            return []  # everything is in config.json

    return Basics


def _config_class(vllm: Any, method: str) -> type:
    """vLLM's quantization config of one of our methods."""
    linear_method = _linear_method(vllm)

    class PackedConfig(_basics(vllm, method)):  # type: ignore[misc]
        """What is packed and how: the table of config.json, by names of vLLM's modules."""

        def __init__(self, table: Mapping[str, TableEntry]) -> None:
            super().__init__()
            self.table = dict(table)

        @classmethod
        def from_config(cls, config: dict[str, Any]) -> PackedConfig:
            return cls(read_table(config))

        def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
            self.table = renamed(self.table, hf_to_vllm_mapper)

        def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
            if isinstance(layer, vllm.LinearBase):
                parts = parts_of(prefix, self.table, getattr(self, "packed_modules_mapping", None) or {})
                return linear_method(parts) if parts else vllm.UnquantizedLinearMethod()
            if isinstance(layer, vllm.VocabParallelEmbedding):
                if prefix in self.table:
                    raise ValueError(_head_message(prefix))
                return None
            inside = next((name for name in self.table if name.startswith(f"{prefix}.")), None)
            if inside is not None:
                raise ValueError(
                    f"{inside} is packed, and vLLM computes it inside of {type(layer).__name__} ({prefix}), which this "
                    "plug-in does not do: experts of mixture-of-experts models must be served with Transformers, or "
                    "quantized with the experts in modules_to_not_convert"
                )
            return None

    return PackedConfig


def _linear_method(vllm: Any) -> Callable[[Mapping[str, TableEntry]], Any]:
    class PackedLinearMethod(vllm.LinearMethodBase):
        """How vLLM makes, fills and computes a linear layer whose modules in the file are packed."""

        def __init__(self, modules: Mapping[str, TableEntry]) -> None:
            self.modules = modules

        def create_weights(
            self,
            layer: nn.Module,
            input_size_per_partition: int,
            output_partition_sizes: list[int],
            input_size: int,
            output_size: int,
            params_dtype: torch.dtype,
            **extra_weight_attrs: Any,
        ) -> None:
            def ranks() -> tuple[int, int]:
                # A layer may be shared by fewer ranks than the model; older versions do not say.
                rank, size = getattr(layer, "tp_rank", None), getattr(layer, "tp_size", None)
                if rank is None or size is None:
                    return vllm.get_tensor_model_parallel_rank(), vllm.get_tensor_model_parallel_world_size()
                return rank, size

            parts = with_sizes(self.modules, output_partition_sizes)
            packed = PackedLayer(parts, input_size, input_size_per_partition, ranks)

            def loader(name: str) -> Callable[..., None]:
                def load(parameter: nn.Parameter, loaded_weight: Tensor, shard_id: str | int | None = None) -> None:
                    packed.load(layer, name, loaded_weight, shard_id)

                return load

            packed.register(layer, loader)
            layer.hf_onebit = packed  # type: ignore[assignment]  # no module, so the layer keeps it as it is
            layer.hf_onebit_dtype = params_dtype  # type: ignore[assignment]

        def process_weights_after_loading(self, layer: nn.Module) -> None:
            packed: Any = layer.hf_onebit
            packed.finish(layer, dense_dtype(layer.hf_onebit_dtype))

        def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
            packed: Any = layer.hf_onebit
            y: Tensor = packed.apply(layer, x, bias)
            return y

    return PackedLinearMethod


# --- what follows needs no vLLM -----------------------------------------------------------------------------------


def dense_dtype(dtype: Any) -> torch.dtype | None:
    """The dtype to unpack layers to, or None to keep them packed, which is what happens unless the variable says so.

    Raises:
        ValueError: the environment variable has a value that means nothing.
    """
    value = os.environ.get(VARIABLE, "").strip().lower()
    if value not in ("", "packed", "dense"):
        raise ValueError(f"{VARIABLE}={value!r}: expected 'packed' (which is the default) or 'dense'")
    return dtype if value == "dense" else None


def read_table(quantization: Mapping[str, Any]) -> dict[str, TableEntry]:
    """The per-module table of a checkpoint's ``quantization_config``.

    Raises:
        ValueError: it is not valid, packs nothing, or packs heads or embeddings.
    """
    config = config_from_dict(quantization, "The model's config.json")
    if not config.modules:
        raise ValueError(
            "The model's config.json names no packed modules: it says how to quantize, and vLLM does not. Quantize it "
            "first: hf-onebit quantize MODEL -o DIR"
        )
    table = {name: TableEntry.from_dict(entry) for name, entry in config.modules.items()}
    embedding = next((name for name, entry in table.items() if entry.kind == "embedding" or entry.tied_to), None)
    if embedding is not None or config.lm_head_bits is not None:
        raise ValueError(_head_message(embedding or "The output head"))
    return table


def _head_message(name: str) -> str:
    return (
        f"{name} is packed, and this plug-in runs packed linear layers, but no packed heads or embeddings: quantize "
        "without lm_head_bits and embedding_bits, or run the model with Transformers"
    )


def renamed(table: Mapping[str, TableEntry], mapper: Any) -> dict[str, TableEntry]:
    """A table by the names of vLLM's modules.

    Args:
        table: by the checkpoint's names.
        mapper: vLLM's ``WeightsMapper`` of the model: ``apply_list`` renames tensors and leaves some out.

    Raises:
        ValueError: two modules would have one name.
    """
    # Fused layers are found by the parts' names.
    mapper = mapper.get_unstacked_mapper() if hasattr(mapper, "get_unstacked_mapper") else mapper
    found: dict[str, TableEntry] = {}
    for name, entry in table.items():
        # As the name of a tensor, which rules that end at a dot need.
        for new in mapper.apply_list([f"{name}.weight"]):
            key = new.removesuffix(".weight")
            if key in found:
                raise ValueError(f"vLLM's names for this model make {key} of {name} and of another packed module")
            found[key] = entry
    return found


def parts_of(
    prefix: str, table: Mapping[str, TableEntry], mapping: Mapping[str, Sequence[str]]
) -> dict[str, TableEntry]:
    """The packed modules that a linear layer of vLLM stands for, in order; none where it stays float.

    Args:
        prefix: the layer's name.
        table: packed modules by name.
        mapping: the model's fused layers, {last part of their name: those of their modules}.

    Raises:
        ValueError: some of its modules are packed and some are not.
    """
    if prefix in table:
        return {prefix: table[prefix]}
    parent, dot, last = prefix.rpartition(".")
    names = [f"{parent}{dot}{part}" for part in mapping.get(last, _USUAL_PARTS.get(last, ()))]
    packed = [name for name in names if name in table]
    if packed and len(packed) < len(names):
        left = [name for name in names if name not in table]
        raise ValueError(
            f"vLLM computes {', '.join(names)} in one layer, of which {', '.join(left)} stayed float: quantize all of "
            "them or none (modules_to_not_convert)"
        )
    return {name: table[name] for name in packed}


def with_sizes(modules: Mapping[str, TableEntry], outputs: Sequence[int]) -> list[Part]:
    """The parts of a layer with what they have of its partitions.

    Args:
        modules: in the order of the partitions.
        outputs: of each partition, on this rank.

    Raises:
        ValueError: there are neither as many of them nor one for all.
    """
    if len(modules) == 1:
        return [Part(name, entry, tuple(outputs)) for name, entry in modules.items()]
    if len(modules) != len(outputs):
        raise ValueError(f"vLLM cuts the layer of {', '.join(modules)} in {len(outputs)} partitions, expected one each")
    return [Part(name, entry, (size,)) for (name, entry), size in zip(modules.items(), outputs, strict=True)]
