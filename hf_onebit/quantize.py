"""The conductor: which layers, in which order, with which statistics; the Optimum-style entry and its report."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_onebit import loading, sources
from hf_onebit.bits.budget import Budget, choose_planes, plan_budget
from hf_onebit.bits.sensitivity import closed_fit, measure_sensitivity, sign_fit
from hf_onebit.calibration import CalibrationData, load_calibration
from hf_onebit.config import OneBitConfig, PackingConfig
from hf_onebit.formats.table import TableEntry
from hf_onebit.nn.experts import join_experts, release_experts
from hf_onebit.nn.replace import (
    LayerPlan,
    float_weight,
    packed_layers,
    set_packed,
)
from hf_onebit.preflight import estimate, estimate_whole, tell
from hf_onebit.progress import Progress, logger
from hf_onebit.quantization.layer_errors import measure_records
from hf_onebit.quantization.planning import (
    attach,
    check_finite,
    packing_table,
    plan_layers,
    require_reader,
    require_text,
    settle_tie,
    warn_of_noise,
)
from hf_onebit.quantization.records import announce, build_report, warn_of_size
from hf_onebit.quantization.resume import Fingerprint, WorkFolder, fingerprint, remove_work, work_folder_of
from hf_onebit.quantization.weights import quantize_group_weight, quantize_weight
from hf_onebit.ranks import ALONE, Ranks, current_ranks
from hf_onebit.rungs.ladder import quantize_on_prefix
from hf_onebit.rungs.recipes import RECIPES, Recipe
from hf_onebit.rungs.sequences import prefix_batches
from hf_onebit.rungs.upper_rungs import distill_scales
from hf_onebit.rungs.walk import one_stack, walk
from hf_onebit.storage import checkpoint
from hf_onebit.streaming import obstacles, quantize_files
from hf_onebit.texts.self_cache import self_calibration

if TYPE_CHECKING:
    from typing_extensions import Self  # typing has it from Python 3.11 on


class Quantizer:
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

    config_class: type[PackingConfig]
    recipes: Mapping[str, Recipe]
    config: Any

    def __init__(self, config: PackingConfig | None = None, **options: Any) -> None:
        own, wanted = type(self).__name__, self.config_class.__name__
        if config is not None and options:
            raise ValueError(f"{own} got a config and also {sorted(options)}: put them into the config")
        if config is not None and not isinstance(config, self.config_class):
            got, expected = (f"{'an' if n.startswith('M') else 'a'} {n}" for n in (type(config).__name__, wanted))
            raise ValueError(f"{own} got {got}: expected {expected} (for a dict: from_dict)")
        self.config = copy.copy(config) if config is not None else self.config_class(**options)
        self.config.validate()  # a field may have been changed since
        self.source: str | None = None
        self.report: dict[str, Any] | None = None
        self._model: Any = None
        self._work_dir: str | os.PathLike[str] | None = None
        self._ranks = ALONE  # while a quantization runs

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any]) -> Self:
        """The quantizer that ``to_dict`` described."""
        return cls(cls.config_class.from_dict(dict(config_dict)))

    def to_dict(self) -> dict[str, Any]:
        """The config as JSON types (without dataset and tokenizer)."""
        return self.config.to_dict()

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
        """
        quantizer = cls(config, **options)
        if isinstance(model_or_path, nn.Module):
            quantizer._model = model_or_path
        else:
            path = os.fspath(model_or_path)
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
            RuntimeError: another process is at work in ``work_dir``, or one that shares the work failed.
        """
        # Without data there is nothing to share.
        with self._processes() if self.config.calibrates else contextlib.nullcontext():
            try:
                return self._quantize_model(model, tokenizer, work_dir, resume)
            except BaseException:
                join_experts(model)  # planning had separated them
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
        plan = self._plan(model)
        budget = self._budget(model, plan)
        data = self._shared_calibration(model, tokenizer)
        self._work_dir = None
        recipe = self.recipes.get(self.config.preset)
        if work_dir is None or recipe is None or data is None or not self._sharing.is_first:
            return self._quantize_planned(model, plan, data, start, self._allocated(model, plan, budget, data))
        with WorkFolder(work_dir, self._fingerprint(model, data, recipe), resume=resume) as work:
            self._work_dir = work.folder
            allocation = self._allocated(model, plan, budget, data, work)
            return self._quantize_planned(model, plan, data, start, allocation, work)

    def _fingerprint(
        self,
        model: nn.Module,
        data: CalibrationData,
        recipe: Recipe,
        tensors: Iterable[tuple[str, Tensor]] | None = None,
    ) -> Fingerprint:
        """Of this run; ``tensors`` are the model's where it has them in no memory."""
        defaults = _run_options(self.config_class.from_dict({"preset": self.config.preset}))
        mine = fingerprint(model, data.batches, _run_options(self.config), asdict(recipe), tensors)
        if self._sharing.size > 1:
            mine["machine"]["processes"] = self._sharing.size  # they split sums, and with them their rounding
        return Fingerprint(mine, {f"options.{key}": value for key, value in defaults.items()})

    def _allocated(
        self,
        model: nn.Module,
        plan: LayerPlan,
        budget: Any,
        data: CalibrationData | None,
        work: WorkFolder | None = None,
    ) -> dict[str, Any] | None:
        """What a target gives to each layer, put into the plan: measured, or taken up from an interrupted run."""
        if budget is None:
            return None
        kept = None if work is None else work.load("allocation")
        allocation = self._sharing.value_of_first(
            self._sharing.alone(lambda: self._allocate(model, plan, budget, data) if kept is None else kept[1])
        )
        assert allocation is not None
        if work is not None and kept is None:
            work.save("allocation", {}, allocation)
        self._settle(model, plan, allocation)
        return allocation

    def _quantize_planned(
        self,
        model: nn.Module,
        plan: LayerPlan,
        data: CalibrationData | None,
        start: float,
        allocation: dict[str, Any] | None,
        work: WorkFolder | None = None,
    ) -> nn.Module:
        parameters = list(model.parameters())
        float_bytes = sum(p.numel() * p.element_size() for p in parameters)
        total = sum(p.numel() for p in parameters)
        recipe = self.recipes.get(self.config.preset)
        sharing = self._sharing
        expected = None if data is None else sharing.alone(lambda: self._expect(model, plan, data, recipe))
        packing = self._pack_layers(model, plan, data, work)
        table = packing_table(plan)
        sharing.alone(lambda: self._install(model, packing, table, data, work))
        self._follow(model, table)
        release_experts(model)
        settle_tie(model, plan, self.config)
        self.config.modules = {name: entry.to_dict() for name, entry in table.items()}
        attach(model, self.config)
        if sharing.is_first:
            self.report = build_report(self.config, packing.records, plan, model, data, start)
            self.report |= {"float_bytes": float_bytes, "total_weights": total, "allocation": allocation}
            self.report |= {"preflight": expected, "fit": packing.fit, "output_errors": packing.output_errors}
            self.report["seconds"] += 0.0 if work is None else work.spent
            announce(self.report)
        self.report = sharing.value_of_first(self.report)
        return model

    def _install(
        self,
        model: nn.Module,
        packing: _Packing,
        table: Mapping[str, TableEntry],
        data: CalibrationData | None,
        work: WorkFolder | None,
    ) -> None:
        """Put packed layers in place, distill and measure them; the float model is back if anything goes wrong."""
        recipe = self.recipes.get(self.config.preset)
        teacher = None
        if recipe is not None and recipe.steps:
            teacher = copy.deepcopy(model).to(torch.bfloat16).eval()
        originals = {name: model.get_submodule(name) for name in packing.tensors}
        # Gains and biases, which packed modules share with the float ones, change in place while distilling.
        exact = [(p, p.data, p.data.clone()) for p in model.parameters() if p.dim() == 1]
        try:
            for name, tensors in packing.tensors.items():
                set_packed(model, name, tensors, table[name])
            for name, value in packing.vectors.items():
                parameter = model.get_parameter(name)
                parameter.data = value.to(parameter.device)
            if recipe is not None and data is not None and packing.fit is not None:
                if teacher is not None:
                    packing.fit["distillation"] = self._distill(
                        model, teacher, data, recipe, packing.margins, table, work
                    )
                packing.output_errors = measure_records(model, originals, data.batches, packing.records)
        except BaseException:
            for name, module in originals.items():
                model.set_submodule(name, module)
            for parameter, place, value in exact:
                parameter.data = place.copy_(value)
            raise

    def _follow(self, model: nn.Module, table: Mapping[str, TableEntry]) -> None:
        """Have the other processes take over what the first one has put in place."""
        sharing = self._sharing
        if sharing.size == 1:
            return
        found: dict[str, Tensor] = {}
        if sharing.is_first:
            layers = {name: model.get_submodule(name) for name in table}
            found = {f"{n}.{key}": getattr(layers[n], key) for n, e in table.items() for key in e.tensor_names}
            found |= {name: p.data for name, p in model.named_parameters() if p.dim() == 1 and name not in found}
        shared = dict(sharing.tensors_of_first(found))
        if sharing.is_first:
            return
        for name, entry in table.items():
            set_packed(model, name, {key: shared.pop(f"{name}.{key}") for key in entry.tensor_names}, entry)
        for name, value in shared.items():
            parameter = model.get_parameter(name)
            parameter.data = value.to(parameter.device)

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
            dataset, tokenizer: take the place of the config's.
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
        """
        if file_prefix is not None:
            raise ValueError(
                f"file_prefix is {file_prefix!r}: expected None, since from_pretrained looks for model.safetensors"
            )
        if self._model is None and self.source is None:
            own = type(self).__name__
            raise ValueError(f"This quantizer is bound to no model: make it with {own}.from_pretrained(MODEL)")
        checkpoint.check_replaceable(save_dir, packed_only=True)
        if dataset is not None:
            self.config.dataset = dataset
        tokenizer = tokenizer if tokenizer is not None else self.config.tokenizer
        with self._processes():
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
            _check_apart(self.source, save_dir)
            origin = sources.provenance_of(self.source)
            tokenizer = tokenizer if tokenizer is not None else loading.load_tokenizer(self.source)
            folder = self._streamed_source()
            if folder is not None:
                quantize_files(
                    self,
                    folder,
                    save_dir,
                    tokenizer,
                    max_shard_size=max_shard_size,
                    provenance={**origin, **provenance},
                    resume=resume,
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
        self._ranks.alone(
            lambda: self.save(
                model, save_dir, tokenizer=saved, max_shard_size=max_shard_size, provenance={**origin, **provenance}
            )
        )
        return model

    def _streamed_source(self) -> str | None:
        """The folder to read block by block, or None: the model is quantized whole."""
        source, config = self.source, self.config
        if config.low_memory is False or source is None:
            return None
        if sources.is_gguf(source):
            if config.low_memory:
                raise ValueError(
                    f"{source!r} cannot be read block by block: expected safetensors files. Save it as such once, with "
                    "save_pretrained, or leave low_memory (--low-memory) out"
                )
            return None
        why = obstacles(config)
        if config.low_memory is None:
            model = sources.empty_model(source)
            expected = self._ranks.value_of_first(
                estimate_whole(model, plan_layers(model, config), config, self.recipes)
            )
            if expected is None:
                return None
            if why:
                logger.warning(f"{expected} It would go block by block (low_memory), but {why}")
                return None
            logger.warning(f"{expected} It goes block by block, with one block in memory at a time")
        elif why:
            raise ValueError(f"low_memory is True, but {why}; or quantize the model whole: low_memory=False")
        return source if os.path.isdir(source) else loading.fetched(source)

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
        side = checkpoint.save(
            model,
            save_dir,
            tokenizer=tokenizer,
            report=self.report,
            provenance=provenance,
            max_shard_size=max_shard_size,
        )
        if self.report is not None:
            self.report = side["report"]
            warn_of_size(self.report)
        if self._work_dir is not None:
            remove_work(self._work_dir)
            self._work_dir = None

    def _plan(self, model: nn.Module) -> LayerPlan:
        from transformers import PreTrainedModel

        if not isinstance(model, PreTrainedModel):
            raise ValueError(
                f"Cannot quantize a {type(model).__name__}: expected a Transformers model, e.g. from "
                "AutoModelForCausalLM.from_pretrained"
            )
        if packed_layers(model):
            raise ValueError(
                f"{type(model).__name__} is quantized already ({len(packed_layers(model))} packed layers): load the "
                "float model, or call model.dequantize() first"
            )
        if getattr(model, "hf_quantizer", None) is not None:
            raise ValueError(f"{type(model).__name__} was quantized by another method: load the float model")
        plan = plan_layers(model, self.config)
        offloaded = [name for name, p in model.named_parameters() if p.is_meta]
        if offloaded:
            raise ValueError(
                f"{len(offloaded)} parameters are offloaded (the first is {offloaded[0]}): load the model whole into "
                "memory, or quantize it while it loads, with preset='closed' and without a dataset"
            )
        for name in (*plan.selected, *plan.heads.entries):
            check_finite(float_weight(model.get_submodule(name)), name)
        return plan

    @property
    def _sharing(self) -> Ranks:
        """The processes that share the calibration sequences."""
        return self._ranks if self.config.calibrates else ALONE

    def _shared_calibration(self, model: nn.Module, tokenizer: Any) -> CalibrationData | None:
        """The calibration data of the first process on all of them.

        Raises:
            ValueError: they were not started alike.
        """
        sharing = self._sharing
        data = sharing.alone(lambda: self._calibration(model, tokenizer))
        if sharing.size == 1:
            return data
        mine = {
            "model": type(model).__name__,
            "parameters": sum(p.numel() for p in model.parameters()),
            "options": json.loads(json.dumps(_run_options(self.config), default=str)),
        }
        for rank, theirs in enumerate(sharing.gather(mine)):
            if different := [f"{key} {theirs[key]} / {mine[key]}" for key in mine if theirs[key] != mine[key]]:
                raise ValueError(
                    f"Processes {rank} and {sharing.rank} are to quantize different things: {'; '.join(different)}. "
                    "Start all of them alike"
                )
        own = [] if data is None else data.batches
        source, tokens, sha256 = sharing.value_of_first(
            ("", 0, "") if data is None else (data.source, data.tokens, data.sha256)
        )
        count = sharing.value_of_first(len(own))
        found = sharing.tensors_of_first({f"{i}.{key}": t for i, batch in enumerate(own) for key, t in batch.items()})
        batches: list[dict[str, Tensor]] = [{} for _ in range(count)]
        for name, tensor in found.items():
            index, _, key = name.partition(".")
            batches[int(index)][key] = tensor
        return CalibrationData(batches, source, tokens, sha256)

    def _calibration(self, model: nn.Module, tokenizer: Any) -> CalibrationData | None:
        config = self.config
        if not config.calibrates:
            require_text(config)
            warn_of_noise(config)
            return None
        require_reader(model)
        if config.preset in self.recipes:
            one_stack(model)  # before minutes of writing for nothing
        positions = _positions(model)
        tokenizer = tokenizer if tokenizer is not None else config.tokenizer
        wanted = {
            "max_tokens": config.tokens_wanted,
            "context": min(config.calibration_context, positions or config.calibration_context),
            "seed": config.seed,
        }
        if config.writes_itself:
            data = self_calibration(model, _tokenizer_of(model, tokenizer), **wanted)
        else:
            data = load_calibration(config.dataset, tokenizer, **wanted)
        _check_fits(model, data, positions)
        return data

    def _budget(self, model: nn.Module, plan: LayerPlan) -> Any:
        """What a target leaves to the layers; None without one."""
        raise NotImplementedError

    def _allocate(self, model: nn.Module, plan: LayerPlan, budget: Any, data: CalibrationData | None) -> dict[str, Any]:
        """The JSON-ready record of what each layer gets within the budget."""
        raise NotImplementedError

    def _settle(self, model: nn.Module, plan: LayerPlan, allocation: dict[str, Any]) -> None:
        """Put such a record into the plan."""
        raise NotImplementedError

    def _expect(
        self, model: nn.Module, plan: LayerPlan, data: CalibrationData, recipe: Recipe | None
    ) -> dict[str, Any]:
        """Say what this will take, and warn where it is more than there is; the same for the report."""
        expected = estimate(model, plan, data, recipe)
        tell(expected)
        return expected.to_dict()

    def _pack_layers(
        self, model: nn.Module, plan: LayerPlan, data: CalibrationData | None, work: WorkFolder | None = None
    ) -> _Packing:
        """Every selected layer packed; the model stays as it was."""
        packing, sharing = _Packing(), self._sharing
        packed, records = packing.tensors, packing.records
        recipe = self.recipes.get(self.config.preset)
        heads = plan.heads
        spill = None
        if self.config.spill:
            spill = Path(tempfile.gettempdir()) if work is None else work.folder
        # The embedding's inputs are ids, which say nothing of its columns: none of them matters more than another.
        watched = [name for name in heads.entries if name == heads.head]
        with Progress(len(plan.selected) + len(heads.entries), "Quantizing") as progress:

            def visit(_block: str, statistics: Mapping[str, Tensor | None]) -> None:
                for name, hessian in statistics.items():
                    weight = float_weight(model.get_submodule(name))
                    if name in heads.entries:
                        packed[name], records[name] = quantize_group_weight(weight, heads.entries[name], name, hessian)
                    else:
                        packed[name], records[name] = self._quantize_layer(weight, name, plan, hessian)
                    progress.step(name, err=_shown_error(records[name]))

            training = model.training
            model.eval()
            try:
                if data is None:
                    visit("", dict.fromkeys([*plan.selected, *heads.entries]))
                elif recipe is not None:
                    fitted = quantize_on_prefix(
                        model,
                        list(plan.selected),
                        prefix_batches(data.batches, recipe),
                        block=recipe.block,
                        done=lambda name, record: progress.step(name, err=_shown_error(record)),
                        work=work,
                        spill=spill,
                        ranks=sharing,
                        **self._method(plan, recipe),
                    )
                    packed |= fitted.packed
                    records |= fitted.records
                    packing.vectors, packing.margins = fitted.vectors, fitted.margins
                    for record in fitted.records.values():  # on the prefix as it was then; measured again at the end
                        record["prefix_output_error"] = record["relative_output_error"]
                    choices = ("shrinkage", "correction", "prefix_output_error")
                    packing.fit = {
                        "layers": {name: {key: records[name].pop(key) for key in choices} for name in fitted.records},
                        "blocks": {name: asdict(block) for name, block in fitted.blocks.items()},
                        "drift": {depth.block: depth.relative_error for depth in fitted.depths},
                        "distillation": None,
                    }
                    sharing.alone(lambda: visit("", dict.fromkeys(heads.entries)))
                else:
                    head = next(iter(watched), None)
                    starved = walk(
                        model, list(plan.selected), data.batches, visit, head=head, spill=spill, ranks=sharing
                    )
                    for name, tokens in starved.items():
                        records[name]["starved_tokens"] = tokens
                    packing.output_errors = {"inputs": "float model", "tokens": data.tokens}
                    rest = dict.fromkeys(name for name in heads.entries if name not in packed)
                    sharing.alone(lambda: visit("", rest))
            finally:
                model.train(training)
        if not sharing.is_first:
            return packing
        if heads.tied and heads.head is not None and heads.embedding is not None:
            packed[heads.embedding] = packed[heads.head]  # the same matrix: the head's inputs weighed its columns
            records[heads.embedding] = {**records[heads.head], "seconds": 0.0}
        order = [*plan.selected, *heads.entries]
        packing.tensors = {name: packed[name] for name in order}
        packing.records = {name: records[name] for name in order}
        return packing

    def _quantize_layer(
        self, weight: Tensor, name: str, plan: LayerPlan, hessian: Tensor | None
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """One selected layer without the ladder: packed tensors and its record."""
        raise NotImplementedError

    def _method(self, plan: LayerPlan, recipe: Recipe) -> dict[str, Any]:
        """How ``quantize_on_prefix`` fits layers."""
        raise NotImplementedError

    def _distill(
        self,
        model: nn.Module,
        teacher: nn.Module,
        data: CalibrationData,
        recipe: Recipe,
        margins: Mapping[str, Tensor],
        table: Mapping[str, TableEntry],
        work: WorkFolder | None,
    ) -> dict[str, Any] | None:
        """What comes after the ladder's walk, in place; for the report."""

        def judged(entry: dict[str, Any]) -> None:
            kl = "not finite" if entry["kl_heldout"] is None else f"{entry['kl_heldout']:.3f}"
            done = f"{entry['tokens']} tokens" if "tokens" in entry else f"{entry['flips']} signs flipped"
            logger.info(f"Distilling: {done}, held-out KL {kl}")

        training = model.training
        model.eval()
        try:
            return distill_scales(
                model, teacher, data.batches, recipe, self.config.seed, judged, margins, work, entries=table
            )
        finally:
            model.train(training)


class OneBitQuantizer(Quantizer):
    """Quantizes a loaded model, with calibration data or without; shaped like Optimum's quantizers.

    >>> quantizer = OneBitQuantizer(OneBitConfig(preset="fast", dataset="calibration.txt"))
    >>> quantizer.quantize_model(model, tokenizer)  # doctest: +SKIP
    >>> quantizer.save(model, "model-onebit", tokenizer=tokenizer)  # doctest: +SKIP

    Args:
        config: how to quantize; None for the defaults.
        **options: fields of ``OneBitConfig`` in place of ``config``.

    Attributes:
        report: after quantization, a JSON-ready dict: a record for every packed layer, every skipped layer with its
            reason, coverage, bits per weight, sizes, time, memory, calibration data and versions.

    Raises:
        ValueError: options are not valid, or both ``config`` and options are given.
    """

    config_class = OneBitConfig
    recipes = RECIPES

    def _budget(self, model: nn.Module, plan: LayerPlan) -> Budget | None:
        return plan_budget(model, plan, self.config)

    def _allocate(
        self, model: nn.Module, plan: LayerPlan, budget: Budget, data: CalibrationData | None
    ) -> dict[str, Any]:
        config = self.config
        assert data is not None  # require_text refused
        closed = closed_fit(config.use_importance_scaling, **config.algorithm_options())
        with Progress(len(budget.options), "Measuring sensitivity") as progress:
            sensitivity = measure_sensitivity(
                model,
                list(budget.options),
                data.batches,
                sign_fit() if config.preset in self.recipes else closed,
                seed=config.seed,
                done=progress.step,
            )
        return choose_planes(budget, model, sensitivity)[1]

    def _settle(self, model: nn.Module, plan: LayerPlan, allocation: dict[str, Any]) -> None:
        plan.planes = {name: layer["planes"] for name, layer in allocation["layers"].items()}

    def _quantize_layer(
        self, weight: Tensor, name: str, plan: LayerPlan, hessian: Tensor | None
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return quantize_weight(weight, self.config, name, plan.planes[name], hessian)

    def _method(self, plan: LayerPlan, recipe: Recipe) -> dict[str, Any]:
        return {"planes": plan.planes, "rounds": recipe.rounds, "keep_margins": recipe.sign_rate > 0}


def _run_options(config: PackingConfig) -> dict[str, Any]:
    """The options that a result may depend on."""
    apart = (
        "dataset",
        "tokenizer",
        "calibration_tokens",
        "dequantize",
        "fuse_projections",
        "spill",
        "modules",
        "untied",
        "data_parallel",
        "low_memory",
    )
    options = {key: value for key, value in vars(config).items() if key not in apart and not key.startswith("_")}
    return options | {"calibration_tokens": config.tokens_wanted}


@dataclass
class _Packing:
    """Layers packed but not yet in the model.

    Attributes:
        tensors: {layer: packed tensors}.
        records: {layer: what the report says of it}.
        vectors: {parameter: new value} of gains and biases.
        margins: see ``PrefixResult``.
        fit: choices and errors on the way, for the report; None for the closed form.
        output_errors: whose inputs the records' output errors were taken on, for the report; None without data.
    """

    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    vectors: dict[str, Tensor] = field(default_factory=dict)
    margins: dict[str, Tensor] = field(default_factory=dict)
    fit: dict[str, Any] | None = None
    output_errors: dict[str, Any] | None = None


def _check_apart(source: str, save_dir: str | os.PathLike[str]) -> None:
    """Refuse to save over the float model that is being read: what replaces it cannot give it back."""
    if os.path.exists(source) and Path(source).resolve().is_relative_to(Path(save_dir).resolve()):
        raise ValueError(
            f"Will not save to {os.fspath(save_dir)!r}: it holds the float model {source!r}, which would be lost. Pass "
            "another folder"
        )


def _shown_error(record: Mapping[str, Any]) -> str:
    error = (
        record["relative_output_error"]
        if record["relative_output_error"] is not None
        else record["relative_weight_error"]
    )
    return "0" if error is None else f"{error:.3f}"


def _tokenizer_of(model: Any, tokenizer: Any) -> Any:
    """A tokenizer given as an object or by name, else the one beside the model's files, or None."""
    if tokenizer is None:
        source = getattr(model.config, "_name_or_path", "")
        return loading.load_tokenizer(source) if source else None
    return loading.load_tokenizer(tokenizer) if isinstance(tokenizer, (str, os.PathLike)) else tokenizer


def _positions(model: Any) -> int | None:
    """The longest sequence a model was made for, where its config tells."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 1 else None


def _check_fits(model: Any, data: CalibrationData, positions: int | None) -> None:
    """Refuse token ids and lengths without an embedding, which deep inside the model are an IndexError or worse."""
    embedding = model.get_input_embeddings()
    rows = getattr(embedding, "num_embeddings", None) or embedding.weight.shape[0]
    for index, batch in enumerate(data.batches):
        ids = batch["input_ids"]
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= rows:
            raise ValueError(
                f"Calibration sequence {index} holds the token id {low if low < 0 else high}, and "
                f"{type(model).__name__} knows the ids 0 to {rows - 1}: pass the tokenizer that belongs to this model"
            )
        if positions is not None and ids.shape[1] > positions:
            raise ValueError(
                f"Calibration sequence {index} has {ids.shape[1]} tokens, and {type(model).__name__} takes {positions} "
                "(max_position_embeddings): cut the rows, or pass text"
            )
