"""How calibration sequences are cut, which of them are held out, and how the others make up the steps of training."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

from hf_onebit.calibration import Batch, real_tokens
from hf_onebit.distillation import stack
from hf_onebit.rungs.recipes import Recipe

# A piece of a sequence, and the most tokens that it might have had.
Piece = tuple[Batch, int]


def cut(batch: Batch, length: int) -> list[Batch]:
    """Pieces of one sequence, of at most ``length`` tokens; none that is padding alone."""
    total = batch["input_ids"].shape[1]
    pieces = [{key: value[:, i : i + length] for key, value in batch.items()} for i in range(0, total, length)]
    return [piece for piece in pieces if "attention_mask" not in piece or bool(piece["attention_mask"].any())]


def cut_in_turn(batches: Sequence[Batch], lengths: Sequence[int]) -> list[Piece]:
    """Pieces of all sequences, in order: of the first at most ``lengths[0]`` tokens, and so in turn."""
    turns = zip(batches, itertools.cycle(lengths), strict=False)
    return [(piece, length) for whole, length in turns for piece in cut(whole, length)]


def tokens_of(pieces: Sequence[Piece]) -> int:
    """Tokens in all of them, without padding."""
    return sum(real_tokens(piece) for piece, _ in pieces)


def hold_out(batches: Sequence[Batch], recipe: Recipe) -> tuple[list[Piece], list[Piece]]:
    """What distillation learns on, and the last pieces, which judge it; no such piece where there is one only."""
    pieces = cut_in_turn(batches, recipe.lengths)
    wanted = min(recipe.heldout_tokens, tokens_of(pieces) // 8)
    heldout: list[Piece] = []
    while len(pieces) > 1 and tokens_of(heldout) < wanted:
        heldout.append(pieces.pop())
    return pieces, heldout


def prefix_batches(batches: Sequence[Batch], recipe: Recipe) -> list[Batch]:
    """The first sequences, cut to ``prefix_lengths`` in turn, up to ``prefix_tokens`` of them; at least one.

    None of what distillation is judged on.
    """
    judged = tokens_of(hold_out(batches, recipe)[1])
    pieces = cut_in_turn(batches, recipe.prefix_lengths)
    while len(pieces) > 1 and judged > 0:
        judged -= tokens_of([pieces.pop()])
    chosen: list[Batch] = []
    total = 0
    for piece, _ in pieces:
        total += piece["input_ids"].numel()
        if chosen and total > recipe.prefix_tokens:
            break
        chosen.append(piece)
    return chosen


def in_steps(pieces: Sequence[Piece], step_tokens: int, seed: int | None = None) -> list[Batch]:
    """Batches of about ``step_tokens`` tokens, each of pieces that were cut to one length, or that are all shorter.

    With a ``seed`` in random order: a step of pieces of many texts has a steadier gradient than one of neighbours.
    """
    order = list(pieces)
    if seed is not None:
        random.Random(seed).shuffle(order)
    longest = max(piece["input_ids"].shape[1] for piece, _ in order)
    alike: dict[int, list[Batch]] = {}
    for piece, length in order:
        alike.setdefault(min(length, longest), []).append(piece)
    return [batch for length, group in alike.items() for batch in stack(group, max(1, step_tokens // length))]
