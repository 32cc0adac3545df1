"""What a model calls each of its blocks with, and what it makes of the last one's output."""

from __future__ import annotations

import contextlib
import functools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_onebit.arithmetic import without_slow_products
from hf_onebit.calibration import Batch
from hf_onebit.rungs.blocks import device_of, run_model
from hf_onebit.rungs.hessian_sums import HessianSum
from hf_onebit.rungs.states import Arena


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
        with without_slow_products(hidden.device):
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


# So many tensors of a shape are looked through for an equal one: sequences with padding of their own have none.
_MOST_COMPARED = 8


class _Shared:
    """Equal tensors of several calls, each kept once.

    Sequences of one length are called with the same positions and, unless they are padded, the same mask, which has as
    many entries as the length squared where the attention asks for it.
    """

    def __init__(self) -> None:
        self._kept: dict[Any, deque[Tensor]] = {}
        self._found: dict[int, tuple[Tensor, Tensor]] = {}  # of this run: a tensor, and what stands for it

    def begin(self) -> None:
        """Another run of the model. In each, most blocks are given the very same tensors, which are compared once."""
        self._found.clear()

    def __call__(self, value: Any) -> Any:
        """The value, with tensors that are there already in place of equal ones."""
        if isinstance(value, Tensor):
            if id(value) not in self._found:
                self._found[id(value)] = value, self._stand_in(value)
            return self._found[id(value)][1]
        if type(value) in (tuple, list):
            return type(value)(map(self, value))
        if type(value) is dict:
            return {key: self(item) for key, item in value.items()}
        return value

    def _stand_in(self, value: Tensor) -> Tensor:
        kept = self._kept.setdefault((value.shape, value.dtype, value.device), deque(maxlen=_MOST_COMPARED))
        equal = next((other for other in kept if torch.equal(other, value)), None)
        if equal is None:
            kept.append(value)
        return value if equal is None else equal


class _ReachedHead(Exception):
    """Ends a run whose logits nobody needs."""


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
    the blocks of the other sequences are not computed. The hidden states are kept in ``arena``; of arguments that are
    equal in several calls one is kept.

    Returns:
        the first block's hidden states per sequence, and the calls as [sequence][block].
    """
    states: list[Tensor] = []
    arena = arena or Arena()
    calls: list[list[BlockCall]] = []
    current: dict[int, BlockCall] = {}
    shared = _Shared()

    def hook(index: int) -> Callable[..., None]:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            keyword = None if args else "hidden_states"
            hidden = args[0] if args else kwargs["hidden_states"]
            if index == 0:
                states.append(arena.keep(hidden.detach().clone()))
            others = {k: shared(_without_cache(k, v)) for k, v in kwargs.items() if k != keyword}
            current[index] = BlockCall(tuple(shared(_without_cache("", a)) for a in args[1:]), others, keyword)

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
        shared.begin()
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
