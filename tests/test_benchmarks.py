"""The committed benchmarks run, on a tiny model."""

import json
import subprocess
import sys
from pathlib import Path

from tiny import save_float, tiny_llama, tiny_tokenizer

from hf_onebit import OneBitQuantizer, loading

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
    assert len(study["flips"]) == 1
    assert study["perplexity"]["after"]["data.txt"] != study["perplexity"]["before"]["data.txt"]
    assert loading.load(str(tmp_path / "distilled")).config.quantization_config is not None
