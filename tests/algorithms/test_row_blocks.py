"""Several widths within a layer: the split by importance, and the fit block by block, against plainer twins."""

import itertools

import pytest
import torch
from torch import Tensor

from hf_onebit.algorithms.curvature import Curvature
from hf_onebit.algorithms.gptq import GroupFit
from hf_onebit.algorithms.row_blocks import WIDTHS, fit_blocks, round_blocks, widths_by_importance
from hf_onebit.formats import mbwq
from hf_onebit.formats.table import TableEntry
from hf_onebit.quantization.group_tensors import dense_fit, dequantize_entry, pack_fit


def inputs(n: int = 96, rows: int = 400, seed: int = 0) -> tuple[Tensor, Tensor]:
    """W (24, n), and a Hessian whose inputs differ in size and hang together."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(24, n, generator=generator)
    X = torch.randn(rows, n, generator=generator) @ (
        torch.eye(n) + 0.3 * torch.randn(n, n, generator=generator) / n**0.5
    )
    X = X * torch.rand(n, generator=generator).mul(3).exp()
    return W, X.T @ X / rows


def entry(blocks: tuple[tuple[int, int, int], ...], n: int, symmetric: bool) -> TableEntry:
    return TableEntry("mpq", blocks[0][0], 1, blocks[0][2], symmetric, in_features=n, q_perm=True, blocks=blocks)


def loss(W: Tensor, Q: Tensor, H: Tensor) -> float:
    return float((((W - Q) @ H) * (W - Q)).sum() / ((W @ H) * W).sum())


@pytest.mark.parametrize("mean", [2.0, 2.5, 3.3, 4.75, 8.0])
def test_the_split_is_the_best_of_all_that_fall(mean: float) -> None:
    importance = torch.rand(160, generator=torch.Generator().manual_seed(1)) ** 6
    blocks = widths_by_importance(importance, mean, 32)
    assert mbwq.check_blocks(blocks, 160) == blocks
    ordered = importance.double().sort(descending=True).values

    def cost(widths: list[int]) -> float:
        return float((ordered * 4.0 ** -torch.tensor(widths).repeat_interleave(32).double()).sum())

    found = [bits for bits, rows, _ in blocks for _ in range(rows // 32)]
    assert sum(found) <= mean * 5
    every = (w for w in itertools.combinations_with_replacement(WIDTHS, 5) if sum(w) <= mean * 5)
    best = min(cost(list(widths)) for widths in every)
    # Greedy: off by less than one step, which is large among five chunks.
    assert best <= cost(found) <= 4 * best


def test_a_shorter_last_chunk_and_a_mean_out_of_range() -> None:
    blocks = widths_by_importance(torch.linspace(1, 0, 100), 3.5, 32)
    assert sum(rows for _, rows, _ in blocks) == 100
    with pytest.raises(ValueError, match=r"mean_bits is 1\.5: expected 2 to 8"):
        widths_by_importance(torch.ones(64), 1.5, 32)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("n", [96, 72])
def test_the_packed_tensors_are_what_was_fitted(n: int, symmetric: bool) -> None:
    W, H = inputs(n)
    blocks = ((4, 32, 32), (2, n - 32, 32))
    about = entry(blocks, n, symmetric)
    for fit in (
        fit_blocks(W, Curvature(H, 0.05), blocks, symmetric),
        round_blocks(W, blocks, symmetric, H.diagonal()),
    ):
        tensors = pack_fit(fit, about)
        about.validate_tensors(tensors, n, 24, "layer")
        torch.testing.assert_close(dequantize_entry(tensors, about, n), dense_fit(fit, about), rtol=0, atol=1e-6)
        order = tensors["q_perm"].long()
        for start in range(0, n - 32, 32):  # groups of falling importance, each in the inputs' own order
            assert H.diagonal()[order[start : start + 32]].min() >= H.diagonal()[order[start + 32 :]].max()


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_loss_is_that_of_the_dense_matrix_and_less_than_of_rounding(symmetric: bool) -> None:
    W, H = inputs()
    curvature, blocks = Curvature(H, 0.0), ((4, 32, 32), (3, 32, 32), (2, 32, 32))
    about = entry(blocks, 96, symmetric)
    fit = fit_blocks(W, curvature, blocks, symmetric)
    Q = dense_fit(fit, about)
    assert fit.losses[-1] == pytest.approx(loss(W, Q, curvature.H), rel=1e-4)
    rounded = dense_fit(round_blocks(W, blocks, symmetric, H.diagonal()), about)
    assert fit.losses[-1] < 0.9 * loss(W, rounded, curvature.H)


def test_blocks_are_made_up_for_by_those_after_them() -> None:
    """The slow twin: the last block's best answer to the errors of the first, by a dense solve."""
    W, H = inputs(64)
    curvature = Curvature(H, 0.0)
    order = curvature.H.diagonal().argsort(descending=True, stable=True)
    blocks = ((2, 32, 32), (8, 32, 32)) if False else ((8, 32, 32), (2, 32, 32))
    fit = fit_blocks(W, curvature, blocks, False, rounds=0)
    E = W - dense_fit(fit, entry(blocks, 64, False))
    first, last = order[:32], order[32:]
    # With the first block's error fixed, the float values of the last that lose least:
    wanted = W[:, last] + E[:, first] @ curvature.H[first][:, last] @ torch.linalg.inv(curvature.H[last][:, last])
    miss = (wanted - dense_fit(fit, entry(blocks, 64, False))[:, last]).norm()
    plain = (W[:, last] - dense_fit(fit, entry(blocks, 64, False))[:, last]).norm()
    assert miss == pytest.approx(float(plain), rel=0.2)  # the first block has eight bits: little to make up for
    alone = fit_blocks(W, curvature, ((8, 64, 32),), False)
    assert alone.losses[-1] < fit.losses[-1]


def test_one_block_of_all_is_a_layer_like_any_other() -> None:
    W, H = inputs()
    curvature = Curvature(H, 0.05)
    fit = fit_blocks(W, curvature, ((3, 96, 32),), False, rounds=1)
    assert isinstance(fit, GroupFit)
    assert fit.shrinkage == 0.05
    Q = dense_fit(fit, entry(((3, 96, 32),), 96, False))
    assert loss(W, Q, curvature.H) < 0.05


def test_without_importance_inputs_are_ordered_by_their_weights() -> None:
    W = torch.randn(24, 96) * torch.linspace(0.1, 2, 96)
    fit = round_blocks(W, ((4, 32, 32), (2, 64, 32)), False)
    assert fit.g_idx is not None
    by_weight = W.square().mean(0).argsort(descending=True)
    assert set(by_weight[:32].tolist()) == set((fit.g_idx == 0).nonzero().flatten().tolist())
