"""The training form of one-bit layers: every gradient against autograd on the dense formula, in float64."""

import pytest
import torch

from hf_onebit.algorithms.pair_latents import sign_latents
from hf_onebit.algorithms.sign_linear import SignLinear
from hf_onebit.algorithms.weight_gradient import weight_gradient


@pytest.mark.parametrize("tokens", [5, 1024, 1500])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
def test_the_gradient_of_a_weight(tokens: int, shape: tuple[int, int]) -> None:
    g = torch.Generator().manual_seed(0)
    gy, x = torch.randn(1, tokens, shape[0], generator=g), torch.randn(1, tokens, shape[1], generator=g)
    exact = gy[0].double().t() @ x[0].double()
    found = weight_gradient(gy, x)
    assert found.is_contiguous()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-3)
    rounded = weight_gradient(gy.bfloat16(), x.bfloat16())
    assert rounded.dtype == torch.float32
    assert (rounded - exact).norm() < 0.01 * exact.norm()


def layer_of(planes: int, dtype: torch.dtype) -> SignLinear:
    g = torch.Generator().manual_seed(planes)
    parts = [
        (
            torch.randn(24, 40, generator=g),
            (torch.rand(24, generator=g) + 0.5) / (k + 1),
            torch.rand(40, generator=g) + 0.5,
        )
        for k in range(planes)
    ]
    return SignLinear(parts, torch.randn(24, generator=g), dtype)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("what", ["latents", "flips", "one latent", "frozen"])
@pytest.mark.parametrize("planes", [1, 2, 3])
def test_every_gradient_is_that_of_the_dense_formula(planes: int, what: str, dtype: torch.dtype, bound: float) -> None:
    layer = layer_of(planes, dtype)
    named = {f"layer.{k}": plane for k, plane in enumerate(layer.planes)}
    if what == "latents":
        sign_latents(named, {}, (0.9, 0.95))
    elif what == "one latent":
        sign_latents(dict([*named.items()][:1]), {}, (0.9, 0.95))
    elif what == "flips":
        for plane in layer.planes:
            plane.collect_sign_gradient()
    x = torch.randn(2, 30, 40, generator=torch.Generator().manual_seed(9))
    probe = torch.randn(2, 30, 24, generator=torch.Generator().manual_seed(8))
    own = x.clone().requires_grad_(True)
    y = layer(own)
    assert y.dtype == torch.float32
    (y * probe).sum().backward()

    exact_x = x.double().requires_grad_(True)
    scales = [
        (p.a.detach().double().requires_grad_(True), p.b.detach().double().requires_grad_(True)) for p in layer.planes
    ]
    weights = [a[:, None] * p.signs.double() * b for p, (a, b) in zip(layer.planes, scales, strict=True)]
    for W in weights:
        W.retain_grad()
    exact = exact_x @ sum(weights).t() + layer.bias.double()
    (exact * probe.double()).sum().backward()

    def same(found: torch.Tensor, expected: torch.Tensor) -> None:
        assert float((found.double() - expected).norm() / expected.norm()) < bound

    same(y.detach(), exact.detach())
    same(own.grad, exact_x.grad)
    for plane, W, (a, b) in zip(layer.planes, weights, scales, strict=True):
        same(plane.a.grad, a.grad)
        same(plane.b.grad, b.grad)
        if plane.latent is not None:
            same(plane.latent.grad, W.grad * (a[:, None] * b).detach())
        if what == "flips":
            same(plane.sign_gradient.weight, W.grad)
            same(plane.sign_gradient.squares, W.grad.square())
            assert (plane.sign_gradient.rows, plane.sign_gradient.passes) == (60, 1)
            same(plane.sign_gradient.inputs, x.double().square().sum((0, 1)))
            same(plane.sign_gradient.outputs, probe.double().square().sum((0, 1)))


def test_frozen_scales_have_no_gradient_while_signs_learn() -> None:
    layer = layer_of(2, torch.float32)
    latents = sign_latents({f"layer.{k}": plane for k, plane in enumerate(layer.planes)}, {}, (0.9, 0.95))
    for plane in layer.planes:
        plane.a.requires_grad_(False)
    layer(torch.randn(3, 40)).sum().backward()
    assert all(plane.a.grad is None and plane.b.grad is not None for plane in layer.planes)
    assert all(latent.grad is not None for latent in latents.latents.values())


def test_nothing_that_learns_costs_no_gradient_of_a_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = layer_of(2, torch.float32).requires_grad_(False), torch.randn(3, 40, requires_grad=True)
    expected = torch.ones(3, 24) @ sum(plane.folded for plane in layer.planes)
    monkeypatch.setattr("hf_onebit.algorithms.sign_linear.weight_gradient", lambda *_: pytest.fail("not asked for"))
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, expected)


def test_a_matrix_that_changed_before_backward_is_refused() -> None:
    layer = layer_of(2, torch.float32)
    sign_latents({f"layer.{k}": plane for k, plane in enumerate(layer.planes)}, {}, (0.9, 0.95))
    loss = layer(torch.randn(3, 40)).sum()
    layer.planes[1].fold()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_no_plane_is_refused() -> None:
    with pytest.raises(ValueError, match="expected at least one plane"):
        SignLinear([])(torch.randn(2, 3))
