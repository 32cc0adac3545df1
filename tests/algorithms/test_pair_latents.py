"""Latents that each stand for the two signs of a weight, against a search through its four levels."""

import itertools

import pytest
import torch

from hf_onebit.algorithms.latents import LATENT_LIMIT, JointLatents, SignLatents
from hf_onebit.algorithms.pair_latents import PairLatents, sign_latents
from hf_onebit.algorithms.sign_linear import SignLinear

NAMES = ("p.0", "p.1")


def layer(seed=0, out=5, in_=7, large=0.6, negative=False):
    g = torch.Generator().manual_seed(seed)
    planes = []
    for size in (1.0, large):
        a, b = (size * (0.5 + torch.rand(n, generator=g)) for n in (out, in_))
        if negative:
            a *= torch.randint(0, 2, (out,), generator=g) * 2 - 1
        planes.append((torch.randn(out, in_, generator=g), a, b))
    return SignLinear(planes, dtype=torch.float32)


def pair(form, margins=None):
    planes = dict(zip(NAMES, form.planes, strict=True))
    return PairLatents({"p": NAMES}, planes, margins)


def dense(form):
    return sum(torch.outer(p.a, p.b) * p.signs for p in form.planes).detach()


@pytest.mark.parametrize("large", [0.3, 0.9, 2.0])
@pytest.mark.parametrize("negative", [False, True])
def test_a_weight_takes_the_level_next_to_its_latent(large, negative):
    form = layer(large=large, negative=negative)
    latents = pair(form)
    wanted = 2 * torch.randn(5, 7, generator=torch.Generator().manual_seed(3))
    latents.latents["p"].copy_(wanted)
    latents.step(0.0)  # nothing to follow: only signs are taken
    unit, other = (torch.outer(p.a, p.b).detach() for p in form.planes)
    levels = torch.stack([unit * s + other * t for s, t in itertools.product((-1, 1), repeat=2)])
    nearest = (levels - (unit * wanted)).abs().min(0).indices
    assert torch.allclose(dense(form), levels.gather(0, nearest[None])[0])


@pytest.mark.parametrize("large", [0.3, 0.9, 2.0])
@pytest.mark.parametrize("negative", [False, True])
def test_it_starts_and_goes_back_to_where_its_signs_are(large, negative):
    form = layer(large=large, negative=negative)
    margins = {name: 2 * torch.randn(5, 7) for name in NAMES}
    signs = [p.signs.clone() for p in form.planes]
    latents = pair(form, margins)
    latents.step(0.0)
    assert all(torch.equal(p.signs, s) for p, s in zip(form.planes, signs, strict=True))
    other = {name: torch.rand(5, 7) < 0.5 for name in NAMES}
    latents.go_back(other)
    latents.step(0.0)
    assert all(torch.equal(found, other[name]) for name, found in latents.values().items())
    ratio = torch.outer(form.planes[1].a / form.planes[0].a, form.planes[1].b / form.planes[0].b).abs().clamp_min(1)
    assert (latents.latents["p"].abs() <= LATENT_LIMIT * ratio * 1.001).all()


def test_the_second_margin_says_where_a_weight_would_like_to_be():
    form = layer(large=0.5)
    unit, other = (torch.outer(p.a, p.b).detach() for p in form.planes)
    inside = (torch.rand(5, 7) * 0.4 + 0.5) * form.planes[1].signs  # of its own cell
    latents = pair(form, {NAMES[1]: inside})
    expected = (unit * form.planes[0].signs + other * inside) / unit
    assert torch.allclose(latents.latents["p"], expected, atol=0.03)


def test_one_step_takes_a_weight_to_the_neighbouring_level_through_both_signs():
    form = layer(large=0.5)
    for plane, sign in zip(form.planes, (1, -1), strict=True):
        plane.signs.fill_(sign)
    latents = pair(form)
    assert (latents.latents["p"] > 0).all()
    latents.latents["p"].fill_(0.05)
    form(torch.ones(1, 7)).sum().backward()  # every weight wants to fall
    latents.step(0.4)
    assert (form.planes[0].signs == -1).all()
    assert (form.planes[1].signs == 1).all()


def test_the_gradient_is_that_of_the_weight_in_units_of_the_first_plane():
    form = layer(negative=True)
    latents = pair(form)
    for plane in form.planes:
        plane.fold()
    x = torch.randn(11, 7)
    W = dense(form).requires_grad_()
    target = torch.randn(11, 5)
    ((form(x) - target) ** 2).sum().backward()
    ((x @ W.T - target) ** 2).sum().backward()
    expected = W.grad * torch.outer(form.planes[0].a, form.planes[0].b).detach()
    assert torch.allclose(latents.latents["p"].grad, expected, rtol=1e-4, atol=1e-4)


def test_release_leaves_signs_and_margins_that_start_at_the_same_place():
    form = layer(large=0.5)
    margins = {name: torch.randn(5, 7) for name in NAMES}
    latents = pair(form, margins)
    before = latents.latents["p"].clone()
    latents.release()
    assert all(p.latent is None and not p.stands_for_two for p in form.planes)
    assert torch.allclose(pair(form, margins).latents["p"], before, atol=1e-5)


def test_a_plane_that_counts_for_nothing_leaves_finite_margins_and_latents():
    form = layer(large=0.5)
    form.planes[1].a.data[0] = 0.0
    margins = {name: torch.randn(5, 7) for name in NAMES}
    pair(form, margins).release()
    handed_on = {name: margin.half() for name, margin in margins.items()}
    assert all(margin.isfinite().all() for margin in handed_on.values())
    assert pair(form, handed_on).latents["p"].isfinite().all()


def test_a_state_goes_on_with_the_same_bits():
    x, target = torch.randn(11, 7), torch.randn(11, 5)

    def steps(form, latents, count):
        for _ in range(count):
            for plane in form.planes:
                plane.fold()
            ((form(x) - target) ** 2).sum().backward()
            latents.step(0.05)

    whole, first, second = layer(), layer(), layer()
    latents = pair(whole)
    steps(whole, latents, 8)
    half = pair(first)
    steps(first, half, 5)
    rest = pair(second)
    rest.load_state(*half.state())
    steps(second, rest, 3)
    assert torch.equal(rest.latents["p"], latents.latents["p"])
    assert all(torch.equal(p.signs, q.signs) for p, q in zip(whole.planes, second.planes, strict=True))


def test_planes_of_one_layer_learn_together_and_all_others_alone():
    two = layer()
    one = SignLinear([(torch.randn(5, 7), torch.ones(5), torch.ones(7))], dtype=torch.float32)
    planes = {"x.planes.0": two.planes[0], "x.planes.1": two.planes[1], "y.planes.0": one.planes[0]}
    latents = sign_latents(planes, {}, (0.9, 0.95))
    assert isinstance(latents, JointLatents)
    assert sorted(latents.names()) == sorted(planes)
    assert sorted(latents.latents) == ["x.planes", "y.planes.0"]
    assert isinstance(sign_latents({"y.planes.0": one.planes[0]}, {}, (0.9, 0.95)), SignLatents)
    with pytest.raises(ValueError, match=r"margins of 'x\.planes\.1' have shape"):
        sign_latents(planes, {"x.planes.1": torch.zeros(7, 5)}, (0.9, 0.95))
