"""A linear layer in row blocks: codes of one or several widths, its inputs in an order of their own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_onebit import ops
from hf_onebit.formats import mbwq as fmt
from hf_onebit.formats.weight_layout import unsigned
from hf_onebit.nn.binding import BoundWeight
from hf_onebit.nn.packed_module import KeepsScales, begin_linear, check_index, copy_tensors, register_packed


class MBWQLinear(KeepsScales, BoundWeight, nn.Linear):
    """y = x Wᵀ + bias, W[n, q_perm[r]] = scales[g, n] · q[n, r] - zeros[g, n] for packed rows r in group g.

    Uniform, with one block: inputs in the order in which GPTQ's act-order quantized them, groups of neighbours. Mixed:
    blocks of falling widths, the inputs that matter most in the widest.

    Parameters (see docs/formats.md):
        weight: (words, out_features) int32, packed codes q, one block after the other: an ``MPQWeightParameter`` of
            layer_type 2, frozen unless asked.
        scales: (groups, out_features) float16.
        zeros: (groups, out_features) float16, already multiplied by the scales; None if symmetric.
        q_perm: (in_features,) int32, the input of each packed row; absent where the inputs keep their order.
        bias: (out_features,) of the model's dtype, or None.

    As with ``MPQLinear``, changes in place take effect at the next call, and scales and zeros keep their dtype.

    Args:
        in_features, out_features, bias: as for ``nn.Linear``.
        blocks: (bits, rows, group_size) of each block: widths 1..8 for one block, falling among 8, 6, 5, 4, 3 and 2
            for several; rows add up to in_features; group_size is a multiple of 32, or -1 for the whole block.
        symmetric: no ``zeros``; code 2^(bits - 1) means 0.
        q_perm: True, or the permutation itself, (in_features,) integers; int16 is read as unsigned.
        source: class the layer stands for, "Linear" or "Conv1D" (GPT-2's transposed linear).
        device: device of the parameters.
        dtype: dtype of the bias.

    Raises:
        ValueError: a size or a block is out of range, or ``q_perm`` is no permutation.
    """

    weight: Any
    scales: nn.Parameter
    zeros: nn.Parameter | None
    q_perm: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        blocks: Sequence[fmt.Block],
        symmetric: bool = True,
        q_perm: bool | Tensor = False,
        source: str = "Linear",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # not nn.Linear's: it would allocate the float weight
        begin_linear(self, in_features, out_features, source)
        if not isinstance(symmetric, bool):
            raise ValueError(f"MBWQLinear got symmetric={symmetric!r}: expected True or False")
        try:
            self.blocks = fmt.check_blocks(blocks, in_features)
        except ValueError as error:
            raise ValueError(f"MBWQLinear got blocks={blocks!r}: {error}") from None
        self.symmetric = symmetric
        given = check_index("MBWQLinear", "q_perm", q_perm, in_features)
        if isinstance(given, Tensor):
            given = unsigned(given)
            fmt.check_permutation(given, "MBWQLinear's q_perm")
        self._flat_blocks = [number for block in self.blocks for number in block]
        self._maps: dict[torch.device, Tensor] = {}
        specs = fmt.tensor_specs(in_features, out_features, self.blocks, symmetric, given is not False)
        register_packed(self, specs, fmt.tensor_names(symmetric=False, q_perm=True), device)
        empty_bias = torch.empty(out_features, device=device, dtype=dtype) if bias else None
        self.register_parameter("bias", None if empty_bias is None else nn.Parameter(empty_bias))
        self.reset_parameters()
        if isinstance(given, Tensor) and self.q_perm is not None:
            with torch.no_grad():
                self.q_perm.copy_(given)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Random codes over the range that ``nn.Linear`` starts with, ±1/sqrt(in_features); inputs in their order."""
        bound = 1 / math.sqrt(self.in_features)
        widths = torch.tensor([bits for bits, rows, _ in self.blocks for _ in range(rows)], device="cpu")
        if not self.weight.is_meta:
            # Symmetric about 0: the level without a counterpart is left out.
            lowest = ((widths > 1) & self.symmetric).long()
            levels = (1 << widths) - lowest
            random = torch.rand(self.out_features, self.in_features, device="cpu")
            codes = ((random * levels).long().minimum(levels - 1) + lowest).to(torch.uint8)
            self.weight.copy_(fmt.pack_blocks(codes, self.blocks, check=False))
        group = fmt.groups_of_rows(self.blocks, torch.device("cpu"))
        bits = torch.zeros(self.scales.shape[0], dtype=torch.long, device="cpu").scatter_(0, group, widths)
        steps = (2 * bound / (1 << bits))[:, None]
        if not self.scales.is_meta:
            self.scales.copy_(steps.expand(self.scales.shape))
            if self.zeros is not None:
                self.zeros.copy_((steps * ((1 << bits) - 1)[:, None] / 2).expand(self.zeros.shape))
        if self.q_perm is not None and not self.q_perm.is_meta:
            self.q_perm.copy_(torch.arange(self.in_features))
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    @property
    def bits(self) -> int:
        """Width of the first block's codes, the widest."""
        return self.blocks[0][0]

    @property
    def group_size(self) -> int:
        """Group size of the first block."""
        return self.blocks[0][2]

    @property
    def scale_names(self) -> tuple[str, ...]:
        """Names of the float16 parameters that this module has."""
        return fmt.tensor_names(self.symmetric, q_perm=False)[1:]

    def compute(self, x: Tensor) -> Tensor:
        """The layer's result, from the packed words as they are."""
        weight, scales, zeros, bias, q_perm = self.held("weight", "scales", "zeros", "bias", "q_perm")
        if len(self.blocks) == 1:  # without the operator around it, whose checks take as long as a small product
            ordered = x if q_perm is None else x.index_select(-1, q_perm)
            return ops.mpq_linear(ordered, weight, scales, zeros, bias, self.bits, self.group_size)
        return ops.mbwq_linear(x, weight, scales, zeros, bias, q_perm, self._flat_blocks)

    @torch.no_grad()
    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The float weight (out_features, in_features) that the codes stand for."""
        return fmt.dequantize(self.weight, self.scales, self.zeros, self.blocks, self.q_perm, dtype)

    def set_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy packed tensors in, by the names of docs/formats.md; a bias may be among them.

        Raises:
            ValueError: a tensor is missing or unknown, has another shape or dtype, values that are not finite, padding
                codes that are not zero, or ``q_perm`` is no permutation.
        """
        where, sizes = "MBWQLinear.set_tensors", (self.in_features, self.out_features)
        fmt.validate_tensors(tensors, *sizes, self.blocks, self.symmetric, self.q_perm is not None, where)
        copy_tensors(self, tensors, where)

    def bits_per_weight(self) -> float:
        """Stored bits of the packed tensors and the bias, per weight."""
        bias_bits = 0 if self.bias is None else self.bias.element_size() * 8
        sizes = self.in_features, self.out_features
        return fmt.bits_per_weight(*sizes, self.blocks, self.symmetric, self.q_perm is not None, bias_bits)

    def weight_attributes(self) -> dict[str, Any]:
        """The attributes of the weight by name, as they must be now."""
        own, mixed = self._parameters, len(self.blocks) > 1
        weight = own["weight"]
        assert weight is not None
        if mixed and weight.device not in self._maps:
            self._maps = {weight.device: fmt.group_map(self.blocks, torch.device("cpu")).to(weight.device)}
        return {
            "scales": own.get("scales"),
            "zeros": own.get("zeros"),
            "w_bit": self.bits,
            "asym": not self.symmetric,
            "group_size": -1 if mixed else self.group_size,
            "layer_type": 2,
            "q_perm": own.get("q_perm"),
            "q_group_map": self._maps[weight.device] if mixed else None,
            "rows": fmt.rows_of(self.blocks) if mixed else None,
            "in_features": self.in_features,
        }

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"blocks={self.blocks}, symmetric={self.symmetric}, q_perm={self.q_perm is not None}"
        )
