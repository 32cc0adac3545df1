"""What the tensors of a onebit layer mean: W ≈ diag(a) S diag(b), with S a matrix of signs.

One plane is three tensors, for a layer ``y = W x`` with W of shape ``(out, in)``::

    weight   int32    (ceil(in / 32), out)   signs, packed as in packing.py with 1 bit; 1 means +1, 0 means -1
    a        float16  (out,)                 one scale per output
    b        float16  (in,)                  one scale per input

A second plane ``weight_1``, ``a_1``, ``b_1`` of the same shapes adds its own product:
W ≈ Σ_p diag(a_p) S_p diag(b_p).
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hf_onebit.formats.packing import WORD_BITS, pack, unpack_rows, word_rows

FORMAT_VERSION = 1
MAX_PLANES = 2
# A file read without this package must fail by the shape of ``weight``. Below 32 inputs the packed shape could
# equal the float shape, so writers leave such layers float.
MIN_IN_FEATURES = 32
_SCALE_BITS = 16
_REMEDY = "the file is damaged, or its config describes another layer; save or quantize the model again"


def plane_names(plane: int) -> tuple[str, str, str]:
    """Names of one plane's tensors: ``weight``, ``a``, ``b`` for plane 0, with the suffix ``_1`` for plane 1.

    Raises:
        ValueError: there is no such plane.
    """
    if not 0 <= plane < MAX_PLANES:
        raise ValueError(f"plane must be between 0 and {MAX_PLANES - 1}, got {plane}")
    return ("weight", "a", "b") if plane == 0 else (f"weight_{plane}", f"a_{plane}", f"b_{plane}")


def tensor_specs(
    in_features: int, out_features: int, planes: int = 1
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every packed tensor of a layer, by name; a bias is an ordinary float tensor.

    Raises:
        ValueError: a negative size, or ``planes`` is not 1 or 2.
    """
    _check_planes(planes)
    if out_features < 0:
        raise ValueError(f"out_features must not be negative, got {out_features}")
    specs: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for plane in range(planes):
        weight, a, b = plane_names(plane)
        specs[weight] = ((word_rows(in_features), out_features), torch.int32)
        specs[a] = ((out_features,), torch.float16)
        specs[b] = ((in_features,), torch.float16)
    return specs


def pack_signs(signs: Tensor) -> Tensor:
    """Pack a matrix of signs.

    Args:
        signs: ``(..., out, in)``; bool where True is +1, or a signed dtype holding only +1 and -1.

    Returns:
        int32 ``(..., ceil(in / 32), out)``, contiguous.

    Raises:
        ValueError: a value other than ±1 (zero has no sign: choose one first), or an unsigned dtype.
    """
    if signs.dtype == torch.bool:
        return pack(signs, 1, check=False)
    if not signs.dtype.is_signed:
        raise ValueError(f"pack_signs: signs must be bool or a signed dtype of ±1, got {signs.dtype}; pass codes != 0")
    if not signs.is_meta and not bool((signs.abs() == 1).all()):
        raise ValueError("pack_signs: signs must be +1 or -1, got other values; pass weights >= 0 (torch.sign gives 0)")
    return pack(signs > 0, 1, check=False)


def pack_planes(planes: Sequence[tuple[Tensor, Tensor, Tensor]]) -> dict[str, Tensor]:
    """The stored tensors of (signs ``(out, in)`` bool, a ``(out,)``, b ``(in,)``) of each plane, by their names."""
    tensors: dict[str, Tensor] = {}
    for index, (signs, a, b) in enumerate(planes):
        tensors |= dict(zip(plane_names(index), (pack_signs(signs), a, b), strict=True))
    return tensors


def unpack_planes(tensors: Mapping[str, Tensor], in_features: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(signs ``(out, in)`` bool, a ``(out,)``, b ``(in,)``) of each plane: the inverse of :func:`pack_planes`."""
    planes = []
    for index in range(MAX_PLANES):
        names = plane_names(index)
        if names[0] in tensors:
            weight, a, b = (tensors[name] for name in names)
            planes.append(((unpack_signs(weight, in_features, torch.int8) > 0).t().contiguous(), a, b))
    return planes


def unpack_signs(weight: Tensor, in_features: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The signs as numbers, in the order ``x @ S`` needs.

    Args:
        weight: int32 ``(..., ceil(in_features / 32), out)``.
        in_features: inputs of the layer; padding bits are ignored.
        dtype: of the result; any signed dtype.

    Returns:
        ``(..., in_features, out)`` of +1 and -1, contiguous. Note that this is the transpose of W's order.

    Raises:
        ValueError: wrong dtype or shape.
    """
    if not dtype.is_signed:
        raise ValueError(f"unpack_signs: dtype must be able to hold -1, got {dtype}")
    return unpack_rows(weight, 1, in_features).to(dtype).mul_(2).sub_(1)


def dequantize(
    planes: Sequence[tuple[Tensor, Tensor, Tensor]], in_features: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The float matrix that the planes stand for: Σ_p diag(a_p) S_p diag(b_p).

    Args:
        planes: one ``(weight, a, b)`` per plane: ``(..., words, out)``, ``(..., out)``, ``(..., in)``.
        in_features: inputs of the layer.
        dtype: of the result. The sum is computed in float32 (float64 if ``dtype`` is that) and cast once.

    Returns:
        ``(..., out, in_features)``, contiguous; differentiable in the scales.

    Raises:
        ValueError: no planes or more than two, or tensors whose shapes do not belong together.
    """
    _check_planes(len(planes))
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    W: Tensor | None = None
    for weight, a, b in planes:
        _check_scales(weight, a, b, in_features)
        S = unpack_signs(weight, in_features, compute)
        term = S * b.to(compute).unsqueeze(-1) * a.to(compute).unsqueeze(-2)
        W = term if W is None else W + term
    assert W is not None  # _check_planes refused an empty sequence
    return W.transpose(-1, -2).to(dtype).contiguous()


def storage_bits(in_features: int, out_features: int, planes: int = 1, bias_bits: int = 0) -> int:
    """Bits a layer takes in the file, exactly: padded sign words and two vectors of scales per plane; bias.

    Args:
        in_features: inputs of the layer.
        out_features: outputs of the layer.
        planes: 1 or 2.
        bias_bits: bits of one bias entry, e.g. 16 for a bfloat16 bias; 0 if there is no bias.

    Raises:
        ValueError: a negative size, or ``planes`` is not 1 or 2.
    """
    if bias_bits < 0:
        raise ValueError(f"bias_bits must not be negative, got {bias_bits}")
    _check_planes(planes)
    if out_features < 0:
        raise ValueError(f"out_features must not be negative, got {out_features}")
    signs = WORD_BITS * word_rows(in_features) * out_features
    scales = _SCALE_BITS * (in_features + out_features)
    return planes * (signs + scales) + bias_bits * out_features


def bits_per_weight(in_features: int, out_features: int, planes: int = 1, bias_bits: int = 0) -> float:
    """:func:`storage_bits` over the number of weights, ``in_features * out_features``.

    Raises:
        ValueError: as :func:`storage_bits`, or the layer has no weights.
    """
    if in_features < 1 or out_features < 1:
        raise ValueError(f"a layer of {out_features} x {in_features} has no weights to count bits for")
    return storage_bits(in_features, out_features, planes, bias_bits) / (in_features * out_features)


def validate_tensors(
    tensors: Mapping[str, Tensor], in_features: int, out_features: int, planes: int, where: str
) -> None:
    """Check that ``tensors`` are exactly a stored layer of this size; names of no plane (a bias) are ignored.

    Values are checked too, but not of meta tensors: padding bits are zero and scales finite.

    Args:
        tensors: the layer's tensors by their short names (``weight``, ``a``, ...).
        in_features: inputs of the layer.
        out_features: outputs of the layer.
        planes: planes the config promises.
        where: the module or file, for the error text.

    Raises:
        ValueError: the first fault found: a missing or surplus tensor, wrong dtype or shape, padding bits
            that are not zero, scales that are not finite.
    """
    specs = tensor_specs(in_features, out_features, planes)
    for name in tensor_specs(in_features, out_features, MAX_PLANES):
        if name in tensors and name not in specs:
            raise ValueError(f"{where}: got a tensor {name!r}, expected none with planes={planes}; {_REMEDY}")
    for name, (shape, dtype) in specs.items():
        if name not in tensors:
            raise ValueError(f"{where}: {name!r} is missing, expected {dtype} {shape}; {_REMEDY}")
        tensor = tensors[name]
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            raise ValueError(
                f"{where}: {name!r} is {tensor.dtype} {tuple(tensor.shape)}, expected {dtype} {shape}; {_REMEDY}"
            )
        if tensor.is_meta:
            continue
        if dtype == torch.int32:
            _check_padding(tensor, in_features, f"{where}: {name!r}")
        elif not bool(tensor.isfinite().all()):
            count = int(tensor.isfinite().logical_not().sum())
            raise ValueError(f"{where}: {name!r} has {count} values that are inf or nan, expected none; {_REMEDY}")


def _check_planes(planes: int) -> None:
    if not 1 <= planes <= MAX_PLANES:
        raise ValueError(f"planes must be between 1 and {MAX_PLANES}, got {planes}")


def _check_scales(weight: Tensor, a: Tensor, b: Tensor, in_features: int) -> None:
    # Scales broadcast, so a wrong size of 1 would pass unseen.
    if a.shape[-1:] != weight.shape[-1:]:
        raise ValueError(f"a has shape {tuple(a.shape)}, expected (..., {weight.shape[-1]}), one scale per output")
    if tuple(b.shape[-1:]) != (in_features,):
        raise ValueError(f"b has shape {tuple(b.shape)}, expected (..., {in_features}), one scale per input")


def _check_padding(weight: Tensor, in_features: int, what: str) -> None:
    used = in_features % WORD_BITS
    if used == 0:
        return
    dirty = int((weight[-1] & -(1 << used)).count_nonzero())
    if dirty:
        raise ValueError(
            f"{what} has padding bits set in {dirty} columns, expected zeros in bits {used}..31 of the last word row "
            f"(in_features={in_features}); {_REMEDY}"
        )
