"""``Onebit`` quantizes a model's layers with the closed form, one at a time; ``OnebitResult`` is one layer's
outcome.

    quantizer = Onebit(num_layers=2)
    quantizer.setup(model)                                  # which layers
    for module, name in quantizer.module_to_name.items():
        result = quantizer.quantize_layer(module, hessian=hessians[name])

The mathematics is in ``closed_form.py`` (Xu et al. 2024, arXiv:2402.11295). Matrices are W (out, in) here,
whatever way a module stores them: GPT-2's Conv1D, known by its class name, keeps (in, out).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_onebit.algorithms.closed_form import (
    closed_form_planes,
    dequantize_planes,
    importance_from_hessian,
    option_problems,
)

__all__ = ["Onebit", "OnebitResult", "accumulate_hessian"]

# The name filters in the order in which they apply, and whether a name stays.
_FILTERS: tuple[tuple[str, Callable[[str, Collection[str]], bool]], ...] = (
    ("include_layer_names", lambda name, names: name in names),
    ("include_layer_keywords", lambda name, keywords: any(keyword in name for keyword in keywords)),
    ("exclude_layer_names", lambda name, names: name not in names),
    ("exclude_layer_keywords", lambda name, keywords: not any(keyword in name for keyword in keywords)),
)
_ROWS_AT_A_TIME = 4096  # of activations in a wider dtype: bounds the copy that a Hessian or a metric makes


@dataclass(eq=False)
class OnebitResult:
    """One layer quantized by ``Onebit``. Every field is None until it is known.

    With W the layer's weight (out, in), Ŵ its ``dequantized_weight``, X (N, in) the rows of its input:

    Attributes:
        dequantized_weight: Ŵ, fp16 on the CPU, shaped as the module's own weight ((in, out) for Conv1D). It
            is a[:, None] * sign * b[None, :] in fp32, rounded once.
        quantization_time: seconds, without the error metrics.
        output_squared_error: ‖X Wᵀ − X Ŵᵀ‖²_F over all rows of X.
        mean_output_squared_error: that / (out · N).
        weight_squared_error: ‖W − Ŵ‖²_F.
        mean_weight_squared_error: that / (out · in).
        relative_output_squared_error: output_squared_error / ‖X Wᵀ‖²_F; from a Hessian H where there is no X:
            tr(D H Dᵀ) / tr(W H Wᵀ) with D = W − Ŵ. None where the denominator is 0.
        relative_weight_squared_error: weight_squared_error / ‖W‖²_F; None where that is 0.
        iters: as in ``Onebit``, like the next four.
        use_importance_scaling: whether importance was asked for.
        use_balancing: whether the magnitudes were balanced.
        balance_iters: the most balancing passes.
        balance_alpha: the row mass while balancing.
        a: scale of each output, (out,) fp16 on the CPU.
        b: scale of each input, (in,) fp16 on the CPU.
        sign: S, (out, in), ±1 in fp16 on the CPU.
    """

    dequantized_weight: Tensor | None = None
    quantization_time: float | None = None
    output_squared_error: float | None = None
    mean_output_squared_error: float | None = None
    weight_squared_error: float | None = None
    mean_weight_squared_error: float | None = None
    relative_output_squared_error: float | None = None
    relative_weight_squared_error: float | None = None
    iters: int | None = None
    use_importance_scaling: bool | None = None
    use_balancing: bool | None = None
    balance_iters: int | None = None
    balance_alpha: float | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    sign: Tensor | None = None


@dataclass
class Onebit:
    """Quantizes each selected layer to one sign matrix with two scale vectors. arXiv:2402.11295 §3.

    Selection, in this order, each filter narrowing what the one before it left: ``target_layer_types``,
    ``include_layer_names``, ``include_layer_keywords``, ``exclude_layer_names``, ``exclude_layer_keywords``,
    ``num_layers``. Names match a module's full dotted name exactly, keywords match any part of it; None does
    not filter.

    Attributes:
        name: a label of the caller's; nothing depends on it.
        num_layers: quantize only the first so many of the selected layers, in the model's order.
        calc_quant_error: fill in the error metrics of each result (fp64, and slow on large layers).
        include_layer_names: keep only these.
        exclude_layer_names: drop these.
        include_layer_keywords: keep only names that contain one of these.
        exclude_layer_keywords: drop names that contain one of these.
        target_layer_types: the module classes to quantize: nn.Linear, Transformers' Conv1D, or subclasses.
        hessian_dtype: in which ``calculate_hessian`` multiplies and sums.
        module_to_name: filled by ``setup``: {module: full name}.
        results: filled by ``quantize``: {full name: OnebitResult}.
        flag_calibration: whether a driver should run calibration data through the model.
        flag_hessian: whether ``quantize`` computes a Hessian when it is given none.
        flag_xtx: whether a driver should collect XᵀX; nothing here does.
        iters: rounds of alternating least squares, >= 0.
        use_importance_scaling: weigh each input column by the Hessian's diagonal, where there is a Hessian.
        use_balancing: balance the magnitudes (L1 Sinkhorn) before the fit; undone in a and b.
        balance_iters: the most balancing passes, >= 1.
        balance_alpha: row mass while balancing, > 0; a gauge that cannot change the result.
    """

    name: str | None = None
    num_layers: int | None = None
    calc_quant_error: bool = False
    include_layer_names: list[str] | None = None
    exclude_layer_names: list[str] | None = field(default_factory=lambda: ["lm_head"])
    include_layer_keywords: list[str] | None = None
    exclude_layer_keywords: list[str] | None = field(default_factory=lambda: ["per_layer_model_projection"])
    target_layer_types: tuple[type[nn.Module], ...] = field(default_factory=lambda: (nn.Linear,))
    hessian_dtype: torch.dtype = torch.float32
    module_to_name: dict[nn.Module, str] = field(default_factory=dict)
    results: dict[str, OnebitResult] = field(default_factory=dict)
    flag_calibration: bool = True
    flag_hessian: bool = True
    flag_xtx: bool = False
    iters: int = 10
    use_importance_scaling: bool = True
    use_balancing: bool = True
    balance_iters: int = 40
    balance_alpha: float = 1.0

    def validate_params(self) -> None:
        """Check every field; balance_iters and balance_alpha only where balancing is on.

        Raises:
            ValueError: one message that lists all problems.
        """
        problems = option_problems(
            iters=self.iters,
            use_balancing=self.use_balancing,
            balance_iters=self.balance_iters,
            balance_alpha=self.balance_alpha,
        )
        flags = ("use_importance_scaling", "calc_quant_error", "flag_calibration", "flag_hessian", "flag_xtx")
        for key in flags:
            if not isinstance(getattr(self, key), bool):
                problems.append(f"{key} must be True or False, got {getattr(self, key)!r}")
        problems += self._selection_problems()
        dtype: object = self.hessian_dtype
        if dtype not in (torch.float32, torch.float64):
            problems.append(f"hessian_dtype must be torch.float32 or torch.float64, got {dtype!r}")
        if problems:
            raise ValueError("Onebit: " + "; ".join(problems))

    def setup(self, model: nn.Module) -> None:
        """Validate, then select the layers of ``model`` into ``module_to_name``, dropping what that held before.

        Raises:
            ValueError: a field is out of range, no layer is selected (the message says which filter left
                none), or fewer than ``num_layers`` are.
        """
        self.validate_params()
        self.module_to_name.clear()
        types = self.target_layer_types
        selected = {name: module for name, module in model.named_modules() if isinstance(module, types)}
        if not selected:
            wanted = ", ".join(kind.__name__ for kind in types)
            raise ValueError(
                f"Onebit: {type(model).__name__} holds no module of target_layer_types ({wanted}); name the classes of "
                "its linear layers there"
            )
        for key, keeps in _FILTERS:
            patterns = getattr(self, key)
            if patterns is None:
                continue
            kept = {name: module for name, module in selected.items() if keeps(name, patterns)}
            if not kept:
                raise ValueError(
                    f"Onebit: no layer of {type(model).__name__} is left to quantize: {key}={patterns!r} removes all "
                    f"{len(selected)} that came to it, such as {next(iter(selected))!r}; change {key}"
                )
            selected = kept
        if self.num_layers is not None:
            if len(selected) < self.num_layers:
                raise ValueError(
                    f"Onebit: num_layers={self.num_layers}, but the filters select only {len(selected)} layers of "
                    f"{type(model).__name__}; lower num_layers, or set it to None for all of them"
                )
            selected = dict(list(selected.items())[: self.num_layers])
        self.module_to_name.update({module: name for name, module in selected.items()})

    @torch.no_grad()
    def quantize_layer(
        self, module: nn.Module, input: tuple[Any, ...] | Tensor | None = None, hessian: Tensor | None = None
    ) -> OnebitResult:
        """Quantize one layer. The module itself is not changed.

        Args:
            module: nn.Linear or Conv1D with fp16, bf16, fp32 or fp64 weights.
            input: the layer's input, (rows, in) or (batch, sequence, in), or a tuple that starts with it. It
                does not take part in the quantization, only in the output error metrics when
                ``calc_quant_error`` is set.
            hessian: (in, in); with ``use_importance_scaling`` its diagonal weighs the columns. None weighs them
                alike.

        Raises:
            ValueError: a field is out of range, the module or a shape does not fit, the weights are not
                finite, or fp16 cannot hold the outcome.
        """
        self.validate_params()
        layer = self.module_to_name.get(module)
        W = _weight(module, layer)
        if hessian is not None:
            _check_hessian(hessian, W, layer)
        X = None if input is None else _rows(input, W.shape[1], layer)
        started = time.perf_counter()
        importance = None
        if hessian is not None and self.use_importance_scaling:
            importance = importance_from_hessian(hessian)
        [(signs, a, b)] = closed_form_planes(
            W,
            1,
            layer=layer,
            skipped_by="exclude_layer_names",
            importance=importance,
            iters=self.iters,
            use_balancing=self.use_balancing,
            balance_iters=self.balance_iters,
            balance_alpha=self.balance_alpha,
        )
        dense = dequantize_planes([(signs, a, b)]).to(torch.float16)
        if not torch.isfinite(dense).all():
            raise ValueError(
                f"{_name(layer)}: its weights reach {W.abs().amax().item():.3g} and their quantized values exceed "
                "fp16's 65504; leave it in floating point by naming it in exclude_layer_names"
            )
        result = OnebitResult(
            dequantized_weight=_oriented(dense, module).contiguous().cpu(),
            iters=self.iters,
            use_importance_scaling=self.use_importance_scaling,
            use_balancing=self.use_balancing,
            balance_iters=self.balance_iters,
            balance_alpha=self.balance_alpha,
            a=a.cpu(),
            b=b.cpu(),
            sign=signs.to(torch.float16).mul_(2).sub_(1).cpu(),
        )
        result.quantization_time = time.perf_counter() - started
        if self.calc_quant_error:
            _measure(result, W, dense, X, hessian)
        return result

    @torch.no_grad()
    def calculate_hessian(
        self, module: nn.Module, input: tuple[Any, ...] | Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        """H = (2/N) XᵀX over the N rows of ``input``, (in, in) in ``hessian_dtype`` on the input's device.

        Args:
            module: the layer, for the width of its input.
            input: (rows, in) or (batch, sequence, in), or a tuple that starts with it.
            attention_mask: shaped as the input without its last dimension; rows where it is 0 (padding) are
                left out of XᵀX and of N. None counts every row.

        Returns:
            H; zero where no row counts, which ``quantize_layer`` takes as "nothing known".

        Raises:
            ValueError: a shape does not fit, or the activations are not finite.
        """
        layer = self.module_to_name.get(module)
        X = _rows(input, _weight(module, layer).shape[1], layer)
        if attention_mask is not None:
            shape = _first(input, layer).shape[:-1]
            if attention_mask.shape != shape:
                raise ValueError(
                    f"{_name(layer)}: attention_mask has shape {tuple(attention_mask.shape)}, expected the input's "
                    f"{tuple(shape)}"
                )
            X = X[attention_mask.reshape(-1).to(X.device) != 0]
        H = torch.zeros(X.shape[1], X.shape[1], dtype=self.hessian_dtype, device=X.device)
        accumulate_hessian(H, 0, X)
        if not torch.isfinite(H).all():
            raise ValueError(
                f"{_name(layer)}: its input holds NaN or infinite values, or values whose squares overflow "
                f"{self.hessian_dtype}; run the calibration in float32 or bfloat16"
            )
        return H

    def quantize(
        self,
        module: nn.Module,
        input: tuple[Any, ...] | Tensor | None,
        output: object = None,
        hessian: Tensor | None = None,
    ) -> None:
        """Quantize one selected layer into ``results[full name]``; also fits ``register_forward_hook``.

        As a hook it sees the batch of one forward pass, so it is meant for all calibration data in one batch;
        a later call replaces the result. To gather a Hessian over batches, use ``accumulate_hessian`` and pass
        it in.

        Args:
            module: a layer that ``setup`` selected.
            input: its input, as for ``quantize_layer``.
            output: ignored; a forward hook receives it.
            hessian: (in, in); where it is None and ``flag_hessian`` is set, it is computed from ``input``.

        Raises:
            ValueError: as ``quantize_layer``, or ``setup`` did not select the module.
        """
        if module not in self.module_to_name:
            raise ValueError(
                f"Onebit: this {type(module).__name__} is not among the {len(self.module_to_name)} layers that setup "
                "selected; call setup(model) with the model that holds it"
            )
        self.validate_params()  # before a Hessian is paid for
        if hessian is None and self.flag_hessian and input is not None:
            hessian = self.calculate_hessian(module, input)
        self.results[self.module_to_name[module]] = self.quantize_layer(module, input, hessian)

    def _selection_problems(self) -> list[str]:
        problems = []
        name: object = self.name  # ``object``: a caller's value need not be what the annotation promises
        if name is not None and not isinstance(name, str):
            problems.append(f"name must be a string or None, got {name!r}")
        count: object = self.num_layers
        if count is not None and (type(count) is not int or count < 1):
            problems.append(f"num_layers must be an integer >= 1 or None for all layers, got {count!r}")
        for key, _ in _FILTERS:
            value = getattr(self, key)
            if value is None:
                continue
            if not isinstance(value, list | tuple | set) or not all(isinstance(item, str) for item in value):
                problems.append(f"{key} must be a list of strings or None, got {value!r}")
        types: object = self.target_layer_types
        if not isinstance(types, tuple) or not types or not all(isinstance(kind, type) for kind in types):
            problems.append(f"target_layer_types must be a non-empty tuple of module classes, got {types!r}")
        return problems


def accumulate_hessian(H: Tensor, seen: int, X: Tensor) -> int:
    """Take the rows X into the running H = (2/N) XᵀX, in place; any split of the rows gives the same H.

    Args:
        H: (in, in), in the dtype and on the device to sum in; all zero when ``seen`` is 0.
        seen: how many rows H holds already.
        X: (rows, in), any float dtype.

    Returns:
        The number of rows that H holds now.
    """
    for rows in X.to(H.device).split(_ROWS_AT_A_TIME):
        if not rows.shape[0]:
            break
        total = seen + rows.shape[0]
        rows = rows.to(H.dtype)
        H.addmm_(rows.T, rows, beta=seen / total, alpha=2 / total)
        seen = total
    return seen


def _measure(result: OnebitResult, W: Tensor, dense: Tensor, X: Tensor | None, hessian: Tensor | None) -> None:
    """Fill in the error metrics of ``OnebitResult``, in fp64; W and dense are (out, in)."""
    W = W.double()
    D = W - dense.double()
    result.weight_squared_error = float(D.square().sum())
    result.mean_weight_squared_error = result.weight_squared_error / D.numel()
    result.relative_weight_squared_error = _ratio(result.weight_squared_error, float(W.square().sum()))
    if X is not None and X.shape[0]:
        error = _output_energy(X, D)
        result.output_squared_error = error
        result.mean_output_squared_error = error / (W.shape[0] * X.shape[0])
        result.relative_output_squared_error = _ratio(error, _output_energy(X, W))
    elif hessian is not None:
        H = hessian.to(W)
        error, reference = (float(((matrix @ H) * matrix).sum()) for matrix in (D, W))
        result.relative_output_squared_error = _ratio(error, reference)


def _output_energy(X: Tensor, matrix: Tensor) -> float:
    """‖X matrixᵀ‖²_F in fp64."""
    return math.fsum(float((rows.to(matrix) @ matrix.T).square().sum()) for rows in X.split(_ROWS_AT_A_TIME))


def _ratio(error: float, reference: float) -> float | None:
    return error / reference if reference > 0 else None


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"


def _oriented(matrix: Tensor, module: nn.Module) -> Tensor:
    """(out, in) to the module's own orientation and back: Conv1D stores (in, out)."""
    return matrix.T if _is_conv1d(module) else matrix


def _weight(module: nn.Module, layer: str | None) -> Tensor:
    """The module's weight as W (out, in)."""
    if not isinstance(module, nn.Linear) and not _is_conv1d(module):
        raise ValueError(
            f"{_name(layer)}: got a {type(module).__name__}, expected an nn.Linear or a Conv1D; remove its class from "
            "target_layer_types"
        )
    weight = module.weight
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise ValueError(
            f"{_name(layer)}: its weight is not a floating-point tensor (is the layer quantized already?); start from "
            "the floating-point model"
        )
    if weight.is_meta:
        raise ValueError(
            f"{_name(layer)}: its weight is on the meta device (offloaded, or never loaded), so it has no values; load "
            "the model whole into memory"
        )
    return _oriented(weight.detach(), module)


def _first(input: tuple[Any, ...] | Tensor, layer: str | None) -> Tensor:
    """The input tensor out of a hook's positional arguments."""
    X = input[0] if isinstance(input, tuple | list) and input else input
    if not isinstance(X, Tensor):
        raise ValueError(
            f"{_name(layer)}: expected its input as a tensor or as a tuple that starts with one, got "
            f"{type(X).__name__}; call the layer with a positional argument"
        )
    return X


def _rows(input: tuple[Any, ...] | Tensor, width: int, layer: str | None) -> Tensor:
    """The rows X (N, in) of a 2-D or 3-D input."""
    X = _first(input, layer)
    if X.ndim not in (2, 3) or X.shape[-1] != width or not X.is_floating_point():
        raise ValueError(
            f"{_name(layer)}: expected a floating-point input of shape (rows, {width}) or (batch, sequence, {width}), "
            f"got {X.dtype} of shape {tuple(X.shape)}"
        )
    return X.detach().reshape(-1, width)


def _check_hessian(hessian: object, W: Tensor, layer: str | None) -> None:
    width = W.shape[1]
    if not isinstance(hessian, Tensor):
        raise ValueError(f"{_name(layer)}: the Hessian must be a tensor, got {type(hessian).__name__}")
    if hessian.shape != (width, width):
        raise ValueError(
            f"{_name(layer)}: the Hessian has shape {tuple(hessian.shape)}, expected (in, in) = ({width}, {width})"
        )


def _name(layer: str | None) -> str:
    return f"layer {layer!r}" if layer else "Onebit"
