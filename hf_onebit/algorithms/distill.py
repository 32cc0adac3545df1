"""Whole-model distillation: few float parameters of a student learn from the logits of its float teacher.

Scales, norm gains and biases move to lower the mean KL(teacher ‖ student) over tokens, with Adam (Kingma and Ba 2015,
arXiv:1412.6980, Algorithm 1) in float32; so do signs and codes where they have latents (latents.py). Steps are
relative: an additive parameter moves in units of its tensor's mean magnitude, a multiplicative one in units of itself,
so that one learning rate fits all.

What counts is the stored model: at intervals the parameters are rounded as the file will hold them, and the KL is taken
on held-out tokens. The best such state is the result; the start is a candidate too, so the held-out KL never rises.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_onebit.algorithms.divergence import kl_from_features
from hf_onebit.algorithms.latents import Latents

Batch = Any
Features = Callable[[Batch], Tensor]


@dataclass(frozen=True)
class Pair:
    """A student and its teacher, as functions of a batch.

    Attributes:
        student: batch -> (rows, d) features in front of the head, one row a token; differentiable.
        teacher: batch -> (rows, d'), the same tokens in the same order; called without gradients.
        student_head, teacher_head: (vocabulary, d) weights of the linear heads, frozen; None where the features are
            the logits already.
    """

    student: Features
    teacher: Features
    student_head: Tensor | None = None
    teacher_head: Tensor | None = None

    @torch.no_grad()
    def targets(self, batch: Batch) -> Tensor:
        """The teacher's features of a batch."""
        return self.teacher(batch).detach()

    def loss(self, batch: Batch, targets: Tensor, temperature: float = 1.0) -> Tensor:
        """Mean KL of a batch, float32."""
        return kl_from_features(targets, self.student(batch), self.teacher_head, self.student_head, temperature)


@dataclass(frozen=True)
class Trained:
    """One parameter that learns.

    Attributes:
        parameter: the tensor the student computes with, a leaf that takes gradients. Its dtype may be coarser than
            the float32 copy that learns.
        stored: dtype of the parameter in the finished model.
        multiplicative: learn the logarithm of the magnitude; signs and zeros stay. Else learn additively.
        rate: factor on the learning rate.
        start: what ``Distillation`` starts from, where that is finer than ``parameter`` can hold; None: ``parameter``.
    """

    parameter: Tensor
    stored: torch.dtype = torch.float16
    multiplicative: bool = False
    rate: float = 1.0
    start: Tensor | None = None

    @property
    def first(self) -> Tensor:
        """The values before the first update, as one float32 vector."""
        values = self.parameter if self.start is None else self.start.to(self.parameter.device)
        return values.detach().float().reshape(-1)


@dataclass(frozen=True)
class DistillOptions:
    """How to distill.

    Attributes:
        steps: updates, of one batch each.
        learning_rate: largest relative step.
        sign_rate: largest step of the latents, in units of the weight's magnitude; of codes, in codes.
        warmup: updates over which the rate rises linearly; then it falls as half a cosine to
            ``final_rate`` times the largest.
        final_rate: see ``warmup``.
        betas, epsilon: Adam's.
        clip: largest norm of the relative gradient; a longer one is shortened to it. None never shortens.
        temperature: of the divergence in training; held-out values are always taken at 1.
        evaluate_every: updates between evaluations on held-out tokens.
        diverged: an evaluation above the best by this factor goes back to the best, clears Adam's moments and halves
            the rate.
        cache_bytes: memory for the teacher's features of batches that are met more than once; held-out ones may have
            as much again.
        seed: order of the batches.

    Raises:
        ValueError: a value out of range.
    """

    steps: int = 100
    learning_rate: float = 0.02
    sign_rate: float = 0.01
    warmup: int = 10
    final_rate: float = 0.0
    betas: tuple[float, float] = (0.9, 0.98)
    epsilon: float = 1e-8
    clip: float | None = None
    temperature: float = 1.0
    evaluate_every: int = 25
    diverged: float = 1.5
    cache_bytes: int = 1 << 29
    seed: int = 0

    def __post_init__(self) -> None:
        positive = ("learning_rate", "epsilon", "temperature", "evaluate_every")
        wrong = [name for name in positive if not getattr(self, name) > 0]
        wrong += [
            name for name in ("steps", "warmup", "cache_bytes", "final_rate", "sign_rate") if getattr(self, name) < 0
        ]
        wrong += ["betas"] if not all(0 <= beta < 1 for beta in self.betas) else []
        wrong += ["clip"] if self.clip is not None and not self.clip > 0 else []
        wrong += ["diverged"] if not self.diverged > 1 else []
        if wrong:
            name = wrong[0]
            raise ValueError(f"DistillOptions: {name}={getattr(self, name)!r} is out of range; see its description")

    def rate(self, step: int) -> float:
        """Learning rate of update ``step``, counted from 0."""
        return self.learning_rate * self.share(step)

    def share(self, step: int) -> float:
        """What is taken of the largest rates at update ``step``."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        cosine = 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
        return self.final_rate + (1 - self.final_rate) * cosine


@dataclass
class DistillResult:
    """What came of it.

    Attributes:
        start, best: held-out KL before and after, both of the stored values.
        best_step: updates behind the best state; 0 if the start stayed the best.
        tokens: rows trained on.
        log: one dict per evaluation: step, tokens, rate, kl_train (mean since the last one), kl_heldout, rolled_back.
    """

    start: float
    best: float
    best_step: int
    tokens: int
    log: list[dict[str, Any]] = field(default_factory=list)


class Distillation:
    """One run, which may stop after any update and go on elsewhere from :meth:`state`.

    Args:
        pair: student and teacher.
        trained: the parameters that learn, by name. Nothing else changes.
        batches: what to train on; update k takes the k-th of them in an order that ``seed`` shuffles anew each epoch.
        heldout: what to judge on; never trained on.
        options: how.
        after_update: called whenever parameters have new values; folds them into matrices, for example.
        latents: signs and codes that learn too, at ``sign_rate``; None where none do.

    Raises:
        ValueError: no parameters, batches or held-out batches, or a parameter that takes no gradient.
    """

    def __init__(
        self,
        pair: Pair,
        trained: Mapping[str, Trained],
        batches: Sequence[Batch],
        heldout: Sequence[Batch],
        options: DistillOptions | None = None,
        after_update: Callable[[], None] | None = None,
        latents: Latents | None = None,
    ) -> None:
        for name, values in (("trained", trained), ("batches", batches), ("heldout", heldout)):
            if not len(values):
                raise ValueError(f"Distillation: {name} is empty, expected at least one entry")
        frozen = [name for name, t in trained.items() if not (t.parameter.is_leaf and t.parameter.requires_grad)]
        if frozen:
            raise ValueError(f"Distillation: {frozen[0]!r} takes no gradient: call requires_grad_(True) on it first")
        self.pair, self.trained, self.batches, self.heldout = pair, dict(trained), batches, heldout
        self.options = options or DistillOptions()
        self._after_update = after_update or (lambda: None)
        self._latents = latents
        self._best_values = None if latents is None else latents.values()
        self._settled = False
        self._sizes = [t.parameter.numel() for t in self.trained.values()]
        # One flat vector: Adam is then a handful of operations however many tensors there are.
        self._theta = torch.cat([t.first for t in self.trained.values()])
        ones = [torch.ones(size, device=self._theta.device) for size in self._sizes]
        magnitudes = [_magnitude(t.first) for t in self.trained.values()]
        self._magnitude = torch.cat([one * m for one, m in zip(ones, magnitudes, strict=True)])
        self._rates = torch.cat([one * t.rate for one, t in zip(ones, self.trained.values(), strict=True)])
        self._multiplicative = torch.cat(
            [one.bool() & t.multiplicative for one, t in zip(ones, self.trained.values(), strict=True)]
        )
        self._m, self._v = torch.zeros_like(self._theta), torch.zeros_like(self._theta)
        self._best_theta = self._theta.clone()
        self._step = self._adam_step = self._tokens = 0
        self._rate_factor, self._start, self._best, self._best_step = 1.0, math.nan, math.nan, 0
        self._losses: list[float] = []
        self._log: list[dict[str, Any]] = []
        self._heldout_cache: dict[int, Tensor] = {}
        self._cache: dict[int, Tensor] = {}

    @property
    def step(self) -> int:
        """Updates done."""
        return self._step

    def run(
        self,
        until: int | None = None,
        callback: Callable[[dict[str, Any]], None] | None = None,
        after_step: Callable[[], None] | None = None,
    ) -> DistillResult:
        """Go on to update ``until`` (the last one when None), and leave the student there.

        At the end of the last update the student has the best stored values; before, those it trains with.

        Args:
            until: where to stop.
            callback: called with each new entry of the log.
            after_step: called after each update, and after the evaluation that may follow it, when :meth:`state` is
                that of the update's end.

        Raises:
            ValueError: the held-out KL is not finite before the first update: no later one could be compared with it.
        """
        last = self.options.steps if until is None else min(until, self.options.steps)
        if math.isnan(self._start):
            self._start = self._best = self._judged_start()
        self._publish(self._theta)
        while self._step < last:
            self._update()
            if self._step % self.options.evaluate_every == 0 or self._step == self.options.steps:
                entry = self._judge()
                if callback is not None:
                    callback(entry)
            if after_step is not None:
                after_step()
        if self._step >= self.options.steps:
            self._settle()
        return DistillResult(self._start, self._best, self._best_step, self._tokens, list(self._log))

    @torch.no_grad()
    def evaluate(self) -> float:
        """Held-out KL of the current parameters, rounded as they are stored."""
        self._publish(self._rounded(self._theta))
        total, rows = 0.0, 0
        for index, batch in enumerate(self.heldout):
            targets = self._kept_targets(self._heldout_cache, index, batch)
            total += self.pair.loss(batch, targets).item() * len(targets)
            rows += len(targets)
        self._publish(self._theta)
        return total / rows

    def _judged_start(self) -> float:
        """Held-out KL before the first update."""
        kl = self.evaluate()
        if not math.isfinite(kl):
            raise ValueError(
                f"Distillation: the held-out KL is {kl} before the first update, expected a finite number; "
                f"{self._not_finite()}. Check the weights and scales of that model for NaN, inf and values that "
                "overflow in the dtype it computes in"
            )
        return kl

    @torch.no_grad()
    def _not_finite(self) -> str:
        """Whose outputs are to blame for a KL that is not finite, and where."""
        for index, batch in enumerate(self.heldout):
            for whose, features in (("teacher", self.pair.teacher(batch)), ("student", self.pair.student(batch))):
                wrong = int((~features.isfinite()).any(-1).sum())
                if wrong:
                    return (
                        f"the {whose} gives NaN or inf for {wrong} of {len(features)} tokens of held-out batch {index}"
                    )
        return "both models' features are finite, so the logits of the student or the teacher are too large"

    def seconds_per_update(self, samples: int = 2) -> float:
        """Time the work of an update, so that a number of steps can be chosen before a run; nothing changes.

        A run that has to be repeatable takes a number of steps, never a time: write the number down.

        Args:
            samples: updates to time after a first one that warms up; the fastest counts.
        """
        times = []
        for sample in range(1 + max(1, samples)):
            start = time.perf_counter()
            self._gradient(self.order(self._step + sample))  # another batch each, so that the teacher works too
            if self._latents is not None:
                self._latents.drop_gradients()
            self._publish(self._theta)
            times.append(time.perf_counter() - start)
        return min(times[1:])

    def stored(self) -> dict[str, Tensor]:
        """The best parameters found so far, in the dtypes of the finished model."""
        parts = self._best_theta.split(self._sizes)
        return {
            name: part.reshape(t.parameter.shape).to(t.stored)
            for (name, t), part in zip(self.trained.items(), parts, strict=True)
        }

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that a new ``Distillation`` with the same arguments needs to go on: tensors, and values for JSON."""
        own = {"theta": self._theta, "m": self._m, "v": self._v, "best_theta": self._best_theta}
        values = {
            "step": self._step,
            "adam_step": self._adam_step,
            "tokens": self._tokens,
            "rate_factor": self._rate_factor,
            "start": _from_nan(self._start),
            "best": _from_nan(self._best),
            "best_step": self._best_step,
            "losses": list(self._losses),
            "log": list(self._log),
            "fingerprint": self._fingerprint(),
        }
        moving: dict[str, Tensor] = {}
        if self._latents is not None and self._best_values is not None:
            own |= {f"best_values.{name}": tensor for name, tensor in self._best_values.items()}
            found, values["latents"] = self._latents.state()  # copies: several numbers a weight, not to be copied again
            moving = {f"latents.{name}": tensor for name, tensor in found.items()}
        return {name: tensor.clone() for name, tensor in own.items()} | moving, values

    def load_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Take up where :meth:`state` was called.

        Names, shapes, options and the number of batches are compared; what is in the batches and in the frozen part
        of the student is the caller's to compare.

        Raises:
            ValueError: the state is of other parameters, batches or options.
        """
        mine, other = self._fingerprint(), values.get("fingerprint")
        if other != mine:
            theirs = other if isinstance(other, dict) else {}
            different = sorted(key for key in mine if mine[key] != theirs.get(key))
            raise ValueError(
                f"Distillation.load_state: the state is of another run: {', '.join(different)} differ; pass the same "
                "arguments, or start without it"
            )
        for name in ("theta", "m", "v", "best_theta"):
            setattr(self, f"_{name}", tensors[name].to(self._theta.device, torch.float32).clone())
        self._step, self._adam_step = int(values["step"]), int(values["adam_step"])
        self._tokens, self._best_step = int(values["tokens"]), int(values["best_step"])
        self._rate_factor = float(values["rate_factor"])
        self._start, self._best = _to_nan(values["start"]), _to_nan(values["best"])
        self._losses, self._log = list(values["losses"]), list(values["log"])
        if self._latents is not None and self._best_values is not None:
            prefix = "latents."
            moving = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
            self._latents.load_state(moving, values["latents"])
            self._best_values = {
                name: tensors[f"best_values.{name}"].to(self._theta.device, copy=True) for name in self._best_values
            }
        self._publish(self._theta)

    def _fingerprint(self) -> dict[str, Any]:
        shapes = {
            name: [list(t.parameter.shape), str(t.stored), t.multiplicative, t.rate] for name, t in self.trained.items()
        }
        options = json.loads(json.dumps(asdict(self.options)))  # as it looks after a round trip
        return {
            "trained": shapes,
            "latents": [] if self._latents is None else list(self._latents.latents),
            "options": options,
            "batches": len(self.batches),
            "heldout": len(self.heldout),
        }

    def _update(self) -> None:
        loss, gradient, rows = self._gradient(self.order(self._step))
        self._adam(gradient)
        self._losses.append(loss)
        self._tokens += rows
        self._step += 1
        self._publish(self._theta)

    def _gradient(self, index: int) -> tuple[float, Tensor, int]:
        """Loss of one batch, its gradient as one float32 vector, and the batch's rows."""
        targets = self._targets(index)
        loss = self.pair.loss(self.batches[index], targets, self.options.temperature)
        gradients = torch.autograd.grad(loss, [t.parameter for t in self.trained.values()], allow_unused=True)
        flat = torch.cat(
            [
                torch.zeros(size, device=self._theta.device) if g is None else g.float().reshape(-1)
                for g, size in zip(gradients, self._sizes, strict=True)
            ]
        )
        return loss.item(), flat, len(targets)

    def _adam(self, gradient: Tensor) -> None:
        options, rate = self.options, self.options.rate(self._step) * self._rate_factor
        gradient = gradient * torch.where(self._multiplicative, self._theta, self._magnitude)
        norm = gradient.norm()
        if not bool(norm.isfinite()):
            if self._latents is not None:
                self._latents.drop_gradients()
            return  # one overflow must not end the run; the next evaluation judges what is left
        if options.clip is not None:
            gradient = gradient * (options.clip / norm.clamp_min(options.clip))
        self._adam_step += 1
        beta_1, beta_2 = options.betas
        self._m.lerp_(gradient, 1 - beta_1)
        self._v.lerp_(gradient.square(), 1 - beta_2)
        m = self._m / (1 - beta_1**self._adam_step)
        v = self._v / (1 - beta_2**self._adam_step)
        if self._latents is not None:
            self._latents.step(options.sign_rate * options.share(self._step) * self._rate_factor)
        move = -rate * self._rates * m / (v.sqrt() + options.epsilon)
        self._theta = torch.where(self._multiplicative, self._theta * move.exp(), self._theta + move * self._magnitude)

    def _settle(self) -> None:
        """Give the student the best stored values for good; its signs and codes are its own from now on."""
        if self._latents is not None and self._best_values is not None and not self._settled:
            self._latents.go_back(self._best_values)
            self._latents.publish()
            self._latents.release()
        self._settled = True
        self._theta = self._rounded(self._best_theta)
        self._publish(self._theta)

    def _judge(self) -> dict[str, Any]:
        kl = self.evaluate()
        diverged = not kl <= self._best * self.options.diverged  # catches nan too
        if kl < self._best:
            self._best, self._best_step, self._best_theta = kl, self._step, self._theta.clone()
            self._best_values = None if self._latents is None else self._latents.values()
        entry = {
            "step": self._step,
            "tokens": self._tokens,
            "rate": self.options.rate(self._step - 1) * self._rate_factor,
            "kl_train": _from_nan(sum(self._losses) / len(self._losses)),
            "kl_heldout": _from_nan(kl),
            "rolled_back": diverged,
        }
        self._losses = []
        self._log.append(entry)
        if diverged:
            self._theta = self._best_theta.clone()
            if self._latents is not None and self._best_values is not None:
                self._latents.go_back(self._best_values)
            self._m.zero_()
            self._v.zero_()
            self._adam_step = 0
            self._rate_factor *= 0.5
            self._publish(self._theta)
        return entry

    def order(self, step: int) -> int:
        """Which batch update ``step`` takes, of :attr:`batches`; also beyond the last step."""
        epoch, position = divmod(step, len(self.batches))
        generator = torch.Generator().manual_seed(self.options.seed * 1_000_003 + epoch)
        return int(torch.randperm(len(self.batches), generator=generator)[position])

    def _targets(self, index: int) -> Tensor:
        if self.options.steps <= len(self.batches):  # none is met again
            return self.pair.targets(self.batches[index])
        return self._kept_targets(self._cache, index, self.batches[index])

    def _kept_targets(self, cache: dict[int, Tensor], index: int, batch: Batch) -> Tensor:
        """The teacher's features of a batch, kept while there is room: where heads cannot be split off, a token has as
        many as the vocabulary."""
        targets = cache.get(index)
        if targets is None:
            targets = self.pair.targets(batch)
            if sum(kept.nbytes for kept in cache.values()) + targets.nbytes <= self.options.cache_bytes:
                cache[index] = targets
        return targets

    def _rounded(self, theta: Tensor) -> Tensor:
        parts = zip(theta.split(self._sizes), self.trained.values(), strict=True)
        return torch.cat([part.to(t.stored).float() for part, t in parts])

    @torch.no_grad()
    def _publish(self, theta: Tensor) -> None:
        for part, t in zip(theta.split(self._sizes), self.trained.values(), strict=True):
            t.parameter.copy_(part.view(t.parameter.shape))
        self._after_update()


def _magnitude(values: Tensor) -> float:
    """Mean magnitude, the unit of additive steps; an all-zero tensor (a fresh bias) gets a small one."""
    return values.abs().mean().item() or 1e-2


def _from_nan(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _to_nan(value: float | None) -> float:
    return math.nan if value is None else float(value)
