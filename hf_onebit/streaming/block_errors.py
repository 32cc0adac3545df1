"""Errors of packed layers, measured while blocks come and go; and the end of a block that the ladder is done with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_onebit.calibration import Batch, real_tokens
from hf_onebit.formats.table import TableEntry
from hf_onebit.nn.replace import set_packed
from hf_onebit.quantization.layer_errors import ErrorSums, last_batches
from hf_onebit.rungs.block_calls import BlockCall, capture, inputs_outside
from hf_onebit.rungs.blocks import one_stack
from hf_onebit.rungs.ladder import PrefixResult
from hf_onebit.streaming.output import Output


class BlockErrors:
    """Errors of packed layers on the inputs that the packed model gives them, one block in memory at a time.

    The figures of ``layer_errors.measure_records``, collected while the blocks come and go.

    Args:
        model: the float model.
        batches: calibration sequences, of which the last ones are run.
    """

    def __init__(self, model: nn.Module, batches: list[Batch]) -> None:
        self._model = model
        self._batches = last_batches(batches)
        _, self._blocks = one_stack(model)
        self._states, self._calls = capture(model, self._blocks, self._batches)

    @property
    def tokens(self) -> int:
        """Tokens that are run."""
        return sum(map(real_tokens, self._batches))

    @torch.no_grad()
    def measure(self, index: int, floats: Mapping[str, nn.Module], records: Mapping[str, dict[str, Any]]) -> None:
        """Run a block whose layers are packed, and put their errors into their records.

        Args:
            index: of the block.
            floats: the float module of each of its packed layers.
            records: of the layers.
        """
        sums = {name: ErrorSums(module, self._model.get_submodule(name)) for name, module in floats.items()}
        mask: Tensor | None = None

        def hook(total: ErrorSums) -> Callable[..., None]:
            return lambda _module, args: total.add(args[0], mask)

        handles = [self._model.get_submodule(n).register_forward_pre_hook(hook(total)) for n, total in sums.items()]
        try:
            for position, batch in enumerate(self._batches):
                mask = batch.get("attention_mask")
                call: BlockCall = self._calls[position][index]
                self._states[position] = call.run(self._blocks[index], self._states[position])
        finally:
            for handle in handles:
                handle.remove()
        for name, total in sums.items():
            records[name] |= total.errors()

    @torch.no_grad()
    def measure_outside(self, name: str, float_module: nn.Module, packed: nn.Module, record: dict[str, Any]) -> None:
        """The same of a module outside of the blocks, such as the output head, after the last block."""
        total = ErrorSums(float_module, packed)
        for x, mask in inputs_outside(self._model, self._blocks, self._batches, self._states, name):
            total.add(x, mask)
        record |= total.errors()


def put_packed(
    model: nn.Module, packed: Mapping[str, Mapping[str, Tensor]], table: Mapping[str, TableEntry]
) -> dict[str, nn.Module]:
    """Put packed layers in place; the float modules that were there."""
    floats = {name: model.get_submodule(name) for name in packed}
    for name, tensors in packed.items():
        set_packed(model, name, tensors, table[name])
    return floats


def finish_block(
    result: PrefixResult, block: str, output: Output, errors: BlockErrors, table: Mapping[str, TableEntry]
) -> None:
    """Measure a block that the ladder is done with, write it, and let go of its tensors."""
    model: nn.Module = output.disk.model
    inside = f"{block}."
    packed = {name: result.packed.pop(name) for name in list(result.packed) if name.startswith(inside)}
    vectors = {name: result.vectors.pop(name) for name in list(result.vectors) if name.startswith(inside)}
    output.disk.hold(block)
    floats = put_packed(model, packed, table)
    before = {name: model.get_parameter(name) for name in vectors}
    exact = {name: parameter.data for name, parameter in before.items()}
    try:
        for name, value in vectors.items():
            before[name].data = value.to(exact[name].device, exact[name].dtype)
        errors.measure(int(block.rpartition(".")[2]), floats, result.records)
    finally:
        for name, parameter in before.items():
            parameter.data = exact[name]
        for name, module in floats.items():
            model.set_submodule(name, module)
    for name, tensors in packed.items():
        output.add(name, tensors)
    output.add_floats(block, vectors)
