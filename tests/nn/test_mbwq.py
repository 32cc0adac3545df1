"""MBWQLinear as a module: construction, forward, casts, refusals. Copies and loading: test_parameter.py."""

import pytest
import torch
from torch import nn

from hf_onebit.formats import mbwq
from hf_onebit.nn import MBWQLinear, MPQLinear

MIXED = [(6, 32, 32), (3, 70, 64)]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("q_perm", [False, True])
@pytest.mark.parametrize("blocks", [MIXED, [(2, 102, 32)], [(7, 102, -1)]], ids=str)
def test_forward_is_that_of_the_dequantized_module(blocks, q_perm, symmetric):
    order = torch.randperm(102) if q_perm else False
    layer = MBWQLinear(102, 33, blocks=blocks, symmetric=symmetric, q_perm=order)
    x = torch.randn(2, 3, 102)
    expected = nn.functional.linear(x.double(), layer.dequantize(torch.float64), layer.bias.double())
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer(x[0, 0]).double(), expected[0, 0], rtol=1e-4, atol=1e-5)
    stored = sum(p.numel() * p.element_size() for n, p in layer.named_parameters() if n != "bias") + 4 * 33
    assert layer.bits_per_weight() == pytest.approx(8 * stored / (33 * 102))
    if q_perm:  # the same layer in the inputs' own order
        plain = MBWQLinear(102, 33, blocks=blocks, symmetric=symmetric)
        plain.set_tensors({n: p.detach() for n, p in layer.named_parameters() if n != "q_perm"})
        torch.testing.assert_close(plain(x[..., order]), layer(x))


def test_the_identity_is_a_permutation_like_any_other():
    layer = MBWQLinear(64, 9, blocks=[(4, 64, 32)], q_perm=True)
    assert layer.q_perm.tolist() == list(range(64))
    plain = MPQLinear(64, 9, bits=4, group_size=32)
    plain.set_tensors({n: p.detach() for n, p in layer.named_parameters() if n != "q_perm"})
    x = torch.randn(3, 64)
    assert torch.equal(layer(x), plain(x))
    assert torch.equal(layer.dequantize(), plain.dequantize())


def test_more_inputs_than_16_bits_count():
    order = torch.randperm(70000)
    layer = MBWQLinear(70000, 2, False, blocks=[(3, 1024, 64), (2, 68976, 96)], q_perm=order)
    x = torch.randn(1, 70000)
    torch.testing.assert_close(layer(x), x @ layer.dequantize().T, rtol=1e-4, atol=1e-4)
    assert layer.weight.q_group_map.dtype == torch.int16  # 735 groups of at most 96
    torch.testing.assert_close(layer.weight.float_weight().T, layer.dequantize())


def test_orders_in_int16_are_unsigned():
    order = torch.randperm(40000)
    layer = MBWQLinear(40000, 2, False, blocks=[(2, 40000, 64)], q_perm=order.to(torch.int16))
    assert torch.equal(layer.q_perm, order.int())


def test_parameters_and_attributes():
    layer = MBWQLinear(102, 24, blocks=MIXED, symmetric=False, q_perm=True, source="Conv1D")
    shapes = {name: (tuple(p.shape), p.dtype, p.requires_grad) for name, p in layer.named_parameters()}
    assert shapes == {
        "weight": ((15, 24), torch.int32, False),
        "scales": ((3, 24), torch.float16, False),
        "zeros": ((3, 24), torch.float16, False),
        "q_perm": ((102,), torch.int32, False),
        "bias": ((24,), torch.float32, True),
    }
    assert isinstance(layer, nn.Linear)
    assert (layer.bits, layer.group_size, layer.blocks) == (6, 32, tuple(MIXED))
    assert layer._is_hf_initialized
    assert layer.weight.rows == [0, 32, 32, 32, 102, 102, 0b100100]
    assert torch.equal(layer.weight.q_group_map, mbwq.group_map(MIXED))
    layer = layer.to(torch.bfloat16)
    assert (layer.scales.dtype, layer.zeros.dtype, layer.bias.dtype) == (torch.float16, torch.float16, torch.bfloat16)
    assert repr(MBWQLinear(102, 24, False, blocks=MIXED)) == (
        "MBWQLinear(in_features=102, out_features=24, bias=False, blocks=((6, 32, 32), (3, 70, 64)), symmetric=True, "
        "q_perm=False)"
    )


@pytest.mark.parametrize("symmetric", [True, False])
def test_new_modules_have_the_scale_of_float_ones(symmetric):
    layer = MBWQLinear(512, 256, blocks=[(8, 128, 64), (4, 384, 64)], symmetric=symmetric)
    assert 0.8 < float(layer.dequantize().std() * (3 * 512) ** 0.5) < 1.1
    assert abs(float(layer.dequantize().mean())) < 0.005


def test_autocast_and_meta():
    layer = MBWQLinear(102, 9, blocks=MIXED, q_perm=torch.randperm(102))
    x = torch.randn(2, 102)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, layer(x.bfloat16()))
    with torch.device("meta"):
        layer = MBWQLinear(102, 9, blocks=MIXED, q_perm=True)
    assert layer(torch.empty(2, 102, device="meta")).shape == (2, 9)
    layer.to_empty(device="cpu").reset_parameters()
    assert torch.isfinite(layer(x)).all()


def test_a_frozen_layer_passes_gradients_on():
    layer = MBWQLinear(102, 9, blocks=MIXED, q_perm=torch.randperm(102))
    layer.scales.requires_grad_()
    x = torch.randn(4, 102, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.dequantize().sum(0).expand(4, 102), rtol=1e-4, atol=1e-5)
    assert layer.scales.grad.shape == layer.scales.shape
    assert layer.bias.grad.tolist() == [4] * 9


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MBWQLinear(0, 3, blocks=MIXED), "MBWQLinear got in_features=0: expected a whole number >= 1"),
        (lambda: MBWQLinear(100, 3, blocks=MIXED), "MBWQLinear got blocks=.*102 rows together, expected 100"),
        (lambda: MBWQLinear(32, 3, blocks=None), "MBWQLinear got blocks=None"),
        (lambda: MBWQLinear(102, 3, blocks=MIXED, symmetric=1), "got symmetric=1: expected True or False"),
        (lambda: MBWQLinear(102, 3, blocks=MIXED, source="Conv2d"), "got source='Conv2d'"),
        (lambda: MBWQLinear(102, 3, blocks=MIXED, q_perm=1), "got q_perm=1: expected True, False, or"),
        (lambda: MBWQLinear(102, 3, blocks=MIXED, q_perm=torch.arange(101)), r"torch.int64 \(101,\): expected True"),
        (lambda: MBWQLinear(102, 3, blocks=MIXED, q_perm=torch.zeros(102).int()), "no permutation.*all zeros"),
        (lambda: MBWQLinear(102, 3, blocks=MIXED).set_tensors({}), "MBWQLinear.set_tensors: 'weight' is missing"),
        (lambda: MPQLinear(64, 3, g_idx=torch.full((64,), 1)), "g_idx has values from 1 to 1, expected 0..0"),
        (lambda: MPQLinear(64, 3, g_idx=torch.zeros(63).int()), r"got g_idx=torch.int32 \(63,\)"),
        (lambda: MPQLinear(64, 3, g_idx=torch.zeros(64)), "got g_idx=torch.float32"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_wrong_width_is_refused():
    with pytest.raises(RuntimeError, match=r"MBWQLinear got x of shape \(2, 96\), expected \(\.\.\., 102\)"):
        MBWQLinear(102, 3, blocks=MIXED)(torch.randn(2, 96))
