"""One run: the same sequences in the same order, a learning rate that rises and falls, held-out tokens in between."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_onebit import evaluation
from hf_onebit.algorithms.divergence import kl_from_features
from hf_onebit.head_split import pair

from .contenders import Contender

Curve = list[dict[str, Any]]


def rate_at(step: int, steps: int) -> float:
    """Share of the largest learning rate: a tenth of the steps upwards, then half a cosine to zero.

    >>> [round(rate_at(step, 21), 2) for step in (0, 1, 2, 11, 20)]
    [0.33, 0.67, 1.0, 0.55, 0.01]
    """
    rise = max(1, steps // 10)
    if step < rise:
        return (step + 1) / (rise + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / (steps - rise)))


def losses(contender: Contender, objective: str, teacher: Any, probe: Tensor) -> Callable[[Tensor], Tensor]:
    """(length,) token ids -> the loss: "text" of the next token, "teacher" the mean KL to its distribution."""
    if objective == "text":
        return lambda window: contender.model(input_ids=window[None], labels=window[None], use_cache=False).loss
    both = pair(contender.inner, contender.inner, {"input_ids": probe[None]})

    def divergence(window: Tensor) -> Tensor:
        with torch.no_grad():
            targets = teacher(input_ids=window).logits.flatten(0, -2)
        found = both.student({"input_ids": window[None]})
        return kl_from_features(targets, found, None, both.student_head)

    return divergence


def score(contender: Contender, teacher: Any, windows: Sequence[Tensor]) -> dict[str, Any]:
    """Mean loss of the next token, nats, and beside a teacher the mean KL to it, of windows that never train."""
    with contender.precision():
        if teacher is None:
            return {"loss": evaluation.perplexity(contender.inner, windows)["nll"]}
        found = evaluation.compare(contender.inner, teacher, windows)
    return {"loss": found["nll"], "kl": found["kl"], "teacher_loss": math.log(found["reference_perplexity"])}


def train(
    contender: Contender,
    objective: str,
    windows: Sequence[Tensor],
    heldout: Sequence[Tensor],
    teacher: Any = None,
    evaluations: int = 1,
    say: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Train on all windows, one a step.

    Args:
        contender: trained in place.
        objective: "text" or "teacher".
        windows: (length,) token ids each.
        heldout: likewise, scored at the start and ``evaluations`` times after it.
        teacher: logits of any of these windows; None without a teacher.
        evaluations: at most as many as windows.
        say: told each score.

    Returns:
        ``curve``, entries with step, tokens, loss and, with a teacher, kl; ``seconds`` of the processor in steps, and
        of these ``optimizer_seconds`` outside of forward and backward; ``metrics`` of the last step on packed weights.
    """
    loss_of = losses(contender, objective, teacher, windows[0])
    steps = len(windows)
    stops = {round(steps * number / evaluations) for number in range(1, evaluations + 1)}
    full = [group["lr"] for group in contender.optimizer.param_groups]
    curve: Curve = [{"step": 0, "tokens": 0, **score(contender, teacher, heldout)}]
    say(f"  start {curve[0]}")
    seconds = optimizer_seconds = training = 0.0
    for step, window in enumerate(windows):
        start = time.process_time()
        for group, rate in zip(contender.optimizer.param_groups, full, strict=True):
            group["lr"] = rate * rate_at(step, steps)
        with contender.precision():
            loss = loss_of(window)
        loss.backward()
        middle = time.process_time()
        contender.optimizer.step()
        contender.optimizer.zero_grad()
        end = time.process_time()
        seconds, optimizer_seconds = seconds + end - start, optimizer_seconds + end - middle
        training += loss.item()
        if step + 1 in stops:
            tokens = sum(len(w) for w in windows[: step + 1])
            curve.append({"step": step + 1, "tokens": tokens, **score(contender, teacher, heldout)})
            curve[-1]["training_loss"] = training / (step + 1)
            say(f"  {curve[-1]}, {seconds:.0f} s of the processor")
    metrics = getattr(contender.optimizer, "metrics", dict)()
    return {"curve": curve, "seconds": seconds, "optimizer_seconds": optimizer_seconds, "metrics": metrics}
