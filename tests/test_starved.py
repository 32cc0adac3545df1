"""Experts that few tokens reach: what they are lent, and what that is good for."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tiny import tiny_ids, tiny_qwen3_moe, tiny_tokenizer
from torch import Tensor

from hf_onebit import MPQQuantizer, OneBitQuantizer
from hf_onebit.algorithms import signs
from hf_onebit.algorithms.closed_form import dequantize_planes
from hf_onebit.algorithms.curvature import Curvature
from hf_onebit.nn.experts import separate_experts
from hf_onebit.rungs.hessian_sums import HessianSum
from hf_onebit.rungs.prefix import PrefixStatistics, walk_prefix
from hf_onebit.rungs.starved import feed_starved, is_expert
from hf_onebit.rungs.walk import walk

EXPERTS = "model.layers.0.mlp.experts"
TEXT = "The little boat drifted down the river until the sun had set behind the hills. " * 20


@dataclass
class Model(torch.nn.Module):
    """Stands for one whose experts read `a` from outside and `b` from each other's inside."""

    def get_submodule(self, target: str) -> Any:
        return type("Experts", (), {"shared_inputs": {"a"}})()


def sums(rows: dict[str, Tensor]) -> dict[str, HessianSum]:
    found = {}
    for name, x in rows.items():
        found[name] = HessianSum(4)
        if len(x):
            found[name].add(x)
    return found


def test_what_is_lent_is_what_is_missing() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = {f"experts.{n}.{layer}": torch.randn(count, 4, generator=generator) for layer in "ab"
            for n, count in enumerate((6, 1, 0))}  # fmt: skip
    found = sums(rows)
    before = {name: total.hessian for name, total in found.items()}
    assert feed_starved(Model(), found) == {
        "experts.1.a": 1, "experts.2.a": 0, "experts.1.b": 1, "experts.2.b": 0
    }  # fmt: skip
    everything = torch.cat([rows[f"experts.{n}.a"] for n in range(3)])
    mean = everything.t() @ everything / 7
    inner = torch.cat([rows[f"experts.{n}.b"] for n in range(3)])
    identity = torch.eye(4) * inner.square().mean()
    one = rows["experts.1.a"]
    expected = {
        "experts.0.a": before["experts.0.a"],
        "experts.1.a": (one.t() @ one + 3 * mean) * 2 / 4,
        "experts.2.a": 2 * mean,
        "experts.2.b": 2 * identity,
    }
    for name, hessian in expected.items():
        assert hessian is not None
        torch.testing.assert_close(found[name].hessian, hessian)
    assert [found[f"experts.{n}.a"].rows for n in range(3)] == [6, 1, 0]


def test_layers_that_share_their_sums_are_lent_once() -> None:
    total = HessianSum(4)
    total.add(torch.ones(2, 4))
    other = HessianSum(4)
    other.add(torch.ones(5, 4))
    shared = {"experts.0.a": total, "experts.0.c": total, "experts.1.a": other, "experts.1.c": other}
    assert feed_starved(Model(), shared) == {"experts.0.a": 2, "experts.0.c": 2}
    assert total.lent == 2
    assert feed_starved(Model(), {"mlp.up": HessianSum(4), "experts.0.a": HessianSum(4)}) == {}


def test_names_of_experts() -> None:
    assert is_expert("model.layers.0.mlp.experts.12.down_proj")
    assert not is_expert("model.layers.0.mlp.shared_expert.down_proj")
    assert not is_expert("model.layers.0.self_attn.q_proj")


def far_from(model: Any, number: int) -> None:
    """No token is sent to that expert of the first layer."""
    separate_experts(model)

    def elsewhere(_module: Any, _args: Any, output: Any) -> Any:
        scores, weights, index = output
        return scores, weights, torch.where(index == number, (number + 1) % 4, index)

    model.model.layers[0].mlp.gate.register_forward_hook(elsewhere)


def test_an_expert_without_tokens_gets_statistics_in_both_walks() -> None:
    model = tiny_qwen3_moe()
    far_from(model, 2)
    names = [f"{EXPERTS}.{n}.{layer}" for n in range(4) for layer in ("gate_proj", "up_proj", "down_proj")]
    batches = [{"input_ids": tiny_ids(1, 64, seed)} for seed in range(4)]
    seen: dict[str, Tensor | None] = {}
    starved = walk(model, names, batches, lambda _, statistics: seen.update(statistics))
    assert {name: tokens for name, tokens in starved.items() if ".2." in name} == dict.fromkeys(names[6:9], 0)
    assert all(hessian is not None for hessian in seen.values())
    down = seen[f"{EXPERTS}.2.down_proj"]
    assert down is not None
    assert torch.equal(down, torch.diag(down.diagonal()))

    stages: list[dict[str, PrefixStatistics | None]] = []
    walk_prefix(model, names, batches, stages.append, heldout=(3,))
    assert [len(stage) for stage in stages] == [8, 4]
    for stage in stages:
        for name, statistics in stage.items():
            assert statistics is not None
            assert statistics.hessian is not None
            assert statistics.cross is None  # the rows of two streams are other tokens
            if ".2." in name:
                assert statistics.rows == 0
                assert statistics.lent == statistics.hessian.shape[0]
                assert statistics.heldout_hessian is None


def test_lent_statistics_serve_the_tokens_that_come_later() -> None:
    """Inputs of few directions, of which the expert saw six rows: what all saw serves it better than its own."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(64, 64, generator=generator) * torch.logspace(0, -2, 64)
    W = torch.randn(48, 64, generator=generator)
    own, others, later = (torch.randn(count, 64, generator=generator) @ spread.t() for count in (6, 400, 512))
    found = {"experts.0.a": HessianSum(64), "experts.1.a": HessianSum(64)}
    found["experts.0.a"].add(own)
    found["experts.1.a"].add(others)
    alone = found["experts.0.a"].hessian
    feed_starved(Model(), found)
    errors = []
    for H in (alone, found["experts.0.a"].hessian):
        assert H is not None
        fit = signs.fit_signs(W, Curvature(H, 0.1), rounds=2, layer="x")
        Q = dequantize_planes(fit.planes)
        errors.append(float(((W - Q) @ later.t()).square().sum() / (W @ later.t()).square().sum()))
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize("cls", [OneBitQuantizer, MPQQuantizer])
@pytest.mark.parametrize("preset", ["closed", "fast"])
def test_starved_experts_are_reported(cls: Any, preset: str) -> None:
    model = tiny_qwen3_moe()
    far_from(model, 2)
    options = {"preset": preset, "dataset": [TEXT], "calibration_tokens": 512, "calibration_context": 64}
    quantizer = cls(**options)
    quantizer.quantize_model(model, tiny_tokenizer())
    assert quantizer.report is not None
    starved = quantizer.report["starved_experts"]
    assert {name for name, tokens in starved.items() if tokens == 0 and "layers.0" in name} == {
        f"{EXPERTS}.2.{layer}" for layer in ("gate_proj", "up_proj", "down_proj")
    }
    assert quantizer.report["coverage"] == 1.0
