"""Rows of this package: the float model, the presets through the command line, and the ablation of the rungs."""

import dataclasses
import json
import subprocess
import sys
from typing import Any

import torch

import hf_onebit
from hf_onebit import OneBitConfig, OneBitQuantizer, loading
from hf_onebit.conducting import installing
from hf_onebit.config import CALIBRATION_TOKENS
from hf_onebit.rungs import ladder, upper_rungs
from hf_onebit.rungs.recipes import RECIPES, Recipe

from .protocol import CALIBRATION, Places


class NotBuilt(Exception):
    """The row needs a rung that this release does not have."""


def make_float(places: Places, name: str, seed: int) -> dict[str, Any]:
    """The float model as it is."""
    model = loading.load_float(str(places.model))
    size = sum(file.stat().st_size for file in places.model.glob("*.safetensors"))
    bits = 8 * next(model.parameters()).element_size()
    weights = sum(parameter.numel() for parameter in model.parameters())
    return {"linear_bpw": bits, "file_bpw": 8 * size / weights, "file_bytes": size, "calibration": None,
            "minutes": None, "command": None, "notes": []}  # fmt: skip


def make_preset(places: Places, name: str, seed: int, preset: str, planes: int) -> dict[str, Any]:
    """A preset, by the command line in a process of its own; the same command goes on where a killed one stopped."""
    output = places.of(name) / "packed"
    options = ["--preset", preset, "--planes", str(planes), "--seed", str(seed)]
    texts = ["--calibration", str(places.data / CALIBRATION)]
    program = [sys.executable, "-m", "hf_onebit.cli"]
    command = ["quantize", str(places.model), "-o", str(output), *options, *texts, "--json"]
    done = subprocess.run([*program, *command], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name}: hf-onebit quantize ended with status {done.returncode}")
    shown = ["hf-onebit", "quantize", places.model.name, "-o", output.name, *options, "--calibration"]
    return {**figures(json.loads(done.stdout)), "command": " ".join([*shown, CALIBRATION]), "notes": []}


def figures(report: dict[str, Any]) -> dict[str, Any]:
    """What the tables need of a report."""
    keys = ("linear_bpw", "file_bpw", "file_bytes", "calibration", "coverage")
    return {**{key: report[key] for key in keys}, "minutes": report["seconds"] / 60}


def load_packed(places: Places, name: str) -> Any:
    """The packed module, from the folder that was saved."""
    return loading.load(places.of(name) / "packed").eval()


# ---------------------------------------------------------------------------------------------------- ablation

# Each row has all rungs up to its own. `closed` ones take no recipe.
RUNGS = ("closed", "importance", "signs", "prefix", "correction", "blocks", "distillation", "flips")
# Where a recipe says that there is such a rung, and what stands for "none of it".
SWITCHES: dict[str, tuple[str, Any]] = {
    "blocks": ("block", None),
    "flips": ("flip_rounds", 0),
}
# These rows have one walk over the blocks in common, which the first of them keeps for the others.
ONE_WALK = ("blocks", "distillation", "flips")
# The presets above it have the same rungs, for longer, and flips, whose recipe the last row takes.
BASES = ("fast",)


def make_rung(places: Places, name: str, seed: int, rung: str) -> dict[str, Any]:
    """All rungs up to ``rung``, with the recipe of `base_preset`, and none of the rungs above."""
    options: dict[str, Any] = {"preset": "closed", "seed": seed}
    preset = base_preset()
    level = RUNGS.index(rung)
    if level > 0:
        options["dataset"] = str(places.data / CALIBRATION)
    if level > 1:
        options["preset"] = preset
    else:
        options["calibration_tokens"] = CALIBRATION_TOKENS["closed"]
    output = places.of(name) / "packed"
    switches = _switches(rung, preset)
    quantizer = OneBitQuantizer(OneBitConfig(**options))
    model, tokenizer = loading.load_float(str(places.model)), loading.load_tokenizer(str(places.model))
    walk = places.of("walk-of-rungs") / f"seed{seed}" if rung in ONE_WALK else None
    undo = _apply(switches)
    try:
        quantizer.quantize_model(model, tokenizer, work_dir=walk)
    finally:
        undo()
    hf_onebit.save(model, output, tokenizer=tokenizer, report=quantizer.report)
    with open(output / "hf_onebit.json", encoding="utf-8") as file:
        report = json.load(file)["report"]
    said = [f"recipe of preset {preset}"] if level > 1 else []
    return {**figures(report), "command": None, "notes": said}


def base_preset() -> str:
    """The preset whose rungs are shown one by one."""
    return next(preset for preset in BASES if preset in RECIPES)


def _recipe(preset: str) -> Recipe:
    """Of that preset, with the flips of `best` where it has none."""
    recipe = RECIPES[preset]
    rounds = recipe.flip_rounds or RECIPES["best"].flip_rounds
    return dataclasses.replace(recipe, flip_rounds=rounds)


def missing_rung(rung: str) -> str | None:
    """Why the row of ``rung`` cannot be made by this release; None where it can."""
    preset = base_preset()
    for needed in RUNGS[: RUNGS.index(rung) + 1]:
        if needed not in SWITCHES:
            continue
        field, none = SWITCHES[needed]
        if getattr(_recipe(preset), field, none) == none:
            return f"the recipe of preset {preset!r} has no rung {needed!r} (Recipe.{field})"
    return None


def _switches(rung: str, preset: str) -> dict[tuple[Any, str], Any]:
    """{(module, name): what stands there meanwhile} that turns all rungs above ``rung`` off."""
    above = set(RUNGS[RUNGS.index(rung) + 1 :])
    found: dict[tuple[Any, str], Any] = {}
    if "prefix" in above:
        # Weights that stay float leave the statistics those of the float model.
        found[ladder, "_as_stored"] = lambda module, Q: module.weight.detach()
    if "correction" in above:
        found[ladder, "STRENGTHS"] = (0.0,)
    if "distillation" in above:
        found[installing, "distill_scales"] = lambda *_args, **_options: None
    if "flips" in above:
        # Not by the recipe: the walk that rows share would be another one's, and refused.
        found[upper_rungs, "_flip"] = lambda *_args, **_options: None
    recipe = _recipe(preset)
    if "blocks" in above:
        field, none = SWITCHES["blocks"]
        recipe = dataclasses.replace(recipe, **{field: none})
    found[OneBitQuantizer, "recipes"] = {**RECIPES, preset: recipe}
    return found


def _apply(switches: dict[tuple[Any, str], Any]) -> Any:
    before = {place: getattr(*place) for place in switches}
    for (module, name), value in switches.items():
        setattr(module, name, value)

    def undo() -> None:
        for (module, name), value in before.items():
            setattr(module, name, value)

    return undo


def load_float(places: Places, name: str) -> Any:
    """A float folder that a row left."""
    return loading.load_float(str(places.of(name) / "dequantized"), dtype=torch.bfloat16).eval()
