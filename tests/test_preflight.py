"""The estimate before a quantization: its words, what it grows with, and how near it comes."""

import dataclasses
import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny import CAUSAL, OTHERS, tiny_ids, tiny_llama, tiny_tokenizer
from transformers.utils import logging as hf_logging

from hf_onebit import OneBitConfig, OneBitQuantizer, free_memory
from hf_onebit.algorithms.blockwise import BlockOptions
from hf_onebit.calibration import CalibrationData, load_calibration
from hf_onebit.free_memory import available_memory
from hf_onebit.preflight import estimates, timing
from hf_onebit.preflight.estimates import Preflight, estimate
from hf_onebit.quantization.planning import plan_layers
from hf_onebit.quantization.resume import WorkFolder
from hf_onebit.rungs.ladder import quantize_on_prefix
from hf_onebit.rungs.recipes import RECIPES, Recipe
from hf_onebit.rungs.upper_rungs import distill_scales


def rows(count: int, length: int = 64) -> CalibrationData:
    return load_calibration([{"input_ids": tiny_ids(1, length, seed=i)} for i in range(count)], max_tokens=10**6)


def estimated(count: int = 4, recipe: Any = RECIPES["fast"], model: Any = None, **options: Any) -> Preflight:
    config = OneBitConfig(preset="closed" if recipe is None else "fast", **options)
    model = model or tiny_llama()
    return estimate(model, plan_layers(model, config), rows(count), recipe)


SIZES = {"vocab_size": 4096, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "max_position_embeddings": 128}


@pytest.fixture
def fixed_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose measurements do not vary."""
    for name, found in {
        "block": 1e-5,
        "fit": (1e-6, 1e-12),
        "product": 1e-11,
        "latent": 1e-9,
        "head": 1e-6,
    }.items():
        monkeypatch.setattr(timing, f"_time_{name}", lambda *_, found=found: found)


@pytest.mark.usefixtures("fixed_speed")
def test_more_tokens_take_more() -> None:
    wide = Recipe(prefix_tokens=10**6, steps=0)
    found = [estimated(count, wide) for count in (16, 64, 256, 1024)]
    for less, more in itertools.pairwise(found):
        assert more.more_bytes > less.more_bytes
        assert more.seconds is not None
        assert less.seconds is not None
        assert more.seconds > less.seconds
        assert more.disk_bytes == less.disk_bytes
    assert estimated(1024, None).more_bytes > estimated(64, None).more_bytes


def test_the_measurements_are_times() -> None:
    model = tiny_llama()
    column, product = timing._time_fit(model.model.layers[0].mlp.down_proj.weight)
    assert 0 < column + product < 1
    assert 0 < timing._time_block(model, model.model.layers, rows(1)) < 1
    assert 0 < timing._time_product(torch.device("cpu")) < 1
    assert 0 < timing._time_latent(torch.device("cpu")) < 1e-3
    assert 0 < timing._time_head(model) < 1


def test_tokens_beyond_the_recipes_do_not_count_in_the_prefix() -> None:
    recipe = Recipe(prefix_tokens=1024, steps=0)
    assert estimated(16, recipe).more_bytes == estimated(64, recipe).more_bytes


def test_more_of_everything_takes_more_memory() -> None:
    base = estimated()
    assert estimated(planes=2).more_bytes > base.more_bytes
    assert estimated(model=tiny_llama(hidden=128, intermediate=256)).more_bytes > base.more_bytes
    assert estimated(recipe=Recipe(step_tokens=65536)).more_bytes > base.more_bytes


def test_logits_of_all_rows_are_counted_where_the_head_cannot_be_split_off() -> None:
    """As those that are capped: a quarter of a million tokens take gigabytes."""
    plain = transformers.GemmaForCausalLM(transformers.GemmaConfig(**SIZES)).eval()
    # Logits of random weights are small: a cap as small is seen.
    config = transformers.Gemma2Config(**SIZES, final_logit_softcapping=0.01)
    capped = transformers.Gemma2ForCausalLM(config).eval()
    recipe = Recipe(step_tokens=4096)
    one, other = estimated(model=plain, recipe=recipe), estimated(model=capped, recipe=recipe)
    # The capped logits, the teacher's and a gradient at the least.
    assert other.more_bytes - one.more_bytes > 3 * 4096 * SIZES["vocab_size"] * 2
    training = capped.train()
    assert estimated(model=training, recipe=recipe).more_bytes == other.more_bytes
    assert training.training


@pytest.mark.usefixtures("fixed_speed")
def test_block_tuning_takes_time() -> None:
    bare, tuned = (estimated(64, Recipe(steps=0, block=block)) for block in (None, BlockOptions(epochs=8)))
    assert bare.seconds is not None
    assert tuned.seconds is not None
    assert tuned.seconds > bare.seconds
    assert tuned.more_bytes >= bare.more_bytes


@pytest.mark.parametrize("name", [*CAUSAL, *OTHERS])
def test_every_kind_of_model_has_an_estimate(name: str) -> None:
    model = (CAUSAL | OTHERS)[name]()
    estimated(model=model)  # planning gives experts layers of their own
    states = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    before = torch.get_rng_state()
    model.train()
    found = estimated(model=model)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert all(torch.equal(states[key], tensor) for key, tensor in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert (found.seconds is None) == (name == "t5")  # two stacks of blocks: fitting refuses it
    assert 0 < found.more_bytes < 2e8
    assert estimated(model=model, recipe=None).seconds is None


@pytest.mark.parametrize("options", [{}, {"planes": 2}, {"lm_head_bits": 4}, {"lm_head_bits": 4, "embedding_bits": 4}])
@pytest.mark.parametrize("tied", [False, True])
def test_the_size_on_disk_is_that_of_the_file(tied: bool, options: dict[str, int], tmp_path: Path) -> None:
    quantizer = OneBitQuantizer(OneBitConfig(dataset=[{"input_ids": tiny_ids(1, 16)[0].tolist()}], **options))
    model = quantizer.quantize_model(tiny_llama(tied=tied, bias=True))
    quantizer.save(model, tmp_path / "packed")
    size = (tmp_path / "packed" / "model.safetensors").stat().st_size
    said = (quantizer.report or {})["preflight"]["disk_bytes"]
    assert said <= size <= said + 20000  # the file's header


@pytest.mark.parametrize("planes", [1, 2])
def test_the_work_folder_is_counted(planes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With signs that learn, as of `best`: more than the finished file, and gone at the end."""
    recipe = Recipe(
        rounds=1, prefix_tokens=256, block=BlockOptions(epochs=1), steps=2, heldout_tokens=32, sign_rate=0.004
    )
    monkeypatch.setattr(OneBitQuantizer, "recipes", {"best": recipe})
    dataset = [{"input_ids": tiny_ids(1, 64, seed)[0].tolist()} for seed in range(16)]
    quantizer = OneBitQuantizer(OneBitConfig(preset="best", planes=planes, dataset=dataset))
    seen = []
    save = WorkFolder.save

    def watched(self: WorkFolder, *arguments: Any) -> Any:
        save(self, *arguments)
        seen.append(sum(file.stat().st_size for file in self.folder.iterdir() if file.suffix == ".safetensors"))

    monkeypatch.setattr(WorkFolder, "save", watched)
    quantizer.quantize_model(tiny_llama(), work_dir=tmp_path / "work")
    said = (quantizer.report or {})["preflight"]["work_bytes"]
    assert max(seen) <= said <= 3 * max(seen)  # the state of distillation is there twice for a moment
    quantizer.quantize_model(tiny_llama())
    assert (quantizer.report or {})["preflight"]["work_bytes"] == 0


def test_the_line_and_the_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    enough = Preflight(100.0, 3_200_000_000, 70_600_000, 2_000_000_000, 18_000_000_000)
    assert enough.line() == "Estimate: about 2 min, 3.2 GB of memory (18.0 GB more are free), 70.6 MB on disk"
    assert enough.warnings() == []
    working = dataclasses.replace(enough, work_bytes=3_000_000_000)
    assert working.line().endswith(", 70.6 MB on disk and, until the end, up to 3.0 GB more")
    unknown = dataclasses.replace(enough, seconds=None, available_bytes=None)
    assert unknown.line() == "Estimate: 3.2 GB of memory, 70.6 MB on disk"
    assert unknown.warnings() == []
    assert "about 5 s," in dataclasses.replace(enough, seconds=4.2).line()
    assert "about 2.5 h," in dataclasses.replace(enough, seconds=9000.0).line()
    monkeypatch.setattr(estimates, "available_memory", lambda where: 1000)
    (short,) = estimated().warnings()
    assert "more memory, and 1.0 kB are free" in short
    assert "--calibration-tokens" in short
    assert "--spill" in short


def test_too_little_room_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Preflight(None, 10**9, 70_600_000, 0, None, work_bytes=3_000_000_000, free_disk_bytes=3_000_000_000)
    (warning,) = plan.warnings()
    assert "write about 3.1 GB, and 3.0 GB are free on that disk" in warning
    assert dataclasses.replace(plan, free_disk_bytes=4_000_000_000).warnings() == []
    warned: list[str] = []
    monkeypatch.setattr("hf_onebit.preflight.estimates.logger.warning", lambda line, *_: warned.append(line))
    monkeypatch.setattr(estimates, "free_space", lambda place: 0)
    dataset = [{"input_ids": tiny_ids(1, 64, seed)[0].tolist()} for seed in range(8)]
    quantizer = OneBitQuantizer(OneBitConfig(preset="fast", dataset=dataset))
    quantizer.quantize_model(tiny_llama(), work_dir=tmp_path / "work")
    assert any("are free on that disk" in line for line in warned)


def test_what_lies_in_the_work_folder_is_not_asked_for_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Other processes write to the disk meanwhile.
    monkeypatch.setattr("hf_onebit.preflight.estimates.free_space", lambda place: 1 << 40)
    model = tiny_llama()
    plan = plan_layers(model, OneBitConfig(preset="fast"))
    (tmp_path / "state").write_bytes(bytes(1 << 20))
    (tmp_path / "other").mkdir()
    with_work, without = (
        estimate(model, plan, rows(4), RECIPES["fast"], folder).free_disk_bytes
        for folder in (tmp_path, tmp_path / "other")
    )
    assert with_work is not None
    assert without is not None
    assert with_work - without == 1 << 20


@pytest.mark.parametrize("recipe", [None, Recipe(prefix_tokens=10**6, steps=0)])
def test_spilled_hidden_states_are_on_the_disk_and_not_in_memory(recipe: Any, tmp_path: Path) -> None:
    model = tiny_llama()
    plan = plan_layers(model, OneBitConfig(preset="fast"))
    held, spilled = (estimate(model, plan, rows(1024), recipe, tmp_path, spill) for spill in (False, True))
    tokens, width = 1024 * 64, model.config.hidden_size
    assert held.more_bytes - spilled.more_bytes >= 4 * tokens * width
    if recipe is not None:
        assert spilled.work_bytes - held.work_bytes >= 3 * 4 * tokens * width
    short = dataclasses.replace(spilled, available_bytes=0).warnings()
    assert "--spill" not in short[0]


def test_a_model_that_fits_with_spilled_states_is_quantized_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    least = {}
    for spill in (False, True):
        config = OneBitConfig(preset="fast", calibration_tokens=10**6, calibration_context=64, spill=spill)
        plan = plan_layers(model, config)
        recipes = {"fast": Recipe(prefix_tokens=10**6, steps=0)}
        sizes = [10**e for e in range(6, 12)]
        for size in sizes:
            monkeypatch.setattr(estimates, "available_memory", lambda *_, size=size: size)
            if estimates.estimate_whole(model, plan, config, recipes) is None:
                least[spill] = size
                break
    assert least[True] < least[False]


@pytest.mark.usefixtures("fixed_speed")
def test_signs_that_learn_and_flips_take_time() -> None:
    def seconds(**fields: Any) -> float:
        found = estimated(64, Recipe(prefix_tokens=1024, steps=4, heldout_tokens=256, **fields)).seconds
        assert found is not None
        return found

    base = seconds()
    assert seconds(sign_rate=0.004) > base
    assert seconds(flip_rounds=2) > base
    still, learning = (seconds(block=BlockOptions(epochs=2, sign_rate=rate)) for rate in (0.0, 0.1))
    assert learning > still > base


@pytest.mark.usefixtures("fixed_speed")
@pytest.mark.parametrize("count", [1, 3, 4, 7, 8])
def test_only_what_a_short_text_is_enough_for_takes_time(count: int) -> None:
    model, tuning = tiny_llama(), BlockOptions(epochs=1, learning_rate=0.003)
    layers = list(plan_layers(model, OneBitConfig()).selected)
    tuned = quantize_on_prefix(model, layers, rows(count).batches, rounds=0, block=tuning).blocks
    bare, more = (estimated(count, Recipe(steps=0, block=block)).seconds for block in (None, tuning))
    assert bare is not None
    assert more is not None
    assert (more > bare) is bool(tuned)


@pytest.mark.usefixtures("fixed_speed")
@pytest.mark.parametrize("length", [4, 64])
def test_a_text_too_short_to_judge_by_takes_no_distillation(length: int) -> None:
    def seconds(steps: int) -> float:
        model, recipe = tiny_llama(), Recipe(steps=steps, heldout_tokens=32, lengths=(64,))
        found = estimate(model, plan_layers(model, OneBitConfig(preset="fast")), rows(1, length), recipe).seconds
        assert found is not None
        return found

    assert seconds(40) == seconds(0)
    model = tiny_llama()
    assert distill_scales(model, model, rows(1, length).batches, Recipe(heldout_tokens=32, lengths=(64,)), 0) is None


def test_a_run_that_goes_on_says_that_the_estimate_is_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("hf_onebit.preflight.estimates.say", said.append)
    dataset = [{"input_ids": tiny_ids(1, 64, seed)[0].tolist()} for seed in range(8)]
    for _ in range(2):
        quantizer = OneBitQuantizer(OneBitConfig(preset="fast", dataset=dataset))
        quantizer.quantize_model(tiny_llama(), work_dir=tmp_path / "work")
    assert said[0].startswith("Estimate: about ")
    assert said[1].startswith("Estimate for the whole, of which a part is done: about ")


def test_quantizing_says_it_first_and_reports_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said: list[str] = []
    monkeypatch.setattr("hf_onebit.preflight.estimates.say", said.append)
    warned: list[str] = []
    monkeypatch.setattr("hf_onebit.preflight.estimates.logger.warning", lambda line, *_: warned.append(line))
    monkeypatch.setattr(estimates, "available_memory", lambda where: 1000)
    quantizer = OneBitQuantizer(preset="fast", dataset=["The boat. " * 60], calibration_context=32)
    quantizer.quantize_model(tiny_llama(), tiny_tokenizer())
    report = quantizer.report or {}
    assert len(said) == 1
    assert said[0].startswith("Estimate: about ")
    assert any("may fail" in line for line in warned)
    assert report["preflight"]["available_bytes"] == 1000
    assert report["preflight"]["seconds"] > 0
    without = OneBitQuantizer()
    without.quantize_model(tiny_llama())
    assert (without.report or {})["preflight"] is None


def test_the_line_obeys_the_switch_of_progress_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_onebit import progress

    lines: list[str] = []
    monkeypatch.setattr(progress.logger, "warning", lines.append)
    progress.say("one")
    hf_logging.disable_progress_bar()
    try:
        progress.say("two")
    finally:
        hf_logging.enable_progress_bar()
    assert lines == ["one"]


# ---------------------------------------------------------------------------------------------------- the machine


def test_memory_that_is_left(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:   2048 kB\n")
    assert free_memory._machine_memory(str(tmp_path / "meminfo")) == 2048 * 1024
    assert free_memory._machine_memory(str(tmp_path / "none")) is None
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\n")
    assert free_memory._machine_memory(str(tmp_path / "meminfo")) is None


def test_control_groups_of_both_versions(tmp_path: Path) -> None:
    def group(folder: Path, limit: object, used: int, names: tuple[str, str], stat: str) -> None:
        folder.mkdir(parents=True)
        (folder / names[0]).write_text(f"{limit}\n")
        (folder / names[1]).write_text(f"{used}\n")
        (folder / "memory.stat").write_text(stat)

    second, first = ("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")
    group(tmp_path / "v2/outer", 1000, 700, second, "inactive_file 50\n")
    group(tmp_path / "v2/outer/inner", "max", 700, second, "inactive_file 50\n")
    (tmp_path / "own").write_text("0::/outer/inner\n")
    found = free_memory._group_memory(str(tmp_path / "v2"), str(tmp_path / "own"))
    assert [size for size in found if size is not None] == [350]
    group(tmp_path / "v1/memory/job", 500, 700, first, "cache 3\ntotal_inactive_file 100\n")
    (tmp_path / "own").write_text("4:cpu:/x\n3:memory:/job\n")
    found = free_memory._group_memory(str(tmp_path / "v1"), str(tmp_path / "own"))
    assert [size for size in found if size is not None] == [0]
    assert set(free_memory._group_memory(str(tmp_path / "none"), str(tmp_path / "nothing"))) == {None}


def test_the_least_of_them_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(free_memory, "_machine_memory", lambda: 500)
    monkeypatch.setattr(free_memory, "_group_memory", lambda: [None, 300])
    assert available_memory() == 300
    monkeypatch.setattr(free_memory, "_group_memory", list)
    assert available_memory() == 500
    monkeypatch.setattr(free_memory, "_machine_memory", lambda: None)
    assert available_memory() is None


# Both runs are in one process of their own: the first brings in all that is loaded once.
_MEASURED = """
import sys
sys.path.insert(0, sys.argv[1])
from tiny import tiny_ids, tiny_llama
from hf_onebit import OneBitQuantizer
from hf_onebit.evaluation import peak_memory_mb
from hf_onebit.rungs.recipes import RECIPES, Recipe
RECIPES["fast"] = Recipe(rounds=1, steps=2)  # as much memory, in less time
def peak():
    return int(peak_memory_mb() * 1e6)
def run(count, **sizes):
    rows = [{"input_ids": tiny_ids(1, 128, seed=i)} for i in range(count)]
    model = tiny_llama(**sizes)
    quantizer = OneBitQuantizer(preset="fast", dataset=rows, calibration_tokens=10**6)
    before = peak()
    quantizer.quantize_model(model)
    return peak() - before, quantizer.report["preflight"]["more_bytes"]
run(2)
print(*run(96, hidden=256, intermediate=512, layers=1, heads=4, kv_heads=4))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="resource is a module of Unix")
def test_the_memory_is_within_a_factor_of_three_of_what_it_takes() -> None:
    command = [sys.executable, "-c", _MEASURED, str(Path(__file__).parent)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    grown, said = map(int, done.stdout.split())
    assert grown / 3 < said < 3 * grown
