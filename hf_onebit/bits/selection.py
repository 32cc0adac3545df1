"""Automatic bits with text: several plans within the target, tried together on held-out text; the best one is taken.

Costs of single layers add up to a first plan. What each layer adds to that plan's loss, all layers coarse together, is
attributed (``attribution``), and both measures, in several mixtures, make further plans; the best uniform layout stands
beside them. Which of them it is to be, a trial says (``trials``).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from hf_onebit.arithmetic import autocast_dtype
from hf_onebit.bits.attribution import attribute
from hf_onebit.bits.auto_bits import AutoBudget, Costs, choose
from hf_onebit.bits.auto_sensitivity import HeadCosts
from hf_onebit.bits.sensitivity import Sensitivity
from hf_onebit.bits.trials import PackedChoices
from hf_onebit.calibration import Batch
from hf_onebit.nn.replace import LayerPlan
from hf_onebit.rungs.blocks import device_of


class Mixture(NamedTuple):
    """How much layers differ in a plan: powers of their two measures, both taken per weight and over their means.

    Attributes:
        measured: power of the cost measured at the float model; with 0 and 0 all weights count alike.
        attributed: power of the part in the first plan's loss.
        growth: power of the ratio of a layer's choices; above 1 coarse choices are held to be worse than measured, as
            they are where the other layers are coarse too.
    """

    measured: float
    attributed: float
    growth: float = 1.0


# Of the first plan, whose loss is attributed.
FIRST = Mixture(0.5, 0.0)
MIXTURES = (Mixture(0.5, 0.5), Mixture(0.7, 0.7), Mixture(0.3, 0.6), Mixture(0.5, 0.5, 1.25))
# Parts below this share of the mean one are noise, negative ones too.
_LEAST = 0.05


def choose_by_trial(
    auto: AutoBudget,
    model: nn.Module,
    plan: LayerPlan,
    measured: tuple[Sensitivity, HeadCosts],
    packed: PackedChoices,
    judges: Sequence[Batch],
    *,
    consistent: bool = False,
    mixtures: Sequence[Mixture] = MIXTURES,
) -> dict[str, Any]:
    """The plan within the budget that loses least on text, of a few.

    Args:
        auto: of ``plan_auto``.
        model: float model, whole in memory; left as it was.
        plan: of the layers.
        measured: costs of all choices, of ``costs_on_text``.
        packed: fits layers on the text that they are fitted on.
        judges: sequences that none was fitted on.
        consistent: as of ``choose``.
        mixtures: of the plans that are tried beside the sum's best, the first one, and the best uniform layout.

    Returns:
        As ``choose``, with ``trials``: what was tried, and what each lost.
    """
    costs = measured[0].costs
    sizes = {name: shape.weights for name, shape in plan.selected.items()}
    options: dict[str, Any] = {"consistent": consistent, "depth_prior": 0.0}

    def made(weighed: Costs | None) -> dict[str, Any]:
        return choose(auto, model, plan, measured, weighed=weighed, **options)

    added = made(None)
    if added["heads"] is not None:  # the trial does not see them: all plans have the same
        options["heads"] = added["heads"]["lm_head_bits"], added["heads"]["embedding_bits"]
    middle = {name: _middle(costs[name]) for name in costs}
    first = made(_mixed(FIRST, costs, middle, dict.fromkeys(sizes, 0.0), sizes))
    base = choices_of_record(first)
    parts, tokens = attribute(model, packed.modules(base), packed.batches, arithmetic=autocast_dtype(device_of(model)))
    at_base = {name: costs[name][choice] for name, choice in base.items()}
    tried = [({"added_up": True}, added), (FIRST._asdict(), first)]
    tried += [(m._asdict(), made(_mixed(m, costs, at_base, parts, sizes))) for m in mixtures]
    totals = {c: sum(of.get(c, math.inf) for of in costs.values()) for c in next(iter(costs.values()))}
    for choice in sorted(totals, key=totals.__getitem__):
        with contextlib.suppress(ValueError):  # not within the budget
            tried.append(({"uniform": choice}, made({name: {choice: 0.0} for name in sizes})))
            break
    different: dict[tuple[str, ...], tuple[dict[str, Any], dict[str, Any]]] = {}
    for how, record in tried:
        different.setdefault(tuple(choices_of_record(record).values()), (how, record))
    plans = list(different.values())
    losses, judged = packed.losses([choices_of_record(record) for _, record in plans], judges)
    best = min(range(len(plans)), key=losses.__getitem__)
    record = plans[best][1]
    for name, layer in record["layers"].items():
        layer["attributed"] = parts[name]
    trials = [
        {"how": how, "planned": found["planned"], "kl": loss} for (how, found), loss in zip(plans, losses, strict=True)
    ]
    about = {"tokens": judged, "attribution_tokens": tokens, "chosen": best, "plans": trials}
    cost = sum(costs[name][choice] for name, choice in choices_of_record(record).items())
    return {**record, "cost": cost, "least_cost": added["least_cost"], "trials": about}


def choices_of_record(record: Mapping[str, Any]) -> dict[str, str]:
    """{layer: choice} of a record."""
    return {name: layer["choice"] for name, layer in record["layers"].items()}


def _mixed(
    mixture: Mixture,
    costs: Costs,
    base: Mapping[str, float],
    parts: Mapping[str, float],
    sizes: Mapping[str, int],
) -> dict[str, dict[Any, float]]:
    """Costs by a mixture: a layer's weight in the plan, by both measures, times what a choice loses over ``base``."""
    weight = {name: float(size) for name, size in sizes.items()}
    for measure, power in ((base, mixture.measured), (parts, mixture.attributed)):
        mean = sum(measure.values()) / sum(sizes.values())
        for name, size in sizes.items() if mean > 0 else ():
            weight[name] *= max(measure[name] / size / mean, _LEAST) ** power

    def ratio(name: str, cost: float) -> float:
        return float((cost / base[name]) ** mixture.growth) if base[name] > 0 else 0.0  # an expert that no token chose

    return {name: {c: weight[name] * ratio(name, cost) for c, cost in of.items()} for name, of in costs.items()}


def _middle(costs: Mapping[Any, float]) -> float:
    """The geometric mean, 0 where a choice loses nothing."""
    values = list(costs.values())
    return math.exp(sum(map(math.log, values)) / len(values)) if min(values) > 0 else 0.0
