"""The quantizer that Transformers finds under "onebit": quantize while loading, load packed, save, dequantize.

Order of events in ``from_pretrained``, with what happens here:

    validate_environment                   refuse device maps that cannot work
    _process_model_before_weight_loading   model on meta: packed layers replace float ones; headers are checked
    OneBitQuantize.convert                 quantizing on load only: one float tensor in, its packed tensors out
    _process_model_after_weight_loading    what is missing or broken is named; or calibrated quantization runs
"""

from __future__ import annotations

import copy
import ctypes
import math
import sys
import time
import types
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import ConversionOps, PrefixChange, WeightConverter
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer

from hf_onebit.config import OneBitConfig, module_entry
from hf_onebit.formats.onebit import FORMAT_VERSION, tensor_specs
from hf_onebit.headers import check_packed_headers, read_headers
from hf_onebit.nn.fusion import fuse_projections
from hf_onebit.nn.linear import OneBitLinear
from hf_onebit.nn.replace import (
    LayerPlan,
    dequantize_layers,
    float_weight,
    packed_layers,
    replace_layers,
    resolve_names,
)
from hf_onebit.quantize import (
    OneBitQuantizer,
    announce,
    build_report,
    plan_layers,
    quantize_weight,
    warn_of_noise,
)
from hf_onebit.version import __version__

# glibc keeps freed blocks for itself: after this many bytes of float weights it is asked to give them back.
_TRIM_EVERY_BYTES = 1 << 20


class OneBitHfQuantizer(HfQuantizer):
    """Quantizes on load, loads packed checkpoints, and dequantizes, inside of Transformers' ``from_pretrained``."""

    requires_calibration = False
    quantization_config: OneBitConfig

    def __init__(self, quantization_config: OneBitConfig, **kwargs: Any) -> None:
        # A copy, since the table of modules is written into it: one config object may serve many models.
        super().__init__(copy.copy(quantization_config), **kwargs)
        self.quantization_config.validate()  # a field may have been changed since it was made
        self.report: dict[str, Any] | None = None
        self.records: dict[str, dict[str, Any]] = {}
        self._dtype: torch.dtype | None = None
        self._plan: LayerPlan | None = None
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
        return _with_half_scales(model), {
            "quant_library": "hf_onebit",
            "quant_library_version": __version__,
            "quant_method": "onebit",
            "quant_format_version": str(FORMAT_VERSION),
        }

    # -- before the weights -----------------------------------------------------------------------------------------

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        places = {str(place) for place in device_map.values()} if isinstance(device_map, dict) else {str(device_map)}
        if self.pre_quantized:
            if self.quantization_config.dequantize and "disk" in places:
                raise ValueError(
                    "dequantize=True cannot be combined with a device_map that holds 'disk': drop one of the two"
                )
            return
        if "disk" in places:
            raise ValueError(
                "Quantizing while loading cannot offload to disk (the loader would write float tensors there). "
                "Quantize without offload, save, and load the packed checkpoint with this device_map"
            )
        if self.quantization_config.dataset is not None and len(places) > 1:
            raise ValueError(
                f"Calibrated quantization needs the model on one device, got a device_map over {sorted(places)}. Load "
                "it whole, quantize, save, and load the packed checkpoint with this device_map"
            )

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        self._dtype = dtype
        return dtype

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> None:
        _refuse_tensor_parallelism(model)
        if self.pre_quantized:
            self._prepare_packed_load(model, checkpoint_files)
        else:
            self._prepare_quantization(model)

    def _prepare_packed_load(self, model: Any, checkpoint_files: Any) -> None:
        table = self.quantization_config.modules
        if not table:
            raise ValueError(
                "config.json says quant_method 'onebit' but has no table of packed modules: the checkpoint was "
                "edited, or its config was saved without its quantized model. Copy or download it again, or quantize "
                "the model again"
            )
        names = resolve_names(model, table)
        absent = [name for name, found in names.items() if found is None]
        same_class = type(model).__name__ in (getattr(model.config, "architectures", None) or ())
        if len(absent) == len(names) or (absent and same_class):
            raise ValueError(
                f"config.json names {len(absent)} packed modules that {type(model).__name__} does not have (the first "
                f"is {absent[0]!r}): the checkpoint was edited or is another model's. Copy or download it again"
            )
        layers = {found: table[name]["planes"] for name, found in names.items() if found is not None}
        replace_layers(model, layers)
        if checkpoint_files and str(checkpoint_files[0]).endswith(".safetensors"):
            packed = packed_layers(model)
            shapes = {
                name: (packed[found].in_features, packed[found].out_features, packed[found].planes)
                for name, found in names.items()
                if found is not None
            }
            headers = read_headers(checkpoint_files)
            strangers = {name for name, found in names.items() if found is None}
            known = {k: v for k, v in headers.items() if k.rpartition(".")[0] not in strangers}
            check_packed_headers(known, shapes, getattr(model, "base_model_prefix", ""))

    def _prepare_quantization(self, model: Any) -> None:
        config = self.quantization_config
        if config.dataset is not None:
            return  # the float model loads as it is; see _process_model_after_weight_loading
        self._plan = plan_layers(model, config)
        warn_of_noise(config)
        replace_layers(model, dict.fromkeys(self._plan.selected, config.planes))
        for layer in packed_layers(model).values():
            # A float parameter of the float shape stands in until the packed words come: the loader cuts fused
            # matrices to the shapes that it sees here, and in Transformers 5.21 casts to the dtypes that it sees
            # (int32 would turn the weights to zeros).
            shape = (layer.out_features, layer.in_features)
            stand_in = torch.empty(
                shape[::-1] if layer.source == "Conv1D" else shape,
                dtype=self._dtype or torch.get_default_dtype(),
                device=layer.weight.device,
            )
            layer.weight = nn.Parameter(stand_in, requires_grad=False)
        config.modules = {name: module_entry(config.planes) for name in self._plan.selected}

    # -- the weights ------------------------------------------------------------------------------------------------

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        if self.pre_quantized:
            return False
        module_name, _, tensor_name = param_name.rpartition(".")
        return tensor_name == "weight" and isinstance(model.get_submodule(module_name), OneBitLinear)

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        if not self.param_needs_quantization(model, param_name):
            return float(param.element_size())
        layer = model.get_submodule(param_name.rpartition(".")[0])
        words, _ = tensor_specs(layer.in_features, layer.out_features)["weight"]
        return 4 * math.prod(words) / param.numel()  # not what stands in for them now

    def get_quantize_ops(self) -> OneBitQuantize:
        return OneBitQuantize(self)

    def quantize_parameter(self, module: OneBitLinear, name: str, weight: Tensor) -> dict[str, Tensor]:
        """Packed tensors of one layer by full parameter name; the first error is kept for after the load.

        The loader swallows errors raised here into a report of its own, so what went wrong is raised by
        ``_process_model_after_weight_loading`` instead, and the layers in between are not worked on.
        """
        tensors: dict[str, Tensor] = {}
        if self._error is None:
            try:
                oriented = float_weight(module, weight)
                if tuple(oriented.shape) != (module.out_features, module.in_features):
                    expected = (module.out_features, module.in_features)
                    raise ValueError(
                        f"{name}.weight has shape {tuple(oriented.shape)} as (out, in): the model expects {expected}"
                    )
                tensors, self.records[name] = quantize_weight(oriented, self.quantization_config, name)
            except Exception as error:
                self._error = error
        if self._error is not None:
            specs = tensor_specs(module.in_features, module.out_features, module.planes)
            tensors = {
                key: torch.zeros(shape, dtype=dtype, device=weight.device) for key, (shape, dtype) in specs.items()
            }
        self._bytes_since_trim += weight.numel() * 4
        return {f"{name}.{tensor}": value for tensor, value in tensors.items()}

    def trim_memory(self) -> None:
        """Give freed float tensors back to the system, so that memory stays near what the packed model needs."""
        if self._bytes_since_trim >= _TRIM_EVERY_BYTES:
            self._bytes_since_trim = 0
            _malloc_trim()

    # -- after the weights ------------------------------------------------------------------------------------------

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self._error is not None:
            raise self._error
        if not self.pre_quantized and self.quantization_config.dataset is not None:
            self._quantize_loaded(model)
            return model
        layers = packed_layers(model)
        _check_loaded(layers, quantized_now=not self.pre_quantized)
        for layer in layers.values():
            for name in layer.scale_names:  # the loader makes every float parameter trainable
                getattr(layer, name).requires_grad_(False)
        _drop_converters_of_packed(model, layers)
        _guard_resizing(model)
        if self.pre_quantized and self.quantization_config.dequantize:
            dequantize_layers(model, self._dtype or torch.float32)
        elif not self.pre_quantized:
            self._finish_quantization(model)
        if self.quantization_config.fuse_projections:
            fuse_projections(model)
        return model

    def _finish_quantization(self, model: Any) -> None:
        assert self._plan is not None
        _malloc_trim()
        config = self.quantization_config
        self.records = {name: self.records[name] for name in self._plan.selected}
        self.report = build_report(config, self.records, self._plan, model, None, self._start)
        # Counted now that tied weights are tied: before the load each of them is a parameter of its own.
        layers = packed_layers(model)
        packed = {id(p) for layer in layers.values() for t in layer.plane_tensors() for p in t}
        total = sum(shape.weights for shape in self._plan.selected.values())
        total += sum(p.numel() for p in model.parameters() if id(p) not in packed)
        self.report["total_weights"] = total
        element = torch.empty((), dtype=self._dtype or torch.float32).element_size()
        self.report["float_bytes"] = total * element
        self.pre_quantized = True  # from here on, it is a packed model like any other
        announce(self.report)

    def _quantize_loaded(self, model: Any) -> None:
        # The loader has dressed the model as quantized already, which the quantizer would rightly refuse.
        del model.hf_quantizer
        quantizer = OneBitQuantizer(self.quantization_config)
        quantizer.quantize_model(model)
        self.quantization_config, self.report = model.config.quantization_config, quantizer.report
        self.pre_quantized = True
        model.hf_quantizer = self

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        if isinstance(dtype, str):  # a config that was saved once holds the name
            dtype = getattr(torch, dtype)
            assert isinstance(dtype, torch.dtype)
        offloaded = [name for name, layer in packed_layers(model).items() if layer.weight.is_meta]
        if offloaded:
            raise ValueError(
                f"{len(offloaded)} packed layers are offloaded (the first is {offloaded[0]}): load the model whole to "
                "dequantize it"
            )
        model.__dict__.pop("resize_token_embeddings", None)
        return dequantize_layers(model, dtype or torch.float32)


class OneBitQuantize(ConversionOps):
    """Loader operation: float weights in, packed tensors out."""

    def __init__(self, hf_quantizer: OneBitHfQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(  # type: ignore[override]  # by keyword only, as the loader calls it
        self, input_dict: dict[str, Any], *, model: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """{"<layer>.weight": tensor or [tensor]} -> the same, with packed tensors for each packed layer's weight."""
        result: dict[str, Any] = {}
        for key in list(input_dict):
            value = input_dict.pop(key)
            module_name, _, tensor_name = key.rpartition(".")
            module = model.get_submodule(module_name)
            if tensor_name == "weight" and isinstance(module, OneBitLinear):
                weight = value[0] if isinstance(value, list) else value
                result |= self.hf_quantizer.quantize_parameter(module, module_name, weight)
            else:
                result[key] = value
        self.hf_quantizer.trim_memory()
        return result


def register() -> None:
    """Make Transformers know "onebit". Calling it again changes nothing.

    Raises:
        RuntimeError: another package registered the name first.
    """
    for mapping, name, cls, decorate in (
        (AUTO_QUANTIZATION_CONFIG_MAPPING, "onebit", OneBitConfig, register_quantization_config),
        (AUTO_QUANTIZER_MAPPING, "onebit", OneBitHfQuantizer, register_quantizer),
    ):
        present = mapping.get(name)
        if present is None:
            decorate(name)(cls)
        elif present.__module__ != cls.__module__:
            raise RuntimeError(
                f"Transformers already has a quantization method {name!r}, from {present.__module__}: two packages "
                "that claim the same name cannot be used in one process. Import only one of them"
            )


def _with_half_scales(model: nn.Module) -> dict[str, Tensor] | None:
    """What to save of a model some of whose scales are wider than float16, as they may be while they train; else None.

    Raises:
        ValueError: float16 cannot hold one of them.
    """
    wide = [
        f"{name}.{scale}"
        for name, layer in packed_layers(model).items()
        for scale in layer.scale_names
        if getattr(layer, scale).dtype != torch.float16
    ]
    if not wide:
        return None
    state = model.state_dict()
    for key in wide:
        state[key] = state[key].half()
        if not bool(torch.isfinite(state[key]).all()):
            raise ValueError(
                f"{key} holds values that float16 cannot (at most 65504), and scales are stored in float16: lower the "
                "learning rate, or leave this layer in floating point"
            )
    return state


def _check_loaded(layers: dict[str, OneBitLinear], quantized_now: bool) -> None:
    """Name tensors of packed layers that no file held, and scales and biases that are not finite."""
    missing, broken = [], []
    for name, layer in layers.items():
        for tensor, parameter in layer.named_parameters():
            if parameter.is_meta:
                continue  # offloaded: it is read when it is used
            if not getattr(parameter, "_is_hf_initialized", False):
                missing.append(f"{name}.{tensor}")
            elif parameter.is_floating_point() and not bool(torch.isfinite(parameter).all()):
                broken.append(f"{name}.{tensor}")
    if missing and quantized_now:
        names = sorted({key.rpartition(".")[0] for key in missing})
        what = "weight" if any(key.endswith(".weight") for key in missing) else "bias"
        raise ValueError(
            f"The float checkpoint has no {what} for {len(names)} layers (the first is {names[0]}), so they would be "
            f"random: leave them in floating point with modules_to_not_convert={names[:4]!r}"
        )
    if missing:
        raise ValueError(
            f"The checkpoint lacks {len(missing)} tensors of packed layers (the first is {missing[0]}): it was edited "
            "or is incomplete. Copy or download it again, or quantize the model again"
        )
    if broken:
        raise ValueError(
            f"{broken[0]} holds NaN or inf ({len(broken)} such tensors): the checkpoint is damaged. Copy or download "
            "it again, or quantize the model again"
        )


def _drop_converters_of_packed(model: Any, layers: dict[str, OneBitLinear]) -> None:
    """Save packed layers under their module names.

    Some models split or fuse matrices between file and memory (fused q/k/v, say); undoing that on save would cut
    packed words as if they were rows of weights.
    """
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:  # the model was not loaded: these are the ones that its saving would make up
        mapping = get_model_conversion_mapping(model, add_legacy=False)
        conversions = [c for c in mapping if not isinstance(c, PrefixChange)]
    packed = {f"{name}.weight" for name in layers}

    def touches_packed(conversion: Any) -> bool:
        if not isinstance(conversion, WeightConverter):
            return False
        reverse = copy.deepcopy(conversion).reverse_transform()
        return any(reverse.rename_source_key(key)[1] is not None for key in packed)

    model._weight_conversions = [c for c in conversions if not touches_packed(c)]


def _guard_resizing(model: Any) -> None:
    """Resizing changes the embedding first and the output head second, which fails where the head is packed."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if isinstance(head, OneBitLinear):
        model.resize_token_embeddings = types.MethodType(resize_token_embeddings, model)


def resize_token_embeddings(model: Any, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> Any:
    """Stands in for the model's method while its output head is packed: refuses before anything is changed.

    Raises:
        ValueError: always when a size is given, naming the remedy.
    """
    if new_num_tokens is None and not args and not kwargs.get("pad_to_multiple_of"):
        return model.get_input_embeddings()
    raise ValueError(
        f"Cannot resize the token embeddings to {new_num_tokens}: the output head is packed, and packed weights have "
        "no rows to add. Resize the float model before quantizing it, or keep the head in floating point (leave "
        "modules_to_not_convert=None), or call model.dequantize() first"
    )


def _refuse_tensor_parallelism(model: Any) -> None:
    distributed = getattr(model.config, "distributed_config", None)
    size = getattr(distributed, "tp_size", None) or 1
    if size > 1 or getattr(distributed, "tp_plan", None) is not None:
        raise ValueError(
            "Packed layers do not split over tensor-parallel ranks yet: load without tp_plan (device_map='auto' works)"
        )


def _malloc_trim() -> None:
    if sys.platform == "linux":
        try:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        except (OSError, AttributeError):  # not glibc
            return
