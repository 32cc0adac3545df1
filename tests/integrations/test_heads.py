"""Packed output heads and token embeddings: quantized on load and in memory, tied and not, saved, reloaded, trained."""

import copy
import json
import pickle

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import (
    CAUSAL,
    make,
    save_float,
    tiny_gemma3,
    tiny_gpt2,
    tiny_ids,
    tiny_llama,
    tiny_llama_ragged,
    tiny_mamba,
    tiny_opt,
    tiny_qwen3_moe,
    tiny_t5,
    tiny_tokenizer,
)
from transformers import AutoModel, AutoModelForCausalLM
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

import hf_onebit
from hf_onebit import MPQConfig, MPQQuantizer, OneBitConfig, OneBitQuantizer, cli, evaluation
from hf_onebit.inspection import inspect
from hf_onebit.nn import MPQEmbedding, MPQLinear, OneBitLinear, packed_layers
from hf_onebit.storage.verification import verify

BITS = [(4, None), (None, 8), (4, 8), (8, 8), (2, 3)]
TEXT = "All happy families are alike; each unhappy family is unhappy in its own way. " * 20


@torch.no_grad()
def logits(model, ids=None):
    return model(input_ids=tiny_ids() if ids is None else ids).logits


def same_state(one, other):
    same_state_dicts(one.state_dict(), other.state_dict())


def on_load(model, folder, dtype=torch.float32, **options):
    save_float(model, folder)
    return type(model).from_pretrained(folder, quantization_config=OneBitConfig(**options), dtype=dtype)


def in_memory(model, folder, **options):
    del folder
    return OneBitQuantizer(OneBitConfig(**options)).quantize_model(model)


@pytest.mark.parametrize("bits", BITS, ids=str)
@pytest.mark.parametrize("name", [name for name in CAUSAL if name != "mamba"])
def test_reload_is_bit_exact(name, bits, tmp_path):
    head, embedding = bits
    options = {"lm_head_bits": head, "embedding_bits": embedding}
    model = on_load(CAUSAL[name](), tmp_path / "float", **options)
    assert isinstance(model.get_output_embeddings(), MPQLinear) == (head is not None)
    assert isinstance(model.get_input_embeddings(), MPQEmbedding) == (embedding is not None)
    same_state(model, in_memory(CAUSAL[name](), None, **options))
    model.save_pretrained(tmp_path / "packed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    same_state(model, again)
    assert torch.equal(logits(model), logits(again))
    assert again.config.quantization_config.to_dict() == model.config.quantization_config.to_dict()
    again.save_pretrained(tmp_path / "again")
    first, second = (load_file(tmp_path / folder / "model.safetensors") for folder in ("packed", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    file = (tmp_path / "packed" / "model.safetensors").stat().st_size
    assert evaluation.tensor_bytes(again) <= 1.05 * file
    assert verify(tmp_path / "packed")["ok"]
    assert inspect(tmp_path / "packed")["total_weights"] == CAUSAL[name]().num_parameters()


@pytest.mark.parametrize("make_it", [on_load, in_memory])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bits", BITS, ids=str)
def test_what_the_packed_model_computes(bits, tied, make_it, tmp_path):
    """The same as the float model whose head and embedding are replaced by what the packed ones stand for."""
    head, embedding = bits
    model = tiny_llama_ragged(tied=tied)
    keep = [name for name, module in model.named_modules() if type(module) is torch.nn.Linear]
    if head is not None:
        keep.remove("lm_head")
    expected = copy.deepcopy(model)
    packed = make_it(
        model, tmp_path / "float", lm_head_bits=head, embedding_bits=embedding, modules_to_not_convert=keep
    )
    if head is not None:
        weight = packed.lm_head.dequantize()
        assert (weight - expected.lm_head.weight).norm() < 0.5 * expected.lm_head.weight.norm()
        expected.lm_head.weight = torch.nn.Parameter(weight)
    else:
        assert torch.equal(packed.lm_head.weight, expected.lm_head.weight)
    if embedding is not None:
        expected.model.embed_tokens.weight = torch.nn.Parameter(packed.model.embed_tokens.dequantize())
    else:
        assert torch.equal(packed.model.embed_tokens.weight, expected.model.embed_tokens.weight)
    torch.testing.assert_close(logits(packed), logits(expected), rtol=1e-5, atol=1e-5)


# -- ties -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make_it", [on_load, in_memory])
def test_equal_bits_stay_tied_and_are_stored_once(make_it, tmp_path):
    packed = make_it(tiny_llama(tied=True), tmp_path / "float", lm_head_bits=8, embedding_bits=8)
    packed.save_pretrained(tmp_path / "packed")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    copied, unpickled = copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))
    for model in (packed, loaded, copied, unpickled, copy.deepcopy(loaded).to(torch.bfloat16)):
        head, embedding = model.lm_head, model.model.embed_tokens
        assert head.weight is embedding.weight
        assert head.scales is embedding.scales
        model.tie_weights()
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert model.lm_head.weight.shape == (16, 288)
        assert model.lm_head.scales is model.model.embed_tokens.scales
    stored = load_file(tmp_path / "packed" / "model.safetensors")
    assert {"model.embed_tokens.weight", "model.embed_tokens.scales"} <= set(stored)
    assert not any(key.startswith("lm_head") for key in stored)
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert config["tie_word_embeddings"] is True
    quantization = config["quantization_config"]
    assert "untied" not in quantization
    assert quantization["modules"]["lm_head"]["tied_to"] == "model.embed_tokens"
    entry = {"method": "mpq", "bits": 8, "group_size": 64, "symmetric": True, "in_features": 64, "kind": "embedding"}
    assert quantization["modules"]["model.embed_tokens"] == entry
    info = inspect(tmp_path / "packed")
    assert info["layers"]["lm_head"]["tied_to"] == "model.embed_tokens"
    assert "model.embed_tokens" in info["embeddings"]
    assert info["skipped"] == {}


@pytest.mark.parametrize("make_it", [on_load, in_memory])
@pytest.mark.parametrize("bits", [(4, None), (None, 8), (4, 8)], ids=str)
def test_other_bits_untie_and_say_so(bits, make_it, tmp_path):
    head, embedding = bits
    model = make_it(tiny_llama(tied=True), tmp_path / "float", lm_head_bits=head, embedding_bits=embedding)
    assert model.config.tie_word_embeddings is False
    assert model.all_tied_weights_keys == {}
    before = copy.deepcopy(model.state_dict())
    model.tie_weights()
    same_state_dicts(before, model.state_dict())
    report = model.hf_quantizer.report or {}
    hf_onebit.save(model, tmp_path / "packed", report=report)
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert config["quantization_config"]["untied"] is True
    loaded = hf_onebit.load(tmp_path / "packed")
    same_state_dicts(before, loaded.state_dict())
    assert loaded.config.quantization_config.untied is True
    if report:
        extra = "lm_head" if head else "model.embed_tokens"
        module = packed_layers(loaded)[extra]
        assert report["untied"]["bytes"] == module.weight.nbytes + module.scales.nbytes
        why = {(4, None): "only the head", (None, 8): "only the embedding", (4, 8): "4 bits and the embedding 8"}
        assert why[bits] in report["untied"]["reason"]
        assert "since" in (tmp_path / "packed" / "README.md").read_text()


def same_state_dicts(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_file_may_hold_the_head_in_place_of_the_embedding_or_both(tmp_path):
    save_float(tiny_llama(tied=True), tmp_path / "float")
    tensors = load_file(tmp_path / "float" / "model.safetensors")
    weight = tensors["model.embed_tokens.weight"]
    both = {**tensors, "lm_head.weight": weight.clone()}
    alone = {key: value for key, value in both.items() if key != "model.embed_tokens.weight"}
    for bits in BITS:
        options = OneBitConfig(lm_head_bits=bits[0], embedding_bits=bits[1])
        states = []
        for content in (tensors, both, alone):
            save_file(content, tmp_path / "float" / "model.safetensors", metadata={"format": "pt"})
            model = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=options)
            states.append(model.state_dict())
            assert model.hf_quantizer.report["total_weights"] == tiny_llama(tied=True).num_parameters()
        same_state_dicts(states[0], states[1])
        same_state_dicts(states[0], states[2])


def test_a_head_with_a_bias_is_untied(tmp_path):
    """Transformers cuts a tied head's bias to the first size of its weight, which packed is not the vocabulary."""
    model = tiny_gpt2()
    model.lm_head = torch.nn.Linear(64, 288)
    model.tie_weights()
    packed = in_memory(model, None, lm_head_bits=8, embedding_bits=8)
    assert packed.config.tie_word_embeddings is False
    assert packed.lm_head.bias.shape == (288,)
    assert packed.lm_head.weight is not packed.transformer.wte.weight


def test_tied_scales_that_train_are_saved_once(tmp_path):
    model = on_load(tiny_llama(tied=True), tmp_path / "float", lm_head_bits=4, embedding_bits=4)
    scales = torch.nn.Parameter(model.lm_head.scales.float())
    model.lm_head.scales = model.model.embed_tokens.scales = scales
    model.save_pretrained(tmp_path / "packed")
    assert "lm_head.scales" not in load_file(tmp_path / "packed" / "model.safetensors")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "packed")), logits(model))


# -- the models' own embeddings ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scaled_embeddings(dtype, tmp_path):
    float_model = tiny_gemma3()
    model = on_load(float_model, tmp_path / "float", dtype, embedding_bits=8, lm_head_bits=8)
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, MPQEmbedding)
    ids = tiny_ids()
    expected = float_model.to(dtype).get_input_embeddings()(ids)
    assert embedding(ids).dtype == dtype
    assert (embedding(ids) - expected).float().norm() < 0.02 * expected.float().norm()
    packed = logits(model)
    plain = model.dequantize()
    assert type(plain.get_input_embeddings()) is Gemma3TextScaledWordEmbedding
    assert plain.get_input_embeddings().weight is plain.lm_head.weight
    torch.testing.assert_close(logits(plain), packed, rtol=2e-2, atol=1e-5 if dtype == torch.float32 else 0.1)


def test_padding_index_and_projections(tmp_path):
    config = transformers.OPTConfig(
        vocab_size=288, hidden_size=64, word_embed_proj_dim=32, ffn_dim=128, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    float_model = make(transformers.OPTForCausalLM, config)
    with torch.no_grad():
        float_model.get_input_embeddings().weight[0] = 0
    model = on_load(float_model, tmp_path / "float", lm_head_bits=8, embedding_bits=8)
    embedding = model.get_input_embeddings()
    assert (embedding.padding_idx, embedding.embedding_dim) == (0, 32)
    assert not embedding(torch.tensor([0])).any()
    assert model.lm_head.in_features == 32
    assert type(model.model.decoder.embed_positions).__name__ == "OPTLearnedPositionalEmbedding"
    assert torch.isfinite(logits(model)).all()
    plain = copy.deepcopy(model).dequantize()
    assert plain.get_input_embeddings().padding_idx == 0
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("tiny", "options", "message"),
    [
        (tiny_mamba, {"lm_head_bits": 4}, "MambaForCausalLM reads its .weight directly"),
        (tiny_t5, {"lm_head_bits": 4}, "(shared with|tied, and cannot be untied alone)"),
        (tiny_t5, {"embedding_bits": 8}, "(shared with|tied, and cannot be untied alone)"),
        (lambda: CAUSAL["llama"]().model, {"lm_head_bits": 4}, "LlamaModel has no output head"),
        (
            tiny_llama,
            {"lm_head_bits": 4, "modules_to_not_convert": ["lm_head"]},
            r"lm_head_bits \(--lm-head-bits\) asks to pack 'lm_head', and modules_to_not_convert=",
        ),
        (
            tiny_llama,
            {"embedding_bits": 4, "modules_to_not_convert": ["model.embed_tokens"]},
            r"embedding_bits \(--embedding-bits\) asks to pack 'model.embed_tokens'",
        ),
    ],
)
@pytest.mark.parametrize("make_it", [on_load, in_memory])
def test_what_cannot_be_packed_is_refused_with_the_reason(tiny, options, message, make_it, tmp_path):
    model = tiny()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        make_it(model, tmp_path / "float", **options)
    same_state_dicts(before, model.state_dict())


def test_a_list_that_names_other_layers_leaves_the_head_packed_in_groups(tmp_path):
    model = on_load(tiny_llama(), tmp_path / "float", lm_head_bits=4, modules_to_not_convert=["down_proj"])
    assert isinstance(model.lm_head, MPQLinear)
    assert type(model.model.layers[0].mlp.down_proj) is torch.nn.Linear
    assert isinstance(model.model.layers[0].mlp.up_proj, OneBitLinear)


def test_embeddings_that_compute_something_else_are_refused():
    class Odd(torch.nn.Embedding):
        def forward(self, input):
            return super().forward(input) + 1

    model = tiny_llama()
    model.model.embed_tokens = Odd(288, 64)
    with pytest.raises(ValueError, match="is a Odd, whose forward is neither"):
        in_memory(model, None, embedding_bits=8)
    model.model.embed_tokens = torch.nn.Embedding(288, 64, max_norm=1.0)
    with pytest.raises(ValueError, match="renormalizes its rows"):
        in_memory(model, None, embedding_bits=8)


# -- after the load ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bits", [(8, 8), (4, 8)], ids=str)
def test_dtype_of_the_model_is_not_that_of_its_scales(bits, tied, tmp_path):
    options = {"lm_head_bits": bits[0], "embedding_bits": bits[1]}
    for dtype in (torch.bfloat16, torch.float32):
        model = on_load(tiny_llama(tied=tied), tmp_path / "float", dtype, **options)
        assert model.dtype == model.model.dtype == dtype
        model.save_pretrained(tmp_path / "packed")
        assert json.loads((tmp_path / "packed" / "config.json").read_text())["dtype"] == str(dtype).split(".")[1]
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
        assert again.dtype == again.model.embed_tokens.dtype == dtype
        assert again.model.embed_tokens(tiny_ids()).dtype == logits(again).dtype == dtype
        other = again.to(torch.float32 if dtype == torch.bfloat16 else torch.bfloat16)
        assert other.model.embed_tokens.scales.dtype == other.lm_head.scales.dtype == torch.float16
        assert other.model.embed_tokens(tiny_ids()).dtype == logits(other).dtype == other.dtype


def test_dtype_of_unpacked_models_is_transformers_own():
    assert tiny_llama().dtype == torch.float32
    assert tiny_llama().to(torch.bfloat16).dtype == torch.bfloat16


def counts(model):
    pairs = [(False, False), (True, False), (False, True), (True, True)]
    return [model.num_parameters(only_trainable=one, exclude_embeddings=other) for one, other in pairs]


@pytest.mark.parametrize("bits", [(None, None), (8, 8), (4, None), (None, 8)], ids=str)
@pytest.mark.parametrize("name", [name for name in CAUSAL if name != "mamba"])
def test_a_packed_model_has_as_many_parameters_as_its_float_one(name, bits):
    whole, _, inner, _ = counts(CAUSAL[name]())
    model = in_memory(CAUSAL[name](), None, planes=2, lm_head_bits=bits[0], embedding_bits=bits[1])
    head = model.get_output_embeddings()
    untied = head.in_features * head.out_features if model.config.quantization_config.untied else 0  # a second matrix
    assert counts(model)[::2] == [whole + untied, inner + untied]


@pytest.mark.parametrize("tied", [False, True])
def test_what_learns_is_counted_as_what_it_is(tied):
    twin = tiny_llama(tied=tied)
    config = MPQConfig(bits=4, group_size=32, lm_head_bits=8, embedding_bits=8)
    model = MPQQuantizer(config).quantize_model(tiny_llama(tied=tied))
    assert counts(model)[::2] == counts(twin)[::2]
    model.requires_grad_(False)
    assert counts(model)[1::2] == [0, 0]
    layer = model.model.layers[0].mlp.up_proj
    layer.weight.requires_grad_(True)
    assert counts(model)[1::2] == [twin.model.layers[0].mlp.up_proj.weight.numel()] * 2
    layer.weight.requires_grad_(False)
    hf_onebit.train_scales(model, ["scales"])
    scales = {id(p): p.numel() for name, p in model.named_parameters() if name.endswith("scales")}
    own = {id(p) for p in model.model.embed_tokens.parameters()}
    inner = sum(count for key, count in scales.items() if key not in own)
    assert counts(model)[1::2] == [sum(scales.values()), inner]
    assert counts(model)[::2] == [a + b for a, b in zip(counts(twin)[::2], [sum(scales.values()), inner], strict=True)]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bits", [(8, 8), (4, None), (None, 8)], ids=str)
def test_dequantize(bits, tied, tmp_path):
    model = on_load(tiny_llama(tied=tied), tmp_path / "float", lm_head_bits=bits[0], embedding_bits=bits[1])
    model.save_pretrained(tmp_path / "packed")
    expected = logits(model)
    loaded = hf_onebit.load(tmp_path / "packed", dequantize=True, dtype=torch.float32)
    plain = model.dequantize()
    same_state(loaded, plain)
    assert not packed_layers(plain)
    shared = plain.lm_head.weight is plain.model.embed_tokens.weight
    assert shared == (tied and bits == (8, 8)) == plain.config.tie_word_embeddings
    torch.testing.assert_close(logits(plain), expected, rtol=1e-5, atol=1e-5)
    plain.save_pretrained(tmp_path / "plain")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert torch.equal(logits(again), logits(plain))
    again.resize_token_embeddings(300)
    plain.resize_token_embeddings(300)
    assert plain.lm_head.weight.shape == (300, 64)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bits", [(8, 8), (4, None), (None, 8)], ids=str)
def test_resizing_is_refused_before_anything_changes(bits, tied, tmp_path):
    model = on_load(tiny_llama(tied=tied), tmp_path / "float", lm_head_bits=bits[0], embedding_bits=bits[1])
    before = copy.deepcopy(model.state_dict())
    for arguments in ({"new_num_tokens": 300}, {"pad_to_multiple_of": 64}):
        with pytest.raises(ValueError, match=r"Cannot resize .* packed .*embedding_bits=None"):
            model.resize_token_embeddings(**arguments)
    same_state_dicts(before, model.state_dict())
    assert model.config.vocab_size == 288
    assert model.resize_token_embeddings() is model.get_input_embeddings()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies_refuse_to_be_resized_themselves(copied, tmp_path):
    model = on_load(tiny_llama(), tmp_path / "float", lm_head_bits=8)
    other = copied(model)
    with pytest.raises(ValueError, match="Cannot resize"):
        other.resize_token_embeddings(300)
    assert other.resize_token_embeddings() is other.get_input_embeddings() is not model.get_input_embeddings()


def test_nothing_packed_is_trainable_after_a_load(tmp_path):
    model = on_load(tiny_llama(tied=True), tmp_path / "float", lm_head_bits=4, embedding_bits=8)
    model.save_pretrained(tmp_path / "packed")
    for loaded in (model, AutoModelForCausalLM.from_pretrained(tmp_path / "packed")):
        trainable = {name for name, p in loaded.named_parameters() if p.requires_grad}
        assert trainable
        assert all("norm" in name for name in trainable)
        loaded(input_ids=tiny_ids(), labels=tiny_ids()).loss.backward()
        assert loaded.model.layers[0].input_layernorm.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bits", [(8, 8), (4, 8)], ids=str)
@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_offload(bits, tied, place, tmp_path):
    model = on_load(tiny_llama(tied=tied), tmp_path / "float", lm_head_bits=bits[0], embedding_bits=bits[1])
    model.save_pretrained(tmp_path / "packed")
    device_map = {"model.embed_tokens": place, "model.layers": "cpu", "model.norm": "cpu", "lm_head": place}
    device_map["model.rotary_emb"] = "cpu"
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "packed", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert offloaded.lm_head.weight.is_meta == offloaded.model.embed_tokens.scales.is_meta == (place == "disk")
    assert torch.equal(logits(offloaded), logits(model))
    offloaded.save_pretrained(tmp_path / "resaved")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "resaved")), logits(model))
    auto = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", device_map="auto")
    assert torch.equal(logits(auto), logits(model))


def test_generation_from_a_packed_embedding(tmp_path):
    model = on_load(tiny_llama(tied=True), tmp_path / "float", lm_head_bits=4, embedding_bits=8)
    plain = copy.deepcopy(model).dequantize()
    options = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(tiny_ids(), **options), plain.generate(tiny_ids(), **options))


@pytest.mark.parametrize("bits", [(8, 8), (4, 8)], ids=str)
def test_models_with_and_without_a_head(bits, tmp_path):
    for tied in (False, True):
        model = on_load(tiny_llama(tied=tied), tmp_path / "float", lm_head_bits=bits[0], embedding_bits=bits[1])
        model.save_pretrained(tmp_path / "packed")
        base = AutoModel.from_pretrained(tmp_path / "packed")
        with torch.no_grad():
            assert torch.equal(base(tiny_ids()).last_hidden_state, model.model(tiny_ids()).last_hidden_state)
    # A base model knows of no tie; to load it with the head that it never had would tie floats to words.
    save_float(tiny_llama(tied=True), tmp_path / "float")
    base = AutoModel.from_pretrained(tmp_path / "float", quantization_config=OneBitConfig(embedding_bits=8))
    base.save_pretrained(tmp_path / "base")
    assert isinstance(AutoModel.from_pretrained(tmp_path / "base").embed_tokens, MPQEmbedding)
    with pytest.raises(
        ValueError, match=r"ties lm_head to model.embed_tokens, but its table does not pack them as one"
    ):
        AutoModelForCausalLM.from_pretrained(tmp_path / "base")


def test_experts_beside_a_packed_head(tmp_path):
    model = on_load(tiny_qwen3_moe(), tmp_path / "float", lm_head_bits=4, embedding_bits=4)
    coverage = on_load(tiny_qwen3_moe(), tmp_path / "float").hf_quantizer.report["coverage"]
    assert model.hf_quantizer.report["coverage"] == coverage  # of the layers, head apart


# -- with data, through the other doors -------------------------------------------------------------------------------


def test_the_head_is_weighed_by_what_it_meets():
    """Calibrated, the head's scales follow its inputs: its output error falls."""
    model, ids = tiny_llama(tied=True, seed=3), [{"input_ids": tiny_ids(1, 64, seed)} for seed in range(4)]
    with torch.no_grad():
        model.model.norm.weight.fill_(0.1)[::8] = 4.0  # so that some inputs matter more
    inputs = []
    hook = model.lm_head.register_forward_pre_hook(lambda _, args: inputs.append(args[0].reshape(-1, 64)))
    for batch in ids:
        logits(model, batch["input_ids"])
    hook.remove()
    x, weight = torch.cat(inputs), model.lm_head.weight.detach().clone()
    errors, reported = [], []
    for dataset in (None, ids):
        quantizer = OneBitQuantizer(OneBitConfig(lm_head_bits=3, dataset=dataset))
        packed = quantizer.quantize_model(copy.deepcopy(model))
        errors.append(float((x @ (packed.lm_head.dequantize() - weight).t()).norm() / (x @ weight.t()).norm()) ** 2)
        reported.append(quantizer.report["layers"]["lm_head"]["relative_output_error"])
    assert errors[1] < 0.9 * errors[0]
    assert reported[0] is None
    assert reported[1] == pytest.approx(errors[1], rel=1e-3)


def test_calibrated_on_load_and_reloaded(tmp_path):
    save_float(tiny_llama(tied=True), tmp_path / "float", tiny_tokenizer())
    (tmp_path / "text.txt").write_text(TEXT)
    config = OneBitConfig(
        lm_head_bits=4, embedding_bits=4, dataset=str(tmp_path / "text.txt"), tokenizer=tiny_tokenizer()
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.hf_quantizer.report["layers"]["lm_head"]["relative_output_error"] > 0
    hf_onebit.save(model, tmp_path / "packed", report=model.hf_quantizer.report)
    assert torch.equal(logits(hf_onebit.load(tmp_path / "packed")), logits(model))


@pytest.mark.parametrize("calibrated", [False, True])
def test_command_line(calibrated, tmp_path, capsys):
    save_float(tiny_llama(tied=True), tmp_path / "float", tiny_tokenizer())
    (tmp_path / "text.txt").write_text(TEXT)
    packed, more = str(tmp_path / "packed"), ["--calibration", str(tmp_path / "text.txt")] if calibrated else []
    heads = ["--lm-head-bits", "4", "--embedding-bits", "8", "--head-group-size", "32"]
    assert cli.main(["quantize", str(tmp_path / "float"), "-o", packed, "--preset", "closed", *heads, *more]) == 0
    shown = capsys.readouterr().out
    assert "with the output head" in shown
    assert "output head      4 bits in groups of 32: 4.500 bits per weight" in shown
    assert "embedding        8 bits in groups of 32: 8.500 bits per weight" in shown
    assert "the head has 4 bits and the embedding 8: a matrix more to store" in shown
    assert cli.main(["verify", packed]) == 0
    assert "checksums match" in capsys.readouterr().out
    assert cli.main(["inspect", packed]) == 0
    shown = capsys.readouterr().out
    assert "4 bits / 32" in shown
    assert "8 bits / 32" in shown
    assert cli.main(["inspect", packed, "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    side = json.loads((tmp_path / "packed" / "hf_onebit.json").read_text())
    for key in ("linear_bpw", "onebit_bpw", "file_bpw", "total_weights", "coverage"):
        assert info[key] == side["report"][key], key
    one_bit = sum(v["in_features"] * v["out_features"] for n, v in info["layers"].items() if n != "lm_head")
    assert info["linear_bpw"] == pytest.approx((info["onebit_bpw"] * one_bit + 4.5 * 288 * 64) / (one_bit + 288 * 64))
    assert {"lm_head.weight", "lm_head.scales", "model.embed_tokens.scales"} <= set(side["tensors"])
    assert cli.main(["eval", packed, "--data", str(tmp_path / "text.txt"), "--context", "64", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["perplexity"] > 1
    stored = load_file(tmp_path / "packed" / "model.safetensors")
    stored["lm_head.scales"][0, 0] = float("nan")
    with safe_open(tmp_path / "packed" / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    save_file(stored, tmp_path / "packed" / "model.safetensors", metadata=metadata)
    assert cli.main(["verify", packed]) == 1
    shown = capsys.readouterr().out
    assert "tensors lm_head.scales" in shown
    assert "lm_head: 'scales' has 1 values that are inf or nan" in shown
    with pytest.raises(ValueError, match=r"lm_head\.scales holds NaN or inf"):
        AutoModelForCausalLM.from_pretrained(packed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("lm_head.scales"), "lm_head.scales is missing"),
        (lambda t: t.pop("lm_head.weight"), "lm_head.weight is missing"),
        (
            lambda t: t.update({"lm_head.zeros": t["lm_head.scales"].clone()}),
            "lm_head.zeros belongs to a layer whose entry",
        ),
        (lambda t: t.update({"lm_head.weight": t["lm_head.weight"][:4].clone()}), "lm_head.weight .* expected I32"),
        (lambda t: t.update({"x.weight": t["lm_head.weight"].clone(), "x.scales": t["lm_head.scales"].clone()}), "x.w"),
    ],
)
def test_files_that_do_not_match_their_table(change, message, tmp_path):
    model = on_load(tiny_llama(), tmp_path / "float", lm_head_bits=4, embedding_bits=8)
    model.save_pretrained(tmp_path / "packed")
    tensors = load_file(tmp_path / "packed" / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "packed" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    result = verify(tmp_path / "packed")
    assert not result["ok"]
    assert any(message.split(" ")[0].replace("\\", "") in problem for problem in result["problems"])


def test_quantizer_door_and_empty_model_door(tmp_path):
    save_float(tiny_llama(tied=True), tmp_path / "float", tiny_tokenizer())
    for bits in ((4, 8), (8, 8)):
        quantizer = OneBitQuantizer.from_pretrained(
            str(tmp_path / "float"), lm_head_bits=bits[0], embedding_bits=bits[1]
        )
        model = quantizer.quantize(tmp_path / "packed")
        assert quantizer.config.lm_head_bits == bits[0]
        config = transformers.AutoConfig.from_pretrained(tmp_path / "packed")
        del config.quantization_config
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(config)
        loaded = hf_onebit.load_quantized_model(empty, tmp_path / "packed")
        assert torch.equal(logits(loaded), logits(model))
    with torch.device("meta"):
        config.vocab_size = 290
        other = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=r"embed_tokens is 290x64 in this .* and 288x64 in"):
        hf_onebit.load_quantized_model(other, tmp_path / "packed")


def test_checkpoints_without_packed_heads_are_stored_as_before(tmp_path):
    config = OneBitConfig().to_dict()
    assert not {"lm_head_bits", "embedding_bits", "head_group_size", "untied"} & set(config)
    model = on_load(tiny_llama(), tmp_path / "float")
    assert set(model.config.quantization_config.modules["model.layers.0.mlp.up_proj"]) == {
        "method",
        "bits",
        "planes",
        "group_size",
    }


def test_opt_and_gpt2_positions_stay_float(tmp_path):
    for tiny, path in ((tiny_opt, "model.decoder.embed_positions"), (tiny_gpt2, "transformer.wpe")):
        model = on_load(tiny(), tmp_path / "float", embedding_bits=8, lm_head_bits=8)
        assert model.get_submodule(path).weight.is_floating_point()
