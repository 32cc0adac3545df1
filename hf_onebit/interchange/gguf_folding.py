"""Column scales of onebit layers, moved to where a row or a norm produces their inputs.

A onebit layer computes a * (S (b * x)). GGUF's blocks hold a and S, and have no place for b. But x comes from
somewhere, and multiplying it there is the same:

* x is a norm's output, read by q, k and v, or by gate and up: b goes into the norm's gain if all readers have the same.
* x is silu(gate) * up, read by down: b goes into up's rows.
* x is attention's output, read by o: row d of a head of v gives input d of every query head that shares it, so b goes
  into v's rows if those have the same.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hf_onebit.nn.linear import OneBitLinear

# Of one block, by Transformers' names: the norm, and the layers that read it.
READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}


@dataclass
class Folds:
    """What is multiplied where; names are within the model.

    Attributes:
        gains: {norm: factor of its gain}.
        rows: {layer: factor of its rows, bias included}.
        moved: {onebit layer: where its column scales went}.
        stuck: {onebit layer: why they cannot go anywhere}.
    """

    gains: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    moved: dict[str, str] = field(default_factory=dict)
    stuck: dict[str, str] = field(default_factory=dict)


def plan_folds(model: nn.Module, blocks: Sequence[str], heads: int, kv_heads: int, kept: Collection[str] = ()) -> Folds:
    """Where the column scales of a Llama-like model's onebit layers go.

    Args:
        model: the packed model.
        blocks: names of its blocks.
        heads: query heads.
        kv_heads: key and value heads, of which each serves ``heads / kv_heads`` query heads in a row.
        kept: layers that are written in floating point, column scales and all.
    """
    folds = Folds()

    def scales(name: str) -> Tensor | None:
        return None if name in kept else column_scales(model.get_submodule(name))

    for block in blocks:
        for norm, readers in READERS.items():
            _fold_into_norm(f"{block}.{norm}", {f"{block}.{r}": scales(f"{block}.{r}") for r in readers}, folds)
        down = f"{block}.mlp.down_proj"
        b = scales(down)
        if b is not None:
            folds.rows[f"{block}.mlp.up_proj"] = b
            folds.moved[down] = "up_proj's rows"
        _fold_into_values(block, scales(f"{block}.self_attn.o_proj"), heads // kv_heads, kv_heads, folds)
    known = set(folds.moved) | set(folds.stuck)
    for name, _ in model.named_modules():
        if name not in known and scales(name) is not None:
            folds.stuck[name] = "its inputs come from a place that is not known to take column scales"
    return folds


def column_scales(module: nn.Module) -> Tensor | None:
    """b of a onebit layer of one plane, float64; None of any other module, and where it is one everywhere."""
    if not isinstance(module, OneBitLinear) or module.planes > 1:
        return None
    b = module.b.detach().double()
    return None if bool((b == 1).all()) else b


def _fold_into_norm(norm: str, scales: Mapping[str, Tensor | None], folds: Folds) -> None:
    given = {name: b for name, b in scales.items() if b is not None}
    if not given:
        return
    short = norm.rpartition(".")[2]
    first = next(iter(given.values()))
    if len(given) == len(scales) and all(torch.equal(b, first) for b in given.values()):
        folds.gains[norm] = first
        folds.moved |= dict.fromkeys(given, f"{short}'s gain")
        return
    others = ", ".join(name.rpartition(".")[2] for name in scales)
    reason = f"{others} read the same {short} and do not have the same column scales"
    folds.stuck |= dict.fromkeys(given, reason)


def _fold_into_values(block: str, b: Tensor | None, repeats: int, kv_heads: int, folds: Folds) -> None:
    name = f"{block}.self_attn.o_proj"
    if b is None:
        return
    shared = b.view(kv_heads, repeats, -1)
    if not bool((shared == shared[:, :1]).all()):
        folds.stuck[name] = f"{repeats} query heads share each head of v_proj, and its column scales differ among them"
        return
    folds.rows[f"{block}.self_attn.v_proj"] = shared[:, 0].reshape(-1)
    folds.moved[name] = "v_proj's rows"
