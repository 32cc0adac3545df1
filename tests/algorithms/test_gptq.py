"""Groups fitted to a layer's outputs: against the plain method row by row, against brute force, and never worse."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_onebit.algorithms import gptq
from hf_onebit.algorithms.curvature import Curvature
from hf_onebit.algorithms.gptq import GroupFit, dense, fit_groups, nearest_codes, wishes
from hf_onebit.algorithms.groupwise import quantize_groupwise


def problem(rows=12, columns=40, tokens=300, seed=0, spread=2.0):
    """Weights, and the Hessian of correlated inputs of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) * torch.rand(columns, generator=generator).pow(spread)
    X = torch.randn(tokens, columns, generator=generator) @ mix
    return torch.randn(rows, columns, generator=generator) * 0.1, X.T @ X / tokens


def loss(W, Q, H):
    R = (W - Q).double()
    return ((R @ H.double()) * R).sum(1)


def naive_feedback(W, H, order, s, z, top):
    """Rounding with error feedback as in the paper: the inverse Hessian of what is left, made anew at each step."""
    W, H = W.double().clone(), H.double()
    q = torch.empty_like(W)
    left = order.tolist()
    while left:
        j = left[0]
        inverse = torch.linalg.inv(H[left][:, left])
        q[:, j] = ((W[:, j] + z[:, j]) / s[:, j]).round().clamp(0, top)
        error = (W[:, j] - (q[:, j] * s[:, j] - z[:, j])) / inverse[0, 0]
        W[:, left] -= error[:, None] * inverse[0]
        left = left[1:]
    return q


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_error_feedback_is_the_papers(bits, symmetric):
    W, H = problem(columns=70)
    curvature = Curvature(H, 0.05)
    groups = gptq._Groups(W, curvature, bits, 32, symmetric, False, "test")
    start = groups.start()
    found = groups._feedback(start.s, start.z, renew=False)
    s, z = (t.double().T.repeat_interleave(32, 1)[:, :70] for t in (start.s, start.z))
    expected = naive_feedback(W, curvature.H, curvature.feedback()[0], s, z, (1 << bits) - 1)
    # A code may differ where rounding errors decide a tie.
    assert float((found.q != expected).float().mean()) < 0.01


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_no_single_code_can_do_better(act_order, symmetric):
    W, H = problem(rows=6, columns=24)
    curvature = Curvature(H, 0.1)
    bits = 2
    groups = gptq._Groups(W, curvature, bits, 8, symmetric, act_order, "test")
    state = groups.feedback(groups.start())
    while groups.descend(state):
        pass
    best = loss(groups.W, groups._dense(state), groups.H)
    for j, code in itertools.product(range(24), range(4)):
        other = state.q.clone()
        other[:, j] = code
        changed = gptq._State(other, state.s, state.z, state.loss)
        assert bool((loss(groups.W, groups._dense(changed), groups.H) >= best * (1 - 1e-3)).all())


def test_a_row_as_small_as_that_ends_near_the_best_codes_of_all():
    W, H = problem(rows=8, columns=5, seed=3)
    curvature = Curvature(H, 0.1)
    fit = fit_groups(W, curvature, 2, -1, False, rounds=0)
    s, z = fit.scales.double().T, fit.zeros.double().T
    codes = torch.tensor(list(itertools.product(range(4), repeat=5))).double()
    every = torch.stack([loss(W, c * s - z, curvature.H) for c in codes])
    ours = loss(W, dense(fit, 2, -1), curvature.H)
    plain, *_ = quantize_groupwise(W, 2, -1, False, curvature.H.diagonal())
    rounded = loss(W, dense(GroupFit(plain, fit.scales, fit.zeros), 2, -1), curvature.H)
    assert bool((ours >= every.amin(0) * (1 - 1e-6)).all())
    assert float(ours.sum()) <= float(rounded.sum())
    assert float(ours.sum()) < 2 * float(every.amin(0).sum())


@pytest.mark.parametrize("symmetric", [False, True])
def test_refitted_statistics_are_least_squares_of_their_group(symmetric):
    W, H = problem(rows=10, columns=20)
    curvature = Curvature(H, 0.1)
    groups = gptq._Groups(W, curvature, 4, 10, symmetric, False, "test")
    state = groups.start()
    G = (groups.W - groups._dense(state)) @ groups.H
    groups._refit(state, G, 1, 10, 20)
    torch.testing.assert_close(G, (groups.W - groups._dense(state)) @ groups.H, rtol=1e-3, atol=1e-4)
    groups._judge(state)
    for row in range(10):
        q = state.q[row, 10:].double()
        basis = torch.zeros(20, 1 if symmetric else 2).double()
        basis[10:, 0] = q - 8 if symmetric else q
        if not symmetric:
            basis[10:, 1] = -1
        rest = W[row].double().clone()
        rest[:10] -= groups._dense(state)[row, :10].double()
        H64 = curvature.H.double()
        found = torch.linalg.solve(basis.T @ H64 @ basis, basis.T @ H64 @ rest)
        exact = rest - basis @ found
        assert float(state.loss[row]) <= float(exact @ H64 @ exact) * (1 + 1e-2)
        assert float(state.s[1, row]) == float(state.s[1, row].half())


@settings(max_examples=40, deadline=None)
@given(
    bits=st.integers(1, 8),
    group_size=st.sampled_from([8, 32, 33, -1]),
    symmetric=st.booleans(),
    act_order=st.booleans(),
    shape=st.tuples(st.integers(1, 9), st.integers(1, 90)),
    seed=st.integers(0, 1000),
)
def test_losses_never_rise_and_are_those_of_what_is_stored(bits, group_size, symmetric, act_order, shape, seed):
    W, H = problem(*shape, seed=seed)
    curvature = Curvature(H, 0.05)
    fit = fit_groups(W, curvature, bits, group_size, symmetric, act_order=act_order, rounds=3)
    for before, after in itertools.pairwise(fit.losses):
        assert after <= before * (1 + 1e-5) + 1e-12
    Q = dense(fit, bits, group_size)
    energy = float(loss(W, torch.zeros_like(W), curvature.H).sum())
    assert float(loss(W, Q, curvature.H).sum()) / energy == pytest.approx(fit.losses[-1], rel=1e-3, abs=1e-9)
    assert fit.scales.dtype == torch.float16
    assert int(fit.codes.max()) < 1 << bits
    assert (fit.zeros is None) == symmetric


def test_feedback_beats_rounding_on_correlated_inputs():
    W, H = problem(rows=64, columns=128, tokens=2000)
    for act_order in (False, True):
        fit = fit_groups(W, Curvature(H, 0.02), 3, 32, False, act_order=act_order)
        assert fit.losses[1] < 0.8 * fit.losses[0]
        assert fit.losses[-1] < fit.losses[1]


def test_groups_by_importance_hold_inputs_of_like_importance():
    W, H = problem(columns=70)
    curvature = Curvature(H, 0.05)
    fit = fit_groups(W, curvature, 4, 32, False, act_order=True)
    order = curvature.H.diagonal().argsort(descending=True, stable=True)
    assert fit.g_idx[order].tolist() == [k // 32 for k in range(70)]
    assert fit_groups(W, curvature, 4, -1, False, act_order=True).g_idx is None  # one group has no order


def test_unknown_inputs_are_rounded_to_the_nearest_weights():
    W, _ = problem(columns=64)
    blank = Curvature(torch.zeros(64, 64))
    fit = fit_groups(W, blank, 4, 32, False, rounds=0)
    codes, scales, zeros = quantize_groupwise(W, 4, 32, False)
    torch.testing.assert_close(dense(fit, 4, 32), dense(GroupFit(codes, scales, zeros), 4, 32), rtol=0, atol=1e-2)
    assert fit.losses[1] <= fit.losses[0]


def test_a_hessian_of_rank_one_and_dead_inputs_do_not_stop_it():
    W, _ = problem(columns=48)
    x = torch.randn(48)
    x[:5] = 0
    fit = fit_groups(W, Curvature(torch.outer(x, x)), 4, 16, False)
    assert bool(dense(fit, 4, 16).isfinite().all())
    assert fit.losses[-1] <= fit.losses[0]


def test_codes_are_fitted_to_statistics_as_they_will_be_stored():
    W, H = problem(columns=64)
    curvature = Curvature(H, 0.05)

    def coarse(s, z):
        return (s * 64).round().clamp_min(1) / 64, None if z is None else (z * 64).round() / 64

    fit = fit_groups(W, curvature, 4, 16, False, rounding=coarse)
    assert torch.equal(fit.scales, (fit.scales * 64).round() / 64)
    again = GroupFit(nearest_codes(W, fit, 4, 16), fit.scales, fit.zeros)
    ours, rounded = (loss(W, dense(f, 4, 16), curvature.H) for f in (fit, again))
    assert bool((ours <= rounded * (1 + 1e-4)).all())


def test_wishes_are_where_the_parabola_of_each_code_has_its_minimum():
    W, H = problem(rows=3, columns=6)
    curvature = Curvature(H, 0.1)
    fit = fit_groups(W, curvature, 3, -1, False, rounds=6)
    wish = wishes(W, fit, curvature, 3, -1)
    s = fit.scales.float().T
    base = dense(fit, 3, -1)
    for row, column in itertools.product(range(3), range(6)):
        moved = base[row].clone()
        moved[column] += (wish[row, column] - fit.codes[row, column]) * s[row, 0]
        gradient = (W[row] - moved) @ curvature.H[:, column]
        assert abs(float(gradient)) < 1e-4
    inner = (fit.codes > 0) & (fit.codes < 7)
    assert bool(((wish - fit.codes)[inner].abs() <= 0.501).all())


def test_wrong_input_is_refused_by_name():
    W, H = problem()
    with pytest.raises(ValueError, match=r"layer 'q': the Hessian must have shape \(40, 40\), got \(8, 8\)"):
        fit_groups(W, Curvature(torch.eye(8)), 4, 32, False, layer="q")
    with pytest.raises(ValueError, match="expected a non-empty float matrix"):
        fit_groups(W.int(), Curvature(H), 4, 32, False)
    with pytest.raises(ValueError, match="rounds must be >= 0"):
        fit_groups(W, Curvature(H), 4, 32, False, rounds=-1)
    with pytest.raises(ValueError, match="bits must be between 1 and 8, got 9"):
        fit_groups(W, Curvature(H), 9, 32, False)
    with pytest.raises(ValueError, match="cannot hold its group"):
        fit_groups(W * 1e9, Curvature(H), 4, 32, False)
