"""Experts as layers of their own: the same function as the fused module, its tensors, its names, and the way back."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import tiny_gpt_oss, tiny_ids, tiny_llama, tiny_mixtral, tiny_nemotron_h, tiny_qwen3_moe
from torch import Tensor, nn

from hf_onebit.nn import MPQLinear, OneBitLinear, dequantize_layers, grouped_experts, packed_layers, replace_layers
from hf_onebit.nn.experts import (
    FusedLayout,
    SeparateExperts,
    join_experts,
    layout_of,
    release_experts,
    separate_experts,
    separated,
)

MODELS: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "qwen3-moe": (tiny_qwen3_moe, ["gate_proj", "up_proj", "down_proj"]),
    "mixtral": (tiny_mixtral, ["w1", "w3", "w2"]),
    "gpt-oss": (tiny_gpt_oss, ["gate_proj", "up_proj", "down_proj"]),  # transposed, alternating, with biases
    "nemotron-h": (tiny_nemotron_h, ["up_proj", "down_proj"]),  # without a gate
}


@torch.no_grad()
def logits(model: Any) -> Tensor:
    result: Tensor = model(input_ids=tiny_ids()).logits
    return result


@pytest.mark.parametrize("name", MODELS)
def test_separate_experts_compute_what_the_fused_ones_do(name: str) -> None:
    make, layers = MODELS[name]
    model = make()
    expected, numbers = logits(model), sum(p.numel() for p in model.parameters())
    names = separate_experts(model)
    assert names
    found = [n for n, module in separated(model)[names[0]].named_modules() if isinstance(module, nn.Linear)]
    assert found == [f"{number}.{layer}" for number in range(4) for layer in layers]
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-6)
    assert sum(p.numel() for p in model.parameters()) == numbers
    assert separate_experts(model) == []


@pytest.mark.parametrize("name", MODELS)
def test_experts_join_to_the_same_tensors(name: str) -> None:
    model = MODELS[name][0]()
    state, expected = {k: v.clone() for k, v in model.state_dict().items()}, logits(model)
    (first, *_) = separate_experts(model)
    fused = separated(model)[first].fused
    join_experts(model)
    assert model.get_submodule(first) is fused  # nothing changed in between
    for release in (False, True):
        separate_experts(model)
        if release:
            release_experts(model)
            assert all(p.is_meta for p in separated(model)[first].fused.parameters())
        join_experts(model)
        assert model.state_dict().keys() == state.keys()
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(logits(model), expected)


def test_separating_copies_nothing() -> None:
    model = tiny_qwen3_moe()
    fused = model.model.layers[0].mlp.experts
    separate_experts(model)
    layer = model.get_submodule("model.layers.0.mlp.experts.2.down_proj")
    assert layer.weight.data_ptr() == fused.down_proj[2].data_ptr()
    release_experts(model)
    assert layer.weight.untyped_storage().nbytes() == layer.weight.nbytes


def test_a_skeleton_separates_too() -> None:
    with torch.device("meta"):
        model = type(tiny_qwen3_moe())(tiny_qwen3_moe().config)
    separate_experts(model)
    assert model.get_submodule("model.layers.1.mlp.experts.3.up_proj").weight.shape == (48, 64)
    join_experts(model)
    assert not separated(model)


def test_packed_experts_stay_apart_and_dequantized_ones_join() -> None:
    model = tiny_qwen3_moe()
    separate_experts(model)
    replace_layers(model, {"model.layers.0.mlp.experts.1.up_proj": 1})
    join_experts(model)
    assert list(separated(model)) == ["model.layers.0.mlp.experts"]
    expected = logits(model)
    assert isinstance(packed_layers(model)["model.layers.0.mlp.experts.1.up_proj"], OneBitLinear)
    with pytest.raises(ValueError, match="dequantize it before"):
        separated(model)["model.layers.0.mlp.experts"].joined()
    dequantize_layers(model, torch.float32)
    assert not separated(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-6)


def test_copies_and_pickles_compute_the_same() -> None:
    model = tiny_gpt_oss()
    separate_experts(model)
    expected = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), expected)


def test_slots_without_an_expert_add_nothing() -> None:
    model = tiny_qwen3_moe()
    separate_experts(model)
    experts = model.model.layers[0].mlp.experts
    x, weights = torch.randn(3, 64), torch.ones(3, 2)
    one = experts(x, torch.tensor([[0, 4], [4, 4], [2, 4]]), weights)
    both = experts(x, torch.tensor([[0, 0], [1, 1], [2, 2]]), weights / 2)
    torch.testing.assert_close(one[[0, 2]], both[[0, 2]])
    assert torch.equal(one[1], torch.zeros(64))
    experts.bfloat16()
    assert experts(x.bfloat16(), torch.zeros(3, 2, dtype=torch.long), weights).dtype == torch.bfloat16


def test_gradients_reach_experts_and_their_weights_of_mixing() -> None:
    model = tiny_qwen3_moe()
    separate_experts(model)
    model(input_ids=tiny_ids()).logits.sum().backward()
    layer = model.get_submodule("model.layers.0.mlp.experts.0.gate_proj")
    assert layer.weight.grad is not None
    assert model.model.layers[0].mlp.gate.weight.grad.abs().sum() > 0


def test_layouts_that_are_not_known_say_why() -> None:
    model = tiny_qwen3_moe()
    name, experts = "model.layers.0.mlp.experts", model.model.layers[0].mlp.experts
    assert isinstance(layout_of(model, name, experts), FusedLayout)
    experts.has_post_expert_norm = True
    assert "norm of their own" in str(layout_of(model, name, experts))
    experts.has_post_expert_norm = False
    experts.scale = nn.Parameter(torch.ones(4))
    assert "parameters of their own" in str(layout_of(model, name, experts))
    del experts.scale, experts.has_gate
    assert "forward of their own" in str(layout_of(model, name, experts))
    assert separate_experts(model) == ["model.layers.1.mlp.experts"]
    assert separate_experts(tiny_llama()) == []


@pytest.mark.parametrize("layout", [(True, False), (False, False), (True, True), (False, True)])
def test_parts_and_fusing_undo_each_other(layout: tuple[bool, bool]) -> None:
    about = FusedLayout({"gate": "g", "up": "u", "down": "d"}, False, *layout, bias=True)
    shapes = {"gate_up_proj": (2, 6, 5), "down_proj": (2, 5, 3), "gate_up_proj_bias": (2, 6), "down_proj_bias": (2, 5)}
    for name, shape in shapes.items():
        if layout[1] and len(shape) == 3:
            shape = (shape[0], shape[2], shape[1])
        fused = torch.randn(shape)
        parts = about.parts(name, fused)
        assert torch.equal(about.fuse(name, parts), fused)
    gate = about.parts("gate_up_proj_bias", torch.arange(12.0).reshape(2, 6))["gate.bias"][0]
    assert gate.tolist() == ([0, 1, 2] if layout[0] else [0, 2, 4])


def test_separate_experts_are_one_module_of_the_model() -> None:
    model = tiny_qwen3_moe()
    separate_experts(model)
    experts = model.model.layers[0].mlp.experts
    assert isinstance(experts, SeparateExperts)
    assert experts.shared_inputs == {"gate_proj", "up_proj"}
    assert "num_experts=4" in repr(experts)
    assert not any("fused" in name for name, _ in model.named_modules())


def _set_hook(layers: list[Any]) -> None:
    layers[2].register_forward_hook(lambda *_: None)


def _set_forward(layers: list[Any]) -> None:
    layers[2].forward = layers[2].forward


def _set_float_scales(layers: list[Any]) -> None:
    layers[2].scales = nn.Parameter(layers[2].scales.detach().float())


def _set_module(layers: list[Any]) -> None:
    layers[2] = MPQLinear(64, 32, bits=2)


def _set_data(layers: list[Any]) -> None:
    layers[2].weight.data = layers[2].weight.data.clone()


def _set_storage(layers: list[Any]) -> None:
    with torch.no_grad():
        layers[2].scales.set_(layers[2].scales.clone())


def _load(layers: list[Any]) -> None:
    layers[2].load_state_dict(copy.deepcopy(layers[2].state_dict()), assign=True)


def _to_dtype(layers: list[Any]) -> None:
    for layer in layers:
        layer.to(torch.bfloat16)


def _same_module(layers: list[Any]) -> None:
    layers[2] = copy.deepcopy(layers[2])


def _transposed(layers: list[Any]) -> None:
    layers[2].bias.data = layers[2].bias.data.repeat_interleave(2)[::2]


CHANGES = [(_set_hook, False), (_set_forward, False), (_set_float_scales, False), (_set_module, False),
           (_transposed, False), (_set_data, True), (_set_storage, True), (_load, True), (_to_dtype, True),
           (_same_module, True)]  # fmt: skip


@pytest.mark.parametrize(("change", "suits"), CHANGES, ids=lambda each: getattr(each, "__name__", str(each)))
def test_what_was_found_of_experts_is_kept_until_one_of_them_changes(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[list[Any]], None], suits: bool
) -> None:
    """What a launch reads is where the tensors are then, and a layer that must be called is."""
    x, index = torch.randn(2, 64).half(), torch.zeros(2, 1, dtype=torch.int64)
    layers: list[Any] = [MPQLinear(64, 32, bits=4) for _ in range(4)]
    memory: grouped_experts.Memory = {}
    looked: list[None] = []
    alike = grouped_experts._alike
    monkeypatch.setattr(grouped_experts, "_alike", lambda *given: (looked.append(None), alike(*given))[1])

    def found() -> list[Any]:
        return grouped_experts.suits(x, index, [layers], memory)

    for _ in range(2):
        assert found()
        assert len(looked) == 1
    old = [each.data_ptr() for layer in layers for each in layer.parameters()]
    keep = [each.detach() for layer in layers for each in layer.parameters()]  # no address is used again
    change(layers)
    assert bool(found()) is suits
    if suits:
        (now,) = found()
        for name in ("weight", "scales", "bias"):
            assert getattr(now, name).addresses == tuple(getattr(layer, name).data_ptr() for layer in layers)
        assert now.bias.like.dtype == layers[0].bias.dtype
        assert [each.data_ptr() for layer in layers for each in layer.parameters()] != old
        assert len(looked) == 2
    assert len(keep) == len(old)


def test_what_was_found_of_experts_is_not_copied() -> None:
    model = tiny_qwen3_moe()
    separate_experts(model)
    experts = next(iter(separated(model).values()))
    experts._memory[0, torch.device("cpu"), torch.float16] = ((), None)
    assert copy.deepcopy(experts)._memory == {}
    assert pickle.loads(pickle.dumps(experts))._memory == {}
    assert experts._memory
