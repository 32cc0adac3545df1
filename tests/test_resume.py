"""Interrupted quantizations: work folders by themselves, and runs that are killed and end with the same tensors."""

import copy
import errno
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from tiny import save_float, tiny_ids, tiny_llama, tiny_tokenizer

from hf_onebit import OneBitConfig, OneBitQuantizer, cli
from hf_onebit.algorithms import signs
from hf_onebit.algorithms.blockwise import BlockOptions
from hf_onebit.nn.replace import find_layers, set_packed
from hf_onebit.quantization import resume
from hf_onebit.quantization.resume import (
    Fingerprint,
    WorkFolder,
    digest_of_tensors,
    fingerprint,
    remove_work,
    work_folder_of,
)
from hf_onebit.rungs import upper_rungs
from hf_onebit.rungs.ladder import quantize_on_prefix
from hf_onebit.rungs.recipes import RECIPES, Recipe
from hf_onebit.rungs.upper_rungs import distill_scales
from hf_onebit.storage import checkpoint

TESTS = Path(__file__).resolve().parent
MINE = {"options": {"planes": 1, "seed": 0}, "data": "abc"}
ROWS = [{"input_ids": tiny_ids(1, 32, seed=i)} for i in range(12)]
SMALL = Recipe(
    rounds=1,
    prefix_tokens=288,
    heldout_tokens=40,
    steps=5,
    lengths=(32,),
    step_tokens=64,
    sign_rate=0.02,
    block=BlockOptions(epochs=1),
    flip_rounds=3,
    flip_tokens=128,
)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(RECIPES, "fast", SMALL)
    monkeypatch.setattr(upper_rungs, "KEEP_EVERY_S", 0.0)
    monkeypatch.setattr(upper_rungs, "KEEP_SHARE", math.inf)


def some_state(seed=0):
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "w": torch.randint(-9, 9, (3, 5), generator=generator, dtype=torch.int32),
        "a": torch.rand(4, generator=generator).half(),
    }
    return tensors, {"loss": 0.1 + seed, "names": ["x"], "none": None}


def same(found, expected):
    tensors, values = expected
    return found is not None and digest(found[0]) == digest(tensors) and found[1] == values


def digest(tensors):
    return digest_of_tensors(sorted(tensors.items()))


# ------------------------------------------------------------------------------------------------------ work folders


def test_a_stage_comes_back_as_it_was(tmp_path):
    states = {name: some_state(i) for i, name in enumerate(["model.layers.0", "model.layers.10", "distillation"])}
    with WorkFolder(tmp_path / "work", MINE) as work:
        work.save("distillation", *some_state(9))
        for name, state in states.items():
            assert work.save(name, *state)  # the last in place of what was there
    with WorkFolder(tmp_path / "work", copy.deepcopy(MINE)) as work:
        assert all(same(work.load(name), state) for name, state in states.items())
        assert work.load("flips") is None
    names = sorted(path.name for path in (tmp_path / "work").iterdir())
    assert len(names) == 2 * len(states) + 2, names


def test_tensors_that_share_memory_are_kept_one_by_one(tmp_path):
    base = torch.arange(24.0).view(4, 6)
    tensors = {"all": base, "row": base[1], "turned": base.t(), "again": base}
    with WorkFolder(tmp_path / "work", MINE) as work:
        work.save("s", tensors, {})
        assert same(work.load("s"), (tensors, {}))


def test_work_of_another_kind_is_refused_with_the_differences(tmp_path):
    with WorkFolder(tmp_path / "work", MINE) as work:
        work.save("s", *some_state())
    other = {"options": {"planes": 2, "seed": 0}, "data": "abc", "new": [1, 2]}
    with pytest.raises(ValueError, match="interrupted quantization of another kind") as error:
        WorkFolder(tmp_path / "work", other)
    lines = str(error.value).splitlines()
    assert lines[1:3] == ["  - new: absent / [1, 2]", "  - options.planes: 1 / 2"]
    assert "--no-resume" in lines[3]
    assert "another output" in lines[3]
    with WorkFolder(tmp_path / "work", MINE) as work:  # a refusal harms nothing
        assert same(work.load("s"), some_state())
    with WorkFolder(tmp_path / "work", other, resume=False) as work:
        assert work.load("s") is None
        assert len(list(work.folder.iterdir())) == 2


def test_an_option_that_a_folder_does_not_name_counts_as_its_default(tmp_path):
    with WorkFolder(tmp_path / "work", MINE) as work:
        work.save("s", *some_state())
    defaults = {"options.spread": [1, {"a": None}], "options.within_layer": False}
    newer = {"options": {**MINE["options"], "spread": [1, {"a": None}], "within_layer": False}, "data": "abc"}
    for values in (newer, MINE):  # and what an even newer one writes is taken up by the older in turn
        with WorkFolder(tmp_path / "work", Fingerprint(copy.deepcopy(values), defaults)) as work:
            assert same(work.load("s"), some_state())
            work.save("s", *some_state())
    newer["options"]["within_layer"] = True
    with pytest.raises(ValueError, match=r"options\.within_layer: absent / true"):
        WorkFolder(tmp_path / "work", Fingerprint(newer, defaults))


def test_many_differences_are_cut_short(tmp_path):
    WorkFolder(tmp_path / "work", {f"k{i:02}": 0 for i in range(40)}).close()
    with pytest.raises(ValueError, match="and 28 more"):
        WorkFolder(tmp_path / "work", {f"k{i:02}": 1 for i in range(40)})


@pytest.mark.parametrize("how", ["truncated", "changed", "gone", "json", "foreign"])
def test_a_damaged_stage_and_those_after_it_are_not_used(tmp_path, how, caplog):
    with WorkFolder(tmp_path / "work", MINE) as work:
        for index in range(3):
            work.save(f"s{index}", *some_state(index))
    (tensors,) = (tmp_path / "work").glob("s1.*.safetensors")
    values = tmp_path / "work" / "s1.json"
    if how == "truncated":
        tensors.write_bytes(tensors.read_bytes()[:-3])
    elif how == "changed":
        data = bytearray(tensors.read_bytes())
        data[-1] ^= 1
        tensors.write_bytes(data)
    elif how == "gone":
        tensors.unlink()
    elif how == "json":
        values.write_text(values.read_text().replace('"loss": 1.1', '"loss": 1.2'))
    else:
        values.write_text((tmp_path / "work" / "s2.json").read_text())
    with WorkFolder(tmp_path / "work", MINE) as work:
        assert same(work.load("s0"), some_state(0))
        assert work.load("s1") is None
        assert work.load("s2") is None
        work.save("s1", *some_state(1))
        assert same(WorkFolder._read(work, "s1"), some_state(1))


def test_a_damaged_fingerprint_trusts_only_stages_that_name_the_same_work(tmp_path):
    with WorkFolder(tmp_path / "work", MINE) as work:
        work.save("s", *some_state())
    (tmp_path / "work" / "fingerprint.json").write_text("{")
    with WorkFolder(tmp_path / "work", MINE) as work:
        assert same(work.load("s"), some_state())
    (tmp_path / "work" / "fingerprint.json").write_text("{")
    with WorkFolder(tmp_path / "work", {**MINE, "data": "abd"}) as work:
        assert work.load("s") is None


@pytest.mark.parametrize("call", ["fsync", "replace", "save_file"])
def test_a_disk_error_leaves_the_older_state_and_the_run_goes_on(tmp_path, monkeypatch, call, caplog):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with WorkFolder(tmp_path / "work", MINE) as work:
        work.save("s", *some_state(0))
        with monkeypatch.context() as patch:
            patch.setattr(resume if call == "save_file" else os, call, full)
            assert not work.save("s", *some_state(1))
            assert not work.save("t", *some_state(1))
        assert same(WorkFolder._read(work, "s"), some_state(0))
    with WorkFolder(tmp_path / "work", MINE) as work:
        assert same(work.load("s"), some_state(0))
        assert work.load("t") is None
        assert work.save("s", *some_state(2))


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("all of it")
    with pytest.raises(ValueError, match="no work of a quantization"):
        WorkFolder(tmp_path, MINE, resume=False)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    remove_work(tmp_path)
    assert (tmp_path / "thesis.txt").is_file()


def test_names_of_stages_are_checked(tmp_path):
    with WorkFolder(tmp_path / "work", MINE) as work:
        with pytest.raises(ValueError, match="no name of a stage"):
            work.save("../s", *some_state())
        with pytest.raises(ValueError, match="no name of a stage"):
            work.load("a/b")


def test_one_process_at_a_time(tmp_path):
    pytest.importorskip("fcntl")
    with WorkFolder(tmp_path / "work", MINE) as work:
        with pytest.raises(RuntimeError, match=rf"Another process \({os.getpid()}\) is at work in .*work"):
            WorkFolder(tmp_path / "work", MINE)
        remove_work(tmp_path / "work")  # not while it is in use
        assert work.save("s", *some_state())
    with WorkFolder(tmp_path / "work", MINE) as work:
        assert same(work.load("s"), some_state())
    remove_work(tmp_path / "work")
    assert not (tmp_path / "work").exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_process_leaves_no_lock(tmp_path):
    pytest.importorskip("fcntl")
    script = (
        "import os, signal, sys\nfrom hf_onebit.quantization.resume import _Lock\nfrom pathlib import Path\n"
        "lock = _Lock(Path(sys.argv[1]))\nprint('held', flush=True)\nsignal.pause()\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "work")], stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(RuntimeError, match=str(other.pid)):
            WorkFolder(tmp_path / "work", MINE)
        other.kill()
    WorkFolder(tmp_path / "work", MINE).close()


def test_the_fingerprint_tells_models_data_and_threads_apart(monkeypatch):
    def of(model=None, rows=ROWS, **options):
        return fingerprint(model or tiny_llama(), rows, options, {"rounds": 1})

    def differs(a, b):
        a, b = resume._flat(a), resume._flat(b)
        return {key for key in a.keys() | b.keys() if a.get(key) != b.get(key)}

    assert differs(of(), of()) == set()
    touched = tiny_llama()
    touched.lm_head.weight.data[3, 5] += 1e-6
    assert differs(of(), of(touched)) == {"model.tensors"}
    assert {"model.num_hidden_layers", "model.tensors"} <= differs(of(), of(tiny_llama(layers=3)))
    cut = [{"input_ids": row["input_ids"][:, i : i + 16]} for row in ROWS for i in (0, 16)]  # the same ids, cut in two
    assert differs(of(), of(rows=cut)) == {"data.sha256"}
    masked = [{**ROWS[0], "attention_mask": torch.ones(1, 32, dtype=torch.int64)}, *ROWS[1:]]
    assert differs(of(), of(rows=masked)) == {"data.sha256"}
    assert differs(of(seed=1), of(seed=2)) == {"options.seed"}
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert differs(of(), {**of(), "machine": {**of()["machine"], "threads": 1}}) == {"machine.threads"}
    json.dumps(of(), default=str)


# ------------------------------------------------------------------------------------------------------- whole runs


def tensors_of(folder):
    return {
        name: tensor.clone() for file in checkpoint.weight_files(folder) for name, tensor in checkpoint.tensors_of(file)
    }


def quantizer(model=None, **options):
    config = OneBitConfig(preset="fast", dataset=ROWS, **options)
    return OneBitQuantizer.from_pretrained(model or tiny_llama(), config=config)


class Killed(BaseException):
    """Stands for the end of a process, after which nothing is cleaned up but the lock."""


def stopped_after(monkeypatch, saves):
    """Have the run end with its so-manyth state."""
    count = 0
    original = WorkFolder.save

    def save(self, *args):
        nonlocal count
        done = original(self, *args)
        count += 1
        if count == saves:
            raise Killed
        return done

    monkeypatch.setattr(WorkFolder, "save", save)


@pytest.mark.parametrize(("planes", "stops"), [(1, (1, 2, 3)), (2, (2,))])
def test_finished_blocks_are_not_fitted_again_and_the_rest_is_the_same(monkeypatch, planes, stops):
    """With block tuning, which also changes norms; interrupted after each block."""
    tune = BlockOptions(epochs=2, learning_rate=0.005, sign_rate=0.02)

    def run(work=None, fitted=None):
        model = tiny_llama(layers=3, bias=True)
        names = list(find_layers(model).selected)
        before = digest(model.state_dict())
        fit = signs.fit_signs
        with monkeypatch.context() as patch:
            if fitted is not None:
                patch.setattr(signs, "fit_signs", lambda *a, **k: fitted.append(k["layer"]) or fit(*a, **k))
            try:
                return quantize_on_prefix(
                    model, names, ROWS, planes=planes, rounds=1, block=tune, keep_margins=True, work=work
                )
            finally:
                assert digest(model.state_dict()) == before

    expected = run()
    assert expected.vectors
    assert expected.margins
    assert any(result.best_epoch > 0 for result in expected.blocks.values())
    for saves in stops:
        with tempfile.TemporaryDirectory() as folder:
            with monkeypatch.context() as patch, WorkFolder(folder, MINE) as work:
                stopped_after(patch, saves)
                with pytest.raises(Killed):
                    run(work)
            fitted = []
            with WorkFolder(folder, MINE) as work:
                found = run(work, fitted)
        assert {name.split(".")[2] for name in fitted} == {str(i) for i in range(saves, 3)}
        assert list(found.packed) == list(expected.packed)
        assert all(digest(found.packed[name]) == digest(tensors) for name, tensors in expected.packed.items())
        assert digest(found.vectors) == digest(expected.vectors)
        assert digest(found.margins) == digest(expected.margins)
        assert found.depths == expected.depths
        assert found.blocks == expected.blocks
        timeless = [
            {n: {k: v for k, v in r.items() if k != "seconds"} for n, r in x.records.items()} for x in (found, expected)
        ]
        assert timeless[0] == timeless[1]


@pytest.mark.parametrize("saves", range(1, 9))  # five updates, three rounds of flips
def test_distillation_goes_on_where_it_was(tmp_path, monkeypatch, saves):
    def run(work=None):
        model, teacher = tiny_llama(), tiny_llama().bfloat16()
        names = list(find_layers(model).selected)
        found = quantize_on_prefix(model, names, ROWS[:4], rounds=0, keep_margins=True)
        for name, tensors in found.packed.items():
            set_packed(model, name, tensors)
        told = distill_scales(model, teacher, ROWS, SMALL, 0, work=work, margins=found.margins)
        return told, digest(model.state_dict())

    expected = run()
    assert expected[0]["flips"]["log"][-1]["round"] == SMALL.flip_rounds - 1
    with monkeypatch.context() as patch, WorkFolder(tmp_path / "work", MINE) as work:
        stopped_after(patch, saves)
        with pytest.raises(Killed):
            run(work)
    with WorkFolder(tmp_path / "work", MINE) as work:
        assert run(work) == expected


def test_a_run_leaves_no_work_behind_and_can_be_started_again(tmp_path, monkeypatch):
    quantizer().quantize(tmp_path / "whole")
    with monkeypatch.context() as patch:
        stopped_after(patch, 4)  # two blocks, two steps
        with pytest.raises(Killed):
            quantizer().quantize(tmp_path / "out")
    assert work_folder_of(tmp_path / "out").is_dir()
    assert not (tmp_path / "out").exists()
    quantizer().quantize(tmp_path / "out")
    assert digest(tensors_of(tmp_path / "out")) == digest(tensors_of(tmp_path / "whole"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_another_config_is_refused_and_no_resume_starts_afresh(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stopped_after(patch, 1)
        with pytest.raises(Killed):
            quantizer().quantize(tmp_path / "out")
    with pytest.raises(ValueError, match=r"options.planes: 1 / 2"):
        quantizer(planes=2).quantize(tmp_path / "out")
    with pytest.raises(ValueError, match=r"model.tensors: "):
        quantizer(tiny_llama(seed=1)).quantize(tmp_path / "out")
    monkeypatch.setitem(RECIPES, "fast", Recipe(**{**vars(SMALL), "rounds": 2}))
    with pytest.raises(ValueError, match=r"recipe.rounds: 1 / 2"):
        quantizer().quantize(tmp_path / "out")
    quantizer(planes=2).quantize(tmp_path / "out", resume=False)
    assert not work_folder_of(tmp_path / "out").exists()


def test_the_command_line_resumes_unless_told_otherwise(tmp_path, monkeypatch, capsys):
    save_float(tiny_llama(), tmp_path / "float", tiny_tokenizer())
    (tmp_path / "text.txt").write_text("The boat drifted down the river, and nobody looked up. " * 20)
    arguments = ["quantize", str(tmp_path / "float"), "-o", str(tmp_path / "out"), "--preset", "fast"]
    arguments += ["--calibration", str(tmp_path / "text.txt"), "--calibration-context", "32"]
    with monkeypatch.context() as patch:
        stopped_after(patch, 1)
        with pytest.raises(Killed):
            cli.main(arguments)
    assert cli.main([*arguments, "--seed", "1"]) == 1
    assert "options.seed: 0 / 1" in capsys.readouterr().err
    assert cli.main([*arguments, "--seed", "1", "--no-resume"]) == 0
    assert not work_folder_of(tmp_path / "out").exists()


def test_a_work_folder_of_ones_own_stays_until_the_model_is_saved(tmp_path):
    run, model = quantizer(), tiny_llama()
    run.quantize_model(model, work_dir=tmp_path / "work")
    assert (tmp_path / "work").is_dir()
    again = quantizer()
    second = again.quantize_model(tiny_llama(), work_dir=tmp_path / "work")
    assert digest(model.state_dict()) == digest(second.state_dict())
    again.save(second, tmp_path / "out")
    assert not (tmp_path / "work").exists()


def test_saves_that_were_killed_are_swept_up(tmp_path):
    pytest.importorskip("fcntl")
    (tmp_path / ".out.abcdef.partial").mkdir()
    (tmp_path / ".out.abcdef.partial" / "model.safetensors").write_text("half of it")
    (tmp_path / ".other.abcdef.partial").mkdir()
    with checkpoint.atomic_folder(tmp_path / "out") as first:
        with checkpoint.atomic_folder(tmp_path / "out") as second:  # one that lives is no leftover
            assert first.is_dir()
            (second / "config.json").write_text("{}")
        (first / "config.json").write_text("{}")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.abcdef.partial", "out"]


# -------------------------------------------------------------------------------------------------------- kill -9


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks, and reads /proc")
@pytest.mark.parametrize(
    ("mode", "kills", "steps", "kind"),
    [
        ("calls", 6, 8, "one plane"),
        ("calls", 6, 8, "experts"),
        pytest.param("calls", 60, 120, "one plane", marks=pytest.mark.long),
        pytest.param("moments", 60, 120, "one plane", marks=pytest.mark.long),
        pytest.param("calls", 24, 60, "two planes", marks=pytest.mark.long),
        pytest.param("calls", 24, 60, "a target", marks=pytest.mark.long),
        pytest.param("calls", 24, 60, "experts", marks=pytest.mark.long),
    ],
)
def test_killed_runs_end_with_the_same_tensors(tmp_path, mode, kills, steps, kind):
    command = [sys.executable, str(TESTS / "interrupted.py"), str(tmp_path), mode, str(kills), str(steps), kind]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900, env=environment)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["killed"] >= min(kills, 24), result
    assert digest(tensors_of(tmp_path / "out")) == digest(tensors_of(tmp_path / "reference"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "reference"]
