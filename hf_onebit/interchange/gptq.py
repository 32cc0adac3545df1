"""GPTQ checkpoints, as auto-gptq and gptqmodel write them, read as ``mpq`` layers.

A layer of W ``(out, in)`` with codes q of 2, 3, 4 or 8 bits::

    qweight  int32    (in * bits / 32, out)      codes, packed along the inputs as in formats/packing.py
    scales   float16  (groups, out)
    qzeros   int32    (groups, out * bits / 32)  zero points z, packed the same way along the outputs
    g_idx    int32    (in,)                      group of each input; absent in a few

    W[n, k] = scales[g, n] (q[n, k] - z[g, n])

``gptq_v2`` files hold z. Files of version 1 hold one less: auto-gptq took one off each zero point, gptqmodel off each
word of them as a whole, which is the same as long as no zero point is 0. Where one is, only the file's own program
tells what was meant.

Codes are taken over as they are. Scales times zero points become float16 ``zeros``, exactly where z is a power of two
(all symmetric layers) and else rounded by at most 2^-11 of their size (2^-25 for tiny ones), as float16 arithmetic
itself would round.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_onebit.formats import mpq
from hf_onebit.formats.packing import WORD_BITS, unpack, word_rows
from hf_onebit.formats.table import TableEntry
from hf_onebit.interchange.dialect import Converted, Dialect
from hf_onebit.interchange.groups import (
    agreed,
    half,
    order_of_groups,
    packed_in_order,
    require,
    size_of_groups,
    whole_words,
)
from hf_onebit.interchange.source import ForeignFolder

BITS = (2, 3, 4, 8)
FORMATS = ("gptq", "gptq_v2")
# Fields that change what the tensors mean, and the values that do not.
_MEANINGFUL: dict[str, tuple[Any, ...]] = {
    "is_marlin_format": (None, False),
    "pack_dtype": (None, "int32"),
    "adapter": (None,),
    "rotation": (None, False),
}


class GPTQ(Dialect):
    """See the top of this file."""

    title = "GPTQ"
    marker = "qweight"
    parts = ("qweight", "qzeros", "scales", "g_idx")

    @classmethod
    def recognizes(cls, folder: ForeignFolder) -> bool:
        """quant_method "gptq", in config.json or in quantize_config.json."""
        return folder.quantization.get("quant_method") == "gptq"

    def check(self) -> None:
        """Refuse other packings that go by the same name.

        Raises:
            ValueError: naming the field.
        """
        said = self.folder.quantization
        where = f"the quantization config of {str(self.folder.path)!r}"
        bits = said.get("bits")
        if type(bits) is not int or bits not in BITS:
            raise ValueError(
                f"{where} says bits={bits!r}: expected one of {', '.join(map(str, BITS))}, the widths that GPTQ files "
                "pack in one way. Quantize the float model: hf-onebit quantize MODEL --method mpq -o DIR"
            )
        if self._format not in FORMATS:
            raise ValueError(
                f"{where} says checkpoint_format {self._format!r}: expected 'gptq' or 'gptq_v2'; others arrange the "
                "same numbers for one kernel. Save it again as 'gptq' with the program that wrote it"
            )
        for field, fine in _MEANINGFUL.items():
            if str(said.get(field)).removeprefix("torch.") not in map(str, fine):
                raise ValueError(
                    f"{where} says {field}={said[field]!r}: expected {' or '.join(map(repr, fine))}. This changes what "
                    "the weights are, and is not read. Save the checkpoint again without it"
                )

    def convert(self, name: str, tensors: dict[str, Tensor], in_features: int | None) -> Converted:
        """One layer; see ``Dialect.convert``."""
        said = self.folder.quantization
        require(name, tensors, ("qweight", "qzeros", "scales"))
        words, g_idx, scales = tensors["qweight"], tensors.get("g_idx"), half(tensors["scales"], f"{name}.scales")
        if g_idx is not None and g_idx.numel() == 0:
            g_idx = None
        told = {"g_idx": None if g_idx is None else g_idx.numel(), "the model": in_features}
        if not any(told.values()):
            told["qweight"] = words.shape[0] * WORD_BITS // said["bits"]
        K = agreed(name, "numbers of inputs", told)
        bits, groups = self._bits(name, words, K), scales.shape[0]
        N = agreed(name, "numbers of outputs", {"qweight": words.shape[1], "scales": scales.shape[1]})
        if g_idx is not None:
            mpq.check_range(g_idx, groups, f"{name}.g_idx")
        size = size_of_groups(name, K, groups, said.get("group_size"), g_idx)
        words = whole_words(words, K, bits, f"{name}.qweight")
        mpq.check_padding(words, K, bits, f"{name}.qweight")
        points, notes = self._zero_points(name, tensors["qzeros"], N, bits)
        if points.shape[0] != groups:
            raise ValueError(
                f"{name}.qzeros has {points.shape[0]} groups: expected {groups}, as its scales have. The file is "
                "damaged: copy or download it again"
            )
        symmetric = bool((points == mpq.zero_point(bits)).all())
        how, order = order_of_groups(g_idx, size, K)
        if how == "q_perm":
            assert order is not None
            words = packed_in_order(words, order, bits, size)
        result = {"weight": words.contiguous(), "scales": scales.contiguous()}
        exact = scales.double() * points
        if not symmetric:
            result["zeros"] = half(exact, f"{name}: scales times zero points")
        if order is not None:
            result[how] = order
        error = 0.0 if symmetric else float((result["zeros"].double() - exact).abs().max())
        entry = TableEntry("mpq", bits, group_size=size, symmetric=symmetric, in_features=K)
        entry = TableEntry(**{**vars(entry), "g_idx": how == "g_idx", "q_perm": how == "q_perm"})
        step = float(scales.float().abs().max())
        return Converted(result, entry, K, N, error == 0.0, error, step, notes)

    @property
    def _format(self) -> str:
        said = self.folder.quantization
        return str(said.get("checkpoint_format") or said.get("format") or "gptq")

    def _bits(self, name: str, words: Tensor, in_features: int) -> int:
        """The layer's own width: files with ``dynamic`` rules have several."""
        said: int = self.folder.quantization["bits"]
        if words.shape[0] in (word_rows(in_features, said), -(-in_features * said // WORD_BITS)):
            return said
        others = [b for b in BITS if words.shape[0] == -(-in_features * b // WORD_BITS)]
        if others and self.folder.quantization.get("dynamic"):
            return others[0]
        raise ValueError(
            f"{name}.qweight has {words.shape[0]} word rows: expected {-(-in_features * said // WORD_BITS)} for "
            f"{in_features} inputs of {said} bits. The file is damaged, or its config is another model's: copy or "
            "download it again"
        )

    def _zero_points(self, name: str, qzeros: Tensor, outputs: int, bits: int) -> tuple[Tensor, list[str]]:
        """float64 ``(groups, out)``, and what is uncertain of them."""
        tight = -(-outputs * bits // WORD_BITS)
        if qzeros.dtype != torch.int32 or qzeros.dim() != 2 or qzeros.shape[1] != tight:
            raise ValueError(
                f"{name}.qzeros is {qzeros.dtype} {tuple(qzeros.shape)}: expected torch.int32 (groups, {tight}) for "
                f"{outputs} outputs of {bits} bits. The file is damaged: copy or download it again"
            )
        if self._format == "gptq_v2":
            return self._unpacked(qzeros, outputs, bits).double(), []
        by_word = self._by_word(bits)
        if by_word:
            ones = sum(1 << shift for shift in range(0, WORD_BITS, bits))
            return self._unpacked((qzeros.long() + ones).to(torch.int32), outputs, bits).double(), []
        stored = self._unpacked(qzeros, outputs, bits)
        largest = (1 << bits) - 1
        unclear = int((stored == largest).sum())
        notes = []
        if unclear:
            notes.append(
                f"{name} has {unclear} zero points stored as {largest}, one less than 0 in {bits} bits: taken as 0, "
                f"which some programs read as {largest + 1}"
            )
        return ((stored.long() + 1) % (largest + 1)).double(), notes

    def _by_word(self, bits: int) -> bool:
        """Whether one was taken off whole words, so that a zero point of 0 borrowed from the next."""
        quantizers = (self.folder.quantization.get("meta") or {}).get("quantizer") or []
        names = [quantizers] if isinstance(quantizers, str) else quantizers
        return bits != 3 and any(str(name).startswith("gptqmodel") for name in names)

    def _unpacked(self, qzeros: Tensor, outputs: int, bits: int) -> Tensor:
        columns = whole_words(qzeros.T.contiguous(), outputs, bits, "qzeros")
        return unpack(columns, bits, outputs)
