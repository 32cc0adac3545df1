"""Scales and zeros of a group-quantized layer in few bits themselves: what a file may hold instead of them.

Statistics ``(groups, out)`` are cut, in each group, into blocks of neighbouring outputs. Each block has a step s and a
whole number z, and each value a code q of few bits; its value is ``(q - z) s``::

    qscales          int32     (ceil(out / 32) * scale_bits, groups)   codes, packed as in packing.py along the outputs
    qscales_zeros    float16   (groups, ceil(out / block))             z, whole numbers
    qscales_scales   bfloat16  (groups, ceil(out / block))             s, five significant bits each
    qzeros, qzeros_zeros, qzeros_scales                                the same for zeros, where there are any

Scales are ``float16((q - z) s)``, held within float16. Zeros are taken relative to their scale's middle, where they
would be in a symmetric layer: ``float16((q - z) s + scale m)``, m the code that means 0 there. Every product and sum
but that last one is exact in float32, so all machines restore the same values.

Steps of few bits can be found again from the values that they made. So what was restored is stored as the very same
codes, and a model may be loaded and saved as often as one likes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from hf_onebit.formats.mpq import Specs
from hf_onebit.formats.packing import pack, unpack, word_rows

__all__ = ["DoubleQuant", "compress", "expand", "storage_bits", "tensor_names", "tensor_specs", "through"]

# Steps are m 2^e with m from 16 to 31, counted by 16 e + m - 16.
_MANTISSAS = 16
# At most this many steps lie between 0 and a value: beyond, float16 itself has no finer ones.
_MOST_STEPS = 512
_SEARCH = 24
# Bits per weight that the statistics of groups of 32 may take.
_MOST = 0.3


@dataclass(frozen=True)
class DoubleQuant:
    """How statistics are stored.

    Attributes:
        scale_bits: width of a scale's code, 3 to 8.
        zero_bits: width of a zero's code, 3 to 8.
        block: outputs that share a step, a multiple of 32.
    """

    scale_bits: int = 5
    zero_bits: int = 4
    block: int = 256

    def __post_init__(self) -> None:
        for name in ("scale_bits", "zero_bits"):
            value = getattr(self, name)
            if type(value) is not int or not 3 <= value <= 8:
                raise ValueError(f"double_quant: {name} must be a whole number from 3 to 8, got {value!r}")
        if type(self.block) is not int or self.block < 32 or self.block % 32:
            raise ValueError(f"double_quant: block must be a positive multiple of 32, got {self.block!r}")

    @classmethod
    def default(cls, symmetric: bool, out_features: int = 256) -> DoubleQuant:
        """What brings groups of 32 under 0.3 bits per weight at the least cost, in layers of 32 outputs or more whose
        number is a multiple of 32; the steps of smaller blocks leave less to the codes."""
        if symmetric:
            return cls(scale_bits=8, block=128)
        specs = [cls(scale_bits, zero_bits) for scale_bits, zero_bits in ((5, 4), (4, 4), (4, 3))]
        fitting = (spec for spec in specs if storage_bits(1, out_features, False, spec) < _MOST * 32 * out_features)
        return next(fitting, specs[-1])

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DoubleQuant:
        """From its JSON object; ValueError for an unknown key or a value out of range."""
        unknown = sorted(set(values) - {"scale_bits", "zero_bits", "block"})
        if unknown:
            raise ValueError(f"double_quant: unknown keys {unknown}, expected scale_bits, zero_bits and block")
        return cls(**values)

    def to_dict(self) -> dict[str, int]:
        """Its JSON object."""
        return asdict(self)

    def bits_of(self, name: str) -> int:
        """Width of the codes of ``scales`` or ``zeros``."""
        return self.scale_bits if name == "scales" else self.zero_bits


def tensor_names(symmetric: bool) -> tuple[str, ...]:
    """Names of the stored tensors."""
    return tuple(f"q{name}{part}" for name in _statistics(symmetric) for part in ("", "_zeros", "_scales"))


def tensor_specs(groups: int, out_features: int, symmetric: bool, spec: DoubleQuant) -> Specs:
    """Shape and dtype of every stored tensor, by name."""
    specs: Specs = {}
    for name in _statistics(symmetric):
        seconds = (groups, -(-out_features // spec.block))
        specs[f"q{name}"] = (word_rows(out_features, spec.bits_of(name)), groups), torch.int32
        specs[f"q{name}_zeros"] = seconds, torch.float16
        specs[f"q{name}_scales"] = seconds, torch.bfloat16
    return specs


def storage_bits(groups: int, out_features: int, symmetric: bool, spec: DoubleQuant) -> int:
    """Bits that the statistics of a layer take in the file, exactly."""
    specs = tensor_specs(groups, out_features, symmetric, spec).values()
    return sum(torch.Size(shape).numel() * dtype.itemsize * 8 for shape, dtype in specs)


def compress(scales: Tensor, zeros: Tensor | None, middle: float | Tensor, spec: DoubleQuant) -> dict[str, Tensor]:
    """The stored tensors of a layer's statistics; exact if these went :func:`through`, else the nearest.

    Args:
        scales: ``(groups, out)`` float, finite.
        zeros: as scales, or None for a symmetric layer.
        middle: the code that means 0 in a symmetric layer (``formats.mpq.zero_point``), or ``(groups, 1)`` of them
            (``formats.mbwq.zero_points``).
        spec: widths and block.

    Returns:
        The tensors of the module's docstring by name.
    """
    scales = scales.detach().to(torch.float16)
    tensors = _compress_one("scales", scales, None, spec)
    if zeros is not None:
        restored = _expand_one("scales", tensors, scales.shape[1], None, spec)
        tensors |= _compress_one("zeros", zeros.detach().to(torch.float16), restored.float() * middle, spec)
    return tensors


def expand(
    tensors: Mapping[str, Tensor],
    groups: int,
    out_features: int,
    symmetric: bool,
    middle: float | Tensor,
    spec: DoubleQuant,
    where: str = "double_quant",
) -> tuple[Tensor, Tensor | None]:
    """Undo :func:`compress`: float16 scales ``(groups, out_features)``, and zeros or None; the same on every machine.

    Raises:
        ValueError: a tensor is missing, or has another dtype or shape.
    """
    for name, (shape, dtype) in tensor_specs(groups, out_features, symmetric, spec).items():
        if name not in tensors:
            raise ValueError(f"{where}: {name!r} is missing, expected {dtype} {shape}")
        if tensors[name].dtype != dtype or tuple(tensors[name].shape) != shape:
            got = f"{tensors[name].dtype} {tuple(tensors[name].shape)}"
            raise ValueError(f"{where}: {name!r} is {got}, expected {dtype} {shape}")
    scales = _expand_one("scales", tensors, out_features, None, spec)
    if symmetric:
        return scales, None
    return scales, _expand_one("zeros", tensors, out_features, scales.float() * middle, spec)


def through(
    scales: Tensor, zeros: Tensor | None, middle: float | Tensor, spec: DoubleQuant
) -> tuple[Tensor, Tensor | None]:
    """The float16 statistics that a file gives back for these: what codes should be rounded with.

    Doing it again changes nothing, bit by bit.
    """
    groups, outputs = scales.shape
    return expand(compress(scales, zeros, middle, spec), groups, outputs, zeros is None, middle, spec)


def _statistics(symmetric: bool) -> tuple[str, ...]:
    return ("scales",) if symmetric else ("scales", "zeros")


def _compress_one(name: str, values: Tensor, base: Tensor | None, spec: DoubleQuant) -> dict[str, Tensor]:
    groups, outputs = values.shape
    bits, blocks = spec.bits_of(name), -(-outputs // spec.block)
    # A last block that is shorter is filled up with its last value, which changes no range.
    room = (torch.arange(blocks * spec.block, device=values.device)).clamp(max=max(outputs - 1, 0))

    def in_blocks(tensor: Tensor) -> Tensor:
        return tensor.index_select(1, room).view(groups, blocks, spec.block)

    exact = in_blocks(values)
    offset = None if base is None else in_blocks(base)
    wanted = exact.float() if offset is None else exact.float() - offset
    codes, z, s = _fit(wanted, exact, offset, (1 << bits) - 1)
    return {
        f"q{name}": pack(codes.view(groups, -1)[:, :outputs], bits, check=False),
        f"q{name}_zeros": z.to(torch.float16),
        f"q{name}_scales": s.to(torch.bfloat16),
    }


def _fit(wanted: Tensor, exact: Tensor, offset: Tensor | None, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 ``(groups, blocks, block)``, z and s ``(groups, blocks)``.

    The smallest step that needs no code above ``most``; but a step that gives ``exact`` back goes before it.
    """
    largest = torch.maximum(wanted.abs(), exact.float().abs()).amax(-1)
    least = torch.maximum((wanted.amax(-1) - wanted.amin(-1)) / (most + 1), largest / _MOST_STEPS)
    least = torch.where(least > 0, least, 1.0)
    fraction, exponent = torch.frexp(least)
    start = (exponent - 5) * _MANTISSAS + (fraction * 2 * _MANTISSAS).to(torch.int32) - _MANTISSAS
    # 0: nothing yet; 1: a step that fits; 2: one that is exact.
    state = torch.zeros_like(start)
    chosen = start.clone()
    for index in (start + i for i in range(-2, _SEARCH)):
        step = _step(index)
        n = (wanted / step[..., None]).round()
        fits = n.amax(-1) - n.amin(-1) <= most
        same = (_value(n, step[..., None], offset) == exact).all(-1)
        now = torch.where(fits & same, 2, torch.where(fits & (index > start), 1, 0)).to(state.dtype)
        chosen = torch.where(now > state, index, chosen)
        state = torch.maximum(state, now)
    step = _step(chosen)
    n = (wanted / step[..., None]).round()
    first = n.amin(-1)
    return (n - first[..., None]).to(torch.uint8), -first, step


def _step(index: Tensor) -> Tensor:
    exponent = torch.div(index, _MANTISSAS, rounding_mode="floor")
    return torch.ldexp((index - exponent * _MANTISSAS + _MANTISSAS).float(), exponent)


def _expand_one(
    name: str, tensors: Mapping[str, Tensor], outputs: int, base: Tensor | None, spec: DoubleQuant
) -> Tensor:
    codes = unpack(tensors[f"q{name}"], spec.bits_of(name), outputs).float()
    z, s = (tensors[f"q{name}_{part}"].float() for part in ("zeros", "scales"))
    z, s = (t.repeat_interleave(spec.block, 1)[:, :outputs] for t in (z, s))
    return _value(codes - z, s, base)


def _value(n: Tensor, step: Tensor, offset: Tensor | None) -> Tensor:
    """float16 of n steps above the offset."""
    product = n * step  # exact: at most eleven bits times five
    most = torch.finfo(torch.float16).max  # half a step past the largest value must not become inf
    return (product if offset is None else product + offset).clamp(-most, most).to(torch.float16)
