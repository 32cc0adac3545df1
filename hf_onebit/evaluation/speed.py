"""How fast: seconds of greedy generation, of the prompt and of the tokens after it."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_onebit.evaluation.running import input_device
from hf_onebit.modes import evaluating

if TYPE_CHECKING:
    # At run time this would pull in the whole of Transformers' modelling code, for a name alone.
    from transformers import PreTrainedModel


def decode_speed(
    model: PreTrainedModel, input_ids: Tensor, new_tokens: int, *, repeats: int = 3
) -> dict[str, float | int]:
    """Tokens per second of greedy generation at batch 1, after one warm-up: the median over ``repeats``.

    The clock of decoding runs from the first new token to the last, so the time of the prompt is not in it;
    the prompt has a rate of its own. The end-of-text token is suppressed, so that every run makes
    ``new_tokens`` tokens.

    Args:
        model: a causal language model, float or packed, on any device.
        input_ids: the prompt, integers of shape (tokens,) or (1, tokens).
        new_tokens: tokens to generate, at least 2.
        repeats: timed runs, at least 1.

    Returns:
        ``tokens_per_second``, ``prompt_tokens_per_second``, ``new_tokens``, ``prompt_tokens``, ``repeats``.

    Raises:
        ValueError: a batch of prompts, an empty prompt, ``new_tokens`` below 2 or ``repeats`` below 1.
    """
    if new_tokens < 2:
        raise ValueError(
            f"new_tokens is {new_tokens}, expected at least 2: the clock runs between tokens. Try new_tokens=64."
        )
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}, expected at least 1. Try repeats=3.")
    ids = input_ids.unsqueeze(0) if input_ids.dim() == 1 else input_ids
    if ids.dim() != 2 or ids.shape[0] != 1 or ids.shape[1] == 0:
        raise ValueError(
            f"input_ids has shape {tuple(input_ids.shape)}, expected (tokens,) or (1, tokens) with at least one token. "
            "Time one prompt at a time."
        )
    ids = ids.to(input_device(model))
    with evaluating(model), torch.no_grad():
        timed_generation(model, ids, new_tokens)  # warm-up: kernels are chosen, caches and buffers made
        runs = [timed_generation(model, ids, new_tokens) for _ in range(repeats)]
    return {
        "tokens_per_second": (new_tokens - 1) / statistics.median(decode for _, decode in runs),
        "prompt_tokens_per_second": ids.shape[1] / statistics.median(prompt for prompt, _ in runs),
        "new_tokens": new_tokens,
        "prompt_tokens": ids.shape[1],
        "repeats": repeats,
    }


class _TokenClock:
    """A streamer for ``generate`` that only notes the time: of the prompt first, then of each new token.

    ``generate`` hands it tokens in host memory, so on an accelerator each time is taken after the work is done.
    """

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _tokens: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing to flush."""


def timed_generation(model: PreTrainedModel, ids: Tensor, new_tokens: int) -> tuple[float, float]:
    """Seconds from the call of ``generate`` to the first new token, and from there to the last: greedy, one sequence.

    Args:
        model: a causal language model in eval mode.
        ids: the prompt, integers of shape (1, tokens), on the model's device.
        new_tokens: tokens to generate, at least 2; the end-of-text token is suppressed.
    """
    clock = _TokenClock()
    generate: Any = model.generate
    generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        num_beams=1,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        use_cache=True,
        streamer=clock,
    )
    start, first, *rest = clock.times
    return first - start, rest[-1] - first
