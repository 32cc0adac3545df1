"""Grouped products of packed experts in Triton's interpreter. Run by test_triton_interpreter.py."""

import pytest
import torch
from interpreter import let_loops_run
from tiny import tiny_gpt_oss, tiny_ids, tiny_qwen3_moe

from hf_onebit.nn import MPQLinear, OneBitLinear, grouped_experts, replace_layers
from hf_onebit.nn.experts import SeparateExperts, separate_experts
from hf_onebit.ops import gpu, gpu_plans, triton_experts_launch

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _loops_run():
    let_loops_run()


@pytest.mark.parametrize(
    ("dtype", "method", "bits", "zeros"),
    [(torch.float16, "onebit", 1, False), (torch.float32, "onebit", 1, False), (torch.float16, "mpq", 3, True)],
)
def test_an_examination_passes_and_sees_a_wrong_product(monkeypatch, dtype, method, bits, zeros):
    monkeypatch.setattr(gpu_plans, "multiprocessors", lambda _: 8)  # so that there are several slices
    monkeypatch.setattr(grouped_experts, "_EXAMINED_TOKENS", (4, 20))
    assert grouped_experts.examine(CPU, dtype, method, bits, zeros) == ""
    right = triton_experts_launch.product
    monkeypatch.setattr(triton_experts_launch, "product", lambda *given: right(*given) * 1.01)
    assert "off by" in grouped_experts.examine(CPU, dtype, method, bits, zeros)


@pytest.mark.parametrize("tokens", [1, 5, 33])
@pytest.mark.parametrize("kind", ["signs", "codes"])
def test_tokens_of_all_numbers(kind, tokens):
    torch.manual_seed(tokens)
    make = OneBitLinear if kind == "signs" else MPQLinear
    layers = [make(90, 40, bias=False) for _ in range(6)]
    x = torch.randn(tokens, 90).half()
    index = torch.randint(0, 7, (tokens, 3))  # 6 for none
    index[:, 0] = 2  # many rows of one expert
    rows = triton_experts_launch.sort_rows(index, 6)
    y = triton_experts_launch.product(x, rows, grouped_experts.grouped(layers)).double()
    for place in range(3 * tokens):
        token, expert = int(rows.tokens[place]), int(rows.experts[place])
        assert expert == int(index.flatten()[rows.order[place]])
        if expert == 6:
            assert (y[place] == 0).all()
        else:
            exact = layers[expert].dequantize(torch.float64) @ x[token].double()
            assert float((y[place] - exact).norm() / exact.norm()) < 2e-3


@pytest.mark.parametrize("make", [tiny_qwen3_moe, tiny_gpt_oss])
def test_models(monkeypatch, make):
    """Gates of both kinds, biases; beside the experts one by one."""
    torch.manual_seed(0)
    model = make().eval()
    separate_experts(model)
    names = [n for n, m in model.named_modules() if ".experts." in n and isinstance(m, torch.nn.Linear)]
    replace_layers(model, dict.fromkeys(names, 1))
    taken = []

    def takes(*given):
        taken.append(grouped_experts.suits(*given))
        return list(taken[-1])

    with torch.no_grad():
        expected = model(input_ids=tiny_ids()).logits
        monkeypatch.setattr(grouped_experts, "takes", takes)
        monkeypatch.setattr(gpu, "serves", lambda x: True)
        got = model(input_ids=tiny_ids()).logits
    assert taken
    assert all(taken)
    assert len(taken) == sum(isinstance(m, SeparateExperts) for m in model.modules())
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


def test_layers_that_are_not_alike_or_must_be_called_are_left_alone(monkeypatch):
    x, index = torch.randn(2, 90).half(), torch.zeros(2, 1, dtype=torch.int64)

    def made(kind=MPQLinear, **options):
        return [kind(90, 40, **options) for _ in range(3)]

    def suits(layers, x=x):
        return grouped_experts.suits(x, index, [layers])

    assert suits(made())
    assert suits(made(OneBitLinear))
    assert suits(made(OneBitLinear), x.float())
    assert not suits(made(), x.float())
    assert not suits(made(), x.double())
    assert not suits(made(OneBitLinear, planes=2))
    assert not suits(made(g_idx=True))
    assert suits(made(symmetric=False))
    for name in ("scales", "zeros"):  # as training of them leaves them
        trained = made(symmetric=False)
        for layer in trained:
            setattr(layer, name, torch.nn.Parameter(getattr(layer, name).float()))
        assert not suits(trained)
    assert not suits([*made(), *made(OneBitLinear)])
    assert not suits([*made(bits=4), *made(bits=2)])
    assert not suits([*made(bias=True), *made(bias=False)])
    assert not suits(made(torch.nn.Linear))
    hooked = made()
    hooked[1].register_forward_hook(lambda *_: None)
    assert not suits(hooked)
    patched = made()
    patched[2].forward = patched[2].forward
    assert not suits(patched)
    with torch.no_grad():
        monkeypatch.setattr(gpu, "agrees", lambda *_, **__: True)
        assert grouped_experts.takes(x, index, [made()])
        with torch.autograd.forward_ad.dual_level():  # tangents would be lost
            assert not grouped_experts.takes(x, index, [made()])
    many = torch.zeros(200, 1, dtype=torch.int64)
    assert not grouped_experts.suits(x, many, [made()])
