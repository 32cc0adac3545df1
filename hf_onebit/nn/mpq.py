"""A linear layer and an embedding that keep their weight as group-quantized codes of 1 to 8 bits."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_onebit import ops
from hf_onebit.formats import mpq as fmt
from hf_onebit.formats.packing import pack
from hf_onebit.nn.binding import BoundWeight
from hf_onebit.nn.packed_module import (
    KeepsScales,
    begin_linear,
    check_index,
    check_whole,
    copy_tensors,
    register_packed,
)
from hf_onebit.nn.parameter import MPQWeightParameter


class _GroupQuantized(KeepsScales, BoundWeight):
    """What both modules share: a matrix (rows, columns), quantized in groups of columns.

    ``rows`` are the outputs of a linear layer or the ids of an embedding, ``columns`` the inputs or the embedding's
    dimensions.
    """

    bits: int
    group_size: int
    symmetric: bool
    weight: Any  # a Parameter; the float modules' annotations differ from each other
    scales: nn.Parameter
    zeros: nn.Parameter | None
    g_idx: nn.Parameter | None  # of linear layers
    _rows: int
    _columns: int

    def _register(
        self,
        rows: int,
        columns: int,
        bits: int,
        group_size: int,
        symmetric: bool,
        device: torch.device | str | None,
        g_idx: bool = False,
    ) -> None:
        """Parameters, uninitialised; ValueError if the arguments describe no layer."""
        what = type(self).__name__
        check_whole(what, "bits", bits, fmt.MIN_BITS, fmt.MAX_BITS)
        if type(group_size) is not int:
            raise ValueError(f"{what} got group_size={group_size!r}: expected a whole number")
        if not isinstance(symmetric, bool):
            raise ValueError(f"{what} got symmetric={symmetric!r}: expected True or False")
        self.bits, self.group_size, self.symmetric = bits, group_size, symmetric
        self._rows, self._columns = rows, columns
        specs = fmt.tensor_specs(columns, rows, bits, group_size, symmetric, g_idx)
        register_packed(self, specs, fmt.tensor_names(symmetric=False, g_idx=True), device)

    @torch.no_grad()
    def _randomize(self, scale: float) -> None:
        """Random codes, symmetric about 0, in levels ``scale`` apart."""
        levels = 1 << self.bits
        if not self.weight.is_meta:
            lowest = 1 if self.symmetric and self.bits > 1 else 0  # the level without a counterpart
            codes = torch.randint(
                lowest, levels, (self._rows, self._columns), dtype=torch.uint8, device=self.weight.device
            )
            self.weight.copy_(pack(codes, self.bits, check=False))
        self.scales.fill_(scale)
        if self.zeros is not None:
            self.zeros.fill_(scale * (levels - 1) / 2)

    @property
    def scale_names(self) -> tuple[str, ...]:
        """Names of the float16 parameters that this module has."""
        return fmt.tensor_names(self.symmetric)[1:]

    @torch.no_grad()
    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The float weight that the codes stand for, in the shape of the float module's ``weight``."""
        return fmt.dequantize(
            self.weight, self.scales, self.zeros, self._columns, self.bits, self.group_size, dtype, self.g_idx
        )

    def set_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy packed tensors in, by the names of docs/formats.md; a bias may be among them.

        Raises:
            ValueError: a tensor is missing or unknown, has another shape or dtype, values that are not finite, or
                padding codes that are not zero.
        """
        where = f"{type(self).__name__}.set_tensors"
        about = self.bits, self.group_size, self.symmetric
        fmt.validate_tensors(tensors, self._columns, self._rows, *about, where, self.g_idx is not None)
        copy_tensors(self, tensors, where)

    def weight_attributes(self) -> dict[str, Any]:
        """The attributes of the weight by name, as they must be now."""
        own = self._parameters
        return {
            "scales": own.get("scales"),
            "zeros": own.get("zeros"),
            "g_idx": own.get("g_idx"),
            "w_bit": self.bits,
            "asym": not self.symmetric,
            "group_size": self.group_size,
            "layer_type": 1,
            "in_features": self._columns,
        }

    def _describe(self) -> str:
        order = ", g_idx=True" if self.g_idx is not None else ""
        return f"bits={self.bits}, group_size={self.group_size}, symmetric={self.symmetric}{order}"


class MPQLinear(_GroupQuantized, nn.Linear):
    """y = x Wᵀ + bias, W[n, k] = scales[g, n] · q[n, k] - zeros[g, n], from the packed codes.

    The group g of input k is k // group_size, or g_idx[k].

    Parameters (see docs/formats.md):
        weight: (ceil(in_features/32)·bits, out_features) int32, packed codes q: an ``MPQWeightParameter`` of
            layer_type 1, frozen unless asked.
        scales: (groups, out_features) float16.
        zeros: (groups, out_features) float16, already multiplied by the scales; None if symmetric.
        g_idx: (in_features,) int32, group of each input; absent where neighbours share one.
        bias: (out_features,) of the model's dtype, or None.

    Changing the data of any of them in place takes effect at the next call. Scales and zeros keep their dtype under
    ``.to(dtype)``, ``.half()`` and the like. Subclasses ``nn.Linear`` so that tools that look for linear layers find
    it.

    Args:
        in_features, out_features, bias: as for ``nn.Linear``.
        bits: width of one code, 1..8.
        group_size: inputs that share a scale: a multiple of 32, or -1 for the whole row.
        symmetric: no ``zeros``; code 2^(bits - 1) means 0.
        g_idx: groups in any order of inputs, as GPTQ's act-order leaves them: True, or the groups themselves,
            (in_features,) integers. There are as many groups as without. Products with few rows are slower than
            those of ``MBWQLinear``, whose inputs are stored in order of their groups.
        source: class the layer stands for, "Linear" or "Conv1D" (GPT-2's transposed linear).
        device: device of the parameters.
        dtype: dtype of the bias.

    Raises:
        ValueError: a size, ``bits`` or ``group_size`` is out of range.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        bits: int = 4,
        group_size: int = 64,
        symmetric: bool = True,
        g_idx: bool | Tensor = False,
        source: str = "Linear",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # not nn.Linear's: it would allocate the float weight
        begin_linear(self, in_features, out_features, source)
        given = check_index("MPQLinear", "g_idx", g_idx, in_features)
        self._register(out_features, in_features, bits, group_size, symmetric, device, given is not False)
        empty_bias = torch.empty(out_features, device=device, dtype=dtype) if bias else None
        self.register_parameter("bias", None if empty_bias is None else nn.Parameter(empty_bias))
        self.reset_parameters()
        if isinstance(given, Tensor) and self.g_idx is not None:
            fmt.check_range(given, self.scales.shape[0], "MPQLinear's g_idx")
            with torch.no_grad():
                self.g_idx.copy_(given)

    def reset_parameters(self) -> None:
        """Random codes over the range that ``nn.Linear`` starts with, ±1/sqrt(in_features); groups of neighbours."""
        bound = 1 / math.sqrt(self.in_features)
        self._randomize(2 * bound / (1 << self.bits))
        if self.g_idx is not None and not self.g_idx.is_meta:
            size = self.in_features if self.group_size == -1 else self.group_size
            with torch.no_grad():
                self.g_idx.copy_(torch.arange(self.in_features) // size)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def compute(self, x: Tensor) -> Tensor:
        """The layer's result, from the packed words as they are."""
        weight, scales, zeros, bias, g_idx = self.held("weight", "scales", "zeros", "bias", "g_idx")
        if g_idx is None:
            return ops.mpq_linear(x, weight, scales, zeros, bias, self.bits, self.group_size)
        return ops.mpq_linear_g_idx(x, weight, scales, zeros, bias, g_idx, self.bits)

    def bits_per_weight(self) -> float:
        """Stored bits of the packed tensors and the bias, per weight."""
        bias_bits = 0 if self.bias is None else self.bias.element_size() * 8
        return fmt.bits_per_weight(
            self.in_features,
            self.out_features,
            self.bits,
            self.group_size,
            self.symmetric,
            bias_bits,
            self.g_idx is not None,
        )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self._describe()}"
        )


class MPQEmbedding(_GroupQuantized, nn.Embedding):
    """Rows of a group-quantized matrix, unpacked as they are looked up.

    Parameters (see docs/formats.md), with the embedding's rows as outputs and its dimensions as inputs:
        weight: (ceil(embedding_dim/32)·bits, num_embeddings) int32, packed codes: an ``MPQWeightParameter`` of
            layer_type 1, frozen unless asked.
        scales: (groups, num_embeddings) float16.
        zeros: (groups, num_embeddings) float16, or None if symmetric.

    Scales and zeros keep their dtype under ``.to(dtype)``; what changes then is ``dtype``, that of the result.

    Args:
        num_embeddings, embedding_dim, padding_idx: as for ``nn.Embedding``.
        bits: width of one code, 1..8.
        group_size: dimensions that share a scale: a multiple of 32, or -1 for the whole row.
        symmetric: no ``zeros``; code 2^(bits - 1) means 0.
        embed_scale: a factor of every result, as the embeddings of Gemma have; rounded to ``dtype`` first, as there.
        device: device of the parameters.
        dtype: dtype of the result; the default dtype if None. It follows ``.to(dtype)`` and the like.

    Raises:
        ValueError: a size, ``bits`` or ``group_size`` is out of range.
    """

    dtype: torch.dtype

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        bits: int = 8,
        group_size: int = 64,
        symmetric: bool = True,
        embed_scale: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # not nn.Embedding's: it would allocate the float weight
        check_whole("MPQEmbedding", "num_embeddings", num_embeddings, 1)
        check_whole("MPQEmbedding", "embedding_dim", embedding_dim, 1)
        if padding_idx is not None and not -num_embeddings <= padding_idx < num_embeddings:
            raise ValueError(f"MPQEmbedding got padding_idx={padding_idx}, expected one of {num_embeddings} rows")
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.padding_idx = padding_idx if padding_idx is None or padding_idx >= 0 else num_embeddings + padding_idx
        # What tools read of any embedding.
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False
        self.embed_scale = None if embed_scale is None else float(embed_scale)
        self._register(num_embeddings, embedding_dim, bits, group_size, symmetric, device)
        self._set_dtype(dtype or torch.get_default_dtype())
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Random codes with a standard deviation of about 1, as ``nn.Embedding`` starts; the padding row is zero."""
        self._randomize(math.sqrt(12) / (1 << self.bits))
        if self.padding_idx is not None:
            with torch.no_grad():
                for name in self.scale_names:
                    getattr(self, name)[:, self.padding_idx] = 0

    def forward(self, input: Tensor) -> Tensor:
        """Ids of any shape, int32 or int64 -> (*ids.shape, embedding_dim) in ``self.dtype``."""
        if self._gradient_flag.on:
            return self._learning(input) if torch.is_grad_enabled() else self._evaluating(input)
        return self.compute(input)

    def compute(self, x: Tensor) -> Tensor:
        """Rows of the matrix for ids x, from the packed words as they are."""
        rows = ops.mpq_embedding(
            x, self.weight, self.scales, self.zeros, self.bits, self.group_size, self.embedding_dim, self.dtype
        )
        return rows if self._factor is None else rows * self._factor

    def add_gradient(self, weight: MPQWeightParameter, x: Tensor, grad: Tensor) -> None:
        """Add the gradient of the rows that were looked up, (embedding_dim, num_embeddings) in all."""
        columns = grad.reshape(-1, self.embedding_dim).to(torch.float32).T * (self._factor or 1.0)
        with torch.no_grad():
            if weight.privileged_grad is None:
                weight.privileged_grad = columns.new_zeros(self.embedding_dim, self.num_embeddings)
            if self.padding_idx is not None:  # its row takes none, as in nn.Embedding
                columns = columns * (x.flatten() != self.padding_idx)
            weight.privileged_grad.index_add_(1, x.flatten(), columns.to(weight.privileged_grad.dtype))

    def bits_per_weight(self) -> float:
        """Stored bits of the packed tensors, per weight."""
        return fmt.bits_per_weight(self.embedding_dim, self.num_embeddings, self.bits, self.group_size, self.symmetric)

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        scale = "" if self.embed_scale is None else f", embed_scale={self.embed_scale:g}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}{scale}, {self._describe()}, dtype={self.dtype}"

    def _set_dtype(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._factor = (
            None if self.embed_scale is None else float(torch.tensor(self.embed_scale, dtype=dtype, device="cpu"))
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        # No parameter has the dtype of the result, so ask what becomes of an empty tensor of it.
        with torch.no_grad():
            dtype = fn(torch.empty(0, dtype=self.dtype, device=self.weight.device)).dtype
        if dtype.is_floating_point:
            self._set_dtype(dtype)
        return self
