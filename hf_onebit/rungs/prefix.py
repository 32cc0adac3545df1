"""A walk through a model whose blocks are quantized on the way: each layer meets what the layers before left it.

Two streams of hidden states go through the blocks. The float stream shows what each layer used to see; the quantized
one, what it sees now. Layers that read one tensor (q, k and v; gate and up) form a stage; the stages of a block are
quantized in the order in which they run, and the statistics of the next are collected after that.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_onebit.calibration import Batch
from hf_onebit.ranks import ALONE, Ranks
from hf_onebit.rungs.block_calls import BlockCall, capture
from hf_onebit.rungs.blocks import device_of, in_features_of, one_stack
from hf_onebit.rungs.starved import feed_starved, is_expert
from hf_onebit.rungs.states import Arena


@dataclass(eq=False)
class PrefixStatistics:
    """Second moments of one layer's inputs: x̂ from the quantized prefix, x from the float one.

    Attributes:
        hessian: Σ x̂ x̂ᵀ (in, in) float32 over the rows to fit, or None where no row came by.
        cross: Σ x x̂ᵀ (in, in) float32, or None where the streams' rows do not correspond (experts, which the streams
            may route differently).
        heldout_hessian, heldout_cross: the same over the held-out sequences.
        rows: how many rows were fitted.
        lent: rows of other layers in ``hessian`` (starved.py); what is held out is none then.
    """

    hessian: Tensor | None = None
    cross: Tensor | None = None
    heldout_hessian: Tensor | None = None
    heldout_cross: Tensor | None = None
    rows: int = 0
    lent: int = 0

    def total(self) -> Tensor | None:
        """Σ x̂ x̂ᵀ."""
        return self.hessian

    def lend(self, moments: Tensor, rows: int) -> None:
        """Add what other layers saw. So few rows of its own are no judge of anything: none are held out."""
        self.hessian = moments if self.hessian is None else self.hessian + moments
        self.cross = self.heldout_hessian = self.heldout_cross = None
        self.lent += rows

    def add(self, x_hat: Tensor, x: Tensor | None, heldout: bool) -> None:
        """Count rows (n, in) of the quantized stream and, where they correspond, of the float one."""
        x_hat = x_hat.float()
        with torch.autocast(x_hat.device.type, enabled=False):  # the block around this may run in bfloat16
            product = x_hat.t() @ x_hat
            crossed = None if x is None or x.shape != x_hat.shape else x.to(x_hat.device).float().t() @ x_hat
        if heldout:
            first = self.heldout_hessian is None
            self.heldout_hessian = product if self.heldout_hessian is None else self.heldout_hessian.add_(product)
            self.heldout_cross = _added(self.heldout_cross, crossed, first)
        else:
            first = self.hessian is None
            self.hessian = product if self.hessian is None else self.hessian.add_(product)
            self.cross = _added(self.cross, crossed, first)
            self.rows += len(x_hat)

    def add_up(self, ranks: Ranks, in_features: int, device: torch.device) -> None:
        """Add what other processes saw; on the first of them. Rows that do not correspond in one spoil the sum."""
        pairs = [(self.hessian, self.cross), (self.heldout_hessian, self.heldout_cross)]
        said = ranks.gather([self.rows, *([H is not None, C is not None] for H, C in pairs)])
        self.rows = sum(rows for rows, *_ in said)
        totals: list[Tensor | None] = []
        for number, pair in enumerate(pairs, 1):
            seen = [each[number] for each in said if each[number][0]]
            for tensor, wanted in zip(pair, (bool(seen), bool(seen) and all(both[1] for both in seen)), strict=True):
                own = torch.zeros(in_features, in_features, device=device) if tensor is None else tensor
                totals.append(ranks.sum_on_first(own) if wanted else None)
        self.hessian, self.cross, self.heldout_hessian, self.heldout_cross = totals


def _added(total: Tensor | None, part: Tensor | None, first: bool) -> Tensor | None:
    if part is None or (total is None and not first):
        return None  # one sequence whose rows do not correspond spoils the sum
    return part if total is None else total.add_(part)


@dataclass
class Depth:
    """How far the quantized stream has drifted after a block: ‖x − x̂‖² / ‖x‖² over all tokens."""

    block: str
    relative_error: float = 0.0


Visit = Callable[[dict[str, PrefixStatistics | None]], None]


@dataclass(frozen=True)
class QuantizedBlock:
    """A block whose stages are all quantized, and what it has to reproduce.

    Attributes:
        name: full name of the block.
        module: the block, with quantized weights in place.
        inputs: hidden states of the quantized stream in front of it, one tensor (1, length, hidden) a sequence.
        targets: hidden states of the float stream behind it, as ``inputs``.
        float_inputs: hidden states of the float stream in front of it.
        heldout: positions of the sequences that are counted apart.
        run: (position, hidden states) -> hidden states behind the block as it is now; differentiable where gradients
            are on.
        rows: (hidden states, position) -> (rows, hidden) without padding.
    """

    name: str
    module: nn.Module
    inputs: Sequence[Tensor]
    targets: Sequence[Tensor]
    float_inputs: Sequence[Tensor]
    heldout: Collection[int]
    run: Callable[[int, Tensor], Tensor]
    rows: Callable[[Tensor, int], Tensor]


@torch.no_grad()
def walk_prefix(
    model: nn.Module,
    layers: Sequence[str],
    batches: Sequence[Batch],
    visit: Visit,
    *,
    heldout: Collection[int] = (),
    arithmetic: torch.dtype | None = None,
    finish: Callable[[QuantizedBlock], None] | None = None,
    restore: Callable[[str], Callable[[], None] | None] = lambda name: None,
    leave: Callable[[str], None] = lambda name: None,
    spill: Path | None = None,
    ranks: Ranks = ALONE,
    collects: bool = True,
) -> list[Depth]:
    """Go through the blocks in order, giving ``visit`` the statistics of one stage after the other.

    Every sequence runs alone and without a key/value cache, so none can see another. In memory are, of all sequences,
    up to three copies of the states and, in bfloat16, one block's float inputs. The three are both streams' and, while
    a stream goes through a block, what comes out of it; or, until ``finish`` has returned, what the float stream was in
    front of the block.

    Args:
        model: the float model, with one stack of blocks (``find_blocks``).
        layers: full names of the linear layers to quantize.
        batches: model inputs, see ``CalibrationData.batches``.
        visit: called with {layer name: statistics} for each stage, and once with {name: None} for the layers outside of
            the blocks. It must put the quantized weights in place before it returns.
        heldout: positions in ``batches`` that are counted apart.
        arithmetic: dtype for the products inside of blocks (autocast), or None for the model's own.
        finish: called with each block after its last stage; may change the block's parameters.
        restore: called with each block's name before it runs; where the block was quantized before, it returns what
            puts its quantized parameters in place. There are no stages and no ``finish`` then.
        leave: called with each block's name when nothing needs its quantized parameters any more.
        spill: folder for files to keep the hidden states in (``states.Arena``); None keeps them in memory.
        ranks: processes that each run their share of ``batches``. All of them call ``visit``, ``finish``, ``restore``
            and ``leave``; the first has the sums.
        collects: whether ``finish`` on the first process needs the states of all sequences, not of its share alone.

    Returns:
        the drift after each block.

    Raises:
        ValueError: the model has no single stack of blocks.
    """
    stack_name, blocks = one_stack(model)
    mine, everything = ranks.share(len(batches)), range(len(batches))
    # Whoever tunes a block runs it on all sequences.
    called = everything if collects and ranks.is_first else mine
    states, calls = capture(model, blocks, [batches[position] for position in called], arena=Arena(spill))
    states = [state for position, state in zip(called, states, strict=True) if position in mine]
    arena = Arena(spill)
    drifted = [arena.keep(state.clone()) for state in states]
    device = device_of(model)
    masks = [batches[position].get("attention_mask") for position in called]
    own = [index for index, position in enumerate(called) if position in mine]
    judges = {index for index, position in enumerate(mine) if position in heldout}
    inside: set[str] = set()
    depths = []
    for index, block in enumerate(blocks):
        name = f"{stack_name}.{index}"
        names = [layer for layer in layers if layer.startswith(name + ".")]
        inside.update(names)
        whole = _Runner(block, [call[index] for call in calls], masks, device, arithmetic)
        runner = whole.restricted(own)
        place = restore(name) if names else None
        finishing = finish if names and place is None else None
        before = states if finishing is not None else []  # freed behind the block where nobody asks for it
        stages, inputs, states = _float_pass(model, runner, [] if place else names, states, spill, ranks)
        if place is not None:
            place()
        for stage in stages:
            visit(_quantized_pass(model, runner, stage, drifted, inputs, judges, ranks))
            for layer in stage.layers:
                inputs.pop(layer, None)
        if finishing is not None:
            view = QuantizedBlock(name, block, drifted, states, before, judges, runner.run, runner.rows)
            finishing(_collected(view, whole, heldout, ranks, spill) if collects else view)
            del view
        del before
        arena = Arena(spill)
        drifted = [arena.keep(runner.run(position, hidden)) for position, hidden in enumerate(drifted)]
        leave(name)
        depths.append(Depth(name, _drift(states, drifted, ranks)))
    outside = [layer for layer in layers if layer not in inside]
    if outside:
        visit(dict.fromkeys(outside))
    return depths


def _collected(
    view: QuantizedBlock, runner: _Runner, heldout: Collection[int], ranks: Ranks, spill: Path | None
) -> QuantizedBlock:
    """A view of all sequences, on the first process; elsewhere one of none."""
    if ranks.size == 1:
        return view
    arena, count = Arena(spill), len(runner.calls) if ranks.is_first else 0

    def whole(states: Sequence[Tensor]) -> list[Tensor]:
        return [arena.keep(state) for state in ranks.collect(states, count)]

    return replace(
        view,
        inputs=whole(view.inputs),
        targets=whole(view.targets),
        float_inputs=whole(view.float_inputs),
        heldout=heldout,
        run=runner.run,
        rows=runner.rows,
    )


@dataclass
class _Stage:
    """Layers quantized together: {layer: the one of them whose input stands for its own}."""

    layers: dict[str, str] = field(default_factory=dict)

    @property
    def readers(self) -> list[str]:
        """The layers whose inputs are watched."""
        return list(dict.fromkeys(self.layers.values()))


class _Stop(Exception):
    """Raised by a hook once a block has shown what was asked for."""


@dataclass(frozen=True)
class _Runner:
    """Runs one block on one sequence."""

    block: nn.Module
    calls: list[BlockCall]
    masks: list[Tensor | None]
    device: torch.device
    arithmetic: torch.dtype | None

    def restricted(self, positions: Sequence[int]) -> _Runner:
        """The same on some of the sequences."""
        calls, masks = ([values[position] for position in positions] for values in (self.calls, self.masks))
        return _Runner(self.block, calls, masks, self.device, self.arithmetic)  # type: ignore[arg-type]

    def run(self, position: int, hidden: Tensor) -> Tensor:
        with self._precision():
            output = self.calls[position].run(self.block, hidden.to(self.device))
        return output.to(hidden.dtype)

    def rows(self, x: Tensor, position: int) -> Tensor:
        """(..., in) -> (n, in) without padding."""
        rows, mask = x.reshape(-1, x.shape[-1]), self.masks[position]
        return rows if mask is None or mask.numel() != len(rows) else rows[mask.reshape(-1).bool().to(rows.device)]

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        if self.arithmetic is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.arithmetic)


def _float_pass(
    model: nn.Module, runner: _Runner, names: Sequence[str], states: list[Tensor], spill: Path | None, ranks: Ranks
) -> tuple[list[_Stage], dict[str, list[Tensor | None]], list[Tensor]]:
    """Run the float block on every sequence; its stages, the inputs of their readers, and its outputs."""
    reader_of: dict[str, str] = {}
    inputs: dict[str, list[Tensor | None]] = {}
    seen: list[tuple[Tensor, str]] = []
    arenas: dict[str, Arena] = {}  # one each, so that a stage's inputs go when it is done
    position = 0

    def before(name: str, x: Tensor) -> None:
        owner = next((reader for tensor, reader in seen if tensor is x), name)
        if owner == name:
            seen.append((x, name))
            column = inputs.setdefault(name, [None] * len(states))
            # A layer that runs twice in one pass has more rows than one tensor shows.
            first = column[position] is None
            rows = runner.rows(x, position).to(torch.bfloat16) if first and not is_expert(name) else None
            column[position] = None if rows is None else arenas.setdefault(name, Arena(spill)).keep(rows)
        if reader_of.setdefault(name, owner) != owner:
            reader_of[name] = name

    outputs = []
    arena = Arena(spill)
    with _watched(model, names, before):
        for position, hidden in enumerate(states):
            seen.clear()
            outputs.append(arena.keep(runner.run(position, hidden)))
    return _stages(names, _merged(ranks.gather(reader_of))), inputs, outputs


def _merged(seen: Sequence[dict[str, str]]) -> dict[str, str]:
    """Whose input each layer reads, from what each process saw; where they differ, its own."""
    merged: dict[str, str] = {}
    for reader_of in seen:
        for name, reader in reader_of.items():
            if merged.setdefault(name, reader) != reader:
                merged[name] = name
    return merged


def _stages(names: Sequence[str], reader_of: dict[str, str]) -> list[_Stage]:
    """In the order of the first call. Experts, whose names differ by a number only, share a stage."""
    stages: dict[str, _Stage] = {}
    of_kind: dict[str, _Stage] = {}
    for name, reader in reader_of.items():
        stage = stages.setdefault(_kind(reader), _Stage())
        stage.layers[name] = reader
        of_kind.setdefault(_kind(name), stage)
    silent = {}
    for name in names:
        if name in reader_of:
            continue
        if is_expert(name) and _kind(name) in of_kind:  # no token chose it: it is lent what the others see
            of_kind[_kind(name)].layers[name] = name
        else:
            silent[name] = name
    return [*stages.values(), *([_Stage(silent)] if silent else [])]


def _kind(name: str) -> str:
    return re.sub(r"\.\d+\.", ".N.", name.partition(".layers.")[2] or name)


def _quantized_pass(
    model: nn.Module,
    runner: _Runner,
    stage: _Stage,
    states: list[Tensor],
    inputs: dict[str, list[Tensor | None]],
    heldout: Collection[int],
    ranks: Ranks,
) -> dict[str, PrefixStatistics | None]:
    """Run the block, as far as it is quantized, until the stage's inputs were seen."""
    totals = {reader: PrefixStatistics() for reader in stage.readers}
    position = 0

    def before(name: str, x: Tensor) -> None:
        column = inputs.get(name)
        rows = x.reshape(-1, x.shape[-1]) if is_expert(name) else runner.rows(x, position)
        totals[name].add(rows, None if column is None else column[position], position in heldout)
        if len(totals) == 1:
            raise _Stop

    with _watched(model, stage.readers, before):
        for position, hidden in enumerate(states):
            with contextlib.suppress(_Stop):
                runner.run(position, hidden)
    if ranks.size > 1:
        for reader, total in totals.items():
            total.add_up(ranks, in_features_of(model.get_submodule(reader)), runner.device)
        if not ranks.is_first:
            return dict.fromkeys(stage.layers)
    feed_starved(model, {layer: totals[reader] for layer, reader in stage.layers.items()})
    found = {reader: total if total.hessian is not None else None for reader, total in totals.items()}
    return {layer: found[reader] for layer, reader in stage.layers.items()}


@contextlib.contextmanager
def _watched(model: nn.Module, names: Sequence[str], before: Callable[[str, Tensor], None]) -> Iterator[None]:
    def hook(name: str) -> Callable[..., None]:
        return lambda _module, args: before(name, args[0])

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _drift(states: Sequence[Tensor], drifted: Sequence[Tensor], ranks: Ranks) -> float:
    error = sum(float((x.float() - y.float()).square().sum()) for x, y in zip(states, drifted, strict=True))
    size = sum(float(x.float().square().sum()) for x in states)
    error, size = map(sum, zip(*ranks.gather([error, size]), strict=True))
    return error / size if size else 0.0
