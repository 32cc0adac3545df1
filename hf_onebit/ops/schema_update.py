"""``torch.ops.hf_onebit.packed_step``: one optimizer step on packed codes, in place. Schema, checks and fake.

``words``, ``exp_avg_l`` and ``exp_avg_s`` (with their peaks) are changed. What is returned are five sums over all
codes, float64: codes that changed, codes at the ends of their levels, |d|, d², and the variances of rounding d; with
inertia the third counts votes against the sign, and the last two are 0.

==================  ===========================================================================================
words               int32 ``(word rows, out)``
gradient            float ``(in, out)``, finite, rows in their own order; with ``is_direction``, what moments made of it
exp_avg_l           first moment: None, float32 ``(in, out)``, or int8 with peaks ``(ceil(in / 128), out)``
exp_avg_s           second moment: as the first, or uint8; or float32 ``(in,)`` with peaks ``(out,)``, whose product it
                    is. With inertia, its state n, rows in packed order
scales, zeros       float ``(groups, out)``: W = scale code - zero; without zeros code 2^(bits - 1) means 0
input_scales        of signs: float ``(in,)``, b; then scales is a ``(1, out)`` and W = b a (2 code - 1)
group               int64 ``(in,)``, the group of each packed row
perm                int64 ``(in,)``, the input of each packed row; None: that row
blocks              flat: bits, rows and word rows of each row block
rounding            "nearest", "stochastic" or "inertia"
lr .. inertia       of ``MPQWeightParameter.update``; eta: the step size with its correction
seed .. column      of the random words: the seed's 64 bits, stream, number of the step, number of the first column
==================  ===========================================================================================

The compiled kernel is in csrc/packed_step_strip.h, its twin in nn/packed_update.py, and both give the same bits.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_onebit.formats.packing import WORD_BITS, word_rows

__all__ = ["check_packed_step"]

torch.library.define(
    "hf_onebit::packed_step",
    "(Tensor(a!) words, Tensor gradient, Tensor(b!)? exp_avg_l, Tensor(c!)? exp_avg_l_peaks, Tensor(d!)? exp_avg_s, "
    "Tensor(e!)? exp_avg_s_peaks, Tensor scales, Tensor? zeros, Tensor? input_scales, Tensor group, Tensor? perm, "
    "int[] blocks, str rounding, float lr, float eta, float weight_decay, float beta1, float beta2, float eps, "
    "float inertia, int seed, int stream, int count, int column, bool is_direction) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)

_OP = "packed_step"
_PEAK_ROWS = 128
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_packed_step(
    words: Tensor,
    gradient: Tensor,
    exp_avg_l: Tensor | None,
    exp_avg_l_peaks: Tensor | None,
    exp_avg_s: Tensor | None,
    exp_avg_s_peaks: Tensor | None,
    scales: Tensor,
    zeros: Tensor | None,
    input_scales: Tensor | None,
    group: Tensor,
    perm: Tensor | None,
    blocks: Sequence[int],
    rounding: str,
) -> None:
    """Refuse arguments of ``packed_step`` whose dtypes, shapes or devices do not fit; RuntimeError."""
    _require(words.dtype == torch.int32, lambda: f"words must be torch.int32, got {words.dtype}")
    _require(
        words.dim() == 2 and gradient.dim() == 2,
        lambda: (
            "words and gradient must have two dimensions, (word rows, out) and (in, out), got "
            f"{tuple(words.shape)} and {tuple(gradient.shape)}"
        ),
    )
    rows, columns = gradient.shape
    _check_shape("words", words, (words.shape[0], columns))
    _require(
        gradient.dtype in _FLOATS,
        lambda: f"gradient must be float16, bfloat16, float32 or float64, got {gradient.dtype}",
    )
    _check_blocks(blocks, rows, words.shape[0])
    _require(
        rounding in ("nearest", "stochastic", "inertia"),
        lambda: f"rounding must be nearest, stochastic or inertia, got {rounding}",
    )
    flips = rounding == "inertia"
    _require(
        not flips or (len(blocks) == 3 and blocks[0] == 1),
        lambda: "rounding inertia flips codes of one bit, got blocks of other widths",
    )
    _check_moment("exp_avg_l", exp_avg_l, exp_avg_l_peaks, rows, columns, False)
    _check_moment("exp_avg_s", exp_avg_s, exp_avg_s_peaks, rows, columns, not flips)
    groups = scales.shape[0] if scales.dim() == 2 else 0
    for name, statistics in (("scales", scales), ("zeros", zeros)):
        if statistics is not None:
            _check_float(name, statistics)
            _check_shape(name, statistics, (groups, columns))
    if input_scales is not None:
        _check_shape("input_scales", input_scales, (rows,))
        _check_float("input_scales", input_scales)
    for name, index in (("group", group), ("perm", perm)):
        if index is not None:
            _check_shape(name, index, (rows,))
            _require(index.dtype == torch.int64, lambda n=name, i=index: f"{n} must be torch.int64, got {i.dtype}")
    tensors = (gradient, exp_avg_l, exp_avg_l_peaks, exp_avg_s, exp_avg_s_peaks, scales, zeros, input_scales, group)
    for tensor in (*tensors, perm):
        _require(
            tensor is None or tensor.device == words.device,
            lambda t=tensor: f"all tensors must be on the device of words, {words.device}, got {t.device}",
        )


def _check_blocks(blocks: Sequence[int], in_features: int, words: int) -> None:
    _require(
        len(blocks) > 0 and len(blocks) % 3 == 0,
        lambda: f"blocks must hold bits, rows and word rows of each block, got {len(blocks)} numbers",
    )
    for bits, rows, held in zip(blocks[::3], blocks[1::3], blocks[2::3], strict=True):
        _require(1 <= bits <= 8, lambda b=bits: f"bits must be between 1 and 8, got {b}")
        _require(rows >= 0, lambda: f"blocks reach beyond {in_features} rows or {words} word rows")
        whole, tight = word_rows(rows, bits), rows * bits // WORD_BITS
        _require(
            held == whole or (rows * bits % WORD_BITS == 0 and held == tight),
            lambda r=rows, b=bits, w=whole, h=held: f"a block of {r} rows of {b} bits takes {w} word rows, got {h}",
        )
    found = sum(blocks[1::3]), sum(blocks[2::3])
    _require(
        found == (in_features, words),
        lambda: f"blocks have {found[0]} rows and {found[1]} word rows, expected {in_features} and {words}",
    )


def _check_moment(
    name: str, values: Tensor | None, peaks: Tensor | None, rows: int, columns: int, factors: bool
) -> None:
    if values is None:
        _require(peaks is None, lambda: f"{name}_peaks came without {name}")
        return
    if factors and values.dim() == 1:
        _check_shape(name, values, (rows,))
        _require(
            values.dtype == torch.float32,
            lambda: f"{name} of one number a row must be torch.float32, got {values.dtype}",
        )
        _require(peaks is not None, lambda: f"{name} of one number a row needs {name}_peaks, one a column")
        shape: tuple[int, ...] = (columns,)
    else:
        _check_shape(name, values, (rows, columns))
        if values.dtype not in (torch.int8, torch.uint8):
            _require(
                values.dtype == torch.float32,
                lambda: f"{name} must be torch.float32, or torch.int8 or torch.uint8 with peaks, got {values.dtype}",
            )
            _require(peaks is None, lambda: f"{name}_peaks belong to a moment in eight bits, got torch.float32")
            return
        _require(peaks is not None, lambda: f"{name} in eight bits needs {name}_peaks")
        shape = (-(-rows // _PEAK_ROWS), columns)
    assert peaks is not None
    _check_shape(f"{name}_peaks", peaks, shape)
    _require(peaks.dtype == torch.float32, lambda: f"{name}_peaks must be torch.float32, got {peaks.dtype}")


def _check_float(name: str, tensor: Tensor) -> None:
    _require(tensor.dtype in _FLOATS, lambda: f"{name} must be floating point, got {tensor.dtype}; cast it first")


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    _require(tuple(tensor.shape) == shape, lambda: f"{name} must have shape {shape}, got {tuple(tensor.shape)}")


def _require(fine: bool, message: object) -> None:
    torch._check(fine, lambda: f"{_OP}: {message()}")  # type: ignore[operator]


def _fake(
    words: Tensor,
    gradient: Tensor,
    exp_avg_l: Tensor | None,
    exp_avg_l_peaks: Tensor | None,
    exp_avg_s: Tensor | None,
    exp_avg_s_peaks: Tensor | None,
    scales: Tensor,
    zeros: Tensor | None,
    input_scales: Tensor | None,
    group: Tensor,
    perm: Tensor | None,
    blocks: Sequence[int],
    rounding: str,
    *numbers: float,
) -> Tensor:
    check_packed_step(
        words, gradient, exp_avg_l, exp_avg_l_peaks, exp_avg_s, exp_avg_s_peaks, scales, zeros, input_scales, group,
        perm, blocks, rounding,
    )  # fmt: skip
    return gradient.new_empty(5, dtype=torch.float64)


torch.library.register_fake("hf_onebit::packed_step", _fake)
