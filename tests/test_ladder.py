"""The walk on the quantized prefix, and what is chosen on it, on tiny random models."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import CAUSAL, tiny_gpt2, tiny_ids, tiny_llama
from torch import Tensor

from hf_onebit import OneBitConfig, OneBitQuantizer
from hf_onebit.algorithms.blockwise import BlockOptions
from hf_onebit.algorithms.closed_form import closed_form_planes
from hf_onebit.algorithms.signs import output_loss
from hf_onebit.calibration import load_calibration, mixed
from hf_onebit.formats import onebit as fmt
from hf_onebit.nn.replace import find_layers, float_weight, set_packed
from hf_onebit.quantization.layer_errors import layer_errors
from hf_onebit.rungs.ladder import quantize_on_prefix
from hf_onebit.rungs.prefix import PrefixStatistics, walk_prefix
from hf_onebit.rungs.recipes import RECIPES, Recipe
from hf_onebit.rungs.sequences import prefix_batches


def sequences(count: int = 3) -> list[dict[str, Tensor]]:
    """Of two lengths, and one with padding."""
    batches = [{"input_ids": tiny_ids(1, 24 if i % 2 else 17, seed=i)} for i in range(count)]
    mask = torch.ones(1, 17, dtype=torch.int64)
    mask[:, 12:] = 0
    batches[0]["attention_mask"] = mask
    return batches


def layer_inputs(model: Any, name: str, batches: list[dict[str, Tensor]]) -> list[Tensor]:
    """Rows that a layer is given in plain forward passes, one tensor a sequence."""
    rows: list[Tensor] = []
    keep = torch.ones(0, dtype=torch.bool)
    hook = model.get_submodule(name).register_forward_pre_hook(
        lambda _, args: rows.append(args[0].flatten(0, -2)[keep])
    )
    for batch in batches:
        keep = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).flatten().bool()
        with torch.no_grad():
            model(**batch)
    hook.remove()
    return rows


def close(got: Tensor, expected: Tensor, tolerance: float) -> bool:
    return float((got - expected).norm()) <= tolerance * float(expected.norm())


def damage(model: Any, name: str) -> None:
    weight = model.get_submodule(name).weight
    weight.data.copy_(weight.data * 0.5 + weight.data.abs().mean())


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_each_stage_sees_what_the_layers_before_left_it(name):
    model, untouched = CAUSAL[name](), CAUSAL[name]()
    names = list(find_layers(model).selected)
    found: dict[str, PrefixStatistics] = {}
    stages = []

    def visit(stage):
        stages.append(list(stage))
        for layer, statistics in stage.items():
            if statistics is None:
                continue
            rows = layer_inputs(model, layer, sequences())  # the model as far as it is quantized now
            old = layer_inputs(untouched, layer, sequences())
            H = sum(x.t() @ x for x in (rows[0], rows[2]))
            C = sum(x.t() @ y for x, y in ((old[0], rows[0]), (old[2], rows[2])))
            assert close(statistics.hessian, H, 1e-4)
            assert close(statistics.cross, C, 2e-2)  # the float stream is kept in bfloat16
            assert close(statistics.heldout_hessian, rows[1].t() @ rows[1], 1e-4)
            assert statistics.rows == len(rows[0]) + len(rows[2])
            found[layer] = statistics
        for layer in stage:
            damage(model, layer)

    depths = walk_prefix(model, names, sequences(), visit, heldout={1})
    assert sorted(layer for stage in stages for layer in stage) == sorted(names)
    if name == "llama":
        block = ["self_attn.q_proj self_attn.k_proj self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj mlp.up_proj"]
        expected = [[f"model.layers.{i}.{n}" for n in s.split()] for i in (0, 1) for s in [*block, "mlp.down_proj"]]
        assert stages == expected
        assert found["model.layers.0.mlp.gate_proj"] is found["model.layers.0.mlp.up_proj"]
    assert [depth.relative_error > 0 for depth in depths] == [True, True]
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_an_undamaged_prefix_has_one_stream():
    model = tiny_llama()
    names = list(find_layers(model).selected)
    found = {}
    depths = walk_prefix(model, names, sequences(), found.update)
    assert [depth.relative_error for depth in depths] == [0.0, 0.0]
    for statistics in found.values():
        assert close(statistics.cross, statistics.hessian, 1e-2)
        assert statistics.heldout_hessian is None


def test_no_sequence_sees_another():
    names = list(find_layers(tiny_llama()).selected)
    first, second = sequences(2)
    both, alone = {}, [{}, {}]
    walk_prefix(tiny_llama(), names, [first, second], both.update)
    for found, batch in zip(alone, (first, second), strict=True):
        walk_prefix(tiny_llama(), names, [batch], found.update)
    for name in names:
        assert close(both[name].hessian, alone[0][name].hessian + alone[1][name].hessian, 1e-5)


@pytest.mark.parametrize("name", CAUSAL)
def test_every_kind_of_model_is_quantized_on_its_prefix(name):
    model = CAUSAL[name]()
    names = list(find_layers(model).selected)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    result = quantize_on_prefix(model, names, sequences(), rounds=1)
    assert set(result.packed) == set(result.records) == set(names)
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    for layer in names:
        set_packed(model, layer, result.packed[layer])
    with torch.no_grad():
        assert bool(torch.isfinite(model(tiny_ids(1, 12)).logits).all())


def test_the_refined_model_is_nearer_to_the_float_one_than_the_closed_form():
    batches = [{"input_ids": tiny_ids(1, 64, seed=i)} for i in range(24)]
    unseen = {"input_ids": tiny_ids(1, 64, seed=99)}
    reference, closed, refined = tiny_llama(), tiny_llama(), tiny_llama()
    names = list(find_layers(reference).selected)
    for name in names:
        (signs, a, b) = closed_form_planes(float_weight(closed.get_submodule(name)), 1, use_balancing=False)[0]
        set_packed(closed, name, {"weight": fmt.pack_signs(signs), "a": a, "b": b})
    for name, tensors in quantize_on_prefix(refined, names, batches).packed.items():
        set_packed(refined, name, tensors)
    with torch.no_grad():
        expected = reference(**unseen).logits
        errors = [float((m(**unseen).logits - expected).square().sum()) for m in (closed, refined)]
    assert errors[1] < 0.7 * errors[0]


def test_the_recorded_error_is_that_of_the_packed_tensors():
    model = tiny_gpt2()
    names = list(find_layers(model).selected)
    seen = {}

    def visit(stage):
        seen.update({name: s.hessian for name, s in stage.items() if s is not None})

    first = names[0]
    walk_prefix(model, names, sequences(), visit)
    result = quantize_on_prefix(model, names, sequences(), arithmetic=None)
    tensors = result.packed[first]
    W = float_weight(model.get_submodule(first))
    signs = fmt.unpack_signs(tensors["weight"], W.shape[1], torch.float32).t() > 0
    error = output_loss(W, [(signs, tensors["a"], tensors["b"])], seen[first])
    assert result.records[first]["relative_output_error"] == pytest.approx(error, rel=1e-3)


def test_an_error_on_the_way_leaves_the_model_as_it_was():
    model = tiny_llama()
    names = list(find_layers(model).selected)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    calls = []

    def fail(name, record):
        calls.append(name)
        if len(calls) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_on_prefix(model, names, sequences(), rounds=0, done=fail)
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_no_more_than_one_block_is_in_memory_twice():
    model = tiny_llama(layers=3)
    names = list(find_layers(model).selected)
    floats = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}

    def done(name, record):
        block = ".".join(name.split(".")[:3]) + "."
        changed = [n for n, parameter in model.named_parameters() if parameter.data_ptr() != floats[n]]
        assert changed
        assert all(n.startswith(block) for n in changed)

    quantize_on_prefix(model, names, sequences(), rounds=0, done=done)


def test_a_model_without_one_stack_of_blocks_is_refused():
    from tiny import tiny_t5

    with pytest.raises(ValueError, match="no single stack"):
        walk_prefix(tiny_t5(), [], sequences(), lambda stage: None)
    # It is refused before the text is read, let alone written.
    with pytest.raises(ValueError, match="no single stack"):
        OneBitQuantizer(OneBitConfig(preset="fast", dataset="no/such/file")).quantize_model(tiny_t5())


def test_the_fast_preset_end_to_end(tmp_path):
    """Quantized, distilled, saved, reloaded to the same bits; nearer to the float model than the closed form."""
    from tiny import tiny_llama

    import hf_onebit

    rows = [{"input_ids": tiny_ids(1, 96, seed=i)} for i in range(64)]  # with fewer, distillation learns them by heart
    reference = tiny_llama(tied=True)
    errors = {}
    for preset in ("closed", "fast"):
        model = tiny_llama(tied=True)
        quantizer = OneBitQuantizer(OneBitConfig(preset=preset, dataset=rows))
        quantizer.quantize_model(model)
        quantizer.save(model, tmp_path / preset)
        loaded = hf_onebit.load(tmp_path / preset)
        ids = tiny_ids(1, 64, seed=99)
        with torch.no_grad():
            assert torch.equal(loaded(ids).logits, model(ids).logits)
            errors[preset] = float((loaded(ids).logits - reference(ids).logits).square().mean())
    assert errors["fast"] < 0.8 * errors["closed"]
    report = quantizer.report
    distilled = report["fit"]["distillation"]
    assert distilled["kl_after"] <= distilled["kl_before"]
    assert list(report["fit"]["drift"]) == ["model.layers.0", "model.layers.1"]
    for name, record in report["layers"].items():
        W, Q = reference.get_submodule(name).weight.detach(), loaded.get_submodule(name).dequantize()
        error = float((W - Q).square().sum() / W.square().sum())
        assert record["relative_weight_error"] == pytest.approx(error, rel=1e-4)
    last = mixed(load_calibration(rows), 0).batches[-21:]  # as the run had them
    measured = layer_errors(loaded, {name: reference.get_submodule(name) for name in report["layers"]}, last)
    assert report["output_errors"] == {"inputs": "packed model", "tokens": 21 * 96}
    for name, errors in measured.items():
        for key, error in errors.items():
            assert report["layers"][name][key] == pytest.approx(error, rel=1e-5)
        assert report["fit"]["layers"][name]["prefix_output_error"] > 0


def test_without_a_tokenizer_nothing_is_written_and_the_model_stays_float(tmp_path):
    model = tiny_llama()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="cannot write its own calibration text without a tokenizer"):
        OneBitQuantizer(OneBitConfig(preset="fast")).quantize_model(model)
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    model.save_pretrained(tmp_path / "float")
    with pytest.raises(ValueError, match="cannot write its own calibration text without a tokenizer"):
        type(model).from_pretrained(tmp_path / "float", quantization_config=OneBitConfig(preset="fast"))


@pytest.mark.parametrize("block", [None, BlockOptions(epochs=1)])
def test_an_error_after_distilling_gives_gains_and_biases_back_too(monkeypatch, block):
    # Packed modules share their biases with the float ones, and gains are changed in place.
    from hf_onebit.conducting import installing

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setitem(RECIPES, "fast", replace(RECIPES["fast"], steps=4, block=block))
    monkeypatch.setattr(installing, "measure_records", fail)
    model = tiny_llama(bias=True)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(KeyboardInterrupt):
        OneBitQuantizer(OneBitConfig(preset="fast", dataset=sequences(12))).quantize_model(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(before[key], tensor) for key, tensor in after.items())


def test_what_distillation_is_judged_on_is_not_fitted():
    recipe = Recipe(prefix_tokens=10**6, prefix_lengths=(16,), heldout_tokens=64, lengths=(8,))
    batches = [{"input_ids": torch.full((1, 32), i)} for i in range(20)]
    fitted = {int(batch["input_ids"][0, 0]) for batch in prefix_batches(batches, recipe)}
    assert fitted == set(range(18))  # 64 tokens are the last two


def test_an_error_while_distilling_gives_the_float_model_back(monkeypatch):
    from hf_onebit.conducting import installing

    def fail(*_, **__):
        raise RuntimeError("no more")

    monkeypatch.setattr(installing, "distill_scales", fail)
    model = tiny_llama()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    rows = [{"input_ids": tiny_ids(1, 32, seed=i)} for i in range(4)]
    with pytest.raises(RuntimeError, match="no more"):
        OneBitQuantizer(OneBitConfig(preset="fast", dataset=rows)).quantize_model(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(before[key], tensor) for key, tensor in after.items())
