"""Which variants of the GPU kernels there are to examine: dtypes, widths of codes, zeros, planes."""

from __future__ import annotations

from typing import Any

import torch

from hf_onebit.ops import gpu_examination

__all__ = ["variants"]

_HALF, _BRAIN, _FLOAT = torch.float16, torch.bfloat16, torch.float32
_DTYPES = (_HALF, _BRAIN, _FLOAT)
_BITS = range(1, 9)
Variant = dict[str, Any]


def variants(kind: str, every: bool = False) -> list[Variant]:
    """The arguments of one examination, in the order that calls name them in.

    Args:
        kind: a key of ``gpu_examination.EXAMINATIONS``.
        every: all that a layer can meet. Otherwise a few, since each is compiled first: every dtype of a kind that has
            them, the usual widths, with zeros and without, not each with each.

    Raises:
        ValueError: no variants are known of that kind.
    """
    if kind == "update":
        steps = _STEPS if every else _FEW_STEPS
        return [{"bits": bits, "signs": signs, "rounding": rounding} for bits, signs, rounding in steps]
    if kind == "onebit":
        planes = [(d, p) for d in _DTYPES for p in (1, 2)] if every else [(_HALF, 1), (_BRAIN, 2), (_FLOAT, 1)]
        return [{"dtype": dtype, "planes": count} for dtype, count in planes]
    if kind == "experts":
        signs = [{"dtype": dtype, "method": "onebit", "bits": 1, "zeros": False} for dtype in _DTYPES]
        codes = [(d, b, z) for d in (_HALF, _BRAIN) for b in _BITS for z in (True, False)] if every else _FEW[kind]
        return signs + [{"dtype": dtype, "method": "mpq", "bits": bits, "zeros": zeros} for dtype, bits, zeros in codes]
    if kind == "codes":
        return [{"bits": bits} for bits in (_BITS if every else (1, 2, 3, 4, 8))]
    if kind not in ("mpq", "g_idx", "embedding"):
        raise ValueError(f"kind is {kind!r}, expected one of {', '.join(gpu_examination.EXAMINATIONS)}")
    each = [(dtype, bits, zeros) for dtype in _DTYPES for bits in _BITS for zeros in (True, False)]
    return [{"dtype": dtype, "bits": bits, "zeros": zeros} for dtype, bits, zeros in (each if every else _FEW[kind])]


# A product is compiled for several numbers of rows, the others once.
_FEW: dict[str, tuple[tuple[torch.dtype, int, bool], ...]] = {
    "mpq": ((_HALF, 4, True), (_BRAIN, 4, False), (_HALF, 3, False), (_BRAIN, 2, True), (_HALF, 1, True),
            (_FLOAT, 8, True)),
    "g_idx": ((_HALF, 4, True), (_BRAIN, 3, False), (_FLOAT, 8, True)),
    "experts": ((_HALF, 4, True), (_BRAIN, 4, False), (_HALF, 2, False), (_BRAIN, 8, True)),
    "embedding": ((_HALF, 8, True), (_BRAIN, 4, False), (_FLOAT, 2, True)),
}  # fmt: skip

# (bits, whether the scales are those of signs, rounding): inertia flips codes of one bit.
_STEPS = (
    *((bits, False, rounding) for bits in _BITS for rounding in ("stochastic", "nearest")),
    *((1, True, rounding) for rounding in ("stochastic", "nearest", "inertia")),
    (1, False, "inertia"),
)
_FEW_STEPS = (
    *((bits, False, "stochastic") for bits in (1, 2, 3, 4, 8)),
    *((1, True, rounding) for rounding in ("stochastic", "inertia")),
    (4, False, "nearest"),
)
