"""A model while it is measured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    # At run time this would pull in the whole of Transformers' modelling code, for a name alone.
    from transformers import PreTrainedModel


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout and without gradients; leaves the model's mode as it was."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def input_device(model: PreTrainedModel) -> torch.device:
    """Where the ids go. With parts of a model on several devices, `model.device` may be another one."""
    embedding: Any = model.get_input_embeddings()
    device: torch.device = embedding.weight.device
    return device
