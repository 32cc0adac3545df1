"""Packed weights in the blocks of GGUF files: which type holds them exactly, and their bytes.

GGUF keeps a matrix row by row, a row in blocks of 32 inputs (Q1_0: 128), each with a float16 step d, maybe a float16
offset m, and a code q for every input::

    Q1_0   d, 16 bytes                 W = d where bit j % 8 of byte j / 8 is set, else -d
    Q4_0   d, 16 bytes                 W = d (q - 8)     input j in the low half of byte j, input j + 16 in the high one
    Q4_1   d, m, 16 bytes              W = d q + m       likewise
    Q5_0   d, 4 bytes, 16 bytes        W = d (q - 16)    fifth bits of all inputs in the four bytes, the rest likewise
    Q5_1   d, m, 4 bytes, 16 bytes     W = d q + m       likewise
    Q8_0   d, 32 bytes                 W = d q           signed bytes

A layer of groups of a multiple of 32 inputs repeats its scale in each block of the group. Symmetric codes of b bits are
whole numbers from -2^(b - 1): they fit Q4_0 up to 4 bits, Q5_0 at 5 and Q8_0 above, with d the scale itself. Others are
d q + m with m = -zeros: Q4_1 up to 4 bits and Q5_1 at 5, exactly. Wider ones have no type; Q8_0 comes nearest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hf_onebit.formats import mpq
from hf_onebit.formats.packing import unpack
from hf_onebit.nn.linear import OneBitLinear
from hf_onebit.nn.mbwq import MBWQLinear
from hf_onebit.nn.mpq import MPQEmbedding, MPQLinear
from hf_onebit.nn.replace import PackedModule, module_shape

BLOCK = 32
ONE_BIT_BLOCK = 128
# Weights at a time: the float64 matrices of one step stay below a few dozen megabytes.
_CHUNK = 1 << 20
_Array = np.ndarray


@dataclass(frozen=True)
class Written:
    """A tensor as it goes into the file.

    Attributes:
        data: its bytes, uint8 ``(rows, bytes of a row)``.
        max_error: the largest difference between a stored weight and the packed layer's.
    """

    data: _Array
    max_error: float


def exact_type(module: PackedModule, one_bit: bool) -> tuple[str | None, str | None]:
    """The smallest type that holds a packed layer's weights exactly.

    Column scales of a onebit layer are not part of it: they are folded elsewhere (gguf_folding.py), or the layer has no
    such type.

    Args:
        module: the packed layer or embedding.
        one_bit: whether the writer knows Q1_0.

    Returns:
        (type, None), or (None or the nearest type, why there is none).
    """
    shape = module_shape(module)
    assert shape is not None
    K = shape.in_features
    if K % BLOCK:
        return None, f"its {K} inputs are no multiple of {BLOCK}, the smallest block"
    if isinstance(module, MBWQLinear):
        return None, "its inputs are in an order of their own, for which files of this kind have no place"
    if isinstance(module, OneBitLinear):
        if module.planes > 1:
            return None, f"its {module.planes} planes give levels that are not evenly apart"
        return ("Q1_0" if one_bit and K % ONE_BIT_BLOCK == 0 else "Q4_0"), None
    if isinstance(module, MPQLinear) and module.g_idx is not None:
        return None, "neighbouring inputs are in groups of their own, and a block has one scale"
    bits = module.bits
    if _symmetric(module):
        whole = K if module.group_size == -1 else module.group_size
        if bits == 1 and one_bit and K % ONE_BIT_BLOCK == 0 and whole % ONE_BIT_BLOCK == 0:
            return "Q1_0", None
        return ("Q4_0" if bits <= 4 else "Q5_0" if bits == 5 else "Q8_0"), None
    if bits <= 5:
        return ("Q4_1" if bits <= 4 else "Q5_1"), None
    return "Q8_0", f"no type has codes of {bits} bits and an offset: rounded to the nearest Q8_0"


def write_blocks(module: PackedModule, kind: str, row_factor: Tensor | None = None) -> Written:
    """A packed layer in a type that :func:`exact_type` named.

    Args:
        module: the packed layer or embedding; of a onebit layer the column scales are left out.
        kind: the type; a layer that fits Q8_0 only nearly goes through :func:`write_dense`.
        row_factor: ``(out,)``, multiplied into the rows; None for ones.

    Returns:
        The blocks. ``max_error`` counts what float16 rounds of a row's factor times its scales.
    """
    shape = module_shape(module)
    assert shape is not None

    def rows(first: int, last: int) -> tuple[_Array, Tensor]:
        levels, step, offset = _levels(module, first, last, shape.in_features)
        offset = None if offset is None else _times(offset, row_factor, first)
        return _encode(kind, levels, _times(step, row_factor, first), offset)

    return _in_chunks(shape.out_features, shape.in_features, rows)


def write_dense(weight: Callable[[], Tensor], kind: str, row_factor: Tensor | None = None) -> Written:
    """A float matrix ``(out, in)`` as F32, F16, BF16, or the nearest Q8_0.

    Raises:
        ValueError: F16 cannot hold a value.
    """
    W = weight()
    dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

    def rows(first: int, last: int) -> tuple[_Array, Tensor]:
        exact = _times(W[first:last].double(), row_factor, first)
        stored = exact.to(dtypes[kind])
        if not bool(torch.isfinite(stored).all()):
            raise ValueError(
                f"values up to {float(exact.abs().max()):.4g} do not fit F16: expected at most 65504. Use --fallback "
                "bf16"
            )
        return stored.contiguous().view(torch.uint8).numpy(), stored.double() - exact

    if kind == "Q8_0":
        return _nearest_q8(W, row_factor)
    return _in_chunks(W.shape[0], W.shape[1], rows)


def _times(rows: Tensor, factor: Tensor | None, first: int) -> Tensor:
    return rows if factor is None else rows * factor[first : first + rows.shape[0], None].double()


def _symmetric(module: MPQLinear | MPQEmbedding) -> bool:
    """Whether code 2^(b - 1) means 0, said or not."""
    if module.zeros is None:
        return True
    return bool((module.zeros.double() == module.scales.double() * mpq.zero_point(module.bits)).all())


def _levels(module: PackedModule, first: int, last: int, inputs: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rows as levels int16 ``(rows, in)``, steps and offsets float64 ``(rows, in / 32)``: W = step level + offset."""
    if isinstance(module, OneBitLinear):
        codes = unpack(module.weight[:, first:last], 1, inputs).to(torch.int16)
        step = module.a[first:last, None].double().expand(-1, inputs // BLOCK)
        return 2 * codes - 1, step, None
    assert not isinstance(module, MBWQLinear)
    codes = unpack(module.weight[:, first:last], module.bits, inputs).to(torch.int16)
    size = inputs if module.group_size == -1 else module.group_size

    def blocks(statistics: Tensor) -> Tensor:
        return statistics[:, first:last].T.double().repeat_interleave(size // BLOCK, 1)[:, : inputs // BLOCK]

    step = blocks(module.scales)
    if _symmetric(module):
        return (2 * codes - 1, step / 2, None) if module.bits == 1 else (codes - (1 << module.bits - 1), step, None)
    assert module.zeros is not None
    return codes, step, -blocks(module.zeros)


def _encode(kind: str, levels: Tensor, step: Tensor, offset: Tensor | None) -> tuple[_Array, Tensor]:
    """Bytes ``(rows, ...)``, and stored minus meant weights ``(rows, in)``."""
    rows, inputs = levels.shape
    size = ONE_BIT_BLOCK if kind == "Q1_0" else BLOCK
    per = size // BLOCK
    d = step[:, ::per].to(torch.float16)
    head = [_bytes(d)]
    error = levels.double() * (d.double().repeat_interleave(size, 1) - step.repeat_interleave(BLOCK, 1))
    if offset is not None:
        m = offset.to(torch.float16)
        head.append(_bytes(m))
        error += (m.double() - offset).repeat_interleave(BLOCK, 1)
    q = levels.numpy().reshape(rows, inputs // size, size)
    body: list[_Array]
    if kind == "Q1_0":
        body = [np.packbits(q > 0, axis=-1, bitorder="little")]
    elif kind == "Q8_0":
        body = [q.astype(np.int8).view(np.uint8)]
    else:
        q = (q + {"Q4_0": 8, "Q5_0": 16}.get(kind, 0)).astype(np.uint8)
        body = [(q[..., : BLOCK // 2] & 15) | (q[..., BLOCK // 2 :] & 15) << 4]
        if kind.startswith("Q5"):
            body.insert(0, np.packbits(q >> 4, axis=-1, bitorder="little"))
    return np.concatenate([*head, *body], axis=-1).reshape(rows, -1), error


def _nearest_q8(W: Tensor, row_factor: Tensor | None) -> Written:
    def rows(first: int, last: int) -> tuple[_Array, Tensor]:
        exact = _times(W[first:last].double(), row_factor, first)
        blocks = exact.reshape(exact.shape[0], -1, BLOCK)
        d = (blocks.abs().amax(-1) / 127).to(torch.float16).double()
        levels = torch.where(d[..., None] > 0, blocks / d[..., None], 0.0).round().clamp(-127, 127).view_as(exact)
        data, _ = _encode("Q8_0", levels.to(torch.int16), d, None)
        return data, levels * d.repeat_interleave(BLOCK, 1) - exact

    return _in_chunks(W.shape[0], W.shape[1], rows)


def _in_chunks(count: int, inputs: int, rows: Callable[[int, int], tuple[_Array, Tensor]]) -> Written:
    step = max(1, _CHUNK // max(inputs, 1))
    parts, worst = [], 0.0
    for first in range(0, count, step):
        data, error = rows(first, min(first + step, count))
        parts.append(data)
        worst = max(worst, float(error.abs().max()))
    return Written(np.concatenate(parts), worst)


def _bytes(values: Tensor) -> _Array:
    """float16 ``(rows, blocks)`` as uint8 ``(rows, blocks, 2)``."""
    raw: _Array = values.contiguous().numpy().view(np.uint8)
    return raw.reshape(*values.shape, 2)
