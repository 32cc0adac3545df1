"""Adapters merged and packed again: what is kept, what is lost, and when that is refused."""

import math

import pytest
import torch
import transformers
from tiny import save_float, tiny_gemma3, tiny_gpt2, tiny_ids, tiny_llama, tiny_t5

peft = pytest.importorskip("peft")

from transformers import (  # noqa: E402  after the skip
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
)

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


def adapted(
    tmp_path, config, std, make=tiny_llama, targets="all-linear", auto=AutoModelForCausalLM, native=False, **more
):
    save_float(make(), tmp_path / "float")
    model = auto.from_pretrained(tmp_path / "float", quantization_config=config)
    torch.manual_seed(0)
    adapter = peft.LoraConfig(r=4, target_modules=targets, **more)
    if native:
        model.add_adapter(adapter)
    else:
        model = peft.get_peft_model(model, adapter)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_embedding_A" in name:  # those that PEFT starts at zero
                parameter.normal_(std=std)
            elif "trainable_tokens_delta" in name:
                parameter.add_(torch.randn_like(parameter))
    return model.eval()


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
    expected = logits(model)
    merged, report = hf_onebit.merge_and_requantize(model)
    assert set(report) == {"model.embed_tokens", "lm_head"}
    assert (logits(merged) - expected).abs().max() < 0.05 * expected.abs().max()


# {what is adapted: options of LoRA}. The head and the embedding are one matrix before.
TIED = {
    "head": {"targets": ["q_proj", "lm_head"]},
    "embedding": {"targets": ["q_proj", "embed_tokens"]},
    "both": {"targets": ["q_proj", "lm_head", "embed_tokens"]},
    "both alike": {"targets": ["q_proj", "lm_head"], "ensure_weight_tying": True},
    "head, with DoRA": {"targets": ["q_proj", "lm_head"], "use_dora": True},
    "other tokens": {"targets": ["q_proj"], "trainable_token_indices": {"lm_head": [4, 5], "embed_tokens": [5, 6]}},
    "same tokens": {"targets": ["q_proj"], "trainable_token_indices": [4, 5]},
}


def is_one_matrix(model):
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def check_parted(merged, expected, folder, name, atol):
    """The merged model computes as the adapted one did, in memory and from a file, and its config says what it is."""
    assert (logits(merged) - expected).abs().max() < atol * expected.abs().max()
    assert merged.config.tie_word_embeddings == is_one_matrix(merged)
    if "alike" not in name:  # these are one but for what rounding does
        assert is_one_matrix(merged) == (name == "same tokens")
    merged.save_pretrained(folder)
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert is_one_matrix(again) == is_one_matrix(merged)
    torch.testing.assert_close(logits(again), logits(merged), rtol=0, atol=0)


@pytest.mark.parametrize("native", [False, True], ids=["PEFT", "Transformers"])
@pytest.mark.parametrize("name", TIED)
def test_a_float_tie_is_parted_where_adapters_change_it(name, native, tmp_path):
    model = adapted(tmp_path, MPQConfig(bits=4), 0.2, lambda: tiny_llama(tied=True), native=native, **TIED[name])
    base = model if native else model.get_base_model()
    assert base.config.tie_word_embeddings
    expected = logits(model)
    check_parted(hf_onebit.merge_and_dequantize(model), expected, tmp_path / "merged", name, 1e-5)


@pytest.mark.parametrize("name", TIED)
def test_a_float_tie_is_parted_beside_layers_that_are_packed_again(name, tmp_path):
    model = adapted(tmp_path, MPQConfig(bits=8, group_size=32), 0.2, lambda: tiny_llama(tied=True), **TIED[name])
    expected = logits(model)
    merged, report = hf_onebit.merge_and_requantize(model, force=True)
    assert set(report) == {f"model.layers.{i}.self_attn.q_proj" for i in range(2)}
    check_parted(merged, expected, tmp_path / "merged", name, 0.02)


@pytest.mark.parametrize("native", [False, True], ids=["PEFT", "Transformers"])
def test_tokens_of_an_untied_embedding_are_merged(native, tmp_path):
    model = adapted(tmp_path, MPQConfig(bits=4), 0.2, targets=["q_proj"], native=native, trainable_token_indices=[4, 5])
    expected = logits(model)
    merged = hf_onebit.merge_and_dequantize(model)
    assert (logits(merged) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert not any("token" in name and "embed_tokens.weight" not in name for name in merged.state_dict())


def test_an_adapter_that_is_not_merged_parts_nothing(tmp_path):
    model = adapted(tmp_path, MPQConfig(bits=4), 0.2, lambda: tiny_llama(tied=True), ["q_proj"])
    expected = logits(model)
    model.add_adapter("other", peft.LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False))
    merged = hf_onebit.merge_and_dequantize(model, adapter_names=["default"])
    check_parted(merged, expected, tmp_path / "merged", "same tokens", 1e-5)


def test_a_refused_merge_leaves_the_tie(tmp_path):
    model = adapted(tmp_path, OneBitConfig(), 0.001, lambda: tiny_llama(tied=True), ["q_proj", "lm_head"])
    expected = logits(model)
    with pytest.raises(ValueError, match="loses more than 50%"):
        hf_onebit.merge_and_requantize(model)
    assert torch.equal(logits(model), expected)
    base = model.get_base_model()
    assert base.config.tie_word_embeddings
    assert base.lm_head.base_layer.weight is base.model.embed_tokens.weight


@pytest.mark.parametrize("name", ["head", "embedding", "both alike"])
def test_a_pair_that_is_packed_as_one_is_parted(name, tmp_path):
    config = MPQConfig(bits=8, group_size=32, lm_head_bits=8, embedding_bits=8)
    model = adapted(tmp_path, config, 0.2, lambda: tiny_llama(tied=True), **TIED[name])
    expected = logits(model)
    check_parted(hf_onebit.merge_and_dequantize(model), expected, tmp_path / "merged", name, 1e-5)


def tiny_gemma3_that_sees():
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config=tiny_gemma3().config.to_dict(),
        vision_config={**vision, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=285,
        boi_token_index=286,
        eoi_token_index=287,
    )
    torch.manual_seed(0)
    return transformers.Gemma3ForConditionalGeneration(config).eval()


@pytest.mark.parametrize("packed", [{}, {"lm_head_bits": 8, "embedding_bits": 8}], ids=["float", "packed as one"])
def test_a_nested_config_is_untied_too(packed, tmp_path):
    config, targets = MPQConfig(bits=4, **packed), r".*language_model.*q_proj|.*embed_tokens"
    model = adapted(tmp_path, config, 0.2, tiny_gemma3_that_sees, targets, AutoModelForImageTextToText)
    expected = logits(model)
    merged = hf_onebit.merge_and_dequantize(model)
    assert (logits(merged) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert not merged.config.tie_word_embeddings
    assert not merged.config.text_config.tie_word_embeddings
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(again), logits(merged), rtol=0, atol=0)


@pytest.mark.parametrize("merge", [hf_onebit.merge_and_dequantize, hf_onebit.merge_and_requantize])
def test_a_tie_of_more_than_two_is_not_parted(merge, tmp_path):
    model = adapted(tmp_path, MPQConfig(bits=8), 0.02, tiny_t5, ["q", "lm_head"], AutoModelForSeq2SeqLM)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"lm_head and what it is tied to would differ .* ties more than those two"):
        merge(model)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert set(model.state_dict()) == set(state)


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
