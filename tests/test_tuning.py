"""Block tuning in the walk, and the upper rungs of the ladder end to end, on tiny random models."""

from dataclasses import replace

import pytest
import torch
from tiny import CAUSAL, tiny_ids, tiny_llama

import hf_onebit
from hf_onebit import OneBitConfig, OneBitQuantizer
from hf_onebit.algorithms.blockwise import BlockOptions
from hf_onebit.nn.replace import find_layers, set_packed
from hf_onebit.rungs import ladder, tuning, upper_rungs
from hf_onebit.rungs.ladder import quantize_on_prefix
from hf_onebit.rungs.recipes import RECIPES

OPTIONS = BlockOptions(epochs=6, learning_rate=0.01, sign_rate=0.05, sequences_per_step=1)


def rows(count=16, length=48):
    return [{"input_ids": tiny_ids(1, length, seed=i)} for i in range(count)]


def apply(model, result):
    for layer, tensors in result.packed.items():
        set_packed(model, layer, tensors)
    for name, value in result.vectors.items():
        model.get_parameter(name).data = value


@pytest.mark.parametrize("name", CAUSAL)
def test_every_kind_of_block_is_tuned_and_the_float_model_stays_as_it_was(name):
    model = CAUSAL[name]()
    learns = {key: parameter.requires_grad for key, parameter in model.named_parameters()}
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    result = quantize_on_prefix(model, list(find_layers(model).selected), rows(), rounds=1, block=OPTIONS)
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    assert {key: parameter.requires_grad for key, parameter in model.named_parameters()} == learns
    assert all(parameter.grad is None for parameter in model.parameters())
    assert len(result.blocks) == 2
    for block in result.blocks.values():
        assert block.best <= block.start
        assert block.flipped <= 1
    assert any(block.best < block.start for block in result.blocks.values())
    assert all(before[key].dtype == value.dtype for key, value in result.vectors.items())
    apply(model, result)
    with torch.no_grad():
        assert bool(torch.isfinite(model(tiny_ids(1, 12)).logits).all())


def test_tuning_brings_the_model_nearer_to_the_float_one():
    reference, plain, tuned = tiny_llama(), tiny_llama(), tiny_llama()
    names, unseen = list(find_layers(reference).selected), tiny_ids(4, 48, seed=99)
    apply(plain, quantize_on_prefix(plain, names, rows(32), rounds=2))
    result = quantize_on_prefix(tuned, names, rows(32), rounds=2, block=replace(OPTIONS, epochs=12, seed=1))
    apply(tuned, result)
    with torch.no_grad():
        expected = reference(unseen).logits
        errors = [float((m(unseen).logits - expected).square().sum()) for m in (plain, tuned)]
    assert errors[1] < errors[0]  # random weights: what a block gains, the next may lose again
    left = [block.best / block.start for block in result.blocks.values()]
    assert max(left) < 1
    assert sum(left) / len(left) < 0.95


def test_the_walk_goes_on_from_the_tuned_block():
    # The second block's statistics are those of a model whose first block is the tuned one, gains and all.
    model = tiny_llama()
    names = list(find_layers(model).selected)
    result = quantize_on_prefix(model, names, rows(), rounds=1, block=OPTIONS, arithmetic=None)
    half = tiny_llama()
    first = {name: value for name, value in result.packed.items() if ".layers.0." in name}
    for layer, tensors in first.items():
        set_packed(half, layer, tensors)
    for name, value in result.vectors.items():
        if ".layers.0." in name:
            half.get_parameter(name).data = value
    floats = tiny_llama()
    drift = size = 0.0
    with torch.no_grad():
        for batch in rows():
            got = half.model(**batch, output_hidden_states=True).hidden_states[1]
            expected = floats.model(**batch, output_hidden_states=True).hidden_states[1]
            drift += float((got - expected).square().sum())
            size += float(expected.square().sum())
    assert result.depths[0].relative_error == pytest.approx(drift / size, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_error_while_tuning_leaves_the_model_as_it_was(monkeypatch, dtype):
    model = tiny_llama(bias=True).to(dtype)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}

    def fail(trained, *_):
        for t in trained.values():
            t.parameter.data.mul_(3)
        raise KeyboardInterrupt

    monkeypatch.setattr(tuning, "tune_block", fail)
    with pytest.raises(KeyboardInterrupt):
        quantize_on_prefix(model, list(find_layers(model).selected), rows(), rounds=0, block=OPTIONS)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(before[key], tensor) for key, tensor in after.items())


@pytest.mark.parametrize("planes", [1, 2])
def test_all_rungs_end_to_end(tmp_path, monkeypatch, planes):
    """Tuned blocks, distilled scales and signs, gated flips; saved and reloaded to the same bits."""
    recipe = replace(RECIPES["fast"], block=OPTIONS, steps=12, lengths=(48,), step_tokens=96, sign_rate=0.02)
    recipe = replace(recipe, rounds=1, flip_rounds=3, flip_tokens=192)
    monkeypatch.setitem(RECIPES, "fast", recipe)
    float_model, model = tiny_llama(tied=True), tiny_llama(tied=True)
    quantizer = OneBitQuantizer(OneBitConfig(preset="fast", planes=planes, dataset=rows(24)))
    quantizer.quantize_model(model)
    quantizer.save(model, tmp_path / "out")
    loaded, ids = hf_onebit.load(tmp_path / "out"), tiny_ids(1, 40, seed=99)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    fit = quantizer.report["fit"]
    assert set(fit["blocks"]) == {"model.layers.0", "model.layers.1"}
    distilled = fit["distillation"]
    share = {1: 1.0, 2: 0.25}[planes]  # two planes bear smaller steps
    assert distilled["learning_rate"] == pytest.approx(recipe.learning_rate * share)
    assert distilled["sign_rate"] == pytest.approx(0.02 * share)
    assert distilled["kl_after"] <= distilled["kl_before"]
    assert 0 <= distilled["signs_changed"] < 0.5
    assert len(distilled["log"]) == upper_rungs.EVALUATIONS
    assert distilled["flips"]["kl_after"] <= distilled["flips"]["kl_before"] == pytest.approx(distilled["kl_after"])
    norms = [name for name, p in float_model.named_parameters() if p.dim() == 1]
    changed = {n for n in norms if not torch.equal(loaded.get_parameter(n), float_model.get_parameter(n))}
    if distilled["best_step"]:
        assert changed == set(norms)
    else:
        tuned = tuple(f"{name}." for name, block in fit["blocks"].items() if block["best_epoch"])
        assert changed == {name for name in norms if name.startswith(tuned)}
    for name, record in quantizer.report["layers"].items():
        W, Q = float_model.get_submodule(name).weight.detach(), loaded.get_submodule(name).dequantize()
        assert record["relative_weight_error"] == pytest.approx(
            float((W - Q).square().sum() / W.square().sum()), rel=1e-4
        )


def test_an_error_while_distilling_gives_back_the_tuned_gains_too(monkeypatch):
    from hf_onebit.conducting import installing

    def fail(*_, **__):
        raise RuntimeError("no more")

    monkeypatch.setitem(RECIPES, "fast", replace(RECIPES["fast"], block=OPTIONS))
    monkeypatch.setattr(installing, "distill_scales", fail)
    model = tiny_llama(bias=True)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="no more"):
        OneBitQuantizer(OneBitConfig(preset="fast", dataset=rows(8))).quantize_model(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(before[key], tensor) for key, tensor in after.items())


def test_one_sequence_cannot_judge_itself(monkeypatch):
    model = tiny_llama()
    warned = []
    monkeypatch.setattr(ladder.logger, "warning", lambda line, *_: warned.append(line))
    result = quantize_on_prefix(model, list(find_layers(model).selected), rows(1), rounds=0, block=OPTIONS)
    assert warned[0].startswith("Too little text to judge by (1 calibration sequence): blocks are not tuned")
    assert result.blocks == {}
    assert result.vectors == {}
