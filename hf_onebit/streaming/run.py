"""Quantizing a checkpoint that is larger than memory: block by block from its files into the files of the packed one.

The walks are those of a model in memory (walk.py, ladder.py), on a ``DiskModel``. When a block is done its packed
tensors go into the output's weight files, and nothing of it is kept. What takes the whole model at once is refused
before anything starts (``obstacles``) or left out (``streamed_recipe``): distillation has a teacher and a student.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_onebit.arithmetic import autocast_dtype
from hf_onebit.calibration import CalibrationData
from hf_onebit.conducting.calibrating import shared_calibration
from hf_onebit.conducting.fingerprints import run_fingerprint
from hf_onebit.conducting.low_memory import obstacles, streamed_recipe
from hf_onebit.conducting.method import QuantizationMethod
from hf_onebit.conducting.restoring import restored_on_failure
from hf_onebit.nn.replace import float_weight, replace_layers
from hf_onebit.preflight.estimates import estimate_streamed, tell
from hf_onebit.progress import Progress, logger
from hf_onebit.quantization.planning import attach, packing_table, plan_layers, settle_tie, warn_of_noise
from hf_onebit.quantization.records import announce, build_report
from hf_onebit.quantization.resume import WorkFolder, remove_work, work_folder_of
from hf_onebit.quantization.weights import quantize_group_weight
from hf_onebit.ranks import Ranks
from hf_onebit.rungs.blocks import device_of, find_blocks
from hf_onebit.rungs.ladder import PrefixResult, quantize_on_prefix
from hf_onebit.rungs.recipes import Recipe
from hf_onebit.rungs.sequences import prefix_batches
from hf_onebit.rungs.walk import walk
from hf_onebit.sources import processor_files
from hf_onebit.storage.checkpoint import atomic_folder, finish_folder, parse_shard_size, save_beside
from hf_onebit.streaming.block_errors import BlockErrors, finish_block, put_packed
from hf_onebit.streaming.disk_model import DiskModel
from hf_onebit.streaming.output import Output

_MMAP_THRESHOLD = -3  # as malloc.h has it
_WHOLE = "(low_memory=False, --no-low-memory)"


def quantize_files(
    method: QuantizationMethod,
    folder: str | os.PathLike[str],
    save_dir: str | os.PathLike[str],
    tokenizer: Any,
    *,
    max_shard_size: int | str,
    provenance: Mapping[str, Any],
    resume: bool,
    sharing: Ranks,
    device: torch.device | str | None = None,
) -> dict[str, Any]:
    """Quantize a checkpoint folder into another.

    Args:
        method: how.
        folder: the float model.
        save_dir, tokenizer, max_shard_size, provenance, resume, device: as of ``Quantizer.quantize``.
        sharing: the processes that share the calibration data.

    Returns:
        The report.

    Raises:
        ValueError: as ``Quantizer.quantize``, and with what cannot be done block by block.
    """
    if why := obstacles(method.config):
        raise ValueError(f"A model cannot be quantized block by block here: {why}; or quantize it whole {_WHOLE}")
    _give_back_freed_memory()
    disk = DiskModel(folder, device)
    try:
        return _Run(method, disk, sharing).run(
            save_dir, tokenizer, parse_shard_size(max_shard_size), provenance, resume
        )
    finally:
        disk.close()


def _give_back_freed_memory() -> None:
    """Have glibc give large blocks back to the system when they are freed.

    It learns from what is freed to keep ever larger ones, and block after block its heap would fill with gaps.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # not glibc
            ctypes.CDLL("libc.so.6").mallopt(_MMAP_THRESHOLD, 1 << 18)


class _Run:
    """One model on its way from folder to folder."""

    def __init__(self, method: QuantizationMethod, disk: DiskModel, sharing: Ranks) -> None:
        self.method, self.disk, self.config, self.sharing = method, disk, method.config, sharing
        self.model: Any = disk.model
        self.plan = plan_layers(self.model, self.config)
        self.table = packing_table(self.plan)
        self.records: dict[str, dict[str, Any]] = {}
        self.fit: dict[str, Any] | None = None
        self.output_errors: dict[str, Any] | None = None
        self.recipe: Recipe | None = None
        if (recipe := method.recipes.get(self.config.preset)) is not None:
            self.recipe = streamed_recipe(recipe)
            if recipe.steps and self.sharing.is_first:
                logger.warning(
                    "One block is in memory at a time: distillation, which takes the whole model twice, is left out. "
                    f"With memory enough, do it all {_WHOLE}"
                )
        disk.open()
        if self.config.calibrates and find_blocks(self.model) is None:
            raise ValueError(
                f"{type(self.model).__name__} has no single stack of blocks, so text cannot run through it block by "
                f"block: quantize it without a text (preset='closed' and dataset=None; --preset closed), or whole "
                f"{_WHOLE}"
            )

    def run(
        self,
        save_dir: str | os.PathLike[str],
        tokenizer: Any,
        max_shard_bytes: int,
        provenance: Mapping[str, Any],
        resume: bool,
    ) -> dict[str, Any]:
        """All of it; the report."""
        start, report = time.perf_counter(), {}
        self.method._budget(self.model, self.plan)
        if not self.config.calibrates:
            warn_of_noise(self.config)
        data = shared_calibration(self.method, self.model, tokenizer, self.sharing)
        expected = estimate_streamed(self.model, self.plan, data, self.recipe, save_dir)
        if self.sharing.is_first:
            tell(expected)
        with contextlib.ExitStack() as stack:
            stack.enter_context(restored_on_failure(self.model, self.config))  # the model is ours, the config is not
            work = self._work(stack, save_dir, data, resume)
            output, target = None, Path()
            if self.sharing.is_first:
                target = stack.enter_context(atomic_folder(save_dir))
                output = stack.enter_context(Output(self.disk, target, self.table, max_shard_bytes, self.config.method))
            with Progress(len(self.table), "Quantizing") as self.progress:
                if data is None:
                    assert output is not None  # without data there is nothing to share
                    self._without_data(output)
                elif self.recipe is None:
                    self._closed(data, output)
                else:
                    self._on_prefix(data, output, work)
            if output is not None:
                total, element = self.disk.weights(), next(self.model.parameters()).element_size()
                self.disk.close()
                replace_layers(self.model, self.table)
                settle_tie(self.model, self.plan, self.config)
                self.config.modules = {name: entry.to_dict() for name, entry in self.table.items()}
                attach(self.model, self.config)
                order = {name: self.records[name] for name in self.table}
                report = build_report(self.config, order, self.plan, self.model, data, start)
                report |= {"float_bytes": total * element, "total_weights": total, "fit": self.fit}
                report |= {"preflight": expected.to_dict(), "output_errors": self.output_errors}
                report["seconds"] += 0.0 if work is None else work.spent
                announce(report)
                output.finish()
                saved = tokenizer if hasattr(tokenizer, "save_pretrained") else None
                save_beside(target, save_dir, saved, processor_files(self.disk.folder))
                report = finish_folder(target, report, provenance)["report"]
        if work is not None:
            remove_work(work.folder)
        return self.sharing.value_of_first(report)

    def _work(
        self, stack: contextlib.ExitStack, save_dir: str | os.PathLike[str], data: CalibrationData | None, resume: bool
    ) -> WorkFolder | None:
        if self.recipe is None or data is None or not self.sharing.is_first:
            return None
        mine = run_fingerprint(self.method, self.model, data, self.recipe, self.sharing, self.disk.tensors())
        return stack.enter_context(WorkFolder(work_folder_of(save_dir), mine, resume=resume))

    def _without_data(self, output: Output) -> None:
        for block in self.disk.blocks:
            for name in self._inside(block):
                self._pack(name, None, output)
            output.add_floats(block, {})
        self._outside(output, dict.fromkeys(name for name in self.plan.selected if name not in self.records))

    def _closed(self, data: CalibrationData, output: Output | None) -> None:
        written: set[str] = set()
        late: dict[str, Tensor | None] = {}

        def visit(block: str, statistics: Mapping[str, Tensor | None]) -> None:
            assert output is not None  # only the first process visits
            if not block:
                late.update(statistics)
                return
            for name, hessian in statistics.items():
                self._pack(name, hessian, output)
            output.add_floats(block, {})
            written.add(block)

        heads, layers = self.plan.heads, list(self.plan.selected)
        head = heads.head if heads.head in heads.entries else None
        starved = walk(
            self.model, layers, data.batches, visit, head, self._spill(None), ranks=self.sharing, late_head=True
        )
        for name, tokens in starved.items():
            self.records[name]["starved_tokens"] = tokens
        self.output_errors = {"inputs": "float model", "tokens": data.tokens}

        def rest() -> None:
            assert output is not None
            for block in self.disk.blocks:
                if block not in written:
                    output.add_floats(block, {})
            self._outside(output, late)

        self.sharing.alone(rest)

    def _on_prefix(self, data: CalibrationData, output: Output | None, work: WorkFolder | None) -> None:
        recipe, disk, sharing = self.recipe, self.disk, self.sharing
        assert recipe is not None
        errors = sharing.alone(lambda: BlockErrors(self.model, data.batches))

        def finished(result: PrefixResult, block: str) -> None:
            assert output is not None
            assert errors is not None
            for name in self._inside(block):  # measured again right now
                result.records[name]["prefix_output_error"] = result.records[name]["relative_output_error"]
            finish_block(result, block, output, errors, self.table)

        found = quantize_on_prefix(
            self.model,
            list(self.plan.selected),
            prefix_batches(data.batches, recipe),
            block=recipe.block,
            arithmetic=autocast_dtype(device_of(self.model)),
            done=lambda name, record: self.progress.step(name),
            work=work,
            spill=self._spill(work),
            ranks=sharing,
            finished=finished,
            before=disk.hold,
            **self.method._method(self.plan, recipe),
        )

        def rest() -> None:
            assert output is not None
            assert errors is not None
            self.records |= found.records
            for name, tensors in found.packed.items():  # outside of the blocks
                self._measured(name, tensors, errors)
                self.records[name]["prefix_output_error"] = None
                output.add(name, tensors)
            self.fit = found.fit_report(self.records)
            self._outside(output, {}, errors)
            self.output_errors = {"inputs": "packed model", "tokens": errors.tokens}

        sharing.alone(rest)

    def _outside(
        self, output: Output, statistics: Mapping[str, Tensor | None], errors: BlockErrors | None = None
    ) -> None:
        """Pack and write what is in no block: layers with what is known of their inputs, head, embedding, the rest."""
        heads = self.plan.heads
        for name in [*(n for n in statistics if n not in heads.entries), *heads.entries]:
            if heads.tied and name == heads.embedding:
                continue  # the same matrix: the head's inputs weigh its columns
            tensors = self._pack(name, statistics.get(name), output)
            if errors is not None:
                self._measured(name, tensors, errors)
            self.disk.release()
        if heads.tied and heads.head is not None and heads.embedding is not None:
            self.records[heads.embedding] = {**self.records[heads.head], "seconds": 0.0}
            if errors is not None:
                self.records[heads.embedding]["relative_output_error"] = None
        output.add_floats("", {})

    def _measured(self, name: str, tensors: Mapping[str, Tensor], errors: BlockErrors) -> None:
        """The errors of a packed module outside of the blocks, into its record."""
        self.disk.hold(name)
        floats = put_packed(self.model, {name: tensors}, self.table)
        packed = self.model.get_submodule(name)
        self.model.set_submodule(name, floats[name])
        errors.measure_outside(name, floats[name], packed, self.records[name])

    def _pack(self, name: str, hessian: Tensor | None, output: Output) -> Mapping[str, Tensor]:
        self.disk.hold(name)
        weight, heads = float_weight(self.model.get_submodule(name)), self.plan.heads
        if name in heads.entries:
            tensors, self.records[name] = quantize_group_weight(weight, heads.entries[name], name, hessian)
        else:
            tensors, self.records[name] = self.method._quantize_layer(weight, name, self.plan, hessian)
        output.add(name, tensors)
        self.progress.step(name)
        return tensors

    def _inside(self, block: str) -> list[str]:
        return [name for name in self.plan.selected if name.startswith(f"{block}.")]

    def _spill(self, work: WorkFolder | None) -> Path:
        return Path(tempfile.gettempdir()) if work is None else work.folder
