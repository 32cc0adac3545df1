"""The quality ladder above the closed form: signs under the full Hessian on the quantized prefix, then distillation.

`quantize_on_prefix` conducts the first (algorithms/signs.py, prefix.py), `distill_scales` the second
(algorithms/distill.py, distillation.py). `RECIPES` says how much of each a preset takes.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_onebit.algorithms import signs
from hf_onebit.algorithms.blockwise import BlockOptions, BlockResult
from hf_onebit.algorithms.closed_form import dequantize_planes
from hf_onebit.algorithms.distill import Distillation, DistillOptions, DistillResult
from hf_onebit.algorithms.flips import FlipOptions, FlipResult, gated_flips
from hf_onebit.algorithms.sign_linear import sign_planes
from hf_onebit.calibration import Batch
from hf_onebit.distillation import TrainingForm, distill_model, stack
from hf_onebit.formats import onebit as fmt
from hf_onebit.nn.replace import float_weight
from hf_onebit.prefix import Depth, PrefixStatistics, QuantizedBlock, walk_prefix
from hf_onebit.resume import State, WorkFolder
from hf_onebit.tuning import Planes, tune

# Every so many sequences one is held out: the shrinkage and the strength of the correction are chosen on it.
HELDOUT_EVERY = 8
# A distillation that is interrupted loses about so much time.
KEEP_EVERY_S = 30.0
# Keeping states takes this share of the time at the most.
KEEP_SHARE = 0.05
STRENGTHS = (0.0, 0.5, 1.0)
_SAMPLE_ROWS = 128
# Times that distillation is judged on held-out tokens.
EVALUATIONS = 8
# The stages that these rungs are kept as; those of blocks have the blocks' names.
_DISTILLATION, _FLIPS = "distillation", "flips"


@dataclass(frozen=True)
class Recipe:
    """What a preset does.

    Attributes:
        rounds: of flips and scales per layer.
        prefix_tokens: calibration tokens that layers and blocks are fitted on; the first sequences.
        prefix_length: tokens of one sequence there, at the most.
        block: how each block is tuned on the prefix; None leaves it as its layers were fitted.
        heldout_tokens: tokens kept apart to judge distillation on; the last sequences, at most an eighth of all.
        steps: updates of the distillation, each of about ``step_tokens`` tokens.
        length: tokens of one sequence in distillation.
        step_tokens: see ``steps``.
        learning_rate: largest relative step of scales, gains and biases in distillation.
        sign_rate: largest step of the signs' latents in distillation; 0 leaves the signs alone.
        flip_rounds: rounds of gated sign flips after distillation, at the most.
        flip_tokens: tokens whose gradients a round of flips sums.
    """

    rounds: int = 2
    prefix_tokens: int = 16384
    prefix_length: int = 512
    block: BlockOptions | None = None
    heldout_tokens: int = 8192
    steps: int = 36
    length: int = 256
    step_tokens: int = 2048
    learning_rate: float = 0.02
    sign_rate: float = 0.0
    flip_rounds: int = 0
    flip_tokens: int = 16384

    @property
    def block_epochs(self) -> int:
        """Passes of block tuning."""
        return 0 if self.block is None else self.block.epochs


def _tuning(epochs: int) -> BlockOptions:
    return BlockOptions(epochs=epochs, sequences_per_step=1, learning_rate=0.02, sign_rate=0.05)


RECIPES = {
    "fast": Recipe(block=_tuning(3)),
    "balanced": Recipe(prefix_tokens=40960, block=_tuning(6), steps=88),
    "best": Recipe(rounds=3, prefix_tokens=81920, block=_tuning(8), heldout_tokens=16384, steps=384, flip_rounds=4),
}


@dataclass
class PrefixResult:
    """What `quantize_on_prefix` found.

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


@torch.no_grad()
def quantize_on_prefix(
    model: nn.Module,
    layers: Sequence[str],
    batches: Sequence[Batch],
    *,
    planes: int | Mapping[str, int] = 1,
    rounds: int = 4,
    block: BlockOptions | None = None,
    keep_margins: bool = False,
    arithmetic: torch.dtype | None = torch.bfloat16,
    done: Callable[[str, dict[str, Any]], None] = lambda name, record: None,
    work: WorkFolder | None = None,
    spill: Path | None = None,
) -> PrefixResult:
    """Quantize the linear layers of a float model one stage after the other.

    The model's float weights are replaced by the dequantized ones on the way and are back when this returns or raises.

    Args:
        model: float model with one stack of blocks, whole in memory.
        layers: full names of the layers to quantize.
        batches: calibration sequences; every eighth is held out.
        planes: sign matrices per layer: one number for all, or {layer: number}; layers of one input may differ.
        rounds: see ``algorithms.signs.fit_signs``.
        block: how to tune each block after its layers were fitted (algorithms/blockwise.py); None leaves it as it is.
        keep_margins: return the margins too, 2 bytes a weight, for signs that learn in distillation.
        arithmetic: dtype of the products inside of blocks, None for the model's own.
        done: called with each layer's name and record.
        work: keeps each block once it is finished, and has those of a run that was interrupted: they are put in place
            without fitting them again, and everything after them comes out the same to the bit.
        spill: see ``walk_prefix``.

    Raises:
        ValueError: as ``walk_prefix`` and ``fit_signs``.
    """
    heldout = set(range(HELDOUT_EVERY - 1, len(batches), HELDOUT_EVERY))
    result = PrefixResult()
    originals: dict[str, Tensor] = {}
    planes_of: dict[str, Planes] = {}  # of the block at hand
    latents: dict[str, list[Tensor]] = {}

    def replace(name: str, value: Tensor) -> None:
        parameter = model.get_parameter(name)
        originals.setdefault(name, parameter.data)
        parameter.data = value

    def visit(stage: dict[str, PrefixStatistics | None]) -> None:
        choice = _Choice(planes)
        for name, statistics in stage.items():
            start = time.perf_counter()
            module = model.get_submodule(name)
            W = float_weight(module).detach().float()
            fit, strength, target, curvature = choice.fit(name, W, statistics, rounds)
            if block is not None or keep_margins:
                planes_of[name] = fit.planes
                latents[name] = signs.margins(target, fit.planes, curvature)
            result.packed[name] = fmt.pack_planes(fit.planes)
            Q = dequantize_planes(fit.planes)
            result.records[name] = {
                "in_features": W.shape[1],
                "out_features": W.shape[0],
                "planes": len(fit.planes),
                "bits_per_weight": fmt.bits_per_weight(W.shape[1], W.shape[0], len(fit.planes)),
                "relative_weight_error": _ratio((Q - W).square().sum(), W.square().sum()),
                "relative_output_error": _output_error(W, Q, statistics),
                "shrinkage": fit.shrinkage,
                "correction": strength,
                "seconds": time.perf_counter() - start,
            }
            replace(f"{name}.weight", _as_stored(module, Q))
            done(name, result.records[name])

    def finish(view: QuantizedBlock) -> None:
        if block is not None and view.heldout and len(view.heldout) < len(view.inputs):
            tuned = tune(view, planes_of, latents, block, arithmetic or torch.float32)
            latents.update(tuned.margins)
            result.blocks[view.name] = tuned.result
            result.vectors |= tuned.vectors
            for name, value in tuned.vectors.items():
                replace(name, value)
            for name, found in tuned.planes.items():
                result.packed[name] = fmt.pack_planes(found)
                replace(f"{name}.weight", _as_stored(model.get_submodule(name), dequantize_planes(found)))
        if keep_margins:
            for name, kept in latents.items():
                result.margins |= {f"{name}.planes.{number}": t.half() for number, t in enumerate(kept)}
        planes_of.clear()
        latents.clear()
        if work is not None:
            work.save(view.name, *_block_state(result, view.name))

    def restore(block_name: str) -> Callable[[], None] | None:
        state = None if work is None else work.load(block_name)
        if state is None:
            return None
        return lambda: place(*_take_up(result, block_name, state))

    def place(names: Sequence[str], vectors: Sequence[str]) -> None:
        for name in names:
            module = model.get_submodule(name)
            Q = dequantize_planes(fmt.unpack_planes(result.packed[name], float_weight(module).shape[1]))
            replace(f"{name}.weight", _as_stored(module, Q))
            done(name, result.records[name])
        for name in vectors:
            replace(name, result.vectors[name])

    def put_back(_block: str = "") -> None:
        for name, value in originals.items():
            model.get_parameter(name).data = value
        originals.clear()

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
            leave=put_back,  # both copies of one block at a time are in memory, not of the model
            spill=spill,
        )
    finally:
        put_back()
    return result


def prefix_batches(batches: Sequence[Batch], recipe: Recipe) -> list[Batch]:
    """The first sequences, cut to ``prefix_length``, up to ``prefix_tokens`` of them; at least one."""
    chosen: list[Batch] = []
    for batch in (piece for whole in batches for piece in _cut(whole, recipe.prefix_length)):
        if chosen and sum(b["input_ids"].numel() for b in chosen) + batch["input_ids"].numel() > recipe.prefix_tokens:
            break
        chosen.append(batch)
    return chosen


def distill_scales(
    model: nn.Module,
    teacher: nn.Module,
    batches: Sequence[Batch],
    recipe: Recipe,
    seed: int,
    judged: Callable[[dict[str, Any]], None] = lambda entry: None,
    margins: Mapping[str, Tensor] | None = None,
    work: WorkFolder | None = None,
) -> dict[str, Any] | None:
    """Distil the scales, norms and biases of a packed causal language model from its float teacher, in place; by the
    recipe its signs too.

    Args:
        model: packed.
        teacher: the float model, best in bfloat16.
        batches: calibration sequences; the last ones are held out and judge.
        recipe: how much.
        seed: order of the batches.
        judged: called with each evaluation.
        margins: how far each sign is from flipping, from ``quantize_on_prefix``; used where the recipe trains signs.
        work: keeps the state now and then, and has that of a run that was interrupted.

    Returns:
        what was done and the held-out KL before and after, for the report; None where there is nothing to distil from:
        the model gives no logits, or there are fewer than two sequences.
    """
    rows = [row for batch in batches for row in _cut(batch, recipe.length)]
    tokens = sum(row["input_ids"].numel() for row in rows)
    heldout: list[Batch] = []
    while len(rows) > 1 and sum(r["input_ids"].numel() for r in heldout) < min(recipe.heldout_tokens, tokens // 8):
        heldout.append(rows.pop())
    get_head = getattr(model, "get_output_embeddings", None)
    if not heldout or get_head is None or get_head() is None:
        return None
    # A step of pieces of many texts has a steadier gradient than one of neighbours.
    random.Random(seed).shuffle(rows)
    size = max(1, recipe.step_tokens // recipe.length)
    options = DistillOptions(
        steps=recipe.steps,
        learning_rate=recipe.learning_rate,
        sign_rate=recipe.sign_rate,
        warmup=max(1, recipe.steps // 10),
        evaluate_every=max(1, recipe.steps // EVALUATIONS),
        seed=seed,
    )
    joined = stack(rows, size)
    learned = (margins or {}) if recipe.sign_rate > 0 else None
    run, form = distill_model(model, teacher, joined, stack(heldout, size), options, margins=learned)
    before = {name: plane.signs.clone() for name, plane in sign_planes(form.student).items()}
    result = _run_distillation(run, judged, work)
    planes = sign_planes(form.student)
    changed = sum(int((planes[name].signs != signs).sum()) for name, signs in before.items())
    flips = _flip(run, form, joined, recipe, judged, work)
    form.write_back(run.stored())
    return {
        "steps": recipe.steps,
        "tokens": result.tokens,
        "heldout_tokens": sum(row["input_ids"].numel() for row in heldout),
        "learning_rate": recipe.learning_rate,
        "kl_before": result.start,
        "kl_after": result.best,
        "best_step": result.best_step,
        "sign_rate": recipe.sign_rate,
        "signs_changed": changed / max(1, sum(signs.numel() for signs in before.values())),
        "log": result.log,
        "flips": flips,
    }


def _run_distillation(
    run: Distillation, judged: Callable[[dict[str, Any]], None], work: WorkFolder | None
) -> DistillResult:
    """The whole of a distillation, or what a run that was interrupted left of it."""
    if work is None:
        return run.run(callback=judged)
    state = work.load(_DISTILLATION)
    if state is not None:
        run.load_state(*state)
    pace = _Pace()

    def keep() -> None:
        if pace.is_time() or run.step == run.options.steps:
            pace.measure(lambda: work.save(_DISTILLATION, *run.state()))

    return run.run(callback=judged, after_step=keep)


def _flip(
    run: Distillation,
    form: TrainingForm,
    batches: Sequence[Batch],
    recipe: Recipe,
    judged: Callable[[dict[str, Any]], None],
    work: WorkFolder | None,
) -> dict[str, Any] | None:
    """Gated sign flips of a distilled student; what came of them, or None where the recipe has none."""
    if not recipe.flip_rounds:
        return None
    options = FlipOptions(rounds=recipe.flip_rounds, batches_per_round=max(1, recipe.flip_tokens // recipe.step_tokens))
    first = run.step % len(batches)  # batches that distillation met longest ago
    planes = sign_planes(form.student)
    done = None
    state = None if work is None else work.load(_FLIPS)
    if state is not None:
        done = FlipResult(**state[1])
        for name, plane in planes.items():
            plane.signs.copy_(fmt.unpack_signs(state[0][name], plane.signs.shape[1], torch.int8).t())
            plane.fold()

    def keep(result: FlipResult) -> None:
        if work is not None:
            work.save(_FLIPS, {name: fmt.pack_signs(plane.signs) for name, plane in planes.items()}, asdict(result))

    result = gated_flips(
        run.pair, planes, batches, run.evaluate, options, judged, first_batch=first, done=done, after_round=keep
    )
    return {
        "tokens": result.tokens,
        "flipped": result.flipped,
        "kl_before": result.start,
        "kl_after": result.best,
        "log": result.log,
    }


def _cut(batch: Batch, length: int) -> list[Batch]:
    """Pieces of one sequence, of at most ``length`` tokens; none that is padding alone."""
    total = batch["input_ids"].shape[1]
    pieces = [{key: value[:, i : i + length] for key, value in batch.items()} for i in range(0, total, length)]
    return [piece for piece in pieces if "attention_mask" not in piece or bool(piece["attention_mask"].any())]


class _Pace:
    """When a state is worth keeping again: some time after the last one, more where keeping it is slow."""

    def __init__(self) -> None:
        self._last, self._cost = time.perf_counter(), 0.0

    def is_time(self) -> bool:
        return time.perf_counter() - self._last >= max(KEEP_EVERY_S, self._cost / KEEP_SHARE)

    def measure(self, keep: Callable[[], object]) -> None:
        start = time.perf_counter()
        keep()
        self._last = time.perf_counter()
        self._cost = self._last - start


def _block_state(result: PrefixResult, block: str) -> State:
    """What there is of one block, as a stage of a work folder: the other way is `_take_up`."""
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


class _Choice:
    """What the layers of one stage share: a curvature and a correction for each input that they read."""

    def __init__(self, planes: int | Mapping[str, int]) -> None:
        self._planes = planes
        self._curvatures: dict[int, signs.Curvature] = {}
        self._corrections: dict[int, Tensor] = {}

    def planes(self, name: str) -> int:
        """Of one layer. The shrinkage, which is shared, is chosen with those of the first layer that asks."""
        return self._planes if isinstance(self._planes, int) else self._planes[name]

    def fit(
        self, name: str, W: Tensor, statistics: PrefixStatistics | None, rounds: int
    ) -> tuple[signs.SignFit, float, Tensor, signs.Curvature]:
        """Signs and scales of one layer, the strength of its correction, and the target and curvature fitted to."""
        if statistics is None or statistics.hessian is None:  # an expert that no token chose
            blank = signs.Curvature(torch.zeros(W.shape[1], W.shape[1]))
            return signs.fit_signs(W, blank, planes=self.planes(name), rounds=rounds, layer=name), 0.0, W, blank
        curvature = self._curvature(name, W, statistics)
        strength, target = self._target(name, W, statistics, curvature)
        fit = signs.fit_signs(target, curvature, planes=self.planes(name), rounds=rounds, layer=name)
        return fit, strength, target, curvature

    def _curvature(self, name: str, W: Tensor, statistics: PrefixStatistics) -> signs.Curvature:
        key = id(statistics)
        if key not in self._curvatures:
            assert statistics.hessian is not None
            if statistics.heldout_hessian is None:
                self._curvatures[key] = signs.Curvature(statistics.hessian, 0.15)
            else:
                self._curvatures[key], _ = signs.choose_shrinkage(
                    W, statistics.hessian, statistics.heldout_hessian, planes=self.planes(name), layer=name
                )
        return self._curvatures[key]

    def _target(
        self, name: str, W: Tensor, statistics: PrefixStatistics, curvature: signs.Curvature
    ) -> tuple[float, Tensor]:
        H, C = statistics.hessian, statistics.cross
        if H is None or C is None:
            return 0.0, W
        key = id(statistics)
        if key not in self._corrections:
            self._corrections[key] = signs.target_correction(H, C)
        K = self._corrections[key]
        best = 0.5
        if statistics.heldout_hessian is not None and statistics.heldout_cross is not None:
            sample = signs.sample_rows(W, _SAMPLE_ROWS)
            losses = {}
            for strength in STRENGTHS:
                fit = signs.fit_signs(
                    sample + strength * (sample @ K), curvature, planes=self.planes(name), rounds=1, layer=name
                )
                losses[strength] = signs.drift_loss(
                    sample, fit.planes, statistics.heldout_hessian, statistics.heldout_cross
                )
            best = min(losses, key=lambda strength: losses[strength])
        return best, W + best * (W @ K)


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
