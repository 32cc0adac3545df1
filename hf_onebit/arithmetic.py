"""In which dtype large products are fast here, and how to do without those that are not."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

# {device type: whether its products in bfloat16 are faster than in float32}; of other devices it is taken to be so.
_HAS_FAST_BFLOAT16 = {
    # Without AVX-512 torch has no such product and computes it number by number.
    "cpu": lambda: torch.backends.cpu.get_cpu_capability().startswith("AVX512"),
    "cuda": lambda: torch.cuda.is_bf16_supported(including_emulation=False),
}
# Where bfloat16 is slow: {device type: the dtypes whose products are}. GPUs have fast ones in float16.
_SLOW = {"cpu": (torch.bfloat16, torch.float16), "cuda": (torch.bfloat16,)}
_PRODUCTS: frozenset[Callable[..., Any]] = frozenset(
    {
        *(functional.linear, torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.baddbmm),
        *(Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm, Tensor.addmm, Tensor.baddbmm),
    }
)


def product_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where it is fast, else float32."""
    return torch.bfloat16 if _is_fast(device) else torch.float32


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What products of a float model are cast to: bfloat16 where it is fast, else None: they stay as they are."""
    return torch.bfloat16 if _is_fast(device) else None


def without_slow_products(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """A context in which a model in a dtype that is slow on this device multiplies in float32.

    Results have the dtype that they would have had, rounded once: they are those of the slow product up to the order of
    its sums. Products in float32 and float64 are left alone, and everything is where bfloat16 is fast.
    """
    return contextlib.nullcontext() if _is_fast(device) else _Float32Products(_SLOW.get(device.type, ()))


class _Float32Products(TorchFunctionMode):
    """Products of matrices of some dtypes are computed in float32."""

    def __init__(self, slow: Iterable[torch.dtype]) -> None:
        super().__init__()
        self._slow = frozenset(slow)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _PRODUCTS or "out" in kwargs:
            return func(*args, **kwargs)
        dtypes = {value.dtype for value in (*args, *kwargs.values()) if isinstance(value, Tensor)}
        if len(dtypes) != 1 or not dtypes <= self._slow:  # of different ones torch itself says what is wrong
            return func(*args, **kwargs)
        (dtype,) = dtypes
        wide = [value.float() if isinstance(value, Tensor) else value for value in args]
        named = {name: value.float() if isinstance(value, Tensor) else value for name, value in kwargs.items()}
        return func(*wide, **named).to(dtype)


def _is_fast(device: torch.device) -> bool:
    return _HAS_FAST_BFLOAT16.get(device.type, lambda: True)()
