"""Whether the GPU kernels compute what the reference does: a small layer of odd sizes and one of even, beside float64.

Triton compiles another kernel where sizes are multiples of 16, as those of most layers are.

Each function returns what is wrong, or an empty string; whatever a compiler or a driver raises passes through.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hf_onebit.formats import mpq
from hf_onebit.formats.onebit import pack_signs, unpack_signs
from hf_onebit.formats.packing import pack, unpack_rows
from hf_onebit.ops import gpu_plans, reference, reference_mpq

# Of the largest result: sums in tensor cores, 11 digits of float16, 8 of bfloat16.
TOLERANCES = {torch.float32: 3e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
# (inputs, outputs)
_SIZES = ((1100, 70), (1024, 128))


def _examine_onebit(launch: Any, device: torch.device, dtype: torch.dtype, planes: int) -> str:
    for K, N in _SIZES:
        random = torch.Generator().manual_seed(1)
        tensors: list[Any] = []
        for _ in range(planes):
            a, b = (torch.rand(size, generator=random).half() + 0.5 for size in (N, K))
            tensors += [pack_signs(torch.rand(N, K, generator=random) < 0.5), a, b]
        weight, a, b, *second = tensors
        operand = launch.onebit_operand(*(t.to(device) for t in tensors), *[None] * (6 - len(tensors)))

        def exact(x: Tensor) -> Tensor:
            return reference.onebit_linear(x, weight, a, b, None, *second)  # noqa: B023  called at once

        if wrong := _examine_linear(launch, device, dtype, operand, exact, K):
            return wrong
        one = launch.onebit_operand(*(t.to(device) for t in tensors[:3]), None, None, None)
        signs = unpack_signs(weight, K, torch.float64)
        for name, factor, outer, inner in (("a", a, True, False), ("b", b[:, None], False, True)):
            matrix = launch.expanded(one, K, dtype, outer=outer, inner=inner).cpu().double()
            if wrong := apart(matrix, signs * factor.double(), dtype):
                return f"{wrong}, expanded with {name} alone"
    return ""


def _examine_mpq(launch: Any, device: torch.device, dtype: torch.dtype, bits: int, zeros: bool) -> str:
    for K, N in _SIZES:
        weight, scales, offsets = _random_groups(bits, zeros, K, N)
        operand = _on(device, launch, weight, scales, offsets, bits, 64)

        def exact(x: Tensor) -> Tensor:
            return reference_mpq.mpq_linear(x, weight, scales, offsets, None, bits, 64)  # noqa: B023  called at once

        if wrong := _examine_linear(launch, device, dtype, operand, exact, K):
            return wrong
    return ""


def _examine_linear(
    launch: Any, device: torch.device, dtype: torch.dtype, operand: Any, exact: Callable[[Tensor], Tensor], K: int
) -> str:
    """Every way of computing it, beside float64; what is wrong, or an empty string.

    Of a layer that is expanded the matrix is compared: the product after it is torch's, in the digits (TF32) that the
    process has chosen.
    """
    matrix = launch.expanded(operand, K, dtype).cpu().double()
    if wrong := apart(matrix, exact(torch.eye(K, dtype=torch.float64)), dtype):
        return f"{wrong}, expanded"
    bias = torch.randn(operand.weight.shape[1], generator=torch.Generator().manual_seed(3)).to(dtype)
    for rows in (1, 2, 3, 9, 17, 40):
        x = torch.randn(rows, K, generator=torch.Generator().manual_seed(2)).to(dtype)
        plan = gpu_plans.plan_for(rows, K, operand, dtype, device)
        if plan == gpu_plans.EXPAND:
            continue
        for added in (None, bias):
            expected = exact(x.double()) + (0.0 if added is None else added.double())
            y = launch.run(x.to(device), operand, None if added is None else added.to(device), plan).cpu().double()
            if wrong := apart(y, expected, dtype):
                return f"{wrong}, with {plan}"
    return ""


def apart(found: Tensor, expected: Tensor, dtype: torch.dtype) -> str:
    """How far results are off, or an empty string where that is within the dtype's digits."""
    error = float((found - expected).abs().max() / expected.abs().max())
    return "" if error <= TOLERANCES[dtype] else f"is off by {error:.1e} of the largest result"


def _examine_embedding(launch: Any, device: torch.device, dtype: torch.dtype, bits: int, zeros: bool) -> str:
    for K, N in _SIZES:
        weight, scales, offsets = _random_groups(bits, zeros, K, N)
        operand = _on(device, launch, weight, scales, offsets, bits, 64)
        ids = torch.tensor([5, 0, N - 1, 5])
        expected = mpq.dequantize(weight, scales, offsets, K, bits, 64, torch.float64)[ids]
        rows = launch.embedding(ids.to(device), operand, K, dtype).cpu().double()
        error = float((rows - expected).abs().max() / expected.abs().max())
        if not error <= TOLERANCES[dtype]:
            return f"is off by {error:.1e} of the largest entry"
    return ""


def _examine_g_idx(launch: Any, device: torch.device, dtype: torch.dtype, bits: int, zeros: bool) -> str:
    for K, N in _SIZES:
        weight, scales, offsets = _random_groups(bits, zeros, K, N)
        g_idx = torch.randint(0, scales.shape[0], (K,), generator=torch.Generator().manual_seed(4))
        expected = mpq.dequantize(weight, scales, offsets, K, bits, 64, torch.float64, g_idx)
        operand = _on(device, launch, weight, scales, offsets, bits, -1)
        matrix = launch.expanded_by_index(operand, g_idx.to(device), dtype).cpu().double().T
        if wrong := apart(matrix, expected, dtype):
            return wrong
        for rows in (1, 9) if dtype != torch.float32 else ():
            x = torch.randn(rows, K, generator=torch.Generator().manual_seed(2)).to(dtype)
            y = launch.run_by_index(x.to(device), operand, g_idx.to(device), None).cpu().double()
            if wrong := apart(y, x.double() @ expected.T, dtype):
                return f"{wrong}, with {rows} rows"
    return ""


def _examine_codes(launch: Any, device: torch.device, bits: int) -> str:
    for K, N in _SIZES:
        weight, _, _ = _random_groups(bits, False, K, N)
        codes = unpack_rows(weight, bits, K)
        if not torch.equal(launch.codes(weight.to(device), K, bits).cpu(), codes):
            return "gives other codes"
        if not torch.equal(launch.packed(codes.T.to(device), bits).cpu(), weight):
            return "gives other words"
    return ""


def _on(
    device: torch.device, launch: Any, weight: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int
) -> Any:
    """The layer as the launches take it."""
    offsets = None if zeros is None else zeros.to(device)
    return launch.mpq_operand(weight.to(device), scales.to(device), offsets, bits, group_size)


def _random_groups(bits: int, zeros: bool, K: int, N: int) -> tuple[Tensor, Tensor, Tensor | None]:
    random = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 1 << bits, (N, K), generator=random, dtype=torch.uint8)
    scales = (torch.rand(mpq.group_count(K, 64), N, generator=random) + 0.5).half() / (1 << bits)
    return pack(codes, bits), scales, (scales.float() * mpq.zero_point(bits) * 0.9).half() if zeros else None


EXAMINATIONS: dict[str, Callable[..., str]] = {
    "onebit": _examine_onebit,
    "mpq": _examine_mpq,
    "embedding": _examine_embedding,
    "codes": _examine_codes,
    "g_idx": _examine_g_idx,
}
