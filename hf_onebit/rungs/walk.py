"""A walk through a model, block by block, that collects the Hessian of each linear layer's inputs.

Only one block's statistics are in memory at a time, beside the hidden states of the calibration sequences.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_onebit.calibration import Batch
from hf_onebit.ranks import ALONE, Ranks
from hf_onebit.rungs.starved import feed_starved, is_expert
from hf_onebit.rungs.states import Arena


class HessianSum:
    """H = (2/N) Σ x xᵀ over the rows x that a linear layer was given, summed as they stream by.

    Args:
        in_features: length of a row.
    """

    def __init__(self, in_features: int) -> None:
        self.in_features = in_features
        self.rows = 0
        self.lent = 0  # rows of other layers (starved.py)
        self._sum: Tensor | None = None  # Σ x xᵀ, float32 (in_features, in_features)

    def add(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Count activations (..., in_features); rows whose ``mask`` (...) is 0 are padding and stay out."""
        rows = x.detach().reshape(-1, self.in_features).float()
        if mask is not None and mask.numel() == rows.shape[0]:
            rows = rows[mask.reshape(-1).bool().to(rows.device)]
        product = rows.t() @ rows
        self._sum = product if self._sum is None else self._sum.add_(product)
        self.rows += rows.shape[0]

    @property
    def hessian(self) -> Tensor | None:
        """(in_features, in_features) float32, or None where no row came by."""
        rows = self.rows + self.lent
        return None if self._sum is None or rows == 0 else self._sum * (2.0 / rows)

    def total(self) -> Tensor | None:
        """Σ x xᵀ."""
        return self._sum

    def add_up(self, ranks: Ranks, rows: int, device: torch.device) -> None:
        """Add what other processes saw, ``rows`` with this one's; on the first of them."""
        if rows:
            own = self._sum
            if own is None:
                own = torch.zeros(self.in_features, self.in_features, device=device)
            self._sum, self.rows = ranks.sum_on_first(own), rows

    def lend(self, moments: Tensor, rows: int) -> None:
        """Add what other layers saw."""
        self._sum = moments if self._sum is None else self._sum + moments
        self.lent += rows


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList] | None:
    """The stack of decoder or encoder blocks: the ``ModuleList`` of alike modules with the most parameters.

    Of multimodal models, the language part's.

    Returns:
        (name, blocks), or None where a model has no such list, or more than one stack (encoder-decoder models).
    """
    stacks: list[tuple[str, nn.ModuleList]] = []
    for name, module in model.named_modules():
        inside_another = any(name.startswith(other + ".") for other, _ in stacks)
        alike = isinstance(module, nn.ModuleList) and len(module) > 0 and len({type(block) for block in module}) == 1
        if alike and not inside_another:
            assert isinstance(module, nn.ModuleList)
            stacks.append((name, module))
    size = {name: sum(p.numel() for p in stack.parameters()) for name, stack in stacks}
    large = [(name, stack) for name, stack in stacks if size[name] * 5 > max(size.values())]
    if len(large) > 1:
        text = _language_part(model)
        large = [(name, stack) for name, stack in large if text is not None and name.startswith(f"{text}.")]
    return large[0] if len(large) == 1 else None


def _language_part(model: nn.Module) -> str | None:
    """Name of the part of a multimodal model that reads text; None of any other model."""
    config: Any = getattr(model, "config", None)
    composite = hasattr(config, "get_text_config") and config.get_text_config() is not config
    get: Any = getattr(model, "get_decoder", None)
    if not composite or getattr(config, "is_encoder_decoder", False) or get is None:
        return None
    part = get()
    return next((name for name, module in model.named_modules() if name and module is part), None)


def one_stack(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """``find_blocks`` where a preset cannot do without.

    Raises:
        ValueError: the model has no single stack of blocks.
    """
    found = find_blocks(model)
    if found is None:
        raise ValueError(
            f"{type(model).__name__} has no single stack of blocks to walk through (it has an encoder and a decoder, "
            "or several of one size): use preset='closed' for it (--preset closed), which takes text too"
        )
    return found


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


@dataclass(frozen=True)
class BlockCall:
    """How the model calls one block: the arguments after the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    hidden_keyword: str | None  # name of the hidden states where they are passed by keyword

    def __eq__(self, other: object) -> bool:
        """Whether the block is called with equal values."""
        if not isinstance(other, BlockCall) or self.hidden_keyword != other.hidden_keyword:
            return False
        return _equal(self.args, other.args) and _equal(self.kwargs, other.kwargs)

    __hash__ = None  # type: ignore[assignment]

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The block's hidden states for these ones."""
        if self.hidden_keyword is None:
            output = block(hidden, *self.args, **self.kwargs)
        else:
            output = block(**{self.hidden_keyword: hidden}, **self.kwargs)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, (tuple, list)):
        return type(one) is type(other) and len(one) == len(other) and all(map(_equal, one, other))
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(_equal(one[k], other[k]) for k in one)
    return type(one) is type(other) and bool(one == other)


class _ReachedHead(Exception):
    """Ends a run whose logits nobody needs."""


def in_features_of(module: nn.Module) -> int:
    """Inputs of a linear layer."""
    # GPT-2's Conv1D keeps (in, out) under other names.
    weight = module.weight
    assert isinstance(weight, Tensor)
    return int(getattr(module, "in_features", weight.shape[0]))


def capture(
    model: nn.Module,
    blocks: nn.ModuleList,
    batches: Sequence[Batch],
    head: str | None = None,
    head_inputs: HessianSum | None = None,
    arena: Arena | None = None,
) -> tuple[list[Tensor], list[list[BlockCall]]]:
    """Run each sequence once to see what every block is called with (masks and positions may differ between blocks).

    The inputs of the output head, if it is named, are added to ``head_inputs``; each run ends there, before the logits.
    Where the head is not asked for and the first sequence shows that calls do not depend on what the blocks compute,
    the blocks of the other sequences are not computed. The hidden states are kept in ``arena``.

    Returns:
        the first block's hidden states per sequence, and the calls as [sequence][block].
    """
    states: list[Tensor] = []
    arena = arena or Arena()
    calls: list[list[BlockCall]] = []
    current: dict[int, BlockCall] = {}

    def hook(index: int) -> Callable[..., None]:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            keyword = None if args else "hidden_states"
            hidden = args[0] if args else kwargs["hidden_states"]
            if index == 0:
                states.append(arena.keep(hidden.detach().clone()))
            others = {k: _without_cache(k, v) for k, v in kwargs.items() if k != keyword}
            current[index] = BlockCall(tuple(_without_cache("", a) for a in args[1:]), others, keyword)

        return before

    hooks = [block.register_forward_pre_hook(hook(i), with_kwargs=True) for i, block in enumerate(blocks)]
    # Without the output head, whose logits nobody needs, or up to it.
    body = getattr(model, "base_model", model) if head is None else model
    mask: Tensor | None = None

    def stop_at_head(_: nn.Module, args: tuple[Any, ...]) -> None:
        assert head_inputs is not None
        x = args[0]
        # Some models hand over the last positions alone, which the mask does not fit.
        head_inputs.add(x, mask if mask is not None and mask.shape == x.shape[:-1] else None)
        raise _ReachedHead

    if head is not None:
        hooks.append(model.get_submodule(head).register_forward_pre_hook(stop_at_head))

    def run(batch: Batch) -> None:
        nonlocal mask
        current.clear()
        mask = batch.get("attention_mask")
        with contextlib.suppress(_ReachedHead):
            run_model(body, batch)

    idle = contextlib.ExitStack()
    try:
        for batch in batches:
            run(batch)
            if not calls and head is None and len(batches) > 1 and len(current) == len(blocks):
                # See whether idle blocks would have been called alike.
                computed = dict(current)
                idle.enter_context(_idle(blocks))
                failed = True
                with contextlib.suppress(RuntimeError, TypeError, ValueError, AttributeError, IndexError):
                    run(batch)
                    failed = False
                del states[1:]
                if failed or current.keys() != computed.keys() or any(computed[i] != current[i] for i in computed):
                    idle.close()
                current.update(computed)
            if len(current) != len(blocks) or len(states) != len(calls) + 1:
                raise RuntimeError(
                    f"Expected every block of {type(model).__name__} to run once per sequence, but {len(current)} of "
                    f"{len(blocks)} ran. Quantize without calibration data instead (preset='closed' and "
                    "dataset=None; --preset closed)."
                )
            calls.append([current[i] for i in range(len(blocks))])
    finally:
        idle.close()
        for handle in hooks:
            handle.remove()
    return states, calls


@contextlib.contextmanager
def _idle(blocks: nn.ModuleList) -> Iterator[None]:
    """Blocks that hand on their hidden states as they are."""

    def hand_on(*args: Any, **kwargs: Any) -> Any:
        return args[0] if args else kwargs["hidden_states"]

    own = [block.__dict__.get("forward") for block in blocks]
    for block in blocks:
        block.forward = hand_on
    try:
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward


def _without_cache(key: str, value: Any) -> Any:
    """Key/value caches must not travel from one sequence to the next."""
    if key in ("past_key_value", "past_key_values", "layer_past", "cache_params") or hasattr(value, "get_seq_length"):
        return None
    return False if key == "use_cache" else value


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


def device_of(model: nn.Module) -> torch.device:
    """Where a model's weights are, or those of them that are anywhere (disk_model.py)."""
    return next(p.device for p in model.parameters() if not p.is_meta)


@torch.no_grad()
def inputs_outside(
    model: nn.Module, blocks: nn.ModuleList, batches: Sequence[Batch], states: Sequence[Tensor], name: str
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """What a module outside of the blocks is given, and which rows of it are no padding, without running the blocks.

    Args:
        model: runs without its blocks.
        blocks: its stack.
        batches: model inputs.
        states: behind the last block, one tensor (1, length, hidden) a sequence.
        name: of the module, such as the output head.
    """
    found: list[Tensor] = []

    def stop(_: nn.Module, args: tuple[Any, ...]) -> None:
        found.append(args[0].detach())
        raise _ReachedHead

    for batch, state in zip(batches, states, strict=True):
        found.clear()
        handle = model.get_submodule(name).register_forward_pre_hook(stop)
        try:
            with _idle(blocks), contextlib.suppress(_ReachedHead):
                blocks[-1].forward = functools.partial(_give, state.to(device_of(model)))
                run_model(model, batch)
        finally:
            handle.remove()
        mask = batch.get("attention_mask")
        for x in found:  # Some models hand over the last positions alone, which the mask does not fit.
            yield x, mask if mask is not None and mask.shape == x.shape[:-1] else None


def _give(state: Tensor, *_: Any, **__: Any) -> Tensor:
    return state


def run_model(model: nn.Module, batch: Batch) -> Any:
    """The model's output for one sequence, without a key/value cache; an encoder-decoder reads it on both sides."""
    device = device_of(model)
    inputs = {key: value.to(device) for key, value in batch.items()}
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) and "decoder_input_ids" not in inputs:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    if hasattr(getattr(model, "config", None), "use_cache"):
        inputs["use_cache"] = False  # type: ignore[assignment]
    return model(**inputs)
