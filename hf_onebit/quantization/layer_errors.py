"""How far each packed layer's outputs are from its float layer's, on the inputs that a model gives it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_onebit.arithmetic import without_slow_products
from hf_onebit.calibration import Batch, real_tokens
from hf_onebit.modes import evaluating
from hf_onebit.nn.replace import float_weight, packed_layers

MEASURED_TOKENS = 2048
# Rows of a weight that are unpacked to float32 at a time: an output head has tens of thousands.
_ROWS_AT_ONCE = 8192

Errors = dict[str, dict[str, float | None]]


@torch.no_grad()
def layer_errors(
    model: nn.Module, floats: Mapping[str, nn.Module], batches: Sequence[Batch], run: nn.Module | None = None
) -> Errors:
    """Relative errors of packed layers: of their weights, and of their products with the inputs x̂ that reach them.

        relative_weight_error = ‖W − Q‖² / ‖W‖²        relative_output_error = Σ‖(W − Q) x̂‖² / Σ‖W x̂‖²

    x̂ are the inputs while ``run`` runs ``batches``: with the packed model itself, what the layer really gets, the
    errors of all layers before it included. Padding is left out, and so are biases. Everything is computed in float32
    from the packed tensors, so a reloaded file gives the same figures.

    Args:
        model: packed.
        floats: the float module of every layer to measure, by the packed layer's name.
        batches: model inputs, each at least ``input_ids`` (rows, length).
        run: the model that is run, with layers of the same names; None for ``model``.

    Returns:
        {layer: the two errors}; None where the denominator is 0, no row came by, or the inputs are ids (an embedding).
    """
    found = packed_layers(model)
    sums = {name: ErrorSums(floats[name], found[name]) for name in floats}
    whole: Any = model if run is None else run
    runner = _without_head(whole, floats)
    mask: Tensor | None = None

    def hook(total: ErrorSums) -> Callable[..., None]:
        return lambda _module, args: total.add(args[0], mask)

    handles = [whole.get_submodule(name).register_forward_pre_hook(hook(total)) for name, total in sums.items()]
    options = {"use_cache": False} if hasattr(getattr(runner, "config", None), "use_cache") else {}
    device = next(p.device for p in runner.parameters() if not p.is_meta)
    try:
        with evaluating(runner), without_slow_products(device):
            for batch in batches:
                mask = batch.get("attention_mask")
                runner(**{key: value.to(device) for key, value in batch.items()}, **options)
    finally:
        for handle in handles:
            handle.remove()
    return {name: total.errors() for name, total in sums.items()}


def _without_head(model: Any, names: Iterable[str]) -> Any:
    """What has to run for these layers to get their inputs: logits of 2048 tokens would take a gigabyte and more."""
    base = getattr(model, "base_model", model)
    inside = {id(module) for module in base.modules()}
    return base if all(id(model.get_submodule(name)) in inside for name in names) else model


def last_batches(batches: Sequence[Batch], tokens: int = MEASURED_TOKENS) -> list[Batch]:
    """The last sequences, as many as ``tokens`` holds; at least one.

    The presets fit layers on the first sequences and judge on the last ones, so with text enough these fitted nothing.
    """
    chosen: list[Batch] = []
    for batch in reversed(batches):
        if chosen and sum(b["input_ids"].numel() for b in chosen) + batch["input_ids"].numel() > tokens:
            break
        chosen.append(batch)
    return chosen[::-1]


def measure_records(
    model: nn.Module, floats: Mapping[str, nn.Module], batches: Sequence[Batch], records: Mapping[str, dict[str, Any]]
) -> dict[str, Any]:
    """Put the errors of a packed model's layers into their records, on the last sequences of the calibration data.

    Returns:
        for the report: ``inputs``, whose inputs these are, and how many ``tokens``.
    """
    chosen = last_batches(batches)
    for name, errors in layer_errors(model, floats, chosen).items():
        records[name] |= errors
    return {"inputs": "packed model", "tokens": sum(real_tokens(batch) for batch in chosen)}


class ErrorSums:
    """Squares of one layer's weights, products and their differences, added up in float64.

    Args:
        float_module: the layer in floating point.
        packed: the same packed.
    """

    def __init__(self, float_module: nn.Module, packed: Any) -> None:
        self.weight = float_weight(float_module)
        self.packed = packed
        self.lost = self.total = 0.0
        self.weight_lost = self.weight_total = 0.0
        for W, D in self._matrices():
            self.weight_lost += _squares(D)
            self.weight_total += _squares(W)

    def add(self, x: Tensor, mask: Tensor | None) -> None:
        """Count the inputs (..., in) of one call; ids count nothing."""
        if not x.is_floating_point():
            return
        rows = x.reshape(-1, x.shape[-1]).float()
        if mask is not None and mask.numel() == len(rows):
            rows = rows[mask.reshape(-1).bool().to(rows.device)]
        with torch.autocast(rows.device.type, enabled=False):
            for W, D in self._matrices():
                self.lost += _squares(rows @ D.t())
                self.total += _squares(rows @ W.t())

    def errors(self) -> dict[str, float | None]:
        """The two of ``layer_errors``."""
        return {
            "relative_weight_error": self.weight_lost / self.weight_total if self.weight_total else None,
            "relative_output_error": self.lost / self.total if self.total else None,
        }

    def _matrices(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(W, W − Q) in float32, some rows of the (out, in) matrices at a time."""
        Q = self.packed.dequantize()
        for W, part in zip(self.weight.split(_ROWS_AT_ONCE), Q.split(_ROWS_AT_ONCE), strict=True):
            yield W.float(), W.float() - part.to(W.device)


def _squares(matrix: Tensor) -> float:
    return float(matrix.square().sum(dtype=torch.float64))
