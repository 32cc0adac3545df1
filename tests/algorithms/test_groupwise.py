"""Choosing codes and scales in groups: against min-max, against brute force, and at the ends of float16."""

import itertools

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hf_onebit.algorithms import groupwise, half_quadratic
from hf_onebit.algorithms.groupwise import quantize_groupwise
from hf_onebit.formats.mpq import dequantize, zero_point
from hf_onebit.formats.packing import pack


def group_errors(W, codes, scales, zeros, bits, group_size, importance=None):
    """Weighted squared error of each group, (out, groups), in float64."""
    q = codes.double()
    d = torch.ones(W.shape).double() if importance is None else importance.double().expand(W.shape)
    size = W.shape[1] if group_size == -1 else group_size
    errors = []
    for g, k in enumerate(range(0, W.shape[1], size)):
        s = scales[g].double()[:, None]
        z = s * zero_point(bits) if zeros is None else zeros[g].double()[:, None]
        part = slice(k, k + size)
        errors.append((d[:, part] * (W[:, part].double() - (s * q[:, part] - z)) ** 2).sum(1))
    return torch.stack(errors, 1)


def min_max(W, bits, group_size, symmetric):
    """The textbook start, with scales rounded as stored."""
    top = (1 << bits) - 1
    size = W.shape[1] if group_size == -1 else group_size
    codes, scales, zeros = [], [], []
    for part in W.split(size, 1):
        low, high = part.amin(1), part.amax(1)
        if symmetric:
            s = (part.abs().amax(1) / max(zero_point(bits), 0.5)).half()
            offset = torch.full_like(low, zero_point(bits))
        else:
            s, z = ((high - low) / top).half(), (-low).half()
            offset = torch.where(s == 0, 0, z.float() / s.float())
            zeros.append(z)
        inverse = torch.where(s == 0, 0, 1 / s.float())
        codes.append((part * inverse[:, None] + offset[:, None]).round().clamp(0, top).to(torch.uint8))
        scales.append(s)
    return torch.cat(codes, 1), torch.stack(scales), None if symmetric else torch.stack(zeros)


@settings(max_examples=60, deadline=None)
@given(
    bits=st.integers(1, 8),
    group_size=st.sampled_from([32, 64, -1]),
    symmetric=st.booleans(),
    shape=st.tuples(st.integers(1, 9), st.integers(1, 150)),
    kind=st.sampled_from(["normal", "uniform", "outliers", "offset", "constant", "zero", "sparse", "tiny"]),
    seed=st.integers(0, 1000),
)
@example(bits=2, group_size=32, symmetric=True, shape=(2, 11), kind="normal", seed=1)
def test_no_group_is_worse_than_min_max(bits, group_size, symmetric, shape, kind, seed):
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(shape, generator=generator)
    if kind == "uniform":
        W = torch.rand(shape, generator=generator) - 0.5
    elif kind == "outliers":
        W[:, 0] *= 100
    elif kind == "offset":
        W = 0.1 * W + 5
    elif kind == "constant":
        W = W[:, :1].expand(shape).contiguous()
    elif kind == "zero":
        W[::2] = 0
    elif kind == "sparse":
        W = W * (torch.rand(shape, generator=generator) < 0.1)
    elif kind == "tiny":
        W = W * 1e-4
    ours = quantize_groupwise(W, bits, group_size, symmetric)
    plain = min_max(W, bits, group_size, symmetric)
    errors = group_errors(W, *ours, bits, group_size)
    limit = group_errors(W, *plain, bits, group_size)
    size = W.shape[1] if group_size == -1 else min(group_size, W.shape[1])
    # Errors are compared in float32: equal ones may come out in either order.
    rounding = 1e-6 * limit + 1e-12 * size * W.double().abs().max() ** 2
    assert (errors <= limit + rounding).all()
    assert ours[0].dtype == torch.uint8
    assert int(ours[0].max()) < 1 << bits
    assert ours[1].dtype == torch.float16


def best_of_all(w, bits, symmetric):
    """The least error over every assignment of codes, scales by least squares: nothing rounded to float16."""
    levels = range(1 << bits)
    least = float("inf")
    for q in itertools.product(levels, repeat=len(w)):
        Q = torch.tensor(q, dtype=torch.float64)
        A = (Q - zero_point(bits)).unsqueeze(1) if symmetric else torch.stack((Q, torch.ones_like(Q)), 1)
        fit = A @ torch.linalg.lstsq(A, w.unsqueeze(1), driver="gelsd").solution
        least = min(least, float(((w - fit.squeeze(1)) ** 2).sum()))
    return least


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "size"), [(1, 8), (2, 5)])
def test_near_brute_force(bits, size, symmetric):
    W = torch.randn(12, size, generator=torch.Generator().manual_seed(bits))
    ours = group_errors(W, *quantize_groupwise(W, bits, -1, symmetric), bits, -1)[:, 0]
    best = torch.tensor([best_of_all(w.double(), bits, symmetric) for w in W])
    assert (ours >= best * (1 - 1e-9)).all()
    power = float(W.double().pow(2).sum())
    assert float(ours.sum() - best.sum()) < 0.01 * power
    assert int((ours <= best * 1.001 + 1e-6 * power / len(W)).sum()) >= 8  # and mostly it is the best


@pytest.mark.parametrize("symmetric", [True, False])
def test_more_bits_and_smaller_groups_are_better(symmetric):
    W = torch.randn(64, 512)

    def error(bits, group_size):
        return float(group_errors(W, *quantize_groupwise(W, bits, group_size, symmetric), bits, group_size).sum())

    by_bits = [error(bits, 64) for bits in range(1, 9)]
    assert by_bits == sorted(by_bits, reverse=True)
    by_size = [error(3, size) for size in (-1, 256, 128, 64, 32)]
    assert by_size == sorted(by_size, reverse=True)


def test_the_search_earns_its_time():
    """Against min-max, on normal numbers in groups of 64: most at 2 bits, where clipping pays."""
    W = torch.randn(64, 512)
    for bits, most in ((2, 0.78), (3, 0.8), (4, 0.9)):
        for symmetric in (True, False):
            ours = group_errors(W, *quantize_groupwise(W, bits, 64, symmetric), bits, 64).sum()
            plain = group_errors(W, *min_max(W, bits, 64, symmetric), bits, 64).sum()
            assert ours < most * plain


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("per_row", [True, False])
def test_importance(symmetric, per_row):
    W = torch.randn(16, 96)
    d = torch.rand(16, 96) ** 4 if per_row else torch.rand(96) ** 4
    plain = quantize_groupwise(W, 2, 32, symmetric)
    weighted = quantize_groupwise(W, 2, 32, symmetric, importance=d)
    errors = [group_errors(W, *result, 2, 32, d).sum() for result in (plain, weighted)]
    assert errors[1] < 0.95 * errors[0]
    # Only ratios count, and importance that is zero everywhere counts all alike.
    for a, b in zip(weighted, quantize_groupwise(W, 2, 32, symmetric, importance=1024 * d), strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    nothing = quantize_groupwise(W, 2, 32, symmetric, importance=torch.zeros(96))
    assert torch.isfinite(dequantize(pack(nothing[0], 2), nothing[1], nothing[2], 96, 2, 32)).all()


def test_an_input_of_no_importance_does_not_matter():
    W = torch.randn(4, 64)
    d = torch.ones(64)
    d[5] = 0
    changed = W.clone()
    changed[:, 5] = 30
    for bits in (2, 4):
        a, b = (quantize_groupwise(M, bits, 64, True, importance=d) for M in (W, changed))
        errors = [float(group_errors(W, *result, bits, 64, d).sum()) for result in (a, b)]
        assert errors[1] < 1.3 * errors[0]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_constant_and_zero_groups_are_exact(bits, symmetric):
    W = torch.zeros(3, 64)
    W[1, :32] = 0.75
    W[2] = -2.5
    codes, scales, zeros = quantize_groupwise(W, bits, 32, symmetric)
    assert torch.equal(dequantize(pack(codes, bits), scales, zeros, 64, bits, 32), W)
    empty = quantize_groupwise(torch.zeros(3, 64), bits, 32, symmetric)
    assert not dequantize(pack(empty[0], bits), empty[1], empty[2], 64, bits, 32).any()


def test_chunks_do_not_change_the_result(monkeypatch):
    W, d = torch.randn(37, 100), torch.rand(37, 100)
    for importance in (None, d, d[0]):
        whole = quantize_groupwise(W, 3, 32, False, importance)
        monkeypatch.setattr(groupwise, "_CHUNK", 300)
        parts = quantize_groupwise(W, 3, 32, False, importance)
        monkeypatch.undo()
        for a, b in zip(whole, parts, strict=True):
            assert torch.equal(a, b)
    half = quantize_groupwise(W.bfloat16(), 3, 32, False)
    assert torch.equal(half[0], quantize_groupwise(W.bfloat16().float(), 3, 32, False)[0])


def test_empty_matrices():
    for shape in ((0, 64), (3, 0)):
        codes, scales, zeros = quantize_groupwise(torch.zeros(shape), 4, 32, False)
        assert codes.shape == shape
        assert scales.shape == zeros.shape == (-(-shape[1] // 32), shape[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"W": torch.full((2, 64), 1e9)}, r"model\.head: the largest weight is 1e\+09, and float16"),
        ({"W": torch.full((2, 64), 1e30)}, r"model\.head: the largest weight is 1e\+30, and float16"),
        ({"W": torch.full((2, 64), 1e-12)}, r"model\.head: the largest weight is 1e-12, and float16"),
        ({"W": torch.full((2, 64), float("nan"))}, r"model\.head: W has 128 values that are inf or nan"),
        ({"W": torch.zeros(64)}, r"W must be a float matrix \(out, in\)"),
        ({"W": torch.zeros(2, 64, dtype=torch.int32)}, r"W must be a float matrix .* got torch\.int32"),
        ({"bits": 9}, "bits must be between 1 and 8, got 9"),
        ({"group_size": 0}, "group_size must be positive"),
        ({"importance": torch.ones(63)}, r"importance has shape \(63,\), expected \(64,\) or \(2, 64\)"),
        ({"importance": -torch.ones(64)}, "importance must be finite and not negative"),
    ],
)
def test_refusals(change, message):
    call = {"W": torch.ones(2, 64), "bits": 4, "group_size": 32, "symmetric": False, "where": "model.head"}
    with pytest.raises(ValueError, match=message):
        quantize_groupwise(**{**call, **change})


def test_large_values_that_fit_are_kept():
    W = torch.full((1, 32), 60000.0)
    W[0, 0] = -60000.0
    for bits in (4, 8):
        codes, scales, zeros = quantize_groupwise(W, bits, 32, False)
        torch.testing.assert_close(dequantize(pack(codes, bits), scales, zeros, 32, bits, 32), W, rtol=2e-3, atol=0)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_min_max_search_is_the_textbooks(bits, symmetric):
    W = torch.randn(6, 70, generator=torch.Generator().manual_seed(bits))
    ours = quantize_groupwise(W, bits, 32, symmetric, search="min-max")
    plain = min_max(W, bits, 32, symmetric)
    errors, limit = (group_errors(W, *found, bits, 32) for found in (ours, plain))
    if symmetric:  # either sign of the scale, whichever loses less
        assert bool((errors <= limit * (1 + 1e-5)).all())
    else:
        torch.testing.assert_close(ours[1], plain[1])
        torch.testing.assert_close(ours[2], plain[2])
        torch.testing.assert_close(errors, limit)


@pytest.mark.parametrize("symmetric", [True, False])
def test_half_quadratic_search_lowers_the_error_it_is_for(symmetric):
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(16, 128, generator=generator)
    W[torch.rand(W.shape, generator=generator) < 0.02] *= 8  # outliers, which the power below 1 gives up

    def lost(found):
        size = [t.float().T.repeat_interleave(64, 1) for t in found[1:] if t is not None]
        z = size[0] * zero_point(4) if symmetric else size[1]
        return (W - (found[0] * size[0] - z)).abs().pow(half_quadratic.POWER).view(16, 2, 64).mean(-1)

    mse = lost(quantize_groupwise(W, 4, 64, symmetric))
    ours = lost(quantize_groupwise(W, 4, 64, symmetric, search="half-quadratic"))
    assert bool((ours <= mse * (1 + 1e-5)).all())
    assert float(ours.sum()) < 0.99 * float(mse.sum())


def test_shrinkage_is_near_the_best_for_its_power():
    x = torch.linspace(-3, 3, 61).double()
    e = half_quadratic.shrink_misses(x, 4.0)
    grid = torch.linspace(-3, 3, 6001).double()
    cost = grid.abs() ** half_quadratic.POWER + 2.0 * (x[:, None] - grid) ** 2
    found = e.abs() ** half_quadratic.POWER + 2.0 * (x - e) ** 2
    assert float((found - cost.amin(1)).max()) < 0.12
    assert torch.equal(e.sign().abs() * x.sign(), e.sign())
    assert float(e[x.abs() < 0.3].abs().max()) == 0


def test_unknown_search_is_refused():
    with pytest.raises(ValueError, match="search is 'best', expected one of 'mse', 'min-max', 'half-quadratic'"):
        quantize_groupwise(torch.ones(2, 32), 4, 32, True, search="best")
