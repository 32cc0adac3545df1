"""What stands in for methods of Transformers' models beside packed layers: resizing the vocabulary, ``dtype``,
``num_parameters``."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from hf_onebit.nn.replace import PACKED, PackedModule
from hf_onebit.nn.roles import output_heads, token_embedding


def guard_resizing(model: Any) -> None:
    """Resizing changes the embedding first and the output head second, and neither works where it is packed."""
    if any(_packed_ends(model)):
        # Not a bound method: that is pickled by its name, and would come back as the class's own.
        model.resize_token_embeddings = functools.partial(resize_token_embeddings, model)


def resize_token_embeddings(model: Any, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> Any:
    """Stands in for the model's method while its output head or its embedding is packed: refuses before anything is
    changed.

    Raises:
        ValueError: always when a size is given, naming the remedy.
    """
    if new_num_tokens is None and not args and not kwargs.get("pad_to_multiple_of"):
        return model.get_input_embeddings()
    head, embedding = _packed_ends(model)
    what = "output head and the embedding are" if head and embedding else f"{'output head' if head else 'embedding'} is"
    raise ValueError(
        f"Cannot resize the token embeddings to {new_num_tokens}: the {what} packed, and packed weights have no rows "
        "to add. Resize the float model before quantizing it, or keep head and embedding in floating point (leave "
        "lm_head_bits=None, embedding_bits=None and modules_to_not_convert=None), or call model.dequantize() first"
    )


def _packed_ends(model: Any) -> tuple[bool, bool]:
    """Whether the output head is packed, and whether the token embedding is."""
    heads = [model.get_submodule(name) for name in output_heads(model)]
    return any(isinstance(head, PACKED) for head in heads), isinstance(token_embedding(model), PACKED)


def adapt_models() -> None:
    """Replace what all models inherit, where it is wrong beside packed layers. Calling it again is fine."""
    follow_dtype_beside_packed()
    count_packed_weights()


def follow_dtype_beside_packed() -> None:
    """Make ``model.dtype`` pass over the float16 scales of packed modules. Calling it again is fine.

    Transformers takes the first float parameter's dtype for the model's, and saves it in config.json: with a packed
    embedding that would be a scale, and a bfloat16 model would be loaded in float16 the next time.
    """
    from transformers.modeling_utils import ModuleUtilsMixin  # large: not before someone needs it

    original: Any = ModuleUtilsMixin.dtype
    if getattr(original.fget, "passes_over_scales", False):
        return

    def dtype(self: Any) -> torch.dtype:
        for module in self.modules():
            scales = module.scale_names if isinstance(module, PACKED) else ()
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.is_floating_point() and name not in scales:
                    found: torch.dtype = parameter.dtype
                    return found
        result: torch.dtype = original.fget(self)
        return result

    dtype.__doc__ = original.__doc__
    dtype.passes_over_scales = True  # type: ignore[attr-defined]
    ModuleUtilsMixin.dtype = property(dtype)  # type: ignore[method-assign,assignment]


def count_packed_weights() -> None:
    """Make ``model.num_parameters()`` count packed weights, not the words that hold them. Calling it again is fine.

    Transformers counts the numbers in each parameter, and those of bitsandbytes for what they hold. Frozen scales and
    orders of inputs are part of how packed weights are stored: they count where they learn.
    """
    from transformers.modeling_utils import ModuleUtilsMixin

    original: Any = ModuleUtilsMixin.num_parameters
    if getattr(original, "counts_packed_weights", False):
        return

    @functools.wraps(original)
    def num_parameters(self: Any, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        total: int = original(self, only_trainable, exclude_embeddings)
        seen = set()
        for module in self.modules():
            if not isinstance(module, PACKED):
                continue
            left_out = exclude_embeddings and isinstance(module, nn.Embedding)
            for name, parameter in module._parameters.items():
                if parameter is None or name == "bias" or id(parameter) in seen:
                    continue
                seen.add(id(parameter))
                if parameter.requires_grad or not only_trainable:
                    total -= 0 if left_out and name == "weight" else parameter.numel()
                    total += 0 if left_out else _weights_in(module, name, parameter)
        return total

    num_parameters.counts_packed_weights = True  # type: ignore[attr-defined]
    ModuleUtilsMixin.num_parameters = num_parameters  # type: ignore[method-assign]


def _weights_in(module: PackedModule, name: str, parameter: Tensor) -> int:
    """What a parameter of a packed module counts for: its weights are those of ``weight``, with all its planes."""
    if name != "weight":
        return parameter.numel() if parameter.requires_grad and name not in module.packed_names else 0
    if isinstance(module, nn.Embedding):
        return module.num_embeddings * module.embedding_dim
    return module.in_features * module.out_features
