"""What a module is to its model: a linear layer, the output head, tied to another, read by its owner's code."""

from __future__ import annotations

import ast
import functools
import inspect
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

# Methods in which a class may read a layer's ``.weight`` without computing with it.
_SETUP_METHODS = frozenset({"__init__", "_init_weights", "reset_parameters", "init_weights", "tie_weights"})

# Parts of multimodal models that see pixels or sound, and what ties them to the text: few weights, and sensitive ones.
TOWERS = frozenset(
    f"{part}_{kind}"
    for part in ("vision", "audio", "image", "speech")
    for kind in ("tower", "model", "encoder", "backbone", "adapter", "projection", "projector")
) | {"visual", "visual_projection", "multi_modal_projector", "mm_projector", "projector", "connector", "aligner"}
TOWERS |= {"embed_vision", "embed_audio"}


@dataclass(frozen=True)
class LinearShape:
    """A linear layer as its kind and sizes; an embedding counts as one with an output for each row."""

    in_features: int
    out_features: int
    bias: bool
    source: str  # "Linear", "Conv1D" or "Embedding"

    @property
    def weights(self) -> int:
        return self.in_features * self.out_features


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


def embedding_scale(module: nn.Module) -> float | None:
    """What an embedding multiplies its rows by: 1 for a plain one, None where its forward is something else.

    Known are ``nn.Embedding`` itself and subclasses whose forward is ``super().forward(ids) * self.embed_scale``, with
    the factor cast to the weight's dtype (Gemma) or one that every dtype holds exactly.
    """
    if type(module) is nn.Embedding:
        return 1.0
    if not isinstance(module, nn.Embedding):
        return None
    cast_first = _scales_by_factor(cast(Any, type(module)))
    if cast_first is None:
        return None
    # In a skeleton the buffer has no value; classes that keep the factor in one have it as a number too.
    factor = getattr(module, "scalar_embed_scale", None)
    factor = module.embed_scale if factor is None else factor
    if isinstance(factor, Tensor):
        factor = None if factor.is_meta else float(factor)
    if not isinstance(factor, (int, float)):
        return None
    halves = [torch.tensor(factor, dtype=dtype, device="cpu") for dtype in (torch.float16, torch.bfloat16)]
    exact = all(float(half) == factor for half in halves)
    return float(factor) if cast_first or exact else None


@functools.cache
def _scales_by_factor(cls: Any) -> bool | None:
    """Whether a class's forward is ``super().forward(x) * self.embed_scale``, with the factor cast to the weight's
    dtype (True) or as it is (False); None where it is anything else."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls.forward)))
    except (OSError, TypeError, SyntaxError):
        return None
    function = tree.body[0]
    assert isinstance(function, ast.FunctionDef)
    body = [statement for statement in function.body if not isinstance(statement, ast.Expr)]  # without a docstring
    if len(body) != 1 or not isinstance(body[0], ast.Return) or len(function.args.args) != 2:
        return None
    product, argument = ast.unparse(body[0]), function.args.args[1].arg
    plain = f"return super().forward({argument}) * self.embed_scale"
    return {plain: False, f"{plain}.to(self.weight.dtype)": True}.get(product)


def find_module(model: nn.Module, name: str) -> nn.Module | None:
    """The module of that full name, or None where the model has none."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a module is named, or one that it is part of: by full name, by leading or trailing part of whole words
    between dots, or by regular expression from the start up to a dot.

    So "mlp" names ``model.layers.0.mlp`` and all that is in it. Transformers' ``should_convert_module`` looks at the
    module's own name alone, where "mlp" leaves out nothing, and takes a trailing part within a word ("proj").
    """
    return any(
        f".{pattern}." in f".{name}." or re.match(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))", name) for pattern in patterns
    )


def tied_modules(model: nn.Module) -> set[str]:
    """Names of the modules that Transformers ties to another."""
    pairs: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    return {name.rpartition(".")[0] for pair in pairs.items() for name in pair}


def output_heads(model: nn.Module) -> set[str]:
    """Names of the model's output head (more than one where modules are shared)."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    return {name for name, module in model.named_modules() if head is not None and module is head}


def token_embedding(model: nn.Module) -> nn.Module | None:
    """The module that turns a model's token ids into vectors; None where it has none, or Transformers knows of none.

    What models that see or hear give in its place has no table of vectors: ViT's patches go through a convolution.
    """
    get = getattr(model, "get_input_embeddings", None)
    try:
        found = get() if callable(get) else None
    except NotImplementedError:  # CLIP, wav2vec2
        return None
    if isinstance(found, nn.Embedding):
        return found
    table = getattr(found, "weight", None)
    is_table = isinstance(table, Tensor) and table.dim() == 2 and linear_shape(cast(Any, found)) is None
    return found if isinstance(found, nn.Module) and is_table else None


def embedding_sizes(model: nn.Module) -> tuple[int, int]:
    """(rows, width) of a float model's token embedding; zeros where it has none."""
    weight: Any = getattr(token_embedding(model), "weight", None)
    return (0, 0) if weight is None else (int(weight.shape[0]), int(weight.shape[-1]))


def tower_modules(model: nn.Module) -> set[str]:
    """Names of the parts of a multimodal model that see pixels or sound; none in a model that reads no text."""
    config: Any = getattr(model, "config", None)
    if _main_input(model) != "input_ids" and not (
        hasattr(config, "get_text_config") and config.get_text_config() is not config
    ):
        return set()  # all of it sees them
    return {
        name
        for name, module in model.named_modules()
        if name and (name.rpartition(".")[2] in TOWERS or _main_input(module) in ("pixel_values", "input_features"))
    }


def _main_input(module: nn.Module) -> Any:
    return getattr(module, "main_input_name", "input_ids")


def fp32_modules(model: nn.Module) -> set[str]:
    """The model's own list of modules to keep in float32."""
    return {
        name
        for key in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
        for name in getattr(model, key, None) or ()
    }


def reader_of_weight(model: nn.Module, name: str) -> str | None:
    """Class name of a module above ``name`` whose code takes that layer's ``.weight``, which no packed layer can give.

    Mamba mixers multiply by ``self.x_proj.weight``, T5 casts activations to ``self.wo.weight.dtype``, and so on.
    """
    parts = name.split(".")
    for depth in range(len(parts)):
        owner = model.get_submodule(".".join(parts[:depth]))
        if ".".join(parts[depth:]) in _weights_read_by(cast(Any, type(owner))):
            return type(owner).__name__
    return None


@functools.cache
def _weights_read_by(cls: Any) -> frozenset[str]:
    """Dotted paths P for which the class's code reads ``self.P.weight``, outside of setup and but for its device."""
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
