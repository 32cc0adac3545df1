"""The training form of a group-quantized layer: products and gradients against autograd, codes against rounding."""

import pytest
import torch

from hf_onebit.algorithms.code_linear import CodeLatents, CodeLinear
from hf_onebit.algorithms.curvature import Curvature
from hf_onebit.algorithms.gptq import GroupFit, dense, fit_groups


def layer(bits=3, group_size=16, symmetric=False, act_order=False, bias=True, rows=7, columns=40):
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(rows, columns, generator=generator)
    X = torch.randn(100, columns, generator=generator) * torch.rand(columns, generator=generator)
    fit = fit_groups(W, Curvature(X.T @ X), bits, group_size, symmetric, act_order=act_order)
    offset = torch.randn(rows, generator=generator) if bias else None
    return CodeLinear(fit, bits, group_size, offset, torch.float32), fit


@pytest.mark.parametrize("group_size", [16, 8, -1])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
def test_products_and_gradients_are_those_of_autograd(group_size, symmetric, act_order):
    form, fit = layer(group_size=group_size, symmetric=symmetric, act_order=act_order)
    torch.testing.assert_close(form.dense(), dense(fit, 3, group_size))
    codes = CodeLatents({"x": form}, {"x": form.codes.float()})
    x = torch.randn(2, 5, 40, requires_grad=True)
    x_ref = x.detach().clone().requires_grad_(True)
    gy = torch.randn(2, 5, 7)
    y = form(x)
    y.backward(gy)

    scales = form.scales.detach().clone().requires_grad_(True)
    q = form.codes.float().requires_grad_(True)
    size = 40 if group_size == -1 else group_size
    index = torch.arange(40) // size if fit.g_idx is None else fit.g_idx.long()
    if symmetric:
        centers, W = None, (q - 4) * scales[index].T
    else:
        centers = form.centers.detach().clone().requires_grad_(True)
        W = (q - 4) * scales[index].T + centers[index].T
    expected = torch.nn.functional.linear(x_ref, W, form.bias.detach())
    expected.backward(gy)
    torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-3)  # zeros are rounded
    torch.testing.assert_close(x.grad, x_ref.grad)
    torch.testing.assert_close(form.scales.grad, scales.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(codes.latents["x"].grad, q.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(form.bias.grad, gy.sum((0, 1)))
    if centers is not None:
        torch.testing.assert_close(form.centers.grad, centers.grad, rtol=1e-4, atol=1e-4)
        assert torch.equal(form.statistics()[1], fit.zeros)  # what was not trained is stored as it was


def test_latents_start_at_their_codes_and_move_them():
    form, fit = layer()
    far = fit.codes.float() + 3  # a wish that another code would suit better
    codes = CodeLatents({"x": form}, {"x": far})
    codes.publish()
    assert torch.equal(form.codes, fit.codes)
    first = codes.snapshot()
    for _ in range(3):
        form.latent.grad = torch.where(fit.codes > 3, 1.0, -1.0)  # down where high, up where low
        codes.step(0.4)
        codes.fold()
    assert bool((form.codes[fit.codes > 3] < fit.codes[fit.codes > 3]).all())
    assert codes.changed(first) == 1.0
    torch.testing.assert_close(form.folded, form.dense())
    codes.restore(first)
    assert torch.equal(form.codes, fit.codes)
    assert form.latent is None
    assert codes.changed(first) == 0.0
    torch.testing.assert_close(form.folded, dense(fit, 3, 16))


def test_codes_stay_in_range_and_come_back_at_once():
    form, _ = layer(bits=2)
    codes = CodeLatents({"x": form}, {"x": form.codes.float()})
    for _ in range(5):
        form.latent.grad = -torch.ones_like(form.latent)
        codes.step(5.0)
        codes.fold()
    assert bool((form.codes == 3).all())
    form.latent.grad = torch.ones_like(form.latent)
    codes._adam.state.clear()
    codes.step(1.0)
    codes.fold()
    assert bool((form.codes == 2).all())


def test_layers_without_latents_keep_their_codes():
    form, fit = layer()
    codes = CodeLatents({"x": form})
    form(torch.randn(3, 40)).sum().backward()
    codes.step(1.0)
    codes.fold()
    assert torch.equal(form.codes, fit.codes)
    assert form.scales.grad is not None


def test_a_scale_of_zero_gives_finite_latents():
    fit = GroupFit(torch.zeros(2, 8, dtype=torch.uint8), torch.zeros(1, 2).half(), torch.zeros(1, 2).half())
    form = CodeLinear(fit, 4, -1, dtype=torch.float32)
    codes = CodeLatents({"x": form}, {"x": torch.full((2, 8), float("nan"))})
    codes.publish()
    assert bool(codes.latents["x"].isfinite().all())
    assert torch.equal(form.codes, fit.codes)
