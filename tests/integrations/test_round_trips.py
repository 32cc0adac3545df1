"""Every architecture, by both methods, tied and not, in one file and in many: the same logits to the bit, and every
parameter of the float model accounted for by name."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from architectures import ARCHITECTURES
from safetensors import safe_open
from torch import Tensor

import hf_onebit
from hf_onebit import MPQConfig, MPQQuantizer, OneBitConfig, OneBitQuantizer
from hf_onebit.formats.table import TableEntry
from hf_onebit.nn import packed_layers
from hf_onebit.nn.experts import separate_experts, separated
from hf_onebit.nn.roles import linear_shape
from hf_onebit.progress import logger

# The quickest search: what matters here are names and bytes.
CONFIGS = {"onebit": OneBitConfig(), "mpq": MPQConfig(bits=4, group_size=32, search="min-max")}
CASES = [(name, tied, method) for name, about in ARCHITECTURES.items() for tied in about.ties for method in CONFIGS]
TEXT = "The little boat drifted down the river until the sun had set behind the hills. " * 20


@torch.no_grad()
def logits(model: Any, name: str) -> Tensor:
    # Tensors begin anywhere in a file, and where a float matrix lies in memory changes the order of its sums.
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    result: Tensor = getattr(model(**ARCHITECTURES[name].inputs()), ARCHITECTURES[name].output)
    return result


def stored_keys(folder: Path) -> set[str]:
    keys: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            keys |= set(opened.keys())
    return keys


def audit(float_model: Any, packed: Any, folder: Path) -> list[str]:
    """What the checkpoint of a packed model does not account for, by name: nothing, if all is well.

    Every parameter and buffer of the float model is packed according to the table, or is in the packed model with the
    same bits; a linear weight that stayed float has a reason in the report; the packed model has nothing else; and the
    files hold each of its tensors, or that of the one that it is tied to.
    """
    if separated(packed):
        separate_experts(float_model)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    table = {name: TableEntry.from_dict(entry) for name, entry in config["modules"].items()}
    skipped = packed.hf_quantizer.report["skipped"]
    was, now = (dict(model.state_dict()) for model in (float_model, packed))
    faults, seen = [], set()
    for name, value in was.items():
        owner, _, tensor = name.rpartition(".")
        if owner in table and tensor == "weight":
            expected = {f"{owner}.{packed_name}" for packed_name in table[owner].tensor_names}
            faults += [f"{key}: packed, but missing" for key in expected - now.keys()]
            seen |= expected
            continue
        seen.add(name)
        if name not in now or not torch.equal(now[name], value):
            faults.append(f"{name}: float, but {'changed' if name in now else 'missing'}")
        elif tensor == "weight" and linear_shape(float_model.get_submodule(owner)) and owner not in skipped:
            faults.append(f"{name}: float without a reason")
    faults += [f"{name}: of no parameter of the float model" for name in now.keys() - seen]
    ties = getattr(packed, "all_tied_weights_keys", None) or {}
    own = {ties.get(name, name) for name in now}
    if len(stored_keys(folder)) != len(own):
        faults.append(f"{len(stored_keys(folder))} tensors in the files for {len(own)} of the model")
    return faults


@pytest.mark.parametrize(("name", "tied", "method"), CASES)
def test_round_trip(name: str, tied: bool, method: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    about, config = ARCHITECTURES[name], CONFIGS[method]
    float_model = about.make(tied)
    float_model.save_pretrained(tmp_path / "float")
    with caplog.at_level(logging.INFO, logger=logger.name):
        model = type(float_model).from_pretrained(tmp_path / "float", quantization_config=config, dtype=torch.float32)
    said = [record for record in caplog.records if record.getMessage().startswith("Packed ")]
    assert len(said) == 1
    assert (said[0].levelno == logging.WARNING) == (model.hf_quantizer.report["coverage"] < 0.9)
    assert (model.hf_quantizer.report["coverage"] >= 0.9) == about.covered
    expected = logits(model, name)
    assert torch.isfinite(expected).all()

    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="30KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    assert stored_keys(tmp_path / "one") == stored_keys(tmp_path / "many")
    for folder in ("one", "many"):
        again, found = type(model).from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not any(found.values()), found
        assert torch.equal(logits(again, name), expected)
        assert len(packed_layers(again)) == len(packed_layers(model))
    again.save_pretrained(tmp_path / "again")
    assert stored_keys(tmp_path / "again") == stored_keys(tmp_path / "one")
    assert audit(float_model, model, tmp_path / "one") == []


def test_the_audit_sees_what_is_wrong(tmp_path: Path) -> None:
    model = tiny.tiny_llama()
    OneBitQuantizer().quantize_model(packed := tiny.tiny_llama())
    packed.hf_quantizer.report = {"skipped": {}}
    packed.save_pretrained(tmp_path)
    packed.model.norm.weight.data += 1
    packed.model.layers[0].self_attn.q_proj.a = None
    packed.model.layers[0].mlp.extra = torch.nn.Linear(2, 2, bias=False)
    assert sorted(audit(model, packed, tmp_path)) == [
        "lm_head.weight: float without a reason",
        "model.layers.0.mlp.extra.weight: of no parameter of the float model",
        "model.layers.0.self_attn.q_proj.a: packed, but missing",
        "model.norm.weight: float, but changed",
    ]


@pytest.mark.parametrize("name", [name for name, about in ARCHITECTURES.items() if about.calibrates])
def test_calibrated_models_reload_too(name: str, tmp_path: Path) -> None:
    """On the quantized prefix, by mpq, whose preset `fast` takes a second; signs go through the same walk."""
    model = ARCHITECTURES[name].make(ARCHITECTURES[name].ties[-1])
    options: dict[str, Any] = {"dataset": [TEXT], "calibration_tokens": 128, "calibration_context": 32}
    quantizer = MPQQuantizer(bits=4, group_size=32, preset="fast", **options)
    quantizer.quantize_model(model, tiny.tiny_tokenizer())
    report = quantizer.report
    assert report is not None
    assert set(report["fit"]["layers"]) == set(report["layers"])
    assert [record["relative_output_error"] for record in report["layers"].values()].count(None) < len(report["layers"])
    expected = logits(model, name)
    quantizer.save(model, tmp_path / "packed")
    again = type(model).from_pretrained(tmp_path / "packed")
    assert torch.equal(logits(again, name), expected)


@pytest.mark.parametrize("name", [name for name, about in ARCHITECTURES.items() if not about.calibrates])
def test_what_the_walk_does_not_know_is_refused_with_a_way_out(name: str, tmp_path: Path) -> None:
    model = ARCHITECTURES[name].make(False)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"preset='closed'.*--preset closed"):
        MPQQuantizer(preset="fast", dataset=[TEXT]).quantize_model(model, tiny.tiny_tokenizer())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not packed_layers(model)
    if model.main_input_name != "input_ids":
        model.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"calibration data is text"):
            type(model).from_pretrained(tmp_path, quantization_config=MPQConfig(preset="fast", dataset=[TEXT]))


@pytest.mark.parametrize("name", ["wav2vec2", "clip"])
@pytest.mark.parametrize("method", CONFIGS)
def test_models_without_a_token_embedding_in_memory(name: str, method: str, tmp_path: Path) -> None:
    model = ARCHITECTURES[name].make(False)
    with pytest.raises(NotImplementedError):
        model.get_input_embeddings()
    quantizer = (OneBitQuantizer if method == "onebit" else MPQQuantizer).from_pretrained(model, config=CONFIGS[method])
    quantizer.quantize(tmp_path / "packed")
    assert packed_layers(model)
    assert torch.equal(logits(hf_onebit.load(tmp_path / "packed"), name), logits(model, name))


def test_clip_is_not_calibrated() -> None:
    """It reads ids, but beside pixels, and which ids it knows cannot be asked."""
    model = ARCHITECTURES["clip"].make(False)
    expected = r"CLIPModel has no token embedding.*without data \(preset='closed' and dataset=None; --preset closed\)"
    for config in (OneBitConfig(dataset=[TEXT]), OneBitConfig(preset="fast")):
        with pytest.raises(ValueError, match=expected):
            OneBitQuantizer(config).quantize_model(model, tiny.tiny_tokenizer())
    assert not packed_layers(model)


def test_towers_can_be_packed_on_request(tmp_path: Path) -> None:
    model = ARCHITECTURES["llava"].make(False)
    OneBitQuantizer(modules_to_not_convert=["lm_head"]).quantize_model(model)
    packed = packed_layers(model)
    assert any("vision_tower" in name for name in packed)
    assert any("multi_modal_projector" in name for name in packed)
    expected = logits(model, "llava")
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path), "llava"), expected)


@pytest.mark.parametrize("name", ["gpt2", "nomic-bert", "qwen3-moe", "mixtral", "gpt-oss", "llava"])
def test_dequantized_models_save_as_float_ones(name: str, tmp_path: Path) -> None:
    """Also where names or layouts in the files are not those in memory."""
    float_model = ARCHITECTURES[name].make(False)
    float_model.save_pretrained(tmp_path / "float")
    model = type(float_model).from_pretrained(tmp_path / "float", quantization_config=CONFIGS["mpq"])
    model.save_pretrained(tmp_path / "packed")
    again = type(model).from_pretrained(tmp_path / "packed").dequantize()
    expected = logits(again, name)
    torch.testing.assert_close(expected, logits(model, name), rtol=1e-4, atol=1e-5)
    again.save_pretrained(tmp_path / "plain")
    loaded, found = type(model).from_pretrained(tmp_path / "plain", output_loading_info=True)
    assert not any(found.values())
    torch.testing.assert_close(logits(loaded, name), expected, rtol=1e-5, atol=1e-6)
    if name != "nomic-bert":  # whose q, k and v are saved apart from then on
        assert stored_keys(tmp_path / "plain") == stored_keys(tmp_path / "float")


@pytest.mark.parametrize(("name", "method"), [("llama", "mpq"), ("gpt2", "mpq"), ("qwen3-moe", "onebit")])
def test_automatic_device_maps_with_disk(name: str, method: str, tmp_path: Path) -> None:
    float_model = ARCHITECTURES[name].make(False)
    float_model.save_pretrained(tmp_path / "float")
    model = type(float_model).from_pretrained(tmp_path / "float", quantization_config=CONFIGS[method])
    model.save_pretrained(tmp_path / "packed")
    memory = {"cpu": int(0.9 * sum(tensor.nbytes for tensor in model.state_dict().values()))}
    options = {"device_map": "auto", "max_memory": memory, "offload_folder": tmp_path / "offload"}
    again = type(model).from_pretrained(tmp_path / "packed", **options)
    assert set(again.hf_device_map.values()) == {"cpu", "disk"}
    assert torch.equal(logits(again, name), logits(model, name))
