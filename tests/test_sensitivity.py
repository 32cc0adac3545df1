"""Measured sensitivities against the exact Fisher information, and against what quantizing really costs."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import tiny_bert, tiny_gpt2, tiny_ids, tiny_llama, tiny_t5
from torch import Tensor, nn
from torch.nn import functional as F

from hf_onebit.algorithms.closed_form import dequantize_planes
from hf_onebit.bits.sensitivity import closed_fit, depths, measure_sensitivity, pieces_of, sign_fit
from hf_onebit.calibration import real_tokens
from hf_onebit.nn.replace import find_layers, float_weight


def batches(count: int = 8, tokens: int = 48) -> list[dict[str, Tensor]]:
    return [{"input_ids": tiny_ids(1, tokens, seed=i)} for i in range(count)]


def nothing(name: str, W: Tensor, H: Tensor, planes: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """A fit to zero: the error is the weight itself."""
    return [(torch.ones(W.shape, dtype=torch.bool), torch.zeros(W.shape[0]), torch.zeros(W.shape[1]))]


def exact_cost(model: Any, name: str, ids: Tensor) -> float:
    """½ Σ_i G_i (W H Wᵀ)_ii per token with G_i = Σ_t E_label[g_ti²], every label of every token in turn."""
    seen: dict[str, Tensor] = {}

    def keep(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        seen["x"], seen["y"] = args[0].detach()[0], output.detach().requires_grad_()
        return seen["y"]

    handle = model.get_submodule(name).register_forward_hook(keep)
    log_p = model(input_ids=ids).logits[0].log_softmax(-1)
    handle.remove()
    tokens, labels = log_p.shape
    G = torch.zeros(seen["y"].shape[-1])
    for token in range(tokens):
        for label in range(labels):
            (g,) = torch.autograd.grad(-log_p[token, label], seen["y"], retain_graph=True)
            G += float(log_p[token, label].detach().exp()) * g[0].square().sum(0)
    W, H = float_weight(model.get_submodule(name)), seen["x"].T @ seen["x"] / tokens
    return float(0.5 * (G / tokens * ((W @ H) * W).sum(1)).sum())


@pytest.mark.parametrize("name", ["self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj"])
def test_it_is_the_exact_fisher_information_in_the_mean_over_labels(name):
    model = tiny_llama(layers=1, vocabulary=40)
    ids = tiny_ids(1, 6) % 40
    layer = f"model.layers.0.{name}"
    many = [{"input_ids": ids}] * 400  # 400 draws of labels
    found = measure_sensitivity(model, [layer], many, nothing, planes=(1,), tokens=10**6, arithmetic=None)
    assert found.tokens == 2400
    assert found.costs[layer][1] == pytest.approx(exact_cost(model, layer, ids), rel=0.1)


def real_cost(model: Any, name: str, planes: int, data: list[dict[str, Tensor]]) -> float:
    """The KL divergence, in nats per token, that quantizing one layer causes."""
    weight = model.get_submodule(name).weight
    with torch.no_grad():
        reference = [model(**batch).logits.log_softmax(-1) for batch in data]
        kept = weight.data
        H = torch.eye(kept.shape[1])
        weight.data = dequantize_planes(closed_fit(False, use_balancing=False)(name, kept, H, planes))
        total = sum(
            float(F.kl_div(model(**batch).logits.log_softmax(-1), p, log_target=True, reduction="sum"))
            for batch, p in zip(data, reference, strict=True)
        )
        weight.data = kept
    return total / sum(batch["input_ids"].numel() for batch in data)


def test_it_foretells_what_quantizing_one_layer_costs():
    model = tiny_llama(layers=2)
    for parameter in model.lm_head.parameters():  # predictions that have something to lose
        parameter.data *= 8
    names, data = list(find_layers(model).selected), batches()
    fit = closed_fit(False, use_balancing=False)
    found = measure_sensitivity(model, names, data, fit, rows=10**6, arithmetic=None)
    real = {(name, planes): real_cost(model, name, planes, data) for name in names for planes in (1, 2)}
    for (name, planes), cost in real.items():
        foretold = found.costs[name][planes]
        if "mlp" in name:
            assert foretold == pytest.approx(cost, rel=0.2), name
        elif name.endswith(("v_proj", "o_proj")):  # attention mixes tokens, whose errors then are not independent
            assert cost / 4 < foretold < cost * 4, name
        else:  # queries and keys of random models attend to everything alike
            assert max(cost, foretold) < 1e-3, name


@pytest.mark.parametrize("fit", [closed_fit(True, use_balancing=False), sign_fit()], ids=["closed", "signs"])
def test_a_second_plane_costs_less_in_every_layer(fit):
    model = tiny_gpt2()
    names = list(find_layers(model).selected)
    found = measure_sensitivity(model, names, batches(), fit, rows=999)
    assert list(found.costs) == names
    assert all(0 < cost[2] < 0.6 * cost[1] for cost in found.costs.values())


def test_a_sample_of_rows_tells_nearly_what_all_rows_do():
    model = tiny_llama()
    names = list(find_layers(model).selected)
    whole, part = (measure_sensitivity(model, names, batches(), sign_fit(), rows=rows) for rows in (128, 24))
    for name in names:
        assert part.costs[name][1] == pytest.approx(whole.costs[name][1], rel=0.3)


def test_the_same_seed_gives_the_same_and_another_nearly():
    model = tiny_llama()
    names = list(find_layers(model).selected)
    runs = [measure_sensitivity(model, names, batches(), sign_fit(), seed=seed) for seed in (3, 3, 4)]
    assert runs[0] == runs[1] != runs[2]
    for name in names:
        assert runs[2].costs[name][1] == pytest.approx(runs[0].costs[name][1], rel=0.5)


def test_padding_does_not_count():
    model = tiny_llama()
    names = list(find_layers(model).selected)
    ids = tiny_ids(1, 24)
    mask = torch.zeros(1, 40, dtype=torch.int64)
    mask[:, :24] = 1
    padded = {"input_ids": torch.cat([ids, torch.zeros(1, 16, dtype=torch.int64)], 1), "attention_mask": mask}
    plain, other = (
        measure_sensitivity(model, names, [batch], sign_fit(), arithmetic=None)
        for batch in ({"input_ids": ids}, padded)
    )
    assert plain.tokens == other.tokens == 24
    for name in names:
        assert other.costs[name] == pytest.approx(plain.costs[name], rel=1e-3)


def test_padding_does_not_fill_the_number_of_tokens():
    ids, mask = tiny_ids(1, 32), torch.zeros(1, 32, dtype=torch.int64)
    mask[:, :8] = 1
    padded = [{"input_ids": ids, "attention_mask": mask} for _ in range(40)]
    pieces = pieces_of(padded, 80, 16)
    assert sum(map(real_tokens, pieces)) == 80
    assert sum(map(real_tokens, pieces_of(batches(40, 8), 80, 16))) == 80


def test_tokens_and_length_bound_the_work():
    model, lengths = tiny_llama(layers=1), []
    names = list(find_layers(model).selected)
    model.model.embed_tokens.register_forward_hook(lambda _module, args, _output: lengths.append(args[0].shape[1]))
    done = []
    found = measure_sensitivity(model, names, batches(20, 50), sign_fit(), tokens=100, length=20, done=done.append)
    assert found.tokens in range(80, 121)  # six pieces, some of them the ends of sequences
    assert max(lengths) == 20
    assert sorted(done) == sorted(names)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_t5, tiny_bert])
def test_the_model_is_left_as_it_was(make):
    model = make().train()
    names = list(find_layers(model).selected)
    model.get_submodule(names[0]).weight.requires_grad_(False)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    asked = [parameter.requires_grad for parameter in model.parameters()]
    with torch.no_grad():  # wherever it is called from
        found = measure_sensitivity(model, names, batches(2), sign_fit())
    assert all(cost[1] > 0 for cost in found.costs.values())
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    assert [parameter.requires_grad for parameter in model.parameters()] == asked
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(module.training for module in model.modules())


class Toy(nn.Module):
    """A layer outside of any stack of blocks, changed in place after it, and one that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.used, self.unused = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        y = self.used(self.embed(input_ids))
        y += 1
        return SimpleNamespace(logits=y)


def test_a_layer_that_never_runs_costs_nothing():
    found = measure_sensitivity(Toy(), ["used", "unused"], [{"input_ids": tiny_ids() % 50}], sign_fit())
    assert found.costs["unused"] == {1: 0.0, 2: 0.0}
    assert found.costs["used"][1] > found.costs["used"][2] > 0


def test_of_layers_outside_of_the_blocks_the_squares_of_the_inputs_are_known():
    model = tiny_llama(layers=1)
    ids = tiny_ids(1, 32)
    found = measure_sensitivity(
        model, ["lm_head"], [{"input_ids": ids}], nothing, planes=(1,), rows=999, arithmetic=None
    )
    with torch.no_grad():
        x = model.model(input_ids=ids).last_hidden_state[0]
    p = model(input_ids=ids).logits[0].softmax(-1).detach()
    generator = torch.Generator().manual_seed(0)
    labels = torch.multinomial(p, 1, generator=generator)[:, 0]
    G = (p - F.one_hot(labels, p.shape[1])).square().mean(0)  # of logits the gradient is known
    W = model.lm_head.weight.detach()
    expected = 0.5 * float((G[:, None] * W.square() * x.square().mean(0)).sum())
    assert found.costs["lm_head"][1] == pytest.approx(expected, rel=1e-4)


def test_models_that_cannot_be_measured_are_refused():
    model = tiny_llama(layers=1)
    names = list(find_layers(model).selected)
    with pytest.raises(ValueError, match=r"LlamaModel gives no logits.*planes_per_layer=\{NAME: 2\}"):
        measure_sensitivity(model.model, ["layers.0.mlp.up_proj"], batches(1), sign_fit())
    model.lm_head.weight.data[0, 0] = float("inf")
    with pytest.raises(ValueError, match="logits of LlamaForCausalLM hold NaN or infinite"):
        measure_sensitivity(model, names, batches(1), sign_fit())
    with pytest.raises(ValueError, match="do not depend on the layers"):
        measure_sensitivity(Toy(), ["unused"], [{"input_ids": tiny_ids() % 50}], sign_fit())


def test_depths():
    model = tiny_llama(layers=3)
    names = ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj", "model.layers.2.mlp.up_proj", "lm_head"]
    assert list(depths(model, names).values()) == [0.0, 0.5, 1.0, 0.5]
    assert set(depths(tiny_t5(), ["encoder.block.0.layer.0.SelfAttention.q"]).values()) == {0.5}
    assert set(depths(tiny_llama(layers=1), names[:1]).values()) == {0.5}
