"""Gradients of packed weights: signs of OneBitLinear, hooks, checkpointing, updates within backward."""

import copy

import pytest
import torch
from tiny import tiny_ids, tiny_llama
from torch import nn
from torch.utils.checkpoint import checkpoint

from hf_onebit import DiodeMix, MPQConfig, MPQQuantizer, OneBitConfig, OneBitQuantizer
from hf_onebit.nn import MBWQLinear, MPQEmbedding, MPQLinear, MPQWeightParameter, OneBitLinear, ignore_in_ddp
from hf_onebit.nn.sign_parameter import SignWeightParameter

LAYERS = {
    "mpq": lambda: MPQLinear(64, 64, False, symmetric=False),
    "mbwq": lambda: MBWQLinear(64, 64, False, blocks=[(4, 32, 32), (3, 32, 32)], q_perm=torch.randperm(64)),
    "onebit": lambda: OneBitLinear(64, 64, False),
    "onebit-2": lambda: OneBitLinear(64, 64, False, planes=2),
}


@pytest.fixture(params=sorted(LAYERS))
def layer(request):
    torch.manual_seed(0)
    made = LAYERS[request.param]()
    for p in packed(made):
        p.requires_grad_(True)
    return made


def packed(module):
    return [p for p in module.parameters() if isinstance(p, MPQWeightParameter)]


def quantized(kind):
    if kind == "mpq":
        model = MPQQuantizer(MPQConfig(bits=4, group_size=32)).quantize_model(tiny_llama())
    else:
        model = OneBitQuantizer(OneBitConfig()).quantize_model(tiny_llama())
    for p in packed(model):
        p.requires_grad_(True)
    return model.train()


def test_signs_have_the_gradient_of_their_float_weight():
    torch.manual_seed(0)
    layer = OneBitLinear(70, 9, planes=2)
    for weight in packed(layer):
        assert type(weight) is SignWeightParameter
        assert not weight.requires_grad
        weight.requires_grad_(True)
    planes = [weight.float_weight() for weight in packed(layer)]
    torch.testing.assert_close(sum(planes).T, layer.dequantize())
    x, direction = torch.randn(2, 5, 70, requires_grad=True), torch.randn(2, 5, 9)
    for times in (1, 2):
        x.grad = None
        y = layer(x)
        torch.testing.assert_close(y, nn.functional.linear(x, layer.dequantize(), layer.bias), rtol=1e-4, atol=1e-5)
        (y * direction).sum().backward()
        wanted = times * x.detach().reshape(-1, 70).T @ direction.reshape(-1, 9)
        for weight in packed(layer):
            torch.testing.assert_close(weight.grad, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x.grad, direction @ layer.dequantize(), rtol=1e-4, atol=1e-5)
    layer.weight_1.requires_grad_(False)
    layer.zero_grad()
    layer(x).sum().backward()
    assert layer.weight_1.grad is None
    assert layer.weight.grad is not None
    assert ignore_in_ddp(layer) == ["weight", "weight_1"]


def test_signs_stay_what_they_are(layer):
    other = copy.deepcopy(layer).to(torch.bfloat16)
    other.load_state_dict(layer.state_dict(), assign=True)
    kinds = [type(p) for p in packed(layer)]
    assert kinds
    assert [type(p) for p in packed(other)] == kinds
    assert all(p.requires_grad for p in packed(other))
    other(torch.randn(2, 64)).sum().backward()
    assert all(p.grad is not None for p in packed(other))


def test_hooks_come_once_and_after_all_uses(layer):
    (weight, *_) = packed(layer)
    seen = []
    handle = weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    x = torch.randn(3, 64, requires_grad=True)
    runs = [
        lambda: layer(layer(x)),
        lambda: checkpoint(lambda v: layer(layer(v)), x, use_reentrant=False),
        lambda: checkpoint(lambda v: layer(layer(v)), x, use_reentrant=True),
    ]
    for run in runs:
        layer.zero_grad()
        run().square().sum().backward()
        assert torch.equal(seen[-1], weight.grad)
    assert len(seen) == 3
    for other in seen[1:]:
        torch.testing.assert_close(other, seen[0])
    handle.remove()
    layer(x).sum().backward()
    assert len(seen) == 3
    copied = copy.deepcopy(layer)
    copied(x).sum().backward()
    assert len(seen) == 3


def test_a_hook_may_change_the_words(layer):
    """What backward computes is of the words that forward saw, though each hook rewrites them."""
    stack = nn.Sequential(*(copy.deepcopy(layer) for _ in range(3)))
    x = torch.randn(5, 64, requires_grad=True)
    stack(x).square().sum().backward()
    wanted = [x.grad.clone(), *(p.grad.clone() for p in packed(stack))]
    x.grad = None
    stack.zero_grad()
    found = {}

    def scramble(p):
        found[id(p)] = p.grad.clone()
        p.data.bitwise_not_()

    for p in packed(stack):
        p.register_post_accumulate_grad_hook(scramble)
    stack(x).square().sum().backward()
    got = [x.grad, *(found[id(p)] for p in packed(stack))]
    for a, b in zip(wanted, got, strict=True):
        assert torch.equal(a, b)


def test_a_hook_waits_for_the_statistics_of_an_embedding():
    embedding = MPQEmbedding(20, 64)
    embedding.scales.data = embedding.scales.data.float()
    embedding.requires_grad_(True)
    order = []
    embedding.weight.register_post_accumulate_grad_hook(lambda p: order.append("weight"))
    embedding.scales.register_hook(lambda g: order.append("scales"))
    embedding(torch.tensor([1, 2])).square().sum().backward()
    assert order == ["scales", "weight"]


@pytest.mark.parametrize(("kind", "reentrant"), [("mpq", False), ("mpq", True), ("onebit", None), ("onebit", True)])
def test_a_model_with_frozen_embeddings_and_checkpointing(kind, reentrant):
    model, ids = quantized(kind), tiny_ids()
    for p in model.parameters():
        p.requires_grad_(isinstance(p, MPQWeightParameter))
    model(input_ids=ids, labels=ids).loss.backward()
    wanted = [p.grad.clone() for p in packed(model)]
    assert all(float(g.norm()) > 0 for g in wanted)
    model.zero_grad()
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
    # Accumulation over two halves is the whole.
    for rows in (ids[:1], ids[1:]):
        (model(input_ids=rows, labels=rows).loss / 2).backward()
    for p, g in zip(packed(model), wanted, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-3, atol=1e-6)
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    assert float(norm) == pytest.approx(float(torch.stack([g.norm() for g in wanted]).norm()), rel=1e-3)
    assert float(torch.stack([p.grad.norm() for p in packed(model)]).norm()) == pytest.approx(0.1, rel=1e-3)


@pytest.mark.parametrize("kind", ["mpq", "onebit"])
def test_autocast(kind):
    model, ids = quantized(kind), tiny_ids()
    model(input_ids=ids, labels=ids).loss.backward()
    wanted = [p.grad.clone() for p in packed(model)]
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    for p, g in zip(packed(model), wanted, strict=True):
        assert p.grad.dtype == torch.float32
        assert float((p.grad - g).norm() / g.norm()) < 0.1


@pytest.mark.parametrize(("kind", "reentrant"), [("mpq", None), ("mpq", True), ("onebit", False)])
def test_updates_in_backward_are_those_after_it(kind, reentrant):
    plain, fused, ids = quantized(kind), quantized(kind), tiny_ids()
    options = {"lr": 1e-3, "lr_signs": 1.0, "betas": (0.9, 0.95)}
    pair = [DiodeMix(model.parameters(), **options, fused=model is fused) for model in (plain, fused)]
    if reentrant is not None:
        fused.gradient_checkpointing_enable({"use_reentrant": reentrant})
        fused.enable_input_require_grads()
    words = [p.data.clone() for p in packed(plain)]
    for _ in range(2):
        for model, optimizer in zip((plain, fused), pair, strict=True):
            model(input_ids=ids, labels=ids).loss.backward()
            if model is fused:
                assert all(p.grad is None for p in model.parameters())
            optimizer.step()
            optimizer.zero_grad()
    for a, b in zip(plain.parameters(), fused.parameters(), strict=True):
        assert torch.equal(a.data, b.data)
    assert not any(torch.equal(p.data, w) for p, w in zip(packed(plain), words, strict=True))
    assert pair[0].metrics() == pytest.approx(pair[1].metrics())
    pair[1].unfuse()
    fused(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in packed(fused))


def test_two_gradients_are_never_there_at_once():
    model, ids = quantized("mpq"), tiny_ids()
    optimizer = DiodeMix(model.parameters())
    alive = []

    def look(p):
        alive.append(sum(q.grad is not None for q in packed(model)))

    for p in packed(model):
        p.register_post_accumulate_grad_hook(look)
    model(input_ids=ids, labels=ids).loss.backward()
    assert max(alive) == len(packed(model))
    model.zero_grad()
    alive.clear()
    optimizer.fuse()
    model(input_ids=ids, labels=ids).loss.backward()
    assert alive == [1] * len(packed(model))
