"""The operators on GPUs: registers Triton kernels for CUDA and ROCm devices, and chooses among them in each call.

Nothing here imports triton or touches a device before the first tensor on one arrives. What a kernel computes is
compared with the reference when it is first used on a device; where they disagree, or Triton cannot compile it, the
reference answers from then on, and one warning says so. While a CUDA graph is captured nothing can be compared.

``HF_ONEBIT_TRITON=off`` leaves the reference in charge.
"""

import contextlib
import functools
import importlib.util
import os
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from hf_onebit.formats import mpq
from hf_onebit.formats.onebit import pack_signs
from hf_onebit.formats.packing import pack
from hf_onebit.ops import reference, reference_mpq, schema, schema_mpq

_VARIABLE = "HF_ONEBIT_TRITON"
_HALF = (torch.float16, torch.bfloat16)
_FAST = (*_HALF, torch.float32)
# |y - y64| may be this times Σ|w x|, besides the rounding of y, where W is not rounded or to 11 or 8 bits.
_TOLERANCES = {torch.float32: 3e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}

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
    found = sorted({f"{what} on {device}: {why}" for (device, what), why in _examined.items() if why})
    refused = f", except {'; '.join(found)}" if found else ""
    return f"in use for onebit and mpq layers on GPUs, compiled at first use{refused}"


@functools.cache
def _launch() -> ModuleType:
    from hf_onebit.ops import triton_launch

    return triton_launch


# --- onebit -------------------------------------------------------------------------------------------------


def onebit_linear(
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    weight_1: Tensor | None = None,
    a_1: Tensor | None = None,
    b_1: Tensor | None = None,
) -> Tensor:
    """Kernel of ``hf_onebit::onebit_linear``."""
    schema.check_onebit_linear(x, weight, a, b, bias, weight_1, a_1, b_1)
    if not _takes(x, weight) or not _agrees(x, "onebit", planes=1 if weight_1 is None else 2):
        return reference.onebit_linear(x, weight, a, b, bias, weight_1, a_1, b_1)
    with _on(x):
        return _linear(x, _launch().onebit_operand(weight, a, b, weight_1, a_1, b_1), bias)


def onebit_linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    weight_1: Tensor | None,
    a_1: Tensor | None,
    b_1: Tensor | None,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Kernel of ``hf_onebit::onebit_linear_backward``: expansion by Triton, products by torch, sums in float32.

    Both products have a float operand as large as the batch, so they are left to tensor cores' own library. The scale
    that a sum runs over is folded into the expanded signs, the other one is applied to the float32 sums.
    """
    schema.check_onebit_linear_backward(grad, x, weight, a, b, weight_1, a_1, b_1, needs)
    if not _takes(grad, weight) or not b.numel() or not _agrees(x, "onebit", planes=1 if weight_1 is None else 2):
        return reference.onebit_linear_backward(grad, x, weight, a, b, weight_1, a_1, b_1, needs)
    need_x, need_a, need_b, need_a_1, need_b_1 = needs
    with _on(x):
        g, K = reference.as_rows(grad), b.shape[0]
        grad_x = x.new_empty(0)
        grads = [x.new_empty(0) for _ in range(4)]
        if need_x and not (need_b or need_b_1):  # both scales and both planes in one matrix
            operand = _launch().onebit_operand(weight, a, b, weight_1, a_1, b_1)
            grad_x = (g @ _launch().expanded(operand, K, x.dtype).T).reshape(x.shape)
            need_x = False
        sum_x: Tensor | None = None
        planes = ((weight, a, b, need_a, need_b), (weight_1, a_1, b_1, need_a_1, need_b_1))
        for plane, (w, a_p, b_p, need_a_p, need_b_p) in enumerate(planes):
            if w is None or a_p is None or b_p is None or not (need_x or need_a_p or need_b_p):
                continue
            operand = _launch().onebit_operand(w, a_p, b_p, None, None, None)
            if need_a_p:
                z = _mm(reference.as_rows(x), _launch().expanded(operand, K, x.dtype, outer=False))
                grads[2 * plane] = (g.float() * z).sum(0).to(a_p.dtype)
            if need_x or need_b_p:
                d = _mm(g, _launch().expanded(operand, K, x.dtype, inner=False).T)
                if need_b_p:
                    grads[2 * plane + 1] = (d * reference.as_rows(x).float()).sum(0).to(b_p.dtype)
                if need_x:
                    d = d * b_p.float()
                    sum_x = d if sum_x is None else sum_x + d
        if sum_x is not None:
            grad_x = sum_x.to(x.dtype).reshape(x.shape)
    return grad_x, *grads


# --- mpq ----------------------------------------------------------------------------------------------------


def mpq_linear(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
) -> Tensor:
    """Kernel of ``hf_onebit::mpq_linear``."""
    schema_mpq.check_mpq_linear(x, weight, scales, zeros, bias, bits, group_size)
    if not _takes(x, weight) or not _agrees(x, "mpq", bits=bits, zeros=zeros is not None):
        return reference_mpq.mpq_linear(x, weight, scales, zeros, bias, bits, group_size)
    with _on(x):
        return _linear(x, _launch().mpq_operand(weight, scales, zeros, bits, group_size), bias)


def mpq_linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group_size: int,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Kernel of ``hf_onebit::mpq_linear_backward``: expansion by Triton, products and sums by torch."""
    schema_mpq.check_mpq_linear_backward(grad, x, weight, scales, zeros, bits, group_size, needs)
    if not _takes(grad, weight) or not x.shape[-1] or not _agrees(x, "mpq", bits=bits, zeros=zeros is not None):
        return reference_mpq.mpq_linear_backward(grad, x, weight, scales, zeros, bits, group_size, needs)
    need_x, need_scales, need_zeros = needs
    K = x.shape[-1]
    grad_x, grad_scales, grad_zeros = (x.new_empty(0) for _ in range(3))
    with _on(x):
        g = reference.as_rows(grad)
        if need_x:
            W = _launch().expanded(_launch().mpq_operand(weight, scales, zeros, bits, group_size), K, x.dtype)
            grad_x = (g @ W.T).reshape(x.shape)
        if need_scales or (need_zeros and zeros is not None):
            size = K if group_size == -1 else group_size
            groups = scales.shape[0]
            D = _mm(reference.as_rows(x).T, g)  # (in, out), as the codes lie
            D = torch.nn.functional.pad(D, (0, 0, 0, groups * size - K)).view(groups, size, -1)
            if need_zeros and zeros is not None:
                grad_zeros = (-D.sum(1)).to(zeros.dtype)
            if need_scales:
                q = _launch().codes(weight, K, bits)
                q = torch.nn.functional.pad(q, (0, 0, 0, groups * size - K)).view(groups, size, -1)
                middle = mpq.zero_point(bits) if zeros is None else 0.0
                grad_scales = (D * (q.float() - middle)).sum(1).to(scales.dtype)
    return grad_x, grad_scales, grad_zeros


def mpq_embedding(
    ids: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group_size: int,
    embedding_dim: int,
    dtype: torch.dtype,
) -> Tensor:
    """Kernel of ``hf_onebit::mpq_embedding``. As in torch, an id out of range is an assertion on the device."""
    schema_mpq.check_mpq_embedding(ids, weight, scales, zeros, bits, group_size, embedding_dim, dtype)
    usable = ids.numel() and embedding_dim and weight.shape[1] and dtype in _FAST
    if not usable or not _agrees(ids, "mpq", bits=bits, zeros=zeros is not None):
        return reference_mpq.mpq_embedding(ids, weight, scales, zeros, bits, group_size, embedding_dim, dtype)
    with _on(ids):
        flat = ids.flatten()
        torch._assert_async(((flat >= 0) & (flat < weight.shape[1])).all(), "mpq_embedding: an id is out of range")
        operand = _launch().mpq_operand(weight, scales, zeros, bits, group_size)
        rows: Tensor = _launch().embedding(flat, operand, embedding_dim, dtype)
    return rows.reshape(*ids.shape, embedding_dim)


def unpack(words: Tensor, bits: int, in_features: int) -> Tensor:
    """Kernel of ``hf_onebit::unpack``."""
    schema.check_unpack(words, bits, in_features)
    if words.dim() != 2 or not words.numel() or not _agrees(words, "mpq", bits=bits, zeros=False):
        return reference.unpack(words, bits, in_features)
    with _on(words):
        codes: Tensor = _launch().codes(words, in_features, bits).T.contiguous()
    return codes


# --- choice -------------------------------------------------------------------------------------------------


def _linear(x: Tensor, operand: Any, bias: Tensor | None) -> Tensor:
    launch = _launch()
    X = reference.as_rows(x)
    if X.stride(-1) != 1:
        X = X.contiguous()
    plan = launch.plan_for(X.shape[0], X.shape[1], operand, x.dtype, x.device)
    y: Tensor = launch.run(X, operand, bias, plan)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _mm(A: Tensor, B: Tensor) -> Tensor:
    """A B in float32, whatever the dtype of its operands."""
    if A.is_cuda and A.dtype in _HALF:
        return torch.mm(A, B, out_dtype=torch.float32)
    return A.float() @ B.float()


def _takes(x: Tensor, weight: Tensor) -> bool:
    """Whether there is a kernel for it: not for float64, nor for products of nothing."""
    return x.dtype in _FAST and x.numel() > 0 and weight.numel() > 0


def _on(x: Tensor) -> Any:
    """Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


# --- does it agree? -----------------------------------------------------------------------------------------


def _agrees(x: Tensor, kind: str, **variant: Any) -> bool:
    """Whether the kernels of this kind compute what the reference does on x's device; examined once."""
    what = " ".join([kind, *(f"{name}={value}" for name, value in variant.items())])
    key = (str(x.device), what)
    if key not in _examined:
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            return True
        with torch.no_grad():
            _examined[key] = _examine(x.device, kind, **variant)
        if _examined[key]:
            _warn(key)
    return not _examined[key]


def _warn(key: tuple[str, str]) -> None:
    global _warned  # noqa: PLW0603  (once a process)
    if _warned:
        return
    _warned = True
    device, what = key
    warnings.warn(
        f"hf_onebit runs packed layers on {device} in plain torch, slowly: the Triton kernel for {what} "
        f"{_examined[key]}. `hf-onebit doctor` tells the state of all kernels; {_VARIABLE}=off silences this",
        stacklevel=2,
    )


def _examine(device: torch.device, kind: str, **variant: Any) -> str:
    """One small layer of odd sizes by every way of computing it, beside float64; what is wrong, or an empty string."""
    K, N = 1100, 70
    random = torch.Generator().manual_seed(1)
    x = torch.randn(5, K, generator=random)
    try:
        launch = _launch()
        if kind == "onebit":
            tensors: list[Any] = []
            for _ in range(variant["planes"]):
                signs = torch.rand(N, K, generator=random) < 0.5
                a, b = (torch.rand(size, generator=random).half() + 0.5 for size in (N, K))
                tensors += [pack_signs(signs), a, b]
            tensors += [None] * (6 - len(tensors))
            on_device = [None if t is None else t.to(device) for t in tensors]
            operand = launch.onebit_operand(*on_device)

            def exact(X: Tensor) -> Tensor:
                weight, a, b, *second = tensors
                return reference.onebit_linear(X, weight, a, b, None, *second)

        else:
            bits, groups = variant["bits"], mpq.group_count(K, 64)
            codes = torch.randint(0, 1 << bits, (N, K), generator=random, dtype=torch.uint8)
            scales = (torch.rand(groups, N, generator=random) + 0.5).half() / (1 << bits)
            zeros = (scales.float() * mpq.zero_point(bits) * 0.9).half() if variant["zeros"] else None
            weight = pack(codes, bits)
            operand = launch.mpq_operand(
                weight.to(device), scales.to(device), None if zeros is None else zeros.to(device), bits, 64
            )

            def exact(X: Tensor) -> Tensor:
                return reference_mpq.mpq_linear(X, weight, scales, zeros, None, bits, 64)

        expected = exact(x.double())
        size = float(expected.abs().max())
        for dtype in _FAST:
            X = x.to(device, dtype)
            for plan in dict.fromkeys((launch.plan_for(5, K, operand, dtype, device), launch.EXPAND)):
                y = launch.run(X, operand, None, plan).cpu().double()
                error = float((y - exact(X.cpu().double())).abs().max()) / size
                if not error <= _TOLERANCES[dtype]:
                    return f"is off by {error:.1e} of the largest result in {dtype} with {plan}"
    except Exception as error:
        return f"fails ({type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''})"
    return ""


def register() -> str:
    """Register the kernels for the dispatch key of CUDA and ROCm; the reason why not, or an empty string."""
    reason = obstacle()
    if not reason:
        for kernel in _KERNELS:
            torch.library.impl(f"hf_onebit::{kernel.__name__}", "CUDA", kernel)
    return reason


_KERNELS: tuple[Callable[..., Any], ...] = (
    unpack,
    onebit_linear,
    onebit_linear_backward,
    mpq_linear,
    mpq_linear_backward,
    mpq_embedding,
)
register()
