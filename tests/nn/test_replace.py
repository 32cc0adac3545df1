"""Which layers are packed, and swapping them."""

import pytest
import torch
from tiny import CAUSAL, OTHERS, tiny_bert, tiny_gpt2, tiny_llama, tiny_mamba
from torch import nn

from hf_onebit.nn import OneBitLinear, dequantize_layers, find_layers, packed_layers, replace_layers
from hf_onebit.nn.replace import float_weight, resolve_names


class Reader(nn.Module):
    """Takes its children's weights in every way that counts, and in some that do not."""

    def __init__(self):
        super().__init__()
        self.multiplied, self.asked_dtype, self.asked_device, self.called = (nn.Linear(64, 64) for _ in range(4))
        self.inner = nn.Module()
        self.inner.deep = nn.Linear(64, 64)
        self.set_up = nn.Linear(64, 64)
        self._init_weights()

    def _init_weights(self):
        nn.init.zeros_(self.set_up.weight)

    def forward(self, x):
        x = x.to(self.asked_device.weight.device).to(self.asked_dtype.weight.dtype)
        return self.set_up(self.called(x @ self.multiplied.weight.t())) + self.inner.deep.weight.sum()


class Heir(Reader):
    """Inherits the code that reads."""


@pytest.mark.parametrize("cls", [Reader, Heir])
def test_layers_whose_weight_is_read_by_code_stay_float(cls):
    plan = find_layers(nn.Sequential(cls()), modules_to_not_convert=[])
    assert set(plan.selected) == {"0.asked_device", "0.called", "0.set_up"}
    assert set(plan.skipped) == {"0.multiplied", "0.asked_dtype", "0.inner.deep"}
    assert plan.skipped["0.multiplied"].reason == f"{cls.__name__} reads its .weight directly"


@pytest.mark.parametrize(
    ("patterns", "left"),
    [
        (["a"], {"b.ab", "c.1", "c.11"}),  # also the last part of "b.a", but no part of "ab"
        (["b"], {"a", "c.1", "c.11"}),
        (["c.1"], {"a", "b.a", "b.ab", "c.11"}),
        ([r"c\.\d+"], {"a", "b.a", "b.ab"}),
        (["b.*"], {"a", "c.1", "c.11"}),
        (["b.a", "11"], {"a", "b.ab", "c.1"}),
    ],
)
def test_patterns_match_names_at_dots(patterns, left):
    model = nn.Module()
    model.a = nn.Linear(32, 32)
    model.b = nn.ModuleDict({"a": nn.Linear(32, 32), "ab": nn.Linear(32, 32)})
    model.c = nn.ModuleDict({"1": nn.Linear(32, 32), "11": nn.Linear(32, 32)})
    assert set(find_layers(model, patterns).selected) == left


def test_shared_modules_and_shared_weights_stay_float():
    model = nn.Module()
    model.one = nn.Linear(64, 64)
    model.same = model.one
    model.two, model.three, model.free = (nn.Linear(64, 64) for _ in range(3))
    model.three.weight = model.two.weight
    plan = find_layers(model, [])
    assert set(plan.selected) == {"free"}
    assert all("tied" in skipped.reason for skipped in plan.skipped.values())


def test_subclasses_of_linear_are_no_linear_layers():
    class Router(nn.Linear):
        """Something else."""

    model = nn.Sequential(Router(64, 64), nn.Linear(64, 64))
    assert set(find_layers(model, []).selected) == {"1"}
    assert not find_layers(model, []).skipped


def test_small_layers_stay_float():
    plan = find_layers(nn.Sequential(nn.Linear(31, 64), nn.Linear(32, 64)), [])
    assert set(plan.selected) == {"1"}
    assert plan.skipped["0"].reason == "has fewer than 32 inputs"


def test_towers_stay_float_unless_a_list_is_given():
    model = nn.Module()
    model.language_model, model.vision_tower, model.end = (nn.Sequential(nn.Linear(64, 64)) for _ in range(3))
    assert set(find_layers(model).selected) == {"language_model.0"}
    assert set(find_layers(model, []).selected) == {"language_model.0", "vision_tower.0", "end.0"}


@pytest.mark.parametrize("name", [*CAUSAL, *OTHERS])
def test_plans_on_meta_and_on_cpu_agree(name):
    model = {**CAUSAL, **OTHERS}[name]()
    plan = find_layers(model)
    with torch.device("meta"):
        skeleton = type(model)(model.config)
    again = find_layers(skeleton)
    assert plan == again
    assert plan.selected
    counted = sum(s.weights for s in plan.selected.values())
    left = sum(s.weights for s in plan.skipped.values() if not s.is_head)
    assert plan.coverage == pytest.approx(counted / (counted + left))


@pytest.mark.parametrize("tiny", [tiny_llama, tiny_gpt2, tiny_bert, tiny_mamba])
def test_replace_and_back(tiny):
    model = tiny()
    plan = find_layers(model)
    classes = {name: type(model.get_submodule(name)) for name in plan.selected}
    biases = {name: model.get_submodule(name).bias is not None for name in plan.selected}
    model.train()
    replace_layers(model, dict.fromkeys(plan.selected, 2))
    packed = packed_layers(model)
    assert list(packed) == list(plan.selected)
    assert all(layer.training and layer.planes == 2 for layer in packed.values())
    weights = {name: layer.dequantize() for name, layer in packed.items()}
    dequantize_layers(model, torch.float32)
    assert {name: type(model.get_submodule(name)) for name in plan.selected} == classes
    for name, weight in weights.items():
        module = model.get_submodule(name)
        assert torch.equal(float_weight(module), weight)
        assert (module.bias is not None) == biases[name]
        assert module.training


def test_replacing_what_is_no_linear_layer_is_refused():
    model = tiny_llama()
    with pytest.raises(ValueError, match=r"'model.norm'.*found a LlamaRMSNorm"):
        replace_layers(model, {"model.norm": 1})
    with pytest.raises(ValueError, match=r"'model.nothing'.*found nothing"):
        replace_layers(model, {"model.nothing": 1})
    replace_layers(model, {"lm_head": 1})
    assert isinstance(model.lm_head, OneBitLinear)


def test_names_resolve_with_and_without_the_base_prefix():
    model = tiny_llama()
    names = ["model.layers.0.mlp.up_proj", "layers.1.mlp.up_proj", "lm_head", "layers.7"]
    assert resolve_names(model, names) == {
        "model.layers.0.mlp.up_proj": "model.layers.0.mlp.up_proj",
        "layers.1.mlp.up_proj": "model.layers.1.mlp.up_proj",
        "lm_head": "lm_head",
        "layers.7": None,
    }
    assert resolve_names(model.model, names[:1]) == {names[0]: "layers.0.mlp.up_proj"}
