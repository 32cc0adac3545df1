"""The step of nn/packed_update.py on a GPU: which steps have a kernel, and whether it does there what torch does.

Words, plain moments and codes come out as on the CPU, to the bit, for stochastic and nearest rounding. With inertia an
output's root mean square is added up in another order, so n differs in its last digits. Moments in eight bits and
projected gradients are computed by torch, for some columns at a time; only their direction goes to the kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hf_onebit.formats.packing import pack
from hf_onebit.formats.sign_layout import SignLayout
from hf_onebit.formats.weight_layout import WeightLayout
from hf_onebit.nn.update_step import Rounding, Step
from hf_onebit.ops import gpu

__all__ = ["WEIGHTS_AT_ONCE", "run", "takes"]

# Of a piece, where torch computes the direction: its float copies are this many numbers each.
WEIGHTS_AT_ONCE = 1 << 24
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def takes(words: Tensor, layout: Any, gradient: Tensor, step: Step) -> bool:
    """Whether there is a kernel for this step, and it computes what torch does on this device; examined once."""
    return gpu.serves(words) and suits(words, layout, gradient, step) and gpu.agrees(words, "update")


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


def examine(device: torch.device, update: Callable[[Tensor, Any, Tensor, Step], None]) -> str:
    """What is wrong with a step on a device beside that of ``update`` on the CPU; an empty string where nothing is."""
    for bits in (1, 2, 3, 4, 8):
        for rounding in ("stochastic", "inertia")[: 2 if bits == 1 else 1]:
            here, there = taken(bits, device, rounding), taken(bits, torch.device("cpu"), rounding, update)
            if not torch.equal(here[0].cpu(), there[0]):
                return f"gives other codes, of {bits} bits with rounding {rounding}"
            if not all(torch.allclose(a.cpu(), b, rtol=1e-5, atol=1e-7) for a, b in zip(here, there, strict=True)):
                return f"gives other moments, of {bits} bits with rounding {rounding}"
    return ""


def taken(
    bits: int,
    device: torch.device,
    rounding: str,
    update: Callable[[Tensor, Any, Tensor, Step], None] | None = None,
) -> list[Tensor]:
    """Words and moments after three steps of a small weight of odd sizes, by ``update``; without it by the kernels."""
    random = torch.Generator().manual_seed(bits)
    K, N = 75, 33
    words = pack(torch.randint(0, 1 << bits, (N, K), generator=random, dtype=torch.uint8), bits).to(device)
    scales, zeros = (torch.rand(3, N, generator=random).to(device) + 0.1 for _ in range(2))
    group = (torch.arange(K) // 32).to(device)
    layout = WeightLayout(K, ((bits, K, words.shape[0]),), group, None, scales, zeros, None, None)
    m, v = (torch.zeros(K, N, device=device) for _ in range(2))
    for count in range(3):
        gradient = torch.randn(K, N, generator=random).to(device)
        step = Step(v, m, None, 0.3, 0.1, 0.9, 0.99, 1e-6, torch.float32, True, None, count, Rounding(rounding, 7, 5))
        if update is None:
            run(words, layout, slice(0, N), gradient, False, step)
        else:
            update(words, layout, gradient, step)
    return [words, m, v]
