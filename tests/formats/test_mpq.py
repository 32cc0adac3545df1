"""The tensors of group-quantized layers: stored bytes, meaning, accounting, and what is refused."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hf_onebit.formats.mpq import (
    bits_per_weight,
    dequantize,
    group_count,
    storage_bits,
    tensor_names,
    tensor_specs,
    validate_tensors,
    zero_point,
)
from hf_onebit.formats.packing import pack

GOLDEN = Path(__file__).parents[1] / "golden"
EXPECTED = json.loads((GOLDEN / "mpq_v1.json").read_text(encoding="utf-8"))
DOCS = (Path(__file__).parents[2] / "docs" / "formats.md").read_text(encoding="utf-8")


def random_layer(in_features=70, out_features=9, bits=3, group_size=32, symmetric=False, seed=0):
    """A stored layer and, element by element in float64, the matrix it stands for."""
    generator = torch.Generator().manual_seed(seed)
    groups = group_count(in_features, group_size)
    codes = torch.randint(0, 1 << bits, (out_features, in_features), generator=generator, dtype=torch.uint8)
    tensors = {
        "weight": pack(codes, bits),
        "scales": torch.randn(groups, out_features, generator=generator).half(),
    }
    if not symmetric:
        tensors["zeros"] = torch.randn(groups, out_features, generator=generator).half()
    W = torch.zeros(out_features, in_features, dtype=torch.float64)
    for k in range(in_features):
        g = 0 if group_size == -1 else k // group_size
        scale = tensors["scales"][g].double()
        zero = scale * zero_point(bits) if symmetric else tensors["zeros"][g].double()
        W[:, k] = scale * codes[:, k] - zero
    return tensors, W


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_golden_layer(name):
    expected = EXPECTED[name]
    tensors = {key.removeprefix(expected["layer"] + "."): t for key, t in load_file(GOLDEN / name).items()}
    about = expected["bits"], expected["group_size"], expected["symmetric"]
    sizes = expected["in"], expected["out"]
    specs = tensor_specs(*sizes, *about)
    assert {key: (tuple(t.shape), t.dtype) for key, t in tensors.items()} == specs
    assert tuple(specs) == tensor_names(expected["symmetric"])
    validate_tensors(tensors, *sizes, *about, where=name)
    W = dequantize(tensors["weight"], tensors["scales"], tensors.get("zeros"), expected["in"], *about[:2])
    assert W.dtype == torch.float32
    assert W.tolist() == expected["matrix"]  # exact: the stored scales have few bits


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_the_reader_shown_in_the_docs(name):
    (code,) = re.findall(r"^```python\n([^`]*?def read_group_layer.*?)^```", DOCS, re.M | re.S)
    scope: dict = {}
    exec(code, scope)
    expected = EXPECTED[name]
    arrays = {key: tensor.numpy() for key, tensor in load_file(GOLDEN / name).items()}
    group_size = expected["group_size"]
    W = scope["read_group_layer"](arrays, expected["layer"], expected["in"], expected["bits"], group_size)
    assert W.tolist() == expected["matrix"]


def test_docs_list_the_tensors_and_the_bits_per_weight():
    rows = re.findall(r"^\| `(weight|scales|zeros)` \| (int32|float16) \| `(\([^`]*\))` \|", DOCS, re.M)
    shapes = {"(ceil(in / 32) * b, out)": (9, 9), "(groups, out)": (3, 9)}
    documented = {n: (shapes[s], getattr(torch, d)) for n, d, s in rows if s in shapes}
    assert documented == tensor_specs(70, 9, 3, 32, symmetric=False)
    shown = re.findall(r"^\| (\d+) \| (\d+) \| (\d) \| (-?\d+) \| (yes|no) \| (\d+\.\d{4}) \|$", DOCS, re.M)
    assert len(shown) == 5
    for in_features, out_features, bits, group_size, symmetric, value in shown:
        about = int(in_features), int(out_features), int(bits), int(group_size), symmetric == "yes"
        assert f"{bits_per_weight(*about):.4f}" == value


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, 64, 96, -1])
@pytest.mark.parametrize("bits", range(1, 9))
def test_dequantize(bits, group_size, symmetric):
    for in_features, out_features in ((1, 1), (64, 3), (100, 40)):
        tensors, W = random_layer(in_features, out_features, bits, group_size, symmetric)
        layer = tensors["weight"], tensors["scales"], tensors.get("zeros")
        torch.testing.assert_close(dequantize(*layer, in_features, bits, group_size, torch.float64), W)
        single = dequantize(*layer, in_features, bits, group_size)
        assert single.is_contiguous()
        if symmetric:
            assert torch.equal(single.double(), W)  # exact, as the docstring says
        for dtype in (torch.float16, torch.bfloat16):
            assert torch.equal(dequantize(*layer, in_features, bits, group_size, dtype), single.to(dtype))
        assert storage_bits(in_features, out_features, bits, group_size, symmetric) == 8 * sum(
            t.numel() * t.element_size() for t in tensors.values()
        )


def test_symmetric_levels():
    """Codes 0 .. Q of a scale of 1; one level more below zero than above, from two bits on."""
    for bits, levels in ((1, [-0.5, 0.5]), (2, [-2, -1, 0, 1]), (3, [-4, -3, -2, -1, 0, 1, 2, 3])):
        codes = torch.arange(1 << bits, dtype=torch.uint8).unsqueeze(0)
        W = dequantize(pack(codes, bits), torch.ones(1, 1).half(), None, 1 << bits, bits, -1)
        assert W.tolist() == [levels]


def test_padding_codes_do_not_matter_and_batches_do():
    tensors, W = random_layer(33, 6, 5, 32)
    dirty = tensors["weight"].clone()
    dirty[-1] |= -(1 << 20)
    for weight in (tensors["weight"], dirty):
        stack = (t.expand(2, 4, *t.shape) for t in (weight, tensors["scales"], tensors["zeros"]))
        result = dequantize(*stack, 33, 5, 32, torch.float64)
        torch.testing.assert_close(result, W.expand(2, 4, 6, 33))


def test_dequantize_is_differentiable():
    tensors, _ = random_layer(40, 3, 2, 32)
    statistics = [tensors[n].double().requires_grad_() for n in ("scales", "zeros")]
    assert torch.autograd.gradcheck(
        lambda s, z: dequantize(tensors["weight"], s, z, 40, 2, 32, torch.float64), statistics
    )


@pytest.mark.parametrize("group_size", [0, -2, 16, 33, -32])
def test_group_sizes_that_cannot_be(group_size):
    with pytest.raises(ValueError, match=f"multiple of 32, or -1 for the whole row, got {group_size}"):
        group_count(64, group_size)


def set_padding(tensors: dict[str, Tensor]) -> None:
    tensors["weight"][-1, 2:4] |= 1 << 31


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("zeros"), r"'zeros' is missing, expected torch\.float16 \(3, 9\)"),
        (lambda t: t.update(weight=t["weight"].long()), r"'weight' is torch\.int64 .*, expected torch\.int32"),
        (lambda t: t.update(weight=t["weight"][1:]), r"'weight' is .*\(8, 9\), expected torch\.int32 \(9, 9\)"),
        (lambda t: t.update(scales=t["scales"].float()), r"'scales' is torch\.float32 .*, expected torch\.float16"),
        (lambda t: t.update(zeros=t["zeros"].T), r"'zeros' is .*\(9, 3\), expected torch\.float16 \(3, 9\)"),
        (lambda t: t["scales"][0].fill_(float("inf")), "'scales' has 9 values that are inf or nan"),
        (set_padding, r"'weight' has padding codes set in 2 columns, expected zeros for the codes 6\.\.31"),
    ],
)  # fmt: skip
def test_validate_tensors_names_the_fault(change, message):
    tensors, _ = random_layer()
    about = (70, 9, 3, 32, False, "model.layer")
    validate_tensors({**tensors, "bias": torch.full((9,), float("nan"))}, *about)
    change(tensors)
    with pytest.raises(ValueError, match=message) as caught:
        validate_tensors(tensors, *about)
    assert str(caught.value).startswith("model.layer: ")
    assert "save or quantize the model again" in str(caught.value)


def test_validate_tensors_refuses_surplus_zeros_and_takes_meta():
    tensors, _ = random_layer()
    with pytest.raises(ValueError, match="m: got a tensor 'zeros', expected none in a symmetric layer"):
        validate_tensors(tensors, 70, 9, 3, 32, True, "m")
    validate_tensors({name: t.to("meta") for name, t in tensors.items()}, 70, 9, 3, 32, False, "m")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: zero_point(0), "bits must be between 1 and 8, got 0"),
        (lambda: tensor_specs(32, -1, 4, 32, True), "out_features must not be negative, got -1"),
        (lambda: group_count(-1, 32), "in_features must not be negative, got -1"),
        (lambda: storage_bits(32, 1, 4, 32, True, -1), "bias_bits must not be negative, got -1"),
        (lambda: storage_bits(32, -1, 4, 32, True), "out_features must not be negative"),
        (lambda: bits_per_weight(0, 1, 4, 32, True), "has no weights"),
        (
            lambda: dequantize(torch.zeros(4, 3, dtype=torch.int32), torch.ones(2, 3), None, 32, 4, 32),
            r"scales has shape \(2, 3\), expected \(\.\.\., 1, 3\): 32 inputs in groups of 32",
        ),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
