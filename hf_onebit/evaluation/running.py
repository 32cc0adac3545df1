"""A model while it is measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    # At run time this would pull in the whole of Transformers' modelling code, for a name alone.
    from transformers import PreTrainedModel


def input_device(model: PreTrainedModel) -> torch.device:
    """Where the ids go. With parts of a model on several devices, ``model.device`` may be another one."""
    embedding: Any = model.get_input_embeddings()
    device: torch.device = embedding.weight.device
    return device
