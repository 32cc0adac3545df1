"""Which heads and embeddings can be packed: the plan alone."""

import pytest
import torch
from tiny import tiny_gemma3, tiny_gpt2, tiny_llama
from torch import nn
from transformers import LlamaForCausalLM
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding

from hf_onebit.nn.heads import plan_heads, undo_tie
from hf_onebit.nn.roles import embedding_scale


class ReadsByMethod(LlamaForCausalLM):
    """Reads the embedding through the method that gives it."""

    def forward(self, input_ids, **kwargs):
        return super().forward(input_ids.to(self.get_input_embeddings().weight.device), **kwargs)

    def nearest(self, x):
        return x @ self.get_input_embeddings().weight.t()


def test_nothing_asked_is_nothing_planned():
    plan = plan_heads(tiny_llama(), None, None)
    assert (plan.entries, plan.head, plan.embedding, plan.tied, plan.untied, plan.weights) == ({}, None, None, 0, 0, 0)


@pytest.mark.parametrize("tiny", [lambda: tiny_llama(tied=True), tiny_gpt2, tiny_gemma3])
def test_a_skeleton_is_planned_as_its_model(tiny):
    model = tiny()
    with torch.device("meta"):
        skeleton = type(model)(model.config)
    for bits in ((4, None), (None, 8), (4, 8), (8, 8)):
        assert plan_heads(model, *bits) == plan_heads(skeleton, *bits)


@pytest.mark.parametrize(
    ("bits", "tied", "untied", "weights"),
    [
        ((4, None), False, True, 0),  # the float embedding is counted with what stays float
        ((None, 8), False, True, 0),
        ((4, 8), False, True, 288 * 64),
        ((8, 8), True, False, 288 * 64),
    ],
)
def test_weights_of_a_tied_matrix_count_once(bits, tied, untied, weights):
    plan = plan_heads(tiny_llama(tied=True), *bits)
    assert (plan.tied, plan.untied, plan.weights) == (tied, untied, weights)
    plan = plan_heads(tiny_llama(), *bits)
    assert (plan.tied, plan.untied) == (False, False)
    assert plan.weights == 288 * 64 * sum(b is not None for b in bits)


def test_readers_through_the_accessor_are_found():
    model = ReadsByMethod(tiny_llama().config)
    with pytest.raises(ValueError, match=r"ReadsByMethod reads its \.weight directly"):
        plan_heads(model, None, 8)
    assert set(plan_heads(model, 8, None).entries) == {"lm_head"}


def test_more_than_one_tie_cannot_be_undone():
    model = tiny_llama(tied=True)
    model.all_tied_weights_keys["model.norm.weight"] = "model.layers.0.input_layernorm.weight"
    with pytest.raises(ValueError, match="its config ties more than those two"):
        plan_heads(model, 4, 8)
    assert plan_heads(model, 8, 8).tied  # which keeps every tie


def test_a_weight_shared_with_a_third_module_is_refused():
    model = tiny_llama(tied=True)
    model.all_tied_weights_keys["other.weight"] = "model.embed_tokens.weight"
    with pytest.raises(ValueError, match=r"its weight is shared with other\.weight too"):
        plan_heads(model, 8, 8)


def test_undoing_a_tie_reaches_the_config():
    model = tiny_llama(tied=True)
    undo_tie(model)
    assert model.config.tie_word_embeddings is False
    assert model.get_expanded_tied_weights_keys(all_submodels=True) == {}


def test_scales_of_embeddings():
    class Other(nn.Embedding):
        def forward(self, input):
            return super().forward(input) * self.embed_scale + 1

    assert embedding_scale(nn.Embedding(3, 4)) == 1.0
    assert embedding_scale(nn.Linear(3, 4)) is None
    assert embedding_scale(Other(3, 4)) is None
    assert embedding_scale(BartScaledWordEmbedding(3, 4, 0, embed_scale=32.0)) == 32.0
    # Not exact in 16 bits: the class multiplies by the unrounded number, which a packed embedding does not.
    assert embedding_scale(BartScaledWordEmbedding(3, 4, 0, embed_scale=768**0.5)) is None
    model = tiny_gemma3()
    assert embedding_scale(model.get_input_embeddings()) == 8.0
    with torch.device("meta"):
        skeleton = type(model)(model.config)
    assert embedding_scale(skeleton.get_input_embeddings()) == 8.0
