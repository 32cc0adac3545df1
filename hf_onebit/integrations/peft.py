"""PEFT on packed layers: what its tuners need of them is given, what would write into packed words is refused.

Imported when PEFT is (``on_import.py``), never before. PEFT knows quantized layers by lists in its source, so a new
kind has to be put in from outside, in these places:

* ``resolve_quantization_backend`` says how OFT, BOFT, VeRA, MiSS and SHiRA read the weight of a base layer;
* ``dequantize_module_weight`` gives DoRA the weight whose norms it needs;
* ``BaseTuner.inject_adapter`` is where every adapter is made, so where each layer that is adapted can be looked at;
* ``convert_peft_config_for_transformers`` and the conversions of an adapter's tensors take experts for fused ones
  (``peft_experts.py``).
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import peft.utils.integrations
import peft.utils.quantization_utils
import torch
import transformers.integrations.peft
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn

from hf_onebit.integrations.merging import adapted_layers
from hf_onebit.integrations.on_import import when_imported
from hf_onebit.integrations.peft_experts import (
    keeping_expert_names,
    telling_what_is_dropped,
    without_fusing_experts,
)
from hf_onebit.nn.linear import OneBitLinear
from hf_onebit.nn.mpq import MPQEmbedding
from hf_onebit.nn.replace import PACKED

_MARK = "knows_packed_layers"
_CONVERSION = "peft.utils.transformers_weight_conversion"
# Methods of PEFT that compute with, or change, the float matrix of their base layer, by the name of their type.
_NEEDS_FLOAT = {
    "DEFT": "starts from a product with it",
    "DELORA": "scales its own part by its norms",
    "FROD": "factors it",
    "GLORA": "replaces it in every step",
    "HIRA": "multiplies its own part by it",
    "HRA": "reflects it in every step",
    "LOHA": "adds its own part to it in every step",
    "LOKR": "adds its own part to it in every step",
    "OSF": "factors and replaces it",
    "PEANUT": "feeds it to a network of its own",
    "PSOFT": "factors and replaces it",
    "SUPERTUNING": "masks it in every step",
    "TINYLORA": "factors it",
    "TRAINABLE_TOKENS": "replaces rows of it",
}
# Starting points of LoRA that read the base weight, and all but one subtract a part of it.
_READS_BASE = ("pissa", "olora", "corda", "loftq", "orthogonal", "lora_ga", "mica")


def install() -> None:
    """Make PEFT know packed layers. Calling it again is fine."""
    _wrap_everywhere(peft.utils.quantization_utils, "resolve_quantization_backend", _with_backend)
    _wrap_everywhere(peft.utils.integrations, "dequantize_module_weight", _with_dequantize)
    for owner, name, wrap in (
        (BaseTuner, "_check_merge_allowed", _refusing_merge),
        (BaseTuner, "inject_adapter", _looking_at_targets),
        (BaseTunerLayer, "_get_embed_scale", _with_packed_scale),
        (AuxiliaryTrainingWrapper, "__init__", _refusing_packed),
    ):
        _wrap(owner, name, wrap)
    _wrap_if_there(transformers.integrations.peft, "get_model_conversion_mapping", without_fusing_experts)
    # PEFT imports it at its first use, and it cannot be imported while PEFT itself is. A version without it rewrites no
    # names of experts, and needs no telling.
    when_imported(_CONVERSION, _tell_of_experts)


def _tell_of_experts() -> None:
    """Where PEFT rewrites names of experts."""
    conversion: Any = sys.modules[_CONVERSION]
    for name, wrap in (
        ("convert_peft_config_for_transformers", keeping_expert_names),
        ("convert_peft_adapter_state_dict_for_transformers", telling_what_is_dropped),
        ("get_model_conversion_mapping", without_fusing_experts),
    ):
        _wrap_if_there(conversion, name, wrap)


class PackedBackend(QuantizationBackend):
    """How PEFT's tuners read a packed layer. They do not write it: see ``merge_and_dequantize``."""

    layer_type = "linear"
    supports_merge = False

    def __init__(self, backend_name: str) -> None:
        self.backend_name = backend_name

    def get_base_weight(self, base_layer: nn.Module) -> Tensor:
        """The float weight ``(out, in)`` that the packed one stands for, float32."""
        return base_layer.dequantize()  # type: ignore[operator]

    def set_base_weight(self, peft_layer: Any, weight_data: Tensor) -> None:
        """Refuses.

        Raises:
            ValueError: always.
        """
        raise ValueError(_refusal(1, "this layer"))


def _with_backend(original: Any) -> Any:
    def resolve(base_layer: nn.Module, **kwargs: Any) -> Any:
        if isinstance(base_layer, PACKED) and not isinstance(base_layer, MPQEmbedding):
            return PackedBackend("onebit" if isinstance(base_layer, OneBitLinear) else "mpq")
        return original(base_layer, **kwargs)

    return resolve


def _with_dequantize(original: Any) -> Any:
    def dequantize(module: nn.Module) -> Any:
        return module.dequantize() if isinstance(module, PACKED) else original(module)

    return dequantize


def _with_packed_scale(original: Any) -> Any:
    def get_embed_scale(self: Any) -> Any:
        base = self.get_base_layer()
        if not isinstance(base, MPQEmbedding) or base.embed_scale is None:
            return original(self)
        # PEFT makes it a tensor of the weight's dtype: of integers, here.
        return torch.tensor(base.embed_scale, dtype=base.dtype, device=base.weight.device)

    return get_embed_scale


def _refusing_merge(original: Any) -> Any:
    def check(self: Any) -> Any:
        packed = list(adapted_layers(self.model))
        if packed:
            raise ValueError(_refusal(len(packed), packed[0]))
        return original(self)

    return check


def _looking_at_targets(original: Any) -> Any:
    def inject(self: Any, *args: Any, **kwargs: Any) -> Any:
        create = self._create_and_replace

        def checked(
            config: Any, adapter: str, target: Any, target_name: str, parent: Any, *rest: Any, **more: Any
        ) -> Any:
            base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
            if not isinstance(base, PACKED):
                return create(config, adapter, target, target_name, parent, *rest, **more)
            _require_supported(config, base, more.get("current_key") or target_name)
            result = create(config, adapter, target, target_name, parent, *rest, **more)
            _guard_merge(type(getattr(parent, target_name)))
            return result

        # On the object, in front of the method of its class, and only for this call.
        self._create_and_replace = checked
        try:
            return original(self, *args, **kwargs)
        finally:
            del self._create_and_replace

    return inject


def _require_supported(config: Any, base: nn.Module, name: str) -> None:
    kind = str(getattr(config.peft_type, "value", config.peft_type)).upper()
    if kind in _NEEDS_FLOAT:
        raise ValueError(
            f"{kind} cannot adapt the packed layer {name}: it needs the float weight ({_NEEDS_FLOAT[kind]}), and a "
            "packed layer has none. Use LoRA (DoRA too), AdaLoRA, OFT, BOFT, VeRA, MiSS or another method that "
            "computes beside the layer (docs/peft.md has the list), or adapt the float model that model.dequantize() "
            "gives"
        )
    start = getattr(config, "init_lora_weights", None)
    if isinstance(start, str) and start.lower().startswith(_READS_BASE):
        raise ValueError(
            f"init_lora_weights={start!r} cannot start an adapter on the packed layer {name}: it reads the float "
            "weight, and most such starts subtract a part of it, but packed words stay as they are. Leave "
            "init_lora_weights at True, 'gaussian' or 'eva'; hf_onebit.init_from_residual(model, float_model) then "
            "starts the adapter at what packing lost"
        )
    if isinstance(base, MPQEmbedding) and getattr(config, "use_dora", False):
        raise ValueError(
            f"DoRA cannot adapt the packed embedding {name}: it reads the rows of the float weight. Use plain LoRA "
            "there, or leave the embedding in floating point (embedding_bits=None)"
        )


def _guard_merge(layer_class: Any) -> None:
    """Make a layer class refuse to merge where its base layer is packed, however merging is asked for."""
    original = layer_class.merge if hasattr(layer_class, "merge") else None
    if original is None or hasattr(original, _MARK):
        return

    def merge(self: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self.get_base_layer(), PACKED):
            raise ValueError(_refusal(1, type(self).__name__))
        return original(self, *args, **kwargs)

    layer_class.merge = _marked(original, merge)


def _refusing_packed(original: Any) -> Any:
    def init(self: Any, module_to_save: nn.Module, *args: Any, **kwargs: Any) -> None:
        packed = [module for module in module_to_save.modules() if isinstance(module, PACKED)]
        if packed:
            raise ValueError(
                f"{type(self).__name__} cannot train a copy of a packed module ({packed[0]}): integers take no "
                "gradients. Keep what modules_to_save or trainable_token_indices name in floating point "
                "(modules_to_not_convert, lm_head_bits=None, embedding_bits=None), or put an adapter on it "
                "(target_modules)"
            )
        original(self, module_to_save, *args, **kwargs)

    return init


def _refusal(count: int, first: str) -> str:
    return (
        f"Cannot merge an adapter into packed weights ({count} such layers, the first is {first}): the sum has no "
        "packed form. Keep the adapter beside the model (model.save_pretrained), or make a float model of both with "
        "hf_onebit.merge_and_dequantize(model), or pack the sum anew, with an error that it reports, with "
        "hf_onebit.merge_and_requantize(model)"
    )


def _marked(original: Any, wrapped: Any) -> Any:
    wrapped = functools.wraps(original)(wrapped)
    setattr(wrapped, _MARK, True)
    return wrapped


def _wrap(owner: Any, name: str, wrap: Any) -> None:
    original = getattr(owner, name)
    if not hasattr(original, _MARK):
        setattr(owner, name, _marked(original, wrap(original)))


def _wrap_if_there(owner: Any, name: str, wrap: Any) -> None:
    if hasattr(owner, name):
        _wrap(owner, name, wrap)


def _wrap_everywhere(owner: Any, name: str, wrap: Any) -> None:
    """Replace a function of PEFT in its module, and in those that imported it by name already."""
    original = getattr(owner, name)
    if hasattr(original, _MARK):
        return
    wrapped = _marked(original, wrap(original))
    for module_name, module in list(sys.modules.items()):
        if module_name.partition(".")[0] == "peft" and getattr(module, name, None) is original:
            setattr(module, name, wrapped)
