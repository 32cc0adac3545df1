"""The closed form against its definition, its theory and its edge cases."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_onebit.algorithms.closed_form import (
    Plane,
    closed_form,
    closed_form_planes,
    dequantize_planes,
    importance_from_hessian,
    option_problems,
    sinkhorn,
    to_half,
)

BOTH = pytest.mark.parametrize("use_balancing", [True, False], ids=["balanced", "plain"])


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def dense(plane: Plane) -> torch.Tensor:
    """diag(a) S diag(b), in fp64 so that it rounds nothing away."""
    S = torch.where(plane.signs, 1.0, -1.0).double()
    return plane.a.double()[:, None] * S * plane.b.double()[None, :]


def relative_error(W: torch.Tensor, approximation: torch.Tensor, d: torch.Tensor | None = None) -> float:
    weights = torch.ones(W.shape[1]).double() if d is None else d.double().square()
    difference = ((W.double() - approximation.double()).square() * weights).sum()
    return float(difference / (W.double().square() * weights).sum())


# --- balancing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(64, 96), (33, 7), (1, 5), (5, 1)])
@pytest.mark.parametrize("alpha", [1e-10, 1.0, 3.0, 1e10])
def test_sinkhorn_gives_the_stated_masses(shape, alpha):
    M = rand(*shape) + 0.05
    r, c = sinkhorn(M, 60, alpha)
    balanced = torch.diag(r.double()) @ M.double() @ torch.diag(c.double())
    n, m = shape
    torch.testing.assert_close(balanced.sum(1) / alpha, torch.ones(n).double(), rtol=1e-4, atol=0)
    torch.testing.assert_close(balanced.sum(0) / alpha, torch.full((m,), n / m).double(), rtol=1e-4, atol=0)


def test_sinkhorn_one_pass_is_the_formula():
    M = rand(6, 4) + 0.1
    r, c = sinkhorn(M, 1, 2.0)
    assert r.dtype == c.dtype == torch.float32
    # Up to the gauge r·t, c/t: r = alpha / (M 1), c = beta / (Mᵀ r).
    want_r = 2.0 / M.sum(1)
    want_c = (6 * 2.0 / 4) / (M.T @ want_r)
    torch.testing.assert_close(torch.outer(r, c), torch.outer(want_r, want_c), rtol=1e-5, atol=0)


def test_sinkhorn_leaves_empty_rows_and_columns_alone_and_does_not_count_them():
    M = rand(6, 8) + 0.1
    M[2] = 0
    M[:, [1, 5]] = 0
    r, c = sinkhorn(M, 60, 1.0)
    assert r[2] == 1
    assert c[1] == c[5] == 1
    balanced = r[:, None] * M * c
    torch.testing.assert_close(balanced.sum(1), torch.tensor([1.0, 1, 0, 1, 1, 1]), rtol=1e-4, atol=0)
    columns = torch.full((8,), 5 / 6)
    columns[[1, 5]] = 0
    torch.testing.assert_close(balanced.sum(0), columns, rtol=1e-4, atol=0)


def test_sinkhorn_leaves_dust_alone_and_balances_the_rest():
    M = rand(6, 8) + 0.1
    r, c = sinkhorn(M, 40, 1.0)
    dusty_r, dusty_c = sinkhorn(torch.cat([M, torch.full((1, 8), 1e-38)]), 40, 1.0)
    assert dusty_r[6] == 1
    torch.testing.assert_close(torch.outer(dusty_r[:6], dusty_c), torch.outer(r, c), rtol=1e-5, atol=0)


def test_sinkhorn_cancels_column_weights():
    # Why importance weighs the fit, and not the matrix that is balanced.
    M, d = rand(6, 8) + 0.1, randn(8).exp()
    (r, c), (weighted_r, weighted_c) = sinkhorn(M, 200, 1.0), sinkhorn(M * d, 200, 1.0)
    torch.testing.assert_close(weighted_r[:, None] * (M * d) * weighted_c, r[:, None] * M * c, rtol=1e-4, atol=0)


def test_sinkhorn_is_finite_where_no_balance_exists():
    # Ten rows need all the mass of column 0, which may have only a tenth of it: the scales run away.
    M = torch.zeros(11, 10)
    M[:10, 0] = 1
    M[10] = 1
    for scales in sinkhorn(M, 1000, 1.0):
        assert torch.isfinite(scales).all()
        assert (scales > 0).all()


@pytest.mark.parametrize("factor", [1e-38, 1e-30, 1e30, 1e38])
def test_sinkhorn_holds_any_scale_of_its_input(factor):
    M = rand(5, 7) + 0.1
    r, c = sinkhorn(M, 40, 1.0)
    scaled_r, scaled_c = sinkhorn(M * factor, 40, 1.0)
    got = torch.outer(scaled_r.double(), scaled_c.double()) * factor
    torch.testing.assert_close(got, torch.outer(r.double(), c.double()), rtol=1e-3, atol=0)


def test_sinkhorn_zero_passes_and_zero_matrix():
    for M, passes in ((torch.ones(3, 4), 0), (torch.zeros(3, 4), 10)):
        r, c = sinkhorn(M, passes, 1.0)
        assert torch.equal(r, torch.ones(3))
        assert torch.equal(c, torch.ones(4))


@pytest.mark.parametrize(
    ("M", "passes", "alpha", "match"),
    [
        (torch.ones(2, 2), -1, 1.0, "iterations"),
        (torch.ones(2, 2), True, 1.0, "iterations"),
        (torch.ones(2, 2), 3, 0.0, "alpha"),
        (torch.ones(2, 2), 3, math.nan, "alpha"),
        (-torch.ones(2, 2), 3, 1.0, "W.abs"),
        (torch.full((2, 2), math.nan), 3, 1.0, "NaN"),
        (torch.ones(2), 3, 1.0, "matrix"),
    ],
)
def test_sinkhorn_refuses(M, passes, alpha, match):
    with pytest.raises(ValueError, match=match):
        sinkhorn(M, passes, alpha)


# --- the fit ---------------------------------------------------------------------------------------------


def test_plain_fit_is_the_leading_singular_pair():
    """C7: error² = ‖W‖² − σ₁(|W|)², and u, v are the singular vectors."""
    for shape in [(48, 80), (80, 48), (40, 25001)]:  # the last above 1e6 elements
        W = randn(*shape)
        plane = closed_form(W, use_balancing=False)
        A = W.double().abs()
        U, S, V = torch.linalg.svd(A, full_matrices=False)
        error = float((W.double() - dense(plane)).square().sum())
        want = float(A.square().sum() - S[0] ** 2)
        assert error == pytest.approx(want, rel=1e-4)
        root = math.sqrt(float(S[0]))
        torch.testing.assert_close(plane.a.double(), U[:, 0].abs() * root, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(plane.b.double(), V[0].abs() * root, rtol=1e-3, atol=1e-6)


def test_any_change_of_the_plain_scales_costs():
    """C7: the fit is a minimum."""
    W = randn(24, 40)
    plane = closed_form(W, use_balancing=False, iters=30)
    best = relative_error(W, dense(plane))
    for seed in range(10):
        step = 1 + 0.01 * randn(64, seed=seed)
        assert relative_error(W, dense(Plane(plane.signs, plane.a * step[:24], plane.b))) > best
        assert relative_error(W, dense(Plane(plane.signs, plane.a, plane.b * step[24:]))) > best


def test_iters_zero_fits_a_to_the_column_means():
    W = randn(9, 14)
    plane = closed_form(W, iters=0, use_balancing=False)
    b = W.abs().mean(0)
    a = W.abs() @ b / b.square().sum()
    torch.testing.assert_close(torch.outer(plane.a, plane.b), torch.outer(a, b), rtol=1e-5, atol=1e-7)


def test_every_round_lowers_the_error():
    # Signs and magnitudes whose second singular value is close to the first, so that rounds are needed.
    W = torch.block_diag(rand(12, 12) + 1, rand(10, 10) + 1) + 0.05
    errors = [relative_error(W, dense(closed_form(W, iters=k, use_balancing=False))) for k in range(6)]
    assert all(later < earlier for earlier, later in itertools.pairwise(errors))


def balanced_reference(W: torch.Tensor, d: torch.Tensor, rounds: int = 400) -> torch.Tensor:
    """The definition in dense fp64: balance a copy, weigh it, take its SVD, undo both."""
    Mb = W.double().abs()
    n, m = W.shape
    r, c = torch.ones(n).double(), torch.ones(m).double()
    for _ in range(rounds):
        r = 1 / (W.double().abs() @ c)
        c = (n / m) / (W.double().abs().T @ r)
    Mb = torch.diag(r) @ Mb @ torch.diag(c)
    U, S, V = torch.linalg.svd(Mb @ torch.diag(d.double()), full_matrices=False)
    fit = S[0] * torch.outer(U[:, 0].abs(), V[0].abs() / d.double())
    return fit / torch.outer(r, c) * torch.where(W >= 0, 1.0, -1.0)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("shape", [(20, 33), (33, 20)])
def test_balanced_fit_is_its_definition(shape, weighted):
    W = randn(*shape) * randn(shape[0], 1, seed=1).exp() * randn(1, shape[1], seed=2).exp()
    importance = (2 * randn(shape[1], seed=3)).exp() if weighted else None
    d = torch.ones(shape[1]) if importance is None else importance.sqrt()
    got = dense(closed_form(W, importance=importance, balance_iters=400, iters=60))
    torch.testing.assert_close(got, balanced_reference(W, d), rtol=1e-3, atol=1e-6)


def test_plain_weighted_fit_is_the_unscaled_svd():
    """C11: SVID of |W|·sqrt(importance), unscaled."""
    W = randn(30, 44)
    importance = (2 * randn(44, seed=5)).exp()
    d = importance.sqrt().double()
    U, S, V = torch.linalg.svd(W.double().abs() * d, full_matrices=False)
    want = S[0] * torch.outer(U[:, 0].abs(), V[0].abs() / d) * torch.where(W >= 0, 1.0, -1.0)
    got = dense(closed_form(W, importance=importance, use_balancing=False, iters=40))
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("use_balancing", "column_spread"), [(True, 0.0), (False, 0.0), (False, 1.0)])
def test_importance_lowers_the_weighted_error(use_balancing, column_spread):
    """Importance is honoured, with balancing on too: for every one of 20 seeds, and clearly on average."""
    gains = []
    for seed in range(20):
        W = randn(24, 48, seed=seed) * (column_spread * randn(1, 48, seed=seed + 100)).exp()
        importance = (2 * randn(48, seed=seed + 200)).exp()
        d = importance.sqrt()
        without = dense(closed_form(W, use_balancing=use_balancing))
        with_it = dense(closed_form(W, importance=importance, use_balancing=use_balancing))
        gains.append(1 - relative_error(W, with_it, d) / relative_error(W, without, d))
    assert min(gains) > 0
    assert sum(gains) / len(gains) > 0.1


@BOTH
def test_scale_of_importance_does_not_matter(use_balancing):
    """C11: H → cH changes nothing, None is as good as a constant, all zero is as good as None."""
    W, importance = randn(17, 29), rand(29) + 0.01
    want = dense(closed_form(W, importance=importance, use_balancing=use_balancing))
    for factor in (1e-30, 0.5, 7.0, 1e30):
        got = dense(closed_form(W, importance=importance * factor, use_balancing=use_balancing))
        torch.testing.assert_close(got, want, rtol=1e-5, atol=0)
    huge = closed_form(W, importance=importance.double() * 1e200, use_balancing=use_balancing)
    torch.testing.assert_close(dense(huge), want, rtol=1e-5, atol=0)
    plain = closed_form(W, use_balancing=use_balancing)
    for constant in (torch.zeros(29), torch.full((29,), 3.0)):
        got = closed_form(W, importance=constant, use_balancing=use_balancing)
        torch.testing.assert_close(dense(got), dense(plain), rtol=1e-6, atol=0)


@BOTH
def test_dead_columns_get_a_b_that_fits_them(use_balancing):
    """C12: a column of importance 0 is fitted nearly as well as if it counted, by a scale that fp16 holds."""
    W, importance = randn(64, 80), rand(80) + 0.1
    importance[[3, 8]] = 0
    [plane] = closed_form_planes(W, 1, importance=importance, use_balancing=use_balancing)
    counted = dense(closed_form(W, use_balancing=use_balancing))[:, [3, 8]]
    dead = dequantize_planes([plane])[:, [3, 8]]
    assert relative_error(W[:, [3, 8]], dead) < 1.1 * relative_error(W[:, [3, 8]], counted)


def test_dead_columns_do_not_move_the_others():
    W, importance = randn(16, 20), rand(20) + 0.1
    importance[[3, 8]] = 0
    plane = closed_form(W, importance=importance, use_balancing=False, iters=30)
    # Each column's b is the least-squares solution for the given a ...
    want = plane.a @ W.abs() / plane.a.square().sum()
    torch.testing.assert_close(plane.b, want, rtol=1e-4, atol=0)
    # ... and the rest of the layer is fitted as if the dead columns were not there.
    alive = importance > 0
    without = closed_form(W[:, alive], importance=importance[alive], use_balancing=False, iters=30)
    torch.testing.assert_close(dense(plane)[:, alive], dense(without), rtol=1e-4, atol=0)


def test_importance_on_empty_columns_only_still_fits_the_layer():
    W = randn(6, 10)
    W[:, 4] = 0
    importance = torch.zeros(10)
    importance[4] = 1
    plain, weighted = closed_form(W), closed_form(W, importance=importance)
    torch.testing.assert_close(dense(weighted), dense(plain), rtol=1e-4, atol=1e-6)


def test_balance_alpha_cannot_change_the_result():
    """C10."""
    W = randn(20, 31) * randn(20, 1, seed=1).exp()
    want = closed_form(W)
    for alpha in (1e-300, 1e-10, 1e-3, 1e3, 1e10, 1e300):
        got = closed_form(W, balance_alpha=alpha)
        assert torch.equal(got.a, want.a)
        assert torch.equal(got.b, want.b)


def test_a_hopeless_balance_falls_back_to_the_plain_fit():
    W = torch.tril(randn(128, 128))
    got, plain = closed_form(W), closed_form(W, use_balancing=False)
    assert torch.equal(got.a, plain.a)
    assert relative_error(W, dense(got)) < 1


# --- theory ----------------------------------------------------------------------------------------------


@BOTH
def test_gaussian_weights_lose_what_theory_says(use_balancing):
    """C6: 1 − 2/π of the energy at one plane; 1 − 2/π − δ² at two, δ = E| |x| − E|x| |."""
    W = randn(768, 1024)
    planes = closed_form_planes(W, 2, use_balancing=use_balancing)
    one, two = relative_error(W, dequantize_planes(planes[:1])), relative_error(W, dequantize_planes(planes))
    assert one == pytest.approx(1 - 2 / math.pi, rel=0.01)
    mu = math.sqrt(2 / math.pi)
    density = math.exp(-mu * mu / 2) / math.sqrt(2 * math.pi)
    tail = math.erfc(mu / math.sqrt(2)) / 2
    delta = 4 * (density - mu * tail)
    assert two == pytest.approx(1 - 2 / math.pi - delta**2, rel=0.015)


@BOTH
def test_uniform_weights_lose_what_theory_says(use_balancing):
    """C6: 1/4 of the energy at one plane, 1/16 at two."""
    W = rand(768, 1024) * 2 - 1
    planes = closed_form_planes(W, 2, use_balancing=use_balancing)
    one, two = relative_error(W, dequantize_planes(planes[:1])), relative_error(W, dequantize_planes(planes))
    assert one == pytest.approx(1 / 4, rel=0.01)
    assert two == pytest.approx(1 / 16, rel=0.01)


def test_balancing_costs_little_on_scaled_rows_and_columns():
    """C6, with scales that balancing takes out and folds back: forgetting to do so costs 0.7 and more."""
    W = (rand(256, 384) * 2 - 1) * randn(256, 1, seed=1).exp() * randn(1, 384, seed=2).exp()
    plain = relative_error(W, dense(closed_form(W, use_balancing=False)))
    balanced = relative_error(W, dense(closed_form(W)))
    assert plain < balanced < 0.32


@pytest.mark.parametrize("importance", [None, "random"])
@BOTH
def test_rank_one_magnitudes_come_back_exactly(use_balancing, importance):
    """C8."""
    u, v = randn(31, seed=1).exp(), randn(47, seed=2).exp()
    S = torch.where(randn(31, 47, seed=3) >= 0, 1.0, -1.0)
    W = u[:, None] * S * v
    plane = closed_form(W, use_balancing=use_balancing, importance=None if importance is None else rand(47, seed=4))
    assert torch.equal(plane.signs, S > 0)
    assert relative_error(W, dense(plane)) < 1e-10


# --- invariances -----------------------------------------------------------------------------------------


@BOTH
def test_signs_and_order_of_rows_and_columns(use_balancing):
    """C9."""
    W, importance = randn(19, 26), rand(26) + 0.1
    plane = closed_form(W, use_balancing=use_balancing, importance=importance)
    flipped = W.clone()
    flipped[3].neg_()
    flipped[:, 7].neg_()
    same = closed_form(flipped, use_balancing=use_balancing, importance=importance)
    assert torch.equal(same.a, plane.a)
    assert torch.equal(same.b, plane.b)
    assert torch.equal(same.signs, flipped >= 0)
    rows, columns = torch.randperm(19, generator=torch.Generator().manual_seed(1)), torch.arange(25, -1, -1)
    moved = closed_form(W[rows][:, columns], use_balancing=use_balancing, importance=importance[columns])
    torch.testing.assert_close(moved.a, plane.a[rows], rtol=1e-4, atol=0)
    torch.testing.assert_close(moved.b, plane.b[columns], rtol=1e-4, atol=0)


def test_balanced_fit_follows_row_and_column_scales():
    """C9: diag(x) W diag(y) is fitted by diag(x) (fit of W) diag(y) once Sinkhorn has converged."""
    W, x, y = randn(19, 26), randn(19, seed=1).exp(), randn(26, seed=2).exp()
    got = dense(closed_form(x[:, None] * W * y, balance_iters=500))
    want = x[:, None] * dense(closed_form(W, balance_iters=500)) * y
    torch.testing.assert_close(got, want, rtol=1e-3, atol=0)


@pytest.mark.parametrize("factor", [1e-40, 1e-20, 1e20, 1e37])
@BOTH
def test_scale_of_the_weights_comes_out_in_the_scales(use_balancing, factor):
    W = randn(8, 13, dtype=torch.float64)
    want = closed_form(W, use_balancing=use_balancing)
    got = closed_form((W * factor).float(), use_balancing=use_balancing)
    assert torch.isfinite(got.a).all()
    root = math.sqrt(factor)
    rtol = 1e-2 if factor == 1e-40 else 1e-4  # subnormal weights are coarse
    torch.testing.assert_close(got.a.double() / root, want.a.double(), rtol=rtol, atol=0)
    torch.testing.assert_close(got.b.double() / root, want.b.double(), rtol=rtol, atol=0)


@BOTH
def test_gauge(use_balancing):
    W = randn(21, 11) * randn(21, 1, seed=1).exp()
    plane = closed_form(W, use_balancing=use_balancing, importance=rand(11))
    assert plane.signs.dtype == torch.bool
    assert plane.a.dtype == plane.b.dtype == torch.float32
    assert float(plane.a.norm()) == pytest.approx(float(plane.b.norm()), rel=1e-5)
    assert (plane.a > 0).all()
    assert (plane.b > 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@BOTH
def test_weights_of_every_dtype(use_balancing, dtype):
    """C12. The fit of rounded weights is the fit of the same numbers in fp64."""
    W = (randn(23, 37) * 0.05).to(dtype)
    before = W.clone()
    plane = closed_form(W, use_balancing=use_balancing)
    assert torch.equal(W, before)
    assert plane.a.dtype == torch.float32
    want = closed_form(W.double(), use_balancing=use_balancing)
    torch.testing.assert_close(dense(plane), dense(want), rtol=1e-4, atol=0)


@BOTH
def test_layout_does_not_matter(use_balancing):
    W = randn(40, 30)
    strided = W.T.contiguous().T
    sliced = torch.cat([W, W], 1)[:, :30]
    want = dense(closed_form(W, use_balancing=use_balancing))
    for other in (strided, sliced):
        assert not other.is_contiguous()
        got = dense(closed_form(other, use_balancing=use_balancing))
        torch.testing.assert_close(got, want, rtol=1e-5, atol=0)


@BOTH
def test_deterministic_and_leaves_the_global_generator_alone(use_balancing):
    """C13."""
    W, importance = randn(50, 60), rand(60)
    state = torch.get_rng_state()
    first = closed_form_planes(W, 2, use_balancing=use_balancing, importance=importance)
    second = closed_form_planes(W, 2, use_balancing=use_balancing, importance=importance)
    assert torch.equal(torch.get_rng_state(), state)
    for left, right in zip(first, second, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(left, right, strict=True))


def test_parameters_that_require_grad_are_fine():
    W = torch.nn.Parameter(randn(5, 6))
    plane = closed_form(W)
    assert not plane.a.requires_grad
    assert not dequantize_planes(closed_form_planes(W, 2)).requires_grad


# --- edges -----------------------------------------------------------------------------------------------


@BOTH
def test_zero_rows_and_columns(use_balancing):
    """C12: they get the scale 0, and the rest is fitted as if they were not there."""
    W = randn(10, 14)
    W[4] = 0
    W[:, [0, 9]] = 0
    plane = closed_form(W, use_balancing=use_balancing)
    assert plane.a[4] == 0
    assert plane.b[0] == plane.b[9] == 0
    rows, columns = W.abs().sum(1) > 0, W.abs().sum(0) > 0
    smaller = dense(closed_form(W[rows][:, columns], use_balancing=use_balancing))
    torch.testing.assert_close(dense(plane)[rows][:, columns], smaller, rtol=1e-4, atol=0)


@BOTH
@pytest.mark.parametrize("shape", [(1, 1), (4, 6)])
def test_all_zero(use_balancing, shape):
    W = torch.zeros(shape)
    for signs, a, b in closed_form_planes(W, 2, use_balancing=use_balancing, importance=torch.ones(shape[1])):
        assert signs.all()
        assert torch.equal(a, torch.zeros(shape[0]).half())
        assert torch.equal(b, torch.zeros(shape[1]).half())


@BOTH
@pytest.mark.parametrize("shape", [(1, 9), (9, 1), (1, 1)])
def test_single_row_or_column_is_exact(use_balancing, shape):
    """C12: any vector is a sign times a rank-one magnitude."""
    W = randn(*shape)
    assert relative_error(W, dense(closed_form(W, use_balancing=use_balancing))) < 1e-10


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 20),
    m=st.integers(1, 20),
    seed=st.integers(0, 1000),
    zeros=st.sampled_from([0.0, 0.5, 0.95]),
    spread=st.sampled_from([0.0, 1.0, 8.0]),
    use_balancing=st.booleans(),
    weighted=st.booleans(),
    iters=st.sampled_from([0, 1, 10]),
)
def test_any_matrix_gets_finite_scales_no_worse_than_zero(n, m, seed, zeros, spread, use_balancing, weighted, iters):
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(n, m, generator=g) * (spread * torch.randn(n, 1, generator=g)).exp()
    W = W * (spread * torch.randn(1, m, generator=g)).exp() * (torch.rand(n, m, generator=g) >= zeros)
    importance = torch.rand(m, generator=g).pow(8) if weighted else None
    plane = closed_form(W, importance=importance, use_balancing=use_balancing, iters=iters)
    assert torch.equal(plane.signs, W >= 0)
    for scale in (plane.a, plane.b):
        assert torch.isfinite(scale).all()
        assert (scale >= 0).all()
    if W.any() and importance is None:
        assert relative_error(W, dense(plane)) <= 1 + 1e-5


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 37), m=st.integers(1, 37), seed=st.integers(0, 1000))
def test_quantizing_twice_changes_nothing(n, m, seed):
    """The closed form of something that already is one: same signs, same matrix."""
    W = randn(n, m, seed=seed)
    [plane] = closed_form_planes(W, 1)
    once = dequantize_planes([plane])
    [again] = closed_form_planes(once, 1)
    assert torch.equal(again[0], plane[0])
    torch.testing.assert_close(dequantize_planes([again]), once, rtol=3e-3, atol=1e-7)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_weights_are_refused_by_name_and_number(bad):
    W = randn(4, 5)
    W[1, 2] = W[3, 3] = bad
    nan, inf = (2, 0) if math.isnan(bad) else (0, 2)
    message = rf"'model\.q_proj'.*{nan} NaN and {inf} infinite of 20.*modules_to_not_convert"
    with pytest.raises(ValueError, match=message):
        closed_form(W, layer="model.q_proj")
    with pytest.raises(ValueError, match=message):
        closed_form_planes(W, 1, layer="model.q_proj")


@pytest.mark.parametrize(
    ("W", "options", "match"),
    [
        (torch.ones(3), {}, "matrix"),
        (torch.ones(0, 3), {}, "non-empty"),
        (torch.ones(2, 3, dtype=torch.int32), {}, "int32"),
        (torch.ones(2, 3), {"importance": torch.ones(2)}, r"shape \(3,\), got \(2,\)"),
        (torch.ones(2, 3), {"importance": torch.tensor([1.0, math.nan, 1.0])}, "importance holds NaN"),
        (torch.ones(2, 3), {"iters": -1}, "iters"),
        (torch.ones(2, 3), {"balance_iters": 0}, "use_balancing=False"),
        (torch.ones(2, 3), {"balance_alpha": math.inf, "iters": 1.5}, "iters.*balance_alpha"),
    ],
)
def test_closed_form_refuses(W, options, match):
    with pytest.raises(ValueError, match=match):
        closed_form(W, **options)


def test_option_problems_accepts_the_unused():
    assert option_problems(iters=0, use_balancing=False, balance_iters=0, balance_alpha=0.0) == []
    assert len(option_problems(iters=True, use_balancing="no", balance_iters=0, balance_alpha=-1)) == 4


# --- fp16 ------------------------------------------------------------------------------------------------


def plane_of(a: torch.Tensor, b: torch.Tensor) -> Plane:
    return Plane(torch.ones(len(a), len(b), dtype=torch.bool), a, b)


def test_to_half_rounds():
    a, b = rand(40) + 0.1, rand(50) * 1e-3 + 1e-3
    a[3] = 1e-12  # a single entry may vanish
    half_a, half_b = to_half(plane_of(a, b), "layer")
    assert torch.equal(half_a, a.half())
    assert torch.equal(half_b, b.half())
    assert half_a[3] == 0


@pytest.mark.parametrize(
    ("a", "b", "vector"),
    [
        (torch.tensor([1.0, 7e4]), torch.ones(3), "output scales a"),
        (torch.ones(2), torch.tensor([1.0, math.inf, 1.0]), "input scales b"),
        (torch.full((2,), 2e-8), torch.ones(3), "output scales a"),  # rounds to 0
        (torch.ones(2), torch.full((3,), 8e-8), "input scales b"),  # rounds to 6e-8
    ],
    ids=["overflow", "inf", "to-zero", "subnormal"],
)
def test_to_half_refuses(a, b, vector):
    message = rf"'model\.up'.*{vector}.*range from .* to .*65504.*add 'model\.up' to modules_to_not_convert"
    with pytest.raises(ValueError, match=message):
        to_half(plane_of(a, b), "model.up")
    with pytest.raises(ValueError, match="add its name to modules_to_not_convert"):
        to_half(plane_of(a, b), None)


def test_gauge_holds_what_an_unbalanced_split_would_not():
    # Magnitudes near 1e-6: a split into 1 and 1e-6 loses digits in fp16, ‖a‖ = ‖b‖ puts both near 1e-3.
    W = (rand(30, 30) + 0.5) * 1e-6
    [plane] = closed_form_planes(W, 1)
    exact = dense(closed_form(W))
    torch.testing.assert_close(dequantize_planes([plane]).double(), exact, rtol=2e-3, atol=0)


# --- planes ----------------------------------------------------------------------------------------------


@BOTH
def test_second_plane_is_the_closed_form_of_the_stored_residual(use_balancing):
    W, importance = randn(22, 31), rand(31)
    options = {"use_balancing": use_balancing, "importance": importance}
    planes = closed_form_planes(W, 3, **options)
    assert len(planes) == 3
    residual = W.clone()
    for signs, a, b in planes:
        assert (signs.dtype, a.dtype, b.dtype) == (torch.bool, torch.float16, torch.float16)
        want = closed_form(residual, **options)
        assert torch.equal(signs, want.signs)
        assert torch.equal(a, want.a.half())
        assert torch.equal(b, want.b.half())
        residual = residual - a.float()[:, None] * torch.where(signs, 1.0, -1.0) * b.float()
    torch.testing.assert_close(W - dequantize_planes(planes), residual, rtol=0, atol=1e-6)


def test_planes_do_not_touch_the_weights():
    W = randn(6, 7)
    before = W.clone()
    closed_form_planes(W, 3)
    assert torch.equal(W, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_planes_of_other_dtypes_use_the_weights_as_they_are(dtype):
    W = randn(12, 17).to(dtype)
    errors = [relative_error(W, dequantize_planes(closed_form_planes(W, k))) for k in (1, 2, 3, 4)]
    assert errors == sorted(errors, reverse=True)
    assert errors[3] < 0.05


def test_dequantize_planes_is_the_formula():
    planes = [(randn(5, 9, seed=k) >= 0, rand(5, seed=k).half(), rand(9, seed=k).half()) for k in range(2)]
    first, second = (a.float()[:, None] * torch.where(signs, 1.0, -1.0) * b.float()[None, :] for signs, a, b in planes)
    got = dequantize_planes(planes)
    assert got.dtype == torch.float32
    assert torch.equal(got, first + second)
    assert torch.equal(dequantize_planes(planes[:1]), first)


@pytest.mark.parametrize("planes", [0, -1, 1.5, True])
def test_number_of_planes_is_checked(planes):
    with pytest.raises(ValueError, match=r"'x'.*planes"):
        closed_form_planes(torch.ones(2, 2), planes, layer="x")


def test_dequantize_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        dequantize_planes([])


def test_importance_from_hessian():
    H = torch.tensor([[4.0, 1.0], [1.0, -1e-9]])
    assert torch.equal(importance_from_hessian(H), torch.tensor([4.0, 0.0]))
    assert H[1, 1] < 0
    for bad in (torch.ones(3), torch.ones(2, 3)):
        with pytest.raises(ValueError, match="square"):
            importance_from_hessian(bad)
