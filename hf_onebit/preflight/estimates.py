"""What a quantization will take, said before it starts: time, memory and disk.

Memory and disk follow from sizes (sizes.py), time from small measurements on this machine (timing.py).
All of it is an estimate: within a factor of two as a rule, and of three at worst.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_onebit.byte_sizes import shown_size
from hf_onebit.calibration import Batch, CalibrationData
from hf_onebit.config import PackingConfig
from hf_onebit.disk_space import free_space
from hf_onebit.durations import shown_estimate
from hf_onebit.free_memory import available_memory, own_limits
from hf_onebit.head_split import splits
from hf_onebit.modes import evaluating
from hf_onebit.nn.replace import LayerPlan
from hf_onebit.nn.roles import embedding_sizes
from hf_onebit.preflight.sizes import WORK_MATRICES, Sizes, disk_bytes, fit_bytes, walk_bytes, work_bytes
from hf_onebit.preflight.timing import ladder_seconds
from hf_onebit.progress import logger, memory_mb, say
from hf_onebit.rungs.blocks import find_blocks
from hf_onebit.rungs.recipes import Recipe


@dataclass(frozen=True)
class Preflight:
    """An estimate.

    Attributes:
        seconds: for everything, or None where it was not estimated.
        memory_bytes: largest resident memory of the process.
        disk_bytes: size of the weight files.
        more_bytes: of ``memory_bytes``, what is not in memory yet.
        available_bytes: memory that the machine has left now, or None where it does not tell.
        writing_seconds: of ``seconds``, for the calibration text that the model writes; None where it writes none.
        work_bytes: on the disk meanwhile, beside the weight files: what an interrupted run goes on from, and what is
            spilled.
        free_disk_bytes: what that disk has left for it, or None where it is not known which that will be.
        spilled: whether hidden states are in files.
    """

    seconds: float | None
    memory_bytes: int
    disk_bytes: int
    more_bytes: int
    available_bytes: int | None
    writing_seconds: float | None = None
    work_bytes: int = 0
    free_disk_bytes: int | None = None
    spilled: bool = False

    def with_writing(self, seconds: float, more_bytes: int) -> Preflight:
        """The same where the model writes its calibration text first, which takes so much."""
        more = max(self.more_bytes, more_bytes)
        return replace(
            self,
            seconds=None if self.seconds is None else self.seconds + seconds,
            memory_bytes=self.memory_bytes + more - self.more_bytes,
            more_bytes=more,
            writing_seconds=seconds,
        )

    @property
    def short(self) -> bool:
        """Whether more memory is needed than there is."""
        return self.available_bytes is not None and self.more_bytes > self.available_bytes

    def line(self, begun: bool = False) -> str:
        """One line for a user; ``begun``: a part of it is done already."""
        parts = [] if self.seconds is None else [f"about {shown_estimate(self.seconds)}"]
        if self.writing_seconds is not None:
            of_it = " of it" if parts else "about"
            text = f"{of_it} {shown_estimate(self.writing_seconds)} to write the calibration text"
            parts = [f"{parts[0]},{text}"] if parts else [text]
        left = "" if self.available_bytes is None else f" ({shown_size(self.available_bytes)} more are free)"
        parts += [f"{shown_size(self.memory_bytes)} of memory{left}", f"{shown_size(self.disk_bytes)} on disk"]
        if self.work_bytes:
            parts[-1] += f" and, until the end, up to {shown_size(self.work_bytes)} more"
        whole = " for the whole, of which a part is done" if begun else ""
        return f"Estimate{whole}: {', '.join(parts)}"

    def warnings(self) -> list[str]:
        """What to do about too little memory, and about too little room on the disk; nothing where there is enough."""
        found = []
        if self.short:
            assert self.available_bytes is not None
            spill = "" if self.spilled else "keep hidden states in files (spill=True, --spill), "
            found.append(
                f"This will need about {shown_size(self.more_bytes)} more memory, and "
                f"{shown_size(self.available_bytes)} are free: it may fail. Use fewer calibration tokens "
                f"(calibration_tokens=, --calibration-tokens), {spill}load the float model in bfloat16, quantize its "
                "files block by block (low_memory=True, --low-memory, with a text of your own), close other programs, "
                "or take a larger machine"
            )
        written = self.disk_bytes + self.work_bytes
        if self.free_disk_bytes is not None and written > self.free_disk_bytes:
            found.append(
                f"This will write about {shown_size(written)}, and {shown_size(self.free_disk_bytes)} are free on that "
                "disk: it may fail at the end. Free some space, or save to another disk"
            )
        return found

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON types, for the report."""
        return asdict(self)


def estimate(
    model: nn.Module,
    plan: LayerPlan,
    data: CalibrationData,
    recipe: Recipe | None,
    work_dir: str | os.PathLike[str] | None = None,
    spill: bool = False,
) -> Preflight:
    """What quantizing will take. The model and every random state stay as they are.

    Args:
        model: the float model, whole in memory.
        plan: what will be packed.
        data: what it is calibrated on.
        recipe: the preset's, or None for the closed form, whose time is not estimated.
        work_dir: the work folder, if there is one; the result will be on the same disk.
        spill: whether hidden states are in files.
    """
    sizes = Sizes.of(model, plan)
    if recipe is not None and recipe.steps and data.batches:
        sizes = replace(sizes, splits=_splits(model, data.batches[0]))
    planes = max((plan.entry(name).planes for name in plan.selected), default=1)
    more = _more_bytes(sizes, data, recipe, planes, spill)
    held = max(int(memory_mb() * 2**20), sizes.model_bytes)
    return Preflight(
        seconds=None if recipe is None else ladder_seconds(model, plan, sizes, data, recipe, planes),
        memory_bytes=held + more,
        disk_bytes=disk_bytes(model, plan),
        more_bytes=more,
        available_bytes=available_memory(next(model.parameters())),
        work_bytes=0 if recipe is None or work_dir is None else work_bytes(sizes, data, recipe, planes, spill),
        free_disk_bytes=None if work_dir is None else free_space(work_dir) + _taken(work_dir),
        spilled=spill,
    )


def _taken(folder: str | os.PathLike[str]) -> int:
    """What an interrupted run has put there already."""
    return sum(path.stat().st_size for path in Path(folder).glob("*") if path.is_file())


def _more_bytes(sizes: Sizes, data: CalibrationData, recipe: Any, planes: int, spill: bool) -> int:
    """Memory beside the float model's own."""
    return walk_bytes(sizes, data, spill) if recipe is None else fit_bytes(sizes, data, recipe, planes, spill)


def _splits(model: Any, batch: Batch) -> bool:
    """Whether distillation can do the product with the output head a few rows at a time; without one it has none."""
    get_head = getattr(model, "get_output_embeddings", None)
    if get_head is None or get_head() is None or find_blocks(model) is None:  # the last ones are not fitted
        return True
    with evaluating(model):
        return splits(model, {name: tensor[:1, :8] for name, tensor in batch.items()})


def estimate_loading(model: nn.Module, plan: LayerPlan) -> Preflight:
    """What quantizing while loading takes, which holds the packed model and one float tensor at a time; without time.

    Args:
        model: with or without weights (on the meta device).
        plan: what will be packed.
    """
    disk = disk_bytes(model, plan)
    largest = max((p.numel() * p.element_size() for p in model.parameters()), default=0)
    more = disk + WORK_MATRICES * largest
    return Preflight(None, int(memory_mb() * 2**20) + more, disk, more, available_memory())


def estimate_streamed(
    model: nn.Module,
    plan: LayerPlan,
    data: CalibrationData | None,
    recipe: Any,
    save_dir: str | os.PathLike[str] | None = None,
) -> Preflight:
    """What quantizing block by block from files takes (streaming/); without time.

    Hidden states are in files then, and packed blocks go into files as they are done.

    Args:
        model: on the meta device.
        plan: what will be packed.
        data: what it is calibrated on, if anything.
        recipe: as of ``estimate``, without what takes the whole model.
        save_dir: where the result will be.
    """
    sizes = Sizes.of(model, plan)
    matrices = [*sizes.layers, *plan.heads.shapes.values()]
    work = WORK_MATRICES * 4 * max((s.weights for s in matrices), default=0)
    meanwhile = 0
    if data is not None and recipe is not None:
        planes = max((plan.entry(name).planes for name in plan.selected), default=1)
        work = max(work, fit_bytes(sizes, data, recipe, planes, streamed=True))
        meanwhile = work_bytes(sizes, data, recipe, planes, spill=True)
    elif data is not None:
        work += sizes.hessian_bytes()
    found = find_blocks(model)
    parts = [p.numel() * p.element_size() for p in model.parameters()]
    parts += (
        [] if found is None else [sum(p.numel() * p.element_size() for p in block.parameters()) for block in found[1]]
    )
    more = max(parts, default=0) + work
    memory = int(memory_mb() * 2**20) + more
    return Preflight(
        seconds=None,
        memory_bytes=memory,
        disk_bytes=disk_bytes(model, plan),
        more_bytes=more,
        available_bytes=available_memory(),
        work_bytes=meanwhile,
        free_disk_bytes=None if save_dir is None else free_space(save_dir),
        spilled=True,
    )


def estimate_whole(model: nn.Module, plan: LayerPlan, config: PackingConfig, recipes: Mapping[str, Any]) -> str | None:
    """Why a model that is not loaded yet would not fit in memory as a whole, or None where it would.

    Args:
        model: on the meta device.
        plan: what will be packed.
        config: how to quantize.
        recipes: by preset.
    """
    if not config.whole:
        expected = estimate_loading(model, plan)
        if own_limits():  # they count files that are mapped, as all are while a model loads
            mapped = expected.more_bytes + Sizes.of(model, plan).model_bytes
            expected = replace(expected, more_bytes=mapped)
    else:
        sizes, recipe = Sizes.of(model, plan), recipes.get(config.preset)
        length = min(config.calibration_context, config.tokens_wanted)
        row = {"input_ids": torch.zeros(1, length, dtype=torch.int64)}
        count = max(1, config.tokens_wanted // length) if config.calibrates else 0
        data = CalibrationData([row] * count, "", length * count, "")
        planes = 1 if recipe is None else max((plan.planes.get(name, 1) for name in plan.selected), default=1)
        more = sizes.model_bytes + _more_bytes(sizes, data, recipe, planes, config.spill)
        expected = Preflight(None, int(memory_mb() * 2**20) + more, 0, more, available_memory())
    if not expected.short:
        return None
    assert expected.available_bytes is not None
    return (
        f"The whole model would need about {shown_size(expected.more_bytes)} more memory, and "
        f"{shown_size(expected.available_bytes)} are free."
    )


def stand_in(model: Any, config: PackingConfig) -> CalibrationData:
    """As many tokens as a run would have, of no meaning: what estimates are measured on before there is a text.

    Args:
        model: with or without weights.
        config: how to quantize.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    context = min(
        config.calibration_context, limit if isinstance(limit, int) and limit > 1 else config.calibration_context
    )
    rows = max(1, config.tokens_wanted // context)
    vocabulary, _ = embedding_sizes(model)
    ids = torch.randint(0, vocabulary, (1, context), generator=torch.Generator().manual_seed(0))
    return CalibrationData([{"input_ids": ids}] * rows, "none", rows * context, "")


def tell(expected: Preflight, begun: bool = False) -> None:
    """Say what it will take, and warn where it is more than there is; ``begun``: a part of it is done already."""
    say(expected.line(begun))
    for warning in expected.warnings():
        logger.warning(warning)
