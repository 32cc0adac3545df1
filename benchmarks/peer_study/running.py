"""Making and measuring rows in processes of their own; each stage is kept, so that a run that was ended goes on."""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from ladder_study.making import calibration
from ladder_study.protocol import CALIBRATION, CannotRun, Places, identity, surroundings
from ladder_study.running import read, write

from hf_onebit import evaluation, loading
from hf_onebit.calibration import read_text
from hf_onebit.digests import sha256_of_file

from .llama import make_llama_row
from .rows import ROWS, Row

BENCHMARKS = Path(__file__).resolve().parents[1]
TEST = "wikitext-2/test.txt"
PROMPT_TOKENS = 16


@dataclass(frozen=True)
class Study:
    """One set of rows that compare with each other.

    Attributes:
        places: model, data, working folder, and the GGUF that the model was dequantized from, for llama.cpp's rows.
        pythons: a Python by peer, where it is not this one.
        timeout: seconds of the clock for a stage of a row.
        tokens, context: of the text that is scored.
        calibration_tokens: of the text that calibrates, in sequences of 1024.
        new_tokens, rounds: of decoding.
    """

    places: Places
    pythons: dict[str, str] = field(default_factory=dict)
    timeout: float = 3600
    tokens: int = 8192
    context: int = 1024
    calibration_tokens: int = 16384
    new_tokens: int = 32
    rounds: int = 2

    def protocol(self) -> dict[str, Any]:
        """What every row shares, for the JSON."""
        data = self.places.data
        return {
            "model": identity(self.places),
            **surroundings(),
            "text": {"file": TEST, "sha256": sha256_of_file(data / TEST), "tokens": self.tokens,
                     "context": self.context},
            "calibration": {"file": CALIBRATION, "sha256": sha256_of_file(data / CALIBRATION),
                            "tokens": self.calibration_tokens},
            "decode": {"prompt_tokens": PROMPT_TOKENS, "new_tokens": self.new_tokens, "rounds": self.rounds},
        }  # fmt: skip


def run(
    study: Study, names: list[str], results: Path, again: bool = False, say: Callable[[str], object] = print
) -> None:
    """Make and measure these rows; the JSON is written after each.

    Raises:
        ValueError: the JSON is of another model, text or protocol.
    """
    protocol = study.protocol()
    if results.is_file():
        content = read(results)
        for key in ("model", "text", "calibration", "decode"):
            if content["protocol"][key] != protocol[key]:
                raise ValueError(
                    f"{results} holds rows of another {key}, which do not compare: got {protocol[key]}, expected "
                    f"{content['protocol'][key]}. Name another file with --output"
                )
    else:
        content = {"protocol": protocol, "rows": {}}
    windows = _windows(study)
    common = {
        "model": str(study.places.model),
        "windows": [window.tolist() for window in windows],
        "calibration": _sequences(study),
        "prompt": windows[0][:PROMPT_TOKENS].tolist(),
        "new_tokens": study.new_tokens,
        "rounds": study.rounds,
    }
    for name in names:
        if name in content["rows"] and not again:
            say(f"{name}: in {results.name} already")
            continue
        row = ROWS[name]
        found = _measure(study, row, common, windows, say)
        content["rows"][name] = found
        content["rows"] = {key: content["rows"][key] for key in ROWS if key in content["rows"]}
        content = write(results, content)
        say(f"{name}: {found['reason'] or _figures(found)}")


def _figures(found: dict[str, Any]) -> str:
    decode = found["decode"] and f"{found['decode']['by_bf16']:.2f} x bf16"
    return f"{found['linear_bpw']:.3f} bpw, perplexity {found['perplexity']:.3f}, decode {decode}"


def _windows(study: Study) -> list[torch.Tensor]:
    tokenizer = loading.load_tokenizer(str(study.places.model))
    text = read_text(study.places.data / TEST)
    return evaluation.token_windows(text, tokenizer, study.context, study.tokens)


def _sequences(study: Study) -> list[list[int]]:
    data = calibration(study.places, study.calibration_tokens, 0)
    return [ids for batch in data.batches for ids in batch["input_ids"].tolist()]


def _measure(
    study: Study, row: Row, common: dict[str, Any], windows: list[torch.Tensor], say: Callable[[str], object]
) -> dict[str, Any]:
    folder = study.places.of(row.name)
    spec = {**common, "name": row.name, "peer": row.peer, "options": row.options, "folder": str(folder / "saved")}
    spec |= {"saved": False, "dequantized": False, "repack": True}
    made: dict[str, Any] = {"notes": []}
    if row.peer == "llama":
        spec["folder"] = str(folder)
        if study.places.gguf is None:
            return _row(row, {}, "no GGUF was named with --gguf")
        file = folder / "made.json"
        if not file.is_file():
            say(f"{row.name}: making")
            before = _seconds_of_children()
            try:
                write(file, make_llama_row(spec, study.places.gguf, study.places.work, windows))
            except (CannotRun, RuntimeError, ImportError) as reason:
                return _row(row, {}, str(reason))
            content = read(file)
            content["quantize_seconds"] = min(_seconds_of_children() - before, content["quantize_seconds"])
            write(file, content)
        made = read(file)
        _carry(folder / "measured.json", made)
    elif row.peer != "float":
        file = folder / "made.json"
        if not file.is_file():
            say(f"{row.name}: making")
        if not (file.is_file() and "linear_bpw" in read(file)) and (why := _stage(study, row, "make", spec, file)):
            return _row(row, {}, why)
        made = read(file)
        spec["saved"] = made["saved"]
    measured = folder / "measured.json"
    say(f"{row.name}: measuring")
    why = _stage(study, row, "measure", spec, measured)
    found = read(measured) if measured.is_file() else {"notes": []}
    if why and row.peer == "llama":
        # On some processors its layouts for AMX crash.
        plain = _stage(study, row, "measure", {**spec, "repack": False}, measured)
        found = read(measured)
        found["notes"] = [f"layouts of its own off: with them {why}"]
        why = plain
    elif why and "perplexity" not in found and made.get("saved") is not None:
        first, why = why, _stage(study, row, "measure", {**spec, "dequantized": True}, measured)
        found = read(measured) if measured.is_file() else {"notes": []}
        found["notes"] = [f"its own forward was left: {first}", *found["notes"]]
    found = {**made, **found, "notes": [*made["notes"], *(n for n in found["notes"] if n not in made["notes"])]}
    if "perplexity" not in found:
        return _row(row, found, why or "it gave no perplexity")
    if why:
        found["notes"].append(why)
    return _row(row, found, None)


def _row(row: Row, found: dict[str, Any], reason: str | None) -> dict[str, Any]:
    """What the JSON says of a row; the same keys for all."""
    keys = ("version", "linear_bpw", "perplexity", "tokens", "decode", "load_mb", "quantize_seconds", "saved",
            "dequantized")  # fmt: skip
    kept = {key: found.get(key) for key in keys}
    if row.peer == "float":
        kept["linear_bpw"] = 16.0
    return {"peer": row.peer, "title": row.title, "bits": row.bits, "reason": reason, **kept,
            "notes": found.get("notes", [])}  # fmt: skip


def _carry(file: Path, made: dict[str, Any]) -> None:
    """What the parent measured of a row itself stands where the child goes on."""
    if not file.is_file():
        write(file, {key: made[key] for key in ("perplexity", "tokens", "dequantized")} | {"notes": []})


def _stage(study: Study, row: Row, stage: str, spec: dict[str, Any], out: Path) -> str | None:
    """Run one stage in the peer's Python; why it did not end well, or None."""
    spec_file = out.with_name(f"{stage}-spec.json")
    write(spec_file, spec)
    python = study.pythons.get(row.peer, sys.executable)
    paths = os.pathsep.join(map(str, (BENCHMARKS, BENCHMARKS.parent)))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
                   "HF_HUB_OFFLINE": "1", "GPTQMODEL_CPU_WORKERS": "2"}  # fmt: skip
    command = [python, "-m", "peer_study.child", stage, str(spec_file), str(out)]
    log = out.with_name(f"{stage}.log")
    with log.open("w", encoding="utf-8") as said:
        try:
            child = subprocess.Popen(command, env=environment, stdout=said, stderr=subprocess.STDOUT,
                                     stdin=subprocess.DEVNULL, cwd=out.parent, start_new_session=True)  # fmt: skip
        except OSError as reason:
            return f"the Python named for {row.peer} does not start: {reason.strerror}"
        try:
            status = child.wait(study.timeout)
        except subprocess.TimeoutExpired:
            return f"not done within {study.timeout:.0f} s of the clock"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)  # some compile extensions in processes of their own
            child.wait()
    if status == 0:
        return None
    if status == 3 and out.is_file():
        return str(read(out)["reason"])
    how = f"signal {-status}" if status < 0 else f"status {status}"
    return f"its process ended with {how}"


def _seconds_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def load(results: Path) -> dict[str, Any]:
    """The JSON; without a file, no rows."""
    if not results.is_file():
        return {"protocol": {}, "rows": {}}
    found: dict[str, Any] = json.loads(results.read_text(encoding="utf-8"))
    return found
