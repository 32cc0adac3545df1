"""OneComp's ``onebit`` checkpoints, read as ``onebit`` layers of one plane.

W ``(out, in)`` as scales a and b and a matrix S of signs, W[n, k] = a[n] S[n, k] b[k]::

    a            float16  (out,)
    b            float16  (in,)
    sign_packed  uint8    (ceil(out * in / 8),)    S row after row without a gap; the first sign is a byte's highest,
                                                   1 means +1; bits past the last sign are 1

Files saved with ``use_balancing`` hold a and b of the balanced matrix: what balancing multiplied rows and columns by is
lost, so their weights are not those that were measured when they were made. They are read as they are, with a warning.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_onebit.config import OneBitConfig, PackingConfig
from hf_onebit.formats import onebit
from hf_onebit.formats.packing import pack
from hf_onebit.formats.table import TableEntry
from hf_onebit.interchange.dialect import Converted, Dialect
from hf_onebit.interchange.groups import agreed, half, require
from hf_onebit.interchange.source import ForeignFolder

# Keys only OneComp writes.
KEYS = ("modules_in_block_to_quantize", "quantized_layer_names", "quantization_bits")


class OneComp(Dialect):
    """See the top of this file."""

    title = "OneComp"
    method = "onebit"
    marker = "sign_packed"
    parts = ("a", "b", "sign_packed")

    @classmethod
    def recognizes(cls, folder: ForeignFolder) -> bool:
        """quant_method "onebit", which is ours too, with a key of OneComp's."""
        said = folder.quantization
        return said.get("quant_method") == "onebit" and any(key in said for key in KEYS)

    def check(self) -> None:
        """Refuse other methods in the same file; warn of balanced scales.

        Raises:
            ValueError: naming the field.
        """
        said = self.folder.quantization
        where = f"the quantization config of {str(self.folder.path)!r}"
        blocks = said.get("quantization_bits")
        others = {
            str(about.get("method"))
            for block in (blocks if isinstance(blocks, list) else ())
            if isinstance(block, dict)
            for about in block.values()
            if isinstance(about, dict)
        } - {"onebit", "None"}
        if others:
            raise ValueError(
                f"{where} names layers of the method {sorted(others)[0]!r}: expected 'onebit' alone, the only one of "
                "OneComp's that is read. Quantize the float model: hf-onebit quantize MODEL -o DIR"
            )
        for field in ("rotated", "fp32_had"):
            if said.get(field):
                raise ValueError(
                    f"{where} says {field}={said[field]!r}: expected False, since such a model multiplies activations "
                    "by Hadamard matrices as it runs. Make the checkpoint without rotation, or quantize the float "
                    "model: hf-onebit quantize MODEL -o DIR"
                )
        if said.get("use_balancing", True):
            self.warnings.append(
                "This OneComp checkpoint was saved with balancing on. OneComp then writes the scales of the balanced "
                "matrix, not of the weights: the model will be much worse than it was when it was measured, and "
                "nothing in the file can repair that. Make it again with use_balancing=False, or quantize the float "
                "model: hf-onebit quantize MODEL -o DIR"
            )

    def convert(self, name: str, tensors: dict[str, Tensor], in_features: int | None) -> Converted:
        """One layer; see ``Dialect.convert``."""
        require(name, tensors, self.parts)
        a, b = (half(tensors[part], f"{name}.{part}") for part in ("a", "b"))
        K = agreed(name, "numbers of inputs", {"b": b.numel(), "the model": in_features})
        N, stored = a.numel(), tensors["sign_packed"]
        if stored.dtype != torch.uint8 or stored.numel() != -(-N * K // 8):
            raise ValueError(
                f"{name}.sign_packed is {stored.dtype} with {stored.numel()} bytes: expected torch.uint8 with "
                f"{-(-N * K // 8)} for {N} x {K} signs. The file is damaged: copy or download it again"
            )
        signs = unpack_flat(stored, N * K).view(N, K)
        if K < onebit.MIN_IN_FEATURES:
            W = a.float()[:, None] * torch.where(signs, 1.0, -1.0) * b.float()
            note = f"{name} has fewer than {onebit.MIN_IN_FEATURES} inputs, and stays in floating point"
            return Converted({"weight": W}, None, K, N, notes=[note])
        result = {"weight": pack(signs, 1, check=False), "a": a.reshape(N), "b": b.reshape(K)}
        return Converted(result, TableEntry(), K, N)

    def packing_config(self, table: dict[str, dict[str, Any]], untied: bool) -> PackingConfig:
        """A ``OneBitConfig`` with that table."""
        return OneBitConfig(modules=table, untied=untied)


def unpack_flat(stored: Tensor, count: int) -> Tensor:
    """The first ``count`` bits of bytes, highest bit first: bool ``(count,)``."""
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8)
    bits: Tensor = (stored.reshape(-1, 1) >> shifts & 1).view(-1)[:count].bool()
    return bits
