"""The page on adapters, its example and the benchmark of training steps are run."""

import importlib.util
import json
import re
import runpy
import sys
from pathlib import Path

import pytest
from tiny import save_float, tiny_llama, tiny_tokenizer

pytest.importorskip("peft")

from peft import PeftModel
from transformers import AutoModelForCausalLM

from hf_onebit import MPQConfig, OneBitConfig
from hf_onebit.nn import packed_layers
from hf_onebit.ops import cpu

ROOT = Path(__file__).resolve().parents[2]
TEXT = "The boat drifted down the river, and nobody on the bank looked up. " * 30


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    save_float(tiny_llama(), tmp_path / "model-float", tiny_tokenizer())
    for name, config in {"model-onebit": OneBitConfig(), "model-mpq": MPQConfig(bits=4, group_size=32)}.items():
        packed = AutoModelForCausalLM.from_pretrained(tmp_path / "model-float", quantization_config=config)
        packed.save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_python_of_the_page_runs(workplace):
    text = (ROOT / "docs" / "peft.md").read_text(encoding="utf-8")
    names: dict[str, object] = {}
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    assert len(blocks) >= 5
    for block in blocks:
        exec(compile("\n" * text[: block.start(1)].count("\n") + block[1], "docs/peft.md", "exec"), names)
    assert not packed_layers(AutoModelForCausalLM.from_pretrained("merged-float"))
    assert packed_layers(AutoModelForCausalLM.from_pretrained("trained-scales"))


@pytest.mark.parametrize("base", ["model-onebit", "model-mpq"])
def test_the_example_trains(base, workplace, monkeypatch, capsys):
    arguments = [base, "text.txt", "-o", "adapter", "--steps", "5", "--length", "32", "--lr", "1e-2", "--rank", "4"]
    monkeypatch.setattr(sys, "argv", ["lora_on_packed.py", *arguments, "--residual", "model-float"])
    runpy.run_path(str(ROOT / "examples" / "lora_on_packed.py"), run_name="__main__")
    shown = capsys.readouterr().out
    before, after = map(float, re.search(r"outputs: ([\d.]+) packed, ([\d.]+) with", shown).groups())
    assert after < before
    first, last = map(float, re.search(r"^loss ([\d.]+) -> ([\d.]+), adapter in adapter$", shown, re.M).groups())
    assert last < first - 0.1
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), "adapter")


def test_the_example_recovers(workplace, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    (workplace / "heldout.txt").write_text("Rain fell on the roofs of the town for seven days. " * 8, encoding="utf-8")
    arguments = ["model-onebit", "model-float", "text.txt", "heldout.txt", "out", "--steps", "8", "--length", "32"]
    monkeypatch.setattr(sys, "argv", ["recover_one_bit.py", *arguments, "--lr", "1e-3", "--lr-signs", "1e-2"])
    runpy.run_path(str(ROOT / "examples" / "recover_one_bit.py"), run_name="__main__")
    shown = capsys.readouterr().out
    curves = json.loads((workplace / "out" / "curves.json").read_text())
    assert set(curves) == {"LoRA", "scales alone", "packed signs"}
    for name, curve in curves.items():
        assert [entry["tokens"] for entry in curve] == [0, 64, 128, 192, 256]
        assert curve[0] == curves["LoRA"][0]
        assert curve[-1]["kl"] < curve[0]["kl"] or name == "packed signs"  # a few votes say little of random weights
        assert f"{name}, 8 updates: loss {curve[-1]['nll']:.4f}" in shown
    assert curves["packed signs"][-1]["kl"] != curves["scales alone"][-1]["kl"]
    drawn = (workplace / "out" / "curves.svg").read_text()
    assert drawn.count("<svg") == 1


@pytest.mark.skipif(cpu.isa() is None, reason="no compiled CPU kernels")
def test_the_benchmark_of_training_steps(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("train_step", ROOT / "benchmarks" / "train_step.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    small = ["--layers", "1", "--tokens", "16", "--hidden", "288", "--rounds", "2", "--rank", "2"]
    assert module.main([*small, "--checkpointing", "--json", str(tmp_path / "steps.json")]) == 0
    figures = json.loads((tmp_path / "steps.json").read_text())
    assert set(figures["ratios"]) == {"bf16", "onebit", "mpq 4 bit", "mpq 4 bit, codes learn"}
    assert figures["ratios"]["bf16"] == 1
    assert all(0 < e < module.BOUNDS[dtype] for errors in figures["errors"].values() for dtype, e in errors.items())
    shown = capsys.readouterr().out
    assert "of bf16's" in shown
    assert "codes are the twin's: True" in shown


def test_ratios_of_the_page_are_those_of_the_file() -> None:
    ratios = json.loads((ROOT / "docs" / "results" / "train_step.json").read_text())["ratios"]
    page = (ROOT / "docs" / "training.md").read_text().partition("## What a step costs")[2].partition("\n## ")[0]
    table = [line for line in page.splitlines() if line.endswith("|")][2:]
    shown = [float(line.rstrip(" |").rpartition(" ")[2]) for line in table]
    assert shown == [round(ratio, 2) for name, ratio in ratios.items() if name != "bf16"]
    assert all(ratio <= (2.5 if "learn" in name else 1.5) for name, ratio in ratios.items())
