"""Planes per layer, by name or by a target, from the config to the file."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import (
    CAUSAL,
    save_float,
    tiny_gpt2,
    tiny_ids,
    tiny_llama,
    tiny_llama_ragged,
    tiny_qwen3_moe,
    tiny_t5,
    tiny_tokenizer,
)
from transformers import AutoModelForCausalLM

import hf_onebit
from hf_onebit import OneBitConfig, OneBitQuantizer
from hf_onebit.bits.budget import choose_planes, plan_budget
from hf_onebit.bits.sensitivity import Sensitivity
from hf_onebit.byte_sizes import parse_size
from hf_onebit.cli import main
from hf_onebit.conducting.calibrating import calibration_of
from hf_onebit.conducting.packing import Packing, pack_layers
from hf_onebit.inspection import inspect
from hf_onebit.nn import packed_layers
from hf_onebit.nn.linear import OneBitLinear
from hf_onebit.progress import logger
from hf_onebit.quantization.planning import plan_layers
from hf_onebit.ranks import ALONE
from hf_onebit.rungs.recipes import RECIPES
from hf_onebit.storage.verification import verify

ROWS = [{"input_ids": tiny_ids(1, 64, seed=i)} for i in range(8)]
MIXED = {"layers.0.mlp.down_proj": 1, "down_proj": 2, r"model\.layers\.1\.self_attn\.[qk]_proj": 2}
TWO = {"model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj", "model.layers.1.mlp.down_proj"}


def planes_of(model: Any) -> dict[str, int]:
    return {name: layer.planes for name, layer in packed_layers(model).items() if isinstance(layer, OneBitLinear)}


def quantized(model: Any, **options: Any) -> tuple[Any, dict[str, Any]]:
    quantizer = OneBitQuantizer(**options)
    quantizer.quantize_model(model)
    assert quantizer.report is not None
    return model, quantizer.report


# ------------------------------------------------------------------------------------------------------ by name


def test_the_first_entry_that_matches_counts_while_loading_and_in_memory(tmp_path: Path) -> None:
    folder = save_float(tiny_llama(), tmp_path / "float")
    loaded = AutoModelForCausalLM.from_pretrained(folder, quantization_config=OneBitConfig(planes_per_layer=MIXED))
    model, report = quantized(tiny_llama(), planes_per_layer=MIXED)
    assert {name for name, planes in planes_of(model).items() if planes == 2} == TWO
    assert planes_of(loaded) == planes_of(model)
    state = model.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in loaded.state_dict().items())
    for found in (report, loaded.hf_quantizer.report):
        assert {name: layer["planes"] for name, layer in found["layers"].items()} == planes_of(model)
        assert {layer["bits_per_weight"] > 2 for layer in (found["layers"][name] for name in TWO)} == {True}


def test_it_goes_over_planes_and_leaves_the_rest_to_it() -> None:
    model, _ = quantized(tiny_llama(layers=1), planes=2, planes_per_layer={"mlp": 1, "model.layers.0.mlp": 1})
    assert {name.rpartition(".")[2] for name, planes in planes_of(model).items() if planes == 2} == {
        "q_proj", "k_proj", "v_proj", "o_proj"
    }  # fmt: skip


@pytest.mark.parametrize("preset", ["closed", "fast"])
def test_mixed_planes_are_saved_reloaded_inspected_and_verified(preset: str, tmp_path: Path) -> None:
    quantizer = OneBitQuantizer(preset=preset, dataset=ROWS, planes_per_layer=MIXED)
    model = quantizer.quantize_model(tiny_llama())
    quantizer.save(model, tmp_path / "packed")
    again = hf_onebit.load(tmp_path / "packed")
    assert {name for name, planes in planes_of(again).items() if planes == 2} == TWO
    assert torch.equal(again(tiny_ids()).logits, model(tiny_ids()).logits)
    assert verify(tmp_path / "packed")["ok"]
    layers = inspect(tmp_path / "packed")["layers"]
    assert {name for name, layer in layers.items() if layer["planes"] == 2} == TWO
    stored = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert {name for name, entry in stored["modules"].items() if entry["planes"] == 2} == TWO
    assert not {"planes_per_layer", "target_bpw", "target_size"} & set(stored)
    record = quantizer.report["layers"]["model.layers.1.mlp.down_proj"]  # type: ignore[index]
    assert record["planes"] == 2
    assert record["relative_weight_error"] is not None
    assert "1 plane in 11 layers and 2 in 3" in (tmp_path / "packed" / "README.md").read_text()


def test_a_second_plane_in_one_layer_of_a_stage_leaves_its_siblings_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    # Tuning the block would change them all, each for the others.
    monkeypatch.setitem(RECIPES, "fast", dataclasses.replace(RECIPES["fast"], block=None))
    plain, mixed = (_packed(tiny_llama(layers=1), planes) for planes in (None, {"k_proj": 2}))
    name = "model.layers.0.self_attn."
    assert set(mixed.tensors[name + "k_proj"]) == {"weight", "a", "b", "weight_1", "a_1", "b_1"}
    for sibling in ("q_proj", "v_proj"):
        tensors = plain.tensors[name + sibling]
        assert all(torch.equal(tensors[key], tensor) for key, tensor in mixed.tensors[name + sibling].items())
    errors = [packed.records[name + "k_proj"]["relative_output_error"] for packed in (plain, mixed)]
    assert errors[1] < 0.5 * errors[0]


def _packed(model: Any, planes: dict[str, int] | None) -> Packing:
    quantizer = OneBitQuantizer(preset="fast", dataset=ROWS, planes_per_layer=planes)
    data = calibration_of(quantizer, model, None)
    return pack_layers(quantizer, model, plan_layers(model, quantizer.config), data, ALONE)


def test_an_entry_that_matches_no_packed_layer_is_pointed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(logger, "warning", said.append)
    quantized(tiny_llama(layers=1), planes_per_layer={"down_porj": 2, "lm_head": 2, "up_proj": 2})
    assert [line for line in said if "names no packed layer" in line and "lm_head" in line]
    assert "['down_porj', 'lm_head']" in next(line for line in said if "planes_per_layer" in line)


# -------------------------------------------------------------------------------------------------- by a target


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.93, 1.0])
@pytest.mark.parametrize("make", [lambda: tiny_llama(layers=4), tiny_llama_ragged], ids=["llama", "ragged"])
def test_bits_per_weight_reach_the_target_and_do_not_pass_it(make: Any, share: float) -> None:
    model = make()
    budget = plan_budget(model, plan_layers(model, OneBitConfig()), OneBitConfig(target_bpw=2.0))
    assert budget is not None
    least, most = budget.reachable
    target = least + share * (most - least)
    _, report = quantized(model, dataset=ROWS, target_bpw=target)
    steps = [bits[2] - bits[1] for bits in budget.options.values()]
    unused = (target - report["onebit_bpw"]) * budget.weights
    assert -1e-6 < unused <= max(steps) * (share < 1)
    assert report["onebit_bpw"] == pytest.approx(report["allocation"]["planned"], rel=1e-12)
    assert {layer["planes"] for layer in report["layers"].values()} == {0.0: {1}, 1.0: {2}}.get(share, {1, 2})
    if make is not tiny_llama_ragged:
        assert report["onebit_bpw"] >= 0.97 * target


HEADS: list[dict[str, int]] = [{}, {"lm_head_bits": 4, "embedding_bits": 8}, {"lm_head_bits": 8, "embedding_bits": 8}]


@pytest.mark.parametrize("heads", HEADS, ids=["float", "4+8", "8+8"])
@pytest.mark.parametrize("name", [name for name in CAUSAL if name != "mamba"])
def test_the_file_fills_the_size_and_does_not_pass_it(name: str, heads: dict[str, int], tmp_path: Path) -> None:
    model = CAUSAL[name]()
    least, most = reach(model, heads)
    target = (least + 2 * most) // 3
    quantizer = OneBitQuantizer(dataset=ROWS, target_size=target, **heads)
    quantizer.save(quantizer.quantize_model(model), tmp_path / "packed")
    size = sum(file.stat().st_size for file in (tmp_path / "packed").glob("*.safetensors"))
    report = quantizer.report
    assert report is not None
    assert 0.97 * target <= size == report["file_bytes"] <= report["allocation"]["planned"] <= target
    assert {layer["planes"] for layer in report["layers"].values() if "planes" in layer} == {1, 2}


def reach(model: Any, options: dict[str, Any]) -> tuple[int, int]:
    """Bytes that a model's file can have."""
    plan = plan_layers(model, OneBitConfig(**options))
    with pytest.raises(ValueError, match="target_size is 1 bytes") as refused:
        plan_budget(model, plan, OneBitConfig(target_size=1, **options))
    found = re.search(r"packed to (\d+) to (\d+) bytes", str(refused.value))
    assert found is not None
    return int(found[1]), int(found[2])


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_qwen3_moe, tiny_t5])
def test_both_ends_of_the_range_are_reached_and_nothing_beyond(make: Any, tmp_path: Path) -> None:
    least, most = reach(make(), {})
    for target, planes in ((least, 1), (most, 2)):
        quantizer = OneBitQuantizer(dataset=ROWS, target_size=target)
        model = quantizer.quantize_model(make())
        quantizer.save(model, tmp_path / str(planes))
        assert set(planes_of(model).values()) == {planes}
        assert 0.99 * target < (tmp_path / str(planes) / "model.safetensors").stat().st_size <= target
    for target, remedy in ((least - 1, "pack the head and the embedding as well"), (most + 1, "set planes=2")):
        before = make()
        with pytest.raises(ValueError, match=f"target_size is {target} bytes .* can be packed to .*: .*{remedy}"):
            OneBitQuantizer(dataset=ROWS, target_size=target).quantize_model(before)
        assert not packed_layers(before)


def test_targets_out_of_reach_name_the_range() -> None:
    message = r"is 1, and LlamaForCausalLM can be packed to 1\.\d{4} to [23]\.\d{4} bits per weight: .*set planes=1"
    with pytest.raises(ValueError, match=message):
        quantized(tiny_llama(), dataset=ROWS, target_bpw=1)
    with pytest.raises(ValueError, match=r"target_bpw is 8, .*: for the most, leave it out and set planes=2"):
        quantized(tiny_llama(), dataset=ROWS, target_bpw=8)
    with pytest.raises(ValueError, match=r"can be packed to .* bytes .*: for the least, leave it out and set planes=1"):
        quantized(tiny_llama(), dataset=ROWS, target_size="1kB", lm_head_bits=8)
    skips = ["model", "lm_head"]
    with pytest.raises(ValueError, match="target_size chooses planes for linear layers, and none is to be packed"):
        quantized(tiny_llama(), dataset=ROWS, target_size="1MB", embedding_bits=8, modules_to_not_convert=[
            "model.layers", "lm_head"])  # fmt: skip
    with pytest.raises(ValueError, match="no layer to quantize"):
        quantized(tiny_llama(), dataset=ROWS, target_bpw=1.5, modules_to_not_convert=skips)


def test_a_target_needs_text(tmp_path: Path) -> None:
    message = r"target_size gives a second plane .* measured on text: pass dataset=FILE .*planes_per_layer=\{NAME: 2\}"
    with pytest.raises(ValueError, match=message):
        quantized(tiny_llama(), target_size=170_000)
    folder = save_float(tiny_llama(), tmp_path / "float")
    with pytest.raises(ValueError, match="target_bpw gives a second plane"):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=OneBitConfig(target_bpw=1.5))


def test_it_works_in_from_pretrained_with_a_text(tmp_path: Path) -> None:
    folder = save_float(tiny_llama(layers=4), tmp_path / "float")
    config = OneBitConfig(target_bpw=1.9, dataset=ROWS)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    assert set(planes_of(model).values()) == {1, 2}
    assert 0.97 * 1.9 < model.hf_quantizer.report["onebit_bpw"] <= 1.9


def test_named_layers_keep_their_planes_and_count() -> None:
    named = {"model.layers.0.mlp": 2, "o_proj": 1}
    model, report = quantized(tiny_llama(layers=4), dataset=ROWS, target_bpw=1.9, planes_per_layer=named)
    planes = planes_of(model)
    assert {planes[f"model.layers.0.mlp.{kind}_proj"] for kind in ("gate", "up", "down")} == {2}
    assert {planes[f"model.layers.{i}.self_attn.o_proj"] for i in range(4)} == {1}
    assert {planes[f"model.layers.{i}.mlp.up_proj"] for i in range(1, 4)} <= {1, 2}
    assert 0.95 * 1.9 < report["onebit_bpw"] <= 1.9


def test_the_fast_preset_with_a_target_is_recorded(tmp_path: Path) -> None:
    quantizer = OneBitQuantizer(preset="fast", dataset=ROWS, target_bpw=2.0)
    model = quantizer.quantize_model(tiny_llama())
    quantizer.save(model, tmp_path / "packed")
    report = quantizer.report
    assert report is not None
    allocation = report["allocation"]
    assert (allocation["target"], allocation["wanted"], allocation["depth_prior"]) == ("bpw", 2.0, 0.6)
    assert allocation["tokens"] == 8 * 64
    assert allocation["least_cost"] <= allocation["cost"]
    assert {name: layer["planes"] for name, layer in allocation["layers"].items()} == planes_of(model)
    for layer in allocation["layers"].values():
        assert set(layer["sensitivity"]) == {"1", "2"}
        assert 0 <= layer["sensitivity"]["2"] < layer["sensitivity"]["1"]
    assert allocation["layers"]["model.layers.1.mlp.up_proj"]["ramp"] == pytest.approx(2.718281828**0.3)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert torch.equal(hf_onebit.load(tmp_path / "packed")(tiny_ids()).logits, model(tiny_ids()).logits)


def test_the_planes_go_where_the_sensitivity_is() -> None:
    model = tiny_llama(layers=4)
    plan, config = plan_layers(model, OneBitConfig()), OneBitConfig(target_bpw=1.9)
    budget = plan_budget(model, plan, config)
    assert budget is not None
    flat = {name: {1: float(bits[1]), 2: bits[1] / 4} for name, bits in budget.options.items()}
    loud = "model.layers.0.mlp.gate_proj"
    late, _ = choose_planes(budget, model, Sensitivity(flat, 1))
    assert late["model.layers.3.mlp.up_proj"] == 2
    assert late["model.layers.0.mlp.up_proj"] == late[loud] == 1
    chosen, record = choose_planes(budget, model, Sensitivity({**flat, loud: {1: 1e9, 2: 1e8}}, 1), depth_prior=0.0)
    assert chosen[loud] == 2
    harmful = {name: {1: 1.0, 2: 1.5} for name in flat}  # as a sample may say: the budget is used all the same
    assert 2 in choose_planes(budget, model, Sensitivity(harmful, 1))[0].values()
    unseen = {name: {1: 0.0, 2: 0.0} for name in flat}
    assert 2 not in choose_planes(budget, model, Sensitivity(unseen, 1))[0].values()
    assert {layer["ramp"] for layer in record["layers"].values()} == {1.0}


def test_many_small_files_are_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(logger, "warning", said.append)
    model = tiny_llama()
    quantizer = OneBitQuantizer(dataset=ROWS, target_size=reach(tiny_llama(), {})[1])
    quantizer.save(quantizer.quantize_model(model), tmp_path / "one")
    assert not [line for line in said if "target_size" in line]
    quantizer.save(model, tmp_path / "many", max_shard_size="10kB")
    assert [line for line in said if "more than target_size: save with a larger max_shard_size" in line]


# ------------------------------------------------------------------------------------------- config and command


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"planes_per_layer": ["up_proj"]}, "planes_per_layer is .*: expected None or a table"),
        ({"planes_per_layer": {"": 2}}, "planes_per_layer is .*: expected None or a table"),
        (
            {"planes_per_layer": {"up_proj": 3}},
            r"planes_per_layer\['up_proj'\] is 3: expected a whole number from 1 to 2",
        ),
        ({"planes_per_layer": {"up_proj": True}}, r"planes_per_layer\['up_proj'\] is True"),
        ({"planes_per_layer": {"layers.(0": 2}}, r"planes_per_layer holds 'layers\.\(0', which is no valid regular"),
        ({"target_bpw": 0}, "target_bpw is 0: expected a finite number > 0"),
        ({"target_bpw": "1.5"}, "target_bpw is '1.5': expected a finite number > 0"),
        ({"target_bpw": float("nan")}, "target_bpw is nan"),
        ({"target_bpw": 1.5, "target_size": "60MB"}, "target_bpw is 1.5 and target_size is '60MB': expected one of"),
        ({"target_size": 0}, "target_size is 0: expected a number of bytes above 0, or a text like"),
        ({"target_size": "60 MO"}, "target_size is '60 MO': expected a number of bytes above 0"),
        ({"target_size": "-1MB"}, "target_size is '-1MB': expected"),
        ({"target_size": 1.5}, "target_size is 1.5: expected"),
        ({"target_size": True}, "target_size is True: expected"),
        ({"target_bpw": 1.5, "planes": 2}, "planes is 2 beside a target, which chooses .*use planes_per_layer"),
    ],
)
def test_wrong_values_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OneBitConfig(**options)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("60MB", 60_000_000),
        ("1.5GiB", 3 << 29),
        (" .5 kb ", 500),
        ("12", 12),
        ("7B", 7),
        ("2KiB", 2048),
        ("1TB", 10**12),
        ("0.1GB", 10**8),
        (123, 123),
    ],
)
def test_sizes_are_read(text: Any, size: int) -> None:
    assert parse_size(text) == size == OneBitConfig(target_size=text).target_bytes


def test_what_describes_one_run_is_not_stored() -> None:
    config = OneBitConfig(planes_per_layer={"up_proj": 2}, target_bpw=1.5)
    assert OneBitConfig().to_dict() == config.to_dict()
    assert OneBitConfig.from_dict(json.loads(json.dumps(config.to_dict()))).to_dict() == config.to_dict()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_float(tiny_llama(), tmp_path / "float", tiny_tokenizer())
    (tmp_path / "text.txt").write_text("The little boat drifted down the river until the sun had set. " * 20)
    command = ["quantize", str(folder), "-o", str(tmp_path / "packed"), "--preset", "closed"]
    text = ["--calibration", str(tmp_path / "text.txt"), "--calibration-context", "64"]
    assert main([*command, *text, "--target-size", "175kB", "--planes-per-layer", "v_proj=2"]) == 0
    out = capsys.readouterr().out
    found = re.search(r"1 plane in (\d+) layers and 2 in (\d+)", out)
    assert found is not None
    assert re.search(
        r"^target +175\.0 kB, 17\d\.\d kB planned; planes by sensitivity on 1216 tokens$", out, re.MULTILINE
    )
    layers = inspect(tmp_path / "packed")["layers"]
    assert [sum(layer["planes"] == planes for layer in layers.values()) for planes in (1, 2)] == [
        *map(int, found.groups())
    ]
    assert layers["model.layers.0.self_attn.v_proj"]["planes"] == 2
    assert 170_000 < (tmp_path / "packed" / "model.safetensors").stat().st_size <= 175_000

    named = ["--planes-per-layer", "layers.0.mlp.up_proj=1", "--planes-per-layer", "up_proj=2"]
    assert main([*command, *named, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [name for name, layer in report["layers"].items() if layer["planes"] == 2] == ["model.layers.1.mlp.up_proj"]
    assert report["allocation"] is None

    for wrong, status in (
        (["--planes-per-layer", "up_proj"], 2),
        (["--planes-per-layer", "=2"], 2),
        (["--target-bpw", "9", *text], 1),
    ):
        assert main([*command, *wrong]) == status
        assert re.search("expected NAME=N|can be packed to", capsys.readouterr().err)
