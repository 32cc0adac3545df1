"""MPQLinear and MPQEmbedding as modules: construction, casts, copies, loading, refusals."""

import copy
import pickle

import pytest
import torch
from torch import nn

from hf_onebit.algorithms.groupwise import quantize_groupwise
from hf_onebit.formats import mpq as fmt
from hf_onebit.formats.packing import pack
from hf_onebit.nn import MPQEmbedding, MPQLinear

KINDS = [
    (bits, group_size, symmetric) for bits in range(1, 9) for group_size in (32, -1) for symmetric in (True, False)
]


def quantized(W, bits, group_size, symmetric):
    codes, scales, zeros = quantize_groupwise(W, bits, group_size, symmetric)
    tensors = {"weight": pack(codes, bits), "scales": scales}
    return tensors if zeros is None else {**tensors, "zeros": zeros}


@pytest.mark.parametrize(("bits", "group_size", "symmetric"), KINDS)
def test_forward_is_that_of_the_dequantized_module(bits, group_size, symmetric):
    options = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
    layer = MPQLinear(70, 33, **options)
    x = torch.randn(2, 3, 70)
    expected = nn.functional.linear(x.double(), layer.dequantize(torch.float64), layer.bias.double())
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-4, atol=1e-5)
    embedding = MPQEmbedding(33, 70, **options, dtype=torch.bfloat16)
    ids = torch.randint(0, 33, (2, 5))
    assert torch.equal(embedding(ids), nn.functional.embedding(ids, embedding.dequantize(torch.bfloat16)))


@pytest.mark.parametrize(("bits", "group_size", "symmetric"), KINDS)
def test_set_tensors_takes_what_the_quantizer_gives(bits, group_size, symmetric):
    W, options = torch.randn(33, 70), {"bits": bits, "group_size": group_size, "symmetric": symmetric}
    tensors = quantized(W, bits, group_size, symmetric)
    layer, embedding = MPQLinear(70, 33, False, **options), MPQEmbedding(33, 70, **options)
    for module in (layer, embedding):
        module.set_tensors(tensors)
        error = float((module.dequantize() - W).norm() / W.norm())
        assert error < {1: 0.7, 2: 0.45, 3: 0.25, 4: 0.14}.get(bits, 0.07)
        assert module.bits_per_weight() == fmt.bits_per_weight(70, 33, bits, group_size, symmetric)
        stored = sum(p.numel() * p.element_size() for p in module.parameters())
        assert module.bits_per_weight() == pytest.approx(8 * stored / (33 * 70))


def test_parameters_and_defaults():
    layer = MPQLinear(100, 24)
    shapes = {name: (tuple(p.shape), p.dtype, p.requires_grad) for name, p in layer.named_parameters()}
    assert shapes == {
        "weight": ((16, 24), torch.int32, False),
        "scales": ((2, 24), torch.float16, False),
        "bias": ((24,), torch.float32, True),
    }
    assert isinstance(layer, nn.Linear)
    assert layer.zeros is None
    embedding = MPQEmbedding(50, 100, -1, symmetric=False, group_size=32)
    assert isinstance(embedding, nn.Embedding)
    assert embedding.padding_idx == 49
    assert {n: tuple(p.shape) for n, p in embedding.named_parameters()} == {
        "weight": (32, 50),
        "scales": (4, 50),
        "zeros": (4, 50),
    }
    assert not embedding(torch.tensor([49])).any()
    assert layer._is_hf_initialized
    assert embedding._is_hf_initialized


def test_new_modules_have_the_scale_of_float_ones():
    for bits in (3, 4, 8):
        for symmetric in (True, False):
            layer, embedding = (
                MPQLinear(512, 256, bits=bits, symmetric=symmetric),
                MPQEmbedding(100, 256, bits=bits, symmetric=symmetric),
            )
            assert 0.8 < float(layer.dequantize().std() * (3 * 512) ** 0.5) < 1.1
            assert 0.8 < float(embedding.dequantize().std()) < 1.1
            assert abs(float(embedding.dequantize().mean())) < 0.05


@pytest.mark.parametrize("embed_scale", [None, 24.7])
def test_casts_change_the_result_and_not_the_scales(embed_scale):
    embedding = MPQEmbedding(20, 64, embed_scale=embed_scale)
    before = embedding.scales.clone()
    ids = torch.arange(20)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        embedding = embedding.to(dtype)
        assert embedding.dtype == dtype
        assert embedding.scales.dtype == torch.float16
        assert torch.equal(embedding.scales, before)
        y = embedding(ids)
        assert y.dtype == dtype
        plain = embedding.dequantize(dtype)
        # As a float embedding of that dtype that is multiplied by a buffer rounded to it.
        assert torch.equal(y, plain if embed_scale is None else plain * torch.tensor(embed_scale, dtype=dtype))
    assert embedding.half().float()(ids).dtype == torch.float32
    assert embedding.to("cpu").dtype == torch.float32
    assert MPQEmbedding(20, 64, dtype=torch.bfloat16)(ids).dtype == torch.bfloat16
    layer = MPQLinear(64, 20, symmetric=False).to(torch.bfloat16)
    assert (layer.scales.dtype, layer.zeros.dtype, layer.bias.dtype) == (torch.float16, torch.float16, torch.bfloat16)


def test_default_dtype_of_an_embedding():
    torch.set_default_dtype(torch.bfloat16)
    assert MPQEmbedding(20, 64)(torch.tensor([1])).dtype == torch.bfloat16


@pytest.mark.parametrize("make", [lambda: MPQLinear(70, 9, symmetric=False), lambda: MPQEmbedding(9, 70, bits=3)])
def test_copies(make):
    module = make().to(torch.bfloat16)
    x = torch.randn(2, 70).bfloat16() if isinstance(module, MPQLinear) else torch.tensor([0, 8])
    expected = module(x)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x), expected)
        assert other.scales.data_ptr() != module.scales.data_ptr()
    for assign in (False, True):
        with torch.device("meta" if assign else "cpu"):
            other = make().to(torch.bfloat16)
        other.load_state_dict(module.state_dict(), assign=assign)
        assert torch.equal(other(x), expected)
        assert not other.weight.requires_grad
        assert not other.scales.requires_grad


def test_meta():
    with torch.device("meta"):
        layer, embedding = MPQLinear(70, 9), MPQEmbedding(9, 70, 0)
    assert layer(torch.empty(2, 70, device="meta")).shape == (2, 9)
    assert embedding(torch.zeros(2, 3, dtype=torch.int64, device="meta")).shape == (2, 3, 70)
    for module in (layer, embedding):
        module.to_empty(device="cpu").reset_parameters()
        assert torch.isfinite(module.dequantize()).all()
    assert MPQEmbedding(9, 70).to("meta").half().dtype == torch.float16


def test_autocast():
    layer = MPQLinear(70, 9)
    x = torch.randn(2, 70)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, layer(x.bfloat16()))


def test_compiles_whole():
    model = nn.Sequential(MPQEmbedding(20, 64, embed_scale=3.0), MPQLinear(64, 20, bits=3))
    ids = torch.tensor([[1, 2], [3, 19]])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids), model(ids))


def test_a_frozen_layer_passes_gradients_on():
    layer = MPQLinear(70, 9)
    x = torch.randn(4, 70, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.dequantize().sum(0).expand(4, 70), rtol=1e-4, atol=1e-5)
    assert layer.bias.grad.tolist() == [4] * 9


def test_repr():
    assert repr(MPQLinear(70, 9, False)) == (
        "MPQLinear(in_features=70, out_features=9, bias=False, bits=4, group_size=64, symmetric=True)"
    )
    assert repr(MPQEmbedding(9, 70, 1, embed_scale=2)) == (
        "MPQEmbedding(9, 70, padding_idx=1, embed_scale=2, bits=8, group_size=64, symmetric=True, dtype=torch.float32)"
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MPQLinear(0, 3), "MPQLinear got in_features=0: expected a whole number >= 1"),
        (lambda: MPQLinear(32, 3, bits=9), "MPQLinear got bits=9: expected a whole number from 1 to 8"),
        (lambda: MPQLinear(32, 3, bits=True), "MPQLinear got bits=True"),
        (lambda: MPQLinear(32, 3, group_size=40), "multiple of 32, or -1 for the whole row, got 40"),
        (lambda: MPQLinear(32, 3, group_size=32.0), "got group_size=32.0: expected a whole number"),
        (lambda: MPQLinear(32, 3, symmetric=1), "got symmetric=1: expected True or False"),
        (lambda: MPQLinear(32, 3, source="Conv2d"), "got source='Conv2d'"),
        (lambda: MPQEmbedding(3, 32.0), "MPQEmbedding got embedding_dim=32.0"),
        (lambda: MPQEmbedding(3, 32, 3), "got padding_idx=3, expected one of 3 rows"),
        (lambda: MPQLinear(32, 3).set_tensors({}), "MPQLinear.set_tensors: 'weight' is missing"),
        (
            lambda: MPQLinear(32, 3).set_tensors({**MPQLinear(32, 3).state_dict(), "a": torch.ones(3)}),
            "MPQLinear.set_tensors: got a, this module has weight, scales, bias",
        ),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_wrong_width_is_refused_though_its_words_would_fit():
    with pytest.raises(RuntimeError, match=r"MPQLinear got x of shape \(2, 64\), expected \(\.\.\., 60\)"):
        MPQLinear(60, 3)(torch.randn(2, 64))
