"""Gated sign flips: which signs they choose, and that what does not help is undone."""

import math

import pytest
import torch
from distilled import bits, make_run, packed, same_bits, sequences
from tiny import tiny_llama

from hf_onebit.algorithms.flips import FlipOptions, choose_flips, flip_certainty, flip_gains, gated_flips
from hf_onebit.algorithms.sign_linear import SignPlane, sign_planes
from hf_onebit.nn import packed_layers


def signs_of(form):
    return {name: plane.signs.clone() for name, plane in sign_planes(form.student).items()}


def test_gains_are_first_order_exact_and_second_order_as_documented():
    signs = torch.randn(3, 5).sign()
    plane = SignPlane(signs, torch.rand(3) + 0.5, torch.rand(5) + 0.5, torch.float32)
    plane.collect_sign_gradient()
    x, gy = torch.randn(7, 5), torch.randn(7, 3)
    torch.autograd.grad(plane(x), [plane.a], gy)
    w = plane.folded
    G = gy.t() @ x / 7
    H = torch.outer(gy.square().mean(0), x.square().mean(0))
    torch.testing.assert_close(flip_gains(plane), 2 * w * G - 2 * w.square() * H, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("score", [flip_gains, flip_certainty])
def test_flips_are_chosen_over_all_planes_and_only_where_they_gain(score):
    planes = {name: SignPlane(torch.ones(4, 6), torch.full((4,), 0.02), torch.ones(6), torch.float32) for name in "ab"}
    scores = {}
    for scale, (name, plane) in enumerate(planes.items(), 1):
        plane.collect_sign_gradient()
        for _ in range(5):
            torch.autograd.grad(plane(torch.randn(3, 6)), [plane.a], scale * torch.randn(3, 4))
        scores[name] = score(plane).reshape(-1)
    ranked = sorted(((g, n, i) for n, values in scores.items() for i, g in enumerate(values.tolist())), reverse=True)
    picks = choose_flips(planes, 9, score)
    assert {(n, i) for n, index in picks.items() for i in index.tolist()} == {(n, i) for _, n, i in ranked[:9]}
    positive = sum(int((flip_gains(plane) > 0).sum()) for plane in planes.values())
    assert 9 < positive < 48
    assert sum(len(index) for index in choose_flips(planes, 48, score).values()) == positive


@pytest.mark.parametrize("passes", [1, 2, 6])
def test_certainty_is_students_t_of_the_batches(passes):
    plane = SignPlane(torch.randn(3, 5).sign(), torch.full((3,), 0.02), torch.rand(5) + 0.5, torch.float32)
    plane.collect_sign_gradient()
    x, gy = torch.randn(passes, 7, 5).double(), torch.randn(passes, 7, 3).double()
    for one, gradient in zip(x.float(), gy.float(), strict=True):
        torch.autograd.grad(plane(one), [plane.a], gradient)
    each = gy.transpose(1, 2) @ x
    layer = torch.outer(gy.square().mean((0, 1)), x.square().mean((0, 1)))
    variance = 7 * layer if passes == 1 else each.var(0)  # one pass is a sum over seven tokens
    t = each.sum(0).abs() / (passes * variance).sqrt()
    expected = torch.where(flip_gains(plane) > 0, t, 0.0).float()
    assert 3 < int(expected.count_nonzero()) < 15
    torch.testing.assert_close(flip_certainty(plane), expected, rtol=1e-3, atol=1e-4)


def test_a_gradient_that_batches_agree_on_is_surer_than_a_larger_one():
    plane = SignPlane(torch.ones(1, 2), torch.full((1,), 1e-3), torch.ones(2), torch.float32)
    plane.collect_sign_gradient()
    for one in (1.0, 1.1, 0.9, 1.0):  # the second input's gradient is four times as large in the mean
        torch.autograd.grad(plane(torch.tensor([[one, 16.0 * (one == 1.1)]])), [plane.a], torch.ones(1, 1))
    assert flip_gains(plane)[0, 1] > flip_gains(plane)[0, 0] > 0
    assert flip_certainty(plane)[0, 0] > flip_certainty(plane)[0, 1] > 0
    assert {name: index.tolist() for name, index in choose_flips({"only": plane}, 1).items()} == {"only": [0]}


def test_flips_lower_the_held_out_divergence_and_the_packed_model_has_them():
    teacher = tiny_llama()
    student = packed(teacher)
    before = {name: layer.weight.clone() for name, layer in packed_layers(student).items()}
    run, form = make_run(model=teacher, student=student)
    options = FlipOptions(rounds=4, batches_per_round=16, fraction=7e-3)
    result = gated_flips(run.pair, sign_planes(form.student), sequences(64), run.evaluate, options)
    kept = [entry["kl_heldout"] for entry in result.log if entry["kept"]]
    assert kept == sorted(kept, reverse=True)
    assert result.best == min([result.start, *kept])
    assert result.flipped > 0
    assert result.best < result.start
    assert run.evaluate() == result.best
    assert all(plane.sign_gradient is None for plane in sign_planes(form.student).values())
    form.write_back(run.stored())
    after = packed_layers(student)
    changed = sum(
        int((before[name] ^ layer.weight).view(torch.uint8).to(torch.int64).apply_(lambda v: v.bit_count()).sum())
        for name, layer in after.items()
    )
    assert 0 < changed <= result.flipped


def test_a_round_that_does_not_help_is_undone_bit_by_bit():
    run, form = make_run()
    before, folded = signs_of(form), {n: p.folded.clone() for n, p in sign_planes(form.student).items()}
    worse = iter(range(1, 100))
    options = FlipOptions(rounds=5, batches_per_round=1, fraction=1e-2, shrink=0.1, least=1e-5)
    result = gated_flips(run.pair, sign_planes(form.student), run.batches, lambda: float(next(worse)), options)
    assert [entry["kept"] for entry in result.log] == [False] * 4  # 1e-2, 1e-3, 1e-4, 1e-5
    assert [entry["round"] for entry in result.log] == [0, 0, 0, 1]  # three on the gradients of one round
    assert result.log[0]["flips"] > 0
    assert (result.best, result.flipped) == (result.start, 0)
    assert same_bits(bits(signs_of(form)), bits(before))
    assert same_bits(bits({n: p.folded for n, p in sign_planes(form.student).items()}), bits(folded))


def test_flips_refuse_a_broken_start_and_wrong_options():
    run, form = make_run()
    with pytest.raises(ValueError, match="before any flip"):
        gated_flips(run.pair, sign_planes(form.student), run.batches, lambda: math.nan)
    with pytest.raises(ValueError, match="0 planes"):
        gated_flips(run.pair, {}, run.batches, run.evaluate)
    with pytest.raises(ValueError, match="fraction"):
        FlipOptions(fraction=0.0)
    with pytest.raises(ValueError, match="no gradient"):
        flip_gains(next(iter(sign_planes(form.student).values())))


def test_signs_that_no_token_met_are_left_alone():
    g = torch.Generator().manual_seed(0)
    used, idle = (SignPlane(torch.randn(5, 7, generator=g), torch.ones(5), torch.ones(7), torch.float32) for _ in "ab")
    for plane in (used, idle):
        plane.collect_sign_gradient()
    x = torch.randn(9, 7, generator=g)
    (1e-3 * (used(x) + used(x).detach()).square().sum()).backward()  # every sign should be the other one
    picks = choose_flips({"used": used, "idle": idle}, 4)
    assert 0 < len(picks["used"]) <= 4
    assert len(picks["idle"]) == 0
    assert {name: len(index) for name, index in choose_flips({"idle": idle}, 4).items()} == {"idle": 0}
