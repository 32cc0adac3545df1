"""What a quantization will take, said before it starts: time, memory and disk.

Memory and disk follow from sizes. Time comes from small measurements on this machine, made when it is asked for (one
block on one sequence, fits of two small layers, a slice of the output head), and is carried over by counts of tokens,
columns and products. All of it is an estimate: within a factor of two as a rule, and of three at worst.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_onebit.algorithms import signs
from hf_onebit.algorithms.curvature import Curvature
from hf_onebit.algorithms.gptq import fit_groups
from hf_onebit.calibration import CalibrationData
from hf_onebit.config import PackingConfig
from hf_onebit.formats.table import TableEntry
from hf_onebit.free_memory import available_memory, own_limits
from hf_onebit.nn.replace import LayerPlan, float_weight
from hf_onebit.nn.roles import LinearShape
from hf_onebit.progress import logger, memory_mb, say
from hf_onebit.rungs.walk import capture, find_blocks

# Per layer that is fitted: candidates for the shrinkage, once for all that read one input, and for the correction.
_TRIALS = 3
_SAMPLE_ROWS = 128
# Runs of a block on each sequence: as float, before its later stages (each ends at the stage's input), and quantized.
_PASSES = 3.6
# Matrices of an input's size squared, beside the fit's own: H and C, fitted and held out, their curvature and factors.
_SQUARES = 9
# The most that `fit_signs` holds, in matrices of the larger of W's and H's size.
_WORK = 8
# Of a token's width, what autograd keeps of one block beside the inner products of its MLP.
_KEPT_WIDTHS = 12
_PROBE_TOKENS = 256


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
    """

    seconds: float | None
    memory_bytes: int
    disk_bytes: int
    more_bytes: int
    available_bytes: int | None
    writing_seconds: float | None = None

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

    def line(self) -> str:
        """One line for a user."""
        parts = [] if self.seconds is None else [f"about {duration(self.seconds)}"]
        if self.writing_seconds is not None:
            of_it = " of it" if parts else "about"
            text = f"{of_it} {duration(self.writing_seconds)} to write the calibration text"
            parts = [f"{parts[0]},{text}"] if parts else [text]
        left = "" if self.available_bytes is None else f" ({_size(self.available_bytes)} more are free)"
        parts += [f"{_size(self.memory_bytes)} of memory{left}", f"{_size(self.disk_bytes)} on disk"]
        return f"Estimate: {', '.join(parts)}"

    def warning(self) -> str | None:
        """What to do about too little memory, or None where there is enough."""
        if not self.short:
            return None
        assert self.available_bytes is not None
        return (
            f"This will need about {_size(self.more_bytes)} more memory, and {_size(self.available_bytes)} are free: "
            "it may fail. Use fewer calibration tokens (calibration_tokens=, --calibration-tokens), load the float "
            "model in bfloat16, quantize its files block by block (low_memory=True, --low-memory, with a text of your "
            "own), close other programs, or take a larger machine"
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON types, for the report."""
        return asdict(self)


def estimate(model: nn.Module, plan: LayerPlan, data: CalibrationData, recipe: Any) -> Preflight:
    """What quantizing will take. The model and every random state stay as they are.

    Args:
        model: the float model, whole in memory.
        plan: what will be packed.
        data: what it is calibrated on.
        recipe: the preset's ``recipes.Recipe``, or None for the closed form, whose time is not estimated. Fields it
            does not have count as zero.
    """
    sizes = _Sizes.of(model, plan)
    planes = max((plan.entry(name).planes for name in plan.selected), default=1)
    more = _walk_bytes(sizes, data) if recipe is None else _fit_bytes(sizes, data, recipe, planes)
    held = max(int(memory_mb() * 2**20), sizes.model_bytes)
    return Preflight(
        seconds=None if recipe is None else _seconds(model, plan, sizes, data, recipe, planes),
        memory_bytes=held + more,
        disk_bytes=_disk_bytes(model, plan),
        more_bytes=more,
        available_bytes=available_memory(next(model.parameters())),
    )


def estimate_loading(model: nn.Module, plan: LayerPlan) -> Preflight:
    """What quantizing while loading takes, which holds the packed model and one float tensor at a time; without time.

    Args:
        model: with or without weights (on the meta device).
        plan: what will be packed.
    """
    disk = _disk_bytes(model, plan)
    largest = max((p.numel() * p.element_size() for p in model.parameters()), default=0)
    more = disk + _WORK * largest
    return Preflight(None, int(memory_mb() * 2**20) + more, disk, more, available_memory())


def estimate_streamed(model: nn.Module, plan: LayerPlan, data: CalibrationData | None, recipe: Any) -> Preflight:
    """What quantizing block by block from files takes (streaming.py); without time.

    Hidden states are in files then, and packed blocks go into files as they are done.

    Args:
        model: on the meta device.
        plan: what will be packed.
        data: what it is calibrated on, if anything.
        recipe: as of `estimate`, without what takes the whole model.
    """
    sizes = _Sizes.of(model, plan)
    matrices = [*sizes.layers, *plan.heads.shapes.values()]
    work = _WORK * 4 * max((s.weights for s in matrices), default=0)
    if data is not None and recipe is not None:
        planes = max((plan.entry(name).planes for name in plan.selected), default=1)
        work = max(work, _fit_bytes(sizes, data, recipe, planes, streamed=True))
    elif data is not None:
        work += max((sum(4 * s.in_features**2 for _, s in block) for block in sizes.blocks), default=0)
    found = find_blocks(model)
    parts = [p.numel() * p.element_size() for p in model.parameters()]
    parts += (
        [] if found is None else [sum(p.numel() * p.element_size() for p in block.parameters()) for block in found[1]]
    )
    more = max(parts, default=0) + work
    return Preflight(None, int(memory_mb() * 2**20) + more, _disk_bytes(model, plan), more, available_memory())


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
            mapped = expected.more_bytes + _Sizes.of(model, plan).model_bytes
            expected = replace(expected, more_bytes=mapped)
    else:
        sizes, recipe = _Sizes.of(model, plan), recipes.get(config.preset)
        length = min(config.calibration_context, config.tokens_wanted)
        row = {"input_ids": torch.zeros(1, length, dtype=torch.int64)}
        count = max(1, config.tokens_wanted // length) if config.calibrates else 0
        data = CalibrationData([row] * count, "", length * count, "")
        planes = 1 if recipe is None else max((plan.planes.get(name, 1) for name in plan.selected), default=1)
        more = sizes.model_bytes
        more += _walk_bytes(sizes, data) if recipe is None else _fit_bytes(sizes, data, recipe, planes)
        expected = Preflight(None, int(memory_mb() * 2**20) + more, 0, more, available_memory())
    if not expected.short:
        return None
    assert expected.available_bytes is not None
    return (
        f"The whole model would need about {_size(expected.more_bytes)} more memory, and "
        f"{_size(expected.available_bytes)} are free."
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
    ids = torch.randint(
        0, model.get_input_embeddings().weight.shape[0], (1, context), generator=torch.Generator().manual_seed(0)
    )
    return CalibrationData([{"input_ids": ids}] * rows, "none", rows * context, "")


def tell(expected: Preflight) -> None:
    """Say what it will take, and warn where it is more than there is."""
    say(expected.line())
    if warning := expected.warning():
        logger.warning(warning)


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
        rate, tokens = _time_product(next(model.parameters()).device), _tokens(data.batches)
        # Those of one parent and width read one tensor, whose Hessian is summed once.
        inputs = {(name.rpartition(".")[0], s.in_features) for name, s in plan.selected.items()}
        seconds += tokens * (len(found[1]) * _time_block(model, found[1], data) + rate * sum(n * n for _, n in inputs))
    return seconds


# --- sizes ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sizes:
    """What of a model counts."""

    parameters: int
    model_bytes: int
    packed: int  # weights
    packed_bytes: int
    width: int  # of the hidden states
    vocabulary: int
    layers: list[LinearShape]
    blocks: list[list[tuple[str, LinearShape]]]  # the layers of each block

    @classmethod
    def of(cls, model: nn.Module, plan: LayerPlan) -> _Sizes:
        parameters = list(model.parameters())
        found = find_blocks(model)
        name, count = ("", 0) if found is None else (found[0], len(found[1]))
        blocks = [
            [(layer, shape) for layer, shape in plan.selected.items() if layer.startswith(f"{name}.{index}.")]
            for index in range(count)
        ]
        embedding = model.get_input_embeddings()  # type: ignore[operator]
        rows, width = embedding.weight.shape[0], embedding.weight.shape[-1]
        shapes = list(plan.selected.values())
        return cls(
            sum(p.numel() for p in parameters),
            sum(p.numel() * p.element_size() for p in parameters),
            sum(shape.weights for shape in shapes),
            _packed_bytes(plan),
            max([width, *(s.in_features for s in shapes if not blocks)]),
            rows,
            shapes,
            blocks or [list(plan.selected.items())],
        )

    def block_inputs(self) -> int:
        """Summed widths of the distinct inputs of one block's layers; layers of one module and width share theirs."""
        return max(
            (sum({(n.rpartition(".")[0], s.in_features): s.in_features for n, s in b}.values()) for b in self.blocks),
            default=0,
        )

    def experts(self) -> int:
        """How many layers of a block differ in a number only: their statistics are in memory together."""
        most = 1
        for block in self.blocks:
            names = [re.sub(r"\.\d+\.", ".N.", name.partition(".layers.")[2] or name) for name, _ in block]
            most = max([most, *(names.count(name) for name in set(names))])
        return most

    def largest(self, size: Callable[[LinearShape], int]) -> int:
        """The largest layer by some measure."""
        return max(map(size, self.layers), default=0)


def _walk_bytes(sizes: _Sizes, data: CalibrationData) -> int:
    """The closed form's walk: hidden states, one block's Hessians, one layer's fit."""
    states = _tokens(data.batches) * sizes.width * 4
    hessians = max((sum(4 * s.in_features**2 for _, s in block) for block in sizes.blocks), default=0)
    return states + hessians + _WORK * 4 * sizes.largest(lambda s: s.weights) + sizes.packed_bytes


def _fit_bytes(sizes: _Sizes, data: CalibrationData, recipe: Any, planes: int, streamed: bool = False) -> int:
    """Everything above the closed form: the prefix, block tuning, and distillation, of which the largest counts.

    ``streamed``: hidden states are in files, and there is one block.
    """
    tokens = min(_tokens(data.batches), getattr(recipe, "prefix_tokens", 0) or math.inf)
    packed = 0 if streamed else sizes.packed_bytes
    streams = 0 if streamed else int(tokens) * sizes.width * 4 * 2
    inputs = 0 if streamed else int(tokens) * sizes.block_inputs() * 2
    squares = _SQUARES * 4 * sizes.experts() * sizes.largest(lambda s: s.in_features**2)
    work = _WORK * 4 * planes * sizes.largest(lambda s: max(s.weights, s.in_features**2))
    blocks = len(sizes.blocks) if streamed else 1
    written = (
        sizes.packed // blocks * (sizes.model_bytes // max(1, sizes.parameters))
    )  # dequantized, in the float ones' place
    prefix = streams + inputs + squares + work + written
    block = max((sum(s.weights for _, s in block) for block in sizes.blocks), default=0)
    step = getattr(recipe, "step_tokens", 0) or 0
    kept = _KEPT_WIDTHS * sizes.width + 4 * sizes.largest(lambda s: max(s.in_features, s.out_features))
    if getattr(recipe, "block_epochs", 0):  # latents, gradients and two moments in float32; one sequence at a time
        longest = max((batch["input_ids"].shape[1] for batch in data.batches), default=0)
        prefix = max(prefix, streams + 16 * planes * block + 4 * longest * kept)
    distillation = 0
    if getattr(recipe, "steps", 0):
        # The teacher is copied in the model's dtype before it becomes bfloat16. Signs take a byte, folded weights two.
        teacher = max(2 * sizes.parameters, sizes.model_bytes)
        student = (2 + planes) * sizes.packed + 2 * (sizes.parameters - sizes.packed)
        logits = 3 * 512 * sizes.vocabulary * 4
        if getattr(recipe, "sign_rate", 0):
            student += 16 * planes * sizes.packed  # latents and the like, of the whole model
        distillation = teacher + student + 2 * step * kept * len(sizes.blocks) + logits
    return max(prefix, distillation) + packed


def _packed_bytes(plan: LayerPlan) -> int:
    """What the selected layers take once they are packed; those whose bits are still to be chosen count as nothing."""
    chosen = [(plan.entry(name), shape) for name, shape in plan.selected.items() if plan.has_entry(name)]
    bits = sum(entry.bits_per_weight(s.in_features, s.out_features) * s.weights for entry, s in chosen)
    return round(bits / 8)


def _disk_bytes(model: nn.Module, plan: LayerPlan) -> int:
    """Packed tensors, and every other parameter and buffer as it is; a matrix that is untied counts twice."""
    heads = plan.heads
    packed: float = _packed_bytes(plan)
    for name, entry in heads.entries.items():
        shape = heads.shapes[name]
        if entry.tied_to is None:
            packed += entry.bits_per_weight(shape.in_features, shape.out_features) * shape.weights / 8
    element = next(model.parameters()).element_size()
    replaced = sum(shape.weights for shape in plan.selected.values()) + heads.weights
    tensors = [*model.parameters(), *(buffer for _, buffer in _stored_buffers(model))]
    return int(packed + sum(t.numel() * t.element_size() for t in tensors) - replaced * element)


def _stored_buffers(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}", buffer


def _tokens(batches: Sequence[dict[str, Tensor]]) -> int:
    return sum(batch["input_ids"].numel() for batch in batches)


# --- time -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def _seconds(
    model: nn.Module, plan: LayerPlan, sizes: _Sizes, data: CalibrationData, recipe: Any, planes: int
) -> float | None:
    """Measured in small, and carried over; None for models without one stack of blocks, which cannot be fitted."""
    found = find_blocks(model)
    if found is None or not plan.selected or not data.batches:
        return None
    training = model.training
    model.eval()
    try:
        block, block_grad = _time_block(model, found[1], data), getattr(recipe, "block_epochs", 0)
    finally:
        model.train(training)
    count = len(found[1])
    tokens = min(_tokens(data.batches), getattr(recipe, "prefix_tokens", 0) or math.inf)
    # Of several ways of packing, the one that packs the most weights.
    weights: dict[TableEntry, int] = {}
    for name, shape in plan.selected.items():
        weights[plan.entry(name)] = weights.get(plan.entry(name), 0) + shape.weights
    usual = max(weights, key=lambda entry: weights[entry])
    first = next(name for name in plan.selected if plan.entry(name) == usual)
    column, product = _time_fit(float_weight(model.get_submodule(first)), usual if usual.method == "mpq" else None)
    rate = _time_product(next(model.parameters()).device)
    seconds = tokens * count * block * (_PASSES + 4 * block_grad)
    rounds = getattr(recipe, "rounds", 0)

    def fit(rows: int, shape: LinearShape, turns: int) -> float:
        n = shape.in_features
        return planes * (turns + 1) * (n * column * max(1.0, rows / 512) + (rows * n * n + n**3) * product)

    for layers in sizes.blocks:
        for inputs in {(name.rpartition(".")[0], s.in_features): s for name, s in layers}.values():
            # H and C over all tokens, and the shrinkage.
            seconds += 4 * tokens * inputs.in_features**2 * rate + _TRIALS * fit(_SAMPLE_ROWS, inputs, 1)
        for _, shape in layers:
            seconds += fit(shape.out_features, shape, rounds) + _TRIALS * fit(_SAMPLE_ROWS, shape, 1)
    steps = getattr(recipe, "steps", 0)
    if steps:
        heldout = min(getattr(recipe, "heldout_tokens", 0), _tokens(data.batches) // 8)
        token = count * block + _time_head(model)
        # A step: teacher, student, and twice the student backwards. Five evaluations, and the teacher once.
        seconds += token * (4 * steps * getattr(recipe, "step_tokens", 0) + 6 * heldout)
    return seconds


def _time_block(model: nn.Module, blocks: nn.ModuleList, data: CalibrationData) -> float:
    """Seconds that one block takes for one token, in bfloat16 as the fits run it."""
    batch = {key: value[:, :_PROBE_TOKENS] for key, value in data.batches[0].items()}
    states, calls = capture(model, blocks, [batch])
    hidden = states[0].to(next(blocks.parameters()).device)
    with torch.autocast(hidden.device.type, torch.bfloat16):
        taken = _timed(lambda: calls[0][0].run(blocks[0], hidden))
    return taken / batch["input_ids"].numel()


def _time_fit(W: Tensor, entry: TableEntry | None = None) -> tuple[float, float]:
    """Seconds a column and seconds a multiplication of one round of `fit_signs`, or for an entry that packs groups of
    `fit_groups`, from corners of a real matrix."""

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


def _time_head(model: Any) -> float:
    """Seconds that the output head and what follows take for one token: bfloat16 product, softmax in float32."""
    head = model.get_output_embeddings()
    if head is None:
        return 0.0
    weight = head.weight[:8192].detach().to(torch.bfloat16)
    x = torch.ones(64, weight.shape[1], dtype=torch.bfloat16, device=weight.device)
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


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{max(1, round(count / 1e6))} MB"


def duration(seconds: float) -> str:
    """A time as an estimate of it is told."""
    if seconds < 90:
        return f"{max(1, math.ceil(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
