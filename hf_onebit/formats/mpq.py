"""What the tensors of a group-quantized layer mean: W[n, k] = scales[g, n] q[n, k] - zeros[g, n], g = k // group_size.

A layer ``y = W x`` with W of shape ``(out, in)``, codes q of 1 to 8 bits and groups of neighbouring inputs::

    weight   int32    (ceil(in / 32) * bits, out)   codes q, packed as in packing.py
    scales   float16  (groups, out)                 one scale per group and output; either sign
    zeros    float16  (groups, out)                 one offset each, already multiplied by the scale

A symmetric layer stores no ``zeros``: they are ``scales * zero_point(bits)``, so code ``2^(bits - 1)`` means 0 (at one
bit no code does: the codes mean -scale/2 and +scale/2).

A layer may name the group of each input itself, in any order (the layout of GPTQ checkpoints with act-order)::

    g_idx    int32    (in,)                         group of input k, 0 <= g_idx[k] < groups
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from hf_onebit.formats.packing import WORD_BITS, unpack_rows, word_rows

MIN_BITS, MAX_BITS = 1, 8
_HALF_BITS = 16
Specs = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and dtype of tensors, by name."""
_REMEDY = "the file is damaged, or its config describes another layer; save or quantize the model again"

__all__ = [
    "MAX_BITS",
    "MIN_BITS",
    "Specs",
    "bits_per_weight",
    "check_group_size",
    "check_padding",
    "check_range",
    "check_specs",
    "dequantize",
    "group_count",
    "spread",
    "storage_bits",
    "tensor_names",
    "tensor_specs",
    "validate_tensors",
    "zero_point",
]


def check_group_size(group_size: int) -> None:
    """Refuse what no group size can be.

    Raises:
        ValueError: neither a positive multiple of 32 nor -1, which means the whole row.
    """
    if group_size != -1 and (group_size < WORD_BITS or group_size % WORD_BITS):
        raise ValueError(f"group_size must be a multiple of {WORD_BITS}, or -1 for the whole row, got {group_size}")


def group_count(in_features: int, group_size: int) -> int:
    """Groups of a row: ceil(in_features / group_size), the last one maybe shorter; one for ``group_size`` -1.

    Raises:
        ValueError: ``group_size`` is neither a positive multiple of 32 nor -1, or ``in_features`` is negative.
    """
    check_group_size(group_size)
    if in_features < 0:
        raise ValueError(f"in_features must not be negative, got {in_features}")
    if group_size == -1:
        return min(in_features, 1)
    return (in_features + group_size - 1) // group_size


def zero_point(bits: int) -> float:
    """The code that means 0 in a symmetric layer: 2^(bits - 1), and 1/2 at one bit.

    Raises:
        ValueError: ``bits`` is outside 1..8.
    """
    if not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"bits must be between {MIN_BITS} and {MAX_BITS}, got {bits}")
    return 0.5 if bits == 1 else float(1 << (bits - 1))


def tensor_names(symmetric: bool, g_idx: bool = False) -> tuple[str, ...]:
    """Names of a layer's packed tensors: ``weight``, ``scales``, if not symmetric ``zeros``, and maybe ``g_idx``."""
    return ("weight", "scales", *([] if symmetric else ["zeros"]), *(["g_idx"] if g_idx else []))


def tensor_specs(
    in_features: int, out_features: int, bits: int, group_size: int, symmetric: bool, g_idx: bool = False
) -> Specs:
    """Shape and dtype of every packed tensor of a layer, by name; a bias is an ordinary float tensor.

    Raises:
        ValueError: a negative size, ``bits`` outside 1..8, or an impossible ``group_size``.
    """
    if out_features < 0:
        raise ValueError(f"out_features must not be negative, got {out_features}")
    statistics = (group_count(in_features, group_size), out_features), torch.float16
    words = (word_rows(in_features, bits), out_features), torch.int32
    others: Specs = {"weight": words, "g_idx": ((in_features,), torch.int32)}
    return {name: others.get(name, statistics) for name in tensor_names(symmetric, g_idx)}


def spread(statistics: Tensor, group_size: int, in_features: int, g_idx: Tensor | None = None) -> Tensor:
    """One row for each input instead of one for each group: ``(..., groups, out)`` to ``(..., in_features, out)``."""
    if g_idx is not None:
        return statistics.index_select(-2, g_idx)
    if group_size == -1:
        return statistics.expand(*statistics.shape[:-2], in_features, statistics.shape[-1])
    return statistics.repeat_interleave(group_size, dim=-2)[..., :in_features, :]


def dequantize(
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    in_features: int,
    bits: int,
    group_size: int,
    dtype: torch.dtype = torch.float32,
    g_idx: Tensor | None = None,
) -> Tensor:
    """The float matrix that the tensors stand for.

    Args:
        weight: int32 ``(..., ceil(in_features / 32) * bits, out)``.
        scales: ``(..., groups, out)``, any float dtype.
        zeros: as ``scales``, or None for a symmetric layer.
        in_features: inputs of the layer; padding codes are ignored.
        bits: width of one code, 1..8.
        group_size: inputs that share a scale: a multiple of 32, or -1 for all of them.
        dtype: of the result. It is computed in float32 (float64 if ``dtype`` is that) and cast once; in float32 a
            symmetric layer's values are exact.
        g_idx: int32 or int64 ``(in_features,)``, group of each input, or None: neighbours share one. The groups are
            as many either way.

    Returns:
        ``(..., out, in_features)``, contiguous; differentiable in scales and zeros.

    Raises:
        ValueError: wrong ``bits`` or ``group_size``, or tensors whose shapes do not belong together.
    """
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    expected = (group_count(in_features, group_size), weight.shape[-1])
    for name, statistics in (("scales", scales), ("zeros", zeros)):
        if statistics is not None and tuple(statistics.shape[-2:]) != expected:
            raise ValueError(
                f"{name} has shape {tuple(statistics.shape)}, expected (..., {expected[0]}, {expected[1]}): "
                f"{in_features} inputs in groups of {group_size}, {expected[1]} outputs"
            )
    q = unpack_rows(weight, bits, in_features).to(compute)
    if zeros is None:
        W = q.sub_(zero_point(bits)) * spread(scales.to(compute), group_size, in_features, g_idx)
    else:
        W = q * spread(scales.to(compute), group_size, in_features, g_idx)
        W = W - spread(zeros.to(compute), group_size, in_features, g_idx)
    return W.transpose(-1, -2).to(dtype).contiguous()


def storage_bits(
    in_features: int,
    out_features: int,
    bits: int,
    group_size: int,
    symmetric: bool,
    bias_bits: int = 0,
    g_idx: bool = False,
) -> int:
    """Bits a layer takes in the file, exactly: padded words, float16 scales and zeros; bias.

    Args:
        in_features: inputs of the layer.
        out_features: outputs of the layer.
        bits: width of one code, 1..8.
        group_size: a multiple of 32, or -1.
        symmetric: without ``zeros``.
        bias_bits: bits of one bias entry, e.g. 16 for a bfloat16 bias; 0 if there is no bias.
        g_idx: the layer names the group of each input.

    Raises:
        ValueError: a negative size, ``bits`` outside 1..8, or an impossible ``group_size``.
    """
    if bias_bits < 0:
        raise ValueError(f"bias_bits must not be negative, got {bias_bits}")
    if out_features < 0:
        raise ValueError(f"out_features must not be negative, got {out_features}")
    statistics = _HALF_BITS * group_count(in_features, group_size) * (1 if symmetric else 2)
    order = WORD_BITS * in_features if g_idx else 0
    return (WORD_BITS * word_rows(in_features, bits) + statistics + bias_bits) * out_features + order


def bits_per_weight(
    in_features: int,
    out_features: int,
    bits: int,
    group_size: int,
    symmetric: bool,
    bias_bits: int = 0,
    g_idx: bool = False,
) -> float:
    """:func:`storage_bits` over the number of weights, ``in_features * out_features``.

    Raises:
        ValueError: as :func:`storage_bits`, or the layer has no weights.
    """
    if in_features < 1 or out_features < 1:
        raise ValueError(f"a layer of {out_features} x {in_features} has no weights to count bits for")
    total = storage_bits(in_features, out_features, bits, group_size, symmetric, bias_bits, g_idx)
    return total / (in_features * out_features)


def validate_tensors(
    tensors: Mapping[str, Tensor],
    in_features: int,
    out_features: int,
    bits: int,
    group_size: int,
    symmetric: bool,
    where: str,
    g_idx: bool = False,
) -> None:
    """Check that ``tensors`` are exactly a stored layer of this size; other names (a bias) are ignored.

    Values are checked too, but not of meta tensors: padding codes are zero, scales and zeros finite, groups of inputs
    within range.

    Args:
        tensors: the layer's tensors by their short names (``weight``, ``scales``, ``zeros``).
        in_features: inputs of the layer.
        out_features: outputs of the layer.
        bits: width of one code that the config promises.
        group_size: group size that the config promises.
        symmetric: whether the config promises a layer without ``zeros``.
        where: the module or file, for the error text.
        g_idx: whether the config promises a layer that names the group of each input.

    Raises:
        ValueError: the first fault found: a missing or surplus tensor, wrong dtype or shape, padding codes that
            are not zero, scales or zeros that are not finite, groups that do not exist.
    """
    specs = tensor_specs(in_features, out_features, bits, group_size, symmetric, g_idx)
    check_specs(tensors, specs, symmetric, where)
    if tensors["weight"].is_meta:
        return
    check_padding(tensors["weight"], in_features, bits, f"{where}: 'weight'")
    if g_idx:
        check_range(tensors["g_idx"], specs["scales"][0][0], f"{where}: 'g_idx'")


def check_specs(
    tensors: Mapping[str, Tensor],
    specs: Specs,
    symmetric: bool,
    where: str,
) -> None:
    """Refuse tensors that are not those of ``specs``, a surplus ``zeros``, and statistics that are not finite.

    Raises:
        ValueError: the first fault found.
    """
    if symmetric and "zeros" in tensors:
        raise ValueError(f"{where}: got a tensor 'zeros', expected none in a symmetric layer; {_REMEDY}")
    for name, (shape, dtype) in specs.items():
        if name not in tensors:
            raise ValueError(f"{where}: {name!r} is missing, expected {dtype} {shape}; {_REMEDY}")
        tensor = tensors[name]
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            raise ValueError(
                f"{where}: {name!r} is {tensor.dtype} {tuple(tensor.shape)}, expected {dtype} {shape}; {_REMEDY}"
            )
        if dtype.is_floating_point and not tensor.is_meta and not bool(tensor.isfinite().all()):
            count = int(tensor.isfinite().logical_not().sum())
            raise ValueError(f"{where}: {name!r} has {count} values that are inf or nan, expected none; {_REMEDY}")


def check_range(index: Tensor, count: int, what: str) -> None:
    """Refuse indices outside 0..count - 1.

    Raises:
        ValueError: one is.
    """
    if index.numel() and (int(index.min()) < 0 or int(index.max()) >= count):
        raise ValueError(
            f"{what} has values from {int(index.min())} to {int(index.max())}, expected 0..{count - 1}; {_REMEDY}"
        )


def check_padding(weight: Tensor, in_features: int, bits: int, what: str) -> None:
    """Refuse words whose codes past the last input are not zero.

    Raises:
        ValueError: they are not.
    """
    used = in_features % WORD_BITS
    if used == 0:
        return
    codes = unpack_rows(weight[-bits:], bits, WORD_BITS)
    dirty = int(codes[used:].any(0).sum())
    if dirty:
        raise ValueError(
            f"{what} has padding codes set in {dirty} columns, expected zeros for the codes {used}..31 of the last 32 "
            f"(in_features={in_features}); {_REMEDY}"
        )
