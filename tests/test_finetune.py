"""The study of fine-tuning: rows on a tiny model, what is kept between runs, memory counts, the tables of the page."""

import gc
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import save_float, tiny_llama, tiny_tokenizer

from hf_onebit import OneBitConfig
from hf_onebit.bench.memory import allocated

pytest.importorskip("peft")

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
SIZES = {"steps": 6, "length": 32, "heldout": 96, "tuning": 64, "tuning_steps": 2, "evaluations": 2}


@pytest.fixture(scope="module", autouse=True)
def finetune_study() -> Iterator[None]:
    """`finetune_study` can be imported."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield
    sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from finetune_study.protocol import Study
    from ladder_study.protocol import Places
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("finetune")
    save_float(tiny_llama(layers=1).to(torch.bfloat16), folder / "float", tiny_tokenizer())
    packed = AutoModelForCausalLM.from_pretrained(folder / "float", quantization_config=OneBitConfig())
    packed.save_pretrained(folder / "onebit")
    for name in ("valid", "test"):
        file = folder / "data" / "wikitext-2" / f"{name}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{name}: all happy families are alike. " * 20)
    return Study(Places(folder / "float", folder / "data", folder / "work"), {"onebit": folder / "onebit"}, **SIZES)


def test_windows_are_the_same_each_time_and_never_shared(study: Any) -> None:
    from finetune_study.protocol import Study

    parts = study.windows
    assert {name: len(found) for name, found in parts.items()} == {"train": 6, "tuning": 2, "heldout": 3}
    again = Study(study.places, {}, **SIZES).windows
    assert all(torch.equal(a, b) for name in parts for a, b in zip(parts[name], again[name], strict=True))
    other = Study(study.places, {}, **{**SIZES, "seed": 1}).windows
    assert not all(torch.equal(a, b) for a, b in zip(parts["train"], other["train"], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(parts["heldout"], other["heldout"], strict=True))
    with pytest.raises(ValueError, match="expected at least 1000"):
        Study(study.places, {}, **{**SIZES, "steps": 1000}).windows  # noqa: B018
    with pytest.raises(ValueError, match="expected at least 5"):
        Study(study.places, {}, **{**SIZES, "steps": 5, "tuning": 10000}).windows  # noqa: B018


TRAINED = ("text-adamw", "text-packed-4", "text-lora-4", "onebit-scales", "onebit-packed", "twobits-packed")


@pytest.fixture(scope="module")
def rows(study: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Any]]]:
    """The JSON of one row of each kind, at rates that move a tiny model."""
    import dataclasses

    from finetune_study.rows import ROWS
    from finetune_study.running import run_row

    results = tmp_path_factory.mktemp("results")
    found = {}
    for name in TRAINED:
        slow = {"vote": 3.0, "codes": 1e-2 if name == "text-packed-4" else 1e-4}  # rounding's noise grows with two bits
        rates = {what: slow.get(what, 1e-2) for what in ROWS[name].rates[0]}
        found[name] = run_row(dataclasses.replace(ROWS[name], rates=(rates,)), study, results, lambda _: None)
    return results, found


def test_every_kind_of_row_learns(rows: Any, study: Any) -> None:
    for name, row in rows[1].items():
        first, last = row["curve"][0], row["curve"][-1]
        measure = "loss" if row["family"] == "text" else "kl"
        assert last[measure] < first[measure], name
        assert [entry["tokens"] for entry in row["curve"]] == [0, 96, 192]
        assert row["seconds"] > row["optimizer_seconds"] >= 0
        assert row["learning"] > 0
    losses = {name: row["curve"][0]["loss"] for name, row in rows[1].items()}
    # One packed model; its floats are in float32 in the first row, in bfloat16 in the second.
    assert losses["text-packed-4"] == pytest.approx(losses["text-lora-4"], abs=1e-3)
    assert losses["text-lora-4"] != losses["text-adamw"]
    assert losses["onebit-scales"] == losses["onebit-packed"]
    ends = [rows[1][name]["curve"][-1]["kl"] for name in ("onebit-scales", "onebit-packed")]
    assert ends[0] != ends[1]
    assert rows[1]["text-packed-4"]["metrics"]["flip_rate"] > 0
    assert rows[1]["text-adamw"]["metrics"] == {}


def test_what_learns_is_what_the_row_says(study: Any) -> None:
    from finetune_study.contenders import contender
    from finetune_study.rows import ROWS

    def learning(name: str) -> int:
        return contender(ROWS[name], study, ROWS[name].rates[0]).learning

    linear = 64 * (64 + 32 + 32 + 64) + 3 * 64 * 128
    norms, embedding = 3 * 64, 288 * 64
    assert learning("text-adamw") == linear + norms + 2 * embedding  # the head of its own too
    scales_and_zeros = 2 * (64 + 32 + 32 + 64 + 128 + 128 + 2 * 64)  # groups of 64, two of them in down_proj
    assert learning("text-packed-4") == linear + norms + embedding + scales_and_zeros
    assert learning("text-packed-4-codes") == linear + norms + embedding
    statistics = learning("onebit-scales")
    assert learning("onebit-packed") == statistics + linear
    assert learning("memory-packed-4") == linear


def test_finished_rows_are_kept_and_others_refused(rows: Any, study: Any) -> None:
    from finetune_study.protocol import Study
    from finetune_study.rows import ROWS
    from finetune_study.running import CannotRun, run_row

    said: list[str] = []
    assert run_row(ROWS["text-adamw"], study, rows[0], said.append) == rows[1]["text-adamw"]
    assert said == ["text-adamw: finished before, see text-adamw.json"]
    other = Study(study.places, {}, **{**SIZES, "steps": 5})
    with pytest.raises(ValueError, match="holds a row of another steps"):
        run_row(ROWS["text-adamw"], other, rows[0], said.append)
    with pytest.raises(CannotRun, match=r"--packed onebit=DIR"):
        run_row(ROWS["onebit-lora"], Study(study.places, {}, **SIZES), rows[0], said.append)


def test_tuning_chooses_by_tokens_of_its_own(study: Any, tmp_path: Path) -> None:
    import dataclasses

    from finetune_study.rows import ROWS
    from finetune_study.running import chosen_rates, tune_row

    row = dataclasses.replace(ROWS["text-lora"], rates=({"lora": 0.0}, {"lora": 1e-2}, {"lora": 1e-6}))
    assert chosen_rates(row, tmp_path) == ({"lora": 1e-2}, [])
    tried = tune_row(row, study, tmp_path, lambda _: None)["tried"]
    assert tried[0]["start"] == tried[0]["end"] == tried[1]["start"] > tried[1]["end"]
    assert chosen_rates(row, tmp_path) == ({"lora": 1e-2}, tried)
    said: list[str] = []
    assert tune_row(row, study, tmp_path, said.append)["tried"] == tried
    assert said == []


def test_memory_is_counted(study: Any) -> None:
    from finetune_study.memory import measure_memory
    from finetune_study.rows import ROWS

    names = ("adamw", "lora-4", "packed-4", "packed-4-plain")
    found = {name: measure_memory(ROWS[f"memory-{name}"], study) for name in names}
    assert len({row["weights"] for row in found.values()}) == 1
    assert found["adamw"]["model"] == pytest.approx(4, rel=0.05)
    assert found["packed-4"]["model"] == pytest.approx(0.57, rel=0.05)
    assert found["adamw"]["states"] == pytest.approx(8, rel=0.02)
    assert found["packed-4"]["states"] == pytest.approx(2 + 8 / 64, rel=0.02)  # blocks of 64, for want of 128 inputs
    assert found["lora-4"]["states"] > 8 * 16 * (1 / 64 + 1 / 128)
    assert found["packed-4"]["gradients"] == pytest.approx(0, abs=0.05)
    assert found["packed-4-plain"]["gradients"] == pytest.approx(4, rel=0.02)
    assert found["packed-4"]["peak"] < found["packed-4-plain"]["peak"] < found["adamw"]["peak"]


def test_the_allocators_count() -> None:
    kept = []

    def work() -> None:
        kept.append(torch.empty(1000))
        torch.empty(3000)

    found = allocated(work)
    assert 4000 <= found.left < 4200
    assert 16000 <= found.peak < 16500


def test_the_command_line(rows: Any, study: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from finetune import alone, main

    page = tmp_path / "training.md"
    page.write_text((DOCS / "training.md").read_text(encoding="utf-8"), encoding="utf-8")
    results = ["--results", str(rows[0])]
    assert main([*results, "table", "--page", str(page)]) == 0
    ended = rows[1]["text-packed-4"]["curve"][-1]["loss"]
    assert f"| {ended:.4f} |" in page.read_text(encoding="utf-8")
    assert main([*results, "table", "--page", str(page), "--check"]) == 0
    page.write_text(page.read_text(encoding="utf-8").replace(f"| {ended:.4f} |", "| 0.1 |"), encoding="utf-8")
    assert main([*results, "table", "--page", str(page), "--check"]) == 1
    assert main([*results, "list"]) == 0
    shown = capsys.readouterr().out
    assert "text-adamw               text      done" in shown
    assert "text-lora-nf4            text      to do" in shown
    folders = [f"--{name}={getattr(study.places, name)}" for name in ("model", "data", "work")]
    assert main([*results, "run", "text-lora-nf4", *folders, "--python", f"bnb={tmp_path / 'none'}"]) == 1
    assert "FileNotFoundError in the Python named for bnb" in capsys.readouterr().out
    assert main([*results, "run", "text-lora-nf4", *folders, "--python", "bnb=/bin/false"]) == 1
    assert "no message" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["run", "text-lora", *folders, "--packed", "onebit"])
    assert "expected NAME=PATH" in capsys.readouterr().err
    assert alone(["run", "text-lora", "--seed", "1", "--python", "bnb=x"], "run", "text-lora") == [
        "run", "text-lora", "--seed", "1",
    ]  # fmt: skip


def test_the_curves_are_drawn(rows: Any, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    from finetune import main

    from hf_onebit.report import plot_curves

    assert main(["--results", str(rows[0]), "plot"]) == 0
    assert capsys.readouterr().out.splitlines()[1] == "one_bit.svg: onebit-scales, onebit-packed"
    assert {file.name for file in rows[0].glob("*.svg")} == {"text.svg", "one_bit.svg", "two_bits.svg"}
    assert all(file.read_text().count("<svg") == 1 for file in rows[0].glob("*.svg"))
    with pytest.raises(ValueError, match="no curve"):
        plot_curves({"a": []}, rows[0] / "none.svg")


def test_pages_without_their_markers_are_refused() -> None:
    from finetune_study.tables import NOTHING, TABLES, fill

    with pytest.raises(ValueError, match="expected one for each"):
        fill("<!-- finetune: text -->\n<!-- /finetune -->\n", {})
    page = "".join(f"<!-- finetune: {name} -->\nold\n<!-- /finetune -->\n" for name in TABLES)
    filled = fill(page, {})
    assert filled.count(NOTHING) == len(TABLES) - 1
    assert "Not measured yet: `text-adamw`" in filled
    assert "old" not in filled


def test_the_committed_page_is_what_the_committed_json_says() -> None:
    """So that nobody types a number."""
    from finetune_study.rows import ROWS
    from finetune_study.tables import fill, load_rows

    page = (DOCS / "training.md").read_text(encoding="utf-8")
    results = DOCS / "results" / "finetune"
    rows = load_rows(results)
    assert fill(page, rows) == page
    assert {file.stem for file in results.glob("*.json")} - {"tuning"} == set(rows) <= set(ROWS)
    for family, keys in (("memory", ("blocks", "length")), ("", ("steps", "length", "heldout", "seed"))):
        shown = [row for row in rows.values() if (row["family"] == "memory") == bool(family)]
        assert len({json.dumps([row["protocol"][key] for key in keys]) for row in shown}) <= 1


def test_memory_of_before_does_not_count() -> None:
    """Neither what the work frees, of known size or not, nor a cycle that the collector would come upon meanwhile."""
    unknown, known, cycle = [torch.empty(50_000)], [], []
    allocated(lambda: known.append(torch.empty(60_000)))
    allocated(lambda: cycle.append([torch.empty(70_000)]))
    cycle[0].append(cycle[0])
    cycle.clear()

    def work() -> None:
        unknown.clear()
        known.clear()
        torch.empty(1000)
        many = [[index] for index in range(10_000)]  # the collector would run
        many.clear()

    found = allocated(work)
    assert 4000 <= found.peak < 4200
    assert found.left == 0
    assert gc.isenabled()
