"""OneBitLinear as a module: construction, in-place changes, casts, copies, the cached path."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hf_onebit.formats import onebit as fmt
from hf_onebit.nn import OneBitLinear, cache_dequantized, linear

SHAPES = [(32, 1), (33, 5), (64, 64), (100, 63), (1, 7), (31, 33)]


def dense(layer, x):
    y = nn.functional.linear(x.double(), layer.dequantize(torch.float64))
    return y if layer.bias is None else y + layer.bias.double()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_forward_is_the_dequantized_product(shape, planes, bias):
    layer = OneBitLinear(*shape, bias, planes=planes)
    x = torch.randn(2, 3, shape[0])
    y = layer(x)
    assert y.shape == (2, 3, shape[1])
    torch.testing.assert_close(y.double(), dense(layer, x), rtol=1e-5, atol=1e-6)


def test_parameters_and_defaults():
    layer = OneBitLinear(40, 24)
    shapes = {name: (tuple(p.shape), p.dtype, p.requires_grad) for name, p in layer.named_parameters()}
    assert shapes == {
        "weight": ((2, 24), torch.int32, False),
        "a": ((24,), torch.float16, False),
        "b": ((40,), torch.float16, False),
        "bias": ((24,), torch.float32, True),
    }
    assert isinstance(layer, nn.Linear)
    assert layer.weight_1 is None
    assert set(OneBitLinear(40, 24, bias=False, planes=2).state_dict()) == {
        "weight",
        "a",
        "b",
        "weight_1",
        "a_1",
        "b_1",
    }


def test_a_new_layer_has_the_scale_of_a_float_one():
    torch.manual_seed(0)
    packed, plain = OneBitLinear(512, 256), nn.Linear(512, 256)
    x = torch.randn(64, 512)
    assert 0.7 < float(packed(x).detach().std() / plain(x).detach().std()) < 1.3
    assert float(packed.a.float().norm() / packed.b.float().norm()) == pytest.approx(1, abs=0.01)
    assert fmt.unpack_signs(packed.weight, 512).mean().abs() < 0.02


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("name", ["weight", "a", "b", "bias", "weight_1", "a_1", "b_1"])
@pytest.mark.parametrize("how", ["data", "no_grad", "set_data"])
def test_in_place_changes_take_effect_at_the_next_call(name, how, cached):
    layer = OneBitLinear(64, 48, planes=2)
    layer.use_cache(cached)
    x = torch.randn(4, 64)
    before = layer(x)
    parameter = getattr(layer, name)
    changed = ~parameter.data if parameter.dtype == torch.int32 else parameter.data * 1.5 + 0.125
    if how == "data":
        parameter.data.copy_(changed)
    elif how == "set_data":
        parameter.data = changed
    else:
        with torch.no_grad():
            parameter.copy_(changed)
    after = layer(x)
    assert not torch.equal(before, after)
    torch.testing.assert_close(after.double(), dense(layer, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("planes", [1, 2])
def test_cached_path_agrees_with_the_packed_one(dtype, planes):
    model = nn.Sequential(OneBitLinear(100, 70, planes=planes), OneBitLinear(70, 33, planes=planes)).to(dtype)
    x = torch.randn(5, 100, dtype=dtype)
    expected = model(x)
    assert cache_dequantized(model) == 2
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    for _ in range(2):
        y = model(x)
        assert y.dtype == dtype
        torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
    cache_dequantized(model, enabled=False)
    assert torch.equal(model(x), expected)


def test_cache_is_kept_between_calls_and_never_saved_or_copied():
    layer = OneBitLinear(64, 64)
    keys = set(layer.state_dict())
    layer.use_cache()
    layer(torch.randn(1, 64))
    first = layer._cache
    assert layer.cache_bytes == 64 * 64 * 4 + 64 * 64 // 8  # signs in float32, and the words they came from
    layer(torch.randn(1, 64))
    assert layer._cache is first
    assert first is not None
    assert set(layer.state_dict()) == keys
    assert copy.deepcopy(layer)._cache is None
    assert pickle.loads(pickle.dumps(layer))._cache is None
    assert layer.to(torch.bfloat16)._cache is None


def test_where_a_comparison_would_wait_cached_words_are_known_by_their_traces(monkeypatch):
    """As on a GPU: nothing reads the words, and what torch counts as a change, or a new address, is noticed."""
    monkeypatch.setattr(linear, "_can_compare", lambda words: False)
    monkeypatch.setattr(torch, "equal", lambda *_: pytest.fail("the host waited"))
    layer = OneBitLinear(64, 48, planes=2)
    layer.use_cache()
    x = torch.randn(4, 64)

    def check():
        torch.testing.assert_close(layer(x).double(), dense(layer, x), rtol=1e-5, atol=1e-5)
        return layer._cache

    first = check()
    assert check() is first
    assert layer.cache_bytes == 2 * 64 * 48 * 4  # signs alone: the words are the parameters' own
    with torch.no_grad():
        layer.weight_1.copy_(~layer.weight_1)
    second = check()
    assert second is not first
    layer.weight.data = ~layer.weight.data
    third = check()
    assert third is not second
    layer.load_state_dict({name: ~t if t.dtype == torch.int32 else t for name, t in layer.state_dict().items()})
    fourth = check()
    assert fourth is not third
    layer.weight.updates += 1  # a step writes past torch's count
    assert check() is not fourth
    monkeypatch.setattr(linear.gpu, "capturing", lambda _: True)
    layer.use_cache()
    assert check() is None  # a graph's signs are there when it runs


def test_nothing_is_compared_while_a_graph_is_captured(monkeypatch):
    layer = OneBitLinear(64, 48)
    layer.use_cache()
    x = torch.randn(4, 64)
    layer(x)
    monkeypatch.setattr(linear.gpu, "capturing", lambda _: True)
    monkeypatch.setattr(torch, "equal", lambda *_: pytest.fail("the host waited"))
    layer.weight.data.copy_(~layer.weight.data)
    torch.testing.assert_close(layer(x).double(), dense(layer, x), rtol=1e-5, atol=1e-5)


def test_words_that_learn_or_that_torch_does_not_count_are_compared():
    frozen = SimpleNamespace(is_cuda=True, is_inference=lambda: False, requires_grad=False)
    assert not linear._can_compare([frozen])
    for other in ({"is_cuda": False}, {"is_inference": lambda: True}, {"requires_grad": True}):
        assert linear._can_compare([frozen, SimpleNamespace(**vars(frozen) | other)])


@pytest.mark.parametrize("cached", [False, True])
def test_gradients(cached):
    layer = OneBitLinear(65, 40, planes=2)
    layer.use_cache(cached)
    for name in layer.scale_names:
        setattr(layer, name, nn.Parameter(getattr(layer, name).float()))
    x = torch.randn(3, 65, requires_grad=True)
    names = [*layer.scale_names, "bias"]
    grad = torch.randn(3, 40)
    got = torch.autograd.grad(layer(x), [x, *(getattr(layer, n) for n in names)], grad)
    planes = [[p.detach().double().requires_grad_() for p in (a, b)] for _, a, b in layer.plane_tensors()]
    x64, bias = x.detach().double().requires_grad_(), layer.bias.detach().double().requires_grad_()
    signs = [fmt.unpack_signs(w, 65, torch.float64) for w, _, _ in layer.plane_tensors()]
    y = sum(((x64 * b) @ s) * a for (a, b), s in zip(planes, signs, strict=True)) + bias
    flat = [p for plane in planes for p in plane]
    expected = torch.autograd.grad(y, [x64, *flat, bias], grad.double())
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5)


def test_scales_keep_their_dtype_and_their_gradients_under_casts():
    layer = OneBitLinear(64, 32)
    layer.a = nn.Parameter(layer.a.detach().float())
    layer(torch.randn(2, 64)).sum().backward()
    for cast in (torch.bfloat16, torch.float16, torch.float64):
        layer.to(cast)
        assert (layer.a.dtype, layer.b.dtype, layer.bias.dtype) == (torch.float32, torch.float16, cast)
        assert layer.a.grad.dtype == torch.float32
    assert layer.to("meta").a.device.type == "meta"
    assert layer.to_empty(device="cpu").a.dtype == torch.float32


def test_autocast():
    layer = OneBitLinear(64, 32)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(2, 64)).dtype == torch.bfloat16


@pytest.mark.parametrize("cached", [False, True])
def test_integer_activations_are_refused(cached):
    layer = OneBitLinear(64, 32)
    layer.use_cache(cached)
    with pytest.raises((ValueError, RuntimeError), match="int32"):
        layer(torch.ones(2, 64, dtype=torch.int32))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"in_features": 0, "out_features": 4}, "in_features=0"),
        ({"in_features": 4, "out_features": -1}, "out_features=-1"),
        ({"in_features": 4.0, "out_features": 4}, "in_features=4.0"),
        ({"in_features": True, "out_features": 4}, "in_features=True"),
        ({"in_features": 4, "out_features": 4, "planes": 3}, "planes=3"),
        ({"in_features": 4, "out_features": 4, "planes": True}, "planes=True"),
        ({"in_features": 4, "out_features": 4, "source": "Conv2d"}, "source='Conv2d'"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        OneBitLinear(**arguments)


def test_set_planes_checks_before_it_copies():
    layer, other = OneBitLinear(40, 24), OneBitLinear(40, 24)
    tensors = {name: getattr(other, name).detach() for name in ("weight", "a", "b")}
    layer.set_planes(tensors)
    assert torch.equal(layer.weight, other.weight)
    before = layer.weight.clone()
    with pytest.raises(ValueError, match=r"OneBitLinear\.set_planes"):
        layer.set_planes({**tensors, "weight": ~tensors["weight"], "b": tensors["b"] * torch.inf})
    assert torch.equal(layer.weight, before)


def test_a_float_weight_cannot_be_loaded_into_it():
    with pytest.raises(RuntimeError, match="size mismatch"):
        OneBitLinear(64, 32, bias=False).load_state_dict({"weight": nn.Linear(64, 32).weight}, strict=False)


def test_bits_per_weight_counts_everything():
    assert OneBitLinear(576, 1536, bias=False).bits_per_weight() == pytest.approx(1 + 16 * (576 + 1536) / (576 * 1536))
    with_bias = OneBitLinear(64, 32, dtype=torch.bfloat16).bits_per_weight()
    assert with_bias == pytest.approx(1 + 16 * (64 + 32 + 32) / (64 * 32))
