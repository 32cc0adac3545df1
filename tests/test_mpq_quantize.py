"""mpq from end to end: quantized on load and with data, saved and loaded to the bit, reported, resumed, refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import (
    save_float,
    tiny_gemma3,
    tiny_gpt2,
    tiny_ids,
    tiny_llama,
    tiny_llama_ragged,
    tiny_qwen3_moe,
    tiny_tokenizer,
)
from torch import Tensor
from transformers import AutoModelForCausalLM

import hf_onebit
from hf_onebit import MPQConfig, MPQQuantizer, OneBitConfig
from hf_onebit.algorithms.blockwise import BlockOptions
from hf_onebit.cli import main
from hf_onebit.formats.table import TableEntry
from hf_onebit.inspection import inspect
from hf_onebit.nn import MBWQLinear, MPQLinear, packed_layers
from hf_onebit.nn.replace import float_weight
from hf_onebit.quantization.planning import plan_layers
from hf_onebit.report import layer_summary, model_card
from hf_onebit.rungs.group_fitting import GroupMethod
from hf_onebit.rungs.ladder import quantize_on_prefix
from hf_onebit.storage.verification import verify

TEXT = ["The little boat drifted down the river until the sun had set behind the hills. " * 4] * 9


def tensors(model: Any) -> dict[str, Tensor]:
    return {key: value for key, value in model.state_dict().items() if value is not None}


def assert_same(one: Any, other: Any) -> None:
    first, second = tensors(one), tensors(other)
    assert list(first) == list(second)
    assert [k for k in first if not torch.equal(first[k], second[k])] == []


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(tiny_ids()).logits
    return found


@pytest.fixture(autouse=True)
def _few_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Presets distil tiny models for a moment only."""
    short = {name: replace(recipe, steps=min(recipe.steps, 6)) for name, recipe in MPQQuantizer.recipes.items()}
    monkeypatch.setattr(MPQQuantizer, "recipes", short)


@pytest.fixture(scope="module")
def float_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_float(tiny_llama(), tmp_path_factory.mktemp("float"), tiny_tokenizer())


CASES: dict[str, dict[str, Any]] = {
    "plain": {"bits": 4},
    "one bit": {"bits": 1, "group_size": 32},
    "eight bits, rows": {"bits": 8, "group_size": -1, "symmetric": True},
    "double quant": {"bits": 2, "group_size": 32, "double_quant": True},
    "double quant, symmetric": {"bits": 5, "group_size": 32, "double_quant": True, "symmetric": True},
    "min-max": {"bits": 4, "search": "min-max"},
    "half-quadratic": {"bits": 3, "search": "half-quadratic"},
    "head": {"bits": 3, "lm_head_bits": 4, "embedding_bits": 8},
    "calibrated": {"bits": 3, "dataset": TEXT, "tokenizer": tiny_tokenizer()},
    "fast": {"bits": 2, "group_size": 32, "preset": "fast", "dataset": TEXT, "tokenizer": tiny_tokenizer()},
    "act order": {
        "bits": 3,
        "group_size": 32,
        "preset": "fast",
        "dataset": TEXT,
        "tokenizer": tiny_tokenizer(),
        "act_order": True,
        "double_quant": True,
    },
    "balanced": {
        "bits": 2,
        "group_size": 32,
        "preset": "balanced",
        "dataset": TEXT,
        "tokenizer": tiny_tokenizer(),
        "double_quant": True,
        "lm_head_bits": 8,
    },
}


@pytest.mark.parametrize("case", CASES)
def test_quantized_while_loading_saved_and_loaded_it_stays_the_same_to_the_bit(
    case: str, float_dir: Path, tmp_path: Path
) -> None:
    config = MPQConfig(**CASES[case])
    model = AutoModelForCausalLM.from_pretrained(float_dir, quantization_config=config)
    model.save_pretrained(tmp_path / "one")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert_same(model, loaded)
    assert torch.equal(logits(model), logits(loaded))
    loaded.save_pretrained(tmp_path / "two")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert list(one) == list(two)
    assert all(torch.equal(one[key], two[key]) for key in one)
    report = model.hf_quantizer.report
    stored = inspect(tmp_path / "one")
    assert report["method"] == stored["method"] == "mpq"
    assert report["linear_bpw"] == pytest.approx(stored["linear_bpw"])
    assert report["onebit_bpw"] == pytest.approx(stored["onebit_bpw"])
    assert stored["coverage"] == pytest.approx(report["coverage"]) == 1.0
    assert stored["total_weights"] == report["total_weights"]
    problems = verify(tmp_path / "one")["problems"]
    assert problems == []


@pytest.mark.parametrize("case", ["plain", "double quant", "head"])
def test_streamed_and_in_memory_give_the_same_tensors(case: str, float_dir: Path) -> None:
    streamed = AutoModelForCausalLM.from_pretrained(float_dir, quantization_config=MPQConfig(**CASES[case]))
    model = AutoModelForCausalLM.from_pretrained(float_dir)
    MPQQuantizer(MPQConfig(**CASES[case])).quantize_model(model)
    assert_same(streamed, model)


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_gemma3, tiny_llama_ragged, tiny_qwen3_moe])
@pytest.mark.parametrize("preset", ["closed", "fast"])
def test_other_architectures(make: Any, preset: str, tmp_path: Path) -> None:
    save_float(make(), tmp_path / "float", tiny_tokenizer())
    quantizer = MPQQuantizer.from_pretrained(
        tmp_path / "float", bits=4, group_size=32, preset=preset, dataset=TEXT if preset == "fast" else None
    )
    model = quantizer.quantize(tmp_path / "packed")
    loaded = hf_onebit.load(tmp_path / "packed")
    assert torch.equal(logits(model), logits(loaded))
    assert all(isinstance(layer, MPQLinear) for layer in packed_layers(loaded).values())
    assert verify(tmp_path / "packed")["ok"]
    floats = hf_onebit.load(tmp_path / "packed", dequantize=True)
    torch.testing.assert_close(logits(floats), logits(loaded), rtol=1e-4, atol=1e-4)


def test_tied_heads_of_equal_bits_stay_tied(tmp_path: Path) -> None:
    save_float(tiny_llama(tied=True), tmp_path / "float", tiny_tokenizer())
    quantizer = MPQQuantizer.from_pretrained(tmp_path / "float", bits=4, lm_head_bits=8, embedding_bits=8)
    model = quantizer.quantize(tmp_path / "packed")
    assert "lm_head.weight" not in load_file(tmp_path / "packed" / "model.safetensors")
    loaded = hf_onebit.load(tmp_path / "packed")
    assert torch.equal(logits(model), logits(loaded))
    stored = inspect(tmp_path / "packed")
    assert stored["coverage"] == 1.0
    assert stored["onebit_bpw"] < stored["linear_bpw"]
    untied = MPQQuantizer.from_pretrained(tmp_path / "float", bits=4, lm_head_bits=8).quantize(tmp_path / "untied")
    assert torch.equal(logits(untied), logits(hf_onebit.load(tmp_path / "untied")))
    assert inspect(tmp_path / "untied")["untied"]
    assert inspect(tmp_path / "untied")["total_weights"] == stored["total_weights"]


def test_groups_of_32_in_few_bits_take_less_than_the_target() -> None:
    for symmetric in (False, True):
        config = MPQConfig(bits=4, group_size=32, double_quant=True, symmetric=symmetric)
        entry = TableEntry.from_dict(
            plan_layers(tiny_llama(), config).entries["model.layers.0.mlp.up_proj"].to_dict() | {"in_features": 576}
        )
        assert entry.bits_per_weight(576, 576) - 4 < 0.3
        plan = plan_layers(tiny_llama(), config)  # layers of 32, 64 and 128 outputs
        for name, shape in plan.selected.items():
            assert plan.entry(name).bits_per_weight(shape.in_features, shape.out_features) - 4 < 0.3


def test_the_nearest_outputs_are_nearer_than_the_nearest_weights(float_dir: Path) -> None:
    found = {}
    for preset in ("closed", "fast", "balanced"):
        quantizer = MPQQuantizer(MPQConfig(bits=2, group_size=32, preset=preset, dataset=TEXT))
        quantizer.quantize_model(AutoModelForCausalLM.from_pretrained(float_dir), tiny_tokenizer())
        assert quantizer.report is not None
        errors = [record["relative_output_error"] for record in quantizer.report["layers"].values()]
        found[preset] = sum(errors) / len(errors)
        if preset == "balanced":
            blocks = quantizer.report["fit"]["blocks"].values()
            assert all(block["best"] <= block["start"] for block in blocks)
            assert any(block["best"] < block["start"] and block["flipped"] > 0 for block in blocks)
    assert found["fast"] < 0.8 * found["closed"]


def method_of(model: Any, **options: Any) -> tuple[GroupMethod, list[str]]:
    plan = plan_layers(model, MPQConfig(**{"bits": 2, "group_size": 32, "preset": "fast"} | options))
    return GroupMethod(plan.entries, rounds=1), list(plan.selected)


def rows(count: int = 9) -> list[dict[str, Tensor]]:
    return [{"input_ids": tiny_ids(1, 32, seed)} for seed in range(count)]


@pytest.mark.parametrize("act_order", [False, True])
def test_the_walk_leaves_the_model_alone_and_gives_what_it_ran_with(act_order: bool) -> None:
    model = tiny_llama()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    method, names = method_of(model, act_order=act_order)
    block = BlockOptions(epochs=2, sequences_per_step=1, learning_rate=0.02, sign_rate=0.1)
    result = quantize_on_prefix(model, names, rows(), method=method, block=block)
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    assert set(result.packed) == set(names)
    for name in names:
        shape = float_weight(model.get_submodule(name)).shape
        entry = method.entries[name]
        entry.validate_tensors(result.packed[name], shape[1], shape[0], name)
        assert result.records[name]["bits"] == 2
        assert bool(method.dense(name, result.packed[name], shape[1]).isfinite().all())
    assert all(block.best <= block.start for block in result.blocks.values())
    assert method.end_block() == {}


def test_interrupted_runs_end_with_the_same_bits(
    float_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = MPQConfig(**CASES["balanced"])

    def run(work: Path | None) -> Any:
        model = AutoModelForCausalLM.from_pretrained(float_dir)
        MPQQuantizer(config).quantize_model(model, work_dir=work)
        return model

    whole = run(None)
    fit, calls = GroupMethod.fit, []

    def stops(self: GroupMethod, name: str, *args: Any) -> Any:
        calls.append(name)
        if "layers.1.mlp.down" in name:
            raise KeyboardInterrupt
        return fit(self, name, *args)

    monkeypatch.setattr(GroupMethod, "fit", stops)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "work")
    monkeypatch.setattr(GroupMethod, "fit", lambda self, name, *args: (calls.append(name), fit(self, name, *args))[1])
    calls.clear()
    resumed = run(tmp_path / "work")
    assert calls
    assert not any("layers.0." in name for name in calls)
    assert_same(whole, resumed)
    with pytest.raises(ValueError, match=r"options\.bits: 2 / 3"):
        MPQQuantizer(MPQConfig(**CASES["balanced"] | {"bits": 3})).quantize_model(
            AutoModelForCausalLM.from_pretrained(float_dir), work_dir=tmp_path / "work"
        )


def test_an_error_leaves_the_float_model(float_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_pretrained(float_dir)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}

    def fails(*_args: Any) -> Any:
        raise RuntimeError("on purpose")

    monkeypatch.setattr(GroupMethod, "tune", fails)
    with pytest.raises(RuntimeError, match="on purpose"):
        MPQQuantizer(MPQConfig(**CASES["balanced"])).quantize_model(model)
    assert not packed_layers(model)
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


def test_act_order_takes_row_blocks(float_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(float_dir, quantization_config=MPQConfig(**CASES["act order"]))
    assert all(isinstance(layer, MBWQLinear) for layer in packed_layers(model).values())
    entry = model.config.quantization_config.modules["model.layers.0.mlp.up_proj"]
    assert entry["q_perm"] is True
    assert entry["double_quant"]


def test_summary_and_card_say_what_was_done(float_dir: Path, tmp_path: Path) -> None:
    quantizer = MPQQuantizer.from_pretrained(float_dir, bits=3, group_size=32, lm_head_bits=8)
    quantizer.quantize(tmp_path / "packed")
    assert quantizer.report is not None
    text = layer_summary(quantizer.report)
    assert "mpq, preset closed, 3 bits in groups of 32" in text
    assert "output head      8 bits in groups of 64" in text
    card = model_card(quantizer.report)
    assert "one bit" not in card.lower()
    assert "3 bits per weight cost quality" in card
    assert "- mpq" in card
    assert "1-bit" not in card


def test_config_goes_through_json_and_keeps_what_it_is_told(tmp_path: Path) -> None:
    config = MPQConfig(bits=3, group_size=-1, symmetric=True, double_quant=True, lm_head_bits=4, search="min-max")
    again = MPQConfig.from_dict(config.to_dict())
    assert again.to_dict() == config.to_dict()
    assert config.to_dict()["quant_method"] == "mpq"
    assert "dataset" not in config.to_dict()
    assert MPQQuantizer.from_dict(config.to_dict()).to_dict() == config.to_dict()
    assert not MPQConfig().calibrates
    assert MPQConfig(preset="fast").writes_itself


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "bits": ({"bits": 9}, "bits is 9: expected a whole number from 1 to 8"),
    "group": ({"group_size": 48}, "group_size is 48: expected a multiple of 32, or -1"),
    "symmetric": ({"symmetric": 1}, "symmetric is 1: expected True or False"),
    "search": ({"search": "x"}, "search is 'x': expected one of 'mse', 'min-max', 'half-quadratic'"),
    "search type": ({"search": []}, r"search is \[\]: expected one of"),
    "order": ({"act_order": True}, "act_order is True: expected False with preset 'closed'"),
    "preset": ({"preset": "quick"}, "preset is 'quick': expected one of 'closed', 'fast'"),
    "method": ({"quant_method": "onebit"}, "quant_method is 'onebit': expected 'mpq'"),
    "planes": ({"planes": 2}, "MPQConfig got unknown keys"),
    "near": ({"groupsize": 2}, "'groupsize': did you mean 'group_size'"),
    "head": ({"lm_head_bits": 5}, "lm_head_bits is 5"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_configs(case: str) -> None:
    options, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        MPQConfig(**options)


def test_quantizers_take_their_own_config() -> None:
    with pytest.raises(ValueError, match="MPQQuantizer got a OneBitConfig: expected an MPQConfig"):
        MPQQuantizer(OneBitConfig())
    with pytest.raises(ValueError, match="MPQQuantizer got a config and also"):
        MPQQuantizer(MPQConfig(), bits=2)


def test_a_value_that_float16_cannot_hold_names_its_layer(float_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(float_dir)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = 1e30
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj: the largest weight is 1e\+30"):
        MPQQuantizer().quantize_model(model)


def test_trained_statistics_of_few_bits_are_saved_as_they_are(float_dir: Path, tmp_path: Path, caplog: Any) -> None:
    config = MPQConfig(bits=4, group_size=32, double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(float_dir, quantization_config=config, dtype=torch.float32)
    layers = [name for name, layer in packed_layers(model).items() if isinstance(layer, MPQLinear)]
    model.get_submodule(layers[0]).scales.data *= 1.01
    model.get_submodule(layers[1]).zeros.data *= 1.01
    model.save_pretrained(tmp_path / "packed")
    assert "2 layers" in caplog.text
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    assert_same(again, model)
    table = again.config.quantization_config.modules
    assert [bool(table[name].get("double_quant")) for name in layers[:3]] == [False, False, True]
    assert {*load_file(tmp_path / "packed" / "model.safetensors")} >= {f"{layers[0]}.scales", f"{layers[2]}.qscales"}


def test_statistics_of_few_bits_are_saved_from_disk(float_dir: Path, tmp_path: Path) -> None:
    config = MPQConfig(bits=4, group_size=32, double_quant=True)
    AutoModelForCausalLM.from_pretrained(float_dir, quantization_config=config).save_pretrained(tmp_path / "packed")
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {"model.rotary_emb": "cpu", "model.layers.1": "disk"}
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "packed", device_map=places, offload_folder=tmp_path / "offload"
    )
    assert offloaded.model.layers[1].mlp.up_proj.scales.is_meta
    offloaded.save_pretrained(tmp_path / "again")
    first, second = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("packed", "again"))
    assert_same(first, second)


def test_a_search_that_a_preset_would_not_take_is_refused() -> None:
    with pytest.raises(ValueError, match="search is 'min-max': expected 'mse' with preset 'fast'"):
        MPQConfig(preset="fast", search="min-max")


def test_inspect_says_how_layers_are_packed(
    float_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    about = {"bits": 3, "group_size": 32, "symmetric": True, "double_quant": True}
    model = AutoModelForCausalLM.from_pretrained(float_dir, quantization_config=MPQConfig(**about))
    model.save_pretrained(tmp_path / "packed")
    layers = inspect(tmp_path / "packed")["layers"].values()
    assert layers
    for layer in layers:
        assert {key: layer[key] for key in about} == about
        assert (layer["act_order"], layer["blocks"]) == (False, None)
    assert main(["inspect", str(tmp_path / "packed")]) == 0
    assert "3 bits / 32, symmetric, statistics in few bits" in capsys.readouterr().out
