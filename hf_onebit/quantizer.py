"""``Quantizer``: what a user of any method calls, models and folders in, a packed model or folder out."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hf_onebit import loading, sources
from hf_onebit.argument_checks import path_of, require_module
from hf_onebit.bits.auto_bits import ask_again, settle_heads
from hf_onebit.conducting.calibrating import shared_calibration
from hf_onebit.conducting.fingerprints import run_fingerprint
from hf_onebit.conducting.in_memory import allocated, expect_writing, pack_in_memory
from hf_onebit.conducting.low_memory import streamed_source
from hf_onebit.conducting.method import QuantizationMethod
from hf_onebit.config import PackingConfig
from hf_onebit.disk_space import DiskFullError
from hf_onebit.nn.experts import join_experts
from hf_onebit.quantization.planning import plan_float_model
from hf_onebit.quantization.records import warn_of_size
from hf_onebit.quantization.resume import WorkFolder, remove_work, work_folder_of
from hf_onebit.ranks import ALONE, Ranks, current_ranks
from hf_onebit.storage import checkpoint
from hf_onebit.streaming.run import quantize_files
from hf_onebit.texts.self_time import Writing

if TYPE_CHECKING:
    from typing_extensions import Self  # typing has it from Python 3.11 on


class Quantizer(QuantizationMethod):
    """What the quantizers of all methods share; a user meets ``OneBitQuantizer`` and ``MPQQuantizer``.

    Args:
        config: how to quantize; None for the defaults.
        **options: fields of the config in place of ``config``.

    Attributes:
        report: after quantization, a JSON-ready dict: a record for every packed layer, every skipped layer with its
            reason, coverage, bits per weight, sizes, time, memory, calibration data and versions.

    Raises:
        ValueError: options are not valid, or both ``config`` and options are given.
    """

    def __init__(self, config: PackingConfig | None = None, **options: Any) -> None:
        super().__init__(config, **options)
        self.source: str | None = None
        self.report: dict[str, Any] | None = None
        self._model: Any = None
        self._work_dir: str | os.PathLike[str] | None = None
        self._ranks = ALONE  # while a quantization runs

    @classmethod
    def from_pretrained(
        cls,
        model_or_path: Any,
        file_name: str | None = None,
        *,
        config: PackingConfig | None = None,
        **options: Any,
    ) -> Self:
        """A quantizer bound to a model, for ``quantize``.

        Args:
            model_or_path: a loaded model, a folder, a hub id, or a .gguf file.
            file_name: a .gguf file inside of ``model_or_path``.
            config, **options: as for the constructor.

        Raises:
            TypeError: it is neither a module nor a path.
        """
        quantizer = cls(config, **options)
        if isinstance(model_or_path, nn.Module):
            quantizer._model = model_or_path
        else:
            path = path_of(f"{cls.__name__}.from_pretrained", "model_or_path", model_or_path)
            quantizer.source = os.path.join(path, file_name) if file_name else path
        return quantizer

    def quantize_model(
        self,
        model: nn.Module,
        tokenizer: Any = None,
        *,
        work_dir: str | os.PathLike[str] | None = None,
        resume: bool = True,
    ) -> nn.Module:
        """Quantize a float model in place. If anything is wrong with it, it is left as it was.

        Args:
            model: a Transformers model, whole in memory.
            tokenizer: for ``config.dataset``; ``config.tokenizer`` when None. For text that the model writes itself the
                one beside the model's files will do.
            work_dir: folder that keeps each step of the presets above ``closed``, so that a run that was interrupted,
                started again with the same model, data and options, goes on from there and ends with the same tensors
                (docs/resume.md). :meth:`save` removes it. None keeps nothing.
            resume: False throws away what is in ``work_dir``.

        Returns:
            The same model, now packed; it saves, reloads, dequantizes and trains as one that was loaded packed.

        Raises:
            ValueError: the model is quantized already, has no layer to pack, holds NaN or inf, is partly offloaded, has
                no single stack of blocks (presets above ``closed``), the calibration data is unusable, a target is out
                of reach, or ``work_dir`` holds another run's work: the differences are listed.
            TypeError: the model is no module.
            RuntimeError: another process is at work in ``work_dir``, or one that shares the work failed.
        """
        require_module("quantize_model", model)
        ask_again(self.config)  # an earlier run may have settled what is to be chosen
        # Without data there is nothing to share.
        with self._processes() if self.config.calibrates else contextlib.nullcontext():
            try:
                return self._quantize_model(model, tokenizer, work_dir, resume)
            except BaseException:
                join_experts(model)  # planning had separated them
                ask_again(self.config)
                raise

    @contextlib.contextmanager
    def _processes(self) -> Iterator[Ranks]:
        """The processes that share this quantization, for as long as it takes."""
        if self._ranks.size > 1:  # we are inside already
            yield self._ranks
            return
        with current_ranks(self.config.data_parallel) as self._ranks:
            try:
                yield self._ranks
            finally:
                self._ranks = ALONE

    def _quantize_model(
        self, model: nn.Module, tokenizer: Any, work_dir: str | os.PathLike[str] | None, resume: bool
    ) -> nn.Module:
        start = time.perf_counter()
        plan = plan_float_model(model, self.config)
        budget = self._budget(model, plan)
        sharing = self._sharing
        told: list[dict[str, Any] | None] = []

        def starts(writing: Writing) -> None:
            told.append(expect_writing(self, model, plan, budget, writing, work_dir))

        data = shared_calibration(self, model, tokenizer, sharing, starts)
        expected = told[0] if told else None
        self._work_dir = None
        recipe = self.recipes.get(self.config.preset)
        if work_dir is None or recipe is None or data is None or not sharing.is_first:
            allocation = allocated(self, model, plan, budget, data, sharing)
            settle_heads(self.config, allocation)
            self.report = pack_in_memory(self, model, plan, data, start, allocation, sharing, None, expected)
            return model
        with WorkFolder(work_dir, run_fingerprint(self, model, data, recipe, sharing), resume=resume) as work:
            self._work_dir = work.folder
            allocation = allocated(self, model, plan, budget, data, sharing, work)
            settle_heads(self.config, allocation)
            self.report = pack_in_memory(self, model, plan, data, start, allocation, sharing, work, expected)
            return model

    def quantize(
        self,
        save_dir: str | os.PathLike[str],
        file_prefix: str | None = None,
        *,
        dataset: Any = None,
        tokenizer: Any = None,
        max_shard_size: int | str = "5GB",
        provenance: Mapping[str, Any] | None = None,
        resume: bool = True,
        device: torch.device | str | None = None,
        load: bool = True,
    ) -> nn.Module | None:
        """Quantize the model this quantizer is bound to (``from_pretrained``), and save it.

        Without data (``preset="closed"`` and no dataset) a checkpoint is quantized while it loads, one tensor at a
        time, so the float model never is in memory. Where memory is short even so, and with data where the float model
        would not fit, one block is in memory at a time (``config.low_memory``, docs/large_models.md).

        Args:
            save_dir: folder to make, or an older checkpoint to replace.
            file_prefix: must be None: Transformers finds weights by its own file names.
            dataset, tokenizer: take the place of the config's, for this call.
            max_shard_size: as in ``save_pretrained``.
            provenance: more about where the model came from, for the model card.
            resume: go on with what an interrupted run left in a hidden folder beside ``save_dir`` (docs/resume.md);
                False throws that away.
            device: where to calibrate a model that is loaded here; None is the CPU. A model that was handed over stays
                where it is.
            load: load the packed model from ``save_dir`` where nothing of it is in memory when it is done.

        Returns:
            The quantized model; None where it was quantized block by block, and not to be loaded.

        Raises:
            ValueError: no model is bound, ``low_memory=True`` and something takes the whole model, or as
                ``quantize_model``.
            DiskFullError: there is no room for the result; the message says where the work so far is kept.
            KeyboardInterrupt: it was stopped; where a part of the work is kept, the message says so.
        """
        if file_prefix is not None:
            raise ValueError(
                f"file_prefix is {file_prefix!r}: expected None, since from_pretrained looks for model.safetensors"
            )
        if self._model is None and self.source is None:
            own = type(self).__name__
            raise ValueError(f"This quantizer is bound to no model: make it with {own}.from_pretrained(MODEL)")
        checkpoint.check_replaceable(save_dir, packed_only=True)
        max_shard_size = checkpoint.parse_shard_size(max_shard_size)
        tokenizer = tokenizer if tokenizer is not None else self.config.tokenizer
        with self._processes(), _told_of_work(work_folder_of(save_dir)), _dataset_for_now(self.config, dataset):
            model = self._quantize_to(save_dir, tokenizer, max_shard_size, provenance or {}, resume, device)
        return loading.load(save_dir) if model is None and load else model

    def _quantize_to(
        self,
        save_dir: str | os.PathLike[str],
        tokenizer: Any,
        max_shard_size: int | str,
        provenance: Mapping[str, Any],
        resume: bool,
        device: torch.device | str | None,
    ) -> nn.Module | None:
        origin: dict[str, Any] = {}
        work_dir = work_folder_of(save_dir)
        if self._model is not None:
            model = self.quantize_model(self._model, tokenizer, work_dir=work_dir, resume=resume)
        else:
            assert self.source is not None
            sources.check_apart(self.source, save_dir)
            origin = sources.provenance_of(self.source)
            tokenizer = tokenizer if tokenizer is not None else loading.load_tokenizer(self.source)
            folder = streamed_source(self, self.source, self._ranks)
            if folder is not None:
                self.report = quantize_files(
                    self,
                    folder,
                    save_dir,
                    tokenizer,
                    max_shard_size=max_shard_size,
                    provenance={**origin, **provenance},
                    resume=resume,
                    sharing=self._sharing,
                    device=device,
                )
                return None
            if not self.config.whole and not sources.is_gguf(self.source):
                model = loading.load_float(self.source, quantization_config=self.config)
                self.config, self.report = model.hf_quantizer.quantization_config, model.hf_quantizer.report
            else:
                source = loading.load_float(self.source)
                if device is not None:
                    source.to(device)
                model = self.quantize_model(source, tokenizer, work_dir=work_dir, resume=resume)
        saved = tokenizer if hasattr(tokenizer, "save_pretrained") else None
        along = [] if self.source is None else sources.processor_files(self.source)
        about = {**origin, **provenance}
        self._ranks.alone(lambda: self._save(model, save_dir, saved, max_shard_size, about, along))
        return model

    def save(
        self,
        model: nn.Module,
        save_dir: str | os.PathLike[str],
        *,
        tokenizer: Any = None,
        max_shard_size: int | str = "5GB",
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        """Save a quantized model with its report, model card and checksums (see ``hf_onebit.save``), and drop
        the work folder it came from."""
        self._save(model, save_dir, tokenizer, max_shard_size, provenance, ())

    def _save(
        self,
        model: nn.Module,
        save_dir: str | os.PathLike[str],
        tokenizer: Any,
        max_shard_size: int | str,
        provenance: Mapping[str, Any] | None,
        along: Iterable[Path],
    ) -> None:
        side = checkpoint.save(
            model,
            save_dir,
            tokenizer=tokenizer,
            report=self.report,
            provenance=provenance,
            max_shard_size=max_shard_size,
            along=along,
        )
        if self.report is not None:
            self.report = side["report"]
            warn_of_size(self.report)
        if self._work_dir is not None:
            remove_work(self._work_dir)
            self._work_dir = None

    @property
    def _sharing(self) -> Ranks:
        """The processes that share the calibration sequences."""
        return self._ranks if self.config.calibrates else ALONE


@contextlib.contextmanager
def _dataset_for_now(config: PackingConfig, dataset: Any) -> Iterator[None]:
    """Have a config calibrate on another text, and then on its own again; None is its own."""
    own = config.dataset
    config.dataset = own if dataset is None else dataset
    try:
        yield
    finally:
        config.dataset = own


@contextlib.contextmanager
def _told_of_work(folder: Path) -> Iterator[None]:
    """Where a disk got full, or a user stopped it, say that the work so far is not lost."""
    try:
        yield
    except KeyboardInterrupt as error:
        if not any(folder.glob("*.safetensors")):  # no stage is finished
            raise
        raise KeyboardInterrupt(
            f"What was done so far is kept in {str(folder)!r}: the same command goes on from there"
        ) from error
    except DiskFullError as error:
        if not folder.is_dir():
            raise
        raise DiskFullError(
            f"{error}. What was done so far is kept in {str(folder)!r}: with space freed, the same command goes on "
            "from there"
        ) from error
