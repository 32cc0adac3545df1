"""How calibration sequences are cut, held out, and shared out to steps."""

import pytest
import torch

from hf_onebit.calibration import real_tokens
from hf_onebit.config import CALIBRATION_TOKENS
from hf_onebit.rungs.recipes import MPQ_RECIPES, RECIPES, Recipe
from hf_onebit.rungs.sequences import cut, cut_in_turn, hold_out, in_steps, prefix_batches, split, tokens_of


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


def conversations(count, shortest, longest):
    """Sequences of many lengths, of which no two tokens are alike."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator).tolist()
    ends = torch.tensor(lengths).cumsum(0).tolist()
    return [{"input_ids": torch.arange(end - length, end)[None]} for length, end in zip(lengths, ends, strict=True)]


def test_sequences_of_many_lengths_fill_steps_too():
    rows = conversations(400, 40, 600)
    steps = in_steps(cut_in_turn(rows, (256, 2048)), step_tokens=2048, seed=0)
    real = [real_tokens(step) for step in steps]
    assert sum(real) == sum(row["input_ids"].numel() for row in rows)
    assert max(step["input_ids"].numel() for step in steps) <= 2048
    assert sum(real) / len(real) > 0.8 * 2048
    assert len(set(ids(steps).tolist())) == sum(real)  # padding is an id that is there anyway
    first = in_steps(cut_in_turn(rows, (256, 2048)), step_tokens=2048, seed=1)[0]
    assert not torch.equal(first["input_ids"], steps[0]["input_ids"])


def test_a_sequence_longer_than_a_step_is_one():
    steps = in_steps(cut_in_turn(numbered(2, 64), (64,)), step_tokens=16)
    assert [tuple(step["input_ids"].shape) for step in steps] == [(1, 64), (1, 64)]


def test_rows_of_a_batch_count():
    pairs = [({"input_ids": torch.arange(16).reshape(2, 8)}, 8) for _ in range(4)]
    assert [tuple(step["input_ids"].shape) for step in in_steps(pairs, step_tokens=32)] == [(4, 8), (4, 8)]


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


def judged_and_fitted(batches, recipe):
    """Ids that judge, and those fitted; nothing is lost, and nothing is on both sides."""
    learnt, heldout = hold_out(batches, recipe)
    judged, others = (ids([piece for piece, _ in pieces]).tolist() for pieces in (heldout, learnt))
    assert sorted([*judged, *others]) == sorted(ids(batches).tolist())
    fitted = ids(prefix_batches(batches, recipe)).tolist()
    assert not set(judged) & set(fitted)
    return set(judged), set(fitted)


@pytest.mark.parametrize("preset", RECIPES)
@pytest.mark.parametrize(
    ("rows", "length"), [(1, 257), (1, 500), (1, 512), (2, 300), (2, 2048), (4, 2048), (3, 2048), (9, 2048), (40, 700)]
)
def test_no_more_than_an_eighth_of_a_text_judges(preset, rows, length):
    total = rows * length
    judged, fitted = judged_and_fitted(numbered(rows, length), RECIPES[preset])
    assert judged == set(range(total - len(judged), total))  # the last ones
    assert min(total // 8, RECIPES[preset].heldout_tokens) <= len(judged) <= total // 8
    # What does not judge is fitted, up to the borders between pieces.
    assert len(fitted) == total - len(judged) or len(fitted) > RECIPES[preset].prefix_tokens - 2048


@pytest.mark.parametrize("recipes", [RECIPES, MPQ_RECIPES])
@pytest.mark.parametrize("preset", RECIPES)
@pytest.mark.parametrize("length", [512, 1024, 2048])
def test_what_judges_long_texts_is_whole_pieces(preset, recipes, length):
    recipe, total = recipes[preset], CALIBRATION_TOKENS[preset]
    batches = numbered(total // length, length)
    judged, _ = judged_and_fitted(batches, recipe)
    pieces, last = cut_in_turn(batches, recipe.lengths), []
    while tokens_of(last) < recipe.heldout_tokens:
        last.append(pieces.pop())
    assert judged == set(ids([piece for piece, _ in last]).tolist())


def test_splitting_counts_tokens_and_not_padding():
    mask = torch.tensor([[0, 1, 1, 0, 1, 1, 0, 0]])
    batch = {"input_ids": torch.arange(8)[None], "attention_mask": mask}
    front, back = split((batch, 16), 3)
    assert [part["input_ids"].tolist() for part, _ in (front, back)] == [[[0, 1]], [[2, 3, 4, 5, 6, 7]]]
    assert [part["attention_mask"].tolist() for part, _ in (front, back)] == [[[0, 1]], [[1, 0, 1, 1, 0, 0]]]
    assert {length for _, length in (front, back)} == {16}
    assert [tokens_of([part]) for part in (front, back)] == [1, 3]
    (whole,) = split((batch, 16), 4)  # nothing but padding in front
    assert whole[0]["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6, 7]]


def test_padded_sequences_are_held_out_by_their_tokens():
    recipe = Recipe(lengths=(16, 64), prefix_lengths=(32,))
    padding = (torch.arange(64) >= 24).long()[None]
    batches = [batch | {"attention_mask": padding} for batch in numbered(4, 64)]
    _, heldout = hold_out(batches, recipe)
    assert tokens_of(heldout) == 20  # of 4 * 40
    assert ids([piece for piece, _ in heldout]).tolist() == list(range(236, 256))
    fitted = set(ids(prefix_batches(batches, recipe)).tolist())
    assert {i for i in fitted if i % 64 >= 24} == {i for i in range(236) if i % 64 >= 24}
