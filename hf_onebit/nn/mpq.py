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


class _GroupQuantized(nn.Module):
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
    _rows: int
    _columns: int

    def _register(
        self, rows: int, columns: int, bits: int, group_size: int, symmetric: bool, device: torch.device | str | None
    ) -> None:
        """Parameters, uninitialised; ValueError if the arguments describe no layer."""
        what = type(self).__name__
        _check_whole(what, "bits", bits, fmt.MIN_BITS, fmt.MAX_BITS)
        if isinstance(group_size, bool) or not isinstance(group_size, int):
            raise ValueError(f"{what} got group_size={group_size!r}: expected a whole number")
        if not isinstance(symmetric, bool):
            raise ValueError(f"{what} got symmetric={symmetric!r}: expected True or False")
        self.bits, self.group_size, self.symmetric = bits, group_size, symmetric
        self._rows, self._columns = rows, columns
        specs = fmt.tensor_specs(columns, rows, bits, group_size, symmetric)
        for name in fmt.tensor_names(symmetric=False):
            if name not in specs:
                self.register_parameter(name, None)
                continue
            shape, dtype = specs[name]
            empty = torch.empty(shape, dtype=dtype, device=device)
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))
        # Transformers' weight initialisation must leave packed words alone, even when a checkpoint lacks them: the
        # loader then reports what is missing.
        self._is_hf_initialized = True

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
        return fmt.dequantize(self.weight, self.scales, self.zeros, self._columns, self.bits, self.group_size, dtype)

    @torch.no_grad()
    def set_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy packed tensors in, by the names of docs/formats.md; a bias may be among them.

        Raises:
            ValueError: a tensor is missing or unknown, has another shape or dtype, values that are not finite, or
                padding codes that are not zero.
        """
        where = f"{type(self).__name__}.set_tensors"
        fmt.validate_tensors(tensors, self._columns, self._rows, self.bits, self.group_size, self.symmetric, where)
        own = dict(self.named_parameters(recurse=False))
        unknown = sorted(set(tensors) - set(own))
        if unknown:
            raise ValueError(f"{where}: got {', '.join(unknown)}, this module has {', '.join(own)}")
        for name, tensor in tensors.items():
            own[name].copy_(tensor)

    def _describe(self) -> str:
        return f"bits={self.bits}, group_size={self.group_size}, symmetric={self.symmetric}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # .to(bfloat16) would round the scales; they follow the device only.
        scales = [getattr(self, name) for name in self.scale_names]
        kept = {id(t) for p in scales for t in (p, p.grad) if t is not None}

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if id(tensor) in kept and moved.dtype != tensor.dtype:
                return tensor.to(moved.device)
            return moved

        return super()._apply(keep_dtype, recurse)


class MPQLinear(_GroupQuantized, nn.Linear):
    """y = x Wᵀ + bias, W[n, k] = scales[g, n] · q[n, k] - zeros[g, n] with g = k // group_size, from the packed codes.

    Parameters (see docs/formats.md):
        weight: (ceil(in_features/32)·bits, out_features) int32, packed codes q; frozen: integers have no gradient.
        scales: (groups, out_features) float16.
        zeros: (groups, out_features) float16, already multiplied by the scales; None if symmetric.
        bias: (out_features,) of the model's dtype, or None.

    Changing the data of any of them in place takes effect at the next call. Scales and zeros keep their dtype under
    ``.to(dtype)``, ``.half()`` and the like. Subclasses ``nn.Linear`` so that tools that look for linear layers find
    it.

    Args:
        in_features, out_features, bias: as for ``nn.Linear``.
        bits: width of one code, 1..8.
        group_size: inputs that share a scale: a multiple of 32, or -1 for the whole row.
        symmetric: no ``zeros``; code 2^(bits - 1) means 0.
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
        source: str = "Linear",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # not nn.Linear's: it would allocate the float weight
        _check_whole("MPQLinear", "in_features", in_features, 1)
        _check_whole("MPQLinear", "out_features", out_features, 1)
        if source not in ("Linear", "Conv1D"):
            raise ValueError(f"MPQLinear got source={source!r}: expected 'Linear' or 'Conv1D'")
        self.in_features = in_features
        self.out_features = out_features
        self.source = source
        self._register(out_features, in_features, bits, group_size, symmetric, device)
        empty_bias = torch.empty(out_features, device=device, dtype=dtype) if bias else None
        self.register_parameter("bias", None if empty_bias is None else nn.Parameter(empty_bias))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Random codes over the range that ``nn.Linear`` starts with, ±1/sqrt(in_features)."""
        bound = 1 / math.sqrt(self.in_features)
        self._randomize(2 * bound / (1 << self.bits))
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) floating point -> (..., out_features) of the same dtype, or of autocast's."""
        # The words alone would take any width that needs as many of them.
        if input.shape[-1:] != (self.in_features,):
            raise RuntimeError(f"MPQLinear got x of shape {tuple(input.shape)}, expected (..., {self.in_features})")
        if not input.is_meta and torch.is_autocast_enabled(input.device.type) and input.is_floating_point():
            input = input.to(torch.get_autocast_dtype(input.device.type))
        return ops.mpq_linear(input, self.weight, self.scales, self.zeros, self.bias, self.bits, self.group_size)

    def bits_per_weight(self) -> float:
        """Stored bits of the packed tensors and the bias, per weight."""
        bias_bits = 0 if self.bias is None else self.bias.element_size() * 8
        return fmt.bits_per_weight(
            self.in_features, self.out_features, self.bits, self.group_size, self.symmetric, bias_bits
        )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self._describe()}"
        )


class MPQEmbedding(_GroupQuantized, nn.Embedding):
    """Rows of a group-quantized matrix, unpacked as they are looked up.

    Parameters (see docs/formats.md), with the embedding's rows as outputs and its dimensions as inputs:
        weight: (ceil(embedding_dim/32)·bits, num_embeddings) int32, packed codes.
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
        _check_whole("MPQEmbedding", "num_embeddings", num_embeddings, 1)
        _check_whole("MPQEmbedding", "embedding_dim", embedding_dim, 1)
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
        rows = ops.mpq_embedding(
            input, self.weight, self.scales, self.zeros, self.bits, self.group_size, self.embedding_dim, self.dtype
        )
        return rows if self._factor is None else rows * self._factor

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


def _check_whole(what: str, name: str, value: Any, least: int, most: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least or (most is not None and value > most):
        limits = f">= {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{what} got {name}={value!r}: expected a whole number {limits}")
