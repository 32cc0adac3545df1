"""The quantizer inside of Transformers: load, save, dequantize, offload, move, copy, generate."""

import copy
import io
import json
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import (
    CAUSAL,
    OTHERS,
    save_float,
    tiny_gpt2,
    tiny_ids,
    tiny_llama,
    tiny_llama_ragged,
    tiny_mamba,
    tiny_qwen3_moe,
    tiny_t5,
)
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.models.molmo2.modeling_molmo2 import Molmo2TextModel
from transformers.pytorch_utils import Conv1D

import hf_onebit
from hf_onebit import OneBitConfig, OneBitQuantizer
from hf_onebit.integrations.transformers import OneBitHfQuantizer
from hf_onebit.nn import OneBitLinear, packed_layers
from hf_onebit.storage.verification import verify

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def quantize_on_load(model, folder, dtype=torch.float32, cls=None, **options):
    """A tiny float model, saved and quantized while it loads."""
    save_float(model, folder)
    return (cls or type(model)).from_pretrained(folder, quantization_config=OneBitConfig(**options), dtype=dtype)


@torch.no_grad()
def logits(model, ids=None):
    ids = tiny_ids() if ids is None else ids
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    return model(input_ids=ids, **more).logits


def same_state(one, other):
    one, other = one.state_dict(), other.state_dict()
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype, name
        assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize("name", [*CAUSAL, *OTHERS])
@pytest.mark.parametrize("planes", [1, 2])
def test_reload_is_bit_exact(name, planes, tmp_path):
    model = quantize_on_load({**CAUSAL, **OTHERS}[name](), tmp_path / "float", planes=planes)
    assert packed_layers(model)
    model.save_pretrained(tmp_path / "packed")
    again = type(model).from_pretrained(tmp_path / "packed")
    same_state(model, again)
    assert torch.equal(logits(model), logits(again))
    again.save_pretrained(tmp_path / "packed-again")
    first, second = (load_file(tmp_path / folder / "model.safetensors") for folder in ("packed", "packed-again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_reload_is_bit_exact_in_every_dtype_and_sharded(dtype, tied, tmp_path):
    model = quantize_on_load(tiny_llama_ragged(tied=tied), tmp_path / "float", dtype)
    model.save_pretrained(tmp_path / "packed", max_shard_size="20KB")
    assert len(list((tmp_path / "packed").glob("*.safetensors"))) > 1
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=dtype)
    same_state(model, again)
    assert torch.equal(logits(model), logits(again))


def test_files_hold_packed_words_and_half_scales(tmp_path):
    model = quantize_on_load(tiny_llama_ragged(), tmp_path / "float", torch.bfloat16)
    model.save_pretrained(tmp_path / "packed")
    with safe_open(tmp_path / "packed" / "model.safetensors", "pt") as file:
        q = "model.layers.0.self_attn.q_proj"
        assert file.get_tensor(f"{q}.weight").dtype == torch.int32
        assert file.get_tensor(f"{q}.weight").shape == (3, 72)
        assert file.get_tensor(f"{q}.a").dtype == file.get_tensor(f"{q}.b").dtype == torch.float16
        assert file.metadata()["quant_library"] == "hf_onebit"
        assert file.metadata()["quant_format_version"] == "1"
    stored = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert stored["modules"][q] == {"method": "onebit", "bits": 1, "planes": 1, "group_size": None}
    assert not {"dataset", "tokenizer", "dequantize"} & set(stored)


@pytest.mark.parametrize("stored", DTYPES, ids=str)
@pytest.mark.parametrize("loaded", DTYPES, ids=str)
def test_scales_stay_half_at_every_load_dtype(stored, loaded, tmp_path):
    quantize_on_load(tiny_llama(), tmp_path / "float", stored).save_pretrained(tmp_path / "packed")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=loaded)
    layer = model.model.layers[0].mlp.down_proj
    assert layer.a.dtype == layer.b.dtype == torch.float16
    assert model.model.norm.weight.dtype == loaded
    assert logits(model).dtype == loaded


def test_nothing_packed_is_trainable_after_a_load(tmp_path):
    model = quantize_on_load(tiny_llama(bias=True), tmp_path / "float")
    model.save_pretrained(tmp_path / "packed")
    for loaded in (model, AutoModelForCausalLM.from_pretrained(tmp_path / "packed")):
        trainable = {name for name, p in loaded.named_parameters() if p.requires_grad}
        assert not {n for n in trainable if n.endswith((".a", ".b")) or ("proj.weight" in n)}
        assert "model.layers.0.self_attn.q_proj.bias" in trainable
        assert "model.norm.weight" in trainable


def test_dequantize(tmp_path):
    model = quantize_on_load(tiny_llama_ragged(bias=True), tmp_path / "float")
    expected, layer = logits(model), model.model.layers[0].self_attn.q_proj
    weight = layer.dequantize()
    model.save_pretrained(tmp_path / "packed")
    dequantized = model.dequantize()
    assert type(dequantized.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    assert torch.equal(dequantized.model.layers[0].self_attn.q_proj.weight, weight)
    torch.testing.assert_close(logits(dequantized), expected, rtol=1e-5, atol=1e-5)
    assert not hasattr(dequantized.config, "quantization_config")
    dequantized.save_pretrained(tmp_path / "plain")
    assert not packed_layers(AutoModelForCausalLM.from_pretrained(tmp_path / "plain"))

    loaded = hf_onebit.load(tmp_path / "packed", dequantize=True, dtype=torch.float32)
    assert not packed_layers(loaded)
    same_state(loaded, dequantized)
    assert not hasattr(loaded.config, "quantization_config")


def test_gpt2_dequantizes_to_its_own_class(tmp_path):
    model = quantize_on_load(tiny_gpt2(), tmp_path / "float")
    expected = logits(model)
    assert len(packed_layers(model)) == 8
    model.save_pretrained(tmp_path / "packed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert torch.equal(logits(again), expected)
    plain = again.dequantize()
    assert type(plain.transformer.h[0].attn.c_attn) is Conv1D
    torch.testing.assert_close(logits(plain), expected, rtol=1e-5, atol=1e-5)


def test_automodel_without_the_head_and_back(tmp_path):
    quantize_on_load(tiny_llama(), tmp_path / "float").save_pretrained(tmp_path / "packed")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    base = AutoModel.from_pretrained(tmp_path / "packed")
    assert len(packed_layers(base)) == len(packed_layers(whole)) == 14
    ids = tiny_ids()
    with torch.no_grad():
        assert torch.equal(base(ids).last_hidden_state, whole.model(ids).last_hidden_state)
    base.save_pretrained(tmp_path / "base")
    with_head = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    for name, layer in packed_layers(with_head).items():
        assert torch.equal(layer.weight, whole.get_submodule(name).weight)


def test_a_packed_head_is_left_out_where_the_model_has_none(tmp_path):
    model = quantize_on_load(tiny_llama(), tmp_path / "float", modules_to_not_convert=[])
    assert isinstance(model.lm_head, OneBitLinear)
    model.save_pretrained(tmp_path / "packed")
    assert len(packed_layers(AutoModel.from_pretrained(tmp_path / "packed"))) == 14
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "packed")), logits(model))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("cls", [AutoModel, AutoModelForSequenceClassification])
@pytest.mark.parametrize("save", ["save_pretrained", "hf_onebit.save"])
def test_a_model_that_was_loaded_without_its_packed_head_is_saved_without_it(cls, save, tied, tmp_path):
    bits = {"lm_head_bits": 4, "embedding_bits": 4}
    model = quantize_on_load(tiny_llama(tied=tied), tmp_path / "float", **bits)
    assert (model.config.quantization_config.modules["lm_head"].get("tied_to") is not None) == tied
    model.save_pretrained(tmp_path / "packed")
    headless = cls.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    if save == "save_pretrained":
        headless.save_pretrained(tmp_path / "again")
    else:
        hf_onebit.save(headless, tmp_path / "again")
    assert verify(tmp_path / "again")["ok"]
    again = cls.from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert "lm_head" not in again.config.quantization_config.modules
    assert packed_layers(again).keys() == packed_layers(headless).keys()
    for (name, one), other in zip(headless.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


def test_classifier_head_stays_float_and_new_heads_load(tmp_path):
    save_float(tiny_llama(), tmp_path / "float")
    model = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "float", quantization_config=OneBitConfig(), num_labels=3
    )
    assert type(model.score) is torch.nn.Linear
    assert len(packed_layers(model)) == 14
    assert torch.isfinite(logits(model)).all()


@pytest.mark.parametrize("quantized_first", [True, False])
def test_dict_config_works(quantized_first, tmp_path):
    save_float(tiny_llama(), tmp_path / "float")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "float",
        quantization_config={"quant_method": "onebit", "planes": 2} if quantized_first else OneBitConfig(planes=2),
    )
    assert {layer.planes for layer in packed_layers(model).values()} == {2}


def test_one_config_object_serves_two_models(tmp_path):
    config = OneBitConfig()
    for name, tiny in (("a", tiny_llama()), ("b", tiny_llama(layers=3))):
        save_float(tiny, tmp_path / name)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name, quantization_config=config)
        assert len(packed_layers(model)) == 7 * len(tiny.model.layers)
    assert config.modules is None


# -- what is packed ---------------------------------------------------------------------------------------------------


def test_skips(tmp_path):
    model = quantize_on_load(
        tiny_llama(), tmp_path / "float", modules_to_not_convert=["lm_head", "model.layers.0", "down_proj"]
    )
    assert all(name.startswith("model.layers.1") and "down_proj" not in name for name in packed_layers(model))
    assert len(packed_layers(model)) == 6
    assert (
        model.hf_quantizer.report["skipped"]["model.layers.1.mlp.down_proj"]["reason"]
        == "listed in modules_to_not_convert"
    )


@pytest.mark.parametrize(
    ("tiny", "skipped", "reason"),
    [
        (tiny_t5, "decoder.block.0.layer.2.DenseReluDense.wo", "kept in float32"),
        (tiny_mamba, "backbone.layers.0.mixer.x_proj", "reads its .weight"),
        (tiny_mamba, "backbone.layers.0.mixer.dt_proj", "fewer than 32"),
        (lambda: tiny_llama(tied=True), "lm_head", "tied"),
        (tiny_llama, "lm_head", "output head"),
    ],
)
def test_what_stays_float_and_why(tiny, skipped, reason, tmp_path):
    model = quantize_on_load(tiny(), tmp_path / "float")
    assert reason in model.hf_quantizer.report["skipped"][skipped]["reason"]
    assert skipped not in packed_layers(model)
    assert torch.isfinite(logits(model)).all()


def test_experts_count_in_the_coverage(tmp_path):
    whole = quantize_on_load(tiny_qwen3_moe(), tmp_path / "whole").hf_quantizer.report
    without = quantize_on_load(tiny_qwen3_moe(), tmp_path / "without", modules_to_not_convert=["lm_head", ".*experts"])
    assert whole["coverage"] == 1.0
    assert without.hf_quantizer.report["coverage"] < 0.5


# -- moving, copying, offloading --------------------------------------------------------------------------------------


def test_to_dtype_keeps_scales(tmp_path):
    model = quantize_on_load(tiny_llama(bias=True), tmp_path / "float")
    before = copy.deepcopy(model)
    casts = (
        torch.nn.Module.bfloat16,
        torch.nn.Module.half,
        lambda m: m.to(torch.bfloat16),
        lambda m: m.to("cpu", torch.float32),
    )
    for cast in casts:
        cast(model)
        layer = model.model.layers[0].self_attn.q_proj
        assert layer.a.dtype == layer.b.dtype == torch.float16
        assert layer.bias.dtype == model.model.norm.weight.dtype
        assert torch.equal(layer.a, before.model.layers[0].self_attn.q_proj.a)
    assert logits(model).dtype == torch.float32


def test_deepcopy_pickle_and_state_dict(tmp_path):
    model = quantize_on_load(tiny_llama(), tmp_path / "float")
    expected = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), expected)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    other = quantize_on_load(tiny_llama(seed=1), tmp_path / "other")
    assert not torch.equal(logits(other), expected)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True), strict=True)
    assert torch.equal(logits(other), expected)
    assigned = quantize_on_load(tiny_llama(seed=1), tmp_path / "assigned")
    assigned.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    assert torch.equal(logits(assigned), expected)


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_offload_of_packed_checkpoints(place, tmp_path):
    quantize_on_load(tiny_llama(), tmp_path / "float").save_pretrained(tmp_path / "packed")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    device_map = {
        "model.embed_tokens": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": place,
        "model.norm": "cpu",
    }
    device_map |= {"lm_head": "cpu", "model.rotary_emb": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "packed", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert model.model.layers[1].mlp.up_proj.weight.is_meta == (place == "disk")
    assert torch.equal(logits(model), logits(whole))
    model.save_pretrained(tmp_path / "resaved")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "resaved")), logits(whole))


def test_device_map_auto(tmp_path):
    quantize_on_load(tiny_llama(), tmp_path / "float").save_pretrained(tmp_path / "packed")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    auto = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", device_map="auto")
    assert torch.equal(logits(auto), logits(whole))
    tight = AutoModelForCausalLM.from_pretrained(
        tmp_path / "packed",
        device_map="auto",
        max_memory={"cpu": "60KB"},
        offload_folder=tmp_path / "offload",
    )
    assert "disk" in tight.hf_device_map.values()
    assert torch.equal(logits(tight), logits(whole))
    on_load = AutoModelForCausalLM.from_pretrained(
        tmp_path / "float", device_map="auto", quantization_config=OneBitConfig()
    )
    assert torch.equal(logits(on_load), logits(whole))


def test_generate_and_cache_positions(tmp_path):
    model = quantize_on_load(tiny_llama(), tmp_path / "float")
    ids = tiny_ids(rows=1, tokens=5)
    options = {"max_new_tokens": 8, "do_sample": False}
    with_cache = model.generate(ids, **options)
    without = model.generate(ids, use_cache=False, **options)
    static = model.generate(ids, cache_implementation="static", **options)
    assert with_cache.shape == (1, 13)
    assert torch.equal(with_cache, without)
    assert torch.equal(with_cache, static)


def test_compiles_whole(tmp_path):
    model = quantize_on_load(tiny_llama(), tmp_path / "float")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(logits(compiled), logits(model), rtol=1e-5, atol=1e-5)


def test_gradients_flow_through_a_packed_model(tmp_path):
    model = quantize_on_load(tiny_llama(), tmp_path / "float")
    plain = copy.deepcopy(model).dequantize()
    ids = tiny_ids()
    for m in (model, plain):
        m(input_ids=ids, labels=ids).loss.backward()
    torch.testing.assert_close(
        model.model.embed_tokens.weight.grad, plain.model.embed_tokens.weight.grad, rtol=1e-3, atol=1e-6
    )


# -- registration and the missing plug-in -----------------------------------------------------------------------------


def test_registering_again_changes_nothing():
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    from hf_onebit.integrations.transformers import register

    register()
    assert AUTO_QUANTIZER_MAPPING["onebit"] is OneBitHfQuantizer


def test_registering_over_a_stranger_is_refused(monkeypatch):
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, HqqHfQuantizer

    from hf_onebit.integrations.transformers import register

    monkeypatch.setitem(AUTO_QUANTIZER_MAPPING, "onebit", HqqHfQuantizer)
    with pytest.raises(RuntimeError, match="already has a quantization method 'onebit'"):
        register()


@pytest.mark.parametrize("tiny", [tiny_llama, tiny_gpt2, tiny_qwen3_moe], ids=["llama", "gpt2", "qwen3-moe"])
def test_without_the_package_loading_fails_loudly(tiny, tmp_path):
    quantize_on_load(tiny(), tmp_path / "float").save_pretrained(tmp_path / "packed")
    script = """
        import sys
        from transformers import AutoModelForCausalLM
        assert "hf_onebit" not in sys.modules
        AutoModelForCausalLM.from_pretrained(sys.argv[1])
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "packed")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode != 0
    assert "MISMATCH" in done.stderr or "size mismatch" in done.stderr
    assert "RuntimeError" in done.stderr


def test_trainer_gates(tmp_path):
    from transformers.trainer_utils import validate_quantization_for_training

    model = quantize_on_load(tiny_llama(), tmp_path / "float")
    validate_quantization_for_training(model)  # raises where a method cannot be trained
    attached = OneBitQuantizer().quantize_model(tiny_llama())
    validate_quantization_for_training(attached)


def test_attached_models_equal_loaded_ones(tmp_path):
    """Quantizing in memory and while loading lead to the same model, in the eyes of Transformers too."""
    loaded = quantize_on_load(tiny_llama(), tmp_path / "float")
    attached = OneBitQuantizer().quantize_model(tiny_llama())
    same_state(loaded, attached)
    for model in (loaded, attached):
        assert model.is_quantized
        assert model.quantization_method == "onebit"
        assert model.hf_quantizer.pre_quantized
        assert model.config._is_quantized
    assert loaded.config.quantization_config.to_dict() == attached.config.quantization_config.to_dict()
    attached.save_pretrained(tmp_path / "attached")
    same_state(AutoModelForCausalLM.from_pretrained(tmp_path / "attached"), loaded)
    assert AutoConfig.from_pretrained(tmp_path / "attached").quantization_config["quant_method"] == "onebit"


def test_push_to_hub_uploads_a_loadable_folder(tmp_path, monkeypatch):
    import shutil
    import types

    import transformers.utils.hub as hub

    uploads = []

    class StandIn:
        """Takes the place of the hub's client: keeps what would be uploaded."""

        def create_repo(self, repo_id, **options):
            return types.SimpleNamespace(repo_id=repo_id)

        def create_commit(self, repo_id, operations, **options):
            target = tmp_path / "uploaded"
            target.mkdir(exist_ok=True)
            for operation in operations:
                if isinstance(operation.path_or_fileobj, (str, bytes)) and not isinstance(
                    operation.path_or_fileobj, bytes
                ):
                    shutil.copy(operation.path_or_fileobj, target / operation.path_in_repo)
            uploads.append(sorted(o.path_in_repo for o in operations))

        def create_branch(self, **options):
            return None

    model = quantize_on_load(tiny_llama(), tmp_path / "float")
    for module in (hub, sys.modules["transformers.modeling_utils"]):
        if hasattr(module, "hf_api"):
            monkeypatch.setattr(module, "hf_api", lambda *a, **k: StandIn())
    for name in ("create_repo", "create_commit", "create_branch"):
        if hasattr(hub, name):
            monkeypatch.setattr(hub, name, getattr(StandIn(), name))
    monkeypatch.setattr(
        hub,
        "create_and_tag_model_card",
        lambda *a, **k: types.SimpleNamespace(save=lambda *a, **k: None),
        raising=False,
    )
    model.push_to_hub("somebody/tiny-onebit")
    assert len(uploads) == 1
    assert {"config.json", "model.safetensors"} <= set(uploads[0])
    same_state(AutoModelForCausalLM.from_pretrained(tmp_path / "uploaded"), model)


def test_models_that_rename_or_split_matrices_between_file_and_memory(tmp_path):
    """One fused matrix in the float file, three layers in memory: the packed file holds the layers as they are."""
    import transformers

    from hf_onebit.inspection import inspect
    from hf_onebit.storage.verification import verify

    text_config = transformers.Molmo2TextConfig(
        vocab_size=100,
        additional_vocab_size=4,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=64,
    )
    nomic_config = transformers.NomicBertConfig(
        vocab_size=100, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    for cls, config, fused in (
        (transformers.NomicBertModel, nomic_config, "Wqkv"),
        (Molmo2TextModel, text_config, "att_proj"),
    ):
        torch.manual_seed(0)
        model, folder = cls(config).eval(), tmp_path / cls.__name__
        model.save_pretrained(folder / "float")
        with safe_open(folder / "float" / "model.safetensors", "pt") as file:
            assert any(fused in key for key in file.keys())  # noqa: SIM118
        loaded = cls.from_pretrained(folder / "float", quantization_config=OneBitConfig())
        in_memory = OneBitQuantizer().quantize_model(copy.deepcopy(model))
        same_state(loaded, in_memory)
        ids = torch.arange(10)[None]
        with torch.no_grad():
            expected = loaded(ids).last_hidden_state
        for number, packed in enumerate((loaded, in_memory)):
            packed.save_pretrained(folder / str(number))
            again = cls.from_pretrained(folder / str(number))
            again.save_pretrained(folder / f"{number}-again")
            with torch.no_grad():
                assert torch.equal(again(ids).last_hidden_state, expected)
                twice = cls.from_pretrained(folder / f"{number}-again")
                assert torch.equal(twice(ids).last_hidden_state, expected)
        assert verify(folder / "0")["ok"]
        assert inspect(folder / "0")["coverage"] == 1.0
        assert len(inspect(folder / "0")["layers"]) == len(packed_layers(loaded))
        (folder / "0" / "config.json").write_text(
            (folder / "0" / "config.json").read_text().replace("layers.0.self_attn.o_proj", "layers.9.self_attn.o_proj")
        )
        with pytest.raises(ValueError, match="does not have"):
            cls.from_pretrained(folder / "0")
