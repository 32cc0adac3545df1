"""Adam on floating parameters: small ones together, large ones piece by piece with small states.

Parameters in half precision are rounded stochastically, with the high bits of words of ``algorithms.counter_random``:
to the nearest, a bfloat16 weight ignores steps of less than a 256th of itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_onebit.algorithms.counter_random import random_words
from hf_onebit.algorithms.moments import BLOCK
from hf_onebit.nn.update_step import Step, advance

__all__ = ["round_half", "step_large", "step_small"]

# float32 mantissa bits that the type does not have.
_DROPPED = {torch.bfloat16: 16, torch.float16: 13}
# Weights of one piece: all that a step makes of them fits into a core's cache.
_TILE = 1 << 16


def round_half(values: Tensor, dtype: torch.dtype, words: Tensor) -> Tensor:
    """float32 values in bfloat16 or float16, each at one of its two neighbours so that the mean is the value.

    Below float16's normal range it is the nearest, as ever.
    """
    dropped = _DROPPED[dtype]
    bits = values.view(torch.int32)
    # The words' high bits: moments in eight bits take the low ones.
    rounded = bits.add((words >> 32 - dropped).to(torch.int32)).bitwise_and_(-(1 << dropped)).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).to(dtype)


def step_small(
    parameters: list[Tensor], grads: list[Tensor], states: list[tuple[Tensor, Tensor]], steps: list[Step]
) -> None:
    """One step on parameters of any shapes, as batches of operations.

    Args:
        parameters: float, changed in place.
        grads: as parameters.
        states: (first, second moment) float32 of each, changed in place.
        steps: what to do with each; decay rates, ε and weight decay are those of the first.
    """
    about = steps[0]
    g = [grad.to(torch.float32) for grad in grads]
    m, v = ([pair[i] for pair in states] for i in (0, 1))
    torch._foreach_lerp_(m, g, 1 - about.beta1)
    torch._foreach_mul_(v, about.beta2)
    torch._foreach_addcmul_(v, g, g, 1 - about.beta2)
    size = torch._foreach_sqrt(v)
    torch._foreach_add_(size, about.eps)
    W = [parameter if parameter.dtype == torch.float32 else parameter.to(torch.float32) for parameter in parameters]
    torch._foreach_mul_(W, 1 - about.lr * about.weight_decay)
    torch._foreach_addcdiv_(W, m, size, [-step.eta for step in steps])
    for parameter, moved, step in zip(parameters, W, steps, strict=True):
        if parameter.dtype in _DROPPED:
            words = random_words((4, -(-moved.numel() // 4)), *_where(step), device=moved.device)
            parameter.copy_(round_half(moved, parameter.dtype, words.view(-1)[: moved.numel()].view(moved.shape)))
        elif parameter is not moved:
            parameter.copy_(moved)


def step_large(parameter: Tensor, grad: Tensor, step: Step) -> None:
    """One step on a matrix whose moments ``step`` holds, a piece of rows at a time: neighbours in memory."""
    shape = (parameter.shape[0], parameter.shape[1])
    second, first = step.exp_avg_s, step.exp_avg_l
    for state, square, beta in ((second, True, step.beta2), (first, False, step.beta1)):
        state.begin(grad, square, beta)
    height = max(BLOCK, _TILE // shape[1] // BLOCK * BLOCK)
    for top in range(0, shape[0], height):
        part = slice(top, min(top + height, shape[0]))
        words = random_words(shape, *_where(step), rows=part, device=parameter.device)
        g = grad[part].to(torch.float32)
        v = advance(second.rows(part), slice(None), g.square(), step.beta2, words)
        m = advance(first.rows(part), slice(None), g, step.beta1, words)
        W = parameter[part].to(torch.float32) * (1 - step.lr * step.weight_decay)
        W.addcdiv_(m, v.sqrt_().add_(step.eps), value=-step.eta)
        half = parameter.dtype in _DROPPED
        parameter[part] = round_half(W, parameter.dtype, words) if half else W.to(parameter.dtype)


def _where(step: Step) -> tuple[int, int, int]:
    return step.rounding.seed, step.t, step.rounding.stream
