"""Fused experts of mixture-of-experts models as linear layers, one for each matrix of each expert.

Transformers keeps the experts of a layer in two 3-D parameters and their checkpoints, for the most part, under a name
for each expert::

    in memory   experts.gate_up_proj (E, 2I, H)        experts.down_proj (E, H, I)
    in files    experts.0.gate_proj.weight (I, H)      experts.0.up_proj.weight     experts.0.down_proj.weight ...

``separate_experts`` puts a module in place whose layers have the names of the files. From there on an expert's
matrices are layers like any other: planned, calibrated on their own inputs, packed, saved and loaded under those
names, with kernels, adapters and the table of modules as they are. ``join_experts`` is the way back.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from hf_onebit.nn import grouped_experts
from hf_onebit.ops import gpu

_WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")
_BIASES = tuple(f"{name}_bias" for name in _WEIGHTS)
# Where a model's files hold experts fused, or Transformers knows of no files.
_DEFAULT_NAMES = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


@dataclass(frozen=True)
class FusedLayout:
    """How a module keeps its experts, and the names that their matrices get.

    Attributes:
        names: {"gate", "up", "down": name of the layer in an expert}; no "gate" where experts have none.
        merged: whether the model's checkpoints hold a tensor for each expert, under these names.
        concatenated: gate's outputs, then up's; else they alternate.
        transposed: (E, in, out) instead of (E, out, in).
        bias: whether layers have one.
    """

    names: Mapping[str, str]
    merged: bool
    concatenated: bool = True
    transposed: bool = False
    bias: bool = False

    def parts(self, parameter: str, fused: Tensor) -> dict[str, Tensor]:
        """{"gate.weight": (E, I, H), ...}: views of what one parameter of the fused module holds."""
        kind = "bias" if parameter.endswith("_bias") else "weight"
        if kind == "weight" and self.transposed:
            fused = fused.transpose(1, 2)
        if parameter.startswith("down"):
            return {f"down.{kind}": fused}
        if "gate" not in self.names:
            return {f"up.{kind}": fused}
        if self.concatenated:
            gate, up = fused.chunk(2, dim=1)
        else:
            gate, up = fused[:, ::2], fused[:, 1::2]
        return {f"gate.{kind}": gate, f"up.{kind}": up}

    def fuse(self, parameter: str, parts: Mapping[str, Tensor]) -> Tensor:
        """Undo :meth:`parts`."""
        kind = "bias" if parameter.endswith("_bias") else "weight"
        if parameter.startswith("down") or "gate" not in self.names:
            fused = parts[f"{'down' if parameter.startswith('down') else 'up'}.{kind}"]
        elif self.concatenated:
            fused = torch.cat([parts[f"gate.{kind}"], parts[f"up.{kind}"]], dim=1)
        else:
            fused = torch.stack([parts[f"gate.{kind}"], parts[f"up.{kind}"]], dim=2).flatten(1, 2)
        return fused.transpose(1, 2).contiguous() if kind == "weight" and self.transposed else fused


class SeparateExperts(nn.Module):
    """The experts of one layer: children "0", "1", ... with a linear layer for each of their matrices.

    Args:
        fused: the module that this one stands for. Its tensors are shared, not copied.
        layout: how it keeps them.
    """

    fused: Any

    def __init__(self, fused: nn.Module, layout: FusedLayout) -> None:
        super().__init__()
        self.layout = layout
        # Not a child: its parameters are this module's own.
        vars(self)["fused"] = fused
        self.num_experts = next(len(p) for p in fused.parameters(recurse=False))
        for name, child in fused.named_children():  # the activation
            self.add_module(name, child)
        stacked: dict[str, tuple[Tensor, bool]] = {}
        for name, parameter in fused.named_parameters(recurse=False):
            parts = layout.parts(name, parameter.detach())
            stacked |= {part: (tensor, parameter.requires_grad) for part, tensor in parts.items()}
        for number in range(self.num_experts):
            expert = nn.Module()
            for role, name in layout.names.items():
                weight, learns = stacked[f"{role}.weight"]
                with torch.device("meta"):
                    layer = nn.Linear(weight.shape[2], weight.shape[1], bias=layout.bias)
                layer.weight = nn.Parameter(weight[number], learns)
                if layout.bias:
                    bias, learns = stacked[f"{role}.bias"]
                    layer.bias = nn.Parameter(bias[number], learns)
                expert.add_module(name, layer)
            self.add_module(str(number), expert)
        self._memory: grouped_experts.Memory = {}
        self.train(fused.training)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_memory": {}}

    @property
    def shared_inputs(self) -> frozenset[str]:
        """Names of the layers that read the hidden states, as those of the other experts do."""
        return frozenset(name for role, name in self.layout.names.items() if role != "down")

    def place_of(self, layer: str) -> tuple[str, str]:
        """(parameter of the fused module, part of it as of :meth:`FusedLayout.parts`) that holds a layer's weights."""
        (role,) = (role for role, name in self.layout.names.items() if name == layer)
        (parameter,) = (p for p in _WEIGHTS if p in self.fused._parameters and role in _roles_of(p, self.layout))
        return parameter, f"{role}.weight"

    # Which experts run depends on the data, so there is one graph for each side of this call.
    @torch.compiler.disable
    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Weighted sums of the outputs of each token's experts.

        Args:
            hidden_states: (tokens, hidden) floating point.
            top_k_index: (tokens, k) int64, the experts of each token; the number of experts stands for none.
            top_k_weights: (tokens, k).

        Returns:
            (tokens, hidden) in the dtype of ``hidden_states``.
        """
        if gpu.serves(hidden_states):
            each = [self._modules[str(number)]._modules for number in range(self.num_experts)]  # type: ignore[union-attr]
            roles = {role: [layers[name] for layers in each] for role, name in self.layout.names.items()}
            held = cast("list[list[nn.Module]]", list(roles.values()))
            if taken := grouped_experts.takes(hidden_states, top_k_index, held, self._memory):
                found = dict(zip(roles, taken, strict=True))
                down, up = found.pop("down"), list(found.values())
                return grouped_experts.run(hidden_states, top_k_index, top_k_weights, up, self._between, down)
        result = torch.zeros_like(hidden_states)
        for number in top_k_index.unique().tolist():
            if not 0 <= number < self.num_experts:
                continue
            tokens, slots = torch.where(top_k_index == number)
            outputs = self._expert(number, hidden_states[tokens]) * top_k_weights[tokens, slots, None]
            result.index_add_(0, tokens, outputs.to(result.dtype))
        return result

    def _expert(self, number: int, x: Tensor) -> Tensor:
        ups = [self._held(number, role)(x) for role in self.layout.names if role != "down"]
        y: Tensor = self._held(number, "down")(self._between(ups))
        return y

    def _held(self, number: int, role: str) -> nn.Module:
        layers = self._modules[str(number)]
        assert layers is not None
        layer: nn.Module = getattr(layers, self.layout.names[role])
        return layer

    def _between(self, ups: Sequence[Tensor]) -> Tensor:
        """What the last layer reads, of gate's and up's outputs, or of up's."""
        inner: Tensor
        if "gate" not in self.layout.names:
            inner = self.fused.act_fn(ups[0])
        else:
            both = list(ups)
            fused = torch.cat(both, -1) if self.layout.concatenated else torch.stack(both, -1).flatten(-2)
            inner = self.fused._apply_gate(fused)
        return inner

    def release(self) -> None:
        """Let go of the fused tensors: what is still needed of them is copied, the rest is freed."""
        owners = self._storages()
        for parameter in self.parameters():
            if not parameter.is_meta and parameter.untyped_storage().data_ptr() in owners:
                parameter.data = parameter.data.clone()
        for name, parameter in self.fused._parameters.items():
            assert parameter is not None
            self.fused._parameters[name] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)

    def _storages(self) -> set[int]:
        """Where the fused tensors are."""
        return {p.untyped_storage().data_ptr() for p in self.fused.parameters(recurse=False) if not p.is_meta}

    def joined(self) -> nn.Module:
        """The fused module again, of the float layers as they are now.

        Raises:
            ValueError: a layer is packed.
        """
        fused: nn.Module = copy.copy(self.fused)
        fused._parameters = dict(self.fused._parameters)
        fused.train(self.training)
        roles = {role: [self._layer(number, role) for number in range(self.num_experts)] for role in self.layout.names}
        for name, old in self.fused._parameters.items():
            assert old is not None
            kind = "bias" if name.endswith("_bias") else "weight"
            parts = {
                f"{role}.{kind}": torch.stack([cast(Tensor, getattr(layer, kind)).detach() for layer in layers])
                for role, layers in roles.items()
                if role in _roles_of(name, self.layout)
            }
            fused._parameters[name] = nn.Parameter(self.layout.fuse(name, parts), old.requires_grad)
        return fused

    def _layer(self, number: int, role: str) -> nn.Module:
        layer = self.get_submodule(f"{number}.{self.layout.names[role]}")
        if type(layer) is not nn.Linear:
            raise ValueError(f"Expert {number} holds a {type(layer).__name__}: dequantize it before experts are joined")
        return layer

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, layers={list(self.layout.names.values())}"


def fused_experts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of each module that keeps experts in 3-D parameters."""
    for name, module in model.named_modules():
        named = "experts" in type(module).__name__.lower() and not isinstance(module, SeparateExperts)
        if named and any(p is not None and p.dim() == 3 for p in module._parameters.values()):
            yield name, module


def separated(model: nn.Module) -> dict[str, SeparateExperts]:
    """Separate experts by full name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SeparateExperts)}


def layout_of(model: nn.Module, name: str, fused: nn.Module) -> FusedLayout | str:
    """How a module keeps its experts, or in a few words why that is not known.

    Args:
        model: the whole model, whose checkpoints' names are asked for.
        name: the module's full name.
        fused: the module.
    """
    if not hasattr(fused, "has_gate") or not hasattr(fused, "is_transposed"):
        return "fused experts with a forward of their own"
    if getattr(fused, "has_post_expert_norm", False):
        return "fused experts with a norm of their own"
    weights = {"gate_up_proj" if fused.has_gate else "up_proj", "down_proj"}
    expected = weights | ({f"{weight}_bias" for weight in weights} if fused.has_bias else set())
    if set(fused._parameters) != expected or any(fused._buffers):
        return "fused experts with parameters of their own"
    names, merged = dict(_DEFAULT_NAMES), []
    if not fused.has_gate:
        del names["gate"]
    for parameter in sorted(weights):
        stored = _stored_names(model, f"{name}.{parameter}")
        if stored is None:
            return "fused experts whose checkpoints are laid out in a way of their own"
        roles = _roles_of(parameter, FusedLayout(names, False))
        if stored:
            if len(stored) != len(roles):
                return "fused experts whose checkpoints are laid out in a way of their own"
            names |= dict(zip(roles, stored, strict=True))
        merged.append(bool(stored))
    if len(set(merged)) > 1:
        return "fused experts whose checkpoints are laid out in a way of their own"
    return FusedLayout(names, merged[0], bool(fused.is_concatenated), bool(fused.is_transposed), bool(fused.has_bias))


def separate_experts(model: nn.Module) -> list[str]:
    """Put ``SeparateExperts`` in the place of every module of fused experts whose layout is known.

    Args:
        model: changed in place, on any device, meta included; it computes what it did to rounding, and its tensors
            stay where they are.

    Returns:
        Names of the modules.
    """
    found = [(name, module, layout_of(model, name, module)) for name, module in fused_experts(model)]
    replaced = []
    for name, module, layout in found:
        if isinstance(layout, FusedLayout) and name:
            model.set_submodule(name, SeparateExperts(module, layout))
            replaced.append(name)
    return replaced


def join_experts(model: nn.Module) -> None:
    """Undo :func:`separate_experts` where all layers are float.

    A model that was separated and not changed since gets its own tensors back; else they are made of the layers.
    """
    for name, module in separated(model).items():
        if any(type(layer) is not nn.Linear for layer in _layers(module)):
            continue
        model.set_submodule(name, module.fused if _unchanged(module) else module.joined())


def release_experts(model: nn.Module) -> None:
    """:meth:`SeparateExperts.release` of all of them: there is no way back to the float tensors from then on."""
    for module in separated(model).values():
        module.release()


def merging_conversions(modules: Iterable[str], conversions: list[Any]) -> list[Any]:
    """Those of a model's weight conversions that fuse the experts of these modules, by name, while they load."""
    keys = [f"{name}.{parameter}" for name in modules for parameter in (*_WEIGHTS, *_BIASES)]
    return [c for c in conversions if any(_fills(c, key) for key in keys)]


def _unchanged(module: SeparateExperts) -> bool:
    """Whether the layers still are views of the fused tensors."""
    first = next(iter(module.fused.parameters(recurse=False)))
    if first.is_meta:
        return all(p.is_meta for p in module.parameters())
    owners = module._storages()
    return all(p.untyped_storage().data_ptr() in owners for layer in _layers(module) for p in layer.parameters())


def _layers(module: SeparateExperts) -> list[nn.Module]:
    names = module.layout.names.values()
    return [module.get_submodule(f"{number}.{name}") for number in range(module.num_experts) for name in names]


def _roles_of(parameter: str, layout: FusedLayout) -> tuple[str, ...]:
    if parameter.startswith("down"):
        return ("down",)
    return ("gate", "up") if "gate" in layout.names else ("up",)


def _stored_names(model: nn.Module, key: str) -> tuple[str, ...] | None:
    """Names of an expert's layers in the files that a fused parameter is made of, in its order; empty where the files
    hold it fused, None where they hold it otherwise."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    conversions: Any = get_model_conversion_mapping(cast(Any, model), add_legacy=False)
    filling = [c for c in conversions if isinstance(c, WeightConverter) and _fills(c, key)]
    if not filling:
        return ()
    if len(filling) > 1:
        return None
    sources, kinds = filling[0].source_patterns, [type(op).__name__ for op in filling[0].operations]
    if kinds in (["MergeModulelist"], ["MergeModulelist", "Concatenate"]):
        names = [re.search(r"\*\.(\w+)\.weight$", source) for source in sources]
        return tuple(name[1] for name in names if name) if all(names) else None
    return () if len(sources) == 1 and "*" not in sources[0] else None


def _fills(conversion: Any, key: str) -> bool:
    """Whether a conversion makes the parameter of that name."""
    if not hasattr(conversion, "operations"):
        return False
    try:
        reverse = copy.deepcopy(conversion).reverse_transform()
    except (NotImplementedError, AttributeError, ValueError):
        return False
    return reverse.rename_source_key(key)[1] is not None
