"""The command line: what it prints, where, and with which exit status."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny import save_float, tiny_llama, tiny_tokenizer

import hf_onebit
from hf_onebit import demo, doctor, evaluation, loading, ops
from hf_onebit.cli import build_parser, main
from hf_onebit.config import CALIBRATION_TOKENS, PRESETS, OneBitConfig
from hf_onebit.inspection import inspect
from hf_onebit.nn import packed_layers
from hf_onebit.ops import gpu, gpu_examination
from hf_onebit.quantization.resume import WorkFolder
from hf_onebit.rungs import recipes
from hf_onebit.storage.checkpoint import read_side_file
from hf_onebit.storage.verification import verify
from hf_onebit.texts import self_text

COMMANDS = ("quantize", "eval", "inspect", "verify", "report", "doctor", "demo")
CLOSED = ("--preset", "closed")  # where a test is not about the preset: milliseconds, and no text
TEXT = "The little boat drifted down the river until the sun had set behind the hills. " * 5

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """`run("verify", folder)` gives the exit status and everything that reached standard output and error."""

    def call(*arguments: Any) -> tuple[int, str, str]:
        capfd.readouterr()
        status = main([str(argument) for argument in arguments])
        return status, *capfd.readouterr()

    return call


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def packed(llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`llama_dir`, quantized by the command; read only."""
    folder = tmp_path_factory.mktemp("cli") / "packed"
    assert main(["quantize", str(llama_dir), "-o", str(folder), *CLOSED]) == 0
    return folder


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], check=False, capture_output=True, text=True, timeout=300)


# ---------------------------------------------------------------------------------------------------- quantize


def test_quantize_without_and_with_calibration(llama_dir: Path, text: Path, tmp_path: Path, run: Run) -> None:
    status, out, _ = run("quantize", llama_dir, "-o", tmp_path / "packed", "--json", *CLOSED)
    assert status == 0
    report = json.loads(out)  # one object, and nothing else
    assert report["calibration"] is None
    assert report["output"] == str(tmp_path / "packed")
    assert report["command"] == f"hf-onebit quantize {llama_dir} -o {tmp_path / 'packed'} --json --preset closed"
    assert len(report["layers"]) == 14
    assert verify(tmp_path / "packed")["ok"]

    arguments = ("--calibration", text, "--calibration-tokens", 128, "--calibration-context", 32, "--seed", 3)
    status, out, _ = run("quantize", llama_dir, "-o", tmp_path / "packed", "--json", *CLOSED, *arguments)
    assert status == 0
    calibrated = json.loads(out)
    assert calibrated["calibration"] == calibrated["calibration"] | {"source": "text.txt", "tokens": 128}
    assert calibrated["seed"] == 3
    assert all(record["relative_output_error"] is not None for record in calibrated["layers"].values())
    assert set(report) == set(calibrated)
    assert verify(tmp_path / "packed")["ok"]
    assert os.listdir(tmp_path) == ["packed"]  # the older checkpoint was replaced, and nothing else is left


def test_the_preset_of_the_command_line_is_fast(llama_dir: Path, text: Path, tmp_path: Path, run: Run) -> None:
    few = ("--calibration", text, "--calibration-tokens", 256, "--calibration-context", 32)
    report = json_of(run, "quantize", llama_dir, "-o", tmp_path / "packed", *few)
    assert report["preset"] == inspect(tmp_path / "packed")["preset"] == "fast"
    assert report["fit"]["distillation"]["tokens"] > 0
    assert sorted(report["fit"]["blocks"]) == ["model.layers.0", "model.layers.1"]
    assert build_parser().parse_args(["demo"]).preset == "fast"
    assert OneBitConfig().preset == "closed"  # which needs no text, and so can quantize while loading


def test_without_a_text_the_model_writes_it(llama_dir: Path, tmp_path: Path, run: Run) -> None:
    few = ("--calibration-tokens", 128, "--calibration-context", 64)
    report = json_of(run, "quantize", llama_dir, "-o", tmp_path / "packed", *few)
    assert report["calibration"] == report["calibration"] | {"source": "self (seed 0)", "tokens": 128}


def test_quantize_prints_a_table(llama_dir: Path, tmp_path: Path, run: Run) -> None:
    arguments = ("--planes", 2, "--max-shard-size", "60KB")
    status, out, _ = run("quantize", llama_dir, "-o", tmp_path / "packed", *CLOSED, *arguments)
    assert status == 0
    assert "14" in out
    assert "bits per weight" in out
    assert (tmp_path / "packed" / "model.safetensors.index.json").is_file()
    model = hf_onebit.load(tmp_path / "packed")
    assert {layer.planes for layer in packed_layers(model).values()} == {2}


def test_quantize_skips_what_is_named(llama_dir: Path, tmp_path: Path, run: Run) -> None:
    skips = ("--skip", "lm_head", "--skip", "model.layers.1", "--skip", "up_proj")
    status, out, _ = run("quantize", llama_dir, "-o", tmp_path / "packed", "--json", *CLOSED, *skips)
    assert status == 0
    report = json.loads(out)
    assert len(report["layers"]) == 6
    assert all(name.startswith("model.layers.0.") and "up_proj" not in name for name in report["layers"])
    reasons = {entry["reason"] for entry in report["skipped"].values()}
    assert reasons == {"listed in modules_to_not_convert"}


def test_quantize_writes_a_report(packed: Path) -> None:
    report = json.loads((packed / "report" / "report.json").read_text())
    assert len(report["layers"]) == 14
    assert report["command"] == report["provenance"]["command"]
    assert (packed / "report" / "layer_errors.svg").is_file()
    assert verify(packed)["checksums"] == "match"  # it is no part of the checkpoint


def test_eval_writes_onto_the_card_and_into_the_report(llama_dir: Path, text: Path, tmp_path: Path, run: Run) -> None:
    folder = tmp_path / "packed"
    run("quantize", llama_dir, "-o", folder, *CLOSED)
    card = folder / "README.md"
    card.write_text(card.read_text() + "\nBy hand.\n")
    scored = ("--data", text, "--against", llama_dir, "--context", 64, "--write-card")
    for tokens in (128, 64, 128):
        status, out, _ = run("eval", folder, *scored, "--tokens", tokens, "--json")
        assert status == 0
    measured = json.loads(out)
    side = read_side_file(folder)
    assert side is not None
    entries = side["report"]["evaluations"]
    assert [entry["tokens"] for entry in entries] == [63, 126]  # the same again took the place of the first
    assert entries[1]["perplexity"] == measured["perplexity"]
    assert entries[1]["sha256"] == hashlib.sha256(TEXT.encode()).hexdigest()
    assert (entries[1]["reference"], entries[1]["model"]) == (llama_dir.name, "packed")
    shown = card.read_text()
    assert f"| perplexity | {measured['perplexity']:.4g} |" in shown
    assert "Not evaluated" not in shown
    assert shown.endswith("By hand.\n")
    assert verify(folder)["checksums"] == "match"
    assert (folder / "report" / "quality.svg").is_file()
    status, out, _ = run("report", folder, folder, "-o", tmp_path / "both", "--json")
    assert status == 0
    assert len(json.loads(out)["evaluations"]) == 4
    assert sorted(path.name for path in (tmp_path / "both").iterdir()) == ["quality.svg", "report.json"]
    own = (folder / "report" / "report.json").read_bytes()
    status, _, err = run("report", folder, folder)
    assert status == 2
    assert "several folders need one for what is drawn of all: -o DIR" in err
    assert (folder / "report" / "report.json").read_bytes() == own


def test_cards_that_cannot_be_written_are_refused(llama_dir: Path, packed: Path, text: Path, run: Run) -> None:
    status, _, err = run("eval", llama_dir, "--data", text, "--write-card")
    assert status == 1
    assert "--write-card writes into a packed local folder" in err
    status, _, err = run("report", llama_dir)
    assert status == 1
    assert "no hf_onebit.json with a report" in err
    status, _, err = run("report", packed, packed)
    assert status == 1
    assert "none of these folders was evaluated" in err


def test_the_command_is_on_the_card_and_in_the_side_file(llama_dir: Path, packed: Path) -> None:
    side = read_side_file(packed)
    assert side is not None
    assert side["provenance"]["command"].startswith("hf-onebit quantize ")
    assert side["provenance"]["source"] == llama_dir.name
    assert side["provenance"]["command"] in (packed / "README.md").read_text()


def test_standard_output_holds_one_json_object_whatever_transformers_says(llama_dir: Path, tmp_path: Path) -> None:
    script = (
        "import sys; from transformers import logging; logging.set_verbosity_debug(); logging.enable_progress_bar();"
        "import hf_onebit.integrations.transformers as t; old = t.announce;"
        "t.announce = lambda report: (print('chatter'), old(report));"
        "from hf_onebit.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    done = python("-c", script, "quantize", str(llama_dir), "-o", str(tmp_path / "packed"), "--json", *CLOSED)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["coverage"] == 1.0
    assert "chatter\n" in done.stderr
    assert "Packed 14 of 15" in done.stderr
    assert "coverage" not in done.stderr.split("Packed 14 of 15")[0]


# -------------------------------------------------------------------------------------------------------- eval


def test_eval_of_a_packed_model(packed: Path, text: Path, run: Run) -> None:
    status, out, _ = run("eval", packed, "--data", text, "--context", 64, "--json")
    assert status == 0
    result = json.loads(out)
    windows = evaluation.token_windows(TEXT, tiny_tokenizer(), 64)
    expected = evaluation.perplexity(hf_onebit.load(packed), windows)
    assert result["perplexity"] == expected["perplexity"]
    assert (result["tokens"], result["context"]) == (expected["tokens"], 64)
    assert (result["kl"], result["top1"], result["against"]) == (None, None, None)
    info = inspect(packed)
    assert {key: result[key] for key in ("linear_bpw", "file_bpw", "file_bytes", "coverage", "layers")} == {
        key: info[key] for key in ("linear_bpw", "file_bpw", "file_bytes", "coverage", "layers")
    }


def test_eval_against_the_float_model(packed: Path, llama_dir: Path, text: Path, run: Run) -> None:
    arguments = ("--data", text, "--context", 64, "--tokens", 200, "--against", llama_dir, "--json")
    status, out, _ = run("eval", packed, *arguments)
    assert status == 0
    result = json.loads(out)
    windows = evaluation.token_windows(TEXT, tiny_tokenizer(), 64, 200)
    expected = evaluation.compare(hf_onebit.load(packed), tiny_llama(), windows)
    for key in ("perplexity", "reference_perplexity", "kl", "top1", "tokens"):
        assert result[key] == pytest.approx(expected[key], rel=1e-5), key
    assert result["kl"] > 0
    assert result["tokens"] == 200 - 4


def test_eval_of_a_float_model(llama_dir: Path, text: Path, run: Run) -> None:
    status, out, _ = run("eval", llama_dir, "--data", text, "--against", llama_dir, "--context", 64, "--json")
    assert status == 0
    result = json.loads(out)
    assert (result["kl"], result["top1"]) == (pytest.approx(0, abs=1e-9), 1.0)
    assert result["linear_bpw"] is None
    assert result["layers"] is None


def test_eval_in_another_dtype(packed: Path, text: Path, run: Run) -> None:
    figures = {}
    for dtype in ("float32", "bfloat16"):
        status, out, _ = run("eval", packed, "--data", text, "--context", 64, "--dtype", dtype, "--json")
        assert status == 0
        figures[dtype] = json.loads(out)["perplexity"]
    assert figures["bfloat16"] != figures["float32"]
    assert figures["bfloat16"] == pytest.approx(figures["float32"], rel=0.02)


def test_eval_prints_its_figures(packed: Path, text: Path, run: Run) -> None:
    status, out, _ = run("eval", packed, "--data", text, "--context", 64)
    assert status == 0
    lines = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert lines["perplexity"] == f"{json_of(run, 'eval', packed, '--data', text, '--context', 64)['perplexity']:,.4f}"
    assert "layers" not in lines
    assert "kl" not in lines


def json_of(run: Run, *arguments: Any) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(run(*arguments, "--json")[1])
    return result


def test_what_json_cannot_say_is_null(packed: Path, text: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = {"perplexity": float("inf"), "nll": float("nan"), "tokens": 3}
    monkeypatch.setattr(evaluation, "perplexity", lambda *_, **__: dict(figures))
    result = json_of(run, "eval", packed, "--data", text, "--context", 64)
    assert (result["perplexity"], result["nll"], result["tokens"]) == (None, None, 3)


# ------------------------------------------------------------------------------------------------------------- mpq


def test_quantize_to_mpq(llama_dir: Path, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "mpq"
    options = ("--method", "mpq", "--bits", 3, "--group-size", 32, "--double-quant", "--search", "min-max")
    result = json_of(run, "quantize", llama_dir, "-o", out, "--preset", "closed", *options)
    assert (result["method"], result["bits"], result["group_size"], result["planes"]) == ("mpq", 3, 32, None)
    info = json_of(run, "inspect", out)
    assert {layer["bits"] for layer in info["layers"].values()} == {3}
    assert info["linear_bpw"] == pytest.approx(result["linear_bpw"])
    status, shown, _ = run("inspect", out)
    assert status == 0
    assert "3 bits / 32" in shown
    assert run("verify", out)[0] == 0
    assert (out / "report" / "report.json").is_file()
    again = json_of(run, "quantize", llama_dir, "-o", out, "--preset", "closed", "--method", "mpq", "--symmetric")
    assert (again["bits"], again["symmetric"]) == (4, True)  # it replaces the older one, with the config's defaults


def test_quantize_to_mpq_with_text(llama_dir: Path, text: Path, tmp_path: Path, run: Run) -> None:
    options = ("--method", "mpq", "--bits", 2, "--act-order", "--preset", "fast", "--calibration", text)
    result = json_of(run, "quantize", llama_dir, "-o", tmp_path / "mpq", *options, "--calibration-context", 64)
    assert result["fit"]["drift"]
    assert result["fit"]["distillation"]["kl_after"] <= result["fit"]["distillation"]["kl_before"]
    assert result["output_errors"]["inputs"] == "packed model"
    assert run("verify", tmp_path / "mpq")[0] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bits", 3], "--bits is an option of --method mpq, and this is --method onebit"),
        (["--method", "mpq", "--planes", 0], "--planes is an option of --method onebit, and this is --method mpq"),
        (["--method", "mpq", "--bits", 0], "bits is 0: expected a whole number from 1 to 8"),
        (["--method", "mpq", "--act-order", "--preset", "closed"], "act_order is True: expected False"),
        (["--preset", "closed", "--target-bpw", 1.5], "target_bpw gives a second plane to the layers that need it"),
        (["--low-memory"], "low_memory is True, but the model would write the calibration text itself"),
        (["--low-memory", "--calibration", "self"], "low_memory is True, but the model would write the calibration"),
        (
            ["--low-memory", "--method", "mpq", "--bits", "auto", "--target-bpw", 4, "--preset", "closed"],
            "low_memory is True, but a target is shared out by measuring the whole model",
        ),
    ],
)
def test_options_that_do_not_go_together_are_refused_before_the_model_is_read(
    options: list[Any], message: str, llama_dir: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("load_float", "load_tokenizer"):
        monkeypatch.setattr(loading, name, lambda *_, name=name, **__: pytest.fail(name))
    status, _, err = run("quantize", llama_dir, "-o", tmp_path / "out", *options)
    assert status == 2
    assert message in err
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------- inspect, verify, doctor


def test_inspect_says_what_the_report_said(packed: Path, run: Run) -> None:
    side = read_side_file(packed)
    assert side is not None
    report, info = side["report"], json_of(run, "inspect", packed)
    for key in ("method", "preset", "planes", "coverage", "linear_bpw", "file_bpw", "file_bytes", "total_weights"):
        assert info[key] == report[key], key
    assert info["skipped"] == report["skipped"]
    assert sorted(info["layers"]) == sorted(report["layers"])
    for name, layer in info["layers"].items():
        assert all(layer[key] == report["layers"][name][key] for key in ("in_features", "planes", "bits_per_weight"))
    assert info["architecture"] == "LlamaForCausalLM"
    assert info["checksums"] is True
    assert info["provenance"] == side["provenance"]


@pytest.mark.parametrize("tied", [True, False])
def test_inspect_counts_tied_weights_once(tied: bool, tmp_path: Path, run: Run) -> None:
    model = tiny_llama(tied=tied)
    total = sum(parameter.numel() for parameter in model.parameters())
    folder = save_float(model, tmp_path / "float", tiny_tokenizer())
    report = json_of(run, "quantize", folder, "-o", tmp_path / "packed", *CLOSED)
    info = json_of(run, "inspect", tmp_path / "packed")
    assert report["total_weights"] == info["total_weights"] == total
    assert report["file_bpw"] == info["file_bpw"]


def test_inspect_prints_tables(packed: Path, run: Run) -> None:
    status, out, _ = run("inspect", packed)
    assert status == 0
    rows = [line.split() for line in out.splitlines() if line.startswith("model.layers.")]
    assert len(rows) == 14
    assert ["model.layers.0.mlp.up_proj", "128x64", "onebit", "1", "1.375"] in rows
    assert "output head" in out


def test_verify(packed: Path, tmp_path: Path, run: Run) -> None:
    status, out, err = run("verify", packed)
    assert (status, err) == (0, "")
    assert out == f"{packed}: good, 49 tensors, checksums match\n"
    assert json_of(run, "verify", packed) == verify(packed)
    hf_onebit.load(packed).save_pretrained(tmp_path / "plain")
    status, out, _ = run("verify", tmp_path / "plain")
    assert status == 0
    assert "good, 49 tensors, no checksums (only hf_onebit's own save writes them)" in out
    with open(tmp_path / "plain" / "model.safetensors", "r+b") as file:
        file.truncate(1000)
    status, out, _ = run("verify", tmp_path / "plain")
    assert status == 1
    assert "BAD" in out
    assert "  - model.safetensors is truncated or damaged" in out
    status, out, _ = run("verify", tmp_path / "plain", "--json")
    assert (status, json.loads(out)["ok"]) == (1, False)


def test_doctor(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    status, out, _ = run("doctor", "--json")
    result = json.loads(out)
    assert (status, result["ok"]) == (0, True)
    assert (
        result["packages"]["torch"] == torch.__version__.split("+")[0]
        or result["packages"]["torch"] == torch.__version__
    )
    on_cpu = [test for test in result["self_test"] if test["device"] == "cpu"]
    assert [test["op"] for test in on_cpu] == ["onebit_linear"] * 4 + ["mpq_linear", "mpq_embedding", "packed_step"]
    assert all(0 < test["error"] < 1e-6 for test in on_cpu[:5])
    assert all(0 <= test["error"] < 1e-6 for test in on_cpu)
    assert {test["reason"] for test in on_cpu} == {None}
    status, out, _ = run("doctor")
    assert status == 0
    assert out.count("self-test: cpu") == 7


@pytest.mark.parametrize("name", ["onebit_linear", "mpq_linear", "mpq_embedding", "packed_step"])
def test_doctor_finds_what_computes_something_else(name: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "packed_step":
        twin = doctor.packed_update.packed_step
        monkeypatch.setattr(
            doctor.packed_update, "packed_step", lambda *arguments: twin(*arguments[:-3], arguments[-3] + 1, 0, False)
        )
    else:
        right = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *arguments: right(*arguments) * 1.001)
    status, out, _ = run("doctor")
    assert status == 1
    wrong = {line.split()[2] for line in out.splitlines() if "WRONG" in line}
    assert wrong == {name}


def test_doctor_examines_each_kernel_of_each_gpu(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the device: what it asks for, and how a refused kernel is reported."""
    asked: list[tuple[str, str, str]] = []

    def examine(device: torch.device, kind: str, **variant: Any) -> str:
        about = " ".join(f"{name}={value}" for name, value in variant.items())
        asked.append((str(device), kind, about))
        return "is off by 1.0e+00 of the largest result" if (kind, variant.get("bits")) == ("mpq", 3) else ""

    plain = doctor._onebit_test
    monkeypatch.setattr(doctor, "_onebit_test", lambda device, *about: plain("cpu", *about) | {"device": device})
    monkeypatch.setattr(doctor, "_device_name", lambda device: f"stand-in {device}")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(gpu, "obstacle", lambda: "")
    monkeypatch.setattr(gpu, "examine", examine)
    status, out, err = run("doctor")
    assert status == 1
    assert "Examining the kernels of cuda:1" in err
    lines = [line.removeprefix("self-test: cuda:1 kernel ") for line in out.splitlines() if "cuda:1 kernel" in line]
    assert [line.split()[0] for line in lines if "REFUSED" not in line] == list(gpu_examination.EXAMINATIONS)
    (refused,) = [line for line in lines if "REFUSED" in line]
    assert refused.startswith("mpq dtype=float16, bits=3, zeros=False")
    assert refused.endswith("REFUSED: is off by 1.0e+00 of the largest result")
    kinds = {kind for _, kind, _ in asked}
    assert kinds == set(gpu_examination.EXAMINATIONS)
    assert {device for device, _, _ in asked} == {"cuda:0", "cuda:1"}
    assert ("cuda:0", "embedding", "dtype=torch.bfloat16 bits=4 zeros=False") in asked  # as the calls name it
    few = len(asked)
    asked.clear()
    status, out, _ = run("doctor", "--all-kernels", "--json")
    result = json.loads(out)
    assert (status, result["ok"]) == (1, False)
    assert len(asked) == len(set(asked)) > 3 * few
    wrong = [test for test in result["self_test"] if not test["ok"]]
    assert {test["op"] for test in wrong} == {"kernel mpq"}
    assert all(test["error"] is None and "is off by" in test["reason"] for test in wrong)
    monkeypatch.setattr(gpu, "obstacle", lambda: "triton is not installed; install it: pip install triton")
    monkeypatch.setattr(gpu, "examine", None)  # nothing to examine
    status, out, _ = run("doctor")
    assert (status, "kernel mpq" in out, "pip install triton" in out) == (0, False, True)


# -------------------------------------------------------------------------------------------------------- demo


def test_the_demo_scores_no_text_that_calibrated(
    llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the model writes both texts, it writes them from different seeds."""
    seeds = []

    def written(model: Any, tokenizer: Any, tokens: int, seed: int) -> str:
        seeds.append(seed)
        return TEXT

    monkeypatch.setattr(self_text, "written_by_model", written)
    monkeypatch.setattr(demo, "_in_own_process", lambda *_: {})
    options: dict[str, Any] = {"preset": "closed", "calibration": "self", "tokens": 64, "context": 32, "seed": 4}
    monkeypatch.setitem(CALIBRATION_TOKENS, "closed", 128)
    result = demo.run(str(tmp_path / "out"), model=str(llama_dir), say=lambda _: None, **options)
    assert result["calibration"]["source"] == "self (seed 4)"
    assert result["text"] == "written by the float model"
    assert seeds == [5]


# ------------------------------------------------------------------------------------------------------ errors


def errors(llama_dir: Path, packed: Path, text: Path, tmp_path: Path) -> dict[str, tuple[list[Any], str]]:
    out = tmp_path / "out"
    (tmp_path / "file").write_text("mine")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("mine")
    (tmp_path / "bad.gguf").write_bytes(b"GGUF\3\0\0\0")
    (tmp_path / "empty.gguf").touch()
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    return {
        "no model": (["quantize", tmp_path / "none", "-o", out], "There is no folder"),
        "model a file": (
            ["quantize", text, "-o", out],
            "is a file: expected a model folder, a hub id, or a .gguf file",
        ),
        "packed": (["quantize", packed, "-o", out], "is quantized already (quant_method 'onebit')"),
        "no calibration": (
            ["quantize", llama_dir, "-o", out, "--calibration", tmp_path / "none"],
            "There is no file",
        ),
        "no gguf": (["quantize", tmp_path / "none.gguf", "-o", out], "none.gguf': pass the path of a .gguf file"),
        "bad gguf": (["quantize", tmp_path / "bad.gguf", "-o", out], "bad.gguf' (unpack_from requires"),
        "empty gguf": (
            ["quantize", tmp_path / "empty.gguf", "-o", out],
            "if it is incomplete, copy or download it again",
        ),
        "out a file": (["quantize", llama_dir, "-o", tmp_path / "file"], "it is a file. Pass a folder"),
        "out not ours": (["quantize", llama_dir, "-o", tmp_path / "mine"], "it holds files that are no checkpoint"),
        "no data": (["eval", packed, "--data", tmp_path / "none"], "pass the path of a local text file"),
        "bad data": (["eval", packed, "--data", tmp_path / "latin.txt"], "is not UTF-8 text"),
        "context": (["eval", packed, "--data", text, "--context", 4096], "expected at most 128"),
        "inspect float": (["inspect", llama_dir], "this is a float model. Quantize it: hf-onebit quantize"),
        "inspect nothing": (["inspect", tmp_path / "none"], "There is no folder"),
        "verify nothing": (["verify", tmp_path / "none"], "There is no folder"),
        "demo data": (["demo", "--data", tmp_path / "none"], "pass the path of a local text file"),
    }


CASES = [
    "no model", "model a file", "packed", "no calibration", "no gguf",
    "bad gguf", "empty gguf", "out a file", "out not ours", "no data", "bad data", "context",
    "inspect float", "inspect nothing", "verify nothing", "demo data",
]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_errors(case: str, llama_dir: Path, packed: Path, text: Path, tmp_path: Path, run: Run) -> None:
    arguments, message = errors(llama_dir, packed, text, tmp_path)[case]
    before = sorted(os.listdir(tmp_path))
    status, out, err = run(*arguments)
    assert status == 1
    assert out == ""
    assert "Traceback" not in err
    told = err[err.index("hf-onebit: error: ") :]
    assert message in told
    status, out, _ = run(*arguments, "--json")
    assert status == 1
    assert list(json.loads(out)) == ["error"]
    assert message in json.loads(out)["error"]
    assert sorted(os.listdir(tmp_path)) == before  # no half-written folder


def test_every_error_case_is_run(llama_dir: Path, packed: Path, text: Path, tmp_path: Path) -> None:
    assert list(errors(llama_dir, packed, text, tmp_path)) == CASES


@pytest.mark.parametrize("existing", [True, False])
def test_a_failure_while_saving_leaves_nothing_behind(
    existing: bool, llama_dir: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    if existing:
        assert run("quantize", llama_dir, "-o", tmp_path / "packed", *CLOSED)[0] == 0
    before = read_side_file(tmp_path / "packed")

    def full(self: Any, folder: Any, **_: Any) -> None:
        (Path(folder) / "model.safetensors").write_bytes(b"half of it")
        raise OSError("No space left on device")

    monkeypatch.setattr(transformers.LlamaForCausalLM, "save_pretrained", full)
    status, out, err = run("quantize", llama_dir, "-o", tmp_path / "packed", "--planes", 2, *CLOSED)
    assert (status, out) == (1, "")
    assert "hf-onebit: error: No space left on device" in err
    assert os.listdir(tmp_path) == (["packed"] if existing else [])
    assert read_side_file(tmp_path / "packed") == before
    if existing:
        assert verify(tmp_path / "packed")["ok"]


def test_an_interrupt_leaves_nothing_behind(
    llama_dir: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(transformers.LlamaForCausalLM, "save_pretrained", interrupted)
    status, out, err = run("quantize", llama_dir, "-o", tmp_path / "packed", *CLOSED)
    assert (status, out) == (130, "")
    assert err.splitlines()[-1] == "hf-onebit: interrupted; nothing was left half-written"
    assert os.listdir(tmp_path) == []


def test_an_interrupt_says_where_the_work_is_kept(
    llama_dir: Path,
    text: Path,
    tmp_path: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setitem(recipes.RECIPES, "fast", recipes.Recipe(rounds=0, steps=0))
    arguments = ("quantize", llama_dir, "-o", tmp_path / "packed", "--preset", "fast", "--calibration", text)
    arguments += ("--calibration-tokens", 256, "--calibration-context", 64)
    save, saved = WorkFolder.save, []

    def interrupted(self: WorkFolder, stage: str, *stored: Any) -> bool:
        if saved:
            raise KeyboardInterrupt
        saved.append(stage)
        return save(self, stage, *stored)

    with monkeypatch.context() as patch:
        patch.setattr(WorkFolder, "save", interrupted)
        status, _, err = run(*arguments)
    work = tmp_path / ".packed.work"
    assert status == 130
    kept = f". What was done so far is kept in {str(work)!r}: the same command goes on from there"
    assert err.splitlines()[-1] == f"hf-onebit: interrupted; nothing was left half-written{kept}"
    assert (run(*arguments)[0], os.listdir(tmp_path)) == (0, ["packed"])
    assert "1 stage is kept" in caplog.text


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_a_killed_process_leaves_the_old_checkpoint_whole(llama_dir: Path, tmp_path: Path, run: Run) -> None:
    target = tmp_path / "packed"
    assert run("quantize", llama_dir, "-o", target, *CLOSED)[0] == 0
    before = read_side_file(target)
    script = (
        "import os, signal, sys; import hf_onebit.storage.checkpoint as c;"
        "c.sha256_of_file = lambda path: os.kill(os.getpid(), signal.SIGKILL);"  # the weights are written by then
        "from hf_onebit.cli import main; main(sys.argv[1:])"
    )
    done = python("-c", script, "quantize", str(llama_dir), "-o", str(target), "--planes", "2", *CLOSED)
    assert done.returncode == -signal.SIGKILL
    assert [path for path in tmp_path.glob(".packed.*.partial") if (path / "model.safetensors").is_file()]
    assert verify(target) == {"ok": True, "checksums": "match", "tensors": 49, "problems": []}
    assert read_side_file(target) == before
    assert run("quantize", llama_dir, "-o", target, "--planes", 2, *CLOSED)[0] == 0  # what was left does not disturb
    assert {layer["planes"] for layer in inspect(target)["layers"].values()} == {2}


def test_a_traceback_is_there_for_who_asks(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ONEBIT_TRACEBACK", "1")
    status, _, err = run("verify", tmp_path / "none")
    assert status == 1
    assert "Traceback (most recent call last)" in err


# -------------------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("arguments", [[], *([command] for command in COMMANDS)], ids=lambda a: " ".join(a) or "alone")
def test_help(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: hf-onebit {' '.join(arguments)}".rstrip())
    if not arguments:
        assert all(command in out for command in COMMANDS)


def test_the_help_names_every_preset_and_its_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["quantize", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    for preset, about in PRESETS.items():
        assert f"{preset} ({about.split()[0]}" in out
        assert f"{CALIBRATION_TOKENS[preset]} for {preset}" in out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"hf-onebit {hf_onebit.__version__}\n"


def test_no_command_is_bad_usage(run: Run) -> None:
    status, out, err = run()
    assert status == 2
    assert "usage: hf-onebit" in out + err


@pytest.mark.parametrize("arguments", [["nonsense"], ["quantize"], ["quantize", "m"], ["verify", "a", "--x"]])
def test_bad_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "hf-onebit" in captured.err


@pytest.mark.parametrize(
    ("command", "option", "value", "message"),
    [
        ("quantize", "--method", "gptq", "Unknown method 'gptq': expected 'onebit'"),
        ("quantize", "--preset", "quick", "preset is 'quick': expected one of 'closed'"),
        ("quantize", "--planes", "3", "planes is 3: expected a whole number from 1 to 2"),
        ("quantize", "--skip", "(", "no valid regular expression"),
        ("quantize", "--search", "none", "invalid choice: 'none'"),
        ("quantize", "--bits", "x", "argument --bits: 'x' is no number of bits: expected a whole number or auto"),
        ("quantize", "--bits", "3", "--bits is an option of --method mpq, and this is --method onebit"),
        ("quantize", "--planes-per-layer", "up_proj", "expected NAME=N"),
        ("quantize", "--max-shard-size", "many", "'many': expected a number of bytes above 0"),
        ("quantize", "--device", "abacus", "Cannot run on --device 'abacus'"),
        ("import", "--max-shard-size", "0", "'0': expected a number of bytes above 0"),
        ("eval", "--context", "1", "'1': expected a whole number, at least 2"),
        ("eval", "--tokens", "x", "'x': expected a whole number, at least 2"),
        ("eval", "--device", "abacus", "Cannot run on --device 'abacus'"),
        ("demo", "--preset", "quick", "invalid choice: 'quick'"),
        ("demo", "--tokens", "1", "'1': expected a whole number, at least 2"),
    ],
)
def test_a_value_that_cannot_be_is_bad_usage(
    command: str,
    option: str,
    value: str,
    message: str,
    llama_dir: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = {
        "quantize": [str(llama_dir), "-o", str(tmp_path / "out")],
        "import": [str(llama_dir), "-o", str(tmp_path / "out")],
        "eval": [str(llama_dir), "--data", str(text)],
        "demo": ["--model", str(llama_dir), "-o", str(tmp_path / "out")],
    }
    try:
        status: Any = main([command, *words[command], option, value, "--json"])
    except SystemExit as ended:
        status = ended.code
    assert status == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert message in shown.err
    assert not list(tmp_path.iterdir())


def test_the_module_is_the_command(packed: Path) -> None:
    done = python("-m", "hf_onebit.cli", "verify", str(packed), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["checksums"] == "match"
    assert "RuntimeWarning" not in done.stderr


@pytest.mark.long
def test_help_costs_little_more_than_the_import_it_cannot_avoid() -> None:
    def seconds(*arguments: str) -> float:
        start = time.perf_counter()
        done = python(*arguments)
        assert done.returncode == 0, done.stderr
        return time.perf_counter() - start

    ours, theirs = [], []
    for _ in range(3):  # interleaved, so that both meet the same load
        theirs.append(seconds("-c", "import transformers.quantizers"))
        ours.append(seconds("-m", "hf_onebit.cli", "--help"))
    assert min(ours) - min(theirs) <= 0.3 + 0.1 * min(theirs), (ours, theirs)
