"""Adapters merged and packed again: what is kept, what is lost, and when that is refused."""

import math

import pytest
import torch
from tiny import save_float, tiny_gpt2, tiny_ids, tiny_llama

peft = pytest.importorskip("peft")

from transformers import AutoModelForCausalLM  # noqa: E402  after the skip

import hf_onebit  # noqa: E402
from hf_onebit import MPQConfig, OneBitConfig  # noqa: E402
from hf_onebit.nn import MBWQLinear, MPQLinear, OneBitLinear, packed_layers  # noqa: E402
from hf_onebit.quantization.repacking import repack  # noqa: E402

ORDER = torch.randperm(96, generator=torch.Generator().manual_seed(0))
LAYERS = {
    "onebit": lambda: OneBitLinear(96, 40),
    "onebit, two planes": lambda: OneBitLinear(72, 40, planes=2),
    "mpq, symmetric": lambda: MPQLinear(96, 40, bits=4, group_size=32),
    "mpq, zeros": lambda: MPQLinear(72, 40, bits=3, group_size=32, symmetric=False),
    "mpq, one bit": lambda: MPQLinear(64, 40, bits=1, group_size=-1),
    "mpq, g_idx": lambda: MPQLinear(96, 40, bits=2, group_size=32, symmetric=False, g_idx=ORDER % 3),
    "mbwq, uniform": lambda: MBWQLinear(96, 40, blocks=[(4, 96, 32)], symmetric=False, q_perm=ORDER),
    "mbwq, mixed": lambda: MBWQLinear(96, 40, blocks=[(8, 32, 32), (4, 64, 32)], symmetric=False, q_perm=ORDER),
}


def distance(A, B):
    return float((A - B).norm() / B.norm())


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_packed_anew_for_another_weight(name):
    torch.manual_seed(0)
    layer = LAYERS[name]()
    held = layer.dequantize()
    before = {n: p.clone() for n, p in layer.named_parameters()}
    W = torch.randn_like(held) * held.std()
    made, dense = repack(layer, W)
    assert torch.equal(made.dequantize(), dense)
    assert type(made) is type(layer)
    assert {n: (p.shape, p.dtype) for n, p in made.named_parameters()} == {
        n: (p.shape, p.dtype) for n, p in before.items()
    }
    assert all(torch.equal(p, before[n]) for n, p in layer.named_parameters())
    # Normal weights: what the widths themselves allow (Max 1960), with some room for groups of few.
    best = {1: 0.61, 2: 0.36, 3: 0.20, 4: 0.12}
    bits = 1 if isinstance(layer, OneBitLinear) else layer.bits
    bits += getattr(layer, "planes", 1) - 1
    assert distance(dense, W) < best.get(bits, 0.12)
    again, same = repack(layer, held)  # what it holds, it keeps to the last bit
    assert torch.equal(same, held)
    assert all(torch.equal(p, before[n]) for n, p in again.named_parameters())


@pytest.mark.parametrize("name", LAYERS)
def test_packing_anew_never_loses_more_than_all_of_a_change(name):
    torch.manual_seed(0)
    layer = LAYERS[name]()
    held = layer.dequantize()
    for size in (1e-4, 1e-2, 0.3):
        W = held + size * held.std() * torch.randn_like(held)
        _, dense = repack(layer, W)
        assert (dense - W).norm() <= (held - W).norm() * (1 + 1e-6)


def test_scales_that_train_are_no_hindrance():
    layer = MPQLinear(64, 32, bits=4, group_size=32)
    hf_onebit.train_scales(layer)
    made, _ = repack(layer, layer.dequantize())
    assert made.scales.dtype == torch.float16
    assert not made.scales.requires_grad
    assert made.weight.scales is made.scales
    assert layer.scales.dtype == torch.float32


def test_repacking_says_no():
    layer = MPQLinear(64, 32, bits=4, group_size=32)
    with pytest.raises(ValueError, match=r"up_proj got a weight of shape \(64, 32\)"):
        repack(layer, torch.zeros(64, 32), "up_proj")
    with pytest.raises(ValueError, match="expected finite values"):
        repack(layer, torch.full((32, 64), torch.nan))


def adapted(tmp_path, config, std, make=tiny_llama, targets="all-linear"):
    save_float(make(), tmp_path / "float")
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config)
    torch.manual_seed(0)
    model = peft.get_peft_model(packed, peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=std)
    return model


def logits(model):
    with torch.no_grad():
        return model(input_ids=tiny_ids()).logits


def test_eight_bits_keep_an_adapter(tmp_path):
    model = adapted(tmp_path, MPQConfig(bits=8, group_size=32), 0.02)
    expected = logits(model)
    with model.disable_adapter():
        plain = logits(model)
    merged, report = hf_onebit.merge_and_requantize(model)
    assert len(report) == len(packed_layers(merged)) == 14
    assert all(isinstance(layer, MPQLinear) for layer in packed_layers(merged).values())
    for layer in report.values():
        assert 0 < layer.lost < 0.5
        assert math.isclose(layer.lost, layer.error / layer.change, rel_tol=1e-6)
    assert (logits(merged) - expected).norm() < 0.3 * (plain - expected).norm()
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(again), logits(merged), rtol=0, atol=0)


@pytest.mark.parametrize("config", [OneBitConfig(), MPQConfig(bits=2, group_size=32)], ids=["onebit", "2 bits"])
def test_few_bits_lose_it_and_the_merge_is_refused(config, tmp_path, caplog):
    model = adapted(tmp_path, config, 0.001)
    expected = logits(model)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"loses more than 50% of what the adapter changes in 14 of 14 layers \(model"):
        hf_onebit.merge_and_requantize(model)
    assert torch.equal(logits(model), expected)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    with caplog.at_level("WARNING"):
        merged, report = hf_onebit.merge_and_requantize(model, force=True)
    assert "loses more than 50%" in caplog.text
    assert all(0.5 < layer.lost <= 1 + 1e-6 for layer in report.values())
    assert not any("lora" in name for name, _ in merged.named_parameters())
    assert len(packed_layers(merged)) == 14


def test_an_adapter_that_changes_nothing_loses_nothing(tmp_path):
    model = adapted(tmp_path, OneBitConfig(), 0.0)
    words = {n: layer.weight.clone() for n, layer in packed_layers(model.get_base_model()).items()}
    _, report = hf_onebit.merge_and_requantize(model, max_lost=0.0)
    assert {layer.lost for layer in report.values()} == {0.0}
    for name, layer in packed_layers(model.get_base_model()).items():
        assert torch.equal(layer.weight, words[f"{name}.base_layer"])


def test_transposed_layers_and_biases(tmp_path):
    model = adapted(tmp_path, MPQConfig(bits=8, group_size=32), 0.05, tiny_gpt2)
    expected = logits(model)
    merged, _ = hf_onebit.merge_and_requantize(model)
    assert {layer.source for layer in packed_layers(merged).values()} == {"Conv1D"}
    assert (logits(merged) - expected).abs().max() < 0.02 * expected.abs().max()


def test_a_tied_pair_is_not_packed_again(tmp_path):
    config = MPQConfig(bits=8, group_size=32, lm_head_bits=8, embedding_bits=8)
    model = adapted(tmp_path, config, 0.02, lambda: tiny_llama(tied=True), ["embed_tokens"])
    with pytest.raises(ValueError, match="is packed as one with the module that it is tied to"):
        hf_onebit.merge_and_requantize(model, force=True)


def test_an_untied_embedding_is(tmp_path):
    config = MPQConfig(bits=8, group_size=32, lm_head_bits=8, embedding_bits=8)
    model = adapted(tmp_path, config, 0.02, tiny_llama, ["embed_tokens", "lm_head"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_embedding_A" in name:
                parameter.normal_(std=0.02)
    expected = logits(model)
    merged, report = hf_onebit.merge_and_requantize(model)
    assert set(report) == {"model.embed_tokens", "lm_head"}
    assert (logits(merged) - expected).abs().max() < 0.05 * expected.abs().max()


def test_prompts_have_nothing_to_merge(tmp_path):
    save_float(tiny_llama(), tmp_path / "float")
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=OneBitConfig())
    model = peft.get_peft_model(packed, peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"))
    for merge in (hf_onebit.merge_and_dequantize, hf_onebit.merge_and_requantize):
        with pytest.raises(ValueError, match="has no adapter on a packed layer"):
            merge(model)


def test_a_method_without_a_merge_is_named(tmp_path):
    save_float(tiny_llama(), tmp_path / "float")
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=OneBitConfig())
    config = peft.PolyConfig(r=2, n_tasks=1, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(packed, config)
    with pytest.raises(ValueError, match=r"PEFT cannot merge model\.layers\.0\.self_attn\.q_proj"):
        hf_onebit.merge_and_dequantize(model)
