"""Layers whose inputs have an order of their own: what `requires_grad_` of a whole model does, and their training."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from hf_onebit import DiodeMix
from hf_onebit.nn import MBWQLinear, MPQLinear, MPQWeightParameter
from hf_onebit.nn.index_parameter import INDICES, IndexParameter

K, N = 70, 9
MAKERS = {
    "g_idx": lambda: MPQLinear(K, N, group_size=32, symmetric=False, g_idx=torch.randint(0, 3, (K,))),
    "q_perm": lambda: MBWQLinear(K, N, blocks=[(4, K, 32)], symmetric=False, q_perm=torch.randperm(K)),
    "mixed": lambda: MBWQLinear(K, N, blocks=[(6, 32, 32), (3, 38, 64)], symmetric=False, q_perm=torch.randperm(K)),
}


@pytest.fixture(params=sorted(MAKERS))
def module(request):
    torch.manual_seed(0)
    return MAKERS[request.param]()


def index_of(module):
    (found,) = [p for name, p in module.named_parameters() if name.rpartition(".")[2] in INDICES]
    return found


def switched(model, way):
    if way == "at once":
        assert model.requires_grad_(True) is model
    else:
        for p in model.parameters():
            p.requires_grad = True
    return model


@pytest.mark.parametrize("way", ["at once", "one by one"])
def test_all_that_can_learn_learns(module, way):
    before = index_of(module).clone()
    switched(module, way)(torch.randn(3, K)).square().sum().backward()
    assert all(getattr(module, name).grad.dtype == torch.float16 for name in module.scale_names)
    module.zero_grad()
    assert not index_of(module).requires_grad
    assert {name for name, p in module.named_parameters() if not p.requires_grad} <= set(INDICES)
    for scale in module.scale_names:  # as `train_scales` has them
        getattr(module, scale).requires_grad_(False)
        getattr(module, scale).data = getattr(module, scale).data.float()
        getattr(module, scale).requires_grad_(True)
    x, direction = torch.randn(2, 5, K, requires_grad=True), torch.randn(2, 5, N)
    (module(x) * direction).sum().backward()
    W = module.dequantize(torch.float64).requires_grad_()
    bias = module.bias.detach().double().requires_grad_()
    inputs = x.detach().double().requires_grad_()
    (nn.functional.linear(inputs, W, bias) * direction.double()).sum().backward()
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(module.weight.grad.double(), W.grad.T, **close)
    torch.testing.assert_close(module.bias.grad.double(), bias.grad, **close)
    torch.testing.assert_close(x.grad.double(), inputs.grad, **close)
    # Of the statistics: by the chain rule, from the codes and groups in packed order.
    layout = module.weight.weight_layout()
    rows = W.grad.T if layout.perm is None else W.grad.T[layout.perm]
    codes = layout.unpack(module.weight.data).double()
    wanted = {"scales": codes * rows, "zeros": -rows}
    for name, each in wanted.items():
        total = torch.zeros(getattr(module, name).shape, dtype=torch.float64).index_add_(0, layout.group, each)
        torch.testing.assert_close(getattr(module, name).grad.double(), total, **close)
    assert index_of(module).grad is None
    assert torch.equal(index_of(module), before)
    module.requires_grad_(False)
    assert not any(p.requires_grad for p in module.parameters())


def test_indices_stay_what_they_are(module):
    module.requires_grad_(True)
    stream = io.BytesIO()
    torch.save(module, stream)
    stream.seek(0)
    loaded = copy.deepcopy(module)
    loaded.load_state_dict(module.state_dict(), assign=True)
    others = (
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(stream, weights_only=False),
        copy.deepcopy(module).to(torch.bfloat16),
        copy.deepcopy(module).to("meta").to_empty(device="cpu"),
        loaded,
    )
    for other in others:
        assert type(index_of(other)) is IndexParameter
        assert other.weight.requires_grad
        other.requires_grad_(False).requires_grad_(True)
    plain = nn.Parameter(index_of(module).data.clone(), requires_grad=False)
    name = "g_idx" if isinstance(module, MPQLinear) else "q_perm"
    setattr(module, name, plain)  # as loaders do
    assert getattr(module, name) is plain
    assert type(plain) is IndexParameter
    assert getattr(module.weight, name) is plain


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_steps_are_those_of_the_layer_in_the_inputs_own_order(rounding):
    """One float weight, its inputs stored in another order: the same gradient, and to the nearest the same steps."""
    torch.manual_seed(0)
    ordered = MPQLinear(64, N, False, group_size=32, symmetric=False)
    perm = torch.randperm(64).int()
    layers = {
        "q_perm": MBWQLinear(64, N, False, blocks=[(4, 64, 32)], symmetric=False, q_perm=perm),
        "g_idx": MPQLinear(64, N, False, group_size=32, symmetric=False, g_idx=perm.argsort() // 32),
    }
    packed = layers["q_perm"]
    # `ordered` reads its inputs permuted, `q_perm` stores the permutation, `g_idx` the groups of inputs as they come.
    packed.set_tensors({"q_perm": perm, **{k: getattr(ordered, k).detach() for k in ("weight", "scales", "zeros")}})
    layout = packed.weight.weight_layout()
    codes = layout.unpack(packed.weight.data)
    own = layers["g_idx"].weight.weight_layout()
    layers["g_idx"].scales.data.copy_(ordered.scales)
    layers["g_idx"].zeros.data.copy_(ordered.zeros)
    layers["g_idx"].weight.data.copy_(own.pack(torch.empty_like(codes).index_copy_(0, perm.long(), codes)))
    x = torch.randn(30, 64)
    steps = {}
    for name, layer in {"ordered": ordered, **layers}.items():
        before = layer.dequantize()
        layer.requires_grad_(True)
        layer.weight.rounding = rounding
        optimizer = DiodeMix([layer.weight], lr=0.02, betas=(0.9, 0.99), states="float32")
        for _ in range(3):
            layer(x[:, perm] if layer is ordered else x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        moved = (layer.dequantize() - before).sign()
        steps[name] = moved if layer is ordered else moved[:, perm]
    assert any(bool(step.any()) for step in steps.values())
    if rounding == "nearest":
        assert torch.equal(steps["q_perm"], steps["ordered"])
        assert torch.equal(steps["g_idx"], steps["ordered"])
    else:  # the words drawn for a weight are those of its packed row
        assert torch.equal(steps["q_perm"], steps["ordered"])
        assert float((steps["g_idx"] == steps["ordered"]).float().mean()) > 0.5
    assert all(isinstance(layer.weight, MPQWeightParameter) for layer in layers.values())
