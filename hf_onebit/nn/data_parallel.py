"""Gradients of packed weights under ``DistributedDataParallel``: averaged over the ranks at the end of backward.

DDP reduces what autograd knows, and passes over packed weights (``nn.binding.ignore_in_ddp``). So a packed layer that
is used within DDP's forward notes whose it is, and the first gradient that a backward pass adds to a packed weight
asks the autograd engine to call :meth:`PackedReducer.reduce` when that pass has ended: before anything clips by the
norm or steps. Under ``no_sync`` gradients add up on their rank, and the next pass that synchronizes reduces the sum, as
DDP does.

Ranks may differ in which weights had a gradient (experts that no token came to), so they agree on that first. All of
it goes through DDP's own process group, after DDP's own reductions.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hf_onebit.nn.parameter import REDUCER, MPQWeightParameter

__all__ = ["PackedReducer", "note_data_parallel", "reducer_of"]

_OWN = "_packed_reducer"
_OF_SIZE = {4: torch.float32, 8: torch.float64}  # what gradients of packed weights are


class PackedReducer:
    """Reduces the gradients of the packed weights of one ``DistributedDataParallel``.

    Making one gives every rank the words of rank 0, as DDP does with what it does not pass over. It is a collective
    call, like every :meth:`reduce`.

    Args:
        parallel: the wrapped model.

    Attributes:
        synchronizes: whether the last forward pass was outside of ``no_sync``.
    """

    def __init__(self, parallel: Any) -> None:
        self._parallel = weakref.ref(parallel)
        self.synchronizes = True
        self._asked: int | None = None
        for weight in packed_weights(parallel):
            dist.broadcast(weight.data, dist.get_global_rank(parallel.process_group, 0), parallel.process_group)

    def ask(self) -> None:
        """Have :meth:`reduce` called at the end of the backward pass that this is called in."""
        # By its number: a pass that ended with an exception never came to its callbacks.
        current = torch._C._current_graph_task_id()
        if self.synchronizes and current != self._asked:
            self._asked = current
            torch.autograd.Variable._execution_engine.queue_callback(self.reduce)

    @torch.no_grad()
    def reduce(self) -> None:
        """Average the gradients of the packed weights over all ranks; a rank without one counts as zeros."""
        parallel = self._parallel()
        if parallel is None:
            return
        group, size = parallel.process_group, dist.get_world_size(parallel.process_group)
        weights = [weight for weight in packed_weights(parallel) if weight.requires_grad]
        sizes = torch.tensor([0 if w.grad is None else w.grad.element_size() for w in weights], dtype=torch.uint8)
        sizes = sizes.to(weights[0].device)
        dist.all_reduce(sizes, dist.ReduceOp.MAX, group)
        for weight, itemsize in zip(weights, sizes.tolist(), strict=True):
            if not itemsize:
                continue
            grad = weight.grad
            if grad is None:
                shape = (weight.weight_layout().in_features, weight.shape[1])
                grad = torch.zeros(shape, dtype=_OF_SIZE[itemsize], device=weight.device)
            dist.all_reduce(grad, group=group)
            weight.grad = grad.div_(size)


def packed_weights(model: nn.Module) -> list[MPQWeightParameter]:
    """The packed weights of a model, in one order on every rank; a tied one once."""
    return [p for p in model.parameters() if isinstance(p, MPQWeightParameter) and p.is_packed]


def note_data_parallel(weights: tuple[MPQWeightParameter, ...]) -> None:
    """Tell weights in use within a ``DistributedDataParallel``'s forward whose they are; else what they know stays."""
    parallel: Any = nn.parallel.DistributedDataParallel._get_active_ddp_module()
    if parallel is None:
        return
    reducer = vars(parallel).get(_OWN)
    if reducer is None:
        reducer = vars(parallel)[_OWN] = PackedReducer(parallel)
    reducer.synchronizes = parallel.require_backward_grad_sync
    for weight in weights:
        vars(weight)[REDUCER] = weakref.ref(reducer)


def reducer_of(weight: Tensor) -> PackedReducer | None:
    """Who reduces this weight's gradients; None without ``DistributedDataParallel``, or once that is gone."""
    found = vars(weight).get(REDUCER)
    reducer: PackedReducer | None = None if found is None else found()
    return reducer
