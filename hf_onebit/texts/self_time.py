"""What it takes a model to write its own calibration text, by a few of the steps that it will take."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from hf_onebit.modes import evaluating
from hf_onebit.texts.model_states import skip, state_bytes
from hf_onebit.texts.openings import Openings
from hf_onebit.texts.self_text import (
    LONGEST,
    SIDE_BY_SIDE,
    Writer,
    check_writes,
    draw,
    longest_text,
    most_rows,
    rows_of_wave,
)

# Of the tokens of a wave, those of texts that are not dropped.
_KEPT = 0.9
_TIMED_STEPS = 2


class Writing(NamedTuple):
    """An estimate.

    Attributes:
        seconds: from the first token to the last.
        more_bytes: memory beside the model: keys and values, and the predictions of one step.
    """

    seconds: float
    more_bytes: int


@torch.no_grad()
def estimate_writing(
    model: Any, tokenizer: Any, tokens: int, *, longest: int = LONGEST, seed: int = 0, side_by_side: int = SIDE_BY_SIDE
) -> Writing:
    """What ``write_texts`` will take. The model and every random state stay as they are.

    A step of all texts at a time is run and timed with as many of them as the largest and the smallest wave has, half
    of their length written already where the model's state allows for that. A tenth of what is written is taken to be
    dropped.

    Args:
        model, tokenizer, tokens, longest, seed, side_by_side: as of ``write_texts``.

    Raises:
        ValueError: the model cannot write (``check_writes``).
    """
    check_writes(model, tokenizer)
    longest = longest_text(model, longest)
    waves = list(_waves(tokens, most_rows(model, longest, side_by_side), longest))
    few, many = min(waves), max(waves)
    with evaluating(model):
        times = {rows: _time_step(model, tokenizer, rows, longest, seed) for rows in sorted({few, many})}
    slope = max(0.0, times[many] - times[few]) / max(1, many - few)
    seconds = sum(longest * (times[few] + slope * (rows - few)) for rows in waves)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    return Writing(seconds, int(many * (longest * state_bytes(model) + 4 * 4 * vocabulary)))


def _waves(tokens: int, width: int, longest: int) -> Iterator[int]:
    """Texts side by side in each wave, the last ones for what was dropped."""
    missing = tokens
    while missing > 0:
        rows = rows_of_wave(missing, width, longest)
        yield rows
        missing -= max(1, int(_KEPT * rows * longest))


def _time_step(model: Any, tokenizer: Any, rows: int, longest: int, seed: int) -> float:
    """Seconds of one step in the middle of a wave."""
    writer = Writer(model, tokenizer, Openings(tokenizer, seed), longest, seed)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.zeros(rows, 1, dtype=torch.int64, device=model.device)
    mask = torch.ones(rows, longest, dtype=torch.int64, device=model.device)
    logits, state = writer.forward(ids, mask[:, :1], torch.zeros_like(ids), None)
    middle = longest // 2
    length = middle if middle > 1 and middle + _TIMED_STEPS < longest and skip(state, middle) else 1
    even = torch.ones(logits.shape, device=logits.device)  # what follows from zeros need not be finite
    times = []
    for step in range(length, min(length + 1 + _TIMED_STEPS, longest)):
        start = time.perf_counter()
        logits, state = writer.forward(ids, mask[:, : step + 1], torch.full_like(ids, step), state)
        logits.float().softmax(-1)
        draw(even, torch.rand(rows, generator=generator)).tolist()
        times.append(time.perf_counter() - start)
    return min(times[1:] or times or [0.0])  # the first one warms up
