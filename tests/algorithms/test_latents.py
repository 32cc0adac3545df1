"""Latents of signs: their gradient by hand, their optimizer, and the ways back."""

import pytest
import torch

from hf_onebit.algorithms.latents import LATENT_LIMIT, LEAST_MARGIN, SignLatents
from hf_onebit.algorithms.sign_linear import SignLinear, SignPlane


def plane(out=5, inner=7, seed=0):
    g = torch.Generator().manual_seed(seed)
    signs = torch.randn(out, inner, generator=g)
    return SignPlane(signs, torch.rand(out, generator=g) + 0.1, torch.rand(inner, generator=g) + 0.1, torch.float32)


def test_the_gradient_is_that_of_a_weight_that_moves_freely():
    p = plane()
    latents = SignLatents({"p": p})
    x, target = torch.randn(11, 7), torch.randn(11, 5)
    for _ in range(2):  # two passes add up
        (p(x) - target).square().sum().backward()
    W = p.folded.clone().requires_grad_(True)
    (2 * (x @ W.t() - target).square().sum()).backward()
    expected = W.grad * torch.outer(p.a.detach(), p.b.detach())
    torch.testing.assert_close(latents.latents["p"].grad, expected)


def test_it_is_never_zero_for_being_certain():
    p = plane()
    latents = SignLatents({"p": p}, {"p": p.signs.float() * 50})
    p(torch.randn(3, 7)).square().sum().backward()
    assert bool((latents.latents["p"].abs() == LATENT_LIMIT).all())
    assert bool((latents.latents["p"].grad != 0).all())


def test_margins_keep_the_planes_signs_and_their_limits():
    p = plane()
    margins = torch.randn(5, 7) * 3
    latents = SignLatents({"p": p}, {"p": margins.clone()})
    latent = latents.latents["p"]
    assert torch.equal(latent > 0, p.signs > 0)
    agree = margins.sign() == p.signs.sign()
    assert torch.equal(latent[agree].abs(), margins[agree].abs().clamp(LEAST_MARGIN, LATENT_LIMIT))
    assert bool((latent[~agree].abs() == LEAST_MARGIN).all())
    assert torch.equal(SignLatents({"p": p}).latents["p"], p.signs.float())


def test_steps_flip_what_the_gradient_says_and_learn_a_matrix():
    torch.manual_seed(0)
    p, wanted = plane(16, 24), plane(16, 24, seed=1)
    with torch.no_grad():
        wanted.a.copy_(p.a)
        wanted.b.copy_(p.b)
    wanted.fold()
    latents = SignLatents({"p": p})
    x = torch.randn(200, 24)
    y = wanted(x).detach()
    losses = []
    for _ in range(150):
        loss = (p(x) - y).square().mean()
        losses.append(loss.item())
        loss.backward()
        latents.step(0.05)
        assert latents.latents["p"].grad is None
        assert float(latents.latents["p"].abs().max()) <= LATENT_LIMIT
        latents.publish()
        p.fold()
    assert losses[-1] < 1e-3 * losses[0]
    assert torch.equal(p.signs, wanted.signs)


def test_going_back_takes_the_signs_and_forgets_the_moments():
    p = plane()
    latents = SignLatents({"p": p})
    before = latents.values()
    p(torch.randn(9, 7)).sum().backward()
    latents.step(5.0)
    latents.publish()
    assert not torch.equal(p.signs > 0, before["p"])
    latents.go_back(before)
    latents.publish()
    assert torch.equal(p.signs > 0, before["p"])
    assert latents.state()[1] == {"steps": {}}
    latents.release()
    assert p.latent is None


def test_a_state_goes_on_to_the_same_bits():
    def run(latents, p, steps, generator):
        for _ in range(steps):
            p(torch.randn(9, 7, generator=generator)).square().sum().backward()
            latents.step(0.3)
            latents.publish()
            p.fold()

    whole, other = plane(), plane()
    a, g = SignLatents({"p": whole}), torch.Generator().manual_seed(0)
    run(a, whole, 3, g)
    tensors, values = a.state()
    b = SignLatents({"p": other})
    b.load_state(tensors, values)
    b.publish()
    other.fold()
    state = g.get_state()
    run(a, whole, 3, g)
    run(b, other, 3, _generator(state))
    assert torch.equal(a.latents["p"], b.latents["p"])
    assert torch.equal(whole.signs, other.signs)


def test_a_latent_that_got_no_gradient_goes_on_with_its_own_count():
    """As of an expert that no token chose for some steps."""

    def run(latents, planes, steps, generator):
        for number in steps:
            used = list(planes.values())[: 1 if number in (1, 2) else 2]
            sum(p(torch.randn(9, 7, generator=generator)).square().sum() for p in used).backward()
            latents.step(0.3)
            latents.publish()
            for p in planes.values():
                p.fold()

    whole, other = ({"p": plane(), "expert": plane()} for _ in range(2))
    a, g = SignLatents(whole), torch.Generator().manual_seed(0)
    run(a, whole, range(3), g)
    tensors, values = a.state()
    assert values == {"steps": {"p": 3, "expert": 1}}
    b = SignLatents(other)
    b.load_state(tensors, values)
    b.publish()
    for p in other.values():
        p.fold()
    state = g.get_state()
    run(a, whole, range(3, 6), g)
    run(b, other, range(3, 6), _generator(state))
    for name in whole:
        assert torch.equal(a.latents[name], b.latents[name]), name


def _generator(state):
    generator = torch.Generator()
    generator.set_state(state)
    return generator


def test_wrong_margins_are_refused():
    p = plane()
    with pytest.raises(ValueError, match=r"margins of 'p' have shape \(7, 5\), expected \(5, 7\)"):
        SignLatents({"p": p}, {"p": torch.zeros(7, 5)})
    with pytest.raises(ValueError, match="'q', which is not among the 1 planes"):
        SignLatents({"p": p}, {"q": torch.zeros(5, 7)})


def test_a_layer_without_latents_has_none_to_give_gradients_to():
    layer = SignLinear([(torch.randn(3, 4), torch.ones(3), torch.ones(4))], dtype=torch.float32)
    layer(torch.randn(2, 4)).sum().backward()
    assert layer.planes[0].latent is None
