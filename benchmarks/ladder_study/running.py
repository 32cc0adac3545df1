"""Making and scoring one row; each stage is kept, so that a run that was ended goes on where it was."""

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hf_onebit.config import PRESETS
from hf_onebit.digests import sha256_of_file
from hf_onebit.report import json_safe

from .ours import RUNGS, NotBuilt, missing_rung
from .protocol import CALIBRATION, TEXTS, CannotRun, Places, evaluate, identity, surroundings
from .rows import Row

# The keys of a row's JSON; those of a row that cannot run are the first ones and `reason`.
ALWAYS = ("name", "title", "family", "status", "seed", "command", "model", "device", "threads", "versions")
DONE = (
    "linear_bpw",
    "file_bpw",
    "file_bytes",
    "coverage",
    "calibration",
    "minutes",
    "notes",
    "evaluation",
    "calibration_file",
)


def run_row(
    row: Row, places: Places, results: Path, texts: Sequence[str] = tuple(TEXTS), say: Callable[[str], object] = print
) -> dict[str, Any] | None:
    """Make and score one row, and write its JSON once every text is scored.

    Args:
        row: which.
        places: folders.
        results: folder of the rows' JSON.
        texts: keys of `TEXTS` to score now; the row is not finished before all of its own are.
        say: told what happens.

    Returns:
        the row's JSON, or None where texts are left to score.

    Raises:
        NotBuilt: this release lacks what the row is about.
    """
    target = results / f"{row.name}.json"
    if target.is_file():
        say(f"{row.name}: finished before, see {target.name}")
        return read(target)
    refuse_unbuilt(row)
    command = f"python benchmarks/study.py run {row.name} --model {places.model.name} --data DATA --work WORK"
    head = {"name": row.name, "title": row.title, "family": row.family, "seed": row.seed, "model": identity(places)}
    try:
        made = _kept(places.of(row.name) / "made.json", lambda: _make(row, places, say), say)
        head |= {key: made.pop(key) for key in surroundings() if key in made} or surroundings()
    except CannotRun as reason:
        found = {**head, **surroundings(), "status": "cannot run", "command": command, "reason": str(reason)}
        return write(target, found)
    missing = [text for text in row.texts if text in texts and not _score_file(row, places, text).is_file()]
    if missing:
        model = row.load(places, row.name)
        try:
            for text in missing:
                _score(row, places, model, text, say)
        finally:
            if hasattr(model, "close"):
                model.close()
    scores = {text: read(file) for text in row.texts if (file := _score_file(row, places, text)).is_file()}
    if left := [text for text in row.texts if text not in scores]:
        say(f"{row.name}: not finished, {', '.join(left)} left to score; nothing was written to {results.name}")
        return None
    text = {"file": Path(CALIBRATION).name, "sha256": sha256_of_file(places.data / CALIBRATION)}
    found = {**head, "status": "done", "coverage": None, **made, "evaluation": scores}
    found["calibration_file"] = text if made["calibration"] else None
    return write(target, {**found, "command": made["command"] or command})


def refuse_unbuilt(row: Row) -> None:
    """Say so before anything is loaded.

    Raises:
        NotBuilt: the row's rung or preset is not in this release.
    """
    if row.needs_preset is not None and row.needs_preset not in PRESETS:
        raise NotBuilt(f"{row.name}: this release has no preset {row.needs_preset!r}; it has {', '.join(PRESETS)}")
    if row.family == "ablation" and (reason := missing_rung(row.name.removeprefix("rung-"))):
        raise NotBuilt(f"{row.name}: {reason}; rungs are {', '.join(RUNGS)}")


def _make(row: Row, places: Places, say: Callable[[str], object]) -> dict[str, Any]:
    say(f"{row.name}: making")
    # The minutes are of this machine, wherever the row is scored.
    return {**row.make(places, row.name, row.seed), **surroundings()}


def _score(row: Row, places: Places, model: Any, text: str, say: Callable[[str], object]) -> None:
    start = time.perf_counter()
    found = evaluate(model, places, text)
    found["seconds"] = time.perf_counter() - start
    write(_score_file(row, places, text), found)
    say(f"{row.name}: {text} {found['perplexity']:.2f}, {found['multiple']:.2f} times the float model's, "
        f"KL {found['kl']:.3f}, {found['seconds']:.0f} s")  # fmt: skip


def _score_file(row: Row, places: Places, text: str) -> Path:
    return places.of(row.name) / f"score-{text}.json"


def _kept(file: Path, make: Callable[[], dict[str, Any]], say: Callable[[str], object]) -> dict[str, Any]:
    if file.is_file():
        say(f"{file.parent.name}: made before")
        return read(file)
    return write(file, make())


def read(file: Path) -> dict[str, Any]:
    """A JSON object."""
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def write(file: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Whole or not at all; gives back what a reader will see."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(json_safe(content), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(partial, file)
    return read(file)
