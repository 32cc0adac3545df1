"""Scales and zeros that learn: their gradients, turning them on and off, and what is kept of them."""

import pytest
import torch
from tiny import save_float, tiny_ids, tiny_llama
from torch.optim.swa_utils import AveragedModel
from transformers import AutoModelForCausalLM

import hf_onebit
from hf_onebit import MPQConfig, OneBitConfig
from hf_onebit.formats import mbwq, mpq, onebit
from hf_onebit.nn import MBWQLinear, MPQEmbedding, MPQLinear, OneBitLinear, packed_layers
from hf_onebit.nn.scales import plain_name, scale_groups, scale_parameters

GROUPS = torch.randint(0, 3, (96,), generator=torch.Generator().manual_seed(0))
ORDER = torch.randperm(96, generator=torch.Generator().manual_seed(0))
LAYERS = {
    "onebit": lambda: OneBitLinear(96, 40),
    "onebit, two planes": lambda: OneBitLinear(72, 40, planes=2),
    "mpq, symmetric": lambda: MPQLinear(96, 40, bits=4, group_size=32),
    "mpq, zeros": lambda: MPQLinear(72, 40, bits=3, group_size=32, symmetric=False),
    "mpq, g_idx": lambda: MPQLinear(96, 40, bits=2, group_size=32, symmetric=False, g_idx=GROUPS),
    "mbwq, uniform": lambda: MBWQLinear(96, 40, blocks=[(4, 96, 32)], symmetric=False, q_perm=ORDER),
    "mbwq, mixed": lambda: MBWQLinear(96, 40, blocks=[(8, 32, 32), (4, 32, 32), (2, 32, 32)], symmetric=False),
    "mbwq, mixed, ordered": lambda: MBWQLinear(96, 40, blocks=[(6, 32, 32), (3, 64, 32)], q_perm=ORDER),
}


def dense(layer):
    """The float weight, differentiable in scales and zeros."""
    if isinstance(layer, OneBitLinear):
        return sum(
            a[:, None] * onebit.unpack_signs(words, layer.in_features, torch.float32).T * b
            for words, a, b in layer.plane_tensors()
        )
    zeros = layer.zeros
    if isinstance(layer, MBWQLinear):
        return mbwq.dequantize(layer.weight, layer.scales, zeros, layer.blocks, layer.q_perm)
    g_idx = getattr(layer, "g_idx", None)
    about = (layer._columns, layer.bits, layer.group_size)
    return mpq.dequantize(layer.weight, layer.scales, zeros, *about, g_idx=g_idx)


def gradients(layer, y):
    names = [name for name, p in layer.named_parameters() if p.requires_grad and p.is_floating_point()]
    grads = torch.autograd.grad(y.float().square().sum(), [layer.get_parameter(name) for name in names])
    return dict(zip(names, grads, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_are_those_of_the_dense_weight(name, dtype):
    torch.manual_seed(0)
    layer = LAYERS[name]()
    hf_onebit.train_scales(layer)
    with torch.no_grad():
        for parameter in scale_parameters(layer).values():
            parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
    x = torch.randn(2, 5, layer.in_features, dtype=dtype)
    got = gradients(layer, layer(x))
    expected = gradients(layer, torch.nn.functional.linear(x.float(), dense(layer), layer.bias))
    assert set(got) == {*layer.scale_names, "bias"}
    for key, gradient in got.items():
        assert gradient.dtype == torch.float32
        error = (gradient - expected[key]).norm() / expected[key].norm()
        assert error < (1e-5 if dtype == torch.float32 else 2e-2), (key, error)


@pytest.mark.parametrize("symmetric", [True, False])
def test_gradients_of_an_embedding(symmetric):
    torch.manual_seed(0)
    layer = MPQEmbedding(50, 64, bits=4, group_size=32, symmetric=symmetric)
    hf_onebit.train_scales(layer)
    ids = torch.tensor([[3, 7, 7], [0, 49, 3]])
    got = gradients(layer, layer(ids))
    expected = gradients(layer, torch.nn.functional.embedding(ids, dense(layer)))
    assert set(got) == set(layer.scale_names)
    for key, gradient in got.items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-4, atol=1e-6)


def test_only_what_is_named_learns():
    layer = OneBitLinear(64, 32, planes=2)
    assert set(hf_onebit.train_scales(layer, ["a"])) == {"a", "a_1"}
    assert not layer.b.requires_grad
    assert layer.b.dtype == torch.float16
    assert layer.a_1.dtype == torch.float32
    for names in (["c"], [], "a"):
        with pytest.raises(ValueError, match="expected some of a, b, scales, zeros"):
            hf_onebit.train_scales(layer, names)
    with pytest.raises(ValueError, match="found no scales or zeros in OneBitLinear"):
        hf_onebit.train_scales(layer, ["scales", "zeros"])
    with pytest.raises(ValueError, match="found no a or b"):
        hf_onebit.train_scales(torch.nn.Linear(4, 4), ["a", "b"])


def test_the_way_back_rounds_once_and_says_how_much():
    torch.manual_seed(0)
    layer = MPQLinear(64, 32, bits=4, group_size=32, symmetric=False)
    hf_onebit.train_scales(layer)
    with torch.no_grad():
        layer.scales.mul_(1 + torch.rand_like(layer.scales) / 100)
    trained = layer.scales.detach().clone()
    layer(torch.randn(3, 64)).sum().backward()
    errors = hf_onebit.freeze_scales(layer)
    assert set(errors) == {"scales", "zeros"}
    assert 0 < errors["scales"] < 2**-11
    assert errors["zeros"] == 0  # they never moved
    assert torch.equal(layer.scales, trained.half())
    assert not layer.scales.requires_grad
    assert layer.scales.grad is None
    assert layer.weight.scales is layer.scales  # the weight's attributes follow
    assert hf_onebit.freeze_scales(layer) == {}


def test_what_float16_cannot_hold_is_refused_before_anything_changes():
    layer = OneBitLinear(64, 32)
    hf_onebit.train_scales(layer)
    with torch.no_grad():
        layer.b[3] = 1e5
    with pytest.raises(ValueError, match=r"^b holds values that float16 cannot"):
        hf_onebit.freeze_scales(layer)
    assert layer.a.dtype == layer.b.dtype == torch.float32
    assert layer.a.requires_grad


def test_groups_go_by_the_size_of_the_scales():
    model = torch.nn.Sequential(OneBitLinear(64, 32), MPQLinear(32, 32, bits=4, group_size=32))
    with pytest.raises(ValueError, match=r"call hf_onebit\.train_scales"):
        scale_groups(model, 1e-3)
    hf_onebit.train_scales(model)
    with pytest.raises(ValueError, match="positive number"):
        scale_groups(model, 0)
    groups = scale_groups(model, 1e-3, betas=(0.9, 0.95))
    assert sum(len(group["params"]) for group in groups) == 3
    before = {name: p.detach().clone() for name, p in scale_parameters(model).items()}
    optimizer = torch.optim.AdamW(groups)
    model(torch.randn(4, 64)).square().sum().backward()
    optimizer.step()
    for name, parameter in scale_parameters(model).items():
        step = (parameter - before[name]).norm() / before[name].norm()
        assert 3e-4 < step < 3e-3, name
    assert all(group["weight_decay"] == 0 and group["betas"] == (0.9, 0.95) for group in groups)


CONFIGS = {
    "onebit": OneBitConfig,
    "two planes": lambda: OneBitConfig(planes=2),
    "packed and tied ends": lambda: OneBitConfig(lm_head_bits=4, embedding_bits=4),
    "mpq": lambda: MPQConfig(bits=4, group_size=32),
    "mpq, symmetric": lambda: MPQConfig(bits=3, group_size=32, symmetric=True),
}


def train(model, optimizer, steps, seed=1):
    losses = []
    for step in range(steps):
        ids = tiny_ids(seed=seed + step % 2)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", CONFIGS)
def test_trained_scales_are_saved_and_reload_exactly(name, tmp_path):
    save_float(tiny_llama(tied=name == "packed and tied ends"), tmp_path / "float")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=CONFIGS[name]())
    model.requires_grad_(False)
    words = {n: layer.weight.clone() for n, layer in packed_layers(model).items()}
    learning = hf_onebit.train_scales(model)
    assert [p for p in model.parameters() if p.requires_grad] == list(learning.values())
    losses = train(model, torch.optim.AdamW(scale_groups(model, 1e-2)), 12)
    assert losses[-2] < losses[0] - 0.02  # of the same tokens
    assert all(torch.equal(layer.weight, words[n]) for n, layer in packed_layers(model).items())
    hf_onebit.freeze_scales(model)
    model.eval().save_pretrained(tmp_path / "trained")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    expected = model.state_dict()
    got = again.state_dict()
    assert all(torch.equal(got[key], value) and got[key].dtype == value.dtype for key, value in expected.items())
    with torch.no_grad():
        assert torch.equal(again(tiny_ids()).logits, model(tiny_ids()).logits)
    assert not any(p.requires_grad for p in scale_parameters(again).values())


@pytest.mark.parametrize("method", ["onebit", "mpq"])
def test_a_save_amid_training_is_near_and_says_so(method, tmp_path, caplog):
    save_float(tiny_llama(), tmp_path / "float")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=CONFIGS[method]())
    hf_onebit.train_scales(model)
    train(model, torch.optim.AdamW(scale_groups(model, 1e-2)), 2)
    with caplog.at_level("WARNING", logger="hf_onebit"):
        model.save_pretrained(tmp_path / "amid")
    assert "saved in float16" in caplog.text
    assert all(p.dtype == torch.float32 for p in scale_parameters(model).values())  # training goes on as before
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "amid")
    for name, parameter in scale_parameters(again).items():
        trained = dict(scale_parameters(model))[name]
        assert torch.equal(parameter, trained.half())


@pytest.mark.parametrize("method", ["onebit", "mpq"])
def test_training_goes_on_exactly_from_the_float32_file(method, tmp_path):
    save_float(tiny_llama(), tmp_path / "float")

    def fresh():
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=CONFIGS[method]())
        model.requires_grad_(False)
        hf_onebit.train_scales(model)
        return model, torch.optim.AdamW(scale_groups(model, 1e-2))

    whole, optimizer = fresh()
    train(whole, optimizer, 4)
    part, optimizer = fresh()
    train(part, optimizer, 2)
    hf_onebit.save_scales(part, tmp_path / "scales")
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    resumed, optimizer = fresh()
    assert hf_onebit.load_scales(resumed, tmp_path / "scales") == len(scale_parameters(resumed))
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    train(resumed, optimizer, 2)
    for name, parameter in scale_parameters(resumed).items():
        assert torch.equal(parameter, scale_parameters(whole)[name]), name


def test_the_scale_file_says_no(tmp_path):
    layer = torch.nn.Sequential(OneBitLinear(64, 32))
    with pytest.raises(ValueError, match="no scale that learns"):
        hf_onebit.save_scales(layer, tmp_path)
    with pytest.raises(ValueError, match=r"holds no hf_onebit_scales\.safetensors"):
        hf_onebit.load_scales(layer, tmp_path)
    hf_onebit.train_scales(layer)
    with torch.no_grad():
        layer[0].a[0] = 1e6
    hf_onebit.save_scales(layer, tmp_path)
    with pytest.raises(ValueError, match="is of another model"):
        hf_onebit.load_scales(torch.nn.Sequential(OneBitLinear(64, 16)), tmp_path)
    narrow = torch.nn.Sequential(OneBitLinear(64, 32))
    before = narrow[0].b.clone()
    with pytest.raises(ValueError, match=r"0\.a holds values that torch\.float16 cannot"):
        hf_onebit.load_scales(narrow, tmp_path)
    assert torch.equal(narrow[0].b, before)


def test_what_is_in_floating_point_is_averaged_alone():
    """As docs/training.md says; an average of the whole model would change its words."""
    layer = MPQLinear(96, 40, bits=4, group_size=32)
    hf_onebit.train_scales(layer.requires_grad_(False))
    words, start = layer.weight.data.clone(), layer.scales.detach().clone()
    learned = torch.nn.ParameterList(p for p in layer.parameters() if p.requires_grad and p.is_floating_point())
    averaged = AveragedModel(learned)
    for factor in (1.0, 2.0, 3.0):
        layer.scales.data.copy_(start * factor)
        averaged.update_parameters(learned)
    for p, mean in zip(learned, averaged.module, strict=True):
        p.data.copy_(mean)
    torch.testing.assert_close(layer.scales.detach(), start * 2)
    assert torch.equal(layer.weight.data, words)


def test_plain_names():
    assert plain_name("base_model.model.model.layers.0.q_proj.base_layer.a") == "model.layers.0.q_proj.a"
    assert plain_name("model.layers.0.q_proj.scales") == "model.layers.0.q_proj.scales"


@pytest.mark.parametrize("method", ["onebit", "mpq"])
def test_checkpointed_activations_give_the_same_gradients(method, tmp_path):
    save_float(tiny_llama(), tmp_path / "float")
    found = []
    for reentrant in (None, False, True):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=CONFIGS[method]())
        hf_onebit.prepare_model_for_training(
            model,
            scales=True,
            gradient_checkpointing=reentrant is not None,
            gradient_checkpointing_kwargs={"use_reentrant": reentrant},
        )
        model.train()
        ids = tiny_ids()
        model(input_ids=ids, labels=ids).loss.backward()
        found.append({name: p.grad for name, p in scale_parameters(model).items()})
    for other in found[1:]:
        for name, gradient in found[0].items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-5, atol=1e-7)
