"""What blocks are called with: the same as in the whole model, and no more of it in memory than differs."""

from collections.abc import Iterator
from typing import Any

import torch
from tiny import tiny_ids, tiny_llama
from torch import Tensor
from transformers import PreTrainedModel

from hf_onebit.rungs.block_calls import BlockCall, capture
from hf_onebit.rungs.blocks import one_stack


def eager_llama() -> PreTrainedModel:
    """Its attention is given a mask with length squared entries."""
    model = tiny_llama(layers=3)
    model.set_attn_implementation("eager")
    return model


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, BlockCall):
        yield from tensors((value.args, value.kwargs))
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors(item)
    elif isinstance(value, dict):
        yield from tensors(tuple(value.values()))


def masks(calls: list[list[BlockCall]], length: int) -> set[int]:
    """Addresses of the masks of sequences of a length."""
    found = (t for call in calls for t in tensors(call))
    return {t.data_ptr() for t in found if t.dim() == 4 and t.shape[2] == length}


def test_masks_of_one_length_are_one_tensor() -> None:
    model = eager_llama()
    lengths = (16, 24, 16, 24, 16)
    batches = [{"input_ids": tiny_ids(1, length, seed)} for seed, length in enumerate(lengths)]
    _, calls = capture(model, one_stack(model)[1], batches)
    assert len(masks(calls, 16)) == len(masks(calls, 24)) == 1
    positions = {t.data_ptr() for call in calls for t in tensors(call) if t.dim() < 4}
    assert len(positions) <= 3 * len(set(lengths))  # their numbers, cosines and sines


def test_other_masks_stay_their_own() -> None:
    model = eager_llama()
    batches = []
    for padding in (0, 3, 5, 3):
        mask = torch.ones(1, 16, dtype=torch.int64)
        mask[:, 16 - padding :] = 0
        batches.append({"input_ids": tiny_ids(1, 16), "attention_mask": mask})
    blocks = one_stack(model)[1]
    states, calls = capture(model, blocks, batches)
    assert len(masks(calls, 16)) == 3
    for batch, state, call in zip(batches, states, calls, strict=True):
        hidden = state
        for block, each in zip(blocks, call, strict=True):
            hidden = each.run(block, hidden)
        expected = model(**batch, output_hidden_states=True).hidden_states[-1]
        assert torch.equal(model.model.norm(hidden), expected)
