"""A language model in two, where that is exact: what is in front of its output head, and the head's matrix.

The product with the head is then done a few rows at a time, and nothing of all rows has the vocabulary's size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hf_onebit.algorithms.distill import Features, Pair
from hf_onebit.arithmetic import without_slow_products

Batch = dict[str, Tensor]


def pair(student: Any, teacher: Any, probe: Batch) -> Pair:
    """Split both models in front of their heads, where that is exact.

    A model whose logits are more than a product with its output embedding (capped, scaled, biased) gives its logits
    instead, which takes more memory.

    Args:
        student, teacher: causal language models of Transformers with one vocabulary.
        probe: a batch to compare on; its mask, if it has one, does not matter.
    """
    student_features, student_head = _split(student, probe)
    teacher_features, teacher_head = _split(teacher, probe)
    return Pair(student_features, teacher_features, student_head, teacher_head)


@torch.no_grad()
def splits(model: Any, probe: Batch) -> bool:
    """Whether a causal language model can be split in front of its head; it is in eval mode."""
    with without_slow_products(model.get_input_embeddings().weight.device):
        return _split(model, probe)[1] is not None


def _split(model: Any, probe: Batch) -> tuple[Features, Tensor | None]:
    probe = {name: tensor for name, tensor in probe.items() if name != "attention_mask"}  # every row is compared
    head: Any = model.get_output_embeddings()
    base = model.base_model
    is_plain = isinstance(head, nn.Linear) and getattr(head, "bias", None) is None
    if is_plain and head.weight.is_floating_point() and base is not model:
        dtype = head.weight.dtype  # some bodies end in float32 whatever their weights are in
        features = _rows(base, lambda batch: base(**batch, use_cache=False).last_hidden_state.to(dtype))
        with torch.no_grad():
            expected = model(**_beside(base, probe), use_cache=False).logits.flatten(0, 1)
            got = features(probe)
            if got.shape[1] == head.weight.shape[1]:
                logits = nn.functional.linear(got, head.weight)
                # Both were rounded to the models' dtype; anything else would differ far more.
                if logits.shape == expected.shape and torch.allclose(logits, expected.to(dtype), rtol=2e-2, atol=2e-2):
                    return features, head.weight.detach()
    return _rows(model, lambda batch: model(**batch, use_cache=False).logits), None


def _rows(model: Any, forward: Callable[[Batch], Tensor]) -> Features:
    def rows(batch: Batch) -> Tensor:
        output = forward(_beside(model, batch)).flatten(0, 1)
        mask = batch.get("attention_mask")
        if mask is None or bool(mask.all()):
            return output
        return output[mask.flatten().bool().to(output.device)]

    return rows


def _beside(model: Any, batch: Batch) -> Batch:
    """The batch on the model's device; batches are kept on the CPU."""
    device = model.get_input_embeddings().weight.device
    return {name: tensor.to(device) for name, tensor in batch.items()}
