"""Whether the GPU kernels compute what the reference does: one small layer of odd sizes each, beside float64.

Each function returns what is wrong, or an empty string; whatever a compiler or a driver raises passes through.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hf_onebit.formats import mpq
from hf_onebit.formats.onebit import pack_signs
from hf_onebit.formats.packing import pack, unpack_rows
from hf_onebit.ops import gpu_plans, reference, reference_mpq

# Of the largest result: sums in tensor cores, 11 digits of float16, 8 of bfloat16.
TOLERANCES = {torch.float32: 3e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
_K, _N = 1100, 70


def _examine_onebit(launch: Any, device: torch.device, dtype: torch.dtype, planes: int) -> str:
    random = torch.Generator().manual_seed(1)
    tensors: list[Any] = []
    for _ in range(planes):
        a, b = (torch.rand(size, generator=random).half() + 0.5 for size in (_N, _K))
        tensors += [pack_signs(torch.rand(_N, _K, generator=random) < 0.5), a, b]
    weight, a, b, *second = tensors
    operand = launch.onebit_operand(*(t.to(device) for t in tensors), *[None] * (6 - len(tensors)))
    return _examine_linear(
        launch, device, dtype, operand, lambda x: reference.onebit_linear(x, weight, a, b, None, *second)
    )


def _examine_mpq(launch: Any, device: torch.device, dtype: torch.dtype, bits: int, zeros: bool) -> str:
    weight, scales, offsets = _random_groups(bits, zeros)
    operand = launch.mpq_operand(
        weight.to(device), scales.to(device), None if offsets is None else offsets.to(device), bits, 64
    )
    return _examine_linear(
        launch, device, dtype, operand, lambda x: reference_mpq.mpq_linear(x, weight, scales, offsets, None, bits, 64)
    )


def _examine_linear(
    launch: Any, device: torch.device, dtype: torch.dtype, operand: Any, exact: Callable[[Tensor], Tensor]
) -> str:
    """Every way of computing it, beside float64; what is wrong, or an empty string."""
    for rows in (1, 3, 17, 40, 0):
        x = torch.randn(rows or 3, _K, generator=torch.Generator().manual_seed(2)).to(dtype)
        plan = gpu_plans.plan_for(rows, _K, operand, dtype, device) if rows else gpu_plans.EXPAND
        expected = exact(x.double())
        y = launch.run(x.to(device), operand, None, plan).cpu().double()
        error = float((y - expected).abs().max() / expected.abs().max())
        if not error <= TOLERANCES[dtype]:
            return f"is off by {error:.1e} of the largest result, with {plan}"
    return ""


def _examine_embedding(launch: Any, device: torch.device, dtype: torch.dtype, bits: int, zeros: bool) -> str:
    weight, scales, offsets = _random_groups(bits, zeros)
    operand = launch.mpq_operand(
        weight.to(device), scales.to(device), None if offsets is None else offsets.to(device), bits, 64
    )
    ids = torch.tensor([5, 0, _N - 1, 5])
    expected = mpq.dequantize(weight, scales, offsets, _K, bits, 64, torch.float64)[ids]
    rows = launch.embedding(ids.to(device), operand, _K, dtype).cpu().double()
    error = float((rows - expected).abs().max() / expected.abs().max())
    return "" if error <= TOLERANCES[dtype] else f"is off by {error:.1e} of the largest entry"


def _examine_g_idx(launch: Any, device: torch.device, dtype: torch.dtype, bits: int, zeros: bool) -> str:
    weight, scales, offsets = _random_groups(bits, zeros)
    g_idx = torch.randint(0, scales.shape[0], (_K,), generator=torch.Generator().manual_seed(4))
    expected = mpq.dequantize(weight, scales, offsets, _K, bits, 64, torch.float64, g_idx)
    operand = launch.mpq_operand(
        weight.to(device), scales.to(device), None if offsets is None else offsets.to(device), bits, -1
    )
    matrix = launch.expanded_by_index(operand, g_idx.to(device), dtype).cpu().double().T
    error = float((matrix - expected).abs().max() / expected.abs().max())
    return "" if error <= TOLERANCES[dtype] else f"is off by {error:.1e} of the largest entry"


def _examine_codes(launch: Any, device: torch.device, bits: int) -> str:
    weight, _, _ = _random_groups(bits, False)
    same = torch.equal(launch.codes(weight.to(device), _K, bits).cpu(), unpack_rows(weight, bits, _K))
    return "" if same else "gives other codes"


def _random_groups(bits: int, zeros: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    random = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 1 << bits, (_N, _K), generator=random, dtype=torch.uint8)
    scales = (torch.rand(mpq.group_count(_K, 64), _N, generator=random) + 0.5).half() / (1 << bits)
    return pack(codes, bits), scales, (scales.float() * mpq.zero_point(bits) * 0.9).half() if zeros else None


EXAMINATIONS: dict[str, Callable[..., str]] = {
    "onebit": _examine_onebit,
    "mpq": _examine_mpq,
    "embedding": _examine_embedding,
    "codes": _examine_codes,
    "g_idx": _examine_g_idx,
}
