"""A linear layer that keeps its weight as packed sign bits."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hf_onebit import ops
from hf_onebit.argument_checks import require_module
from hf_onebit.formats import onebit as fmt
from hf_onebit.nn.binding import BoundWeight
from hf_onebit.nn.packed_module import KeepsScales, begin_linear, check_whole
from hf_onebit.nn.sign_parameter import SignWeightParameter
from hf_onebit.ops import gpu

# One call into C for seven look-ups.
_tensors_of = operator.itemgetter("weight", "a", "b", "bias", "weight_1", "a_1", "b_1")
any_autocast: Callable[[], bool] = torch._C._is_any_autocast_enabled


class _Group(Protocol):
    """Layers that may be computed together."""

    def output_of(self, layer: OneBitLinear, x: Tensor) -> Tensor | None:
        """What ``layer`` makes of ``x``, if this knows; else None."""


class OneBitLinear(KeepsScales, BoundWeight, nn.Linear):
    """y = Σ_p a_p * (S_p (b_p * x)) + bias, computed from the packed signs.

    Parameters (see docs/formats.md):
        weight: (ceil(in_features/32), out_features) int32, packed signs S: a ``SignWeightParameter``, frozen unless
            asked.
        a: (out_features,) float16, scale of each output.
        b: (in_features,) float16, scale of each input.
        bias: (out_features,) of the model's dtype, or None.
        weight_1, a_1, b_1: the second plane, or None.

    Changing the data of any of them in place takes effect at the next call. The scales keep their dtype under
    ``.to(dtype)``, ``.half()`` and the like: they are float16 in files and in memory, and float32 only while they
    train.

    Subclasses ``nn.Linear`` so that tools that look for linear layers (adapters, quantizers' skip lists) find it.

    Args:
        in_features, out_features, bias: as for ``nn.Linear``.
        planes: 1 or 2 sign matrices.
        source: class the layer stands for, "Linear" or "Conv1D" (GPT-2's transposed linear); ``dequantize_layers``
            rebuilds it.
        device: device of the parameters.
        dtype: dtype of the bias.

    Raises:
        ValueError: a size or the number of planes is out of range.
    """

    in_features: int
    out_features: int
    a: nn.Parameter
    b: nn.Parameter
    weight_1: nn.Parameter | None
    a_1: nn.Parameter | None
    b_1: nn.Parameter | None
    packed_names = ("weight", "weight_1")
    packed_class = SignWeightParameter

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        planes: int = 1,
        source: str = "Linear",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # not nn.Linear's: it would allocate the float weight
        begin_linear(self, in_features, out_features, source)
        check_whole("OneBitLinear", "planes", planes, 1, fmt.MAX_PLANES)
        self.planes = planes
        for plane in range(fmt.MAX_PLANES):
            specs = fmt.tensor_specs(in_features, out_features, planes) if plane < planes else {}
            for name in fmt.plane_names(plane):
                shape_dtype = specs.get(name)
                tensor = (
                    None if shape_dtype is None else torch.empty(shape_dtype[0], dtype=shape_dtype[1], device=device)
                )
                self.register_parameter(name, None if tensor is None else nn.Parameter(tensor, requires_grad=False))
        empty_bias = torch.empty(out_features, device=device, dtype=dtype) if bias else None
        self.register_parameter("bias", None if empty_bias is None else nn.Parameter(empty_bias))
        self._use_cache = False
        self._cache: tuple[list[Tensor], list[Tensor]] | None = None  # words as they were, signs
        self._trace: list[Any] | None = None  # of the words of the cache, where they are known by that
        self._group: _Group | None = None  # set by hf_onebit.nn.fusion
        # Transformers' weight initialisation must leave packed words alone, even when a checkpoint lacks them: the
        # loader then reports what is missing.
        self._is_hf_initialized = True
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Random signs, and scales of the mean magnitude that ``nn.Linear`` starts with, 1/(2·sqrt(in_features))."""
        for plane in range(self.planes):
            weight, a, b = (getattr(self, name) for name in fmt.plane_names(plane))
            magnitude = 0.5 / math.sqrt(self.in_features) / self.planes
            scale_a = math.sqrt(magnitude * math.sqrt(self.in_features / self.out_features))  # so that ‖a‖ = ‖b‖
            with torch.no_grad():
                if not weight.is_meta:
                    signs = torch.rand(self.out_features, self.in_features, device=weight.device) < 0.5
                    weight.copy_(fmt.pack_signs(signs))
                a.fill_(scale_a)
                b.fill_(magnitude / scale_a)
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features)
            nn.init.uniform_(self.bias, -bound, bound)

    def plane_tensors(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """[(weight, a, b)] of each plane."""
        tensors = []
        for plane in range(self.planes):
            weight, a, b = (getattr(self, name) for name in fmt.plane_names(plane))
            tensors.append((weight, a, b))
        return tensors

    @property
    def scale_names(self) -> tuple[str, ...]:
        """Names of the scale parameters that this layer has."""
        return tuple(name for plane in range(self.planes) for name in fmt.plane_names(plane)[1:])

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) floating point -> (..., out_features) of the same dtype, or of autocast's."""
        traced = torch.compiler.is_compiling()
        if (self._gradient_flag.on or self._gradient_flag_1.on) and (traced or torch.is_grad_enabled()):
            return super().forward(input)
        if not traced and self._group is not None:
            y = self._group.output_of(self, input)
            if y is not None:
                return y
        if (traced or any_autocast()) and torch.is_autocast_enabled(input.device.type) and input.is_floating_point():
            input = input.to(torch.get_autocast_dtype(input.device.type))
        if self._use_cache and not traced:
            return self._forward_cached(input)
        if not traced:
            # Past nn.Module.__getattr__, whose seven calls take about as long as a small layer's product.
            tensors = held_tensors(self)
            if tensors is not None:
                return ops.onebit_linear(input, *tensors)
        return ops.onebit_linear(input, self.weight, self.a, self.b, self.bias, self.weight_1, self.a_1, self.b_1)

    def compute(self, x: Tensor) -> Tensor:
        """The layer's result, from the packed signs as they are."""
        return ops.onebit_linear(x, self.weight, self.a, self.b, self.bias, self.weight_1, self.a_1, self.b_1)

    def attributes_of(self, name: str) -> dict[str, Any]:
        """The attributes of a plane's signs by name, as they must be now."""
        a, b = fmt.plane_names(self.packed_names.index(name))[1:]
        own = self._parameters
        return {"a": own.get(a), "b": own.get(b), "w_bit": 1, "in_features": self.in_features}

    def _is_bound(self, weight: Any, name: str) -> bool:
        return getattr(weight, "a", None) is self._parameters.get("a" if name == "weight" else "a_1")

    def use_cache(self, enabled: bool = True) -> None:
        """Keep the signs unpacked in the activations' dtype between calls (see ``cache_dequantized``)."""
        self._use_cache = enabled
        self._cache = None

    @property
    def cache_bytes(self) -> int:
        """Bytes of unpacked signs held now, beside the parameters."""
        if self._cache is None:
            return 0
        words, signs = self._cache
        return sum(tensor.nbytes for tensor in (signs if self._trace is not None else words + signs))

    def _forward_cached(self, x: Tensor) -> Tensor:
        if x.shape[-1:] != (self.in_features,) or not x.is_floating_point():  # a width of 1 would broadcast
            return ops.onebit_linear(x, self.weight, self.a, self.b)  # raises, and says why
        total: Tensor | None = None
        for signs, (_, a, b) in zip(self._cached_signs(x), self.plane_tensors(), strict=True):
            y = ((x.float() * b).to(signs.dtype) @ signs).float() * a
            total = y if total is None else total + y
        assert total is not None  # planes >= 1
        return (total if self.bias is None else total + self.bias).to(x.dtype)

    def _cached_signs(self, x: Tensor) -> list[Tensor]:
        """Unpacked signs (in_features, out_features) of each plane, remade when dtype, device or any word changed.

        On a CPU words are compared with the ones that were unpacked, since writes through ``.data`` leave no other
        trace; that reads an eighth of what the product itself reads in bfloat16. On other devices the host would wait
        for that, which no CUDA graph allows; there words that do not learn are known by their traces (`_trace_of`).
        """
        words = [weight for weight, _, _ in self.plane_tensors()]
        trace = None if _can_compare(words) else [_trace_of(w) for w in words]
        captured = gpu.capturing(x)
        if self._cache is not None and not (captured and trace is None):
            seen, signs = self._cache
            usable = signs[0].dtype == x.dtype and seen[0].device == words[0].device and self._trace == trace
            if usable and (trace or all(torch.equal(old, new) for old, new in zip(seen, words, strict=True))):
                return signs
        with torch.inference_mode(False), torch.no_grad():  # what inference mode makes, no later training could use
            signs = [fmt.unpack_signs(w, self.in_features, x.dtype) for w in words]
            if not captured:  # else they are there when the graph runs
                # An alias keeps the words' memory, so that no other words get their address.
                self._cache = ([w.detach().clone() if trace is None else w.detach() for w in words], signs)
                self._trace = trace
        return signs

    @torch.no_grad()
    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The float weight (out_features, in_features) that the packed one stands for."""
        return fmt.dequantize(self.plane_tensors(), self.in_features, dtype)

    @torch.no_grad()
    def set_planes(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy packed tensors in, by the names of docs/formats.md.

        Raises:
            ValueError: a tensor is missing, has another shape or dtype, non-finite scales, or set padding bits.
        """
        fmt.validate_tensors(tensors, self.in_features, self.out_features, self.planes, "OneBitLinear.set_planes")
        for name, tensor in tensors.items():
            getattr(self, name).copy_(tensor)

    def bits_per_weight(self) -> float:
        """Stored bits of the packed tensors and the bias, per weight."""
        bias_bits = 0 if self.bias is None else self.bias.element_size() * 8
        return fmt.bits_per_weight(self.in_features, self.out_features, self.planes, bias_bits)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"planes={self.planes}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self._cache = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles carry no unpacked signs, and are in no group: a group is of these very layers.
        return {**self.__dict__, "_cache": None, "_group": None}


def cache_dequantized(model: nn.Module, enabled: bool = True) -> int:
    """Trade memory for speed where no compiled kernel is at hand: keep packed layers' signs unpacked between calls.

    Off by default. Each layer then holds its signs in the dtype of the activations it meets (4 bytes per weight in
    float32, 2 in bfloat16) beside the packed words, from the first call on. Results agree with the packed path to the
    rounding of that dtype; in-place changes of any parameter still take effect at the next call. On a GPU, where
    comparing words would make the host wait, frozen words are compared by address and torch's count of changes: writes
    into ``weight.data`` (as by ``weight.data.copy_``), by a kernel or another process that knows the address, and
    optimizer steps on frozen words with a ``step`` of their own are not noticed there. Call this again after those. A
    CUDA graph goes on reading the signs that were kept when it was captured, as long as they are kept.

    Args:
        model: any module that holds packed layers.
        enabled: False drops the caches again.

    Returns:
        How many layers were switched.

    Raises:
        TypeError: the model is no module.
    """
    require_module("cache_dequantized", model)
    layers = [module for module in model.modules() if isinstance(module, OneBitLinear)]
    for layer in layers:
        layer.use_cache(enabled)
    return len(layers)


def _can_compare(words: list[Tensor]) -> bool:
    """Whether contents are compared: where nobody waits for that, or where words leave no trace, or are learning."""
    return any(not w.is_cuda or w.is_inference() or w.requires_grad for w in words)


def _trace_of(words: Tensor) -> tuple[Any, ...]:
    """What differs once words are others: place, shape, the count of changes that torch keeps, that of steps."""
    return (words.data_ptr(), words.shape, words.stride(), words._version, getattr(words, "updates", 0))


def held_tensors(layer: OneBitLinear) -> tuple[Any, ...] | None:
    """(weight, a, b, bias, weight_1, a_1, b_1) as the module holds them; None if one is no parameter (parametrized)."""
    try:
        tensors: tuple[Any, ...] = _tensors_of(layer._parameters)
    except KeyError:
        return None
    return tensors
