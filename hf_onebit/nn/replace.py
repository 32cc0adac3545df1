"""Which layers of a model are packed and which stay float, with the reason; and swapping one kind for the other."""

from __future__ import annotations

import ast
import functools
import inspect
import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from hf_onebit.formats import onebit as fmt
from hf_onebit.nn.linear import OneBitLinear

# Parts of multimodal models that see pixels or sound: few weights, and sensitive ones.
TOWERS = ("vision_tower", "vision_model", "visual", "multi_modal_projector", "audio_tower")
# Methods in which a class may read a layer's `.weight` without computing with it.
_SETUP_METHODS = frozenset({"__init__", "_init_weights", "reset_parameters", "init_weights", "tie_weights"})


@dataclass(frozen=True)
class LinearShape:
    """A linear layer as its kind and sizes."""

    in_features: int
    out_features: int
    bias: bool
    source: str  # "Linear" or "Conv1D"

    @property
    def weights(self) -> int:
        return self.in_features * self.out_features


@dataclass(frozen=True)
class Skipped:
    """A layer left in floating point."""

    reason: str
    weights: int
    is_head: bool = False


@dataclass
class LayerPlan:
    """Names of the layers to pack, and of those that stay float with the reason."""

    selected: dict[str, LinearShape] = field(default_factory=dict)
    skipped: dict[str, Skipped] = field(default_factory=dict)

    @property
    def coverage(self) -> float:
        """Share of the weights in linear layers and experts, output head excepted, that are to be packed (0 to 1)."""
        packed = sum(shape.weights for shape in self.selected.values())
        left = sum(skipped.weights for skipped in self.skipped.values() if not skipped.is_head)
        return packed / (packed + left) if packed + left else 0.0


def find_layers(model: nn.Module, modules_to_not_convert: Sequence[str] | None = None) -> LayerPlan:
    """Sort the linear layers of a float model (on any device, meta included) into packed ones and ones that stay.

    Args:
        model: the model; Transformers' attributes on it (tied weights, output head, float32 modules) are honoured.
        modules_to_not_convert: see ``OneBitConfig``.

    Returns:
        The plan, in the model's order of layers.
    """
    plan = LayerPlan()
    tied = _tied_modules(model)
    heads = _output_heads(model)
    last = _last_module(model)
    fp32 = tuple(_fp32_modules(model))
    names_of = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    uses_of = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    for name, module in model.named_modules():
        for parameter_name, weights in _fused_experts(module):
            full = f"{name}.{parameter_name}" if name else parameter_name
            plan.skipped[full] = Skipped("fused 3-D experts are left in floating point", weights)
        shape = linear_shape(module)
        if shape is None:
            continue
        is_head = name in heads
        reason = None
        if name in tied or names_of[id(module)] > 1 or uses_of[id(module.weight)] > 1:
            reason = "shares its weight with another module (tied)"
        elif shape.in_features < fmt.MIN_IN_FEATURES:
            reason = f"has fewer than {fmt.MIN_IN_FEATURES} inputs"
        elif _matches(name, fp32):
            reason = "kept in float32 by the model's own list"
        elif reader := _reader_of_weight(model, name):
            reason = f"{reader} reads its .weight directly"
        elif modules_to_not_convert is None:
            if is_head:
                reason = "output head"
            elif name == last:
                reason = "last layer of the model"
            elif any(part in TOWERS for part in name.split(".")):
                reason = "part of a vision or audio tower"
        elif _matches(name, modules_to_not_convert):
            reason = "listed in modules_to_not_convert"
        if reason is None:
            plan.selected[name] = shape
        else:
            plan.skipped[name] = Skipped(reason, shape.weights, is_head)
    return plan


def unmatched_patterns(model: nn.Module, modules_to_not_convert: Sequence[str] | None) -> list[str]:
    """Entries of ``modules_to_not_convert`` that name no module: most likely typing errors."""
    names = [name for name, _ in model.named_modules()]
    return [p for p in modules_to_not_convert or () if not any(_matches(name, [p]) for name in names)]


def linear_shape(module: nn.Module) -> LinearShape | None:
    """Sizes of a plain linear layer, or None for any other module.

    Subclasses of ``nn.Linear`` do not count: they may compute something else (routers, packed layers).
    """
    if type(module) is nn.Linear:
        return LinearShape(module.in_features, module.out_features, module.bias is not None, "Linear")
    weight = getattr(module, "weight", None)
    if type(module).__name__ == "Conv1D" and isinstance(weight, Tensor):
        in_features, out_features = weight.shape
        return LinearShape(int(in_features), int(out_features), getattr(module, "bias", None) is not None, "Conv1D")
    return None


def float_weight(module: nn.Module, weight: Tensor | None = None) -> Tensor:
    """The weight of a plain linear layer as (out_features, in_features), whatever its class stores.

    Args:
        module: an ``nn.Linear``, a ``Conv1D``, or the packed layer that stands for one.
        weight: the weight to orient, where it is not the module's own.
    """
    shape = linear_shape(module)
    source = module.source if isinstance(module, OneBitLinear) else shape.source if shape else "Linear"
    value = module.weight if weight is None else weight
    assert isinstance(value, Tensor)
    return value.detach().t() if source == "Conv1D" else value.detach()


def replace_layers(model: nn.Module, layers: Mapping[str, int]) -> None:
    """Swap float layers for empty packed ones on the same device; nothing of the float weights is kept but the bias.

    Args:
        model: changed in place.
        layers: module name -> number of planes.

    Raises:
        ValueError: a name is not a plain linear layer of the model.
    """
    for name, planes in layers.items():
        module = find_module(model, name)
        shape = None if module is None else linear_shape(module)
        if module is None or shape is None:
            found = "nothing" if module is None else f"a {type(module).__name__}"
            raise ValueError(
                f"Cannot pack {name!r}: expected a linear layer of that name in {type(model).__name__}, found {found}. "
                "The config's table of modules belongs to another model."
            )
        model.set_submodule(name, _empty_packed(module, shape, planes))


def set_packed(model: nn.Module, name: str, tensors: Mapping[str, Tensor]) -> OneBitLinear:
    """Swap one float layer for a packed one of ``tensors`` (names of docs/formats.md) and the float layer's bias."""
    module = model.get_submodule(name)
    shape = linear_shape(module)
    assert shape is not None
    planes = sum(plane_name in tensors for plane_name in ("weight", "weight_1"))
    fmt.validate_tensors(tensors, shape.in_features, shape.out_features, planes, name)
    assert isinstance(module.weight, Tensor)
    device = module.weight.device
    packed = _empty_packed(module, shape, planes, device="meta")
    for tensor_name, tensor in tensors.items():
        setattr(packed, tensor_name, nn.Parameter(tensor.to(device), requires_grad=False))
    if shape.bias:
        packed.bias = module.bias  # type: ignore[assignment]
    for parameter in packed.parameters():
        parameter.__dict__["_is_hf_initialized"] = True  # as Transformers marks what it loaded
    packed.train(module.training)
    model.set_submodule(name, packed)
    return packed


def dequantize_layers(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Swap every packed layer for the float layer it stands for, in place (GPT-2's ``Conv1D`` included).

    Args:
        model: changed in place, and returned.
        dtype: dtype of the new weights and biases.
    """
    for name, layer in packed_layers(model).items():
        weight = layer.dequantize(dtype)
        bias = None if layer.bias is None else layer.bias.detach().to(dtype)
        float_layer: nn.Module
        with torch.device("meta"):
            if layer.source == "Conv1D":
                float_layer = _conv1d(layer.out_features, layer.in_features)
                weight = weight.t().contiguous()
            else:
                float_layer = nn.Linear(layer.in_features, layer.out_features, bias is not None)
        float_layer.weight = nn.Parameter(weight)
        float_layer.bias = None if bias is None else nn.Parameter(bias)
        float_layer.train(layer.training)
        model.set_submodule(name, float_layer)
    return model


def packed_layers(model: nn.Module) -> dict[str, OneBitLinear]:
    """Packed layers by full name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, OneBitLinear)}


def find_module(model: nn.Module, name: str) -> nn.Module | None:
    """The module of that full name, or None where the model has none."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def resolve_names(model: nn.Module, table: Iterable[str]) -> dict[str, str | None]:
    """Find the modules that a checkpoint's table names, with or without the base model's prefix.

    ``AutoModel`` drops the prefix that ``AutoModelForCausalLM`` saved, and the other way round.

    Returns:
        {name in the table: name in the model, or None where the model has no such module}.
    """
    prefix = getattr(model, "base_model_prefix", "")
    modules = {name for name, _ in model.named_modules()}

    def find(name: str) -> str | None:
        candidates = [name]
        if prefix:
            candidates += [f"{prefix}.{name}", name.removeprefix(f"{prefix}.")]
        return next((c for c in candidates if c in modules), None)

    return {name: find(name) for name in table}


def _empty_packed(module: nn.Module, shape: LinearShape, planes: int, device: str | None = None) -> OneBitLinear:
    weight = module.weight
    assert isinstance(weight, Tensor)
    packed = OneBitLinear(
        shape.in_features,
        shape.out_features,
        shape.bias,
        planes=planes,
        source=shape.source,
        device=device or weight.device,
        dtype=weight.dtype,
    )
    packed.train(module.training)
    return packed


def _conv1d(out_features: int, in_features: int) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(out_features, in_features)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    """By full name, by leading or trailing part ending at a dot, or by regular expression up to a dot."""
    return any(
        name == pattern or name.endswith("." + pattern) or re.match(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))", name)
        for pattern in patterns
    )


def _tied_modules(model: nn.Module) -> set[str]:
    pairs: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    return {name.rpartition(".")[0] for pair in pairs.items() for name in pair}


def _output_heads(model: nn.Module) -> set[str]:
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    return {name for name, module in model.named_modules() if head is not None and module is head}


def _last_module(model: nn.Module) -> str | None:
    """Module of the last parameter: the task head of classifiers, often not in the checkpoint at all."""
    names = [name for name, _ in model.named_parameters()]
    return names[-1].rpartition(".")[0] if names else None


def _fp32_modules(model: nn.Module) -> set[str]:
    return {
        name
        for key in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
        for name in getattr(model, key, None) or ()
    }


def _fused_experts(module: nn.Module) -> list[tuple[str, int]]:
    if "experts" not in type(module).__name__.lower():
        return []
    return [(name, p.numel()) for name, p in module._parameters.items() if p is not None and p.dim() == 3]


def _reader_of_weight(model: nn.Module, name: str) -> str | None:
    """Class name of a module above `name` whose code takes that layer's `.weight`, which a packed layer cannot give.

    Mamba mixers multiply by `self.x_proj.weight`, T5 casts activations to `self.wo.weight.dtype`, and so on.
    """
    parts = name.split(".")
    for depth in range(len(parts)):
        owner = model.get_submodule(".".join(parts[:depth]))
        if ".".join(parts[depth:]) in _weights_read_by(cast(Any, type(owner))):
            return type(owner).__name__
    return None


@functools.cache
def _weights_read_by(cls: Any) -> frozenset[str]:
    """Dotted paths P for which the class's code reads `self.P.weight`, outside of setup and but for its device."""
    paths: set[str] = set()
    for base in cls.__mro__:
        if base is nn.Module or base.__name__ == "PreTrainedModel":
            break  # what every model inherits computes nothing
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError, SyntaxError):
            continue  # no source at hand (an interactive class): nothing to read
        _collect_weight_reads(tree, paths)
    return frozenset(paths)


def _collect_weight_reads(node: ast.AST, paths: set[str]) -> None:
    if isinstance(node, ast.FunctionDef) and node.name in _SETUP_METHODS:
        return
    if isinstance(node, ast.Attribute):
        if node.attr == "device":  # harmless: a packed weight has a device too
            return
        path = _dotted(node)
        if path.startswith("self.") and path.endswith(".weight"):
            paths.add(path.removeprefix("self.").removesuffix(".weight"))
    for child in ast.iter_child_nodes(node):
        _collect_weight_reads(child, paths)


def _dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        owner = _dotted(node.value)
        return f"{owner}.{node.attr}" if owner else ""
    return node.id if isinstance(node, ast.Name) else ""
