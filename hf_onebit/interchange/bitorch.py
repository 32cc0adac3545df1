"""Checkpoints of bitorch-engine and green-bit-llm (GBA), read as ``mpq`` layers.

W ``(out, in)`` with codes q, groups of inputs g, scales s and zeros z that are multiplied by the scales already::

    W[n, k] = s[g, n] q[n, k] - z[g, n]

Two modules write files. ``MPQLinear`` holds 1, 2, 4 or 8 bits in groups of neighbours::

    qweight          int32    (in * bits / 32, out)     codes, packed along the inputs as in formats/packing.py
    g_idx            int32    (in,)
    scales, zeros    float16  (groups, out)             used as they are with groups of 256 and more; else made of
    qstatistic       uint8    (groups, blocks, block)   scale's code in the high four bits, zero's code in the low ones
    qscales_zeros, qscales_scales, qzeros_zeros, qzeros_scales    float16, broadcast over the blocks
                                        in float16: s = (code - qscales_zeros) qscales_scales, z likewise

Its asymmetric form has ``qscales`` uint8 instead of ``qstatistic``, and ``qzeros``, zero points packed as in GPTQ.

``MBWQLinear`` holds rows of one width ("layer-mix") or of several ("channel-mix") in an order of their own::

    qweight          int32    (word rows, out)          blocks of falling width, each packed the same way
    q_perm           int16    (in,)                     unsigned: input of each packed row; all zeros: none
    q_groups         int16    (2 groups,)               channel-mix: width of each group, and its first word row
    scales, zeros    float16  (groups, out)
    channel_scale    float16  (1, 1, in)                multiplies the layer's inputs
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from hf_onebit.formats import mbwq, mpq
from hf_onebit.formats.packing import WORD_BITS, word_rows
from hf_onebit.formats.table import TableEntry
from hf_onebit.formats.weight_layout import unpack_zero_points, unsigned
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

BITS = (1, 2, 4, 8)
# From this size on, the files' own program uses scales and zeros as they are.
_PLAIN_GROUPS = 256


class Bitorch(Dialect):
    """See the top of this file."""

    title = "bitorch"
    marker = "qweight"
    parts = (
        *("qweight", "scales", "zeros", "g_idx", "qzeros", "qstatistic", "qscales", "q_perm", "q_groups"),
        *("channel_scale", "qscales_zeros", "qscales_scales", "qzeros_zeros", "qzeros_scales", "wf"),
    )

    @classmethod
    def recognizes(cls, folder: ForeignFolder) -> bool:
        """No method is named: the tensors tell."""
        if folder.quantization.get("quant_method") not in (None, "bitorch"):
            return False
        telling = ("zeros", "qstatistic", "q_perm", "qscales_scales", "channel_scale")
        return any(folder.parts(name, telling) for name in folder.owners("qweight"))

    def check(self) -> None:
        """All that these files may hold is told layer by layer."""

    def convert(self, name: str, tensors: dict[str, Tensor], in_features: int | None) -> Converted:
        """One layer; see ``Dialect.convert``."""
        require(name, tensors, ("qweight",))
        if "q_perm" in tensors:
            return self._in_blocks(name, tensors, in_features)
        return self._in_groups(name, tensors, in_features)

    def _in_groups(self, name: str, tensors: dict[str, Tensor], in_features: int | None) -> Converted:
        words, g_idx = tensors["qweight"], tensors.get("g_idx")
        told = {"g_idx": None if g_idx is None else g_idx.numel(), "the model": in_features}
        K, N = agreed(name, "numbers of inputs", told), words.shape[1]
        bits = _width(name, words, K)
        scales, zeros, points = self._statistics(name, tensors, K, N, bits)
        groups = scales.shape[0]
        if g_idx is not None:
            mpq.check_range(g_idx, groups, f"{name}.g_idx")
        size = size_of_groups(name, K, groups, None, g_idx)
        words = whole_words(words, K, bits, f"{name}.qweight")
        mpq.check_padding(words, K, bits, f"{name}.qweight")
        how, order = order_of_groups(g_idx, size, K)
        if how == "q_perm":
            assert order is not None
            words = packed_in_order(words, order, bits, size)
        result = {"weight": words.contiguous(), "scales": scales}
        error = 0.0
        middle = scales.double() * mpq.zero_point(bits)
        exact = zeros.double() if points is None else scales.double() * points
        symmetric = bool((exact == middle).all())
        if not symmetric:
            result["zeros"] = half(exact, f"{name}: zeros")
            error = float((result["zeros"].double() - exact).abs().max())
        if order is not None:
            result[how] = order
        entry = TableEntry(
            *("mpq", bits),
            group_size=size,
            symmetric=symmetric,
            in_features=K,
            g_idx=how == "g_idx",
            q_perm=how == "q_perm",
        )
        return Converted(result, entry, K, N, error == 0.0, error, float(scales.float().abs().max()))

    def _statistics(
        self, name: str, tensors: dict[str, Tensor], inputs: int, outputs: int, bits: int
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Scales and zeros float16 ``(groups, out)``; and zero points, where the file holds those."""
        codes = next((part for part in ("qstatistic", "qscales") if part in tensors), None)
        g_idx = tensors.get("g_idx")
        if codes is not None:
            groups = tensors[codes].shape[0]
            size = inputs if groups == 1 else size_of_groups(name, inputs, groups, None, g_idx)
            if size >= _PLAIN_GROUPS and "scales" in tensors:
                codes = None
        if codes is None:
            require(name, tensors, ("scales", "qzeros" if "qzeros" in tensors else "zeros"))
            scales = half(tensors["scales"], f"{name}.scales")
        else:
            require(name, tensors, ("qscales_zeros", "qscales_scales"))
            code = tensors[codes].to(torch.uint8)
            scales = _restored(name, "scales", code >> 4 if codes == "qstatistic" else code, tensors, outputs)
        if codes != "qstatistic" and "qzeros" in tensors:
            points = unpack_zero_points(tensors["qzeros"], bits, outputs).double()
            return scales, scales, points
        if codes is None:
            return scales, half(tensors["zeros"], f"{name}.zeros"), None
        require(name, tensors, ("qzeros_zeros", "qzeros_scales"))
        zeros = _restored(name, "zeros", tensors[codes].to(torch.uint8) & 15, tensors, outputs)
        return scales, zeros, None

    def _in_blocks(self, name: str, tensors: dict[str, Tensor], in_features: int | None) -> Converted:
        require(name, tensors, ("scales", "zeros"))
        words, perm = tensors["qweight"], unsigned(tensors["q_perm"])
        K = agreed(name, "numbers of inputs", {"q_perm": perm.numel(), "the model": in_features})
        N = words.shape[1]
        factor = tensors.get("channel_scale")
        if factor is not None and not bool((factor == 1).all()):
            raise ValueError(
                f"{name}.channel_scale multiplies the layer's inputs by numbers from {float(factor.min()):.4g} to "
                f"{float(factor.max()):.4g}: expected ones, since a group's scale here is one for all of its inputs. "
                "Quantize the float model: hf-onebit quantize MODEL --method mpq -o DIR"
            )
        scales, zeros = (half(tensors[part], f"{name}.{part}") for part in ("scales", "zeros"))
        if "q_groups" in tensors:
            blocks = _blocks(name, unsigned(tensors["q_groups"]), words.shape[0], K)
        else:
            blocks = ((_width(name, words, K), K, size_of_groups(name, K, scales.shape[0], None, None)),)
        mpq_words = _repadded(name, words, blocks)
        identity = not bool(perm.any()) or torch.equal(perm, torch.arange(K))
        result = {"weight": mpq_words, "scales": scales}
        symmetric = bool((zeros.double() == scales.double() * mbwq.zero_points(blocks)).all())
        if not symmetric:
            result["zeros"] = zeros
        if not identity:
            mbwq.check_permutation(perm, f"{name}.q_perm")
            result["q_perm"] = perm.to(torch.int32)
        entry = TableEntry(
            "mpq",
            blocks[0][0],
            group_size=blocks[0][2],
            symmetric=symmetric,
            in_features=K,
            q_perm=not identity,
            blocks=blocks if len(blocks) > 1 else None,
        )
        return Converted(result, entry, K, N, step=float(scales.float().abs().max()))


def _width(name: str, words: Tensor, inputs: int) -> int:
    bits = next((b for b in BITS if words.shape[0] in (inputs * b // WORD_BITS, word_rows(inputs, b))), None)
    if bits is None or words.dtype != torch.int32:
        raise ValueError(
            f"{name}.qweight is {words.dtype} {tuple(words.shape)}: expected torch.int32 with inputs * bits / 32 rows "
            f"for {inputs} inputs of 1, 2, 4 or 8 bits. The file is damaged: copy or download it again"
        )
    return bits


def _restored(name: str, what: str, code: Tensor, tensors: dict[str, Tensor], outputs: int) -> Tensor:
    """float16 ``(groups, outputs)`` of codes ``(groups, blocks, block)`` or ``(groups, outputs)``."""
    zero, scale = (tensors[f"q{what}_{part}"].to(torch.float16) for part in ("zeros", "scales"))
    if code.dim() == 2:
        blocks = zero.shape[1]
        code = code.view(code.shape[0], blocks, -1) if blocks and code.shape[1] % blocks == 0 else code[..., None]
    try:
        values = (code.to(torch.float16) - zero) * scale
        result = values.reshape(code.shape[0], outputs)
    except RuntimeError as error:
        raise ValueError(
            f"{name}: codes {tuple(code.shape)} of its {what} and their own zeros {tuple(zero.shape)} and scales "
            f"{tuple(scale.shape)} do not belong together: expected one of each for a block of {outputs} outputs. The "
            "file is damaged: copy or download it again"
        ) from error
    return half(result, f"{name}: {what}")


def _blocks(name: str, q_groups: Tensor, rows: int, inputs: int) -> tuple[mbwq.Block, ...]:
    """Row blocks of a list of groups (width, first word row)."""
    pairs = q_groups.view(-1, 2).tolist() if q_groups.numel() % 2 == 0 else []
    ends = [start for _, start in pairs[1:]] + [rows]
    groups = [(bits, (end - start) * WORD_BITS // max(bits, 1)) for (bits, start), end in zip(pairs, ends, strict=True)]
    blocks = []
    for bits, of_width in itertools.groupby(groups, key=lambda group: group[0]):
        sizes = [size for _, size in of_width]
        same = all(size == sizes[0] for size in sizes[:-1]) and sizes[-1] <= sizes[0]
        if not same or sizes[0] % WORD_BITS:
            raise ValueError(
                f"{name}.q_groups has groups of {bits} bits with {sorted(set(sizes))} inputs: expected one multiple of "
                f"{WORD_BITS} for all groups of a width (the last may be shorter). Quantize the float model: hf-onebit "
                "quantize MODEL --method mpq -o DIR"
            )
        blocks.append((bits, sum(sizes), sizes[0]))
    if not blocks:
        raise ValueError(
            f"{name}.q_groups has {q_groups.numel()} numbers: expected a width and a word row for each group. The file "
            "is damaged: copy or download it again"
        )
    try:
        return mbwq.check_blocks(blocks, inputs)
    except ValueError as error:
        raise ValueError(
            f"{name}.q_groups: {error}. The file is damaged, or its widths lie in an order that is not read here: "
            "quantize the float model with hf-onebit quantize MODEL --method mpq -o DIR"
        ) from error


def _repadded(name: str, words: Tensor, blocks: tuple[mbwq.Block, ...]) -> Tensor:
    """Words with each block filled up to 32 inputs, which the other program leaves out."""
    tight = [rows * bits // WORD_BITS for bits, rows, _ in blocks]
    if sum(tight) != words.shape[0]:
        raise ValueError(
            f"{name}.qweight has {words.shape[0]} word rows: expected {sum(tight)} for blocks of (bits, inputs, group "
            f"size) {list(blocks)}. The file is damaged: copy or download it again"
        )
    parts = [
        whole_words(part, rows, bits, f"{name}.qweight")
        for part, (bits, rows, _) in zip(words.split(tight), blocks, strict=True)
    ]
    return torch.cat(parts).contiguous()
