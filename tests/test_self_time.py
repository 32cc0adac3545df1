"""What writing the calibration text will take, estimated and said before it starts."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import CAUSAL, tiny_llama, tiny_tokenizer

from hf_onebit import MPQQuantizer, OneBitQuantizer
from hf_onebit.conducting import in_memory
from hf_onebit.dry_run import dry_run
from hf_onebit.preflight import estimates
from hf_onebit.preflight.estimates import Preflight
from hf_onebit.report import plan_summary
from hf_onebit.texts import self_cache, self_text, self_time
from hf_onebit.texts.self_text import write_texts
from hf_onebit.texts.self_time import estimate_writing

SELF = {"dataset": "self", "calibration_tokens": 256, "calibration_context": 64}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ONEBIT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is said, and when the model writes."""
    found: list[str] = []

    def write(*args: Any, **options: Any) -> Any:
        found.append("writing")
        return write_texts(*args, **options)

    monkeypatch.setattr(estimates, "say", found.append)
    monkeypatch.setattr(in_memory, "say", found.append)
    monkeypatch.setattr(self_cache, "write_texts", write)
    return found


@pytest.mark.parametrize("name", CAUSAL)
def test_every_causal_model_is_timed_and_left_as_it_was(name: str) -> None:
    model = CAUSAL[name]().train()
    states = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    before = torch.get_rng_state()
    found = estimate_writing(model, tiny_tokenizer(), 300, longest=24, side_by_side=8)
    assert 0 < found.seconds < 60
    assert found.more_bytes > 0
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(states[key], tensor) for key, tensor in model.state_dict().items())


def test_steps_are_counted_as_they_will_be(monkeypatch: pytest.MonkeyPatch) -> None:
    waves: list[int] = []
    wave = self_text.Writer.wave

    def counted(self: Any, rows: int, steps: int) -> Any:
        waves.append(rows * steps)
        return wave(self, rows, steps)

    monkeypatch.setattr(self_text.Writer, "wave", counted)
    monkeypatch.setattr(self_time, "_time_step", lambda model, tokenizer, rows, *_: rows * 1e-3)
    model = tiny_llama()
    write_texts(model, tiny_tokenizer(), 2000, longest=32, side_by_side=16)
    found = estimate_writing(model, tiny_tokenizer(), 2000, longest=32, side_by_side=16).seconds
    assert 0.75 * sum(waves) < found * 1e3 < 1.3 * sum(waves)  # how many texts are dropped is a guess


def test_more_texts_and_longer_ones_take_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_time, "_time_step", lambda model, tokenizer, rows, *_: 0.01 + rows * 1e-3)
    few, many = (estimate_writing(tiny_llama(), tiny_tokenizer(), count, longest=32) for count in (500, 50_000))
    assert many.seconds > 20 * few.seconds
    assert many.more_bytes > few.more_bytes
    longer = estimate_writing(tiny_llama(), tiny_tokenizer(), 50_000, longest=64)
    assert longer.more_bytes > many.more_bytes


def test_the_measured_time_is_near_what_it_takes() -> None:
    model, arguments = tiny_llama(hidden=256, intermediate=512), (tiny_tokenizer(), 1500)
    found = estimate_writing(model, *arguments, longest=64).seconds
    start = time.perf_counter()
    write_texts(model, *arguments, longest=64)
    taken = time.perf_counter() - start
    assert taken / 6 < found < 6 * taken  # other programs may be at work meanwhile


def test_the_line_tells_the_whole_and_the_part() -> None:
    rest = Preflight(540.0, 2_100_000_000, 70_600_000, 1_000_000_000, None)
    whole = rest.with_writing(360.0, 1_500_000_000)
    assert whole.line() == (
        "Estimate: about 15 min, of it 6 min to write the calibration text, 2.6 GB of memory, 70.6 MB on disk"
    )
    assert rest.with_writing(10.0, 0).memory_bytes == rest.memory_bytes
    unknown = Preflight(None, 10**9, 10**6, 0, None).with_writing(360.0, 0)
    assert unknown.line() == "Estimate: about 6 min to write the calibration text, 1.0 GB of memory, 1.0 MB on disk"


@pytest.mark.parametrize("preset", ["closed", "fast"])
def test_it_is_said_before_the_model_writes_and_once(preset: str, events: list[str]) -> None:
    quantizer = OneBitQuantizer(preset=preset, **SELF)
    quantizer.quantize_model(tiny_llama(layers=1), tiny_tokenizer())
    assert [event.split(":")[0] for event in events] == ["Estimate", "writing"]
    assert "to write the calibration text" in events[0]
    expected = (quantizer.report or {})["preflight"]
    assert 0 < expected["writing_seconds"] < expected["seconds"]
    events.clear()
    again = OneBitQuantizer(preset=preset, **SELF)  # from the cache
    again.quantize_model(tiny_llama(layers=1), tiny_tokenizer())
    assert len(events) == 1
    assert "to write" not in events[0]
    assert (again.report or {})["preflight"]["writing_seconds"] is None


@pytest.mark.parametrize(
    "make",
    [
        lambda: MPQQuantizer(bits="auto", target_bpw=4.0, choices=["2g64", "4g64", "8g64"], **SELF),
        lambda: OneBitQuantizer(target_bpw=2.0, **SELF),
    ],
    ids=["mpq", "onebit"],
)
def test_bits_that_the_text_chooses_are_estimated_after_it(make: Any, events: list[str]) -> None:
    make().quantize_model(tiny_llama(layers=1), tiny_tokenizer())
    assert [event.split(":")[0] for event in events] == ["Estimate", "writing", "Estimate"]
    assert "then bits are chosen by it" in events[0]


def test_a_dry_run_counts_it_in(events: list[str]) -> None:
    def planned() -> Any:
        model = tiny_llama(layers=1)
        return dry_run(OneBitQuantizer.from_pretrained(model, preset="closed", **SELF), tokenizer=tiny_tokenizer())

    before = planned()
    assert 0 < before["preflight"]["writing_seconds"] < before["preflight"]["seconds"]
    assert "to write the calibration text" in plan_summary(before)
    assert any("first, once for all runs" in note for note in before["notes"])
    assert events == []
    OneBitQuantizer(preset="closed", **SELF).quantize_model(tiny_llama(layers=1), tiny_tokenizer())
    after = planned()
    assert after["preflight"]["writing_seconds"] is None
    assert any("in the cache" in note for note in after["notes"])
