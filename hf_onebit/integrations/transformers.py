"""The quantizers that Transformers finds under "onebit" and "mpq": quantize on load, load packed, save, dequantize.

Order of events in ``from_pretrained``, with what happens here:

    validate_environment                   refuse device maps that cannot work
    _process_model_before_weight_loading   model on meta: packed layers replace float ones; headers are checked
    QuantizeOnLoad.convert                 quantizing on load only: one float tensor in, its packed tensors out
    _process_model_after_weight_loading    what is missing or broken is named; or calibrated quantization runs
"""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import math
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import WeightConverter
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer

from hf_onebit.argument_checks import checked_dtype
from hf_onebit.config import OneBitConfig, PackingConfig
from hf_onebit.counts import counted
from hf_onebit.formats import double_quant
from hf_onebit.formats.table import TableEntry
from hf_onebit.integrations.experts import expert_conversions, restore_conversions
from hf_onebit.integrations.load_checks import check_files, check_loaded, check_parallelism, check_places
from hf_onebit.integrations.load_operations import ExpandStatistics, QuantizeOnLoad
from hf_onebit.integrations.model_methods import guard_resizing
from hf_onebit.integrations.saving import as_stored, drop_converters_of_packed
from hf_onebit.integrations.tensor_parallel import cut_packed, parallel_size
from hf_onebit.mpq_config import MPQConfig
from hf_onebit.mpq_quantizer import MPQQuantizer
from hf_onebit.nn.binding import ignore_in_ddp
from hf_onebit.nn.experts import join_experts, separate_experts, separated
from hf_onebit.nn.fsdp import state_to_save
from hf_onebit.nn.fusion import fuse_projections
from hf_onebit.nn.heads import keep_tie, tied_alone
from hf_onebit.nn.replace import (
    PACKED,
    LayerPlan,
    PackedModule,
    dequantize_layers,
    entry_of,
    float_weight,
    module_shape,
    packed_layers,
    packed_specs,
    replace_layers,
    resolve_names,
)
from hf_onebit.nn.roles import fp32_modules, matches, output_heads
from hf_onebit.quantization.finite import check_finite, check_finite_model
from hf_onebit.quantization.planning import (
    packing_table,
    plan_layers,
    require_packing,
    require_reader,
    require_text,
    settle_tie,
    warn_of_noise,
)
from hf_onebit.quantization.records import announce, build_report
from hf_onebit.quantization.weights import quantize_group_weight, quantize_weight
from hf_onebit.quantize import OneBitQuantizer
from hf_onebit.quantizer import Quantizer
from hf_onebit.storage.headers import header_metadata

# glibc keeps freed blocks for itself: after this many bytes of float weights it is asked to give them back.
_TRIM_EVERY_BYTES = 1 << 20


class PackingHfQuantizer(HfQuantizer):
    """Quantizes on load, loads packed checkpoints, and dequantizes, inside of Transformers' ``from_pretrained``; what
    both methods share."""

    requires_calibration = False
    quantization_config: PackingConfig
    quantizer_class: type[Quantizer]

    def __init__(self, quantization_config: PackingConfig, **kwargs: Any) -> None:
        # A copy, since the table of modules is written into it: one config object may serve many models.
        super().__init__(copy.copy(quantization_config), **kwargs)
        self.quantization_config.validate()  # a field may have been changed since it was made
        self.report: dict[str, Any] | None = None
        self.records: dict[str, dict[str, Any]] = {}
        self._dtype: torch.dtype | None = None
        self._plan: LayerPlan | None = None
        self.entries: dict[str, TableEntry] = {}  # of a packed checkpoint, by the names of the model's modules
        # {module: the one it was tied to in the float model}; the checkpoint may hold either's weight for both.
        self._twins: dict[str, str] = {}
        self._own_weight: set[str] = set()  # of the twins, those that the checkpoint held
        self._error: Exception | None = None
        self._bytes_since_trim = 0
        self._start = time.perf_counter()
        if not self.pre_quantized:
            self.quantization_config.modules = None

    # -- what it can do ---------------------------------------------------------------------------------------------

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        state = state_to_save(model)
        stored = as_stored(model, self.quantization_config.modules or {}, state)
        return stored, header_metadata(self.quantization_config.method)

    # -- before the weights -----------------------------------------------------------------------------------------

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        check_places(self.quantization_config, self.pre_quantized, device_map)

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        self._dtype = dtype
        return dtype

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> None:
        check_parallelism(model, self.quantization_config, self.pre_quantized)
        if self.pre_quantized:
            self._prepare_packed_load(model, checkpoint_files)
        else:
            self._prepare_quantization(model)

    def update_parallel_plan(self, model: Any, plan: dict[str, str]) -> None:
        """Adds the rules of packed parameters where the model is loaded under tensor parallelism."""
        size = parallel_size(model)
        if size > 1 and plan is model.tp_plan:
            cut_packed(model, plan, size)

    def _prepare_packed_load(self, model: Any, checkpoint_files: Any) -> None:
        table = self.quantization_config.modules
        if not table:
            raise ValueError(
                f"config.json says quant_method {self.quantization_config.method!r} but has no table of packed "
                "modules: the checkpoint was edited, or its config was saved without its quantized model. Copy or "
                "download it again, or quantize the model again"
            )
        separate = separate_experts(model)
        names = resolve_names(model, table)
        if not any(found.startswith(f"{experts}.") for experts in separate for found in names.values() if found):
            join_experts(model)  # none of them is packed: the file has them as the float model does
        absent = [name for name, found in names.items() if found is None]
        same_class = type(model).__name__ in (getattr(model.config, "architectures", None) or ())
        if len(absent) == len(names) or (absent and same_class):
            raise ValueError(
                f"config.json names {counted(len(absent), 'packed module')} that {type(model).__name__} does not have "
                f"(the first is {absent[0]!r}): the checkpoint was edited or is another model's. Copy or download it "
                "again"
            )
        layers = {}
        for name, found in names.items():
            if found is not None:
                entry = TableEntry.from_dict(table[name])
                owner = None if entry.tied_to is None else names[entry.tied_to]
                layers[found] = dataclasses.replace(entry, tied_to=owner)
        if pair := tied_alone(model, layers):
            raise ValueError(
                f"config.json ties {pair[0]} to {pair[1]}, but its table does not pack them as one: it was edited, or "
                f"is of a model without a head that {type(model).__name__} has. Load it with the class that saved it"
            )
        replace_layers(model, layers)
        for layer in packed_layers(model).values():
            # Some models initialize a layer's weight from the module around it. Words that stay on the meta device
            # (offloaded) are marked here, since nothing is loaded into them; the others are replaced by the loader.
            layer._parameters["weight"].__dict__["_is_hf_initialized"] = True
        self.entries = layers
        for name, entry in layers.items():
            if entry.tied_to is not None:
                keep_tie(model, name, entry.tied_to, entry.tensor_names)
        if checkpoint_files and str(checkpoint_files[0]).endswith(".safetensors"):
            check_files(model, names, table, checkpoint_files)
        self._forget(model, absent)

    def _forget(self, model: Any, absent: Sequence[str]) -> None:
        """Take modules that this class does not have out of the table, so that a save does not promise them."""
        config = self.quantization_config
        gone, kept = set(absent), {}
        for name, entry in (config.modules or {}).items():
            if name not in gone:
                owner_gone = entry.get("tied_to") in gone
                kept[name] = {key: value for key, value in entry.items() if not (owner_gone and key == "tied_to")}
        config.modules = kept  # a new table: the one that came belongs to the caller's config
        config.untied = config.untied and bool(output_heads(model))

    def _prepare_quantization(self, model: Any) -> None:
        config = self.quantization_config
        if config.whole:  # what `plan_layers` and calibration would refuse later, before weights are loaded in vain
            require_packing(config)
            if config.calibrates:
                require_reader(model)
            return  # the float model loads as it is; see _process_model_after_weight_loading
        require_text(config)
        self._plan = plan_layers(model, config)
        if self._plan.selected:
            warn_of_noise(config)
        table = packing_table(self._plan)
        replace_layers(model, table)
        for layer in packed_layers(model).values():
            # A float parameter of the float shape stands in until the packed words come: the loader cuts fused
            # matrices to the shapes that it sees here, and in Transformers 5.21 casts to the dtypes that it sees
            # (int32 would turn the weights to zeros).
            shape = module_shape(layer)
            assert shape is not None
            size = (shape.out_features, shape.in_features)
            stand_in = torch.empty(
                size[::-1] if shape.source == "Conv1D" else size,
                dtype=self._dtype or torch.get_default_dtype(),
                device=layer.weight.device,
            )
            layer.weight = nn.Parameter(stand_in, requires_grad=False)
        heads = self._plan.heads
        settle_tie(model, self._plan, config)
        if heads.untied and heads.head is not None and heads.embedding is not None:
            self._twins = {heads.head: heads.embedding, heads.embedding: heads.head}
        config.modules = {name: entry.to_dict() for name, entry in table.items()}

    # -- the weights ------------------------------------------------------------------------------------------------

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        if self.pre_quantized:
            return False
        module_name, _, tensor_name = param_name.rpartition(".")
        if tensor_name != "weight":
            return False
        return module_name in self._twins or isinstance(model.get_submodule(module_name), PACKED)

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        if not self.param_needs_quantization(model, param_name):
            return float(param.element_size())
        layer = model.get_submodule(param_name.rpartition(".")[0])
        if not isinstance(layer, PACKED):  # a float embedding whose head is packed
            return float(param.element_size())
        words, _ = packed_specs(layer)["weight"]
        return 4 * math.prod(words) / param.numel()  # not what stands in for them now

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """What fuses experts while they load is left out where they are separate."""
        own = expert_conversions(model, weight_conversions, splitting=not self.pre_quantized)
        updated: list[Any] = super().update_weight_conversions(own, model)
        return updated

    def get_weight_conversions(self) -> list[Any]:
        """Reads statistics that the file holds in few bits (``double_quant``) as the scales and zeros of a module."""
        table = self.quantization_config.modules or {}
        if not self.pre_quantized or not any(entry.get("double_quant") for entry in table.values()):
            return []
        sources = [f".{name}" for name in double_quant.tensor_names(symmetric=False)]
        return [WeightConverter(sources, ".scales", [ExpandStatistics(self)])]

    def get_quantize_ops(self) -> QuantizeOnLoad:
        return QuantizeOnLoad(self)

    def quantize_parameter(self, model: Any, name: str, weight: Tensor) -> dict[str, Tensor]:
        """Packed tensors of one module by full parameter name, and of the one it was tied to where the file holds one
        weight for both; the first error is kept for after the load.

        The loader swallows errors raised here into a report of its own, so what went wrong is raised by
        ``_process_model_after_weight_loading`` instead, and the layers in between are not worked on.
        """
        tensors = self._pack_or_keep(model, name, weight)
        twin = self._twins.get(name)
        if twin is not None:
            self._own_weight.add(name)
            if twin not in self._own_weight:
                tensors |= self._pack_or_keep(model, twin, weight)
        self._bytes_since_trim += weight.numel() * 4
        return tensors

    def _pack_or_keep(self, model: Any, name: str, weight: Tensor) -> dict[str, Tensor]:
        module = model.get_submodule(name)
        if not isinstance(module, PACKED):
            return {f"{name}.weight": weight}
        tensors: dict[str, Tensor] = {}
        if self._error is None:
            try:
                tensors, self.records[name] = self._quantize(module, name, weight)
            except Exception as error:
                self._error = error
        if self._error is not None:
            tensors = {
                key: torch.zeros(shape, dtype=dtype, device=weight.device)
                for key, (shape, dtype) in packed_specs(module).items()
            }
        return {f"{name}.{tensor}": value for tensor, value in tensors.items()}

    def _quantize(self, module: PackedModule, name: str, weight: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
        shape, oriented = module_shape(module), float_weight(module, weight)
        assert shape is not None
        expected = (shape.out_features, shape.in_features)
        if tuple(oriented.shape) != expected:
            raise ValueError(
                f"{name}.weight has shape {tuple(oriented.shape)} as (out, in): the model expects {expected}"
            )
        check_finite(weight, f"{name}.weight")
        assert self._plan is not None
        entry = self._plan.entries.get(name) or entry_of(module)
        if entry.method == "mpq":
            search = getattr(self.quantization_config, "search", "mse") if name in self._plan.selected else "mse"
            return quantize_group_weight(oriented, entry, name, search=search)
        assert isinstance(self.quantization_config, OneBitConfig)
        return quantize_weight(oriented, self.quantization_config, name, entry.planes)

    def trim_memory(self) -> None:
        """Give freed float tensors back to the system, so that memory stays near what the packed model needs."""
        if self._bytes_since_trim >= _TRIM_EVERY_BYTES:
            self._bytes_since_trim = 0
            _malloc_trim()

    # -- after the weights ------------------------------------------------------------------------------------------

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self._error is not None:
            raise self._error
        if not self.pre_quantized and self.quantization_config.whole:
            self._quantize_loaded(model)
            return model
        layers = packed_layers(model)
        check_loaded(layers, quantized_now=not self.pre_quantized)
        for layer in layers.values():
            for name in layer.scale_names:  # the loader makes every float parameter trainable
                getattr(layer, name).requires_grad_(False)
        drop_converters_of_packed(model, layers)
        guard_resizing(model)
        ignore_in_ddp(model)
        if self.pre_quantized and self.quantization_config.dequantize:
            _dequantized(model, self._dtype or torch.float32)
        elif not self.pre_quantized:
            self._finish_quantization(model)
        if self.quantization_config.fuse_projections and parallel_size(model) == 1:
            fuse_projections(model)
        return model

    def _finish_quantization(self, model: Any) -> None:
        assert self._plan is not None
        check_finite_model(model)
        _malloc_trim()
        config, heads = self.quantization_config, self._plan.heads
        if heads.tied and heads.head is not None and heads.embedding is not None:
            # The file held one of the two.
            for name, other in ((heads.head, heads.embedding), (heads.embedding, heads.head)):
                if name not in self.records:
                    self.records[name] = {**self.records[other], "seconds": 0.0}
        self.records = {name: self.records[name] for name in packing_table(self._plan)}
        self.report = build_report(config, self.records, self._plan, model, None, self._start)
        # Counted now that tied weights are tied: before the load each of them is a parameter of its own.
        packed = {id(getattr(layer, t)) for layer in packed_layers(model).values() for t in packed_specs(layer)}
        total = sum(shape.weights for shape in self._plan.selected.values()) + heads.weights
        total += sum(p.numel() for p in model.parameters() if id(p) not in packed)
        self.report["total_weights"] = total
        element = torch.empty((), dtype=self._dtype or torch.float32).element_size()
        self.report["float_bytes"] = total * element
        self.pre_quantized = True  # from here on, it is a packed model like any other
        announce(self.report)

    def _quantize_loaded(self, model: Any) -> None:
        # The loader has dressed the model as quantized already, which the quantizer would rightly refuse.
        del model.hf_quantizer
        quantizer = self.quantizer_class(self.quantization_config)
        quantizer.quantize_model(model)
        self.quantization_config, self.report = model.config.quantization_config, quantizer.report
        self.pre_quantized = True
        model.hf_quantizer = self

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        if isinstance(dtype, str):  # a config that was saved once holds the name
            named = getattr(torch, dtype, None)
            dtype = named if isinstance(named, torch.dtype) else dtype
        target = checked_dtype("dequantize", dtype) or torch.float32
        offloaded = [name for name, layer in packed_layers(model).items() if layer.weight.is_meta]
        if offloaded:
            raise ValueError(
                f"{type(model).__name__} is offloaded in part ({counted(len(offloaded), 'packed layer')}, the first is "
                f"{offloaded[0]}): load the model whole to dequantize it"
            )
        model.__dict__.pop("resize_token_embeddings", None)
        return _dequantized(model, target)


class OneBitHfQuantizer(PackingHfQuantizer):
    """``PackingHfQuantizer`` of the method "onebit"."""

    quantizer_class = OneBitQuantizer


class MPQHfQuantizer(PackingHfQuantizer):
    """``PackingHfQuantizer`` of the method "mpq"."""

    quantizer_class = MPQQuantizer


def register() -> None:
    """Make Transformers know "onebit" and "mpq". Calling it again changes nothing.

    Raises:
        RuntimeError: another package registered the name first.
    """
    for mapping, name, cls, decorate in (
        (AUTO_QUANTIZATION_CONFIG_MAPPING, "onebit", OneBitConfig, register_quantization_config),
        (AUTO_QUANTIZER_MAPPING, "onebit", OneBitHfQuantizer, register_quantizer),
        (AUTO_QUANTIZATION_CONFIG_MAPPING, "mpq", MPQConfig, register_quantization_config),
        (AUTO_QUANTIZER_MAPPING, "mpq", MPQHfQuantizer, register_quantizer),
    ):
        present = mapping.get(name)
        if present is None:
            decorate(name)(cls)
        elif present.__module__ != cls.__module__:
            raise RuntimeError(
                f"Transformers already has a quantization method {name!r}, from {present.__module__}: two packages "
                "that claim the same name cannot be used in one process. Import only one of them"
            )


def _dequantized(model: Any, dtype: torch.dtype) -> Any:
    """The model in floating point, its experts fused again; saved, it has the names of float checkpoints."""
    names = list(separated(model))
    dequantize_layers(model, dtype)
    # What was never packed goes along: layers of two dtypes do not compute together.
    fp32 = tuple(fp32_modules(model))
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not matches(name.rpartition(".")[0], fp32):
            parameter.data = parameter.data.to(dtype)
    restore_conversions(model, names)
    return model


def _malloc_trim() -> None:
    if sys.platform == "linux":
        try:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        except (OSError, AttributeError):  # not glibc
            return
