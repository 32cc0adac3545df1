"""The rungs above the walk: a packed model is distilled, then signs are flipped; both go on where they stopped."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from hf_onebit.algorithms.code_linear import code_layers
from hf_onebit.algorithms.distill import Distillation, DistillOptions, DistillResult
from hf_onebit.algorithms.flips import FlipOptions, FlipResult, gated_flips
from hf_onebit.algorithms.sign_linear import sign_planes
from hf_onebit.calibration import Batch
from hf_onebit.distillation import TrainingForm, distill_model
from hf_onebit.formats import onebit as fmt
from hf_onebit.formats.table import TableEntry
from hf_onebit.nn import OneBitLinear, packed_layers
from hf_onebit.progress import logger
from hf_onebit.quantization.resume import WorkFolder
from hf_onebit.rungs.recipes import Recipe
from hf_onebit.rungs.sequences import hold_out, in_steps, tokens_of

# A distillation that is interrupted loses about so much time.
KEEP_EVERY_S = 30.0
# Keeping states takes this share of the time at the most.
KEEP_SHARE = 0.05
# Times that distillation is judged on held-out tokens.
EVALUATIONS = 6
# Of the steps of scales and signs, what a second plane leaves: its levels lie closer, and at one plane's steps the
# held-out loss rises.
SECOND_PLANE_SHARE = 0.25
# The stages that these rungs are kept as.
_DISTILLATION, _FLIPS = "distillation", "flips"


def distill_scales(
    model: nn.Module,
    teacher: nn.Module,
    batches: Sequence[Batch],
    recipe: Recipe,
    seed: int,
    judged: Callable[[dict[str, Any]], None] = lambda entry: None,
    margins: Mapping[str, Tensor] | None = None,
    work: WorkFolder | None = None,
    entries: Mapping[str, TableEntry] | None = None,
) -> dict[str, Any] | None:
    """Distil the scales, norms and biases of a packed causal language model from its float teacher, in place; by the
    recipe its signs and codes too.

    Args:
        model: packed.
        teacher: the float model, in the dtype that the student shall compute in; see ``arithmetic.product_dtype``.
        batches: calibration sequences; the last ones are held out and judge.
        recipe: how much.
        seed: order of the batches.
        judged: called with each evaluation.
        margins: how far each sign is from flipping and where each code would like to be, from ``quantize_on_prefix``;
            used where the recipe trains them.
        work: keeps the state now and then, and has that of a run that was interrupted.
        entries: how group-quantized layers are packed.

    Returns:
        what was done and the held-out KL before and after, for the report; None where there is nothing to distil from:
        the model gives no logits, or the text is too short to hold out any of it.
    """
    rows, heldout = hold_out(batches, recipe)
    get_head = getattr(model, "get_output_embeddings", None)
    if not heldout or get_head is None or get_head() is None:
        why = "the model gives no logits" if heldout else "the calibration text is too short to judge by a part of it"
        logger.warning(f"Nothing is distilled: {why}")
        return None
    share = SECOND_PLANE_SHARE ** (_mean_planes(model) - 1)
    options = DistillOptions(
        steps=recipe.steps,
        learning_rate=recipe.learning_rate * share,
        sign_rate=recipe.sign_rate * share,
        warmup=max(1, recipe.steps // 10),
        evaluate_every=max(1, recipe.steps // EVALUATIONS),
        seed=seed,
    )
    joined = in_steps(rows, recipe.step_tokens, seed)
    learned = (margins or {}) if recipe.sign_rate > 0 else None
    judges = in_steps(heldout, recipe.step_tokens)
    dtype = next(p.dtype for p in teacher.parameters() if p.is_floating_point())
    run, form = distill_model(model, teacher, joined, judges, options, dtype=dtype, margins=learned, entries=entries)
    before = _chosen(form)
    result = _run_distillation(run, judged, work)
    after = _chosen(form)
    changed = sum(int((after[name] != values).sum()) for name, values in before.items())
    count = max(1, sum(values.numel() for values in before.values()))
    del after, before
    flips = _flip(run, form, joined, recipe, judged, work)
    form.write_back(run.stored())
    return {
        "steps": recipe.steps,
        "tokens": result.tokens,
        "heldout_tokens": tokens_of(heldout),
        "learning_rate": options.learning_rate,
        "kl_before": result.start,
        "kl_after": result.best,
        "best_step": result.best_step,
        "sign_rate": options.sign_rate,
        "signs_changed": changed / count,
        "log": result.log,
        "flips": flips,
    }


def _mean_planes(model: nn.Module) -> float:
    """Planes a weight, over all layers of signs; 1 where there are none."""
    layers = [layer for layer in packed_layers(model).values() if isinstance(layer, OneBitLinear)]
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    planes = sum(layer.in_features * layer.out_features * layer.planes for layer in layers)
    return planes / weights if weights else 1.0


def _chosen(form: TrainingForm) -> dict[str, Tensor]:
    """A copy of all signs and codes."""
    signs = {name: plane.signs.clone() for name, plane in sign_planes(form.student).items()}
    return signs | {name: layer.codes.clone() for name, layer in code_layers(form.student).items()}


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
    # As distillation would go on: batches that it met long ago, long and short sequences in turn.
    order = [batches[run.order(run.step + number)] for number in range(len(batches))]
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

    result = gated_flips(run.pair, planes, order, run.evaluate, options, judged, done=done, after_round=keep)
    return {
        "tokens": result.tokens,
        "flipped": result.flipped,
        "kl_before": result.start,
        "kl_after": result.best,
        "log": result.log,
    }


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
