"""Gated sign flips: change the few signs whose gradients agree, and keep them only if held-out KL falls.

To flip one entry of a plane is to move its weight w = s a b to −w. To second order the loss changes by

    Δ = −2 w G + 2 w² H,        G = ∂L/∂W,    H ≈ E_t[g_y²] E_t[x²],

with G summed over many tokens and, per token, the squares of the output gradient and the input (the diagonal of a
Kronecker-factored empirical Fisher matrix; Martens and Grosse 2015, arXiv:1503.05671). Of the flips with Δ < 0 a round
takes those whose gradient is the surest, not those with the lowest Δ: these crowd in a few massive rows and columns,
where neither G nor H holds for all of them at once (docs/methods/distill.md has both, measured). How sure it is, is
Student's t of the gradients G_k of the round's n batches, t = |Σ_k G_k| / sqrt(n v), with v their variance.

If the KL on held-out tokens did not fall, every flip is undone and a smaller fraction of the signs is tried. No moments
are kept from round to round, so that no step is larger than its evidence (compare PV-tuning, Malinovskii et al. 2024,
arXiv:2405.14852, §3.2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_onebit.algorithms.distill import Batch, Pair
from hf_onebit.algorithms.sign_linear import SignPlane


@dataclass(frozen=True)
class FlipOptions:
    """How to flip.

    Attributes:
        rounds: at most how many.
        batches_per_round: batches whose gradients one round sums.
        tries: fractions that a round tries on its gradients, at most.
        fraction: of all signs, flipped in the first try.
        shrink: factor on the fraction after a try that was undone; ``grow`` after one that was kept.
        grow: see ``shrink``; the fraction never exceeds the first.
        least: stop when the fraction falls below.

    Raises:
        ValueError: a value out of range.
    """

    rounds: int = 8
    batches_per_round: int = 8
    tries: int = 3
    fraction: float = 1e-4
    shrink: float = 0.3
    grow: float = 1.0
    least: float = 1e-6

    def __post_init__(self) -> None:
        ranges = {
            "rounds": self.rounds >= 0,
            "batches_per_round": self.batches_per_round >= 1,
            "tries": self.tries >= 1,
            "fraction": 0 < self.fraction <= 1,
            "shrink": 0 < self.shrink < 1,
            "grow": self.grow >= 1,
            "least": self.least >= 0,
        }
        wrong = [name for name, fine in ranges.items() if not fine]
        if wrong:
            raise ValueError(
                f"FlipOptions: {wrong[0]}={getattr(self, wrong[0])!r} is out of range; see its description"
            )


@dataclass
class FlipResult:
    """What came of it.

    Attributes:
        start, best: held-out KL before and after.
        flipped: signs that were flipped and kept, counted once a round.
        tokens: rows that gradients were taken of.
        log: one dict per try: round, fraction, flips, kl_heldout, kept.
    """

    start: float
    best: float
    flipped: int = 0
    tokens: int = 0
    log: list[dict[str, Any]] = field(default_factory=list)


def gated_flips(
    pair: Pair,
    planes: Mapping[str, SignPlane],
    batches: Sequence[Batch],
    evaluate: Callable[[], float],
    options: FlipOptions | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
    first_batch: int = 0,
    done: FlipResult | None = None,
    after_round: Callable[[FlipResult], None] = lambda result: None,
) -> FlipResult:
    """Flip signs of a student in training form, round by round; the held-out KL never rises.

    Beside the student this holds two floats a sign while a round collects and tries.

    Args:
        pair: student and teacher.
        planes: the planes whose signs may flip; see ``sign_linear.sign_planes``.
        batches: what gradients are taken of; rounds walk through them in order, and start over at the end.
        evaluate: held-out KL of the student as it is, as stored; for example ``Distillation.evaluate``.
        options: how.
        callback: called with each new entry of the log.
        first_batch: where in ``batches`` the first round starts.
        done: what ``after_round`` was last given by a run that was interrupted, to go on from there: the planes must
            have the signs that they had then, and all else be the same.
        after_round: called with the result so far after each round.

    Raises:
        ValueError: no planes, no batches, or a held-out KL that is not finite at the start.
    """
    options = options or FlipOptions()
    if not planes or not batches:
        raise ValueError(f"gated_flips: got {len(planes)} planes and {len(batches)} batches, expected some of both")
    best = evaluate() if done is None else done.best
    if not math.isfinite(best):
        raise ValueError(f"gated_flips: the held-out KL is {best} before any flip; check the student first")
    result = done or FlipResult(best, best)
    total = sum(plane.signs.numel() for plane in planes.values())
    fraction = options.fraction
    for entry in result.log:
        fraction = _next_fraction(fraction, entry["kept"], options)
    begun = result.log[-1]["round"] + 1 if result.log else 0
    for number in range(begun, options.rounds):
        if fraction < options.least:
            break
        position = first_batch + number * options.batches_per_round
        chosen = [batches[(position + i) % len(batches)] for i in range(options.batches_per_round)]
        result.tokens += collect_gradients(pair, planes, chosen)
        for _ in range(options.tries):
            entry = _try(planes, max(1, round(fraction * total)), evaluate, result)
            entry |= {"round": number, "fraction": fraction}
            result.log.append(entry)
            if callback is not None:
                callback(entry)
            fraction = _next_fraction(fraction, entry["kept"], options)
            if entry["kept"] or fraction < options.least:
                break
        for plane in planes.values():
            plane.collect_sign_gradient(False)
        after_round(result)
    return result


def _try(
    planes: Mapping[str, SignPlane], count: int, evaluate: Callable[[], float], result: FlipResult
) -> dict[str, Any]:
    """Flip the ``count`` surest signs, for good if the held-out KL falls below the best; for the log."""
    picks = choose_flips(planes, count)
    flips = sum(len(indices) for indices in picks.values())
    flip(planes, picks)
    kl = evaluate()
    kept = kl < result.best
    if kept:
        result.best = kl
        result.flipped += flips
    else:
        flip(planes, picks)
    return {"flips": flips, "kl_heldout": kl if math.isfinite(kl) else None, "kept": kept}


def _next_fraction(fraction: float, kept: bool, options: FlipOptions) -> float:
    return min(options.fraction, fraction * options.grow) if kept else fraction * options.shrink


@torch.no_grad()
def flip_gains(plane: SignPlane) -> Tensor:
    """−Δ of each flip, float32 (out, in): how far the mean loss falls, to second order, if this sign alone flips.

    What was collected must be of losses summed over rows.

    Raises:
        ValueError: no gradient was collected.
    """
    gradient = plane.sign_gradient
    if gradient is None or not gradient.rows:
        raise ValueError("flip_gains: no gradient was collected; call collect_sign_gradient() and run backward first")
    w = torch.outer(plane.a, plane.b).mul_(plane.signs)
    # The loss that was differentiated is a sum over rows; L is its mean.
    curvature = torch.outer(gradient.outputs / gradient.rows, gradient.inputs / gradient.rows)
    return (gradient.weight / gradient.rows - curvature.mul_(w)).mul_(w).mul_(2)


@torch.no_grad()
def flip_certainty(plane: SignPlane) -> Tensor:
    """t of each flip that gains (see the top of this file), float32 (out, in); 0 of all others.

    One backward pass alone has no variance: there v is what it would be of tokens that do not depend on each other.

    Raises:
        ValueError: no gradient was collected.
    """
    gains = flip_gains(plane)
    gradient = plane.sign_gradient
    assert gradient is not None
    n = gradient.passes
    if n > 1:
        variance = (gradient.squares - gradient.weight.square().div_(n)).clamp_min_(0).div_(n - 1)
    else:
        variance = torch.outer(gradient.outputs / gradient.rows, gradient.inputs)
    certainty = gradient.weight.abs().div_(variance.mul_(n).sqrt_().clamp_min_(torch.finfo(torch.float32).tiny))
    return certainty.masked_fill_(gains <= 0, 0)


@torch.no_grad()
def choose_flips(
    planes: Mapping[str, SignPlane], count: int, score: Callable[[SignPlane], Tensor] = flip_certainty
) -> dict[str, Tensor]:
    """Flat indices, by plane, of at most ``count`` flips: those with the largest positive scores, (out, in) a plane.

    Planes that no token went through have none.
    """
    values, owners, places = [], [], []
    for number, plane in enumerate(planes.values()):
        if plane.sign_gradient is None or not plane.sign_gradient.rows:
            continue  # an expert that no token chose
        scores = score(plane).reshape(-1)
        top, index = scores.topk(min(count, len(scores)))
        values.append(top)
        places.append(index)
        owners.append(torch.full_like(index, number))
    if not values:
        return {name: torch.empty(0, dtype=torch.int64) for name in planes}
    best, owner, place = torch.cat(values), torch.cat(owners), torch.cat(places)
    order = best.argsort(descending=True, stable=True)[:count]
    order = order[best[order] > 0]
    return {name: place[order[owner[order] == number]] for number, name in enumerate(planes)}


@torch.no_grad()
def flip(planes: Mapping[str, SignPlane], picks: Mapping[str, Tensor]) -> None:
    """Turn the signs at these flat indices, by plane, the other way, and fold; twice is as before."""
    for name, indices in picks.items():
        if len(indices):
            planes[name].signs.view(-1)[indices] *= -1
            planes[name].fold()


def collect_gradients(pair: Pair, planes: Mapping[str, SignPlane], batches: Sequence[Batch]) -> int:
    """Have the planes sum, from zero, what flips are chosen by, of these batches; how many rows they have."""
    for plane in planes.values():
        plane.collect_sign_gradient()
    # Backward has to pass every plane: it does if its scales take gradients, which are dropped.
    scales = [scale for plane in planes.values() for scale in (plane.a, plane.b)]
    frozen = [scale for scale in scales if not scale.requires_grad]
    for scale in frozen:
        scale.requires_grad_(True)
    rows = 0
    try:
        for batch in batches:
            targets = pair.targets(batch)
            torch.autograd.grad(pair.loss(batch, targets) * len(targets), scales, allow_unused=True)
            rows += len(targets)
    finally:
        for scale in frozen:
            scale.requires_grad_(False)
    return rows
