"""The step of nn/packed_update.py on a GPU: which steps have a kernel, and whether it does there what torch does.

Words, plain moments and codes come out as on the CPU, to the bit, for stochastic and nearest rounding. With inertia an
output's root mean square is added up in another order, so n differs in its last digits. Moments in eight bits and
projected gradients are computed by torch, for some columns at a time; only their direction goes to the kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_onebit.formats.mpq import zero_point
from hf_onebit.formats.packing import pack
from hf_onebit.formats.sign_layout import SignLayout
from hf_onebit.formats.weight_layout import WeightLayout
from hf_onebit.nn.update_step import Rounding, Step, Tally
from hf_onebit.ops import gpu
from hf_onebit.ops.gpu_plans import ceil

__all__ = ["WEIGHTS_AT_ONCE", "run", "takes"]

# Of a piece, where torch computes the direction: its float copies are this many numbers each.
WEIGHTS_AT_ONCE = 1 << 24
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
Update = Callable[[Tensor, Any, Tensor, Step], None]


def takes(words: Tensor, layout: Any, gradient: Tensor, step: Step) -> bool:
    """Whether there is a kernel for this step, and it computes what torch does on this device; examined once."""
    if not gpu.serves(words) or not suits(words, layout, gradient, step):
        return False
    signs = isinstance(layout, SignLayout)
    widths = {1} if signs else {bits for bits, _, _ in layout.blocks}
    rounding = step.rounding.rounding
    return all(gpu.agrees(words, "update", bits=bits, signs=signs, rounding=rounding) for bits in sorted(widths))


def suits(words: Tensor, layout: Any, gradient: Tensor, step: Step) -> bool:
    """Whether there is a kernel for this step: layouts of this package, no float64, n and moments on the device."""
    if not isinstance(layout, (WeightLayout, SignLayout)) or words.stride(-1) != 1:
        return False
    if step.dtype == torch.float64 or gradient.dtype not in _DTYPES or gradient.device != words.device:
        return False
    if step.rounding.rounding == "inertia" and not (step.exp_avg_s is None or isinstance(step.exp_avg_s, Tensor)):
        return False
    states = [s for s in (step.exp_avg_s, step.exp_avg_l) if isinstance(s, Tensor)]
    return all(s.dtype in _DTYPES and s.device == words.device and s.stride(-1) == 1 for s in states)


def run(words: Tensor, layout: Any, part: slice, values: Tensor, is_direction: bool, step: Step) -> None:
    """Take the step for columns ``part``; ``words`` are theirs, and ``values`` the gradient, direction or moment."""
    from hf_onebit.ops import triton_update_launch as launch

    flips = step.rounding.rounding == "inertia"
    first = None if is_direction or step.exp_avg_l is None else step.exp_avg_l[:, part]
    second = None if step.exp_avg_s is None or (is_direction and not flips) else step.exp_avg_s[:, part]
    values = values if values.stride(-1) == 1 else values.contiguous()
    about = step.rounding
    numbers = launch.Numbers(
        step.beta1, step.beta2, step.eps, step.lr, step.eta, step.lr * step.weight_decay, about.inertia,
        about.rounding == "stochastic", about.seed, about.stream, step.t,
    )  # fmt: skip
    with gpu.on(words):
        take = launch.flip if flips else launch.move
        sums = take(words, layout, part, values, first, second, is_direction, numbers, step.tally is not None)
    if step.tally is not None and sums is not None:
        tally = step.tally
        tally.weights += layout.in_features * words.shape[1]
        tally.changed, tally.saturated = tally.changed + sums[0], tally.saturated + sums[1]
        tally.moved, tally.squared, tally.noise = tally.moved + sums[2], tally.squared + sums[3], tally.noise + sums[4]


def examine(device: torch.device, update: Update, bits: int, signs: bool, rounding: str) -> str:
    """What is wrong with a step on a device beside that of ``update`` on the CPU; an empty string where nothing is."""
    about = f"of {bits} bits{', signs,' if signs else ''} with rounding {rounding}"
    for case in _CASES:
        here, there = (taken(case, bits, signs, rounding, at) for at in ((device, None), (torch.device("cpu"), update)))
        if not torch.equal(here[0].cpu(), there[0]):
            return f"gives other codes, {about}"
        if not all(torch.allclose(a.cpu(), b, rtol=1e-5, atol=1e-7) for a, b in zip(here, there, strict=True)):
            return f"gives other moments or sums, {about}"
    return ""


class Case(NamedTuple):
    """A weight to step: what Triton compiles other code for, or the kernels have another way for."""

    in_features: int
    out_features: int
    moments: torch.dtype
    zeros: bool
    ordered: bool  # inputs are in their own order
    counted: bool  # sums are wanted


_CASES = (Case(75, 33, torch.float32, True, True, False), Case(128, 64, torch.float16, False, False, True))


def taken(
    case: Case, bits: int, signs: bool, rounding: str, at: tuple[torch.device, Update | None]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Words, both moments and sums after three steps of a small weight, on a device by an update or by the kernels."""
    device, update = at
    random = torch.Generator().manual_seed(bits)
    K, N = case.in_features, case.out_features
    words = pack(torch.randint(0, 1 << bits, (N, K), generator=random, dtype=torch.uint8), bits).to(device)
    layout = _random_layout(case, bits, signs, words.shape[0], random, device)
    m, v = (torch.zeros(K, N, dtype=case.moments, device=device) for _ in range(2))
    tally = Tally() if case.counted else None
    for count in range(3):
        gradient = torch.randn(K, N, generator=random).to(device)
        about = Rounding(rounding, 7, 5)
        step = Step(v, m, None, 0.3, 0.1, 0.9, 0.99, 1e-6, torch.float32, True, None, count, about, tally)
        if update is None:
            run(words, layout, slice(0, N), gradient, False, step)
        else:
            update(words, layout, gradient, step)
    sums = () if tally is None else (tally.changed, tally.saturated, tally.moved, tally.squared, tally.noise)
    return words, m.float(), v.float(), torch.tensor([float(number) for number in sums])


def _random_layout(
    case: Case, bits: int, signs: bool, held: int, random: torch.Generator, device: torch.device
) -> WeightLayout | SignLayout:
    K, N = case.in_features, case.out_features
    if signs:
        a, b = (torch.rand(size, generator=random).half() + 0.1 for size in (N, K))
        return SignLayout(K, a.to(device), b.to(device))
    scales, zeros = ((torch.rand(ceil(K, 32), N, generator=random) + 0.1).to(device) for _ in range(2))
    group, order = torch.arange(K) // 32, None
    if not case.ordered:
        order = torch.randperm(K, generator=random)
        group = group[order]
    middle = torch.full((K, 1), zero_point(bits), device=device)
    return WeightLayout(
        K, ((bits, K, held),), group.to(device), None if order is None else order.to(device), scales,
        zeros if case.zeros else None, None, None if case.zeros else middle,
    )  # fmt: skip
