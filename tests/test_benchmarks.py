"""The committed benchmarks run, on a tiny model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import save_float, tiny_llama, tiny_tokenizer

from hf_onebit import OneBitQuantizer, loading
from hf_onebit.ops import cpu

ROOT = Path(__file__).resolve().parents[1]


def test_closed_form_study(tmp_path):
    model = save_float(tiny_llama(layers=1), tmp_path / "float", tiny_tokenizer())
    for name in ("calibration", "data"):
        (tmp_path / f"{name}.txt").write_text(f"{name}: all happy families are alike. " * 20)
    script = str(ROOT / "benchmarks" / "closed_form.py")
    texts = ["--calibration", str(tmp_path / "calibration.txt"), "--data", str(tmp_path / "data.txt")]
    sizes = ["--calibration-tokens", "256", "--tokens", "128", "--context", "64"]
    command = [sys.executable, script, str(model), *texts, *sizes, "--json", str(tmp_path / "study.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    study = json.loads((tmp_path / "study.json").read_text())
    committed = json.loads((ROOT / "docs" / "results" / "closed_form.json").read_text())
    assert [sorted(row) for row in study["rows"]] == [sorted(row) for row in committed["rows"]]
    plain, weighted = study["rows"][1], study["rows"][3]
    assert weighted["output_error"] < plain["output_error"]
    assert study["rows"][4]["weight_error"] < 0.5 * weighted["weight_error"]
    assert done.stdout.count("\n| ") >= len(study["rows"])


def test_every_option_earns_its_place_on_the_real_model():
    """The committed figures: importance lowers the output error; balancing, off by default, does not."""
    study = json.loads((ROOT / "docs" / "results" / "closed_form.json").read_text())
    rows = {(r["planes"], r["use_importance_scaling"], r["use_balancing"]): r for r in study["rows"]}
    assert rows[1, True, False]["output_error"] < rows[1, False, False]["output_error"]
    assert rows[1, True, False]["output_error"] < rows[1, True, True]["output_error"]
    assert rows[2, True, False]["output_error"] < 0.5 * rows[1, True, False]["output_error"]


@pytest.mark.skipif(cpu.isa() is None, reason="no compiled CPU kernels")
def test_group_quantized_products(tmp_path):
    script = str(ROOT / "benchmarks" / "bench_mpq_linear.py")
    options = ["--shape", "96x64", "--batch", "1", "16", "--bits", "3", "8", "--rounds", "1", "--asymmetric"]
    command = [sys.executable, script, *options, "--json", str(tmp_path / "bench.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    bench = json.loads((tmp_path / "bench.json").read_text())
    assert [(row["batch"], row["bits"]) for row in bench["results"]] == [(1, 3), (1, 8), (16, 3), (16, 8)]
    assert all(row["min"] > 0 for row in bench["results"])


def test_study_of_packed_heads(tmp_path):
    model = save_float(tiny_llama(layers=1, tied=True), tmp_path / "float", tiny_tokenizer())
    (tmp_path / "data.txt").write_text("All happy families are alike. " * 20)
    script, out = str(ROOT / "benchmarks" / "head_bits.py"), tmp_path / "study.json"
    options = ["--data", str(tmp_path / "data.txt"), "--tokens", "128", "--context", "64", "--json", str(out)]
    done = subprocess.run([sys.executable, script, str(model), *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    study = json.loads(out.read_text())
    committed = json.loads((ROOT / "docs" / "results" / "head_bits.json").read_text())
    assert sorted(study) == sorted(committed)
    for rows in (study["rows"], committed["rows"]):
        by_bits = {(row["lm_head_bits"], row["embedding_bits"]): row for row in rows}
        plain, eight, four, two = (by_bits[bits, bits] for bits in (None, 8, 4, 2))
        assert eight["file_bytes"] < plain["file_bytes"] < by_bits[8, None]["file_bytes"]
        assert eight["kl"] < four["kl"] < two["kl"]
        assert by_bits[4, None]["untied"]
        assert not eight["untied"]


def test_study_of_flips(tmp_path):
    model = save_float(tiny_llama(layers=1), tmp_path / "float", tiny_tokenizer())
    OneBitQuantizer.from_pretrained(str(model), preset="closed").quantize(str(tmp_path / "packed"))
    (tmp_path / "calibration.txt").write_text("All happy families are alike. " * 800)
    script, out = str(ROOT / "benchmarks" / "flips.py"), tmp_path / "study.json"
    options = ["--calibration", str(tmp_path / "calibration.txt"), "--batches", "2", "--fractions", "1e-3", "1e-4"]
    command = [sys.executable, script, str(tmp_path / "packed"), str(model), *options, "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    study = json.loads(out.read_text())
    committed = json.loads((ROOT / "docs" / "results" / "flips.json").read_text())
    assert sorted(study) == sorted(committed)
    assert [(row["rule"], row["flips"]) for row in study["rows"]] == [
        (rule, round(fraction * study["signs"])) for fraction in (1e-3, 1e-4) for rule in ("gain", "certainty")
    ]


def test_the_surest_flips_lower_what_the_most_promising_ones_raise() -> None:
    """The committed figures, and what the page says of them."""
    study = json.loads((ROOT / "docs" / "results" / "flips.json").read_text())
    changes = {(row["rule"], row["fraction"]): row["kl"] - study["kl_before"] for row in study["rows"]}
    assert min(change for (rule, _), change in changes.items() if rule == "gain") > 0
    assert min(change for (rule, _), change in changes.items() if rule == "certainty") < -0.01
    page = (ROOT / "docs" / "methods" / "distill.md").read_text()
    for fraction in {row["fraction"] for row in study["rows"]}:
        shown = " | ".join(f"{changes[rule, fraction]:+.3f}" for rule in ("gain", "certainty"))
        assert shown.replace("-", "−") in page


def test_the_roofline_is_drawn_from_the_committed_figures(tmp_path):
    pytest.importorskip("matplotlib")
    script = str(ROOT / "benchmarks" / "plot_roofline.py")
    command = [sys.executable, script, "-o", str(tmp_path / "roofline.svg")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "<svg" in (tmp_path / "roofline.svg").read_text()
    committed = sorted((ROOT / "docs" / "results").glob("bench_layers_*.json"))
    assert all(file.name in done.stdout for file in committed)
    for file in committed:
        for entry in json.loads(file.read_text())["layers"]:
            for name, figures in entry["contenders"].items():
                assert name == "read" or figures["error"] <= figures["allowed"]


def test_distillation_study(tmp_path):
    model = save_float(tiny_llama(layers=1), tmp_path / "float", tiny_tokenizer())
    OneBitQuantizer.from_pretrained(str(model), preset="closed").quantize(str(tmp_path / "packed"))
    for name in ("calibration", "data"):
        (tmp_path / f"{name}.txt").write_text(f"{name}: all happy families are alike. " * 40)
    script = str(ROOT / "benchmarks" / "distill.py")
    texts = ["--calibration", str(tmp_path / "calibration.txt"), "--data", str(tmp_path / "data.txt")]
    sizes = "--length 32 --rows 2 --steps 8 --evaluate-every 4 --heldout 4 --tokens 128 --context 64 --flip-rounds 1"
    places = ["--json", str(tmp_path / "study.json"), "--save", str(tmp_path / "distilled")]
    command = [sys.executable, script, str(tmp_path / "packed"), str(model), *texts, *sizes.split(), *places]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    study = json.loads((tmp_path / "study.json").read_text())
    assert study["kl_heldout"]["after"] < study["kl_heldout"]["before"]
    assert [entry["step"] for entry in study["distill"]] == [4, 8]
    assert {entry["round"] for entry in study["flips"]} == {0}
    assert study["perplexity"]["after"]["data.txt"] != study["perplexity"]["before"]["data.txt"]
    assert loading.load(str(tmp_path / "distilled")).config.quantization_config is not None


@pytest.mark.parametrize("fit", ["closed", "signs", "prefix"])
def test_study_of_allocation(fit, tmp_path):
    float_model = tiny_llama()
    float_model.lm_head.weight.data *= 8  # predictions that have something to lose
    model = save_float(float_model, tmp_path / "float", tiny_tokenizer())
    for name in ("calibration", "data"):
        (tmp_path / f"{name}.txt").write_text(f"{name}: all happy families are alike. " * 40)
    script = str(ROOT / "benchmarks" / "allocation.py")
    texts = ["--calibration", str(tmp_path / "calibration.txt"), "--data", str(tmp_path / "data.txt")]
    sizes = f"--fit {fit} --target-bpw 2.1 --calibration-context 64 --tokens 128 --context 64 --random 1"
    command = [sys.executable, script, str(model), *texts, *sizes.split(), "--json", str(tmp_path / "study.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    study = json.loads((tmp_path / "study.json").read_text())
    rows = {row["row"]: row for row in study["rows"]}
    assert list(rows) == ["sensitivity", "no ramp", "depth", "first", "random 0", "one", "two"]
    bits = {name: row["linear_bpw"] for name, row in rows.items()}
    assert all(
        bits["one"] < 0.97 * 2.1 < bits[name] <= 2.1 < bits["two"] for name in bits if name not in ("one", "two")
    )
    assert max(rows["two"]["kl"], rows["sensitivity"]["kl"]) < rows["one"]["kl"]


def test_the_figures_of_allocation_are_on_their_page():
    study = json.loads((ROOT / "docs" / "results" / "allocation.json").read_text())
    page = (ROOT / "docs" / "methods" / "allocation.md").read_text()
    shown = [line.split("|")[2:-1] for line in page.splitlines() if line.endswith("% |")]
    assert [[cell.strip() for cell in line] for line in shown] == [
        [str(row["second_planes"]), f"{row['linear_bpw']:.3f}", f"{row['kl']:.3f}", f"{row['perplexity']:.1f}",
         f"{100 * row['top1']:.1f}%"] for row in study["rows"]
    ]  # fmt: skip
    measured = [row["kl"] for row in study["rows"][:5]]
    assert f"whose five rows are {sum(measured) / 5:.2f} in the mean" in page


def test_signs_in_distillation(tmp_path):
    model = save_float(tiny_llama(tied=True), tmp_path / "float", tiny_tokenizer())
    for name in ("calibration", "data"):
        (tmp_path / f"{name}.txt").write_text(f"{name}: all happy families are alike. " * 40)
    script, out = str(ROOT / "benchmarks" / "signs_in_distillation.py"), tmp_path / "study.json"
    texts = ["--calibration", str(tmp_path / "calibration.txt"), "--data", str(tmp_path / "data.txt")]
    sizes = ["--preset", "fast", "--steps", "2", "--calibration-tokens", "512", "--length", "64"]
    sizes += ["--tokens", "128", "--context", "64", "--rates", "0:0.02", "0.05:0.02"]
    command = [sys.executable, script, str(model), *texts, *sizes, "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    study = json.loads(out.read_text())
    committed = json.loads((ROOT / "docs" / "results" / "signs_in_distillation_h100.json").read_text())
    frozen, learning = study["runs"]
    assert frozen["signs_changed"] == 0
    assert frozen["log"] != learning["log"]  # of random weights the best signs may be the first ones
    assert frozen["kl_before"] == learning["kl_before"]  # both start where the walk ended
    for run in (*study["runs"], *committed["runs"]):
        assert {"sign_rate", "learning_rate", "steps", "log"} <= set(run)
        assert all(set(entry) == {"step", "kl_train", "kl_heldout"} for entry in run["log"])


def test_automatic_bits_part_by_part(tmp_path):
    model = save_float(tiny_llama(layers=1, hidden=96), tmp_path / "float", tiny_tokenizer())
    for name in ("calibration", "data"):
        (tmp_path / f"{name}.txt").write_text(f"{name}: all happy families are alike. " * 20)
    script, out = str(ROOT / "benchmarks" / "auto_bits.py"), tmp_path / "auto.json"
    texts = ["--calibration", str(tmp_path / "calibration.txt"), "--data", str(tmp_path / "data.txt")]
    sizes = ["--calibration-tokens", "256", "--tokens", "128", "--context", "64", "--fit", "closed"]
    sizes += ["--leave", "q_proj"]
    command = [sys.executable, script, str(model), *texts, *sizes, "--work", str(tmp_path / "work"), "-o", str(out)]
    rows = ["auto 3.0", "weights 3.0", "uniform 2g64", "uniform 2p"]
    done = subprocess.run([*command, "--only", *rows], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    study = json.loads(out.read_text())
    assert [row["row"] for row in study["rows"]] == rows
    bits = {row["row"]: row["linear_bpw"] for row in study["rows"]}
    assert 2.7 < bits["auto 3.0"] <= 3.0
    assert 2.7 < bits["weights 3.0"] <= 3.0
    assert bits["uniform 2g64"] == pytest.approx(2 + 32 / 48, abs=0.2)
    assert all(row["kl"] > 0 for row in study["rows"])
    stopped = [*command, "--only", *rows, "uniform 4g64", "--seconds", "0"]
    done = subprocess.run(stopped, capture_output=True, text=True, check=False, timeout=300)
    assert "time is up before uniform 4g64" in done.stderr
    assert json.loads(out.read_text()) == study
    fitted = {file.name for file in (tmp_path / "work" / "packed-closed").iterdir()}
    assert any("k_proj" in name for name in fitted)
    assert not any("q_proj" in name for name in fitted)
    done = subprocess.run([*command, "--only", "llama Q8_0"], capture_output=True, text=True, check=False, timeout=300)
    assert "need --gguf" in done.stderr


def run_script(name, *arguments):
    command = [sys.executable, str(ROOT / "benchmarks" / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_two_planes_in_block_tuning(tmp_path):
    model = save_float(tiny_llama(layers=2), tmp_path / "float", tiny_tokenizer())
    (tmp_path / "text.txt").write_text("All happy families are alike; each unhappy one is so in its own way. " * 99)
    sizes = ["--blocks", 1, "--tokens", 4096, "--epochs", 1, "--json", tmp_path / "out.json"]
    sizes += ["--runs", "as_one:0.1", "alone:0.1"]
    run_script("two_planes.py", model, "--calibration", tmp_path / "text.txt", *sizes)
    found = json.loads((tmp_path / "out.json").read_text())
    assert [run["how"] for run in found["runs"]] == ["as_one", "alone"]
    assert all(
        len(run["blocks"]) == 1 and run["blocks"][0]["best"] <= run["blocks"][0]["start"] for run in found["runs"]
    )


def test_planes_that_learn_as_one_are_the_better_ones_on_the_real_model():
    study = json.loads((ROOT / "docs" / "results" / "two_planes.json").read_text())
    as_one, *alone = study["runs"]
    assert as_one["how"] == "as_one"
    assert all(as_one["drift"][-1] < other["drift"][-1] for other in alone)


def test_what_bounds_a_block(tmp_path):
    model = save_float(tiny_llama(layers=2), tmp_path / "float", tiny_tokenizer())
    text = tmp_path / "text.txt"
    text.write_text("All happy families are alike; each unhappy one is so in its own way. " * 99)
    runs = ["2p:4096:0", "2p:4096:1", "2g64:4096:1"]
    sizes = ["--block", 0, "--judge-tokens", 1024, "--json", tmp_path / "out.json", "--runs", *runs]
    run_script("block_bounds.py", model, "--calibration", text, "--judge", text, *sizes)
    found = json.loads((tmp_path / "out.json").read_text())["runs"]
    assert [run["run"] for run in found] == runs
    assert [run["updates"] > 0 for run in found] == [False, True, True]
    assert all(0 < run["error"] < 1 for run in found)
    assert not run_script("block_bounds.py", model, "--calibration", text, "--judge", text, *sizes)  # all are there


def test_the_page_on_what_bounds_a_block_is_its_json():
    runs = json.loads((ROOT / "docs" / "results" / "block_bounds.json").read_text())["runs"]
    found = {run["run"]: run for run in runs}
    page = (ROOT / "docs" / "methods" / "blockwise.md").read_text()
    for name, planes in found.items():
        form, _, work = name.partition(":")
        if form == "2p":
            training = f"{planes['training']:.3f}" if planes["training"] else "–"
            tokens, epochs = work.split(":")
            row = [tokens, epochs, str(planes["updates"]), f"{planes['error']:.3f}", training]
            assert "| " + " | ".join([*row, f"{found[f'2g64:{work}']['error']:.3f}"]) + " |" in page


def test_the_ladder_in_two_parts(tmp_path, monkeypatch):
    """What walk and distillation leave is scored as a packed model, by the study's protocol."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import ladder_on_gpu
    from ladder_study.protocol import TEXTS, Text

    from hf_onebit.algorithms.blockwise import BlockOptions
    from hf_onebit.rungs.recipes import RECIPES, Recipe

    upper = {
        "steps": 2,
        "lengths": (16, 32),
        "step_tokens": 64,
        "sign_rate": 0.004,
        "flip_rounds": 1,
        "flip_tokens": 64,
    }
    recipe = Recipe(1, 512, (32,), BlockOptions(epochs=1), heldout_tokens=64, **upper)
    monkeypatch.setitem(RECIPES, "best", recipe)
    monkeypatch.setattr(ladder_on_gpu, "CONTEXT", 32)
    for key in ladder_on_gpu.TEXTS:
        monkeypatch.setitem(TEXTS, key, Text(f"{key}.txt", 32, 128, key))
        (tmp_path / f"{key}.txt").write_text(f"{key}: all happy families are alike. " * 20)
    (tmp_path / "calibration.txt").write_text("Each unhappy family is unhappy in its own way. " * 60)
    model = save_float(tiny_llama(layers=1), tmp_path / "float", tiny_tokenizer())
    walked, made, out = (tmp_path / name for name in ("walked.safetensors", "made.safetensors", "out.json"))
    text = ["--calibration", str(tmp_path / "calibration.txt"), "--device", "cpu"]
    assert ladder_on_gpu.main(["walk", str(model), *text, "--planes", "2", "-o", str(walked)]) == 0
    assert ladder_on_gpu.main(["distil", str(model), *text, "--walked", str(walked), "-o", str(made)]) == 0
    places = ["--data", str(tmp_path), "--work", str(tmp_path / "work"), "--json", str(out)]
    assert ladder_on_gpu.main(["score", str(model), f"one={made}", *places]) == 0
    row = json.loads(out.read_text())["one"]
    assert (row["planes"], row["device"], row["lengths"]) == (2, "cpu", [16, 32])
    assert 2 < row["linear_bpw"] < 4  # the layers are small: their scales weigh
    assert set(row["evaluation"]) == set(ladder_on_gpu.TEXTS)
    page = tmp_path / "page.md"
    page.write_text("<!-- gpu: best -->\n<!-- /gpu -->\n<!-- gpu: domain -->\n<!-- /gpu -->\n")
    assert ladder_on_gpu.main(["table", "--json", str(out), "--page", str(page)]) == 0
    assert page.read_text().count("best, 2 planes, seed 0") == 2


def test_the_figures_of_the_gpu_are_on_their_page(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import ladder_on_gpu

    assert ladder_on_gpu.main(["table", "--check"]) == 0
