"""Fused projections: the same bits, nothing kept, nothing stored, and one by one wherever one call would be wrong."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from tiny import (
    save_float,
    tiny_bert,
    tiny_gemma3,
    tiny_gpt2,
    tiny_ids,
    tiny_llama,
    tiny_llama_ragged,
    tiny_opt,
    tiny_t5,
)
from torch import nn
from transformers import AutoModelForCausalLM

import hf_onebit
from hf_onebit import OneBitConfig, OneBitQuantizer, ops
from hf_onebit.nn import OneBitLinear, cache_dequantized, fuse_projections, packed_layers, unfuse_projections


class Attention(nn.Module):
    """q, k and v of one input; `between` runs before k is asked."""

    def __init__(self, planes=1, bias=True, names=("q_proj", "k_proj", "v_proj")):
        super().__init__()
        self.names = names
        for name, out_features in zip(names, (40, 24, 8), strict=False):
            setattr(self, name, OneBitLinear(33, out_features, bias, planes=planes))
        self.between = lambda x: x

    def forward(self, x):
        first, *rest = self.names
        results = [getattr(self, first)(x)]
        x = self.between(x)
        return [*results, *(getattr(self, name)(x) for name in rest)]


@pytest.fixture
def fused_calls(monkeypatch):
    """Layers of each fused call, in order."""
    counts = []
    original = ops.onebit_linear_group

    def counting(x, weight, *rest):
        counts.append(len(weight))
        return original(x, weight, *rest)

    monkeypatch.setattr(ops, "onebit_linear_group", counting)
    return counts


def proven(model, x):
    """`model` fused, its groups believed."""
    fuse_projections(model)
    with torch.no_grad():
        model(x)
    return model


def same(results, others):
    return all(torch.equal(y, z) for y, z in zip(results, others, strict=True))


# --- what is fused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("batch", [(), (1, 1), (0, 3), (2, 20)], ids=str)
@torch.no_grad()
def test_results_keep_their_bits(batch, dtype, planes, bias, fused_calls):
    model = Attention(planes, bias)
    assert fuse_projections(model) == 1
    for call in range(3):
        x = torch.randn(*batch, 33, dtype=dtype)
        expected = [layer(x) for layer in copy.deepcopy(model).children()]
        results = model(x)
        assert same(results, expected)
        assert [y.dtype for y in results] == [dtype] * 3
        assert fused_calls == [3] * call  # the first call is the trial


MODELS = {
    "llama": (tiny_llama, 4),
    "ragged llama with biases": (lambda: tiny_llama_ragged(bias=True), 4),
    "gemma": (tiny_gemma3, 4),
    "opt": (tiny_opt, 2),
    "bert": (tiny_bert, 2),
    "gpt2 has them in one matrix": (tiny_gpt2, 0),
}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_whole_models(name, fused_calls):
    make, groups = MODELS[name]
    model = make()
    OneBitQuantizer().quantize_model(model)
    ids = tiny_ids()
    expected = model(ids)[0]
    assert fuse_projections(model) == groups
    for _ in range(3):
        assert torch.equal(model(ids)[0], expected)
    assert len(fused_calls) == 2 * groups
    assert unfuse_projections(model) == groups
    assert torch.equal(model(ids)[0], expected)
    assert len(fused_calls) == 2 * groups


@torch.no_grad()
def test_cross_attention_is_never_believed(fused_calls):
    model = OneBitQuantizer().quantize_model(tiny_t5())
    ids = tiny_ids()
    expected = model(input_ids=ids, decoder_input_ids=ids[:, :5]).logits
    assert fuse_projections(model) > 0
    for _ in range(3):
        assert torch.equal(model(input_ids=ids, decoder_input_ids=ids[:, :5]).logits, expected)
    believed = {id(g): g for layer in packed_layers(model).values() if (g := layer._group) is not None}
    cross = [group for name, layer in packed_layers(model).items() if "EncDec" in name and (group := layer._group)]
    assert cross
    assert not any(group._proven for group in cross)
    assert any(group._proven for group in believed.values())


def test_only_layers_that_fit_together_are_grouped():
    model = Attention(bias=False)
    model.k_proj = OneBitLinear(33, 24, bias=True)  # alone with its bias
    assert fuse_projections(model) == 1
    assert model.k_proj._group is None
    assert model.q_proj._group is model.v_proj._group is not None
    model.v_proj = OneBitLinear(33, 8, bias=False, planes=2)
    assert fuse_projections(model) == 0
    assert model.q_proj._group is None
    model.v_proj = model.q_proj
    assert fuse_projections(model) == 0


@torch.no_grad()
def test_generate(fused_calls):
    model, ids = OneBitQuantizer().quantize_model(tiny_llama()), tiny_ids(rows=1)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **options)
    fuse_projections(model)
    assert torch.equal(model.generate(ids, **options), expected)
    assert len(fused_calls) == 7 * 4


# --- what falls back ------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("threads", [1, 2])
def test_an_input_that_changed_between_the_calls(threads, fused_calls):
    torch.set_num_threads(threads)
    x = torch.randn(2, 33)
    model = proven(Attention(), x)
    for between in (lambda x: x.clone(), lambda x: x.mul_(2), lambda x: x + 1, lambda x: x[:1]):
        model.between = between
        reference = copy.deepcopy(model)
        x = torch.randn(2, 33)
        assert same(model(x.clone()), reference(x.clone()))
    assert fused_calls == [3]  # after the first surprise nothing was computed in vain


@torch.no_grad()
def test_a_group_that_is_none_is_given_up(fused_calls):
    x = torch.randn(2, 33)
    model = proven(Attention(), x)
    for _ in range(20):
        model.between = lambda x: x + 1
        model(torch.randn(2, 33))
        model.between = lambda x: x
        model(torch.randn(2, 33))
    assert len(fused_calls) <= 8


@torch.no_grad()
def test_a_new_parameter_or_a_changed_one_counts_at_once(fused_calls):
    x = torch.randn(2, 33)
    model = proven(Attention(planes=2), x)
    for change in (
        lambda: model.k_proj.a.mul_(3),
        lambda: model.k_proj.weight.data.mul_(-1),
        lambda: setattr(model.v_proj, "b_1", nn.Parameter(torch.randn(33), requires_grad=False)),
        lambda: setattr(model.v_proj, "bias", None),
        lambda: setattr(model.q_proj, "bias", None),
    ):
        change()
        assert same(model(x), copy.deepcopy(model)(x))
    assert fused_calls == [3, 3, 3]  # without some of the biases, one by one


def test_gradients(fused_calls):
    model = Attention(planes=2)
    for layer in model.children():
        for name in layer.scale_names:
            getattr(layer, name).requires_grad_(True)
    x = torch.randn(2, 33, requires_grad=True)
    reference = copy.deepcopy(model)
    proven(model, x)
    for twin, y in ((model, model(x)), (reference, reference(x))):
        trained = [x, *(p for p in twin.parameters() if p.requires_grad)]
        assert len(trained) == 1 + 3 * 5
        twin.grads = torch.autograd.grad(sum(t.square().sum() for t in y), trained)
    assert same(model.grads, reference.grads)
    assert fused_calls == []


def test_checkpointing(fused_calls):
    x = torch.randn(2, 33, requires_grad=True)
    model = proven(Attention(), x)
    expected = torch.autograd.grad(sum(t.square().sum() for t in copy.deepcopy(model)(x)), x)
    for reentrant in (True, False):
        results = torch.utils.checkpoint.checkpoint(lambda x: tuple(model(x)), x, use_reentrant=reentrant)
        torch.autograd.backward([t.square().sum() for t in results])
        assert torch.equal(x.grad, expected[0])
        x.grad = None
    assert fused_calls == [3]  # the forward pass of the reentrant kind records nothing


@torch.no_grad()
def test_autocast_and_cached_signs_and_inference_mode(fused_calls):
    x = torch.randn(2, 33)
    model = proven(Attention(), x)
    reference = copy.deepcopy(model)
    with torch.autocast("cpu", torch.bfloat16):
        results = model(x)
        assert results[0].dtype == torch.bfloat16
        assert same(results, reference(x))
    with torch.inference_mode():
        inside = torch.randn(2, 33)
        assert same(model(inside), reference(inside))
    cache_dequantized(model)
    cache_dequantized(reference)
    assert same(model(x), reference(x))
    assert fused_calls == []
    cache_dequantized(model, enabled=False)
    model(x)
    assert fused_calls == [3]


@torch.no_grad()
def test_hooks(fused_calls):
    x = torch.randn(2, 33)
    model = proven(Attention(), x)
    reference = copy.deepcopy(model)
    seen = []
    handle = model.k_proj.register_forward_hook(lambda module, args, y: seen.append(args[0] is x) or y + 1)
    results = model(x)
    assert seen == [True]
    assert same(results, [y + (i == 1) for i, y in enumerate(reference(x))])
    assert fused_calls == [3]
    handle.remove()

    def double(module, args):
        module.a.mul_(2)

    model.k_proj.register_forward_pre_hook(double)
    results = model(x)
    reference.k_proj.a.mul_(2)
    assert same(results, reference(x))
    assert fused_calls == [3]


@torch.no_grad()
def test_a_parametrized_sibling(fused_calls):
    x = torch.randn(2, 33)
    model = proven(Attention(), x)

    class Twice(nn.Module):
        def forward(self, a):
            return 2 * a

    reference = copy.deepcopy(model)
    reference.k_proj.a.mul_(2)
    torch.nn.utils.parametrize.register_parametrization(model.k_proj, "a", Twice())
    assert same(model(x), reference(x))
    assert fused_calls == []


@torch.no_grad()
def test_a_sibling_elsewhere(fused_calls):
    """As offloading does it: the parameters of a layer are there only while it runs."""
    x = torch.randn(2, 33)
    model = proven(Attention(), x)
    reference = copy.deepcopy(model)
    for layer in model.children():
        held = dict(layer.named_parameters())
        away = {name: nn.Parameter(p.to("meta"), requires_grad=False) for name, p in held.items()}
        layer._parameters.update(away)
        layer.register_forward_hook(lambda module, *_, away=away: module._parameters.update(away))
        original = layer.forward

        def forward(x, layer=layer, held=held, original=original):
            layer._parameters.update(held)
            return original(x)

        layer.forward = forward
    assert same(model(x), reference(x))
    assert fused_calls == []


@torch.no_grad()
def test_disk_offload(tmp_path, fused_calls):
    save_float(tiny_llama(), tmp_path / "float")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=OneBitConfig())
    model.save_pretrained(tmp_path / "packed")
    expected = model(tiny_ids()).logits
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "packed",
        device_map={**places, "model.rotary_emb": "cpu", "lm_head": "cpu"},
        offload_folder=tmp_path / "offload",
    )
    assert fuse_projections(offloaded) == 4
    for _ in range(3):
        torch.testing.assert_close(offloaded(tiny_ids()).logits, expected, rtol=0, atol=0)
    assert fused_calls == [3, 2] * 2  # the first block; the second is never whole


@torch.no_grad()
def test_vmap(fused_calls):
    x = torch.randn(4, 2, 33)
    model = proven(Attention(), x)
    expected = copy.deepcopy(model)(x)
    results = torch.func.vmap(lambda row: tuple(model(row)))(x)
    assert all(torch.allclose(y, z, atol=1e-6) for y, z in zip(results, expected, strict=True))
    assert fused_calls == []


@torch.no_grad()
def test_adapters(fused_calls):
    peft = pytest.importorskip("peft")
    model = OneBitQuantizer().quantize_model(tiny_llama())
    ids = tiny_ids()
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "up_proj"], lora_dropout=0.5))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.normal_(std=0.1)
    adapted.eval()
    expected = adapted(input_ids=ids).logits
    assert fuse_projections(adapted) == 4
    for _ in range(2):
        assert torch.equal(adapted(input_ids=ids).logits, expected)
    assert fused_calls == [3, 2] * 2
    adapted.train()
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(0)
        loss = adapted(input_ids=ids, labels=ids).loss
        unfuse_projections(adapted)
        torch.manual_seed(0)
        assert torch.equal(loss, adapted(input_ids=ids, labels=ids).loss)


# --- what is kept ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_nothing_is_kept_of_a_finished_call():
    x = torch.randn(2, 33)
    model = proven(Attention(), x)
    results = model(x)
    watched = [weakref.ref(t) for t in (x, *results)]
    assert model.q_proj._group._thread.call is None
    del x, results
    gc.collect()
    assert [ref() for ref in watched] == [None] * 4


@torch.no_grad()
def test_nothing_is_kept_of_a_call_that_failed(monkeypatch):
    x = torch.randn(2, 33)
    model = proven(Attention(), x)
    made = []
    original = ops.onebit_linear_group

    def watching(*args):
        results = original(*args)
        made.extend(map(weakref.ref, results))
        return results

    def fail(x):
        raise KeyboardInterrupt

    monkeypatch.setattr(ops, "onebit_linear_group", watching)
    model.between = fail
    with pytest.raises(KeyboardInterrupt):
        model(x)
    assert sum(ref() is not None for ref in made) == 2
    del x
    gc.collect()
    assert len(made) == 3
    assert all(ref() is None for ref in made)


@torch.no_grad()
def test_copies_and_pickles_stand_alone(fused_calls):
    x = torch.randn(2, 33)
    model = proven(Attention(), x)
    model.between = None  # a lambda does not pickle
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.copy(model.q_proj)):
        layers = [twin] if isinstance(twin, OneBitLinear) else list(twin.children())
        assert all(layer._group is None for layer in layers)
    twin = copy.deepcopy(model)
    twin.between = model.between = lambda x: x
    proven(twin, x)
    assert same(twin(x), model(x))


@torch.no_grad()
def test_moving_and_casting(fused_calls):
    x = torch.randn(2, 33)
    model = proven(Attention(), x).to(torch.bfloat16)
    assert model.q_proj.bias.dtype == torch.bfloat16
    assert same(model(x), copy.deepcopy(model)(x))
    assert fused_calls == [3]
    assert all(y.is_meta for y in model.to("meta")(x.to("meta")))


def test_threads():
    x = torch.randn(2, 33)
    model = proven(Attention(), x)
    inputs = [torch.randn(2, 33) for _ in range(4)] + [x, x]
    expected = [[y.detach() for y in copy.deepcopy(model)(t)] for t in inputs]
    failures = []

    def work(t, wanted):
        with torch.no_grad():
            for _ in range(300):
                if not same(model(t), wanted):
                    failures.append(1)

    workers = [threading.Thread(target=work, args=pair) for pair in zip(inputs, expected, strict=True)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


# --- loading and saving ---------------------------------------------------------------------------------------------


@torch.no_grad()
def test_checkpoints_do_not_change(tmp_path, fused_calls):
    model = OneBitQuantizer().quantize_model(tiny_llama())
    ids = tiny_ids()
    keys, expected = list(model.state_dict()), model(ids).logits
    model.save_pretrained(tmp_path / "plain")
    proven(model, ids)
    model(ids)
    assert list(model.state_dict()) == keys
    model.save_pretrained(tmp_path / "fused")
    names = sorted(file.name for file in (tmp_path / "plain").iterdir())
    assert names == sorted(file.name for file in (tmp_path / "fused").iterdir())
    assert (tmp_path / "plain/config.json").read_bytes() == (tmp_path / "fused/config.json").read_bytes()
    weights = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("plain", "fused")]
    length = 8 + int.from_bytes(weights[0][:8], "little")  # the header's metadata has no fixed order
    assert weights[0][length:] == weights[1][length:]
    assert len(weights[0]) == len(weights[1])

    fused_calls.clear()
    loaded = hf_onebit.load(tmp_path / "fused", fuse_projections=True)
    for _ in range(2):
        assert torch.equal(loaded(ids).logits, expected)
    assert fused_calls == [3, 2] * 2
    assert "fuse_projections" not in loaded.config.quantization_config.to_dict()
    assert all(layer._group is None for layer in packed_layers(hf_onebit.load(tmp_path / "fused")).values())
    with pytest.raises(ValueError, match=r"dequantize=True leaves no packed layers"):
        hf_onebit.load(tmp_path / "fused", fuse_projections=True, dequantize=True)


def test_the_option_of_the_config(tmp_path):
    config = OneBitConfig(fuse_projections=True)
    assert "fuse_projections" not in config.to_dict()
    in_memory = OneBitQuantizer(config).quantize_model(tiny_llama())
    save_float(tiny_llama(), tmp_path / "float")
    on_load = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config)
    for model in (in_memory, on_load):
        assert unfuse_projections(model) == 4
        assert unfuse_projections(model) == 0
