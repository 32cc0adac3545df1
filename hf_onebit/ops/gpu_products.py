"""Products on a GPU: the plan of each kind of call, chosen once and remembered, and the call itself.

``HF_ONEBIT_AUTOTUNE=0`` searches for no plans (gpu_tuning.py).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hf_onebit.ops import gpu, gpu_tuning, reference

# {what a call looks like: its plan, or None for the reference}: checks and choices are made once for a signature.
_plans: dict[tuple[Any, ...], Any] = {}
_MOST_PLANS = 4096
_UNKNOWN = object()


def signature(bits: int, group_size: int, *tensors: Tensor | None) -> tuple[Any, ...]:
    """What a call looks like: all that its plan depends on."""
    described = (None if t is None else (t.dtype, t.device, t.shape) for t in tensors)
    return (bits, group_size, gpu_tuning.bound(), *described)  # bound: what a search found is left alone


def plan(signature: tuple[Any, ...], x: Tensor, usable: Callable[[], bool], operand: Callable[[], Any]) -> Any:
    """The plan of a call; None where the reference shall answer.

    Args:
        signature: of the call.
        x: what is multiplied.
        usable: asked once for a signature: checks the arguments, and says whether the kernels are to be used.
        operand: the layer, as the launches take it.
    """
    chosen = _plans.get(signature, _UNKNOWN)
    if chosen is not _UNKNOWN:
        return chosen
    capturing, chosen = gpu.capturing(x), None
    if usable():
        K = x.shape[-1]
        with torch.no_grad(), gpu.on(x):
            search = x.is_cuda and not capturing
            chosen = gpu_tuning.plan(gpu.launch(), x.numel() // K, K, operand(), x.dtype, x.device, search)
    if capturing:  # it may not have been examined
        return chosen
    if len(_plans) >= _MOST_PLANS:
        _plans.clear()
    _plans[signature] = chosen
    return chosen


def linear(x: Tensor, operand: Any, bias: Tensor | None, plan: Any) -> Tensor:
    """x Wᵀ + bias in x's dtype, ``(..., out)``, by a plan that is not None."""
    X = x if x.dim() == 2 else reference.as_rows(x)
    y: Tensor = gpu.launch().run(X, operand, bias, plan)
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], y.shape[-1])


def mm(A: Tensor, B: Tensor) -> Tensor:
    """A B in float32, whatever the dtype of its operands."""
    if A.is_cuda and A.dtype in gpu.HALF:
        return torch.mm(A, B, out_dtype=torch.float32)
    return A.float() @ B.float()
