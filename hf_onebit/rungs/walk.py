"""A walk through a model, block by block, that collects the Hessian of each linear layer's inputs.

Only one block's statistics are in memory at a time, beside the hidden states of the calibration sequences.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_onebit.calibration import Batch
from hf_onebit.ranks import ALONE, Ranks
from hf_onebit.rungs.block_calls import BlockCall, capture, inputs_outside
from hf_onebit.rungs.blocks import device_of, find_blocks, in_features_of, run_model
from hf_onebit.rungs.hessian_sums import HessianSum
from hf_onebit.rungs.starved import feed_starved, is_expert
from hf_onebit.rungs.states import Arena

Statistics = dict[str, Tensor | None]


@torch.no_grad()
def walk(
    model: nn.Module,
    layers: Sequence[str],
    batches: Sequence[Batch],
    visit: Callable[[str, Statistics], None],
    head: str | None = None,
    spill: Path | None = None,
    ranks: Ranks = ALONE,
    late_head: bool = False,
) -> dict[str, int]:
    """Go through the model's blocks in order with the float activations of every sequence, one block at a time.

    Every sequence runs alone and without a key/value cache, so none can see another.

    Args:
        model: the float model. ``visit`` may replace a block's layers: the block was already run by then.
        layers: full names of the linear layers whose input statistics are wanted.
        batches: model inputs, see ``CalibrationData.batches``.
        visit: called as ``visit(block name, {layer name: Hessian or None})`` for each block that holds some of
            ``layers``, then once with ``("", ...)`` for the layers outside of the blocks, whose Hessians are None.
            Where no single stack of blocks is found, the whole model counts as one block.
        head: full name of the output head, if its input statistics are wanted too; its call of ``visit`` comes last.
        spill: folder for files to keep the hidden states in; None keeps them in memory.
        ranks: processes that each run their share of ``batches``; the first has the sums, and calls ``visit``.
        late_head: find the head's inputs at the end, from what the last block gave, and not by running the whole model
            on each sequence first: for models whose blocks are in memory one at a time.

    Returns:
        {layer: rows that it saw} of the experts that were lent others' (starved.py).
    """
    found = find_blocks(model)
    batches = [batches[position] for position in ranks.share(len(batches))]
    if found is None:
        runs = ((functools.partial(run_model, model, b), b.get("attention_mask")) for b in batches)
        statistics, starved = _collect(model, [*layers, *([head] if head else [])], runs, ranks)
        ranks.alone(lambda: visit("", statistics))
        return starved
    starved = {}
    stack_name, blocks = found
    total = None if head is None else HessianSum(in_features_of(model.get_submodule(head)))
    early = None if late_head else head
    states, calls = capture(model, blocks, batches, early, total, Arena(spill))
    device = device_of(model)
    inside: set[str] = set()
    for index, block in enumerate(blocks):
        name = f"{stack_name}.{index}"
        names = [layer for layer in layers if layer.startswith(name + ".")]
        inside.update(names)
        block_runs = _block_runs(block, states, [call[index] for call in calls], device, Arena(spill))
        masks = [b.get("attention_mask") for b in batches]
        statistics, hungry = _collect(model, names, zip(block_runs, masks, strict=True), ranks)
        starved |= hungry
        if names:
            ranks.alone(functools.partial(visit, name, statistics))
    outside = [layer for layer in layers if layer not in inside]
    if outside:
        ranks.alone(lambda: visit("", dict.fromkeys(outside)))
    if head is not None and total is not None:
        if late_head:
            for x, mask in inputs_outside(model, blocks, batches, states, head):
                total.add(x, mask)
        total.add_up(ranks, sum(ranks.gather(total.rows)), device)
        hessian = total.hessian
        ranks.alone(lambda: visit("", {head: hessian}))
    return starved


def _block_runs(
    block: nn.Module, states: list[Tensor], calls: list[BlockCall], device: torch.device, arena: Arena
) -> Iterator[Callable[[], None]]:
    """One closure a sequence, which runs the block and keeps its output as the next block's input."""

    def run(position: int) -> None:
        states[position] = arena.keep(calls[position].run(block, states[position].to(device)))

    return (functools.partial(run, position) for position in range(len(states)))


def _collect(
    model: nn.Module,
    names: Sequence[str],
    runs: Iterable[tuple[Callable[[], Any], Tensor | None]],
    ranks: Ranks,
) -> tuple[Statistics, dict[str, int]]:
    """Run everything with the named layers watched; their Hessians, and the rows of experts that saw too few."""
    sums: dict[str, HessianSum] = {}
    mask: Tensor | None = None
    inputs: list[tuple[Tensor, HessianSum]] = []  # of the current run: layers that read one tensor share one sum
    hooks = []

    def watch(name: str) -> Callable[..., None]:
        def before(_: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0]
            shared = next((total for tensor, total in inputs if tensor is x), None)
            if shared is None:
                sums[name].add(x, None if is_expert(name) else mask)  # an expert's rows are some of the tokens
                inputs.append((x, sums[name]))
            else:
                sums[name] = shared

        return before

    for name in names:
        module = model.get_submodule(name)
        sums[name] = HessianSum(in_features_of(module))
        hooks.append(module.register_forward_pre_hook(watch(name)))
    try:
        for run, mask in runs:  # noqa: B007  the hooks above read `mask`
            inputs.clear()
            run()
    finally:
        for handle in hooks:
            handle.remove()
    if ranks.size > 1:
        _add_up(sums, ranks, device_of(model))
        if not ranks.is_first:
            return dict.fromkeys(names), {}
    starved = feed_starved(model, sums)
    return {name: total.hessian for name, total in sums.items()}, starved


def _add_up(sums: dict[str, HessianSum], ranks: Ranks, device: torch.device) -> None:
    """Add the sums of all processes; layers that share one in any process that saw rows of theirs share it here."""
    owners = {name: next(other for other in sums if sums[other] is total) for name, total in sums.items()}
    seen = ranks.gather({name: [owners[name], total.rows] for name, total in sums.items()})
    for name in list(sums):
        owner = next((said[name][0] for said in seen if said[name][1]), name)
        if owner == name:
            sums[name].add_up(ranks, sum(said[name][1] for said in seen), device)
        else:
            sums[name] = sums[owner]
