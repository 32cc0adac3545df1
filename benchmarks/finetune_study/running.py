"""Tuning and running rows; each has its JSON, so that a study that was ended goes on where it was."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ladder_study.protocol import CannotRun
from ladder_study.running import read, write

from .contenders import contender
from .memory import measure_memory
from .protocol import Study
from .rows import ROWS, Rates, Row
from .training import train

BENCHMARKS = Path(__file__).resolve().parents[1]
TUNING = "tuning"


def tune_row(row: Row, study: Study, results: Path, say: Callable[[str], object] = print) -> dict[str, Any]:
    """Try every candidate on the first few sequences, judged by the tuning tokens; those tried before are kept.

    Returns:
        the row's entry of ``tuning.json``: a list of {rates, loss, start}.
    """
    file = results / f"{TUNING}.json"
    protocol = {**study.protocol(), **surroundings(study)}
    content = read(file) if file.is_file() else {"protocol": protocol, "rows": {}}
    refuse_another(file, content["protocol"], study)
    tried = content["rows"].setdefault(row.name, [])
    for rates in row.rates:
        if any(entry["rates"] == rates for entry in tried):
            continue
        say(f"{row.name}: trying {rates}")
        made = contender(row, study, rates)
        teacher = study.teacher if row.objective == "teacher" else None
        parts = study.windows
        found = train(made, row.objective, parts["train"][: study.tuning_steps], parts["tuning"], teacher, say=say)
        measure = "loss" if teacher is None else "kl"
        tried.append({"rates": rates, "start": found["curve"][0][measure], "end": found["curve"][-1][measure]})
        content["rows"] = {name: content["rows"][name] for name in ROWS if name in content["rows"]}
        content = write(file, content)
        tried = content["rows"][row.name]
    return {"tried": tried}


def chosen_rates(row: Row, results: Path) -> tuple[Rates, list[dict[str, Any]]]:
    """The candidate that ended lowest in tuning, and all that were tried; untried, the one in the middle."""
    file = results / f"{TUNING}.json"
    tried = read(file)["rows"].get(row.name, []) if file.is_file() else []
    known = [entry for entry in tried if entry["end"] is not None]
    if not known:
        return row.rates[len(row.rates) // 2], []
    return min(known, key=lambda entry: entry["end"])["rates"], tried


def run_row(row: Row, study: Study, results: Path, say: Callable[[str], object] = print) -> dict[str, Any]:
    """Train or measure one row and write its JSON.

    Raises:
        CannotRun: it needs a model or a library that is not there.
        ValueError: its JSON is of another protocol.
    """
    target = results / f"{row.name}.json"
    if target.is_file():
        found = read(target)
        refuse_another(target, found["protocol"], study)
        say(f"{row.name}: finished before, see {target.name}")
        return found
    rates, tried = chosen_rates(row, results)
    say(f"{row.name}: {rates}")
    start = {} if row.family == "memory" else study.start_of(row.start)
    head = {"name": row.name, "family": row.family, "title": row.title, "protocol": study.protocol(), "start": start,
            "rates": rates, "tried": tried, **surroundings(study), "command": command_of(row, study)}  # fmt: skip
    if row.family == "memory":
        return write(target, {**head, "memory": measure_memory(row, study)})
    made = contender(row, study, rates)
    teacher = study.teacher if row.objective == "teacher" else None
    parts = study.windows
    found = train(made, row.objective, parts["train"], parts["heldout"], teacher, study.evaluations, say)
    return write(target, {**head, "learning": made.learning, **found})


def command_of(row: Row, study: Study) -> str:
    """What makes this row, without the machine's folders."""
    words = ["python benchmarks/finetune.py run", row.name, "--model MODEL --data DATA --work WORK"]
    words += [f"--packed {row.start}=DIR"] * (row.start in study.packed and row.family != "memory")
    names = ("length", "blocks") if row.family == "memory" else ("steps", "length", "heldout", "evaluations", "seed")
    words += [f"--{name} {getattr(study, name)}" for name in names if getattr(study, name) is not None]
    return " ".join(words)


def surroundings(study: Study) -> dict[str, Any]:
    """Processor, threads and versions, bitsandbytes' too where it is there."""
    from importlib import metadata

    found = study.surroundings()
    for name in ("peft", "bitsandbytes"):
        try:
            found["versions"][name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def refuse_another(file: Path, written: dict[str, Any], study: Study) -> None:
    """ValueError where a JSON is of other tokens or another model than this study's."""
    own = json.loads(json.dumps(study.protocol()))
    for key in own:
        if written[key] != own[key]:
            raise ValueError(
                f"{file} holds a row of another {key}, which does not compare: got {own[key]}, expected "
                f"{written[key]}. Name another folder with --results"
            )


def elsewhere(row: Row, python: str, arguments: list[str], timeout: float) -> None:
    """Run the same command in another Python, which has the row's library.

    Raises:
        CannotRun: it does not end well in time.
    """
    paths = os.pathsep.join(map(str, (BENCHMARKS, BENCHMARKS.parent)))
    command = [python, str(BENCHMARKS / "finetune.py"), *arguments]
    try:
        done = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, timeout=timeout, check=False,
                              capture_output=True, text=True)  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as reason:
        raise CannotRun(f"{row.name}: {type(reason).__name__} in the Python named for {row.peer}") from reason
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise CannotRun(f"{row.name}: in the Python named for {row.peer}: {last[0]}")


__all__ = ["CannotRun", "chosen_rates", "elsewhere", "refuse_another", "run_row", "tune_row"]
