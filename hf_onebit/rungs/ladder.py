"""The quality ladder's walk: layers fitted on the quantized prefix, blocks tuned, each kept once it is done.

``quantize_on_prefix`` conducts algorithms/signs.py and algorithms/blockwise.py; what comes after it is in
upper_rungs.py, and how much of each a preset takes in recipes.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_onebit.algorithms import heldout_choices, signs
from hf_onebit.algorithms.blockwise import BlockOptions, BlockResult
from hf_onebit.algorithms.closed_form import dequantize_planes
from hf_onebit.algorithms.curvature import Curvature
from hf_onebit.calibration import Batch
from hf_onebit.counts import counted
from hf_onebit.formats import onebit as fmt
from hf_onebit.nn.replace import float_weight
from hf_onebit.progress import logger
from hf_onebit.quantization.resume import State, WorkFolder
from hf_onebit.ranks import ALONE, Ranks
from hf_onebit.rungs.fitting import Fitted, LayerMethod, TunedLayers
from hf_onebit.rungs.prefix import Depth, PrefixStatistics, QuantizedBlock, walk_prefix
from hf_onebit.rungs.sequences import judging_sequences
from hf_onebit.rungs.tuning import Planes, tune

STRENGTHS = heldout_choices.STRENGTHS


@dataclass
class PrefixResult:
    """What ``quantize_on_prefix`` found.

    Attributes:
        packed: {layer: packed tensors by the names of docs/formats.md}.
        vectors: {parameter: new value} of gains and biases that block tuning changed, by full names.
        blocks: {block: how its tuning went}.
        margins: {layer.planes.number: how far each sign is from flipping, (out, in) fp16}, where they are kept.
        records: {layer: sizes, errors, choices}.
        depths: the drift of the hidden states after each block.
    """

    packed: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    vectors: dict[str, Tensor] = field(default_factory=dict)
    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    blocks: dict[str, BlockResult] = field(default_factory=dict)
    margins: dict[str, Tensor] = field(default_factory=dict)
    depths: list[Depth] = field(default_factory=list)

    def fit_report(self, records: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
        """What the report says of the fitting, block tuning and drift; distillation is still to come.

        Args:
            records: {layer: its record}; choices made on the way move from there into what is returned.
        """
        choices = ("shrinkage", "correction", "prefix_output_error")
        return {
            "layers": {name: {key: records[name].pop(key) for key in choices} for name in self.records},
            "blocks": {name: asdict(block) for name, block in self.blocks.items()},
            "drift": {depth.block: depth.relative_error for depth in self.depths},
            "distillation": None,
        }


@torch.no_grad()
def quantize_on_prefix(
    model: nn.Module,
    layers: Sequence[str],
    batches: Sequence[Batch],
    *,
    planes: int | Mapping[str, int] = 1,
    rounds: int = 4,
    method: LayerMethod | None = None,
    block: BlockOptions | None = None,
    keep_margins: bool = False,
    arithmetic: torch.dtype | None = torch.bfloat16,
    done: Callable[[str, dict[str, Any]], None] = lambda name, record: None,
    work: WorkFolder | None = None,
    spill: Path | None = None,
    ranks: Ranks = ALONE,
    finished: Callable[[PrefixResult, str], None] = lambda result, block: None,
    before: Callable[[str], None] = lambda name: None,
) -> PrefixResult:
    """Quantize the linear layers of a float model one stage after the other.

    The model's float weights are replaced by the dequantized ones on the way and are back when this returns or raises.

    Args:
        model: float model with one stack of blocks, whole in memory.
        layers: full names of the layers to quantize.
        batches: calibration sequences; every eighth is held out, or the last of four to seven.
        planes: sign matrices per layer: one number for all, or {layer: number}; layers of one input may differ.
        rounds: see ``algorithms.signs.fit_signs``.
        method: how layers are quantized; None for signs, with ``planes``, ``rounds`` and ``keep_margins``.
        block: how to tune each block after its layers were fitted (algorithms/blockwise.py); None leaves it as it is.
        keep_margins: return the margins too, 2 bytes a weight, for signs that learn in distillation.
        arithmetic: dtype of the products inside of blocks, None for the model's own.
        done: called with each layer's name and record.
        work: keeps each block once it is finished, and has those of a run that was interrupted: they are put in place
            without fitting them again, and everything after them comes out the same to the bit.
        spill: see ``walk_prefix``.
        ranks: processes that each run their share of ``batches``; the first fits, tunes, keeps, and has the result.
        finished: called on the first process with what there is so far and each block's name, when the block is done
            and its float weights are back; it may take out what it has put elsewhere.
        before: called with each layer's name before its weight is read.

    Raises:
        ValueError: as ``walk_prefix`` and ``fit_signs``.
    """
    heldout = judging_sequences(len(batches))
    if block is not None and not heldout and ranks.is_first:
        logger.warning(
            f"Too little text to judge by ({counted(len(batches), 'calibration sequence')}): blocks are not tuned, and "
            "the Hessian's shrinkage and the correction's strength are not chosen but usual ones. Pass more text"
        )
    result = PrefixResult()
    originals: dict[str, Tensor] = {}
    fresh: list[str] = []
    method = method or SignMethod(planes, rounds, block is not None, keep_margins)

    def replace(name: str, value: Tensor) -> None:
        parameter = model.get_parameter(name)
        originals.setdefault(name, parameter.data)
        parameter.data = value.to(parameter.device)
        fresh.append(name)

    def together(change: Callable[[], None]) -> None:
        """Have the first process replace parameters, and the others take what it has put there."""
        fresh.clear()
        ranks.alone(change)
        found = ranks.tensors_of_first({name: model.get_parameter(name).data for name in fresh})
        if not ranks.is_first:
            for name, value in found.items():
                replace(name, value)

    def visit(stage: dict[str, PrefixStatistics | None]) -> None:
        together(lambda: fit(stage))

    def fit(stage: dict[str, PrefixStatistics | None]) -> None:
        method.begin_stage()
        for name, statistics in stage.items():
            start = time.perf_counter()
            before(name)
            module = model.get_submodule(name)
            W = float_weight(module).detach().float()
            fitted = method.fit(name, W, statistics)
            result.packed[name], Q = fitted.tensors, fitted.dense
            result.records[name] = {
                "in_features": W.shape[1],
                "out_features": W.shape[0],
                **fitted.sizes,
                "relative_weight_error": _ratio((Q - W).square().sum(), W.square().sum()),
                "relative_output_error": _output_error(W, Q, statistics),
                **fitted.choices,
                "seconds": time.perf_counter() - start,
            }
            if statistics is not None and statistics.lent:
                result.records[name]["starved_tokens"] = statistics.rows
            replace(f"{name}.weight", _as_stored(module, Q))
            done(name, result.records[name])

    def finish(view: QuantizedBlock) -> None:
        together(lambda: end(view))

    def end(view: QuantizedBlock) -> None:
        if block is not None and view.heldout and len(view.heldout) < len(view.inputs):
            tuned = method.tune(view, block, arithmetic or torch.float32)
            result.blocks[view.name] = tuned.result
            result.vectors |= tuned.vectors
            for name, value in tuned.vectors.items():
                replace(name, value)
            for name, (result.packed[name], Q) in tuned.layers.items():
                replace(f"{name}.weight", _as_stored(model.get_submodule(name), Q))
        result.margins |= method.end_block()
        if work is not None:
            work.save(view.name, *_block_state(result, view.name))

    def restore(block_name: str) -> Callable[[], None] | None:
        state = None if work is None else work.load(block_name)
        if not ranks.value_of_first(state is not None):
            return None
        return lambda: together(lambda: None if state is None else place(*_take_up(result, block_name, state)))

    def place(names: Sequence[str], vectors: Sequence[str]) -> None:
        for name in names:
            module = model.get_submodule(name)
            Q = method.dense(name, result.packed[name], float_weight(module).shape[1])
            replace(f"{name}.weight", _as_stored(module, Q))
            done(name, result.records[name])
        for name in vectors:
            replace(name, result.vectors[name])

    def put_back() -> None:
        for name, value in originals.items():
            model.get_parameter(name).data = value
        originals.clear()

    def leave(block_name: str) -> None:
        put_back()  # both copies of one block at a time are in memory, not of the model
        ranks.alone(lambda: finished(result, block_name))

    try:
        result.depths = walk_prefix(
            model,
            layers,
            batches,
            visit,
            heldout=heldout,
            arithmetic=arithmetic,
            finish=finish,
            restore=restore,
            leave=leave,
            spill=spill,
            ranks=ranks,
            collects=block is not None,
        )
    finally:
        put_back()
    return result


def _block_state(result: PrefixResult, block: str) -> State:
    """What there is of one block, as a stage of a work folder: the other way is ``_take_up``."""
    inside = block + "."
    records = {name: record for name, record in result.records.items() if name.startswith(inside)}
    tensors = {f"packed/{name}/{key}": t for name in records for key, t in result.packed[name].items()}
    for kind, values in (("vectors", result.vectors), ("margins", result.margins)):
        tensors |= {f"{kind}/{name}": t for name, t in values.items() if name.startswith(inside)}
    tuned = result.blocks.get(block)
    return tensors, {"records": records, "tuned": None if tuned is None else asdict(tuned)}


def _take_up(result: PrefixResult, block: str, state: State) -> tuple[list[str], list[str]]:
    """Add a block's stage to a result; the names of its layers and of its vectors."""
    tensors, values = state
    result.records |= values["records"]
    result.packed |= {name: {} for name in values["records"]}
    vectors = []
    for key, tensor in tensors.items():
        kind, _, name = key.partition("/")
        if kind == "vectors":
            result.vectors[name] = tensor
            vectors.append(name)
        elif kind == "margins":
            result.margins[name] = tensor
        else:
            layer, _, short = name.rpartition("/")
            result.packed[layer][short] = tensor
    if values["tuned"] is not None:
        result.blocks[block] = BlockResult(**values["tuned"])
    return list(values["records"]), vectors


class SignMethod:
    """Signs and scales: algorithms/signs.py, tuned by tuning.py; ``fitting.LayerMethod``.

    Args:
        planes: sign matrices per layer: one number for all, or {layer: number}.
        rounds: see ``algorithms.signs.fit_signs``.
        tunes: keep what tuning a block needs.
        keep_margins: give back margins when a block ends.
    """

    def __init__(self, planes: int | Mapping[str, int], rounds: int, tunes: bool, keep_margins: bool) -> None:
        self._planes, self._rounds, self._keep = planes, rounds, keep_margins
        self._with_latents = tunes or keep_margins
        self._fitted: dict[str, Planes] = {}  # of the block at hand
        self._latents: dict[str, list[Tensor]] = {}
        self.begin_stage()

    def begin_stage(self) -> None:
        self._choice = _Choice(self._planes)

    def fit(self, name: str, W: Tensor, statistics: PrefixStatistics | None) -> Fitted:
        fit, strength, target, curvature = self._choice.fit(name, W, statistics, self._rounds)
        if self._with_latents:
            self._fitted[name] = fit.planes
            self._latents[name] = signs.margins(target, fit.planes, curvature)
        sizes = {
            "planes": len(fit.planes),
            "bits_per_weight": fmt.bits_per_weight(W.shape[1], W.shape[0], len(fit.planes)),
        }
        choices = {"shrinkage": fit.shrinkage, "correction": strength}
        return Fitted(fmt.pack_planes(fit.planes), dequantize_planes(fit.planes), sizes, choices)

    def tune(self, view: QuantizedBlock, options: BlockOptions, dtype: torch.dtype) -> TunedLayers:
        tuned = tune(view, self._fitted, self._latents, options, dtype)
        self._latents.update(tuned.margins)
        layers = {name: (fmt.pack_planes(found), dequantize_planes(found)) for name, found in tuned.planes.items()}
        return TunedLayers(layers, tuned.vectors, tuned.result)

    def dense(self, _name: str, tensors: dict[str, Tensor], in_features: int) -> Tensor:
        return dequantize_planes(fmt.unpack_planes(tensors, in_features))

    def end_block(self) -> dict[str, Tensor]:
        kept: dict[str, Tensor] = {}
        if self._keep:
            for name, latents in self._latents.items():
                kept |= {f"{name}.planes.{number}": t.half() for number, t in enumerate(latents)}
        self._fitted.clear()
        self._latents.clear()
        return kept


class _Choice:
    """What the layers of one stage share: a curvature and a correction for each input that they read."""

    def __init__(self, planes: int | Mapping[str, int]) -> None:
        self._planes = planes
        self._curvatures: dict[int, Curvature] = {}
        self._corrections: dict[int, Tensor] = {}

    def planes(self, name: str) -> int:
        """Of one layer. The shrinkage, which is shared, is chosen with those of the first layer that asks."""
        return self._planes if isinstance(self._planes, int) else self._planes[name]

    def fit(
        self, name: str, W: Tensor, statistics: PrefixStatistics | None, rounds: int
    ) -> tuple[signs.SignFit, float, Tensor, Curvature]:
        """Signs and scales of one layer, the strength of its correction, and the target and curvature fitted to."""
        if statistics is None or statistics.hessian is None:  # an expert that no token chose
            blank = Curvature(torch.zeros(W.shape[1], W.shape[1], device=W.device))
            return signs.fit_signs(W, blank, planes=self.planes(name), rounds=rounds, layer=name), 0.0, W, blank
        if id(statistics) in self._curvatures:
            curvature = self._curvatures[id(statistics)]
            strength = self._strength(name, W, statistics, curvature)
        else:
            curvature, strength = self._first(name, W, statistics)
            self._curvatures[id(statistics)] = curvature
        target = W if strength == 0 else W + strength * (W @ self._corrections[id(statistics)])
        fit = signs.fit_signs(target, curvature, planes=self.planes(name), rounds=rounds, layer=name)
        return fit, strength, target, curvature

    def _first(self, name: str, W: Tensor, statistics: PrefixStatistics) -> tuple[Curvature, float]:
        """The curvature for all layers of this input, and the strength of this one's correction."""
        H = statistics.hessian
        assert H is not None
        K = self._correction(statistics)
        if statistics.heldout_hessian is None:
            return Curvature(H, 0.15), 0.0 if K is None else 0.5
        curvature, losses = heldout_choices.choose_shrinkage(
            W,
            H,
            statistics.heldout_hessian,
            K=K,
            C_heldout=statistics.heldout_cross,
            strengths=STRENGTHS,
            planes=self.planes(name),
            layer=name,
        )
        found = losses[curvature.shrinkage]
        return curvature, min(found, key=lambda strength: found[strength])

    def _strength(self, name: str, W: Tensor, statistics: PrefixStatistics, curvature: Curvature) -> float:
        """Of the correction of another layer."""
        K = self._correction(statistics)
        if K is None:
            return 0.0
        if statistics.heldout_hessian is None or statistics.heldout_cross is None:
            return 0.5
        best, _ = heldout_choices.choose_strength(
            W,
            K,
            curvature,
            statistics.heldout_hessian,
            statistics.heldout_cross,
            strengths=STRENGTHS,
            planes=self.planes(name),
            layer=name,
        )
        return best

    def _correction(self, statistics: PrefixStatistics) -> Tensor | None:
        """What undoes the prefix's error, where the streams' rows correspond."""
        key = id(statistics)
        H, C = statistics.hessian, statistics.cross
        if key not in self._corrections and H is not None and C is not None:
            self._corrections[key] = heldout_choices.target_correction(H, C)
        return self._corrections.get(key)


def _as_stored(module: nn.Module, oriented: Tensor) -> Tensor:
    """(out, in) in the module's own dtype and orientation."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    own = oriented.t() if type(module).__name__ == "Conv1D" else oriented
    return own.to(weight.dtype).contiguous()


def _output_error(W: Tensor, Q: Tensor, statistics: PrefixStatistics | None) -> float | None:
    if statistics is None or statistics.hessian is None:
        return None
    H = statistics.hessian
    R = Q - W
    return _ratio(((R @ H) * R).sum(dtype=torch.float64), ((W @ H) * W).sum(dtype=torch.float64))


def _ratio(error: Tensor, size: Tensor) -> float | None:
    return float(error) / float(size) if float(size) > 0 else None
