"""Moments in eight bits against float ones, factored moments, and the subspace projector."""

import pytest
import torch

from hf_onebit.algorithms.counter_random import random_words
from hf_onebit.algorithms.moments import BLOCK, BlockwiseMoment, FactoredMoment
from hf_onebit.training.projector import LowRankProjector, leading_basis

EVERYTHING = slice(None)


def words_of(shape, seed=0):
    return random_words(shape, seed, 1, 0)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("rows", [BLOCK, 300, 5])
def test_every_code_is_kept_as_it_is(signed, rows):
    codes = torch.arange(-127, 128, dtype=torch.int8) if signed else torch.arange(256).to(torch.uint8)
    codes = codes.repeat(-(-rows * 3 // len(codes)))[: rows * 3].view(3, rows).T.contiguous()
    codes[0] = codes[BLOCK - 1 :: BLOCK] = 127 if signed else 255  # a block holds its peak
    codes[rows // BLOCK * BLOCK if rows % BLOCK else -1] = 127 if signed else 255
    moment = BlockwiseMoment(codes.clone(), torch.rand(-(-rows // BLOCK), 3) + 0.5)
    values, peaks = moment.read(), moment.peaks.clone()
    assert float(values.max()) == float(peaks.max())
    for lane in (0, 1):
        again = BlockwiseMoment.zeros((rows, 3), signed, lane)
        again.write(EVERYTHING, values, words_of((rows, 3)))
        assert torch.equal(again.codes, codes)
        assert torch.equal(again.peaks, peaks)


@pytest.mark.parametrize(("signed", "lane"), [(True, 0), (True, 1), (False, 1)])
def test_what_is_stored_is_the_value_in_the_mean(signed, lane):
    torch.manual_seed(0)
    value = torch.randn(200, 3) if signed else torch.randn(200, 3).square() * 1e-6
    moment, total, draws = BlockwiseMoment.zeros((200, 3), signed, lane), torch.zeros(200, 3), 400
    for seed in range(draws):
        moment.write(EVERYTHING, value, words_of((200, 3), seed))
        stored = moment.read()
        total += stored
    worst = (stored - value).abs()
    peak = moment.peaks.repeat_interleave(BLOCK, 0)[:200]
    allowed = peak * 2 / 127 if signed else value / 8 * 1.001
    assert bool((worst <= allowed).all())
    error = (total / draws - value) / allowed
    # The noise of one draw is at most half of what is allowed.
    assert float(error.abs().max()) < 5 * 0.5 / draws**0.5
    assert abs(float(error.mean())) < 5 * 0.5 / (draws * 600) ** 0.5


def test_small_second_moments_are_not_zero_and_zeros_are():
    value = torch.tensor([[1.0, 0.0], [1e-30, 0.0], [0.0, 0.0]])
    moment = BlockwiseMoment.zeros((3, 2), signed=False, lane=1)
    moment.write(EVERYTHING, value, words_of((3, 2)))
    got = moment.read()
    assert float(got[0, 0]) == 1
    assert 0 < float(got[1, 0]) < 1e-8
    assert float(got[2, 0]) == 0
    assert not got[:, 1].any()


@pytest.mark.parametrize("signed", [True, False])
def test_a_slow_average_follows_its_float_twin(signed):
    torch.manual_seed(0)
    shape, beta = (256, 4), 0.99
    moment, twin = BlockwiseMoment.zeros(shape, signed, 1), torch.zeros(shape)
    mean = torch.randn(shape) if signed else torch.rand(shape) + 0.1
    for step in range(700):
        value = mean + 0.5 * torch.randn(shape) if signed else (mean * torch.randn(shape)).square()
        words = random_words(shape, 0, step, 0)
        moment.advance(slice(0, 2), value[:, :2], beta, words[:, :2])
        moment.advance(slice(2, 4), value[:, 2:], beta, words[:, 2:])
        twin.mul_(beta).add_(value, alpha=1 - beta)
    got = moment.read()
    # The noise of the rounding adds up too: to about a tenth of m, and of the root of v, that steps are divided by.
    pair = (got, twin) if signed else (got.sqrt(), twin.sqrt())
    assert float((pair[0] - pair[1]).norm() / pair[1].norm()) < 0.15
    assert abs(float((got - twin).sum() / twin.abs().sum())) < 0.02


def test_factored_moments():
    torch.manual_seed(0)
    row, col = torch.rand(40) + 0.1, torch.rand(30) + 0.1
    moment = FactoredMoment.zeros((40, 30))
    gradient = (row[:, None] * col).sqrt() * torch.randn(40, 30).sign()
    for _ in range(3):
        moment.begin(gradient, True, 0.9)
    words = words_of((40, 30))
    got = torch.cat([moment.advance(p, gradient[:, p], 0.9, words[:, p]) for p in (slice(0, 7), slice(7, 30))], 1)
    torch.testing.assert_close(got, gradient.square() * (1 - 0.9**3), rtol=1e-4, atol=1e-8)
    with pytest.raises(ValueError, match="a factored moment holds squares"):
        moment.begin(gradient, False, 0.9)


@pytest.mark.parametrize("shape", [(40, 60), (60, 40)])
def test_the_basis_spans_the_largest_singular_vectors(shape):
    torch.manual_seed(0)
    G = torch.randn(shape[0], 6) @ torch.diag(torch.tensor([9.0, 8, 7, 6, 0.05, 0.05])) @ torch.randn(6, shape[1])
    P = leading_basis(G, 4, 1, 2, 3)
    torch.testing.assert_close(P.T @ P, torch.eye(4), atol=1e-5, rtol=0)
    best = torch.linalg.svd(G)[0][:, :4]
    assert float((P.T @ best).norm()) == pytest.approx(2, abs=1e-3)
    assert torch.equal(P, leading_basis(G, 4, 1, 2, 3))


@pytest.mark.parametrize("shape", [(40, 60), (60, 40)])
def test_the_projector_keeps_its_basis_for_a_gap(shape):
    torch.manual_seed(0)
    state = {}
    projector = LowRankProjector(state, 8, 5, 0.5, 0, 0)
    G = torch.randn(shape)
    low = projector.project(G, 1)
    assert tuple(low.shape) == ((8, 60) if shape[0] < shape[1] else (60, 8))
    first = state["basis"].clone()
    projector.project(torch.randn(shape), 5)
    assert torch.equal(state["basis"], first)
    back = projector.project_back(low)
    assert tuple(back.shape) == shape
    # Half of an orthogonal projection: what is left is orthogonal to it.
    assert float(((G - 2 * back) * back).sum()) == pytest.approx(0, abs=1e-2)
    pieces = [projector.project_back_columns(low, p) for p in (slice(0, 11), slice(11, shape[1]))]
    torch.testing.assert_close(torch.cat(pieces, 1), back)
    projector.project(torch.randn(shape), 6)
    assert not torch.equal(state["basis"], first)
