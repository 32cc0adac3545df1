"""Launches the kernels of triton_update.py on the pieces of a packed weight. Imported with the first step on a GPU."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_onebit.formats import mpq
from hf_onebit.formats.sign_layout import SignLayout
from hf_onebit.formats.weight_layout import WeightLayout
from hf_onebit.ops import triton_update as kernels
from hf_onebit.ops.gpu_plans import ceil

_BLOCK = 128
_WARPS = 4
# No multiplication is fused with an addition: codes are those of the CPU.
_OPTIONS: dict[str, Any] = {"num_warps": _WARPS, "enable_fp_fusion": False}


class Numbers(NamedTuple):
    """The numbers of one step, by the names of algorithms/update.py; ``decay`` is η λ."""

    beta1: float
    beta2: float
    eps: float
    lr: float
    eta: float
    decay: float
    inertia: float
    stochastic: bool
    seed: int
    stream: int
    t: int


def move(
    words: Tensor,
    layout: WeightLayout | SignLayout,
    columns: slice,
    values: Tensor,
    first: Tensor | None,
    second: Tensor | None,
    is_direction: bool,
    numbers: Numbers,
    tally: bool,
) -> Tensor | None:
    """One step of some columns of a weight; words and moments are written.

    Args:
        words: int32 ``(words, columns)``, neighbours in the last dimension.
        layout: of the whole weight.
        columns: which of its columns, with a start and a stop.
        values: ``(in, columns)`` float: the gradient, or the direction u.
        first, second: moments ``(in, columns)`` of a gradient, or None.
        is_direction: what ``values`` are.
        numbers: of the step.
        tally: whether to sum up what happened.

    Returns:
        float64 (5,) of ``nn.packed_update.Tally``: changed, at an end, moved, squared, noise; or None.
    """
    about, N = _about(layout, columns), words.shape[1]
    blocks = layout.blocks if isinstance(layout, WeightLayout) else ((1, layout.in_features, words.shape[0]),)
    sums: list[Tensor] = []
    at_row = at_word = 0
    for bits, rows, held in blocks:
        grid = (ceil(N, _BLOCK), ceil(rows, 32))
        part = words[at_word : at_word + held]
        sums.append(torch.empty((grid[0] * grid[1] if tally else 1, 5), dtype=torch.float32, device=words.device))
        kernels.move[grid](
            part, values, values if first is None else first, values if second is None else second, about.perm,
            about.group, about.scales, about.zeros, about.inner, sums[-1], N, rows, held, at_row, columns.start,
            words.stride(0), values.stride(0), 0 if first is None else first.stride(0),
            0 if second is None else second.stride(0), about.scales.stride(0), *_key(numbers), numbers.beta1,
            1 - numbers.beta1, numbers.beta2, 1 - numbers.beta2, numbers.eps, numbers.eta, numbers.decay,
            mpq.zero_point(bits), BITS=bits, DIRECTION=is_direction, FIRST=first is not None,
            SECOND=second is not None, PERM=layout.perm is not None, SIGNS=isinstance(layout, SignLayout),
            ZEROS=about.kind, DECAY=numbers.decay != 0, STOCHASTIC=numbers.stochastic, ALIGNED=at_row % 4 == 0,
            TALLY=tally, BLOCK=_BLOCK, **_OPTIONS,
        )  # fmt: skip
        at_row, at_word = at_row + rows, at_word + held
    return torch.cat(sums).double().sum(0) if tally else None


def flip(
    words: Tensor,
    layout: WeightLayout | SignLayout,
    columns: slice,
    values: Tensor,
    first: Tensor | None,
    inertia: Tensor | None,
    is_direction: bool,
    numbers: Numbers,
    tally: bool,
) -> Tensor | None:
    """Double momentum with inertia for some columns of one-bit codes; as :func:`move`.

    Args:
        words, layout, columns, numbers, tally: as for ``move``.
        values: ``(in, columns)`` float: the gradient, or the first moment.
        first: first moment, or None.
        inertia: n, ``(in, columns)`` in packed order, or None.
        is_direction: whether ``values`` are the first moment.

    Returns:
        As for ``move``; "moved" counts votes against the sign.
    """
    about, N, K = _about(layout, columns), words.shape[1], layout.in_features
    grid = (ceil(N, _BLOCK), ceil(K, 32))
    squares = torch.empty((grid[1], N), dtype=torch.float32, device=words.device)
    sums = torch.empty((grid[0] * grid[1] if tally else 1, 5), dtype=torch.float32, device=words.device)
    state = values if first is None else first
    common: dict[str, Any] = {"DIRECTION": is_direction, "FIRST": first is not None, "PERM": layout.perm is not None}
    common |= {"SIGNS": isinstance(layout, SignLayout), "BLOCK": _BLOCK}
    kernels.begin_flips[grid](
        values, state, about.perm, about.group, about.scales, about.inner, squares, N, K, values.stride(0),
        state.stride(0), about.scales.stride(0), numbers.beta1, 1 - numbers.beta1, **common, **_OPTIONS,
    )  # fmt: skip
    root = squares.sum(0).div_(K).double().sqrt_().float()
    keep = numbers.beta2 * (1 - numbers.decay)
    share = (1 - numbers.beta2) / (1 - keep) if keep < 1 else 1.0
    kernels.flip[grid](
        words, values, state, values if inertia is None else inertia, about.perm, about.group, about.scales,
        about.inner, root, sums, N, K, columns.start, words.stride(0), values.stride(0), state.stride(0),
        0 if inertia is None else inertia.stride(0), about.scales.stride(0), *_key(numbers), 1 - numbers.beta1, keep,
        1 - keep, 1 - numbers.beta2, share, numbers.eps, numbers.lr, numbers.inertia,
        INERTIA=inertia is not None, TALLY=tally, **common, **_OPTIONS,
    )  # fmt: skip
    return sums.double().sum(0) if tally else None


class _About(NamedTuple):
    """What a layout says of some columns; where it says nothing, any tensor that is not read."""

    scales: Tensor  # or a
    zeros: Tensor
    kind: int  # of the zeros, by the name ZEROS of the kernel
    inner: Tensor  # b
    group: Tensor
    perm: Tensor


def _about(layout: WeightLayout | SignLayout, columns: slice) -> _About:
    if isinstance(layout, SignLayout):
        a = layout.a[columns].contiguous()
        return _About(a, a, 0, layout.b.contiguous(), a, a)
    scales = _rows(layout.scales, columns)
    perm = layout.group if layout.perm is None else layout.perm
    if layout.zeros is not None:
        return _About(scales, _rows(layout.zeros, columns, scales), 1, scales, layout.group, perm)
    if layout.zero_points is not None:
        return _About(scales, _rows(layout.zero_points, columns, scales), 2, scales, layout.group, perm)
    return _About(scales, scales, 0, scales, layout.group, perm)


def _rows(tensor: Tensor, columns: slice, like: Tensor | None = None) -> Tensor:
    """Some columns, neighbours in the last dimension, its rows as far apart as those of ``like``."""
    part = tensor[:, columns]
    if part.stride(1) == 1 and (like is None or part.stride(0) == like.stride(0)):
        return part
    if like is None:
        return part.contiguous()
    fresh = torch.empty_strided(part.shape, like.stride(), dtype=part.dtype, device=part.device)
    return fresh.copy_(part)


def _key(numbers: Numbers) -> tuple[int, int, int, int]:
    """Seed, its upper half, step and stream as int32 of the same bits."""
    words = (numbers.seed, numbers.seed >> 32, numbers.t, numbers.stream)
    low, high, step, stream = (((w & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000 for w in words)
    return low, high, step, stream
