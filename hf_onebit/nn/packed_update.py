"""One optimizer step on packed words: piece by piece unpacked, moved (``algorithms.update``) and packed again.

Where arithmetic is float32 and moments are ones that this package makes, the step is one call of the operator
``packed_step`` (ops/schema_update.py). What is here is that operator in plain PyTorch, on any device, and the way of
everything else; a compiled kernel that answers in its place gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_onebit.algorithms.counter_random import random_words
from hf_onebit.algorithms.update import (
    flip_signs,
    initial_inertia,
    mean_square,
    move_codes,
    root,
)
from hf_onebit.argument_checks import shown
from hf_onebit.formats.sign_layout import SignLayout
from hf_onebit.formats.weight_layout import WeightLayout
from hf_onebit.nn import gpu_update
from hf_onebit.nn.parameter_checks import checked_gradient
from hf_onebit.nn.step_operator import Operands, has_neighbours, moment_of, operands_of, tensors_of
from hf_onebit.nn.update_step import Layout, Rounding, Step, Tally, advance
from hf_onebit.ops import gpu_examination
from hf_onebit.ops.schema_update import check_packed_step

__all__ = ["packed_step", "start_inertia", "update_words"]

# Weights of one piece: its float copies are this many numbers each, and all of them fit into a core's cache.
_TILE = 1 << 17
# A moment that is shaped otherwise than the weight has its own random words.
_MOMENT_STREAM = 1 << 31
# The square of what is larger is none in float32: infinities follow, and those are left to PyTorch.
_LARGE = 1e18
# What the operator returns.
_SUMS = ("changed", "saturated", "moved", "squared", "noise")


def update_words(words: Tensor, layout: Layout, gradient: Tensor, step: Step) -> None:
    """Write the words after one step; see ``MPQWeightParameter.update``.

    Raises:
        ValueError: a gradient or moments of another shape, a gradient that is not finite, or inertia for codes of
            more than one bit.
    """
    shape = (layout.in_features, words.shape[1])
    flips = step.rounding.rounding == "inertia"
    gradient, largest = checked_gradient(gradient, shape, step, _largest_code(layout) if flips else None)
    if step.projector is None or hasattr(step.projector, "project_back_columns"):
        back = _begin(gradient, shape, step, flips)
    else:  # of the caller: it may raise, or give another shape, once the moments have moved
        kept = [(tensor, tensor.clone()) for tensor in _moved_tensors(step, flips)]
        try:
            back = _begin(gradient, shape, step, flips)
        except Exception:
            for tensor, before in kept:
                tensor.copy_(before)
            raise
    if gpu_update.takes(words, layout, gradient, step):
        _on_gpu(words, layout, gradient, back, step)
    else:
        _step_all(words, layout, gradient, back, step, largest)
    if step.step is not None:
        step.step.add_(1)


def _begin(gradient: Tensor, shape: tuple[int, int], step: Step, flips: bool) -> Any:
    """Show the whole gradient to the moments that want it; of a projected one, :func:`_projected_back`, else None."""
    for state, square, beta in ((step.exp_avg_s, True, step.beta2), (step.exp_avg_l, False, step.beta1)):
        if state is not None and not isinstance(state, Tensor):
            state.begin(gradient, square, beta)
    if step.projector is None:
        return None
    return _projected_back(gradient.to(torch.promote_types(step.dtype, torch.float32)), shape, step, flips)


def _moved_tensors(step: Step, flips: bool) -> Iterator[Tensor]:
    """What :func:`_begin` changes: the moments of the projected shape."""
    for state in (step.exp_avg_l, None if flips else step.exp_avg_s):
        held = [state] if isinstance(state, Tensor) else getattr(state, "__dict__", {}).values()
        yield from (tensor for tensor in held if isinstance(tensor, Tensor))


def _step_all(words: Tensor, layout: Layout, gradient: Tensor, back: Any, step: Step, largest: float) -> None:
    """The step of all columns, of a projected one piece by piece: by the operator, or by PyTorch where it has none."""
    shape = (layout.in_features, words.shape[1])
    dtype = torch.promote_types(step.dtype, torch.float32)
    call = None
    if dtype == torch.float32 and largest < _LARGE and has_neighbours(words) and has_neighbours(gradient):
        call = _operator(words, layout, step, back is not None)
    if call is not None and back is None:
        call(slice(0, shape[1]), gradient)
    else:
        levels = layout.levels()
        for part in _pieces(shape):
            piece = gradient[:, part] if back is None else back(part)
            if call is not None:
                call(part, piece.to(dtype))
            else:
                _take_piece(words, layout, levels, part, piece.to(dtype), back is None, step)


def _on_gpu(words: Tensor, layout: Layout, gradient: Tensor, back: Any, step: Step) -> None:
    """The step by kernels: at once, or piece by piece where torch computes the directions of the pieces."""
    shape, flips = (layout.in_features, words.shape[1]), step.rounding.rounding == "inertia"
    states = (step.exp_avg_l,) if flips else (step.exp_avg_s, step.exp_avg_l)
    plain = all(state is None or isinstance(state, Tensor) for state in states)
    if back is None and plain:
        gpu_update.run(words, layout, slice(0, shape[1]), gradient, False, step)
        return
    for part in _pieces(shape, gpu_update.WEIGHTS_AT_ONCE):
        if back is not None:
            direction = back(part).to(torch.float32)
        else:
            drawn = random_words(shape, step.rounding.seed, step.t, step.rounding.stream, part, words.device)
            piece = gradient[:, part].to(torch.float32)
            if flips:
                direction = advance(step.exp_avg_l, part, piece, step.beta1, drawn)
            else:
                direction = step.direction(piece, part, drawn)
        gpu_update.run(words[:, part], layout, part, direction, True, step)


def start_inertia(words: Tensor, layout: Layout, rounding: Rounding, state: Any) -> None:
    """Write n at its start into ``state``, a tensor or a moment; its random words are those of step 0."""
    shape = (layout.in_features, words.shape[1])
    for part in _pieces(shape):
        drawn = random_words(shape, rounding.seed, 0, rounding.stream, part, words.device)
        n = initial_inertia(layout.unpack(words[:, part]), drawn, rounding.inertia, torch.float32)
        if isinstance(state, Tensor):
            state[:, part] = n.to(state.dtype)
        else:
            state.write(part, n, drawn)


def _pieces(shape: tuple[int, int], weights: int | None = None) -> Iterator[slice]:
    width = max(1, (_TILE if weights is None else weights) // max(shape[0], 1))
    for first in range(0, shape[1], width):
        yield slice(first, min(first + width, shape[1]))


def _take_piece(
    words: Tensor,
    layout: Layout,
    levels: Tensor,
    part: slice,
    piece: Tensor,
    is_gradient: bool,
    step: Step,
    column: int = 0,
) -> None:
    """The step of some columns; ``column``: the number of the first of all in the random words' matrix."""
    numbers, shape = slice(part.start + column, part.stop + column), (layout.in_features, part.stop + column)
    drawn = random_words(shape, step.rounding.seed, step.t, step.rounding.stream, numbers, words.device)
    move = _flip if step.rounding.rounding == "inertia" else _move
    move(words[:, part], layout, levels, part, piece, is_gradient, drawn, step)


def _operator(words: Tensor, layout: Layout, step: Step, is_direction: bool) -> Callable[[slice, Tensor], None] | None:
    """The operator, as a function of columns and their gradient or direction; None where it does not do this step."""
    rounding = step.rounding
    flips = rounding.rounding == "inertia"
    operands = operands_of(layout, words)
    first: Any = tensors_of(None if is_direction else step.exp_avg_l, 0)
    second: Any = tensors_of(None if is_direction and not flips else step.exp_avg_s, 1)
    if operands is None or first is None or second is None:
        return None
    seed = rounding.seed - (1 << 64) if rounding.seed >> 63 else rounding.seed
    about = (step.lr, step.eta, step.weight_decay, step.beta1, step.beta2, step.eps, rounding.inertia, seed)

    def call(part: slice, piece: Tensor) -> None:
        own = operands.of(part)
        # The second moment's factors by rows are no columns.
        whole = second[0] is not None and second[0].dim() == 1
        moments = [None if t is None else t[..., part] for t in (*first, *(() if whole else second))]
        moments += (second[0], second[1][part]) if whole else ()
        sums = torch.ops.hf_onebit.packed_step.default(
            words[:, part], piece, *moments, *_tensors(own), rounding.rounding, *map(float, about[:-1]), seed,
            rounding.stream, step.t, part.start, is_direction,
        )  # fmt: skip
        if step.tally is not None:
            _add_sums(step.tally, operands.group.numel() * (part.stop - part.start), sums)

    return call


def _tensors(own: Operands) -> tuple[Any, ...]:
    return own.scales, own.zeros, own.input_scales, own.group, own.perm, own.blocks


def _add_sums(tally: Tally, weights: int, sums: Tensor) -> None:
    tally.weights += weights
    for name, new in zip(_SUMS, sums, strict=True):
        setattr(tally, name, getattr(tally, name) + new)


def packed_step(
    words: Tensor,
    gradient: Tensor,
    exp_avg_l: Tensor | None,
    exp_avg_l_peaks: Tensor | None,
    exp_avg_s: Tensor | None,
    exp_avg_s_peaks: Tensor | None,
    scales: Tensor,
    zeros: Tensor | None,
    input_scales: Tensor | None,
    group: Tensor,
    perm: Tensor | None,
    blocks: Sequence[int],
    rounding: str,
    lr: float,
    eta: float,
    weight_decay: float,
    beta1: float,
    beta2: float,
    eps: float,
    inertia: float,
    seed: int,
    stream: int,
    count: int,
    column: int,
    is_direction: bool,
) -> Tensor:
    """Kernel of ``hf_onebit::packed_step`` in plain PyTorch."""
    check_packed_step(
        words, gradient, exp_avg_l, exp_avg_l_peaks, exp_avg_s, exp_avg_s_peaks, scales, zeros, input_scales, group,
        perm, blocks, rounding,
    )  # fmt: skip
    layout = Operands(scales, zeros, input_scales, group, perm, tuple(blocks)).layout()
    tally = Tally()
    step = Step(
        moment_of(exp_avg_s, exp_avg_s_peaks, 1), moment_of(exp_avg_l, exp_avg_l_peaks, 0), None, lr, weight_decay,
        beta1, beta2, eps, torch.float32, False, None, count - 1,
        Rounding(rounding, seed & (1 << 64) - 1, stream, inertia), tally, eta,
    )  # fmt: skip
    levels = layout.levels()
    for part in _pieces((gradient.shape[0], gradient.shape[1])):
        _take_piece(words, layout, levels, part, gradient[:, part].float(), not is_direction, step, column)
    sums = [torch.as_tensor(getattr(tally, name), dtype=torch.float64, device=words.device) for name in _SUMS]
    return torch.stack(sums)


torch.library.impl("hf_onebit::packed_step", "default", packed_step)


def _largest_code(layout: Layout) -> int:
    """Of all rows; from the widths where the layout tells them, since the rows' own levels are on the device."""
    if isinstance(layout, SignLayout):
        return 1
    if isinstance(layout, WeightLayout):
        return (1 << max(bits for bits, _, _ in layout.blocks)) - 1
    return int(layout.levels().max())


def _projected_back(low: Tensor, shape: tuple[int, int], step: Step, flips: bool) -> Any:
    """Function of columns: the direction (of flips: the first moment) in the weight's own shape."""
    everything = slice(0, low.shape[1])
    stream = step.rounding.stream ^ _MOMENT_STREAM
    drawn = random_words((low.shape[0], low.shape[1]), step.rounding.seed, step.t, stream, device=low.device)
    if flips:
        direction = advance(step.exp_avg_l, everything, low, step.beta1, drawn)
    else:
        direction = step.direction(low, everything, drawn)
    by_columns = getattr(step.projector, "project_back_columns", None)
    if by_columns is not None:
        return lambda part: by_columns(direction, part)
    whole = step.projector.project_back(direction)
    if not isinstance(whole, Tensor) or tuple(whole.shape) != shape or not whole.is_floating_point():
        raise ValueError(f"the projector's project_back gave {shown(whole)}, expected the weight's (in, out) = {shape}")
    return lambda part: whole[:, part]


def _move(
    words: Tensor,
    layout: Layout,
    levels: Tensor,
    part: slice,
    piece: Tensor,
    is_gradient: bool,
    drawn: Tensor,
    step: Step,
) -> None:
    """Shrink the weight and step against the direction; ``words`` are written."""
    u = step.direction(piece, part, drawn) if is_gradient else piece
    u = u.mul(step.eta) if layout.perm is None else u.index_select(0, layout.perm).mul_(step.eta)
    codes = layout.unpack(words)
    scale, offset = layout.affine(part, u.dtype)
    if step.weight_decay:
        u.add_(codes.to(u.dtype).mul_(scale).sub_(offset).mul_(step.lr * step.weight_decay))
    d = u.neg_().div_(scale).masked_fill_(scale == 0, 0.0)
    if step.tally is not None:
        _note_step(step.tally, d)
    moved = move_codes(codes, d, levels, drawn if step.rounding.rounding == "stochastic" else None)
    _write(words, layout, levels, codes, moved, step.tally)


def _flip(
    words: Tensor,
    layout: Layout,
    levels: Tensor,
    part: slice,
    piece: Tensor,
    is_gradient: bool,
    drawn: Tensor,
    step: Step,
) -> None:
    """Double momentum with inertia; ``words`` are written. exp_avg_s is n, its rows in packed order."""
    m = advance(step.exp_avg_l, part, piece, step.beta1, drawn) if is_gradient else piece
    m = m.clone() if layout.perm is None else m.index_select(0, layout.perm)
    codes = layout.unpack(words)
    m.mul_(layout.affine(part, m.dtype)[0].sign())
    # A column's mean, so that pieces of any width agree.
    faded = root(mean_square(m)).mul_(step.eps)
    votes = (m / m.abs().add_(faded)).nan_to_num_(nan=0.0).mul_(step.lr)
    keep = step.beta2 * (1 - step.lr * step.weight_decay)
    if step.exp_avg_s is None:
        n = initial_inertia(codes, drawn, step.rounding.inertia, m.dtype).mul_(keep).add_(votes * (1 - step.beta2))
    else:
        # β n + (1 - β) value with value so that it comes out as keep · n + (1 - β₂) vote.
        value = votes.mul_((1 - step.beta2) / (1 - keep)) if keep < 1 else votes
        n = advance(step.exp_avg_s, part, value, keep, drawn)
    if step.tally is not None:
        step.tally.moved = step.tally.moved + m.mul_(1 - 2 * codes.to(m.dtype)).lt(0).sum()
    _write(words, layout, levels, codes, flip_signs(codes, n), step.tally)


def _note_step(tally: Tally, d: Tensor) -> None:
    size = d.abs()
    rest = size - size.floor()
    tally.moved = tally.moved + size.sum()
    tally.squared = tally.squared + size.square().sum()
    tally.noise = tally.noise + (rest * (1 - rest)).sum()


def _write(words: Tensor, layout: Layout, levels: Tensor, codes: Tensor, moved: Tensor, tally: Tally | None) -> None:
    if tally is not None:
        tally.weights += codes.numel()
        tally.changed = tally.changed + (codes != moved).sum()
        tally.saturated = tally.saturated + ((moved == 0) | (moved == levels)).sum()
    words.copy_(layout.pack(moved))


# Whether the kernels of a GPU do what this does there.
gpu_examination.EXAMINATIONS["update"] = lambda launch, device, **variant: gpu_update.examine(
    device, update_words, **variant
)
