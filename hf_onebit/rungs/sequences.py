"""How calibration sequences are cut, which of them are held out, and how the others make up the steps of training."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence

import torch

from hf_onebit.calibration import Batch, real_tokens
from hf_onebit.distillation import joined
from hf_onebit.rungs.recipes import Recipe

# Every so many sequences one is held out: the shrinkage and the strength of the correction are chosen on it.
HELDOUT_EVERY = 8
# Of pieces of many lengths, so many are sorted at a time.
_SORTED_PIECES = 64
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


def split(piece: Piece, tokens: int) -> list[Piece]:
    """A piece in two: what is in front of its last ``tokens`` tokens, unless that is padding alone, and these.

    Of several rows, the second has at least so many.
    """
    batch, length = piece
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    behind = mask.sum(0).flip(0).cumsum(0).flip(0)  # tokens from each column on
    start = int((behind >= tokens).sum()) - 1
    parts = [{key: value[:, part] for key, value in batch.items()} for part in (slice(start), slice(start, None))]
    return [(part, length) for part in parts if real_tokens(part)]


def judging_sequences(count: int) -> set[int]:
    """Which of so many sequences that layers are fitted on are held out to judge by; none of fewer than four.

    Without them, blocks are not tuned, and what would be chosen on them is as usual.
    """
    judging = set(range(HELDOUT_EVERY - 1, count, HELDOUT_EVERY))
    return judging or ({count - 1} if count >= HELDOUT_EVERY // 2 else set())


def hold_out(batches: Sequence[Batch], recipe: Recipe) -> tuple[list[Piece], list[Piece]]:
    """What distillation learns on, and the last pieces, which judge it; none does where there is one piece only.

    Where all of a piece would make more than an eighth of the tokens, its end judges and the rest is learnt from.
    """
    pieces = cut_in_turn(batches, recipe.lengths)
    eighth = tokens_of(pieces) // 8
    wanted = min(recipe.heldout_tokens, eighth)
    heldout: list[Piece] = []
    while (heldout or len(pieces) > 1) and (missing := wanted - tokens_of(heldout)) > 0:
        last = pieces.pop()
        if tokens_of([*heldout, last]) > eighth and missing < tokens_of([last]):
            *front, last = split(last, missing)
            pieces += front
        heldout.append(last)
    return pieces, heldout


def prefix_batches(batches: Sequence[Batch], recipe: Recipe) -> list[Batch]:
    """The first sequences, cut to ``prefix_lengths`` in turn, up to ``prefix_tokens`` of them; at least one.

    None of what distillation is judged on.
    """
    judged = tokens_of(hold_out(batches, recipe)[1])
    pieces = cut_in_turn(batches, recipe.prefix_lengths)
    while judged > 0:
        last = pieces.pop()
        if tokens_of([last]) > judged:  # other lengths have other borders
            pieces += split(last, judged)[:-1]
        judged -= tokens_of([last])
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
    Pieces that were not long enough to be cut, as conversations are, share a step with others about as long.
    """
    order = list(pieces)
    if seed is not None:
        random.Random(seed).shuffle(order)
    longest = max(piece["input_ids"].shape[1] for piece, _ in order)
    alike: dict[int, list[Batch]] = {}
    for piece, length in order:
        alike.setdefault(min(length, longest), []).append(piece)
    return [joined(step) for group in alike.values() for step in _filled(group, step_tokens)]


def _filled(pieces: Sequence[Batch], step_tokens: int) -> Iterator[list[Batch]]:
    """Pieces shared out to steps that have no more than ``step_tokens`` tokens with their padding, or one piece.

    They are sorted by length a few steps at a time: what is in a step stays random, and little of it is padding.
    """
    waiting: list[Batch] = []
    for begin in range(0, len(pieces), _SORTED_PIECES):
        waiting += sorted(pieces[begin : begin + _SORTED_PIECES], key=lambda piece: piece["input_ids"].shape[1])
    step: list[Batch] = []
    for piece in waiting:
        together = [*step, piece]
        rows = sum(part["input_ids"].shape[0] for part in together)
        if step and rows * max(part["input_ids"].shape[1] for part in together) > step_tokens:
            yield step
            together = [piece]
        step = together
    if step:
        yield step
