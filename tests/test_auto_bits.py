"""Automatic bits, from the config to the file: both methods in one checkpoint, within a target."""

import copy
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import save_float, tiny_gpt2, tiny_ids, tiny_llama, tiny_qwen3_moe, tiny_t5, tiny_tokenizer
from transformers import AutoModelForCausalLM

import hf_onebit
from hf_onebit import MPQConfig, MPQQuantizer
from hf_onebit.algorithms.allocation import depth_ramp
from hf_onebit.bits.auto_bits import choose, head_choices, plan_auto, sibling_groups
from hf_onebit.bits.auto_sensitivity import HeadCosts
from hf_onebit.bits.sensitivity import Sensitivity
from hf_onebit.choices import CHOICES, WITHIN_LAYER, Choice, name_of
from hf_onebit.cli import main
from hf_onebit.dry_run import dry_run
from hf_onebit.inspection import inspect
from hf_onebit.nn import packed_layers
from hf_onebit.nn.linear import OneBitLinear
from hf_onebit.nn.mbwq import MBWQLinear
from hf_onebit.nn.mpq import MPQLinear
from hf_onebit.quantization.planning import plan_layers
from hf_onebit.quantization.resume import WorkFolder
from hf_onebit.rungs.mixed_fitting import MixedMethod
from hf_onebit.rungs.recipes import MPQ_RECIPES
from hf_onebit.storage.verification import verify

ROWS = [{"input_ids": tiny_ids(1, 64, seed=i)} for i in range(8)]
FEW = ["1p", "2g64", "4g64"]


def quantized(model: Any, **options: Any) -> tuple[MPQQuantizer, dict[str, Any]]:
    quantizer = MPQQuantizer(bits="auto", **options)
    quantizer.quantize_model(model)
    assert quantizer.report is not None
    return quantizer, quantizer.report


def chosen(report: dict[str, Any]) -> dict[str, str]:
    return {name: layer["choice"] for name, layer in report["allocation"]["layers"].items()}


# --------------------------------------------------------------------------------------------------- the choices


@pytest.mark.parametrize("name", [*CHOICES, *WITHIN_LAYER, "8g32", "7g-1", "5.5g32"])
def test_a_choice_becomes_an_entry_of_its_name(name: str) -> None:
    choice = Choice.parse(name)
    entry = choice.entry(512, importance=torch.rand(512) ** 4)
    assert entry is not None
    assert choice.mixed == (entry.blocks is not None)
    if not choice.mixed:
        assert name_of(entry) == name
    else:
        widths = [bits for bits, _, _ in entry.blocks or ()]
        assert widths == sorted(set(widths), reverse=True)
        assert choice.bits - 0.5 < float(name_of(entry).partition("g")[0]) <= choice.bits
    assert entry.bits_per_weight(512, 256) > 1


@pytest.mark.parametrize("name", ["", "3p", "0p", "9g64", "0g64", "3g48", "3", "2.5g-1", "8.5g64", "1.5g64", "3g0"])
def test_no_choice_of_another_form(name: str) -> None:
    with pytest.raises(ValueError, match='expected "1p" or "2p"'):
        Choice.parse(name)


def test_too_few_inputs_have_no_several_widths() -> None:
    assert Choice.parse("2.5g64").entry(64, importance=torch.rand(64)) is None


# ------------------------------------------------------------------------------------------------- start to end


@pytest.mark.parametrize(("preset", "within"), [("closed", True), ("fast", False), ("balanced", True)])
def test_both_methods_in_one_checkpoint_saved_and_reloaded(preset: str, within: bool, tmp_path: Path) -> None:
    model = tiny_llama(hidden=96, intermediate=192, bias=True, layers=1)
    names = ["1p", "4g32", "2.5g32"] if within else FEW
    quantizer, report = quantized(model, preset=preset, dataset=ROWS, target_bpw=3.2, choices=names)
    kinds = {type(layer) for layer in packed_layers(model).values()}
    assert {OneBitLinear, MBWQLinear if within else MPQLinear} <= kinds
    assert 3.0 < report["onebit_bpw"] <= 3.2
    assert report["onebit_bpw"] == pytest.approx(report["allocation"]["planned"], rel=1e-9)
    quantizer.save(model, tmp_path / "packed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert torch.equal(again(tiny_ids()).logits, model(tiny_ids()).logits)
    assert verify(tmp_path / "packed")["ok"]
    stored = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert stored["bits"] == "auto"
    assert {entry["method"] for entry in stored["modules"].values()} == {"onebit", "mpq"}
    assert not {"target_bpw", "target_size", "choices", "within_layer", "consistent_groups"} & set(stored)
    layers = inspect(tmp_path / "packed")["layers"]
    total = sum(layer["in_features"] * layer["out_features"] for layer in layers.values())
    bits = sum(layer["bits_per_weight"] * layer["in_features"] * layer["out_features"] for layer in layers.values())
    assert bits / total == pytest.approx(report["onebit_bpw"], rel=1e-9)  # what the file's headers say
    card = (tmp_path / "packed" / "README.md").read_text()
    assert "bits chosen layer by layer" in card
    assert "1p in" in card
    assert "mixed-precision" in card
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    for name, layer in report["layers"].items():
        assert layer["method"] == ("onebit" if chosen(report)[name] == "1p" else "mpq")
        assert layer["relative_weight_error"] > 0


@pytest.mark.parametrize(("make", "data"), [(tiny_gpt2, ROWS), (tiny_qwen3_moe, None), (tiny_t5, ROWS)])
def test_other_models_with_text_and_without(make: Any, data: Any, tmp_path: Path) -> None:
    model = make()
    quantizer, report = quantized(model, dataset=data, target_bpw=3.0, choices=FEW)
    assert report["allocation"]["tokens"] == (0 if data is None else 8 * 64)
    assert len(set(chosen(report).values())) > 1
    assert 2.7 < report["onebit_bpw"] <= 3.0
    quantizer.save(model, tmp_path / "packed")
    again = hf_onebit.load(tmp_path / "packed")
    state = model.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in again.state_dict().items())


def test_in_from_pretrained_without_text(tmp_path: Path) -> None:
    folder = save_float(tiny_llama(), tmp_path / "float")
    config = MPQConfig(bits="auto", target_bpw=2.5)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    twin = tiny_llama()
    _, report = quantized(twin, target_bpw=2.5)
    assert chosen(model.hf_quantizer.report) == chosen(report)
    assert torch.equal(model(tiny_ids()).logits, twin(tiny_ids()).logits)
    assert config.modules is None  # the caller's own


def test_double_quant_and_symmetric_and_act_order_go_with_it(tmp_path: Path) -> None:
    more = {"preset": "fast", "dataset": ROWS, "act_order": True, "double_quant": True, "symmetric": True}
    model = tiny_llama(hidden=128, layers=1)
    quantizer, report = quantized(model, target_bpw=3.0, choices=["1p", "2g32", "4g32"], **more)
    assert 2.8 < report["onebit_bpw"] <= 3.0
    quantizer.save(model, tmp_path / "packed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert torch.equal(again(tiny_ids()).logits, model(tiny_ids()).logits)


# ------------------------------------------------------------------------------------------------------ the target


BOTH = {"lm_head_bits": "auto", "embedding_bits": "auto"}
ONE = {"embedding_bits": "auto"}


def reach(model: Any, options: dict[str, Any]) -> tuple[int, int]:
    """Bytes that a model's file can have."""
    with pytest.raises(ValueError, match="target_size is 1 bytes") as refused:
        quantized(model, target_size=1, **options)
    found = re.search(r"packed to (\d+) to (\d+) bytes", str(refused.value))
    assert found is not None
    return int(found[1]), int(found[2])


@pytest.mark.parametrize(
    ("heads", "tied"),
    [({}, False), ({"lm_head_bits": 8, "embedding_bits": 8}, True), (BOTH, True), (BOTH, False), (ONE, True)],
)
def test_the_file_fills_the_size_and_does_not_pass_it(heads: dict[str, Any], tied: bool, tmp_path: Path) -> None:
    model = tiny_llama(tied=tied)
    options = {"choices": FEW, **heads}
    least, most = reach(model, options)
    size = (2 * least + most) // 3
    quantizer, report = quantized(model, dataset=ROWS, target_size=size, **options)
    quantizer.save(model, tmp_path / "packed")
    written = (tmp_path / "packed" / "model.safetensors").stat().st_size
    allocation = report["allocation"]
    assert quantizer.report["file_bytes"] == written <= allocation["planned"] <= size  # type: ignore[index]
    assert written > 0.9 * size
    if "auto" in heads.values():
        own, config = allocation["heads"], quantizer.config
        assert (config.lm_head_bits, config.embedding_bits) == (own["lm_head_bits"], own["embedding_bits"])
        assert own["embedding_bits"] in {None, 8, 4}
        assert 0 < own["sensitivity"]["embedding"]["8"] < own["sensitivity"]["embedding"]["4"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert torch.equal(again(tiny_ids()).logits, model(tiny_ids()).logits)


@pytest.mark.parametrize("data", [None, ROWS], ids=["weights", "text"])
def test_a_smaller_file_takes_the_embeddings_bits_too(data: Any) -> None:
    options = {"choices": FEW, **BOTH}
    least, most = reach(tiny_llama(tied=True), options)
    found = {}
    for size in (least, most):
        _, report = quantized(tiny_llama(tied=True), target_size=size, dataset=data, **options)
        found[size] = report["allocation"]["heads"]["embedding_bits"]
    assert found == {least: 4, most: None}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_bpw": 0.5}, r"target_bpw is 0.5, and LlamaForCausalLM can be packed to 1\.4\d+ to [89].*: for less"),
        ({"target_bpw": 12}, r"target_bpw is 12, and .* bits per weight: for more, let choices .* hold more bits"),
        (
            {"target_size": "1kB"},
            r"target_size is 1000 bytes .* can be packed to \d+ to \d+ bytes .*lm_head_bits='auto'",
        ),
        ({"target_bpw": 2, "choices": ["4g64"]}, r"can be packed to 4\.5000 to 4\.5000 bits per weight"),
    ],
)
def test_a_target_out_of_reach_names_the_range(options: dict[str, Any], message: str) -> None:
    model = tiny_llama()
    with pytest.raises(ValueError, match=message):
        quantized(model, **options)
    assert not packed_layers(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": "auto"}, r"bits is 'auto': expected target_bpw=X or target_size='60MB' with it"),
        ({"bits": "many"}, "bits is 'many': expected a whole number from 1 to 8, or 'auto'"),
        ({"bits": 4, "target_bpw": 3}, r"target_bpw is 3: expected none beside bits=4"),
        ({"bits": 4, "within_layer": True}, r"within_layer is True: expected none beside bits=4"),
        ({"bits": "auto", "target_bpw": 3, "target_size": "1MB"}, "expected one of them at most"),
        ({"bits": "auto", "target_bpw": -1}, "target_bpw is -1: expected a finite number > 0"),
        ({"bits": "auto", "target_bpw": 3, "group_size": 128}, "group_size is 128 beside bits='auto'"),
        ({"bits": "auto", "target_bpw": 3, "choices": []}, r"choices is \[\]: expected None or a list"),
        ({"bits": "auto", "target_bpw": 3, "choices": ["4q"]}, "choices holds '4q': expected \"1p\""),
        ({"bits": "auto", "target_bpw": 3, "choices": ["2g64", "2g64"]}, "expected each name once"),
        ({"bits": "auto", "target_bpw": 3, "choices": ["2.5g64"]}, "expected one of whole bits as well"),
        ({"bits": "auto", "target_bpw": 3, "double_quant": True, "within_layer": True}, "double_quant is True"),
        ({"bits": "auto", "target_bpw": 3, "embedding_bits": "auto"}, "embedding_bits is 'auto': expected a number"),
        ({"bits": "auto", "target_bpw": 3, "consistent_groups": 1}, "consistent_groups is 1: expected True or False"),
    ],
)
def test_wrong_values_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MPQConfig(**options)


def test_onebit_refuses_automatic_heads() -> None:
    with pytest.raises(ValueError, match=r"embedding_bits is 'auto': expected a number without MPQConfig"):
        hf_onebit.OneBitConfig(embedding_bits="auto")  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------ the choice


def test_the_choice_is_the_best_of_all() -> None:
    model = tiny_llama(layers=1)
    config = MPQConfig(bits="auto", target_bpw=2.6, choices=FEW)
    plan = plan_layers(model, config)
    auto = plan_auto(model, plan, config, closed=True)
    generator = torch.Generator().manual_seed(0)
    costs = {}
    for name in plan.selected:
        weight = float(torch.rand(1, generator=generator)) * plan.selected[name].weights
        costs[name] = {"1p": weight, "2g64": weight / 3, "4g64": weight / 40}
    record = choose(auto, model, plan, (Sensitivity(costs, 1), HeadCosts()), depth_prior=0.0)
    sizes, names = auto.budget.options, list(plan.selected)
    best = min(
        sum(costs[name][choice] for name, choice in zip(names, combination, strict=True))
        for combination in itertools.product(["1p", "2g64", "4g64"], repeat=len(names))
        if sum(sizes[name][choice] for name, choice in zip(names, combination, strict=True)) <= auto.budget.bits
    )
    assert record["least_cost"] <= best <= record["cost"] <= 1.1 * best


def test_sensitive_layers_get_more_and_deeper_ones_by_the_prior() -> None:
    model = tiny_llama(layers=4)
    config = MPQConfig(bits="auto", target_bpw=3.0)
    plan = plan_layers(model, config)
    auto = plan_auto(model, plan, config, closed=True)
    flat = {n: {c: 4.0 ** -(bits / 4096) for c, bits in o.items()} for n, o in auto.budget.options.items()}
    flat = {n: dict(zip(c, sorted(c.values(), reverse=True), strict=True)) for n, c in flat.items()}
    loud = "model.layers.0.mlp.gate_proj"
    bits = {}
    for factor in (1.0, 1e3):
        costs = {n: {c: v * (factor if n == loud else 1.0) for c, v in o.items()} for n, o in flat.items()}
        record = choose(auto, model, plan, (Sensitivity(costs, 1), HeadCosts()))
        bits[factor] = auto.budget.options[loud][record["layers"][loud]["choice"]]
        assert record["layers"]["model.layers.3.mlp.up_proj"]["ramp"] == depth_ramp(1.0)
    assert bits[1e3] > bits[1.0]


def test_consistent_groups_are_consistent() -> None:
    model = tiny_llama(layers=4)
    options = {"dataset": ROWS, "target_bpw": 2.7, "choices": FEW}
    _, apart = quantized(model, **options)
    _, together = quantized(tiny_llama(layers=4), consistent_groups=True, **options)
    groups = sibling_groups(list(chosen(apart)))
    assert len(groups) == 4 * 4  # q/k/v, o, gate/up, down
    assert all(len({chosen(together)[name] for name in group}) == 1 for group in groups)
    assert not all(len({chosen(apart)[name] for name in group}) == 1 for group in groups)
    assert together["allocation"]["cost"] >= apart["allocation"]["least_cost"]


def test_heads_that_are_tied_and_cannot_be_parted_have_fewer_choices() -> None:
    config = MPQConfig(bits="auto", target_size="1MB", lm_head_bits="auto", embedding_bits="auto")
    every = set(itertools.product((None, 8, 4), repeat=2))
    assert set(head_choices(tiny_llama(tied=True), config)) == every
    assert set(head_choices(tiny_t5(), config)) < every
    fixed = MPQConfig(bits="auto", target_size="1MB", lm_head_bits=8, embedding_bits="auto")
    assert set(head_choices(tiny_llama(), fixed)) == {(8, None), (8, 8), (8, 4)}
    assert not head_choices(tiny_llama(), MPQConfig(bits="auto", target_bpw=3))


# ---------------------------------------------------------------------------------------------------------- resuming


def test_an_interrupted_run_goes_on_without_measuring_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"preset": "fast", "dataset": ROWS[:4], "target_bpw": 2.5, "choices": FEW}
    whole = tiny_llama()
    quantized(whole, **options)
    model, work = tiny_llama(), tmp_path / "work"
    kept = WorkFolder.save

    def interrupted(self: WorkFolder, stage: str, *values: Any) -> bool:
        done = kept(self, stage, *values)
        if stage.endswith("0"):
            raise KeyboardInterrupt
        return done

    monkeypatch.setattr(WorkFolder, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        MPQQuantizer(bits="auto", **options).quantize_model(model, work_dir=work)
    monkeypatch.setattr(WorkFolder, "save", kept)
    monkeypatch.setattr("hf_onebit.mpq_quantizer.costs_on_text", lambda *_, **__: pytest.fail("measured again"))
    MPQQuantizer(bits="auto", **options).quantize_model(model, work_dir=work)
    state = whole.state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in model.state_dict().items())


def interrupting(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Have a function of the conductor stop as if by Ctrl-C."""

    def stop(*_args: Any, **_options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(name, stop)


@pytest.mark.parametrize(("heads", "size"), [(BOTH, 60_000), (ONE, 100_000)], ids=["both", "one"])
@pytest.mark.parametrize("place", ["pack_layers", "attach"])
def test_a_quantizer_that_was_interrupted_asks_the_same_again(
    place: str, heads: dict[str, Any], size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"preset": "fast", "dataset": ROWS[:4], "target_size": size, "choices": FEW, **heads}
    _, report = quantized(tiny_llama(tied=True), **options)
    quantizer, work = MPQQuantizer(bits="auto", **options), tmp_path / "work"
    before = dict(vars(quantizer.config))
    with monkeypatch.context() as patch:
        interrupting(patch, f"hf_onebit.conducting.in_memory.{place}")
        with pytest.raises(KeyboardInterrupt):
            quantizer.quantize_model(tiny_llama(tied=True), work_dir=work)
    fields = [*heads, "target_size", "bits"]
    assert {field: getattr(quantizer.config, field) for field in fields} == {field: before[field] for field in fields}
    monkeypatch.setattr("hf_onebit.mpq_quantizer.costs_on_text", lambda *_, **__: pytest.fail("measured again"))
    quantizer.quantize_model(tiny_llama(tied=True), work_dir=work)
    assert quantizer.report is not None
    assert quantizer.report["allocation"] == report["allocation"]


def test_a_second_model_gets_heads_of_its_own() -> None:
    options = {"choices": FEW, "target_size": 60_000, **BOTH}
    quantizer, report = quantized(tiny_llama(tied=True), **options)
    small = tiny_llama(tied=True, hidden=32, intermediate=64)
    found = {}
    for mine in (quantizer, MPQQuantizer(bits="auto", **options)):
        model = copy.deepcopy(small)
        mine.quantize_model(model)
        assert mine.report is not None
        found[mine is quantizer] = mine.report["allocation"], model.config.quantization_config.to_dict()
    assert found[True] == found[False]
    assert found[True][0]["heads"]["embedding_bits"] != report["allocation"]["heads"]["embedding_bits"]
    for field in BOTH:  # what a model holds is settled
        assert found[True][1].get(field) == found[True][0]["heads"][field]


def test_bits_that_are_set_after_a_run_stay() -> None:
    quantizer, _ = quantized(tiny_llama(tied=True), choices=FEW, target_size=64_000, **BOTH)
    settled = quantizer.config.lm_head_bits, quantizer.config.embedding_bits
    assert "auto" not in settled
    quantizer.config.embedding_bits = 3
    model = tiny_llama()
    quantizer.quantize_model(model)
    assert quantizer.report is not None
    assert quantizer.report["allocation"]["heads"]["embedding_bits"] == 3
    assert model.config.quantization_config.embedding_bits == 3
    quantizer.quantize_model(model := tiny_llama())
    assert model.config.quantization_config.embedding_bits == 3


def test_a_dry_run_settles_nothing_in_the_quantizer() -> None:
    quantizer = MPQQuantizer.from_pretrained(
        tiny_llama(tied=True), bits="auto", choices=FEW, target_size=60_000, **BOTH
    )
    planned = dry_run(quantizer)
    assert (quantizer.config.lm_head_bits, quantizer.config.embedding_bits) == ("auto", "auto")
    assert dry_run(quantizer)["allocation"] == planned["allocation"]
    quantizer.quantize_model(tiny_llama(tied=True))
    assert "auto" not in (quantizer.config.lm_head_bits, quantizer.config.embedding_bits)
    assert dry_run(quantizer)["allocation"] == planned["allocation"]  # and after a run it asks again


def test_tuning_a_block_of_both_kinds_never_loses(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    tune = MixedMethod.tune

    def watch(self: MixedMethod, view: Any, *rest: Any) -> Any:
        before = {name: tensor.clone() for name, tensor in view.module.state_dict().items()}
        tuned = tune(self, view, *rest)
        after = view.module.state_dict()
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
        seen.append(tuned)
        return tuned

    monkeypatch.setattr(MixedMethod, "tune", watch)
    assert MPQ_RECIPES["balanced"].block is not None
    _, report = quantized(tiny_llama(), preset="balanced", dataset=ROWS, target_bpw=2.7, choices=FEW)
    assert len(seen) == 2
    assert all(tuned.result.best <= tuned.result.start for tuned in seen)
    assert {len(tuned.layers) for tuned in seen} == {7}
    assert set(report["fit"]["blocks"]) == {"model.layers.0", "model.layers.1"}


# --------------------------------------------------------------------------------------------- dry run and command


@pytest.mark.parametrize(
    "options",
    [
        {"target_bpw": 2.5, "dataset": ROWS, "choices": FEW},
        {"target_bpw": 2.5, "dataset": ROWS, "preset": "fast", "choices": FEW},
        {"target_size": 60_000, "choices": FEW, **BOTH},
    ],
    ids=["closed", "fast", "size"],
)
def test_a_dry_run_says_what_the_run_does(options: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_llama(tied=True)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    planned = dry_run(MPQQuantizer.from_pretrained(model, bits="auto", **options), tmp_path / "packed")
    assert not packed_layers(model)
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    assert not list(tmp_path.iterdir())
    quantizer, report = quantized(model, **options)
    assert {name: layer["choice"] for name, layer in planned["layers"].items()} == chosen(report)
    assert planned["linear_bpw"] == pytest.approx(report["onebit_bpw"])
    assert planned["allocation"] == report["allocation"]
    assert set(planned["heads"]) == {*report["embeddings"], *([report["head"]] if report["head"] else [])}
    assert planned["preflight"]["seconds"] > 0
    quantizer.save(model, tmp_path / "packed")
    size = (tmp_path / "packed" / "model.safetensors").stat().st_size
    assert 0.85 * size < planned["preflight"]["disk_bytes"] < 1.05 * size
    assert json.loads(json.dumps(planned, allow_nan=False)) == planned


@pytest.mark.parametrize(
    "options", [{}, {"preset": "fast"}, {"target_bpw": 1.9, "dataset": ROWS}, {"target_bpw": 2.0, "preset": "fast"}]
)
def test_a_dry_run_of_onebit(options: dict[str, Any], tmp_path: Path) -> None:
    folder = save_float(tiny_llama(), tmp_path / "float")
    tiny_tokenizer().save_pretrained(folder)
    planned = dry_run(hf_onebit.OneBitQuantizer.from_pretrained(folder, **options))
    assert len(planned["layers"]) == 14
    assert {layer["choice"] for layer in planned["layers"].values()} <= {"1p", "2p"}
    assert planned["preflight"]["seconds"] > 0
    assert planned["preflight"]["disk_bytes"] > 100_000
    assert bool(planned["notes"]) == ("preset" in options)
    with pytest.raises(ValueError, match="bound to no model"):
        dry_run(hf_onebit.OneBitQuantizer())


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_float(tiny_llama(), tmp_path / "float")
    tiny_tokenizer().save_pretrained(folder)
    out = tmp_path / "packed"
    command = ["quantize", str(folder), "-o", str(out), "--method", "mpq", "--bits", "auto", "--preset", "closed"]
    command += ["--target-bpw", "3", "--choices", "1p,2g64,4g64"]
    assert main([*command, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert not out.exists()
    assert "Would pack 14 linear layers at" in said
    assert "Nothing was quantized or written (--dry-run)." in said
    for word in ("time", "memory", "disk", "2g64", "Target: 3.000 bits per weight"):
        assert word in said
    assert main([*command, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["onebit_bpw"] <= 3
    assert len(packed_layers(hf_onebit.load(out))) == 14
    assert main([*command[:-2], "--consistent-groups", "--within-layer", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["dry_run"] is True
    assert main(["quantize", str(folder), "-o", str(out), "--within-layer"]) == 2
    assert "--within-layer is an option of --method mpq" in capsys.readouterr().err
    assert main([*command, "--planes", "2"]) == 2
    assert "--planes is an option of --method onebit" in capsys.readouterr().err


def test_within_layer_modules_hold_their_map(tmp_path: Path) -> None:
    model = tiny_llama(hidden=128, intermediate=256, layers=1)
    quantizer, _ = quantized(model, dataset=ROWS, target_bpw=3.0, within_layer=True, choices=["2g64"])
    mixed = {n: layer for n, layer in packed_layers(model).items() if isinstance(layer, MBWQLinear)}
    assert mixed
    for layer in mixed.values():
        assert len(layer.blocks) > 1
        attributes = layer.weight_attributes()
        assert attributes["rows"][-2] == layer.in_features
        assert len(attributes["q_group_map"]) == 2 * layer.in_features
        # Inputs are in order of falling importance: their permutation is no identity.
        assert not torch.equal(layer.q_perm.long(), torch.arange(layer.in_features))  # type: ignore[union-attr]
    quantizer.save(model, tmp_path / "packed")
    assert verify(tmp_path / "packed")["ok"]
