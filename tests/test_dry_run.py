"""Plans of models of all kinds, which leave the model as it was."""

import pytest
import torch
from architectures import ARCHITECTURES
from tiny import tiny_ids, tiny_llama, tiny_mixtral, tiny_qwen3_moe

from hf_onebit import MPQConfig, MPQQuantizer, OneBitConfig, OneBitQuantizer
from hf_onebit.dry_run import dry_run


@pytest.mark.parametrize("make", [tiny_mixtral, tiny_qwen3_moe])
@pytest.mark.parametrize("preset", ["closed", "fast"])
def test_experts_are_joined_again(make, preset):
    """Planning gives each expert's matrices layers of their own."""
    model = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]
    dataset = None if preset == "closed" else [{"input_ids": tiny_ids(1, 64, seed)[0].tolist()} for seed in range(4)]
    planned = dry_run(OneBitQuantizer.from_pretrained(model, config=OneBitConfig(preset=preset, dataset=dataset)))
    assert any(".experts.0." in name for name in planned["layers"])
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert [type(module) for module in model.modules()] == kinds


def test_a_plan_that_fails_leaves_the_model_too():
    model = tiny_mixtral()
    names = set(model.state_dict())
    rows = [{"input_ids": [10**6] * 8}]  # ids that the model does not know
    quantizer = OneBitQuantizer.from_pretrained(model, config=OneBitConfig(preset="closed", dataset=rows))
    with pytest.raises(ValueError, match="token id"):
        dry_run(quantizer)
    assert set(model.state_dict()) == names


@pytest.mark.parametrize("name", ["vit", "wav2vec2", "clip", "whisper"])
@pytest.mark.parametrize("low_memory", [None, True])
def test_models_that_read_no_text(name, low_memory, tmp_path):
    """What they are given is in no table of vectors: ViT's patches go through a convolution."""
    ARCHITECTURES[name].make(False).save_pretrained(tmp_path / "float")
    quantizer = OneBitQuantizer.from_pretrained(tmp_path / "float", config=OneBitConfig(low_memory=low_memory))
    planned = dry_run(quantizer, tmp_path)
    assert planned["layers"]
    assert planned["preflight"]["seconds"] > 0
    assert planned["preflight"]["memory_bytes"] > planned["preflight"]["disk_bytes"] > 0


@pytest.mark.parametrize("name", ["vit", "wav2vec2", "clip"])
def test_automatic_bits_of_models_that_read_no_text(name, tmp_path):
    """By weights alone, which takes the float model whole and no tokens."""
    model = ARCHITECTURES[name].make(False)
    model.save_pretrained(tmp_path / "float")
    config = MPQConfig(bits="auto", target_bpw=4.4)
    planned = dry_run(MPQQuantizer.from_pretrained(tmp_path / "float", config=config), tmp_path)
    assert planned["linear_bpw"] <= 4.4
    packed = MPQQuantizer.from_pretrained(tmp_path / "float", config=config)
    packed.quantize(tmp_path / "packed")
    assert packed.report["allocation"] == planned["allocation"]


def test_the_handed_model_is_refused_as_by_the_run_where_a_part_is_offloaded():
    model = tiny_llama()
    model.model.embed_tokens.to("meta")  # its first parameter
    for run in (dry_run, lambda quantizer: quantizer.quantize_model(model)):
        with pytest.raises(ValueError, match=r"in part \(1 parameter, the first is model\.embed_tokens\.weight"):
            run(OneBitQuantizer.from_pretrained(model, config=OneBitConfig()))
