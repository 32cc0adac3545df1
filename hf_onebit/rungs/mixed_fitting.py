"""Both methods in one model, layer by layer, on the quantized prefix: what ``quantize_on_prefix`` asks of a method."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from hf_onebit.algorithms.blockwise import BlockOptions, BlockResult
from hf_onebit.formats.table import TableEntry
from hf_onebit.rungs.fitting import Fitted, LayerMethod, TunedLayers
from hf_onebit.rungs.group_fitting import GroupMethod
from hf_onebit.rungs.ladder import SignMethod
from hf_onebit.rungs.prefix import PrefixStatistics, QuantizedBlock
from hf_onebit.rungs.tuning import layer_of

# Recipes of group quantization name the rate of codes; signs move about so many times as fast (recipes.py).
_SIGN_STEPS = 30.0


class MixedMethod:
    """Fits each layer by the method of its entry; ``fitting.LayerMethod``.

    A block that holds both is tuned twice: its codes while the signs stay, then its signs.

    Args:
        entries: how each layer is packed.
        rounds: of codes or signs and of their scales.
        tunes: keep what tuning a block needs.
        keeps: give back, when a block ends, margins of signs and where codes would like to be.
    """

    def __init__(
        self, entries: Mapping[str, TableEntry], rounds: int = 2, tunes: bool = True, keeps: bool = False
    ) -> None:
        planes = {name: entry.planes for name, entry in entries.items() if entry.method == "onebit"}
        self._planes = planes
        self._groups = GroupMethod(entries, rounds, tunes, keeps)
        self._signs = SignMethod(planes, rounds, tunes, keep_margins=keeps)
        self._used: set[str] = set()  # in the block at hand

    def begin_stage(self) -> None:
        self._groups.begin_stage()
        self._signs.begin_stage()

    def fit(self, name: str, W: Tensor, statistics: PrefixStatistics | None) -> Fitted:
        self._used.add("signs" if name in self._planes else "groups")
        fitted = self._of(name).fit(name, W, statistics)
        return replace(fitted, sizes={"method": "onebit", **fitted.sizes}) if name in self._planes else fitted

    def tune(self, view: QuantizedBlock, options: BlockOptions, dtype: torch.dtype) -> TunedLayers:
        for_signs = replace(options, sign_rate=options.sign_rate * _SIGN_STEPS)
        if self._used == {"signs"}:
            return self._signs.tune(view, for_signs, dtype)
        codes = self._groups.tune(view, options, dtype)
        if "signs" not in self._used:
            return codes
        with _in_place(view, codes):
            signs = self._signs.tune(view, for_signs, dtype)
        log = [*codes.result.log, *signs.result.log]
        flipped = max(codes.result.flipped, signs.result.flipped)
        epoch = codes.result.best_epoch + signs.result.best_epoch
        result = BlockResult(codes.result.start, signs.result.best, epoch, flipped, log)
        return TunedLayers({**codes.layers, **signs.layers}, {**codes.vectors, **signs.vectors}, result)

    def dense(self, name: str, tensors: dict[str, Tensor], in_features: int) -> Tensor:
        return self._of(name).dense(name, tensors, in_features)

    def end_block(self) -> dict[str, Tensor]:
        self._used.clear()
        return {**self._groups.end_block(), **self._signs.end_block()}

    def _of(self, name: str) -> LayerMethod:
        return self._signs if name in self._planes else self._groups


@contextlib.contextmanager
def _in_place(view: QuantizedBlock, tuned: TunedLayers) -> Iterator[None]:
    """The block with what a tuning found; as it was when this ends."""
    values: list[tuple[nn.Parameter, Tensor]] = []
    for name, (_, Q) in tuned.layers.items():
        layer = layer_of(view, name)
        assert isinstance(layer.weight, nn.Parameter)
        values.append((layer.weight, (Q.t() if type(layer).__name__ == "Conv1D" else Q).contiguous()))
    for name, vector in tuned.vectors.items():
        values.append((view.module.get_parameter(name.removeprefix(view.name + ".")), vector))
    before = [(parameter, parameter.data) for parameter, _ in values]
    try:
        for parameter, value in values:
            parameter.data = value.to(parameter.device, parameter.dtype)
        yield
    finally:
        for parameter, data in before:
            parameter.data = data
