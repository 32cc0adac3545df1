"""How long a quantization will take, from small measurements on this machine.

They are made when they are asked for (one block on one sequence, fits of two small layers, a slice of the output head),
and carried over by counts of tokens, columns and products.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from hf_onebit.algorithms import signs
from hf_onebit.algorithms.curvature import Curvature
from hf_onebit.algorithms.flips import FlipOptions
from hf_onebit.algorithms.gptq import fit_groups
from hf_onebit.arithmetic import autocast_dtype, product_dtype
from hf_onebit.calibration import CalibrationData
from hf_onebit.formats.table import TableEntry
from hf_onebit.modes import evaluating
from hf_onebit.nn.replace import LayerPlan, float_weight
from hf_onebit.nn.roles import LinearShape
from hf_onebit.preflight.sizes import Sizes, tokens_in
from hf_onebit.rungs.block_calls import capture
from hf_onebit.rungs.blocks import find_blocks
from hf_onebit.rungs.recipes import Recipe
from hf_onebit.rungs.sequences import hold_out, judging_sequences, prefix_batches, tokens_of

# Per layer that is fitted: candidates for the shrinkage, once for all that read one input, and for the correction.
_TRIALS = 3
_SAMPLE_ROWS = 128
# Runs of a block on each sequence: as float, before its later stages (each ends at the stage's input), and quantized.
_PASSES = 3.6
_PROBE_TOKENS = 256

QuantizeLayer = Callable[[Tensor, str, LayerPlan, "Tensor | None"], Any]
"""(some rows of W, layer, plan, Hessian of its inputs) -> whatever; it is timed."""


@torch.no_grad()
def closed_seconds(model: nn.Module, plan: LayerPlan, data: CalibrationData | None, quantize: QuantizeLayer) -> float:
    """Time of the closed form: some rows of one layer of each kind, and with data the walk for the Hessians.

    Args:
        model: whole in memory, or on the meta device (random weights stand in then).
        plan: what will be packed.
        data: what it is calibrated on, if anything.
        quantize: packs a layer.
    """
    kinds: dict[Any, tuple[str, int]] = {}  # the first layer of each kind, and the weights of all
    for name, shape in plan.selected.items():
        kind = plan.entry(name), shape.in_features
        first, weights = kinds.get(kind, (name, 0))
        kinds[kind] = first, weights + shape.weights
    seconds = 0.0
    for name, weights in kinds.values():
        W = float_weight(model.get_submodule(name))[:_SAMPLE_ROWS]
        W = torch.randn(W.shape) if W.is_meta else W
        hessian = None if data is None else torch.eye(W.shape[1], device=W.device)
        seconds += _timed(lambda: quantize(W, name, plan, hessian)) / W.numel() * weights  # noqa: B023  called at once
    found = find_blocks(model)
    if data is not None and found is not None and data.batches:
        rate, tokens = _time_product(next(model.parameters()).device), tokens_in(data.batches)
        # Those of one parent and width read one tensor, whose Hessian is summed once.
        inputs = {(name.rpartition(".")[0], s.in_features) for name, s in plan.selected.items()}
        seconds += tokens * (len(found[1]) * _time_block(model, found[1], data) + rate * sum(n * n for _, n in inputs))
    return seconds


@torch.no_grad()
def ladder_seconds(
    model: nn.Module, plan: LayerPlan, sizes: Sizes, data: CalibrationData, recipe: Recipe, planes: int
) -> float | None:
    """Measured in small, and carried over; None for models without one stack of blocks, which cannot be fitted."""
    found = find_blocks(model)
    if found is None or not plan.selected or not data.batches:
        return None
    with evaluating(model):
        block = _time_block(model, found[1], data)
    count = len(found[1])
    fitted = prefix_batches(data.batches, recipe)
    judged = bool(judging_sequences(len(fitted)))
    tuning, epochs = (recipe.block, recipe.block_epochs) if judged else (None, 0)
    trials = _TRIALS if judged else 0
    tokens = tokens_in(fitted)
    # Of several ways of packing, the one that packs the most weights.
    weights: dict[TableEntry, int] = {}
    for name, shape in plan.selected.items():
        weights[plan.entry(name)] = weights.get(plan.entry(name), 0) + shape.weights
    usual = max(weights, key=lambda entry: weights[entry])
    first = next(name for name in plan.selected if plan.entry(name) == usual)
    column, product = _time_fit(float_weight(model.get_submodule(first)), usual if usual.method == "mpq" else None)
    rate = _time_product(next(model.parameters()).device)
    # Student, twice that backwards, and what judges; signs that learn take the gradient of the whole matrix too.
    products = 5 if getattr(tuning, "sign_rate", 0) else 4
    seconds = tokens * count * block * (_PASSES + products * epochs)
    latent = planes * sizes.packed * _time_latent(next(model.parameters()).device)
    if tuning is not None and tuning.sign_rate:
        seconds += epochs * tokens / (mean(recipe.prefix_lengths) * tuning.sequences_per_step) * latent
    rounds = recipe.rounds

    def fit(rows: int, shape: LinearShape, turns: int) -> float:
        n = shape.in_features
        return planes * (turns + 1) * (n * column * max(1.0, rows / 512) + (rows * n * n + n**3) * product)

    for layers in sizes.blocks:
        for inputs in {(name.rpartition(".")[0], s.in_features): s for name, s in layers}.values():
            # H and C over all tokens, and the shrinkage.
            seconds += 4 * tokens * inputs.in_features**2 * rate + trials * fit(_SAMPLE_ROWS, inputs, 1)
        for _, shape in layers:
            seconds += fit(shape.out_features, shape, rounds) + trials * fit(_SAMPLE_ROWS, shape, 1)
    steps, heldout = recipe.steps, tokens_of(hold_out(data.batches, recipe)[1])
    if steps and heldout:
        token = count * block + _time_head(model)
        # A step: teacher, student, and twice the student backwards. Five evaluations, and the teacher once.
        signs_learn = bool(recipe.sign_rate)
        seconds += token * ((5 if signs_learn else 4) * steps * recipe.step_tokens + 6 * heldout)
        seconds += steps * latent if signs_learn else 0.0
        seconds += recipe.flip_rounds * token * (5 * recipe.flip_tokens + FlipOptions.tries * heldout)
    return seconds


def _time_block(model: nn.Module, blocks: nn.ModuleList, data: CalibrationData) -> float:
    """Seconds that one block takes for one token, in the dtype in which the fits run it."""
    batch = {key: value[:, :_PROBE_TOKENS] for key, value in data.batches[0].items()}
    states, calls = capture(model, blocks, [batch])
    hidden = states[0].to(next(blocks.parameters()).device)
    dtype = autocast_dtype(hidden.device)
    with torch.autocast(hidden.device.type, dtype) if dtype else contextlib.nullcontext():
        taken = _timed(lambda: calls[0][0].run(blocks[0], hidden))
    return taken / batch["input_ids"].numel()


def _time_fit(W: Tensor, entry: TableEntry | None = None) -> tuple[float, float]:
    """Seconds a column and seconds a multiplication of one round of ``fit_signs``, or for an entry that packs groups of
    ``fit_groups``, from corners of a real matrix."""

    def fit(corner: Tensor, curvature: Curvature) -> Any:
        if entry is None:
            return signs.fit_signs(corner, curvature, rounds=1)
        size = entry.group_size if entry.blocks is None else entry.blocks[0][2]
        return fit_groups(corner, curvature, entry.bits, size, entry.symmetric, rounds=1)

    times, sizes = [], []
    for size in (64, 256):
        corner = W.detach()[:512, :size].float()
        curvature = Curvature(corner.T @ corner, 0.15, damping=0.1)
        times.append(_timed(lambda: fit(corner, curvature)) / 2)  # noqa: B023  called at once
        sizes.append((corner.shape[1], corner.shape[0] * corner.shape[1] ** 2 + corner.shape[1] ** 3))
    (n, few), (m, many) = sizes
    if m == n:  # a narrow layer has one size only
        return times[0] / n, 0.0
    product = max(0.0, (times[1] - times[0] * m / n) / (many - few * m / n))
    return max(times[1] - product * many, 0.0) / m, product


def _time_product(device: torch.device) -> float:
    """Seconds a multiply-add in float32."""
    x = torch.ones(256, 512, device=device)
    return _timed(lambda: x.t() @ x) / (256 * 512 * 512)


def _time_latent(device: torch.device) -> float:
    """Seconds that one update takes for one sign that learns: Adam, and the sign put into the weight."""
    latent = torch.ones(1 << 20, device=device, requires_grad=True)
    latent.grad = torch.ones_like(latent)
    adam = torch.optim.Adam([latent], lr=1e-6, fused=True)

    @torch.no_grad()
    def update() -> None:
        adam.step()
        latent.clamp_(-1, 1).sign().to(torch.bfloat16)

    return _timed(update) / latent.numel()


def _time_head(model: Any) -> float:
    """Seconds that the output head and what follows take for one token: the softmax is in float32."""
    head = model.get_output_embeddings()
    if head is None:
        return 0.0
    weight = head.weight[:8192].detach().to(product_dtype(head.weight.device))
    x = torch.ones(64, weight.shape[1], dtype=weight.dtype, device=weight.device)
    taken = _timed(lambda: (x @ weight.T).float().log_softmax(-1).exp())
    return taken / 64 * head.weight.shape[0] / weight.shape[0]


def _timed(run: Callable[[], Any]) -> float:
    """The shorter of two runs, after one that warms up."""
    run()
    times = []
    for _ in range(2):
        _wait()
        start = time.perf_counter()
        run()
        _wait()
        times.append(time.perf_counter() - start)
    return min(times)


def _wait() -> None:
    """Until a GPU, where one is in use, has done what it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
