"""Which option each layer gets so that all together cost least within a budget of bits.

Every layer has options of more or fewer bits, each with a cost; costs add up. That is the multiple-choice knapsack
problem. Its relaxation, in which a layer may lie between two options, is solved by one pass: of each layer only the
options on the lower convex hull of (bits, cost) matter, and the steps along all hulls are taken by falling gain per bit
(Sinha & Zoltners 1979, https://doi.org/10.1287/opre.27.3.503). The greedy choice below is that pass with whole steps.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["DEPTH_PRIOR", "Allocation", "Option", "allocate", "depth_ramp"]

# Strength of the depth ramp; docs/methods/allocation.md says where it comes from.
DEPTH_PRIOR = 0.6


class Option(NamedTuple):
    """One way to store a layer.

    Attributes:
        bits: that it takes, >= 0.
        cost: of choosing it, any finite number; less is better.
    """

    bits: int
    cost: float


@dataclass(frozen=True)
class Allocation:
    """The options chosen.

    Attributes:
        choices: for each layer the position of its option.
        bits: of all of them together.
        cost: the same.
        bound: no choice within the budget costs less. ``cost - bound`` is below the gain of one single step, the first
            that did not fit.
    """

    choices: tuple[int, ...]
    bits: int
    cost: float
    bound: float


class _Step(NamedTuple):
    """From one option of a layer to the next on its hull."""

    layer: int
    start: int
    end: int
    bits: int
    gain: float


def allocate(options: Sequence[Sequence[Option]], budget: int) -> Allocation:
    """Choose one option per layer, of little total cost, within the budget.

    Args:
        options: for each layer its options, in any order, at least one.
        budget: bits for all layers together. More than the options can use is not an error.

    Returns:
        An ``Allocation``; the same for the same input. Bits that lower no cost are not spent.

    Raises:
        ValueError: a layer has no option, one is not valid, or the budget is below the least that the layers take.
    """
    hulls = [_hull(layer, index) for index, layer in enumerate(options)]
    choices = [hull[0] for hull in hulls]
    bits = sum(layer[choice].bits for layer, choice in zip(options, choices, strict=True))
    cost = math.fsum(layer[choice].cost for layer, choice in zip(options, choices, strict=True))
    if bits > budget:
        raise ValueError(f"a budget of {budget} bits is too small: the layers take {bits} at the least")
    steps = [
        _Step(index, start, end, layer[end].bits - layer[start].bits, layer[start].cost - layer[end].cost)
        for index, (layer, hull) in enumerate(zip(options, hulls, strict=True))
        for start, end in itertools.pairwise(hull)
    ]
    steps.sort(key=lambda step: -step.gain / step.bits)  # stable: of equal ones the first layer's
    bound: float | None = None
    for step in steps:
        fits = bits + step.bits <= budget
        if not fits and bound is None:
            bound = cost - step.gain * (budget - bits) / step.bits
        if fits and choices[step.layer] == step.start:
            choices[step.layer] = step.end
            bits += step.bits
            cost -= step.gain
    total = math.fsum(layer[choice].cost for layer, choice in zip(options, choices, strict=True))
    return Allocation(tuple(choices), bits, total, total if bound is None else min(bound, total))


def depth_ramp(fraction: float, strength: float = DEPTH_PRIOR) -> float:
    """What a layer's cost is multiplied by for its depth: exp(strength · (fraction − ½)).

    Args:
        fraction: 0 for the first block, 1 for the last.
        strength: 0 for no ramp; above 0 late layers count more.
    """
    return math.exp(strength * (fraction - 0.5))


def _hull(layer: Sequence[Option], index: int) -> list[int]:
    """Positions of the options on the lower convex hull, by rising bits and falling cost; the smallest comes first."""
    if not layer:
        raise ValueError(f"layer {index} has no option, expected at least one")
    for bits, cost in layer:
        if bits < 0 or not math.isfinite(cost):
            raise ValueError(f"layer {index} has an option of {bits} bits and cost {cost}: expected >= 0, and a number")
    hull: list[int] = []
    for position in sorted(range(len(layer)), key=lambda position: layer[position]):
        bits, cost = layer[position]
        if hull and (cost >= layer[hull[-1]].cost or bits == layer[hull[-1]].bits):
            continue  # another takes no more bits and costs no more
        while len(hull) > 1:
            (bits_0, cost_0), (bits_1, cost_1) = layer[hull[-2]], layer[hull[-1]]
            if (cost_0 - cost_1) * (bits - bits_1) > (cost_1 - cost) * (bits_1 - bits_0):
                break
            hull.pop()
        hull.append(position)
    return hull
