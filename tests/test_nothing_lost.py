"""What a save would replace or leave out, and models that are not what they seem: refused before anything is done."""

import json

import peft
import pytest
import torch
from tiny import tiny_ids, tiny_llama

import hf_onebit
from hf_onebit import MPQConfig, MPQQuantizer, OneBitConfig, OneBitQuantizer
from hf_onebit.nn.adapters import adapted_modules
from hf_onebit.storage.checkpoint import check_replaceable
from hf_onebit.storage.verification import verify

LORA = peft.LoraConfig(r=2, target_modules=["up_proj", "q_proj"])


def packed(**options):
    return MPQQuantizer(MPQConfig(bits=4, **options)).quantize_model(tiny_llama())


@pytest.fixture
def folder(tmp_path):
    """An older packed checkpoint."""
    hf_onebit.save(packed(), tmp_path / "model")
    return tmp_path / "model"


def held(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("how", ["get_peft_model", "add_adapter", "get_base_model"])
def test_a_model_with_adapters_is_not_saved_over_a_packed_one(folder, how):
    before, model = held(folder), hf_onebit.load(folder)
    if how == "add_adapter":
        model.add_adapter(LORA)
        adapted = model
    else:
        adapted = peft.get_peft_model(model, LORA)
        if how == "get_base_model":
            adapted = adapted.get_base_model()
    with pytest.raises(ValueError, match=r"has adapters \(on .* modules, the first is .*model.unload\(\)"):
        hf_onebit.save(adapted, folder)
    assert held(folder) == before


def test_a_model_whose_adapter_was_taken_off_is_saved(folder):
    adapted = peft.get_peft_model(hf_onebit.load(folder), LORA)
    assert len(adapted_modules(adapted)) == 1 + 4  # two layers of each block, and PEFT's model around all
    model = adapted.unload()
    assert not adapted_modules(model)
    hf_onebit.save(model, folder)
    assert verify(folder)["ok"]
    with torch.no_grad():
        assert torch.equal(hf_onebit.load(folder)(tiny_ids()).logits, packed()(tiny_ids()).logits)


@pytest.mark.parametrize("how", ["add_adapter", "get_base_model"])
def test_a_float_model_with_adapters_is_not_quantized(how):
    model = tiny_llama()
    if how == "add_adapter":
        model.add_adapter(LORA)
    else:
        model = peft.get_peft_model(model, LORA).get_base_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for quantizer in (MPQQuantizer(MPQConfig(bits=4)), OneBitQuantizer(OneBitConfig())):
        with pytest.raises(ValueError, match=r"has adapters .*Merge them into it or unload them first"):
            quantizer.quantize_model(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", [".git/HEAD", "checkpoint-10/optimizer.pt", "train.csv", "model-q4.gguf"])
def test_files_that_are_no_part_of_a_checkpoint_are_not_lost(folder, name):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("mine")
    quantizer = MPQQuantizer.from_pretrained(tiny_llama(), config=MPQConfig(bits=4))
    for save in (lambda: hf_onebit.save(packed(), folder), lambda: quantizer.quantize(folder)):
        with pytest.raises(ValueError, match=rf"holds 1 other files or folders.*the first is {name.split('/')[0]}\)"):
            save()
    assert (folder / name).read_text() == "mine"


def test_what_checkpoints_and_reports_are_made_of_may_go(folder):
    for name in (
        "report/report.json",
        ".cache/huggingface/x",
        "tokenizer.json",
        "vocab.txt",
        "LICENSE",
        ".gitattributes",
        "additional_chat_templates/tool_use.jinja",
        "source.spm",  # Marian's
        "target.spm",
        "bpe.codes",
        "vocab",
        "prophetnet.tokenizer",
        ".README.md.partial",  # a write that was killed
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    hf_onebit.save(packed(), folder)
    for name in ("report", ".cache", ".README.md.partial"):
        assert not (folder / name).exists()
    assert (folder / "vocab.txt").exists()  # a save without a tokenizer keeps the one of the same model


def test_what_a_checkpoint_says_is_its_own_may_go_and_no_more(folder):
    side = json.loads((folder / "hf_onebit.json").read_text())
    for name in ("voice.bin", "voices/one.bin"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("saved with it")
        side["files"][name] = {"bytes": 13, "sha256": ""}
    (folder / "hf_onebit.json").write_text(json.dumps(side))
    check_replaceable(folder, packed_only=True)
    (folder / "voices" / "mine.bin").write_text("mine")
    with pytest.raises(ValueError, match=r"holds 1 other files or folders.*the first is voices\)"):
        check_replaceable(folder, packed_only=True)
    (folder / "voices" / "mine.bin").unlink()
    (folder / "hf_onebit.json").write_text("{")
    with pytest.raises(ValueError, match=r"holds 2 other files or folders.*the first is voice\.bin\)"):
        check_replaceable(folder, packed_only=True)


@pytest.mark.parametrize(
    ("quantization", "said"),
    [
        (None, "a float model"),
        ({"quant_method": "fp8"}, "a model of quantization method 'fp8'"),
        ("mpq", "a float model"),
    ],
)
def test_models_of_other_methods_are_not_lost(folder, quantization, said):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    with pytest.raises(ValueError, match=f"holds {said}, which would be lost"):
        check_replaceable(folder, packed_only=True)


@pytest.mark.parametrize("size", ["1 GiBi", "many", 0])
def test_a_size_that_is_none_is_refused_before_anything_is_quantized(tmp_path, size):
    model = tiny_llama()
    quantizer = MPQQuantizer.from_pretrained(model, config=MPQConfig(bits=4))
    for save in (quantizer.quantize, lambda folder, **given: hf_onebit.save(packed(), folder, **given)):
        with pytest.raises(ValueError, match=f"max_shard_size is {size!r}: expected a number of bytes"):
            save(tmp_path / "out", max_shard_size=size)
    assert not list(tmp_path.iterdir())
    assert all(type(module).__name__ != "MPQLinear" for module in model.modules())


def test_sizes_in_binary_units_are_taken_in_every_way(tmp_path):
    hf_onebit.save(packed(), tmp_path / "out", max_shard_size="16KiB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert verify(tmp_path / "out")["ok"]


@pytest.mark.parametrize("dataset", [None, "rows"])
@pytest.mark.parametrize("config", [OneBitConfig, MPQConfig])
def test_a_layer_of_zeros_is_saved_and_shown(tmp_path, config, dataset):
    """As pruning leaves them: there is no relative error of it."""
    model = tiny_llama()
    model.model.layers[1].self_attn.o_proj.weight.data.zero_()
    rows = None if dataset is None else [{"input_ids": row} for row in tiny_ids(rows=4).tolist()]
    quantizer = (OneBitQuantizer if config is OneBitConfig else MPQQuantizer).from_pretrained(
        model, config=config(preset="closed", dataset=rows)
    )
    quantizer.quantize(tmp_path / "out")
    side = json.loads((tmp_path / "out" / "hf_onebit.json").read_text())
    assert side["report"]["layers"]["model.layers.1.self_attn.o_proj"]["relative_weight_error"] is None
    loaded = hf_onebit.load(tmp_path / "out")
    assert not loaded.model.layers[1].self_attn.o_proj.dequantize().any()


def test_the_older_name_of_dtype_is_heard(folder):
    assert hf_onebit.load(folder, torch_dtype=torch.bfloat16).dtype == torch.bfloat16
    assert hf_onebit.load(folder, dtype=torch.float16, torch_dtype=torch.bfloat16).dtype == torch.float16


def test_files_of_a_variant_are_found(folder, tmp_path):
    hf_onebit.load(folder).save_pretrained(tmp_path / "variant", variant="fp16")
    assert (tmp_path / "variant" / "model.fp16.safetensors").is_file()
    loaded = hf_onebit.load(tmp_path / "variant", variant="fp16")
    assert torch.equal(loaded.model.layers[0].mlp.up_proj.weight, packed().model.layers[0].mlp.up_proj.weight)
