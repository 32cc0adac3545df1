"""The study behind docs/results.md: rows on a tiny model, their JSON, what is kept between runs, tables."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import save_float, tiny_ids, tiny_llama, tiny_tokenizer

from hf_onebit import OneBitQuantizer, evaluation, loading

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results" / "study"


@pytest.fixture(scope="module", autouse=True)
def study() -> Iterator[None]:
    """`ladder_study` can be imported."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield
    sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from ladder_study.protocol import Places

    folder = tmp_path_factory.mktemp("study")
    model = tiny_llama(layers=2, hidden=64, intermediate=128, positions=2048).to(torch.bfloat16)
    save_float(model, folder / "tiny", tiny_tokenizer())
    texts = {"wikitext-2/test.txt": 3, "mixed/alice.txt": 2, "mixed/calibration.txt": 7}
    # Nine sequences to calibrate on: the eighth is held out, and the corrections are chosen on it.
    for number, (name, times) in enumerate(texts.items()):
        file = folder / "data" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"All happy families are alike; the {number}th is unhappy.\n\n\nIn its own way. " * 20 * times)
    return Places(folder / "tiny", folder / "data", folder / "work")


def run(places: Any, name: str, results: Path, **options: Any) -> Any:
    from ladder_study.rows import ROWS
    from ladder_study.running import run_row

    return run_row(ROWS[name], places, results, say=lambda _: None, **options)


def check_done(row: dict[str, Any]) -> None:
    from ladder_study.rows import ROWS
    from ladder_study.running import ALWAYS, DONE

    assert row["status"] == "done"
    assert set(row) == {*ALWAYS, *DONE}
    assert set(row["evaluation"]) == set(ROWS[row["name"]].texts)
    for scores in row["evaluation"].values():
        assert scores["multiple"] == pytest.approx(scores["perplexity"] / scores["reference_perplexity"])
        assert {"kl", "top1", "tokens", "sha256", "file", "context"} <= set(scores)
    assert row["versions"]["torch"] == torch.__version__
    assert row["model"]["sha256"]
    assert "/" not in row["command"].replace("benchmarks/study.py", "").replace("mixed/calibration.txt", "")


def test_the_float_model_is_scored_from_its_kept_hidden_states(places: Any, tmp_path: Path) -> None:
    from ladder_study.protocol import TEXTS

    row = run(places, "float", tmp_path)
    check_done(row)
    model, tokenizer = loading.load_float(str(places.model)), loading.load_tokenizer(str(places.model))
    for text, spec in TEXTS.items():
        windows = evaluation.token_windows((places.data / spec.file).read_text(), tokenizer, spec.context, spec.tokens)
        assert row["evaluation"][text]["perplexity"] == evaluation.perplexity(model, windows)["perplexity"]
        assert row["evaluation"][text]["multiple"] == 1.0
    assert row["linear_bpw"] == 16


@pytest.mark.parametrize("name", ["closed", "rtn-2bit-g64", "search-2bit-g64", "gptq-2bit-g64"])
def test_rows_are_scored_beside_the_float_model(places: Any, tmp_path: Path, name: str) -> None:
    from ladder_study.protocol import TEXTS
    from ladder_study.rows import ROWS

    row = run(places, name, tmp_path)
    check_done(row)
    assert json.loads((tmp_path / f"{name}.json").read_text()) == row
    model = ROWS[name].load(places, name)
    reference, tokenizer = loading.load_float(str(places.model)), loading.load_tokenizer(str(places.model))
    spec = TEXTS["alice"]
    windows = evaluation.token_windows((places.data / spec.file).read_text(), tokenizer, spec.context)
    expected = evaluation.compare(model, reference, windows)
    found = row["evaluation"]["alice"]
    assert {key: found[key] for key in expected} == {**expected, "context": spec.context}
    assert found["kl"] > 0
    assert (row["calibration"] is None) == (row["calibration_file"] is None)


def test_a_row_goes_on_where_it_was(places: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ladder_study import running
    from ladder_study.protocol import Places

    fresh = Places(places.model, places.data, tmp_path / "work")
    results = tmp_path / "results"
    assert run(fresh, "rtn-2bit-g64", results, texts=["alice"]) is None
    assert not results.exists()  # nothing that could be taken for a result
    device = running.surroundings()["device"]
    monkeypatch.setattr(running, "surroundings", lambda: {"device": "another", "threads": 99, "versions": {}})
    made, scored = [], []
    make, evaluate = running._make, running.evaluate
    monkeypatch.setattr(running, "_make", lambda *a: (made.append(a), make(*a))[1])
    monkeypatch.setattr(running, "evaluate", lambda m, p, text: (scored.append(text), evaluate(m, p, text))[1])
    row = run(fresh, "rtn-2bit-g64", results)
    assert (made, scored) == ([], ["test", "test_8k"])
    assert row["device"] == device  # its minutes are of the machine that made it
    assert run(fresh, "rtn-2bit-g64", results) == row
    assert scored == ["test", "test_8k"]  # a finished row is not scored again


@pytest.mark.parametrize(
    "rung", ["closed", "importance", "signs", "prefix", "correction", "blocks", "distillation", "flips"]
)
def test_each_row_of_the_ablation_has_its_rungs_and_no_more(places: Any, tmp_path: Path, rung: str) -> None:
    row = run(places, f"rung-{rung}", tmp_path)
    check_done(row)
    side = json.loads((places.of(f"rung-{rung}") / "packed" / "hf_onebit.json").read_text())["report"]
    assert (side["calibration"] is None) == (rung == "closed")
    if rung in ("closed", "importance"):
        assert side["fit"] is None
        return
    drift, layers = side["fit"]["drift"], side["fit"]["layers"]
    distillation = side["fit"]["distillation"]
    assert bool(side["fit"]["blocks"]) == (rung in ("blocks", "distillation", "flips"))
    if rung in ("distillation", "flips"):
        assert bool(distillation["flips"]) == (rung == "flips")
        assert rung != "flips" or distillation["flips"]["log"]
        return
    assert distillation is None
    assert (max(drift.values()) == 0) == (rung == "signs")  # of the float prefix, nothing drifts
    corrections = {record["correction"] for record in layers.values()}
    assert corrections == {0.0} if rung in ("signs", "prefix") else corrections != {0.0}


def test_rungs_from_block_tuning_on_share_one_walk(
    places: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In any order, with the tensors that each of them has alone, and minutes that count the walk."""
    from ladder_study.protocol import Places

    from hf_onebit.rungs import ladder

    tuned: list[str] = []
    tune = ladder.tune
    monkeypatch.setattr(ladder, "tune", lambda block, *a: (tuned.append(block.name), tune(block, *a))[1])
    alone, shared = (Places(places.model, places.data, tmp_path / name) for name in ("alone", "shared"))
    own = run(alone, "rung-blocks", tmp_path / "results-alone", texts=[])
    once = len(tuned)
    assert once > 0
    for rung in ("distillation", "flips", "blocks"):
        run(shared, f"rung-{rung}", tmp_path / "results-shared", texts=[])
    assert (own, len(tuned)) == (None, 2 * once)
    first, second = (load_file(at.of("rung-blocks") / "packed" / "model.safetensors") for at in (alone, shared))
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    made = {rung: json.loads((shared.of(f"rung-{rung}") / "made.json").read_text()) for rung in ("blocks", "flips")}
    blocks = (shared.of("walk-of-rungs") / "seed0").glob("model.layers.*.json")
    walk = max(json.loads(file.read_text())["content"]["seconds"] for file in blocks)
    assert all(60 * found["minutes"] > walk for found in made.values())


def test_the_switches_are_put_back() -> None:
    from ladder_study import ours

    from hf_onebit.conducting import installing
    from hf_onebit.rungs import ladder, upper_rungs

    def found() -> tuple[Any, ...]:
        here = (ladder._as_stored, ladder.STRENGTHS, upper_rungs._flip)
        return (*here, installing.distill_scales, OneBitQuantizer.recipes)

    before = found()
    undo = ours._apply(ours._switches("signs", "fast"))
    assert max(ladder.STRENGTHS) == 0.0
    undo()
    assert all(a is b for a, b in zip(before, found(), strict=True))


def test_rungs_that_are_not_built_are_refused(places: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ladder_study import ours, running

    monkeypatch.setattr(ours, "SWITCHES", {"flips": ("no_such_field", None)})
    with pytest.raises(ours.NotBuilt, match=r"no rung 'flips' \(Recipe.no_such_field\)"):
        run(places, "rung-flips", tmp_path)
    monkeypatch.setattr(running, "PRESETS", ("closed",))
    with pytest.raises(ours.NotBuilt, match="no preset 'best'"):
        run(places, "best-seed0", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_gptq_loses_less_than_rounding_and_is_exact_where_bits_are_enough() -> None:
    from ladder_study.gptq import gptq
    from ladder_study.rounding import round_to_nearest, search

    generator = torch.Generator().manual_seed(0)
    W = torch.randn(48, 128, generator=generator)
    x = torch.randn(1024, 128, generator=generator) @ torch.randn(128, 128, generator=generator)
    H = x.T @ x

    def loss(Q: torch.Tensor) -> float:
        return float((((Q - W) @ H) * (Q - W)).sum() / ((W @ H) * W).sum())

    losses = [loss(gptq(W, H, 2, 64)), loss(search(W)), loss(round_to_nearest(W))]
    assert losses == sorted(losses)
    assert losses[0] < 0.7 * losses[1]
    assert loss(gptq(W, H, 8, 64)) < 1e-4
    levels = round_to_nearest(W)[0, :64].unique()
    assert len(levels) <= 4


def test_gptq_follows_its_definition() -> None:
    """Beside a plain loop that updates the inverse of what is left, column by column."""
    from ladder_study.gptq import DAMPING, gptq

    from hf_onebit.algorithms.groupwise import quantize_groupwise

    generator = torch.Generator().manual_seed(1)
    W = torch.randn(5, 8, generator=generator, dtype=torch.float64)
    x = torch.randn(64, 8, generator=generator, dtype=torch.float64)
    H = x.T @ x
    damped = H + DAMPING * H.diagonal().mean() * torch.eye(8)
    work, Q = W.clone(), torch.zeros_like(W)
    for j in range(8):
        if j % 4 == 0:
            group = work[:, j : j + 4].float()
            _, s, z = quantize_groupwise(group, 2, 4, False, damped.diagonal()[j : j + 4].float())
        inverse = torch.linalg.inv(damped[j:, j:])  # of the columns that are not rounded yet
        Q[:, j] = ((work[:, j] + z[0]) / s[0]).round().clamp(0, 3) * s[0] - z[0]
        work[:, j:] -= ((work[:, j] - Q[:, j]) / inverse[0, 0])[:, None] * inverse[0]
    torch.testing.assert_close(gptq(W, H.float(), 2, 4).double(), Q, rtol=1e-3, atol=1e-3)


def test_llama_cpp_scores_the_same_model_alike(places: Any, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    pytest.importorskip("gguf")
    from ladder_study.llama import LlamaLogits

    from hf_onebit.bench.ggml import Ggml
    from hf_onebit.bench.gguf_file import write

    model = loading.load_float(str(places.model), dtype=torch.float32)
    write(model, places.of("llama-check") / "model.gguf", Ggml(), "f16", "f16")
    llama = LlamaLogits(places, "llama-check", 64)
    try:
        windows = [tiny_ids(1, 64)[0], tiny_ids(1, 33, seed=1)[0]]
        found = evaluation.compare(llama, model, windows)
    finally:
        llama.close()
    assert found["kl"] < 1e-4
    assert found["perplexity"] == pytest.approx(found["reference_perplexity"], rel=1e-3)


def test_layers_of_llama_cpp_are_the_models_own(places: Any, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    pytest.importorskip("gguf")
    from ladder_study.gguf_layers import llama_layers

    from hf_onebit.bench.ggml import Ggml
    from hf_onebit.bench.gguf_file import write

    model = loading.load_float(str(places.model), dtype=torch.float32)
    write(model, tmp_path / "float.gguf", Ggml(), "f16", "f16")
    wanted = {name: m for name, m in model.named_modules() if name.endswith(("down_proj", "o_proj"))}
    batches = [{"input_ids": tiny_ids(1, 32)}]
    layers, bits, how = llama_layers(tmp_path / "float.gguf", "Q8_0", model, wanted, batches, tmp_path)
    assert bits == 8.5
    assert how == {"stored": {"Q8_0": len(wanted)}}
    assert set(layers) == set(wanted)
    for name, layer in layers.items():
        error = (layer.weight - wanted[name].weight).norm() / wanted[name].weight.norm()
        assert 0 < error < 0.01, name
    with pytest.raises(RuntimeError, match=r"does not know the type IQ9"):
        llama_layers(tmp_path / "float.gguf", "IQ9", model, wanted, batches, tmp_path)


def test_what_llama_cpp_refuses_is_a_row_with_its_words(places: Any, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    from dataclasses import replace

    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    row = run(replace(places, gguf=tmp_path / "broken.gguf"), "llama-tq2_0", tmp_path)
    assert row["status"] == "cannot run"
    assert "llama.cpp" in row["reason"]
    from ladder_study.tables import details

    assert "cannot run: " in details({"llama-tq2_0": row})


def test_the_command_line(places: Any, tmp_path: Path) -> None:
    script = str(ROOT / "benchmarks" / "study.py")
    page = tmp_path / "results.md"
    page.write_text((ROOT / "docs" / "results.md").read_text())

    def study(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, script, "--results", tmp_path / "json", *arguments]
        return subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)

    folders = ["--model", places.model, "--data", places.data, "--work", places.work]
    done = study("run", "float", "rtn-2bit-g64", *folders)
    assert done.returncode == 0, done.stderr
    assert "rtn-2bit-g64           peers     done" in study("list").stdout
    assert study("table", "--page", page).returncode == 0
    assert study("table", "--page", page, "--check").returncode == 0
    row = json.loads((tmp_path / "json" / "rtn-2bit-g64.json").read_text())
    assert f"| {row['evaluation']['test']['perplexity']:.2f} |" in page.read_text()
    page.write_text(page.read_text().replace("| float (bf16) |", "| float |"))
    assert study("table", "--page", page, "--check").returncode == 1


def test_pages_without_their_markers_are_refused() -> None:
    from ladder_study.tables import NOTHING, TABLES, fill

    with pytest.raises(ValueError, match="expected one for each"):
        fill("<!-- study: ladder -->\n<!-- /study -->\n", {})
    page = "".join(f"<!-- study: {name} -->\nold\n<!-- /study -->\n" for name in TABLES)
    assert fill(page, {}).count(NOTHING) == len(TABLES)
    assert "old" not in fill(page, {})


def test_an_infinite_perplexity_is_shown_as_one() -> None:
    from ladder_study.tables import domain, ladder

    scores = {"perplexity": None, "multiple": None, "kl": 9.0, "top1": 0.0}
    row = {"title": "t", "family": "ladder", "status": "done", "linear_bpw": 1.0, "file_bpw": 2.0, "file_bytes": 10}
    row |= {"minutes": None, "calibration": None}
    row["evaluation"] = dict.fromkeys(("test", "test_8k", "alice"), scores)
    assert ladder({"t": row}).count("∞") == 4
    assert "∞" in domain({"t": row})


def test_the_committed_page_is_what_the_committed_json_says() -> None:
    """So that nobody types a number."""
    from ladder_study.tables import fill, load_rows

    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    rows = load_rows(RESULTS)
    assert fill(page, rows) == page
    assert {file.stem for file in RESULTS.glob("*.json")} == set(rows)
    for row in rows.values():
        if row["status"] == "done":
            check_committed(row)


def check_committed(row: dict[str, Any]) -> None:
    from ladder_study.protocol import TEXTS

    for text, scores in row["evaluation"].items():
        assert scores["context"] == TEXTS[text].context
        if scores["perplexity"] is not None:
            assert scores["multiple"] == pytest.approx(scores["perplexity"] / scores["reference_perplexity"])


def committed(name: str) -> dict[str, Any]:
    row: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return row


def test_figures_in_prose_are_those_of_the_json() -> None:
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    for name in ("fast", "balanced"):
        scores = committed(name)["evaluation"]
        whole, start = (f"{scores[text]['multiple']:.2f}" for text in ("test", "test_8k"))
        assert f"- **`{name}`** meets its target: {whole} on the whole split" in page
        said = page.partition(f"- **`{name}`** meets its target")[2].partition("\n- ")[0]
        assert start in said
    alone = json.loads((RESULTS.parent / "fast_two_threads.json").read_text(encoding="utf-8"))
    kl = alone["distillation"]
    assert f"{alone['seconds'] / 60:.1f} minutes with two threads of an {alone['device']}" in page
    assert f"held-out KL {kl['kl_before']:.3f} before\n  distillation and {kl['kl_after']:.3f} after" in page
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"[{committed('balanced')['evaluation']['test']['multiple']:.1f} times](docs/results.md)" in readme


def test_rows_of_one_table_were_calibrated_on_one_text() -> None:
    digests: dict[int, set[str]] = {}
    for file in RESULTS.glob("rung-*.json"):
        if (data := committed(file.stem)["calibration"]) is not None:
            digests.setdefault(data["tokens"], set()).add(data["sha256"])
    assert digests
    assert all(len(found) == 1 for found in digests.values())
    for name in ("closed", "fast"):
        data = committed(name)["calibration"]
        assert digests[data["tokens"]] == {data["sha256"]}


def test_figures_of_any_size_fit_a_cell() -> None:
    from ladder_study.tables import _number

    shown = [_number(value) for value in (None, 1.234, 2749630.4, 7.48e45)]
    assert shown == ["∞", "1.23", "2,749,630", "7.5e+45"]
