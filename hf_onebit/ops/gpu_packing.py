"""Packing and unpacking on GPUs."""

from torch import Tensor

from hf_onebit.formats import packing
from hf_onebit.ops import gpu, reference, schema


def pack(codes: Tensor, bits: int) -> Tensor:
    """Kernel of ``hf_onebit::pack``; that the codes lie within their bits is asked of the device, and waited for."""
    schema.check_pack(codes, bits)
    if codes.dim() != 2 or not codes.numel() or not gpu.agrees(codes, "codes", bits=bits):
        return reference.pack(codes, bits)
    packing.check_codes(codes, bits)
    with gpu.on(codes):
        words: Tensor = gpu.launch().packed(codes, bits)
    return words


def unpack(words: Tensor, bits: int, in_features: int) -> Tensor:
    """Kernel of ``hf_onebit::unpack``."""
    schema.check_unpack(words, bits, in_features)
    if words.dim() != 2 or not words.numel() or not gpu.agrees(words, "codes", bits=bits):
        return reference.unpack(words, bits, in_features)
    with gpu.on(words):
        codes: Tensor = gpu.launch().codes(words, in_features, bits).T.contiguous()
    return codes


gpu.register(pack, unpack)
