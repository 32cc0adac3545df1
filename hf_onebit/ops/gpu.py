"""The operators on GPUs: registers Triton kernels for CUDA and ROCm devices, and chooses among them in each call.

Nothing here imports triton or touches a device before the first tensor on one arrives. What a kernel computes is
compared with the reference when it is first used on a device; where they disagree, or Triton cannot compile it, the
reference answers from then on, and one warning says so. While a CUDA graph is captured nothing can be compared.

``HF_ONEBIT_TRITON=off`` leaves the reference in charge; ``HF_ONEBIT_AUTOTUNE=0`` searches for no plans (gpu_tuning.py).
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

from hf_onebit.formats import mpq, packing
from hf_onebit.ops import (
    gpu_examination,
    gpu_tuning,
    reference,
    reference_mbwq,
    reference_mpq,
    schema,
    schema_mbwq,
    schema_mpq,
)

_VARIABLE = "HF_ONEBIT_TRITON"
_HALF = (torch.float16, torch.bfloat16)
_FAST = (*_HALF, torch.float32)


# {what a call looks like: its plan, or None for the reference}: checks and choices are made once for a signature.
_plans: dict[tuple[Any, ...], Any] = {}
_MOST_PLANS = 4096
_UNKNOWN = object()
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
    key = _signature(0, 0, x, weight, a, b, bias, weight_1, a_1, b_1)
    plan = _plans.get(key, _UNKNOWN)
    if plan is _UNKNOWN:
        schema.check_onebit_linear(x, weight, a, b, bias, weight_1, a_1, b_1)
        usable = _takes(x, weight) and agrees(x, "onebit", dtype=x.dtype, planes=1 if weight_1 is None else 2)
        operand = _launch().onebit_operand(weight, a, b, weight_1, a_1, b_1) if usable else None
        plan = _choose(key, x, operand)
    if plan is None:
        return reference.onebit_linear(x, weight, a, b, bias, weight_1, a_1, b_1)
    with on(x):
        return _linear(x, _launch().onebit_operand(weight, a, b, weight_1, a_1, b_1), bias, plan)


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
    if (
        not _takes(grad, weight)
        or not b.numel()
        or not agrees(x, "onebit", dtype=x.dtype, planes=1 if weight_1 is None else 2)
    ):
        return reference.onebit_linear_backward(grad, x, weight, a, b, weight_1, a_1, b_1, needs)
    need_x, need_a, need_b, need_a_1, need_b_1 = needs
    with on(x):
        g, K = reference.as_rows(grad), b.shape[0]
        grad_x = x.new_empty(0)
        grads = [x.new_empty(0) for _ in range(4)]
        if need_x and not (need_b or need_b_1):  # both scales and both planes in one matrix
            operand = _launch().onebit_operand(weight, a, b, weight_1, a_1, b_1)
            grad_x = (g @ _launch().expanded(operand, K, x.dtype).T).reshape(x.shape)
            need_x = False
        sum_x: Tensor | None = None
        each = ((weight, a, b, need_a, need_b), (weight_1, a_1, b_1, need_a_1, need_b_1))
        for plane, (w, a_p, b_p, need_a_p, need_b_p) in enumerate(each):
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
    plan = _plan_of_codes(x, weight, scales, zeros, bias, bits, group_size)
    if plan is None:
        return reference_mpq.mpq_linear(x, weight, scales, zeros, bias, bits, group_size)
    with on(x):
        return _linear(x, _launch().mpq_operand(weight, scales, zeros, bits, group_size), bias, plan)


def _plan_of_codes(
    x: Tensor, weight: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, bits: int, group_size: int
) -> Any:
    """The plan of a product with group-quantized codes; None where the reference shall answer."""
    key = _signature(bits, group_size, x, weight, scales, zeros, bias)
    plan = _plans.get(key, _UNKNOWN)
    if plan is _UNKNOWN:
        schema_mpq.check_mpq_linear(x, weight, scales, zeros, bias, bits, group_size)
        usable = _takes(x, weight) and agrees(x, "mpq", dtype=x.dtype, bits=bits, zeros=zeros is not None)
        operand = _launch().mpq_operand(weight, scales, zeros, bits, group_size) if usable else None
        plan = _choose(key, x, operand)
    return plan


def mbwq_linear(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    q_perm: Tensor | None,
    blocks: Sequence[int],
) -> Tensor:
    """Kernel of ``hf_onebit::mbwq_linear``: a product for each row block, of x as it is, added up in float32."""
    triples = schema_mbwq.check_mbwq_linear(x, weight, scales, zeros, bias, q_perm, blocks)
    if not _takes(x, weight):
        return reference_mbwq.mbwq_linear(x, weight, scales, zeros, bias, q_perm, blocks)
    with on(x):
        rows = reference.as_rows(x)
        if q_perm is not None:
            rows = rows.index_select(1, q_perm)
        parts = list(reference_mbwq.row_blocks(rows, weight, scales, zeros, triples))
        plans = [_plan_of_codes(part, w, s, z, None, bits, size) for part, w, s, z, (bits, _, size) in parts]
        if any(plan is None for plan in plans):
            return reference_mbwq.mbwq_linear(x, weight, scales, zeros, bias, q_perm, blocks)
        total = None if bias is None else bias.float()
        for (part, w, s, z, (bits, _, size)), plan in zip(parts, plans, strict=True):
            operand = _launch().mpq_operand(w, s, z, bits, size)
            X = part if part.stride(-1) == 1 else part.contiguous()
            if plan.splits:
                y = _launch().product(X, operand, None, plan, torch.float32)
            else:
                y = _mm(X, _launch().expanded(operand, X.shape[1], X.dtype))
            total = y if total is None else total + y
    assert total is not None
    return total.to(x.dtype).reshape(*x.shape[:-1], weight.shape[1])


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
    if (
        not _takes(grad, weight)
        or not x.shape[-1]
        or not agrees(x, "mpq", dtype=x.dtype, bits=bits, zeros=zeros is not None)
    ):
        return reference_mpq.mpq_linear_backward(grad, x, weight, scales, zeros, bits, group_size, needs)
    need_x, need_scales, need_zeros = needs
    K = x.shape[-1]
    grad_x, grad_scales, grad_zeros = (x.new_empty(0) for _ in range(3))
    with on(x):
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


def mpq_linear_g_idx(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    g_idx: Tensor,
    bits: int,
) -> Tensor:
    """Kernel of ``hf_onebit::mpq_linear_g_idx``: by tensor cores for few rows, else expanded first."""
    schema_mbwq.check_mpq_linear_g_idx(x, weight, scales, zeros, bias, g_idx, bits)
    if not _takes(x, weight) or not agrees(x, "g_idx", dtype=x.dtype, bits=bits, zeros=zeros is not None):
        return reference_mbwq.mpq_linear_g_idx(x, weight, scales, zeros, bias, g_idx, bits)
    with on(x):
        operand = _launch().mpq_operand(weight, scales, zeros, bits, -1)
        y: Tensor = _launch().run_by_index(reference.as_rows(x), operand, g_idx, bias)
    return y.reshape(*x.shape[:-1], weight.shape[1])


def mpq_linear_g_idx_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    g_idx: Tensor,
    bits: int,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Kernel of ``hf_onebit::mpq_linear_g_idx_backward``: the gradient of x. The reference has those of the scales."""
    schema_mbwq.check_mpq_linear_g_idx(x, weight, scales, zeros, None, g_idx, bits)
    schema_mbwq.check_grad("mpq_linear_g_idx_backward", grad, x, weight, zeros, needs)
    if (
        any(needs[1:])
        or not _takes(grad, weight)
        or not x.numel()
        or not agrees(x, "g_idx", dtype=x.dtype, bits=bits, zeros=zeros is not None)
    ):
        return reference_mbwq.mpq_linear_g_idx_backward(grad, x, weight, scales, zeros, g_idx, bits, needs)
    with on(x):
        operand = _launch().mpq_operand(weight, scales, zeros, bits, -1)
        matrix = _launch().expanded_by_index(operand, g_idx, x.dtype)
        grad_x = (reference.as_rows(grad) @ matrix.T).reshape(x.shape) if needs[0] else x.new_empty(0)
    return grad_x, x.new_empty(0), x.new_empty(0)


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
    if not usable or not agrees(ids, "embedding", dtype=dtype, bits=bits, zeros=zeros is not None):
        return reference_mpq.mpq_embedding(ids, weight, scales, zeros, bits, group_size, embedding_dim, dtype)
    with on(ids):
        flat = ids.flatten().contiguous()  # a column of ids is flat already, and not side by side
        schema_mpq.check_ids(flat, weight.shape[1])
        operand = _launch().mpq_operand(weight, scales, zeros, bits, group_size)
        rows: Tensor = _launch().embedding(flat, operand, embedding_dim, dtype)
    return rows.reshape(*ids.shape, embedding_dim)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Kernel of ``hf_onebit::pack``; that the codes lie within their bits is asked of the device, and waited for."""
    schema.check_pack(codes, bits)
    if codes.dim() != 2 or not codes.numel() or not agrees(codes, "codes", bits=bits):
        return reference.pack(codes, bits)
    packing.check_codes(codes, bits)
    with on(codes):
        words: Tensor = _launch().packed(codes, bits)
    return words


def unpack(words: Tensor, bits: int, in_features: int) -> Tensor:
    """Kernel of ``hf_onebit::unpack``."""
    schema.check_unpack(words, bits, in_features)
    if words.dim() != 2 or not words.numel() or not agrees(words, "codes", bits=bits):
        return reference.unpack(words, bits, in_features)
    with on(words):
        codes: Tensor = _launch().codes(words, in_features, bits).T.contiguous()
    return codes


# --- choice -------------------------------------------------------------------------------------------------


def _signature(bits: int, group_size: int, *tensors: Tensor | None) -> tuple[Any, ...]:
    choice = torch.are_deterministic_algorithms_enabled()  # plans that were searched for are left alone then
    return (bits, group_size, choice, *(None if t is None else (t.dtype, t.device, t.shape) for t in tensors))


def _choose(key: tuple[Any, ...], x: Tensor, operand: Any) -> Any:
    """The plan of a signature, for the next call too; None where the reference shall answer."""
    K = x.shape[-1]
    capturing = _capturing(x)
    plan = None
    if operand is not None:
        with torch.no_grad(), on(x):
            search = x.is_cuda and not capturing
            plan = gpu_tuning.plan(_launch(), x.numel() // K, K, operand, x.dtype, x.device, search)
    if capturing:  # it may not have been examined
        return plan
    if len(_plans) >= _MOST_PLANS:
        _plans.clear()
    _plans[key] = plan
    return plan


def _linear(x: Tensor, operand: Any, bias: Tensor | None, plan: Any) -> Tensor:
    X = x if x.dim() == 2 else reference.as_rows(x)
    if X.stride(-1) != 1:
        X = X.contiguous()
    if bias is not None:
        bias = bias.contiguous()
    y: Tensor = _launch().run(X, operand, bias, plan)
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], y.shape[-1])


def _mm(A: Tensor, B: Tensor) -> Tensor:
    """A B in float32, whatever the dtype of its operands."""
    if A.is_cuda and A.dtype in _HALF:
        return torch.mm(A, B, out_dtype=torch.float32)
    return A.float() @ B.float()


def _takes(x: Tensor, weight: Tensor) -> bool:
    """Whether there is a kernel for it: not for float64, nor for products of nothing."""
    return x.dtype in _FAST and x.numel() > 0 and weight.numel() > 0


def serves(x: Tensor) -> bool:
    """Whether a tensor is where kernels are, and not empty."""
    return x.is_cuda and x.numel() > 0 and not obstacle()


def _capturing(x: Tensor) -> bool:
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


# --- does it agree? -----------------------------------------------------------------------------------------


def agrees(x: Tensor, kind: str, **variant: Any) -> bool:
    """Whether the kernels of this kind compute what the reference does on x's device; examined once."""
    key = _key(x.device, kind, variant)
    if key not in _examined:
        if _capturing(x):
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
    """
    key = _key(device, kind, variant)
    if key not in _examined:
        try:
            # The process may have another default device, and draws random numbers of its own.
            with torch.no_grad(), torch.device("cpu"), torch.random.fork_rng([]), on(torch.empty(0, device=device)):
                _examined[key] = gpu_examination.EXAMINATIONS[kind](_launch(), device, **variant)
        except Exception as error:  # whatever a compiler or a driver raises, the reference still answers
            text = str(error).strip()
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


def register() -> str:
    """Register the kernels for the dispatch key of CUDA and ROCm; the reason why not, or an empty string."""
    reason = obstacle()
    if not reason:
        for kernel in _KERNELS:
            torch.library.impl(f"hf_onebit::{kernel.__name__}", "CUDA", kernel)
    return reason


_KERNELS: tuple[Callable[..., Any], ...] = (
    pack,
    unpack,
    onebit_linear,
    onebit_linear_backward,
    mpq_linear,
    mpq_linear_backward,
    mbwq_linear,
    mpq_linear_g_idx,
    mpq_linear_g_idx_backward,
    mpq_embedding,
)
register()
