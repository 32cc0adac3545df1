"""What a quantization holds in memory and leaves on the disk, from the sizes of a model's tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_onebit.algorithms.divergence import HEAD_ROWS
from hf_onebit.arithmetic import product_dtype
from hf_onebit.calibration import CalibrationData
from hf_onebit.nn.replace import LayerPlan
from hf_onebit.nn.roles import LinearShape, embedding_sizes
from hf_onebit.rungs.blocks import find_blocks

# Matrices of an input's size squared, beside the fit's own: H and C, fitted and held out, their curvature and factors.
_SQUARES = 9
# The most that ``fit_signs`` holds, in matrices of the larger of W's and H's size.
WORK_MATRICES = 8
# Of a token's width, what autograd keeps of one block beside the inner products of its MLP.
_KEPT_WIDTHS = 12
# Of a sign that learns: its latent and two moments in float32, and its best value; before that, its margin.
_LEARNING_SIGN_BYTES = 13
_MARGIN_BYTES = 2
# Of a model that cannot be split in front of its head: its logits and the teacher's, their gradient twice, and what
# autograd keeps of what is done to them.
_LOGITS = 6


@dataclass(frozen=True)
class Sizes:
    """What of a model counts."""

    parameters: int
    model_bytes: int
    packed: int  # weights
    packed_bytes: int
    width: int  # of the hidden states
    vocabulary: int
    product_bytes: int  # of a number in the dtype that students and teachers compute in
    splits: bool  # whether distillation computes the logits of a few rows at a time
    layers: list[LinearShape]
    blocks: list[list[tuple[str, LinearShape]]]  # the layers of each block

    @classmethod
    def of(cls, model: nn.Module, plan: LayerPlan) -> Sizes:
        parameters = list(model.parameters())
        found = find_blocks(model)
        name, count = ("", 0) if found is None else (found[0], len(found[1]))
        blocks = [
            [(layer, shape) for layer, shape in plan.selected.items() if layer.startswith(f"{name}.{index}.")]
            for index in range(count)
        ]
        rows, width = embedding_sizes(model)
        shapes = list(plan.selected.values())
        return cls(
            sum(p.numel() for p in parameters),
            sum(p.numel() * p.element_size() for p in parameters),
            sum(shape.weights for shape in shapes),
            _packed_bytes(plan),
            max([width, *(s.in_features for s in shapes if not blocks)]),
            rows,
            product_dtype(torch.device("cpu") if parameters[0].is_meta else parameters[0].device).itemsize,
            True,
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

    def hessian_bytes(self) -> int:
        """Of the Hessians, in float32, of all layers of the block that has the most."""
        return max((sum(4 * s.in_features**2 for _, s in block) for block in self.blocks), default=0)

    def largest(self, size: Callable[[LinearShape], int]) -> int:
        """The largest layer by some measure."""
        return max(map(size, self.layers), default=0)


def walk_bytes(sizes: Sizes, data: CalibrationData, spill: bool = False) -> int:
    """The closed form's walk: hidden states, unless they are in files, one block's Hessians, one layer's fit."""
    states = 0 if spill else tokens_in(data.batches) * sizes.width * 4
    return states + sizes.hessian_bytes() + WORK_MATRICES * 4 * sizes.largest(lambda s: s.weights) + sizes.packed_bytes


def fit_bytes(
    sizes: Sizes, data: CalibrationData, recipe: Any, planes: int, spill: bool = False, streamed: bool = False
) -> int:
    """Everything above the closed form: the prefix, block tuning, and distillation, of which the largest counts.

    ``spill``: hidden states and the layers' inputs are in files; ``streamed``: and there is one block in memory.
    """
    tokens = prefix_tokens_in(data, recipe)
    packed = 0 if streamed else sizes.packed_bytes
    streams = 0 if spill or streamed else stream_bytes(sizes, data, recipe)
    inputs = 0 if spill or streamed else tokens * sizes.block_inputs() * 2
    squares = _SQUARES * 4 * sizes.experts() * sizes.largest(lambda s: s.in_features**2)
    work = WORK_MATRICES * 4 * planes * sizes.largest(lambda s: max(s.weights, s.in_features**2))
    blocks = len(sizes.blocks) if streamed else 1
    written = (
        sizes.packed // blocks * (sizes.model_bytes // max(1, sizes.parameters))
    )  # dequantized, in the float ones' place
    prefix = streams + inputs + squares + work + written
    block = max((sum(s.weights for _, s in block) for block in sizes.blocks), default=0)
    step = recipe.step_tokens
    kept = _KEPT_WIDTHS * sizes.width + 4 * sizes.largest(lambda s: max(s.in_features, s.out_features))
    if recipe.block_epochs:  # latents, gradients and two moments in float32; one sequence at a time
        longest = max((batch["input_ids"].shape[1] for batch in data.batches), default=0)
        prefix = max(prefix, streams + 16 * planes * block + 4 * longest * kept)
    distillation = 0
    if recipe.steps:
        # The teacher is copied in the model's dtype before it is cast. A sign takes a byte beside its folded weight.
        element = sizes.product_bytes
        teacher = max(element * sizes.parameters, sizes.model_bytes)
        student = (element + planes) * sizes.packed + element * (sizes.parameters - sizes.packed)
        logits = (3 * HEAD_ROWS * 4 if sizes.splits else _LOGITS * step * element) * sizes.vocabulary
        if recipe.sign_rate:  # and a copy of it while it is kept
            student += 2 * _LEARNING_SIGN_BYTES * planes * sizes.packed
        distillation = teacher + student + 2 * step * kept * len(sizes.blocks) + logits
    return max(prefix, distillation) + packed


def stream_bytes(sizes: Sizes, data: CalibrationData, recipe: Any) -> int:
    """Hidden states of the prefix in float32: the float model's, the quantized one's, and those behind a block that is
    being finished."""
    return 3 * 4 * prefix_tokens_in(data, recipe) * sizes.width


def work_bytes(sizes: Sizes, data: CalibrationData, recipe: Any, planes: int, spill: bool = False) -> int:
    """What lies on the disk until the end: the work folder, and hidden states where they are spilled.

    Blocks are kept packed, and, where signs learn in distillation, with their margins; then the state of
    distillation, of which the new one is written before the old one goes.
    """
    spilled = stream_bytes(sizes, data, recipe) if spill else 0
    kept = sizes.packed_bytes
    if recipe.steps and recipe.sign_rate:
        kept += (_MARGIN_BYTES + 2 * _LEARNING_SIGN_BYTES) * planes * sizes.packed
    return kept + spilled


def _packed_bytes(plan: LayerPlan) -> int:
    """What the selected layers take once they are packed; those whose bits are still to be chosen count as nothing."""
    chosen = [(plan.entry(name), shape) for name, shape in plan.selected.items() if plan.has_entry(name)]
    bits = sum(entry.bits_per_weight(s.in_features, s.out_features) * s.weights for entry, s in chosen)
    return round(bits / 8)


def disk_bytes(model: nn.Module, plan: LayerPlan) -> int:
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


def prefix_tokens_in(data: CalibrationData, recipe: Any) -> int:
    """Tokens that layers and blocks are fitted on: all that there are, or as many as the recipe takes."""
    tokens = tokens_in(data.batches)
    return min(tokens, recipe.prefix_tokens)


def tokens_in(batches: Sequence[dict[str, Tensor]]) -> int:
    """Tokens of all rows."""
    return sum(batch["input_ids"].numel() for batch in batches)
