"""How calibration sequences are cut, held out, and shared out to steps."""

import pytest
import torch

from hf_onebit.rungs.recipes import Recipe
from hf_onebit.rungs.sequences import cut, cut_in_turn, hold_out, in_steps, prefix_batches, tokens_of


def numbered(rows, length):
    """Sequences of which no two tokens are alike."""
    return [{"input_ids": torch.arange(i * length, (i + 1) * length)[None]} for i in range(rows)]


def ids(batches):
    return torch.cat([batch["input_ids"].flatten() for batch in batches])


def test_sequences_are_cut_to_each_length_in_turn():
    pieces = cut_in_turn(numbered(4, 32), (8, 32))
    assert [length for _, length in pieces] == [8] * 4 + [32] + [8] * 4 + [32]
    assert [piece["input_ids"].shape[1] for piece, _ in pieces] == [8] * 4 + [32] + [8] * 4 + [32]
    assert torch.equal(ids([piece for piece, _ in pieces]), torch.arange(128))


def test_pieces_of_padding_alone_are_left_out():
    batch = {"input_ids": torch.arange(12)[None], "attention_mask": torch.tensor([[1] * 5 + [0] * 7])}
    assert [piece["input_ids"].tolist() for piece in cut(batch, 4)] == [[[0, 1, 2, 3]], [[4, 5, 6, 7]]]
    assert tokens_of([(piece, 4) for piece in cut(batch, 4)]) == 5


def test_steps_have_about_the_same_tokens_and_rows_of_one_length():
    pieces = cut_in_turn(numbered(8, 32), (8, 32))
    steps = in_steps(pieces, step_tokens=32, seed=0)
    assert sorted(tuple(step["input_ids"].shape) for step in steps) == [(1, 32)] * 4 + [(4, 8)] * 4
    assert torch.equal(ids(steps).sort().values, torch.arange(256))
    again = in_steps(pieces, step_tokens=32, seed=1)
    assert not torch.equal(ids(steps), ids(again))


def test_sequences_shorter_than_every_length_fill_steps_together():
    steps = in_steps(cut_in_turn(numbered(8, 6), (8, 32)), step_tokens=32, seed=0)
    assert max(step["input_ids"].shape[0] for step in steps) == 5
    assert sum(step["input_ids"].numel() for step in steps) == 48


@pytest.mark.parametrize("prefix_lengths", [(16,), (8, 32), (64,)])
@pytest.mark.parametrize("lengths", [(8,), (8, 32), (32, 16, 64)])
def test_what_judges_distillation_is_neither_fitted_nor_learnt(prefix_lengths, lengths):
    recipe = Recipe(prefix_tokens=10**6, prefix_lengths=prefix_lengths, lengths=lengths, heldout_tokens=72)
    batches = numbered(19, 64)
    learnt, heldout = hold_out(batches, recipe)
    judged = set(ids([piece for piece, _ in heldout]).tolist())
    assert 72 <= len(judged) < 72 + max(lengths)
    assert judged == set(range(19 * 64 - len(judged), 19 * 64))  # the last ones
    assert not judged & set(ids([piece for piece, _ in learnt]).tolist())
    fitted = set(ids(prefix_batches(batches, recipe)).tolist())
    assert fitted
    assert not judged & fitted
    assert min(judged) - max(fitted) <= max(prefix_lengths)


def test_one_piece_alone_is_learnt_from_and_judges_nothing():
    recipe = Recipe(lengths=(32,), prefix_lengths=(32,), heldout_tokens=8)
    learnt, heldout = hold_out(numbered(1, 16), recipe)
    assert len(learnt) == 1
    assert heldout == []
    assert len(prefix_batches(numbered(1, 16), recipe)) == 1
