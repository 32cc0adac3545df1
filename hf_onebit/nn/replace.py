"""Which layers of a model are packed and which stay float, with the reason; and swapping one kind for the other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_onebit.argument_checks import require_module
from hf_onebit.formats import onebit as fmt
from hf_onebit.formats.table import TableEntry
from hf_onebit.nn.experts import fused_experts, join_experts, layout_of
from hf_onebit.nn.heads import HeadPlan, restore_tie
from hf_onebit.nn.linear import OneBitLinear
from hf_onebit.nn.mbwq import MBWQLinear
from hf_onebit.nn.mpq import MPQEmbedding, MPQLinear
from hf_onebit.nn.roles import (
    LinearShape,
    embedding_scale,
    find_module,
    fp32_modules,
    linear_shape,
    matches,
    output_heads,
    reader_of_weight,
    tied_modules,
    tower_modules,
)

PackedModule = OneBitLinear | MPQLinear | MBWQLinear | MPQEmbedding
"""The modules that hold packed weights."""
PACKED = (OneBitLinear, MPQLinear, MBWQLinear, MPQEmbedding)


@dataclass(frozen=True)
class Skipped:
    """A layer left in floating point."""

    reason: str
    weights: int
    is_head: bool = False


@dataclass
class LayerPlan:
    """Names of the layers to pack, and of those that stay float with the reason; head and embedding apart.

    ``planes`` has the sign matrices of each selected onebit layer, once they are decided; ``entries``, how each layer
    of another method is packed.
    """

    selected: dict[str, LinearShape] = field(default_factory=dict)
    planes: dict[str, int] = field(default_factory=dict)
    entries: dict[str, TableEntry] = field(default_factory=dict)
    skipped: dict[str, Skipped] = field(default_factory=dict)
    heads: HeadPlan = field(default_factory=HeadPlan)

    def has_entry(self, name: str) -> bool:
        """Whether it is known how a selected layer is packed; automatic bits are chosen later."""
        return name in self.entries or name in self.planes

    def entry(self, name: str) -> TableEntry:
        """How a selected layer is packed."""
        return self.entries[name] if name in self.entries else TableEntry(planes=self.planes[name])

    @property
    def coverage(self) -> float:
        """Share of the weights in linear layers and experts, output head excepted, that are to be packed (0 to 1)."""
        packed = sum(shape.weights for shape in self.selected.values())
        left = sum(skipped.weights for skipped in self.skipped.values() if not skipped.is_head)
        return packed / (packed + left) if packed + left else 0.0


def find_layers(
    model: nn.Module, modules_to_not_convert: Sequence[str] | None = None, heads: HeadPlan | None = None
) -> LayerPlan:
    """Sort the linear layers of a float model (on any device, meta included) into packed ones and ones that stay.

    Experts count where they are separate (nn/experts.py).

    Args:
        model: the model; Transformers' attributes on it (tied weights, output head, float32 modules) are honoured.
        modules_to_not_convert: see ``OneBitConfig``.
        heads: what ``plan_heads`` decided; those modules are no part of what is sorted here.

    Returns:
        The plan, in the model's order of layers.

    Raises:
        TypeError: the model is no module.
    """
    require_module("find_layers", model)
    plan = LayerPlan(heads=heads or HeadPlan())
    tied = tied_modules(model)
    output = output_heads(model)
    last = _last_module(model)
    fp32 = tuple(fp32_modules(model))
    towers = tower_modules(model)
    names_of = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    uses_of = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    experts = {name: _fused_experts(model, name, module) for name, module in fused_experts(model)}
    for name, module in model.named_modules():
        plan.skipped |= experts.get(name, {})
        shape = linear_shape(module)
        if shape is None or name in plan.heads.entries:
            continue
        is_head = name in output
        reason = None
        if plan.heads.untied and name == plan.heads.head:
            reason = "output head"  # no longer tied, and meant to stay float as before
        elif name in tied or names_of[id(module)] > 1 or uses_of[id(module.weight)] > 1:
            reason = "shares its weight with another module (tied)"
        elif shape.in_features < fmt.MIN_IN_FEATURES:
            reason = f"has fewer than {fmt.MIN_IN_FEATURES} inputs"
        elif matches(name, fp32):
            reason = "kept in float32 by the model's own list"
        elif reader := reader_of_weight(model, name):
            reason = f"{reader} reads its .weight directly"
        elif modules_to_not_convert is None:
            if is_head:
                reason = "output head"
            elif name == last:
                reason = "last layer of the model"
            elif any(name == tower or name.startswith(f"{tower}.") for tower in towers):
                reason = "part of a vision or audio tower"
        elif matches(name, modules_to_not_convert):
            reason = "listed in modules_to_not_convert"
        if reason is None:
            plan.selected[name] = shape
        else:
            plan.skipped[name] = Skipped(reason, shape.weights, is_head)
    return plan


def unmatched_patterns(model: nn.Module, plan: LayerPlan, modules_to_not_convert: Sequence[str] | None) -> list[str]:
    """Entries of ``modules_to_not_convert`` that leave out nothing that could be packed: most likely typing errors."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Embedding)]
    names += [*plan.selected, *plan.skipped, *plan.heads.entries]
    return [p for p in modules_to_not_convert or () if not any(matches(name, [p]) for name in names)]


def named_planes(layers: Iterable[str], planes_per_layer: Mapping[str, int] | None) -> tuple[dict[str, int], list[str]]:
    """What ``OneBitConfig.planes_per_layer`` says of some layers: of the entries that match one, the first counts.

    Returns:
        {layer: planes} of the layers that an entry matches, and the entries that match none: most likely typing errors.
    """
    entries, layers = dict(planes_per_layer or {}), list(layers)
    hits = {name: [pattern for pattern in entries if matches(name, [pattern])] for name in layers}
    used = {pattern for patterns in hits.values() for pattern in patterns}
    named = {name: entries[patterns[0]] for name, patterns in hits.items() if patterns}
    return named, [pattern for pattern in entries if pattern not in used]


def float_weight(module: nn.Module, weight: Tensor | None = None) -> Tensor:
    """The weight of a plain linear layer or embedding as (out_features, in_features), whatever its class stores.

    Args:
        module: an ``nn.Linear``, a ``Conv1D``, an ``nn.Embedding``, or the packed module that stands for one.
        weight: the weight to orient, where it is not the module's own.
    """
    shape = linear_shape(module)
    source = shape.source if shape else getattr(module, "source", "Linear")
    value = module.weight if weight is None else weight
    assert isinstance(value, Tensor)
    return value.detach().t() if source == "Conv1D" else value.detach()


def module_shape(module: nn.Module) -> LinearShape | None:
    """Sizes of a plain float linear layer or embedding, or of a packed module; None for any other module."""
    if isinstance(module, nn.Embedding):
        return LinearShape(module.embedding_dim, module.num_embeddings, False, "Embedding")
    if isinstance(module, (OneBitLinear, MPQLinear, MBWQLinear)):
        return LinearShape(module.in_features, module.out_features, module.bias is not None, module.source)
    return linear_shape(module)


def entry_of(module: PackedModule) -> TableEntry:
    """What the table of config.json says of a packed module, its tie apart."""
    if isinstance(module, OneBitLinear):
        return TableEntry(planes=module.planes)
    shape = module_shape(module)
    assert shape is not None
    about: dict[str, Any] = {"bits": module.bits, "group_size": module.group_size, "symmetric": module.symmetric}
    about["in_features"] = shape.in_features
    if isinstance(module, MPQEmbedding):
        about["kind"] = "embedding"
    elif isinstance(module, MBWQLinear):
        about |= {"q_perm": module.q_perm is not None, "blocks": module.blocks if len(module.blocks) > 1 else None}
    else:
        about["g_idx"] = module.g_idx is not None
    return TableEntry("mpq", **about)


def packed_specs(module: PackedModule) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of a module's packed tensors, by name."""
    shape = module_shape(module)
    assert shape is not None
    return entry_of(module).tensor_specs(shape.in_features, shape.out_features)


def replace_layers(model: nn.Module, layers: Mapping[str, TableEntry | int]) -> None:
    """Swap float modules for empty packed ones on the same device; nothing of the float weights is kept but the bias.

    Args:
        model: changed in place.
        layers: module name -> entry of the table, or the number of planes of a onebit layer.

    Raises:
        TypeError: the model is no module.
        ValueError: a name is not a plain linear layer, or embedding, of the model.
    """
    require_module("replace_layers", model)
    for name, layer in layers.items():
        entry = TableEntry(planes=layer) if isinstance(layer, int) else layer
        module = find_module(model, name)
        fits = module is not None and _stands_for(entry, module)
        if module is None or not fits:
            found = "nothing" if module is None else f"a {type(module).__name__}"
            what = "a token embedding" if entry.kind == "embedding" else "a linear layer"
            raise ValueError(
                f"Cannot pack {name!r}: expected {what} of that name in {type(model).__name__}, found {found}. "
                "The config's table of modules belongs to another model."
            )
        model.set_submodule(name, _empty_packed(module, entry))


def set_packed(
    model: nn.Module, name: str, tensors: Mapping[str, Tensor], entry: TableEntry | None = None
) -> PackedModule:
    """Swap one float module for a packed one of ``tensors`` (names of docs/formats.md) and the float layer's bias.

    Args:
        model: changed in place.
        name: the module's full name.
        tensors: the packed tensors.
        entry: how they are packed; onebit with as many planes as there are tensors for, if None.
    """
    module = model.get_submodule(name)
    shape = module_shape(module)
    assert shape is not None
    if entry is None:
        entry = TableEntry(planes=sum(plane_name in tensors for plane_name in ("weight", "weight_1")))
    entry.validate_tensors(tensors, shape.in_features, shape.out_features, name)
    assert isinstance(module.weight, Tensor)
    device = module.weight.device
    packed = _empty_packed(module, entry, device="meta")
    for tensor_name, tensor in tensors.items():
        setattr(packed, tensor_name, nn.Parameter(tensor.to(device), requires_grad=False))
    if shape.bias:
        packed.bias = module.bias
    for parameter in packed.parameters():
        parameter.__dict__["_is_hf_initialized"] = True  # as Transformers marks what it loaded
    packed.train(module.training)
    model.set_submodule(name, packed)
    return packed


def dequantize_layers(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Swap every packed module for the float one it stands for, in place (GPT-2's ``Conv1D`` included).

    Args:
        model: changed in place, and returned.
        dtype: dtype of the new weights and biases.

    Raises:
        TypeError: the model is no module.
    """
    require_module("dequantize_layers", model)
    for name, layer in packed_layers(model).items():
        float_layer, weight = _empty_float(layer), layer.dequantize(dtype)
        if isinstance(layer, MPQEmbedding) and layer.embed_scale is not None and type(float_layer) is nn.Embedding:
            weight = weight * layer.embed_scale  # it stood for no class of a model, so none can multiply later
        transposed = getattr(layer, "source", "") == "Conv1D"
        float_layer.weight = nn.Parameter(weight.t().contiguous() if transposed else weight)
        if not isinstance(layer, MPQEmbedding):
            float_layer.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().to(dtype))
        float_layer.train(layer.training)
        model.set_submodule(name, float_layer)
    join_experts(model)
    restore_tie(model)
    return model


def packed_layers(model: nn.Module) -> dict[str, PackedModule]:
    """Packed modules by full name, in the model's order: linear layers, and the embedding where it is packed.

    Raises:
        TypeError: the model is no module.
    """
    require_module("packed_layers", model)
    return {name: module for name, module in model.named_modules() if isinstance(module, PACKED)}


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


def _stands_for(entry: TableEntry, module: nn.Module) -> bool:
    if entry.kind == "embedding":
        return isinstance(module, nn.Embedding) and embedding_scale(module) is not None
    return linear_shape(module) is not None


def _empty_packed(module: nn.Module, entry: TableEntry, device: str | None = None) -> PackedModule:
    weight, shape = module.weight, module_shape(module)
    assert isinstance(weight, Tensor)
    assert shape is not None
    place: dict[str, Any] = {"device": device or weight.device, "dtype": weight.dtype}
    groups: dict[str, Any] = {"bits": entry.bits, "group_size": entry.group_size, "symmetric": entry.symmetric}
    packed: PackedModule
    if isinstance(module, nn.Embedding):
        scale = None if type(module) is nn.Embedding else embedding_scale(module)
        rows, columns, padding = module.num_embeddings, module.embedding_dim, module.padding_idx
        packed = MPQEmbedding(rows, columns, padding, embed_scale=scale, **groups, **place)
        vars(packed)["float_class"] = type(module)
    else:
        ins, outs, bias, source = shape.in_features, shape.out_features, shape.bias, shape.source
        if entry.in_blocks:
            order: dict[str, Any] = {
                "blocks": entry.row_blocks(ins),
                "symmetric": entry.symmetric,
                "q_perm": entry.q_perm,
            }
            packed = MBWQLinear(ins, outs, bias, source=source, **order, **place)
        elif entry.method == "mpq":
            packed = MPQLinear(ins, outs, bias, g_idx=entry.g_idx, source=source, **groups, **place)
        else:
            packed = OneBitLinear(ins, outs, bias, planes=entry.planes, source=source, **place)
    packed.train(module.training)
    return packed


def _empty_float(layer: PackedModule) -> nn.Module:
    """The float module that a packed one stands for, its weight and bias still on the meta device."""
    if isinstance(layer, MPQEmbedding):
        return _empty_embedding(layer)
    with torch.device("meta"):
        if layer.source == "Conv1D":
            return _conv1d(layer.out_features, layer.in_features)
        return nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)


def _empty_embedding(layer: MPQEmbedding) -> nn.Embedding:
    cls = getattr(layer, "float_class", None)
    if layer.embed_scale is None or cls is None:
        with torch.device("meta"):
            return nn.Embedding(layer.num_embeddings, layer.embedding_dim, layer.padding_idx)
    # One row, since its class may keep the factor in a buffer, which must not be on the meta device.
    module: nn.Embedding = cls(1, layer.embedding_dim, None, embed_scale=layer.embed_scale)
    module.num_embeddings, module.padding_idx = layer.num_embeddings, layer.padding_idx
    return module.to(layer.weight.device)


def _conv1d(out_features: int, in_features: int) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(out_features, in_features)


def _last_module(model: nn.Module) -> str | None:
    """Module of the last parameter: the task head of classifiers, often not in the checkpoint at all."""
    names = [name for name, _ in model.named_parameters()]
    return names[-1].rpartition(".")[0] if names else None


def _fused_experts(model: nn.Module, name: str, module: nn.Module) -> dict[str, Skipped]:
    layout = layout_of(model, name, module)
    why = layout if isinstance(layout, str) else "fused experts that were not separated"
    return {
        f"{name}.{parameter}" if name else parameter: Skipped(f"{why} are left in floating point", p.numel())
        for parameter, p in module._parameters.items()
        if p is not None and p.dim() == 3
    }
