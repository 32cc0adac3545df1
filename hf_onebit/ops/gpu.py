"""The GPU's side of the operators: whether Triton kernels answer there, and whether they compute what they shall.

Nothing here imports triton or touches a device before the first tensor on one arrives. What a kernel computes is
compared with the reference when it is first used on a device; where they disagree, or Triton cannot compile it, the
reference answers from then on, and one warning says so. While a CUDA graph is captured nothing can be compared.

The kernels of each method are registered by ``gpu_onebit``, ``gpu_mpq``, ``gpu_mbwq`` and ``gpu_packing``.
``HF_ONEBIT_TRITON=off`` leaves the reference in charge.
"""

import contextlib
import functools
import importlib.util
import os
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from hf_onebit.ops import gpu_examination

HALF = (torch.float16, torch.bfloat16)
FAST = (*HALF, torch.float32)
_VARIABLE = "HF_ONEBIT_TRITON"

# {(device, what): why the kernel is not used, or an empty string}
_examined: dict[tuple[str, str], str] = {}
_warned = False


def obstacle() -> str:
    """Why the kernels are not registered; an empty string where they are."""
    if os.environ.get(_VARIABLE, "").strip().lower() == "off":
        return f"{_VARIABLE}=off"
    if torch.version.cuda is None and torch.version.hip is None:
        return "this torch is built for the CPU only"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; install it: pip install triton"
    return ""


def status() -> str:
    """Where this implementation answers, or why not."""
    reason = obstacle()
    if reason:
        return f"not in use: {reason}"
    if torch.cuda.device_count() == 0:
        return "not in use: there is no GPU"
    found = sorted({f"{what} on {device}: {why}" for (device, what), why in _examined.items() if why})
    refused = f", except {'; '.join(found)}" if found else ""
    return f"in use for onebit and mpq layers on GPUs, compiled at first use{refused}"


def register(*kernels: Callable[..., Any]) -> None:
    """Register functions under their names for the dispatch key of CUDA and ROCm, where nothing is in the way."""
    if obstacle():
        return
    for kernel in kernels:
        torch.library.impl(f"hf_onebit::{kernel.__name__}", "CUDA", kernel)


@functools.cache
def launch() -> ModuleType:
    """What launches the kernels; triton is imported with the first call."""
    from hf_onebit.ops import triton_launch

    return triton_launch


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether there is a kernel for it: not for float64, nor for products of nothing."""
    return x.dtype in FAST and x.numel() > 0 and weight.numel() > 0


def serves(x: Tensor) -> bool:
    """Whether a tensor is where kernels are, and not empty."""
    return x.is_cuda and x.numel() > 0 and not obstacle()


def capturing(x: Tensor) -> bool:
    """Whether a CUDA graph is being captured: nothing may wait for the device then."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def on(x: Tensor) -> Any:
    """A context for launches: Triton launches on the current device, and autocast would change products' dtypes."""
    elsewhere = x.is_cuda and x.get_device() != torch.cuda.current_device()
    if torch.is_autocast_enabled(x.device.type):
        stack = contextlib.ExitStack()
        stack.enter_context(torch.autocast(x.device.type, enabled=False))
        if elsewhere:
            stack.enter_context(torch.cuda.device(x.device))
        return stack
    return torch.cuda.device(x.device) if elsewhere else contextlib.nullcontext()


def agrees(x: Tensor, kind: str, **variant: Any) -> bool:
    """Whether the kernels of this kind compute what the reference does on x's device; examined once."""
    key = _key(x.device, kind, variant)
    if key not in _examined:
        if capturing(x):
            return True
        if examine(x.device, kind, **variant):
            _warn(key)
    return not _examined[key]


def examine(device: torch.device, kind: str, **variant: Any) -> str:
    """What is wrong with the kernels of one kind on a device, an empty string where nothing is; the next calls know.

    Args:
        device: with its number, as tensors have it.
        kind: of ``gpu_examination.EXAMINATIONS``.
        variant: what that examination takes, as in ``gpu_variants.variants``.

    Raises:
        torch.OutOfMemoryError, RuntimeError: the device has no memory left. That says nothing of the kernels, so the
            next call examines them.
    """
    key = _key(device, kind, variant)
    if key not in _examined:
        try:
            # The process may have another default device, and draws random numbers of its own.
            with torch.no_grad(), torch.device("cpu"), torch.random.fork_rng([]), on(torch.empty(0, device=device)):
                _examined[key] = gpu_examination.EXAMINATIONS[kind](launch(), device, **variant)
        except Exception as error:  # whatever a compiler or a driver raises, the reference still answers
            text = str(error).strip()
            if isinstance(error, torch.OutOfMemoryError) or "out of memory" in text:
                raise
            _examined[key] = f"fails ({type(error).__name__}: {text.splitlines()[0] if text else 'no message'})"
    return _examined[key]


def examined() -> dict[tuple[str, str], str]:
    """{(device, kind and variant): what is wrong, or an empty string} of all kernels that were examined."""
    return dict(_examined)


def _key(device: torch.device, kind: str, variant: dict[str, Any]) -> tuple[str, str]:
    return (str(device), " ".join([kind, *(f"{name}={value}" for name, value in variant.items())]))


def _warn(key: tuple[str, str]) -> None:
    global _warned  # noqa: PLW0603  (once a process)
    if _warned:
        return
    _warned = True
    device, what = key
    warnings.warn(
        f"hf_onebit runs packed layers on {device} in plain torch, slowly: the Triton kernel for {what} "
        f"{_examined[key]}. `hf-onebit doctor --all-kernels` examines every kernel; {_VARIABLE}=off silences this",
        stacklevel=2,
    )
