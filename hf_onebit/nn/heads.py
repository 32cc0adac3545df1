"""The output head and the token embedding: whether they can be packed, and what becomes of the tie between them.

A tie has one of three fates. Packed alike, head and embedding stay tied and share one set of packed tensors
(``keep_tie``). Packed differently, or only one of them, each gets its own (``undo_tie``). Anything that would have to
guess is refused by name: who asks for a packed head must not get a float one.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from hf_onebit.formats import onebit as fmt
from hf_onebit.formats.table import TableEntry
from hf_onebit.nn.roles import (
    LinearShape,
    embedding_scale,
    fp32_modules,
    linear_shape,
    matches,
    output_heads,
    reader_of_weight,
    token_embedding,
)


@dataclass
class HeadPlan:
    """What is packed of head and embedding, and how.

    Attributes:
        entries: the table's entry of each packed module by name; the head's says where it is ``tied_to``.
        shapes: their sizes; an embedding counts as the layer (inputs = its width, outputs = its rows).
        head, embedding: names of the two in the model, None where it has no such module.
        untied: the model ties the two, and they cannot stay so.
        why: the reason for ``untied`` in a few words.
    """

    entries: dict[str, TableEntry] = field(default_factory=dict)
    shapes: dict[str, LinearShape] = field(default_factory=dict)
    head: str | None = None
    embedding: str | None = None
    untied: bool = False
    why: str = ""

    @property
    def tied(self) -> bool:
        """Whether head and embedding are packed as one."""
        return any(entry.tied_to is not None for entry in self.entries.values())

    @property
    def weights(self) -> int:
        """Weights of the float model that are packed here; a tied matrix counts once, and so does one untied now."""
        if self.tied or (self.untied and len(self.shapes) == 2):
            return max(shape.weights for shape in self.shapes.values())
        if self.untied:
            return 0  # the other one, which stays float, is the same matrix
        return sum(shape.weights for shape in self.shapes.values())


def plan_heads(
    model: nn.Module,
    lm_head_bits: int | None,
    embedding_bits: int | None,
    group_size: int = 64,
    modules_to_not_convert: Sequence[str] | None = None,
) -> HeadPlan:
    """Decide how head and embedding of a float model (on any device, meta included) are packed.

    Args:
        model: a Transformers model.
        lm_head_bits, embedding_bits: bits of each, None to leave it in floating point.
        group_size: inputs that share a scale.
        modules_to_not_convert: see ``OneBitConfig``; may name neither of the two that is to be packed.

    Raises:
        ValueError: one of the two was asked for and cannot be packed, with the reason and the remedy.
    """
    plan = HeadPlan()
    if lm_head_bits is None and embedding_bits is None:
        return plan
    plan.head = next(iter(sorted(output_heads(model))), None)
    plan.embedding = _name_of(model, token_embedding(model))
    wanted = (("lm_head_bits", lm_head_bits, plan.head), ("embedding_bits", embedding_bits, plan.embedding))
    for option, bits, name in wanted:
        if bits is None:
            continue
        shape = _checked_shape(model, option, name, modules_to_not_convert)
        assert name is not None
        kind = "linear" if option == "lm_head_bits" else "embedding"
        entry = TableEntry("mpq", bits, group_size=group_size, in_features=shape.in_features, kind=kind)
        plan.entries[name], plan.shapes[name] = entry, shape
    _decide_tie(model, plan)
    return plan


def keep_tie(model: nn.Module, head: str, embedding: str, names: Sequence[str]) -> None:
    """Tell Transformers that head and embedding share all of their packed tensors, and make it so.

    ``tie_weights`` then ties them after a load, and ``save_pretrained`` stores them once, under the embedding's name.

    Args:
        model: head and embedding are packed already.
        head, embedding: their names in the model.
        names: the packed tensors, ``TableEntry.tensor_names``.
    """
    source, target = model.get_submodule(embedding), model.get_submodule(head)
    pairs = {f"{head}.{name}": f"{embedding}.{name}" for name in names}
    # The class's own attribute names the weight alone. Transformers asks the instance first.
    model._tied_weights_keys = {**_own_keys(model), **pairs}  # type: ignore[assignment]
    model.all_tied_weights_keys = {**_tied_keys(model), **pairs}  # type: ignore[assignment]
    for name in names:
        setattr(target, name, getattr(source, name))


def undo_tie(model: nn.Module) -> None:
    """Tell Transformers that nothing is tied in this model, in its config too, where ``save_pretrained`` stores it."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if getattr(config, "tie_word_embeddings", False) and hasattr(module, "all_tied_weights_keys"):
            config.tie_word_embeddings = False  # type: ignore[union-attr]
            text = config.get_text_config()  # type: ignore[union-attr]
            if getattr(text, "tie_word_embeddings", False):
                text.tie_word_embeddings = False
        if hasattr(module, "all_tied_weights_keys"):
            module.all_tied_weights_keys = {}  # type: ignore[assignment]


def restore_tie(model: nn.Module) -> None:
    """After dequantizing: tied modules share their float weight, and Transformers' own table of ties holds again."""
    if "_tied_weights_keys" not in vars(model):
        return
    del model._tied_weights_keys
    kept = {}
    for target, source in _tied_keys(model).items():
        owner, _, name = target.rpartition(".")
        from_owner, _, from_name = source.rpartition(".")
        if name == "weight":
            setattr(model.get_submodule(owner), name, getattr(model.get_submodule(from_owner), from_name))
        if getattr(model.get_submodule(owner), name, None) is not None:
            kept[target] = source
    model.all_tied_weights_keys = kept  # type: ignore[assignment]


def tied_alone(model: nn.Module, table: Mapping[str, TableEntry]) -> tuple[str, str] | None:
    """A pair of modules that the model's config ties although the table does not pack them as one; else None.

    Tying them would put packed words where floats belong, or one's words in the other's place.

    Args:
        model: before its weights are loaded.
        table: {module name in the model: entry}.
    """
    for target, source in _tied_keys(model).items():
        pair = target.rpartition(".")[0], source.rpartition(".")[0]
        entries = [table.get(name) for name in pair]
        tied = any(entry is not None and entry.tied_to is not None for entry in entries)
        if any(entries) and not tied:
            return pair
    return None


def _decide_tie(model: nn.Module, plan: HeadPlan) -> None:
    pair = {f"{plan.head}.weight", f"{plan.embedding}.weight"}
    keys = _tied_keys(model)
    others = {target: source for target, source in keys.items() if {target, source} != pair}
    for name in plan.entries:
        partner = [k for item in others.items() for k in item if f"{name}.weight" in item and k != f"{name}.weight"]
        if partner:
            raise ValueError(
                f"{name} of {type(model).__name__} cannot be packed: its weight is shared with {partner[0]} too, which "
                "is neither the head nor the embedding. Leave it in floating point"
            )
    if len(others) == len(keys):
        return  # head and embedding are not tied
    assert plan.head is not None and plan.embedding is not None  # noqa: PT018  both are in the pair
    head, embedding = plan.entries.get(plan.head), plan.entries.get(plan.embedding)
    if head is not None and embedding is not None and head.bits == embedding.bits and not plan.shapes[plan.head].bias:
        plan.entries[plan.head] = replace(head, tied_to=plan.embedding)
        return
    if others or getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"The head and the embedding of {type(model).__name__} are tied, and cannot be untied alone: its config "
            "ties more than those two. Leave both in floating point"
        )
    plan.untied = True
    if head is None or embedding is None:
        plan.why = f"only the {'embedding' if head is None else 'head'} is packed"
    elif head.bits != embedding.bits:
        plan.why = f"the head has {head.bits} bits and the embedding {embedding.bits}"
    else:
        plan.why = "the head has a bias, which Transformers would cut to the packed shape"


def _checked_shape(
    model: nn.Module, option: str, name: str | None, modules_to_not_convert: Sequence[str] | None
) -> LinearShape:
    """Sizes of the head or the embedding.

    Raises:
        ValueError: it cannot be packed.
    """
    owner = type(model).__name__
    what = "output head" if option == "lm_head_bits" else "token embedding"
    if name is None:
        raise ValueError(f"{owner} has no {what}: leave out {option} (--{option.replace('_', '-')})")
    module = model.get_submodule(name)
    remedy = f"leave it in floating point: {option}=None"
    if modules_to_not_convert is not None and matches(name, modules_to_not_convert):
        flag = "--" + option.replace("_", "-")
        raise ValueError(
            f"{option} ({flag}) asks to pack {name!r}, and modules_to_not_convert={list(modules_to_not_convert)!r} "
            "(--skip) to leave it in floating point: drop one of the two"
        )
    shape: LinearShape | None
    if option == "lm_head_bits":
        shape = linear_shape(module)
        if shape is None or shape.source != "Linear":
            raise ValueError(f"{name} of {owner} is a {type(module).__name__}, not a plain linear layer: {remedy}")
    else:
        shape = _embedding_shape(module, name, owner, remedy)
    if shape.in_features < fmt.MIN_IN_FEATURES:
        raise ValueError(f"{name} of {owner} has fewer than {fmt.MIN_IN_FEATURES} features: {remedy}")
    if matches(name, tuple(fp32_modules(model))):
        raise ValueError(f"{name} of {owner} is kept in float32 by the model's own list: {remedy}")
    if reader := reader_of_weight(model, name) or _reader_by_method(model, option):
        raise ValueError(
            f"{name} cannot be packed: {reader} reads its .weight directly, which would be packed words; {remedy}"
        )
    shared = [n for n, m in model.named_modules(remove_duplicate=False) if m is module and n != name]
    if shared:
        raise ValueError(f"{name} of {owner} is also its {shared[0]}: {remedy}")
    return shape


def _embedding_shape(module: nn.Module, name: str, owner: str, remedy: str) -> LinearShape:
    kind = type(module).__name__
    if not isinstance(module, nn.Embedding):
        raise ValueError(f"{name} of {owner} is a {kind}, not a plain embedding: {remedy}")
    if embedding_scale(module) is None:
        raise ValueError(
            f"{name} of {owner} is a {kind}, whose forward is neither nn.Embedding's nor that times embed_scale: "
            f"{remedy}"
        )
    if module.max_norm is not None:
        raise ValueError(f"{name} of {owner} renormalizes its rows (max_norm={module.max_norm}): {remedy}")
    return LinearShape(module.embedding_dim, module.num_embeddings, False, "Embedding")


def _reader_by_method(model: nn.Module, option: str) -> str | None:
    """Class name of a part of the model that reads ``self.get_input_embeddings().weight`` (or the output's)."""
    method = "get_output_embeddings" if option == "lm_head_bits" else "get_input_embeddings"
    for module in model.modules():
        if not hasattr(module, "get_input_embeddings"):
            continue
        for base in type(module).__mro__:
            if base.__name__ == "PreTrainedModel" or base is nn.Module:
                break
            if _reads_weight_of(base, method):
                return type(module).__name__
    return None


@functools.cache
def _reads_weight_of(cls: type, method: str) -> bool:
    """Whether a class's own code holds ``self.METHOD().weight``, but for its device."""
    try:
        source = inspect.getsource(cls)
    except (OSError, TypeError):
        return False
    pattern = rf"\bself\.{method}\(\)\.weight\b(?!\.device)"
    return re.search(pattern, ast.unparse(ast.parse(textwrap.dedent(source)))) is not None


def _name_of(model: nn.Module, wanted: nn.Module | None) -> str | None:
    return next((name for name, module in model.named_modules() if module is wanted), None)


def _tied_keys(model: nn.Module) -> dict[str, str]:
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def _own_keys(model: nn.Module) -> dict[str, str]:
    keys: Any = getattr(model, "_tied_weights_keys", None)
    return dict(keys or {})
