"""Sign refinement under the full Hessian: against brute force on small problems, and step by step."""

import itertools
import json
from pathlib import Path

import pytest
import torch

from hf_onebit.algorithms import heldout_choices, sign_steps
from hf_onebit.algorithms.closed_form import closed_form_planes, dequantize_planes
from hf_onebit.algorithms.curvature import Curvature, shrink
from hf_onebit.algorithms.signs import fit_signs, output_loss


def problem(out_features=12, in_features=20, rows=200, seed=0, mixing=0.7):
    """Weights, and the Hessian of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(out_features, in_features, generator=generator)
    mixer = torch.eye(in_features) + mixing * torch.randn(in_features, in_features, generator=generator)
    X = torch.randn(rows, in_features, generator=generator) @ mixer
    return W, X.t() @ X / rows, X


def loss(W, S, a, b, H):
    R = W - sum(x[:, None] * s * y for s, x, y in zip(S, a, b, strict=True))
    return float(((R @ H) * R).sum(dtype=torch.float64))


def start(W, H, planes=1):
    closed = closed_form_planes(W, planes, importance=H.diagonal(), use_balancing=False)
    S = torch.stack([s.float() * 2 - 1 for s, _, _ in closed])
    return S, torch.stack([a.float() for _, a, _ in closed]), torch.stack([b.float() for _, _, b in closed])


@pytest.mark.parametrize("planes", [1, 2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_no_round_raises_the_loss(planes, seed):
    W, H, _ = problem(seed=seed)
    fit = fit_signs(W, Curvature(H), planes=planes, rounds=6)
    fitted, stored = fit.losses[:-1], fit.losses[-1]
    assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(fitted))
    assert fitted[-1] < 0.7 * fitted[0]
    assert stored <= fitted[-1] * 1.01 + 1e-6  # what fp16 costs


@pytest.mark.parametrize("planes", [1, 2])
def test_a_sweep_ends_where_no_single_entry_can_be_better(planes):
    W, H, _ = problem(6, 10, seed=3)
    S, a, b = start(W, H, planes)
    before = loss(W, S, a, b, H)
    sweeps = 0
    while sign_steps.flip(W, S, a, b, H):
        after = loss(W, S, a, b, H)
        assert after < before
        before = after
        sweeps += 1
        assert sweeps < 50
    for i, j in itertools.product(range(6), range(10)):
        for pattern in itertools.product((1.0, -1.0), repeat=planes):
            other = S.clone()
            other[:, i, j] = torch.tensor(pattern)
            assert loss(W, other, a, b, H) >= before * (1 - 1e-4)


def test_flips_reach_the_best_signs_of_all_on_most_small_rows():
    """Against all 2^8 sign patterns of a row; coordinate descent may end in a local minimum, so most, not all."""
    W, H, _ = problem(40, 8, seed=5, mixing=0.3)
    _, a, b = start(W, H)
    candidate = sign_steps.error_feedback(W, a, b, Curvature(H, damping=0.0))
    while sign_steps.flip(W, candidate, a, b, H):
        continue
    patterns = torch.tensor(list(itertools.product((1.0, -1.0), repeat=8)))
    best = 0
    for i in range(40):
        R = W[i] - a[0, i] * patterns * b[0]
        least = float(((R @ H) * R).sum(-1).min())
        ours = loss(W[i : i + 1], candidate[:, i : i + 1], a[:, i : i + 1], b, H)
        assert ours >= least * (1 - 1e-4)
        best += ours <= least * (1 + 1e-4)
    assert best >= 25


@pytest.mark.parametrize("planes", [1, 2])
def test_the_scales_are_the_least_squares_ones(planes):
    """No small change of a, and none of one plane's b, lowers the loss."""
    W, H, _ = problem(7, 9, seed=2)
    work = Curvature(H).H
    S, a, b = start(W, work, planes)
    a = sign_steps.fit_a(W @ work, S, b, work)
    base = loss(W, S, a, b, work)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        assert loss(W, S, a + 1e-2 * torch.randn(a.shape, generator=generator), b, work) > base
    solved = b.clone()
    solved[0] = sign_steps.fit_b(W @ work, S, a, b, work, 0)
    base = loss(W, S, a, solved, work)
    for _ in range(20):
        moved = solved.clone()
        moved[0] += 1e-2 * torch.randn(moved[0].shape, generator=generator)
        assert loss(W, S, a, moved, work) > base


def test_error_feedback_is_the_column_by_column_definition():
    """Against one column at a time on the whole remaining matrix, with a fresh inverse for each."""
    W, H, _ = problem(5, 70, rows=400, seed=1)  # more columns than a block holds
    _, a, b = start(W, H)
    curvature = Curvature(H)
    left, work = W.clone().double(), curvature.H.double()
    S = torch.empty(5, 70)
    remaining = work.diagonal().argsort(descending=True, stable=True).tolist()
    while remaining:
        j = remaining[0]
        S[:, j] = torch.where(left[:, j] >= 0, 1.0, -1.0)
        q = (a[0] * S[:, j] * b[0, j]).double()
        inverse = torch.linalg.inv(work[remaining][:, remaining])
        left[:, remaining] -= torch.outer((left[:, j] - q) / inverse[0, 0], inverse[0])
        remaining = remaining[1:]
    assert float((sign_steps.error_feedback(W, a, b, curvature)[0] == S).float().mean()) > 0.99  # ties in float32


def test_every_step_pays_on_unseen_rows():
    W, _, X = problem(32, 48, rows=2000, seed=7)
    H, unseen = X[:1000].t() @ X[:1000], X[1000:].t() @ X[1000:]
    closed = output_loss(W, closed_form_planes(W, 1, importance=H.diagonal(), use_balancing=False), unseen)
    fed = output_loss(W, fit_signs(W, Curvature(H), rounds=0).planes, unseen)
    refined = output_loss(W, fit_signs(W, Curvature(H), rounds=4).planes, unseen)
    second = output_loss(W, fit_signs(W, Curvature(H), rounds=4, planes=2).planes, unseen)
    assert refined < fed < 0.8 * closed
    assert second < 0.4 * refined


def test_the_page_has_the_figures_of_the_file_and_two_planes_leave_less_than_they_must() -> None:
    docs = Path(__file__).parents[2] / "docs"
    page = (docs / "methods" / "signs.md").read_text()
    rows = json.loads((docs / "results" / "signs.json").read_text())["layers"]
    assert len(rows) == 7
    for row in rows:
        assert row["two_planes"] < 0.4 * row["shrunk"]
        assert row["shrunk"] < row["feedback"] < row["closed"]
        errors = [f"{row[key]:.3f}" for key in ("closed", "feedback", "refined", "shrunk", "two_planes")]
        name, ratio = row["layer"].rpartition(".")[2], row["two_planes"] / row["shrunk"]
        assert f"| {name} | {' | '.join(errors)} | {ratio:.2f} | {row['seconds']:.1f} |" in page


def test_shrinkage_is_chosen_on_what_was_held_out():
    W, _, X = problem(64, 40, rows=2000, seed=4)
    few, held = X[:44], X[1000:]  # hardly more rows than inputs: trusting H wholly must lose
    H, H_held = few.t() @ few, held.t() @ held
    curvature, losses = heldout_choices.choose_shrinkage(W, H, H_held, candidates=(0.6, 0.0, 0.3))
    assert curvature.shrinkage == min(losses, key=lambda shrinkage: losses[shrinkage][0.0])
    assert curvature.shrinkage > 0
    assert torch.equal(curvature.H, Curvature(H, curvature.shrinkage).H)
    H = torch.tensor([[2.0, 1.0], [1.0, 4.0]])
    assert torch.equal(shrink(H, 0.25), torch.tensor([[2.0, 0.75], [0.75, 4.0]]))
    with pytest.raises(ValueError, match="no candidates"):
        heldout_choices.choose_shrinkage(W, few.t() @ few, held.t() @ held, candidates=())


def test_a_large_curvature_is_made_again_and_is_the_same(monkeypatch):
    W, _, X = problem(64, 40, rows=2000, seed=4)
    H, held = X[:300].t() @ X[:300], X[1000:].t() @ X[1000:]
    kept, losses = heldout_choices.choose_shrinkage(W, H, held, candidates=(0.9, 0.02, 0.5))
    monkeypatch.setattr(heldout_choices, "_KEPT", 0)
    made, others = heldout_choices.choose_shrinkage(W, H, held, candidates=(0.9, 0.02, 0.5))
    assert kept.shrinkage == made.shrinkage
    assert torch.equal(kept.H, made.H)
    assert losses == others
    assert list(losses) == [0.02, 0.5]  # with rows enough, giving up more only costs: the third is not tried


@pytest.mark.parametrize("planes", [1, 2])
def test_the_losses_of_choices_are_those_of_fits_one_by_one(planes):
    """Against the definition: each strength a target of its own, fed back alone, a fitted, judged on the drift."""
    W, _, X = problem(40, 70, rows=2000, seed=6)
    X_hat = X + 0.2 * torch.randn(X.shape, generator=torch.Generator().manual_seed(1))
    H, C = X_hat[:1000].t() @ X_hat[:1000], X[:1000].t() @ X_hat[:1000]
    H_held, C_held = X_hat[1000:].t() @ X_hat[1000:], X[1000:].t() @ X_hat[1000:]
    K = heldout_choices.target_correction(H, C)
    curvature, losses = heldout_choices.choose_shrinkage(W, H, H_held, K=K, C_heldout=C_held, planes=planes, rows=20)
    best, again = heldout_choices.choose_strength(W, K, curvature, H_held, C_held, planes=planes, rows=20)
    assert losses[curvature.shrinkage] == pytest.approx(again, rel=1e-5)
    assert best == min(again, key=again.get)
    sample = W[::2]
    energy = float(((sample @ H_held) * sample).sum())
    for strength, loss_found in again.items():
        S, a, b = start(W + strength * (W @ K), curvature.H, planes)
        target = sample + strength * (sample @ K)
        S = sign_steps.error_feedback(target, a[:, ::2], b, curvature)
        a = sign_steps.fit_a(target @ curvature.H, S, b, curvature.H)
        Q = sum(x[:, None] * s * y for s, x, y in zip(S, a, b, strict=True))
        expected = float(((Q @ H_held) * Q - 2 * (sample @ C_held) * Q).sum()) / energy
        assert loss_found == pytest.approx(expected, rel=1e-3)


def test_a_sweep_is_the_definition():
    """One column after the other, each entry tried with every combination of its planes' flips."""
    for planes in (1, 2):
        W, H, _ = problem(9, 130, rows=300, seed=planes)  # more columns than a block holds
        work = Curvature(H).H
        S, a, b = start(W, work, planes)
        expected = S.clone().double()
        A, B = a.double(), b.double()
        for j, i in itertools.product(range(130), range(9)):
            G = (W[i].double() - sum(A[p, i] * expected[p, i] * B[p] for p in range(planes))) @ work[:, j].double()
            options = {}
            for pattern in itertools.product((1.0, -1.0), repeat=planes):
                d = sum(A[p, i] * B[p, j] * expected[p, i, j] * (1 - pattern[p]) for p in range(planes))
                options[pattern] = float(d * (2 * G + d * float(work[j, j])))
            pattern = min(options, key=options.get)
            expected[:, i, j] *= torch.tensor(pattern, dtype=torch.float64)
        before = S.clone()
        changed = sign_steps.flip(W, S, a, b, work)
        assert float((expected == S).float().mean()) > 0.99  # ties in float32
        assert changed == int((before != S).any(0).sum())


def test_the_correction_is_the_ridge_solution():
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(6, 10, generator=generator)
    X = torch.randn(500, 10, generator=generator)
    X_hat = X @ (torch.eye(10) + 0.2 * torch.randn(10, 10, generator=generator)) + 0.1 * torch.randn(
        500, 10, generator=generator
    )
    H, C = X_hat.t() @ X_hat, X.t() @ X_hat
    damping = 0.01
    ridge = damping * float(H.diagonal().mean())
    K = heldout_choices.target_correction(H, C, damping)
    expected = (W.double() @ C.double() + ridge * W.double()) @ torch.linalg.inv(H.double() + ridge * torch.eye(10))
    assert torch.allclose((W + W @ K).double(), expected, atol=1e-4)
    before, after = ((X @ W.t() - X_hat @ V.t()).square().sum() for V in (W, W + W @ K))
    assert after < 0.2 * before
    assert torch.equal(heldout_choices.target_correction(torch.zeros(3, 3), torch.zeros(3, 3)), torch.zeros(3, 3))


def test_drift_loss_is_the_error_but_for_a_constant():
    W, _, X = problem(6, 10, seed=9)
    X_hat = X + 0.1
    H, C = X_hat.t() @ X_hat, X.t() @ X_hat
    constant = float((X @ W.t()).square().sum())
    for rounds in (0, 3):
        planes = fit_signs(W, Curvature(H), rounds=rounds).planes
        error = float((X @ W.t() - X_hat @ dequantize_planes(planes).t()).square().sum())
        assert heldout_choices.drift_loss(W, planes, H, C) + constant == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize(
    "H",
    [
        torch.zeros(8, 8),
        torch.ones(8, 8),  # rank one
        torch.diag(torch.tensor([1e12, 1.0, 1e-12, 0.0, 1.0, 1.0, 1.0, 1.0])),
        torch.eye(8) - 0.5 * torch.ones(8, 8),  # indefinite
    ],
    ids=["nothing", "singular", "extreme", "indefinite"],
)
@pytest.mark.parametrize("planes", [1, 2])
def test_damping_never_aborts(H, planes):
    W = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    for layer_planes in fit_signs(W, Curvature(H), planes=planes).planes:
        assert all(bool(torch.isfinite(tensor).all()) for tensor in layer_planes)


def test_stored_scales_are_positive_halves_of_one_gauge():
    W, H, _ = problem(12, 20)
    ((bits, a, b),) = fit_signs(W, Curvature(H)).planes
    assert bits.dtype == torch.bool
    assert a.dtype == b.dtype == torch.float16
    assert bool((a >= 0).all())
    assert bool((b >= 0).all())
    assert float(a.float().norm()) == pytest.approx(float(b.float().norm()), rel=0.05)


def test_the_same_input_gives_the_same_bits():
    W, H, _ = problem(30, 70)
    first, second = (fit_signs(W, Curvature(H), planes=2) for _ in range(2))
    assert all(
        torch.equal(x, y) for p, q in zip(first.planes, second.planes, strict=True) for x, y in zip(p, q, strict=True)
    )
    assert first.losses == second.losses


@pytest.mark.parametrize(
    ("W", "H", "rounds", "message"),
    [
        (torch.ones(3, 4, dtype=torch.int32), torch.eye(4), 1, "float matrix"),
        (torch.ones(3), torch.eye(4), 1, "float matrix"),
        (torch.ones(3, 4), torch.eye(5), 1, r"\(4, 4\), got \(5, 5\)"),
        (torch.ones(3, 4), torch.ones(4, 5), 1, "square"),
        (torch.ones(3, 4), torch.full((4, 4), torch.nan), 1, "NaN or infinite"),
        (torch.ones(3, 4), torch.eye(4), -1, "rounds must be >= 0"),
        (torch.full((3, 4), torch.inf), torch.eye(4), 1, "infinite"),
    ],
)
def test_wrong_input_is_refused(W, H, rounds, message):
    with pytest.raises(ValueError, match=message):
        fit_signs(W, Curvature(H), rounds=rounds, layer="x.y")
