"""torch.compile over packed models: one graph, the tokens of the eager model, and no compiling while decoding."""

import pytest
import torch
from tiny import tiny_ids, tiny_llama
from transformers import CompileConfig

from hf_onebit import OneBitConfig, OneBitQuantizer
from hf_onebit.nn import fuse_projections

STEPS = 24


@pytest.fixture
def counters():
    """What the compiler has done in this test."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch.compiler.reset()


def packed(planes=1):
    # One block: inductor takes its time for each.
    return OneBitQuantizer(OneBitConfig(planes=planes)).quantize_model(tiny_llama(bias=True, layers=1))


def generate(model, ids, steps=STEPS, **options):
    options |= {"min_new_tokens": steps, "max_new_tokens": steps, "do_sample": False, "pad_token_id": 0}
    return model.generate(ids, **options)


def on_every_device(backend):
    """As docs/quickstart.md: transformers compiles on a CPU only when told so."""
    config = CompileConfig(backend=backend, mode="default", fullgraph=True, dynamic=False)
    config._compile_all_devices = True
    return config


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("fused", [False, True])
def test_a_whole_model_is_one_graph(counters, planes, fused):
    model = packed(planes)
    with torch.no_grad():
        expected = model(tiny_ids()).logits
        if fused:
            fuse_projections(model)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
        for rows, tokens in ((2, 16), (3, 9), (5, 12)):
            ids = tiny_ids(rows, tokens)
            torch.testing.assert_close(compiled(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(compiled(tiny_ids()).logits, expected, rtol=1e-5, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_gradients_through_a_compiled_model(counters):
    model, ids = packed(), tiny_ids()
    losses, grads = [], []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        loss = run(input_ids=ids, labels=ids).loss
        losses.append(loss.detach())
        grads.append(torch.autograd.grad(loss, model.model.embed_tokens.weight)[0])
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_decoding_compiles_once(counters, backend):
    model, ids = packed(), tiny_ids(rows=1)
    expected = generate(model, ids)
    options = {"cache_implementation": "static", "compile_config": on_every_device(backend)}
    assert torch.equal(generate(model, ids, **options), expected)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    # The same graph for every further step, for another prompt, and with the fused layers of the eager model.
    fuse_projections(model)
    other = tiny_ids(rows=1, seed=1)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.equal(generate(model, ids, **options), expected)
        assert torch.equal(generate(model, other, **options), generate(model, other))
    assert counters["stats"]["unique_graphs"] == 1
