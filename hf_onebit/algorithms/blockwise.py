"""Tuning one block: scales, norm gains, biases and signs learn the float block's output on the quantized prefix.

What the layers of a block were fitted to one by one is here fitted jointly, with the errors that the layers make for
each other in view. Signs follow latents that start at their margins (``latents.SignLatents``). The loss L is that of
block_loss.py, in which a few massive channels do not decide alone.

What counts is the stored block: after each epoch the parameters are rounded as the file will hold them and L is taken
on held-out sequences; the best such state stays, the start among them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from hf_onebit.algorithms.block_loss import BlockLoss, Example
from hf_onebit.algorithms.distill import Trained
from hf_onebit.algorithms.latents import Latents
from hf_onebit.algorithms.pair_latents import sign_latents
from hf_onebit.algorithms.sign_linear import SignPlane


@dataclass(frozen=True)
class BlockOptions:
    """How to tune a block.

    Attributes:
        epochs: passes over the sequences that are not held out.
        sequences_per_step: an update takes the gradient of so many.
        learning_rate: largest step of scales, gains and biases, relative to their tensor's mean magnitude.
        sign_rate: largest step of the latents, whose unit is the weight's magnitude (of codes, one code); 0 leaves the
            signs or codes alone.
        warmup: share of the updates over which the rates rise; then they fall as half a cosine.
        betas: Adam's.
        seed: order of the sequences.

    Raises:
        ValueError: a value out of range.
    """

    epochs: int = 4
    sequences_per_step: int = 2
    learning_rate: float = 2e-3
    sign_rate: float = 2e-2
    warmup: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    seed: int = 0

    def __post_init__(self) -> None:
        ranges = {
            "epochs": self.epochs >= 0,
            "sequences_per_step": self.sequences_per_step >= 1,
            "learning_rate": self.learning_rate >= 0,
            "sign_rate": self.sign_rate >= 0,
            "warmup": 0 <= self.warmup < 1,
            "betas": all(0 <= beta < 1 for beta in self.betas),
        }
        wrong = [name for name, fine in ranges.items() if not fine]
        if wrong:
            raise ValueError(
                f"BlockOptions: {wrong[0]}={getattr(self, wrong[0])!r} is out of range; see its description"
            )


@dataclass
class BlockResult:
    """What came of it.

    Attributes:
        start, best: L on the held-out sequences before and after, both of the stored values.
        best_epoch: 0 if the start stayed the best.
        flipped: share of the signs, or codes, that changed.
        log: one dict an epoch: epoch, loss_train, loss_heldout.
    """

    start: float
    best: float
    best_epoch: int = 0
    flipped: float = 0.0
    log: list[dict[str, Any]] = field(default_factory=list)


class Discrete(Protocol):
    """What in a block is no float: it follows latents that learn, and the block computes with it."""

    def step(self, rate: float) -> None:
        """Move the latents against the gradients that backward left; ``rate`` is the largest step."""

    def publish(self) -> None:
        """Take the values that the latents stand for, and fold."""

    def fold(self) -> None:
        """Bring what the block computes with up to date with latents and float parameters."""

    def snapshot(self) -> dict[str, Tensor]:
        """A copy of the values."""

    def restore(self, snapshot: Mapping[str, Tensor]) -> None:
        """Take these values for good, and bring the block up to date."""

    def changed(self, first: Mapping[str, Tensor]) -> float:
        """Share of the values that differ from these."""


def tune_block(
    trained: Mapping[str, Trained],
    planes: Mapping[str, SignPlane],
    latents: Mapping[str, Tensor],
    examples: Sequence[Example],
    heldout: Sequence[Example],
    options: BlockOptions | None = None,
) -> BlockResult:
    """Tune the parameters and signs of one block in training form, in place; the held-out loss never rises.

    Args:
        trained: float parameters that learn: the planes' scales, gains, biases. They are left rounded as stored.
        planes: the sign planes of the block.
        latents: {plane: margins (out, in)} of those whose signs may change. Float32 ones are changed in place and agree
            with the best signs in the end.
        examples: sequences to fit.
        heldout: sequences to judge on.
        options: how.

    Raises:
        ValueError: no example of either kind, nothing to train, or a loss that is not finite at the start.
    """
    options = options or BlockOptions()
    moving = latents if options.sign_rate else {}
    return tune_discrete(trained, _Signs(planes, moving, options.betas), examples, heldout, options)


def tune_discrete(
    trained: Mapping[str, Trained],
    discrete: Discrete,
    examples: Sequence[Example],
    heldout: Sequence[Example],
    options: BlockOptions,
) -> BlockResult:
    """``tune_block`` for signs, codes, or whatever else a block has that is no float.

    Args:
        trained: float parameters that learn; left rounded as stored.
        discrete: the rest; left as it was best.
        examples, heldout, options: as of ``tune_block``.

    Raises:
        ValueError: as ``tune_block``.
    """
    if not examples or not heldout or not trained:
        raise ValueError(
            f"tune_block: got {len(examples)} examples, {len(heldout)} held out and {len(trained)} parameters, "
            "expected some of each"
        )
    loss_of = BlockLoss.of([*examples, *heldout])
    unit, unit_heldout = loss_of.unit(examples), loss_of.unit(heldout)
    state = _State(trained, discrete)
    best = state.snapshot()
    first = best[1]

    def judge() -> float:
        with state.stored(), torch.no_grad():
            return sum(torch.stack([loss_of.error(example) for example in heldout]).tolist()) / unit_heldout

    start = judge()
    if not math.isfinite(start):
        raise ValueError(f"tune_block: the held-out loss is {start} before any update; check the block's inputs")
    result = BlockResult(start, start)
    updates = options.epochs * math.ceil(len(examples) / options.sequences_per_step)
    optimizer = _optimizer(trained, options)
    base = [group["lr"] for group in optimizer.param_groups]
    generator = torch.Generator().manual_seed(options.seed)
    update = 0
    for epoch in range(1, options.epochs + 1):
        order = torch.randperm(len(examples), generator=generator).tolist()
        losses: list[Tensor] = []  # read once an epoch: a GPU would wait for each
        for begin in range(0, len(order), options.sequences_per_step):
            share = _schedule(update, updates, options.warmup)
            for group, rate in zip(optimizer.param_groups, base, strict=True):
                group["lr"] = rate * share
            optimizer.zero_grad(set_to_none=True)
            for index in order[begin : begin + options.sequences_per_step]:
                with torch.enable_grad():
                    loss = loss_of.error(examples[index]) / unit
                    loss.backward()
                losses.append(loss.detach())
            optimizer.step()
            discrete.step(options.sign_rate * share)
            discrete.fold()
            update += 1
        total = sum(torch.stack(losses).tolist())
        if not math.isfinite(total):
            break  # nothing good comes of such gradients; the best epoch so far is kept
        loss_heldout = judge()
        result.log.append({"epoch": epoch, "loss_train": total, "loss_heldout": loss_heldout})
        if loss_heldout < result.best:
            result.best, result.best_epoch, best = loss_heldout, epoch, state.snapshot()
    state.restore(best)
    result.flipped = discrete.changed(first)
    return result


def _optimizer(trained: Mapping[str, Trained], options: BlockOptions) -> torch.optim.Adam:
    # Adam's step does not depend on the gradient's scale: a rate in units of the tensor makes it relative.
    groups = [
        {"params": [t.parameter], "lr": options.learning_rate * t.rate * _magnitude(t.parameter)}
        for t in trained.values()
    ]
    return torch.optim.Adam(groups, betas=options.betas, fused=True)


def _magnitude(parameter: Tensor) -> float:
    """Mean magnitude; an all-zero tensor (a fresh bias) gets a small one."""
    return parameter.detach().float().abs().mean().item() or 1e-2


def _schedule(update: int, updates: int, warmup: float) -> float:
    rising = warmup * updates
    if update < rising:
        return (update + 1) / (math.floor(rising) + 1)
    return 0.5 * (1 + math.cos(math.pi * (update - rising) / max(1.0, updates - rising)))


class _Signs:
    """The signs of some planes, and the latents of those that move."""

    def __init__(
        self, planes: Mapping[str, SignPlane], latents: Mapping[str, Tensor], betas: tuple[float, float]
    ) -> None:
        self.planes = planes
        self.latents: Latents | None = None
        if latents:
            self.latents = sign_latents({name: planes[name] for name in latents}, latents, betas)

    def step(self, rate: float) -> None:
        if self.latents is not None:
            self.latents.step(rate)

    def publish(self) -> None:
        if self.latents is not None:
            self.latents.publish()
        self.fold()

    def fold(self) -> None:
        for plane in self.planes.values():
            plane.fold()

    def snapshot(self) -> dict[str, Tensor]:
        return {name: plane.signs.clone() for name, plane in self.planes.items()}

    def restore(self, snapshot: Mapping[str, Tensor]) -> None:
        if self.latents is not None:
            self.latents.go_back({name: snapshot[name] > 0 for name in self.latents.names()})
            self.latents.release()
        for name, plane in self.planes.items():
            plane.signs.copy_(snapshot[name])
            plane.fold()

    def changed(self, first: Mapping[str, Tensor]) -> float:
        flipped = sum(int((self.planes[name].signs != signs).sum()) for name, signs in first.items())
        return flipped / max(1, sum(signs.numel() for signs in first.values()))


class _State:
    """The parameters of a block and what in it is discrete: as they train, and as they are stored."""

    def __init__(self, trained: Mapping[str, Trained], discrete: Discrete) -> None:
        self.trained, self.discrete = trained, discrete
        self.publish()

    def publish(self) -> None:
        self.discrete.publish()

    def stored(self) -> _Rounded:
        """A context in which every parameter has the value that the file will hold."""
        return _Rounded(self)

    @torch.no_grad()
    def snapshot(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        values = {name: t.parameter.detach().to(t.stored, copy=True) for name, t in self.trained.items()}
        return values, self.discrete.snapshot()

    @torch.no_grad()
    def restore(self, snapshot: tuple[dict[str, Tensor], dict[str, Tensor]]) -> None:
        values, parts = snapshot
        for name, value in values.items():
            self.trained[name].parameter.copy_(value)
        self.discrete.restore(parts)


class _Rounded:
    def __init__(self, state: _State) -> None:
        self.state = state
        self.exact: dict[str, Tensor] = {}

    @torch.no_grad()
    def __enter__(self) -> None:
        for name, t in self.state.trained.items():
            self.exact[name] = t.parameter.detach().clone()
            t.parameter.copy_(t.parameter.to(t.stored))
        self.state.publish()

    @torch.no_grad()
    def __exit__(self, *_: object) -> None:
        for name, t in self.state.trained.items():
            t.parameter.copy_(self.exact[name])
        self.state.publish()
