"""Memory of a training step by the allocator's own count, in bytes for each weight of the linear layers."""

import copy
from typing import Any

import torch

from hf_onebit.bench.memory import allocated
from hf_onebit.nn import packed_layers

from .contenders import contender
from .protocol import Study
from .rows import Row


def measure_memory(row: Row, study: Study) -> dict[str, Any]:
    """Bytes per weight: ``model`` as it is held, ``states`` that the first step leaves, ``step`` the most beyond both.

    Activations are computed again in backward, as is usual where memory counts. Embeddings and norms are frozen;
    embedding and head, which are the same in all rows, are not counted.

    Returns:
        those three, their sum ``peak``, ``training`` (what is there between steps: the first two), ``gradients`` (what
        backward leaves), ``weights``.
    """
    made = contender(row, study, row.rates[0], study.blocks)
    weights = linear_weights(made.inner)
    made.inner.activation_checkpointing_enable({"use_reentrant": False})
    made.inner.enable_input_require_grads()
    model = bytes_of(made.inner) - bytes_of([made.inner.get_input_embeddings(), made.inner.get_output_embeddings()])
    ids = study.windows["train"][0][None]

    def backward() -> None:
        with made.precision():
            loss = made.model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()

    def step() -> None:
        backward()
        made.optimizer.step()
        made.optimizer.zero_grad()

    states = allocated(step).left
    within = allocated(step)
    gradients = allocated(backward).left
    found = {"model": model, "states": states, "step": within.peak, "peak": model + states + within.peak,
             "training": model + states, "gradients": gradients}  # fmt: skip
    return {**{name: value / weights for name, value in found.items()}, "weights": weights}


def bytes_of(modules: Any) -> int:
    """What the allocator gives out for a copy of them; a tensor that two of them share counts once."""
    kept: list[Any] = []
    return allocated(lambda: kept.append(copy.deepcopy(modules))).left


def linear_weights(model: torch.nn.Module) -> int:
    """Weights of the layers in the blocks, packed or not; adapters are no part of them."""
    packed = {id(layer): layer for layer in packed_layers(model).values()}
    head = model.get_output_embeddings()  # type: ignore[operator]
    count = 0
    for name, layer in model.named_modules():
        if "lora_" in name or layer is head or hasattr(layer, "base_layer"):
            continue
        if id(layer) in packed or type(layer).__name__ in ("Linear", "Linear4bit"):
            count += layer.in_features * layer.out_features  # type: ignore[operator]
    return count
