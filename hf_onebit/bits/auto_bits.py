"""Automatic bits: from a target to a way of packing for each layer, and bits for head and embedding.

``plan_auto`` says what a target leaves and what there is to choose from; ``choose`` makes the choice, of which the
record alone is kept (in the report, and for a run that goes on); ``settle_plan`` makes a plan of that record, and
``settle_heads`` a config, which ``ask_again`` takes back for the next run.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_onebit.algorithms.allocation import DEPTH_PRIOR, Option, allocate, depth_ramp
from hf_onebit.bits.auto_sensitivity import HEAD_CHOICES, ChoiceFit, HeadCosts, choices_of
from hf_onebit.bits.budget import Budget, bias_bits, budget_of, check_reachable, digits_of, entry_bits, other_bits
from hf_onebit.bits.sensitivity import Sensitivity, depths
from hf_onebit.choices import Choice
from hf_onebit.config import AUTO, PackingConfig
from hf_onebit.formats.table import TableEntry
from hf_onebit.mpq_config import MPQConfig
from hf_onebit.nn.fusion import SIBLINGS
from hf_onebit.nn.heads import HeadPlan, plan_heads
from hf_onebit.nn.replace import LayerPlan, Skipped

# Stands among the layers for head and embedding, which are one choice.
HEADS = ""
HeadBits = tuple[int | None, int | None]
"""Bits of the head and of the embedding, None for floating point."""
Costs = Mapping[str, Mapping[Any, float]]
"""{layer: {choice: cost}}."""
_HEAD_FIELDS = ("lm_head_bits", "embedding_bits")
# Where a config holds what was chosen in place of "auto". The underscore keeps it out of what a run is known again by.
_SETTLED = "_settled_heads"


@dataclass(frozen=True)
class AutoBudget:
    """What a target leaves, and what it can be spent on.

    Attributes:
        budget: with options {layer: {choice: bits}}, those of several widths as for an importance that falls evenly;
            under ``HEADS`` {(head's bits, embedding's): bits of all that is no layer}.
        fit: knows the entries of all choices.
        names: {layer: choices to compare}.
        heads: what becomes of head and embedding, by their bits; empty where those are given.
        digits: of offsets in the file's header; 0 where the header does not count.
        packed: head and embedding as they are packed at the most, for measuring; empty where their bits are given.
    """

    budget: Budget
    fit: ChoiceFit
    names: dict[str, tuple[str, ...]]
    heads: dict[HeadBits, HeadPlan]
    digits: int
    packed: HeadPlan


def plan_auto(model: nn.Module, plan: LayerPlan, config: MPQConfig, closed: bool) -> AutoBudget:
    """What the target of a config leaves.

    Args:
        model: float model, as it will be packed.
        plan: the layers to pack; head and embedding at any bits where those are to be chosen.
        config: valid, with ``bits="auto"`` and a target.
        closed: as of ``ChoiceFit``.

    Raises:
        ValueError: no layer is to be packed, or the target is out of reach, naming the range.
    """
    field = "target_bpw" if config.target_bpw is not None else "target_size"
    wanted = config.target_bpw if config.target_bpw is not None else config.target_bytes
    assert wanted is not None
    if not plan.selected:
        raise ValueError(
            "bits='auto' (--bits auto) chooses the bits of linear layers, and none is to be packed: leave it out"
        )
    options = {"symmetric": config.symmetric, "act_order": config.act_order, "double_quant": config.double_quant}
    fit = ChoiceFit(choices_of(plan, config.names, options), closed, {"symmetric": config.symmetric}, config.search)
    heads = head_choices(model, config)
    fixed, of_heads = bias_bits(model, plan), {}
    if field == "target_size":
        plan.entries = {name: next(iter(found.values())) for name, found in fit.entries.items()}
        of_heads = {bits: other_bits(model, _with_heads(plan, found)) for bits, found in heads.items()}
        fixed = 0 if of_heads else other_bits(model, plan)
    shapes = plan.selected
    possible = {name: {**found, **_guessed(shapes[name].in_features, config)} for name, found in fit.entries.items()}
    most = fixed + max(of_heads.values(), default=0)
    most += sum(max(entry_bits(name, shapes[name], e) for e in found.values()) for name, found in possible.items())
    digits = digits_of(most // 8) if field == "target_size" else 0
    sizes: dict[str, dict[Any, int]] = {
        name: {choice: entry_bits(name, shapes[name], entry, digits) for choice, entry in found.items()}
        for name, found in possible.items()
    }
    if of_heads:
        sizes[HEADS] = of_heads
    budget = budget_of(plan, field, wanted, sizes, fixed)
    lower = "for less, let choices (--choices) hold fewer bits, such as '1p'"
    if field == "target_size" and not of_heads:
        lower += ", and pack head and embedding (lm_head_bits='auto', embedding_bits='auto'; --lm-head-bits auto "
        lower += "--embedding-bits auto)"
    check_reachable(
        budget, type(model).__name__, lower, "for more, let choices (--choices) hold more bits, such as '8g32'"
    )
    packed = plan.heads if heads else HeadPlan()
    if heads:
        asked = {plan.heads.head: config.lm_head_bits == AUTO, plan.heads.embedding: config.embedding_bits == AUTO}
        entries = {name: entry for name, entry in plan.heads.entries.items() if asked[name]}
        packed = HeadPlan(entries, plan.heads.shapes, plan.heads.head, plan.heads.embedding)
    return AutoBudget(budget, fit, dict.fromkeys(plan.selected, config.names), heads, digits, packed)


def head_choices(model: nn.Module, config: MPQConfig) -> dict[HeadBits, HeadPlan]:
    """What may become of head and embedding, where one of the two is "auto"; those that cannot be are left out."""
    fields = (config.lm_head_bits, config.embedding_bits)
    if AUTO not in fields:
        return {}
    found: dict[HeadBits, HeadPlan] = {}
    for head, embedding in itertools.product(*((None, *HEAD_CHOICES) if f == AUTO else (f,) for f in fields)):
        try:
            plan = plan_heads(model, head, embedding, config.head_group_size, config.modules_to_not_convert)
        except ValueError:  # two that are tied, and cannot be packed apart
            continue
        found[head, embedding] = plan
    return found


def choose(
    auto: AutoBudget,
    model: nn.Module,
    plan: LayerPlan,
    measured: tuple[Sensitivity, HeadCosts],
    *,
    consistent: bool = False,
    depth_prior: float = DEPTH_PRIOR,
    weighed: Costs | None = None,
    heads: HeadBits | None = None,
) -> dict[str, Any]:
    """The choices that cost least within the budget.

    Args:
        auto: of ``plan_auto``.
        model: its stack of blocks says how deep each layer is.
        plan: of the layers.
        measured: costs of all choices, of ``costs_on_text`` or ``costs_of_weights``.
        consistent: layers that read one tensor (q/k/v, gate/up) get the same.
        depth_prior: strength of the ramp that the costs are multiplied by.
        weighed: {layer: {choice: cost}} to add up in place of the measured ones; choices that it leaves out are out.
        heads: bits of head and embedding, where they are not to be chosen any more.

    Returns:
        A JSON-ready record: all that ``settle_plan`` needs, and what the report says.

    Raises:
        ValueError: nothing within the budget has those ``heads``, or only such choices.
    """
    sensitivity, head_costs = measured
    budget, entries = auto.budget, auto.fit.entries
    losses = sensitivity.costs if weighed is None else weighed
    ramp = {name: depth_ramp(depth, depth_prior) for name, depth in depths(model, list(entries)).items()}
    bits = {
        name: {c: entry_bits(name, plan.selected[name], entry, auto.digits) for c, entry in found.items()}
        for name, found in entries.items()
    }
    items: list[tuple[list[str], list[Any], list[Option]]] = []
    for group in sibling_groups(list(entries)) if consistent else [[name] for name in entries]:
        common = [c for c in bits[group[0]] if all(c in bits[name] and c in losses[name] for name in group)]
        options = [Option(sum(bits[n][c] for n in group), sum(losses[n][c] * ramp[n] for n in group)) for c in common]
        items.append((group, common, options))
    if HEADS in budget.options:
        known = {bits: size for bits, size in budget.options[HEADS].items() if heads in (None, bits)}
        costs = [head_costs.head.get(h, 0.0) + head_costs.embedding.get(e, 0.0) for h, e in known]
        items.append(([HEADS], list(known), [Option(b, c) for b, c in zip(known.values(), costs, strict=True)]))
    found = allocate([options for _, _, options in items], budget.bits)
    chosen = {
        name: choices[position]
        for (group, choices, _), position in zip(items, found.choices, strict=True)
        for name in group
    }
    spent = found.bits + budget.fixed
    own_heads = chosen.pop(HEADS, None)
    return {
        "target": budget.field.removeprefix("target_"),
        "wanted": budget.wanted,
        "planned": spent / budget.weights if budget.field == "target_bpw" else -(-spent // 8),
        "tokens": sensitivity.tokens,
        "depth_prior": depth_prior,
        "cost": found.cost,
        "least_cost": found.bound,
        "consistent_groups": consistent,
        "layers": {
            name: {
                "choice": choice,
                "entry": entries[name][choice].to_dict(),
                "sensitivity": {c: sensitivity.costs[name][c] for c in entries[name]},
                "ramp": ramp[name],
            }
            for name, choice in chosen.items()
        },
        "heads": None
        if own_heads is None
        else {
            "lm_head_bits": own_heads[0],
            "embedding_bits": own_heads[1],
            "sensitivity": {
                role: {str(b): cost for b, cost in costs.items()}
                for role, costs in (("lm_head", head_costs.head), ("embedding", head_costs.embedding))
            },
        },
    }


def settle_plan(plan: LayerPlan, record: Mapping[str, Any], model: nn.Module, config: MPQConfig) -> None:
    """Make the choice of a record the plan's, in place; ``settle_heads`` makes it a config's."""
    plan.entries = {name: TableEntry.from_dict(layer["entry"]) for name, layer in record["layers"].items()}
    heads = record["heads"]
    if heads is None:
        return
    about = config.head_group_size, config.modules_to_not_convert
    before, plan.heads = plan.heads, plan_heads(model, heads["lm_head_bits"], heads["embedding_bits"], *about)
    head = before.head
    if head in before.entries and head not in plan.heads.entries:
        plan.skipped[head] = Skipped("output head", before.shapes[head].weights, is_head=True)


def settle_heads(config: PackingConfig, record: Mapping[str, Any] | None) -> None:
    """Put the bits of head and embedding that were chosen into a config, in place, until ``ask_again``.

    Args:
        config: of the run.
        record: of ``choose``, or of another target, or None; without such a choice the config stays as it is.
    """
    heads = None if record is None else record.get("heads")
    if heads is None:
        return
    settled = {field: heads[field] for field in _HEAD_FIELDS if getattr(config, field) == AUTO}
    vars(config)[_SETTLED] = settled
    for field, bits in settled.items():
        setattr(config, field, bits)


def ask_again(config: PackingConfig) -> None:
    """Have the next run with a config choose anew what ``settle_heads`` put into it; what was set since then stays."""
    for field, bits in vars(config).pop(_SETTLED, {}).items():
        if getattr(config, field) == bits:
            setattr(config, field, AUTO)


def sibling_groups(names: Sequence[str]) -> list[list[str]]:
    """Layers that read one tensor by their names (``nn.fusion.SIBLINGS``) together, in the order of each first one."""
    groups: dict[tuple[str, int, str], list[str]] = {}
    for name in names:
        parent, _, own = name.rpartition(".")
        kind = next((index for index, siblings in enumerate(SIBLINGS) if own in siblings), -1)
        groups.setdefault((parent, kind, own if kind < 0 else ""), []).append(name)
    return list(groups.values())


def _guessed(in_features: int, config: MPQConfig) -> dict[str, TableEntry]:
    """Entries of several widths before the inputs' importance is known, about as large as the real ones."""
    importance = torch.logspace(0, -3, in_features)
    found = {name: Choice.parse(name) for name in config.names}
    made = {
        name: choice.entry(in_features, config.symmetric, importance=importance)
        for name, choice in found.items()
        if choice.mixed
    }
    return {name: entry for name, entry in made.items() if entry is not None}


def _with_heads(plan: LayerPlan, heads: HeadPlan) -> LayerPlan:
    return LayerPlan(plan.selected, plan.planes, plan.entries, plan.skipped, heads)
