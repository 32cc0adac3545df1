"""The onebit tensors: stored bytes, meaning, accounting, the experts' layout, and what is refused."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, ones

from hf_onebit.formats.onebit import (
    MIN_IN_FEATURES,
    bits_per_weight,
    dequantize,
    pack_signs,
    plane_names,
    storage_bits,
    tensor_specs,
    unpack_signs,
    validate_tensors,
)
from hf_onebit.formats.packing import pack, word_rows

GOLDEN = Path(__file__).parents[1] / "golden"
EXPECTED = json.loads((GOLDEN / "onebit_v1.json").read_text(encoding="utf-8"))


def random_signs(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5


def random_planes(in_features: int, out_features: int, planes: int) -> tuple[dict[str, Tensor], Tensor]:
    """A stored layer and, worked out in float64 without any packing, the matrix it stands for."""
    generator = torch.Generator().manual_seed(planes)
    tensors: dict[str, Tensor] = {}
    W = torch.zeros(out_features, in_features, dtype=torch.float64)
    for plane in range(planes):
        signs = random_signs(out_features, in_features, seed=plane)
        a = torch.randn(out_features, generator=generator).half()
        b = torch.rand(in_features, generator=generator).half()
        W += a.double()[:, None] * torch.where(signs, 1.0, -1.0).double() * b.double()[None, :]
        tensors.update(zip(plane_names(plane), (pack_signs(signs), a, b), strict=True))
    return tensors, W


def as_planes(tensors: dict[str, Tensor], planes: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    names = (plane_names(plane) for plane in range(planes))
    return [(tensors[weight], tensors[a], tensors[b]) for weight, a, b in names]


# --- stored bytes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_golden_layer(name):
    expected = EXPECTED[name]
    stored = load_file(GOLDEN / name)
    assert all(key.startswith(expected["layer"] + ".") for key in stored)
    tensors = {key.removeprefix(expected["layer"] + "."): tensor for key, tensor in stored.items()}
    sizes = expected["in"], expected["out"], expected["planes"]
    assert {key: (tuple(t.shape), t.dtype) for key, t in tensors.items()} == tensor_specs(*sizes)
    validate_tensors(tensors, *sizes, where=name)
    W = dequantize(as_planes(tensors, expected["planes"]), expected["in"])
    assert W.dtype == torch.float32
    assert W.tolist() == expected["matrix"]  # exact: the stored scales have few bits


def test_golden_header_metadata():
    with safe_open(GOLDEN / "onebit_v1_1plane.safetensors", "pt") as file:
        assert file.metadata() == {
            "format": "pt",
            "quant_library": "hf_onebit",
            "quant_method": "onebit",
            "quant_format_version": "1",
        }


def test_plane_names():
    assert plane_names(0) == ("weight", "a", "b")
    assert plane_names(1) == ("weight_1", "a_1", "b_1")


def test_tensor_specs():
    assert tensor_specs(70, 9) == {
        "weight": ((3, 9), torch.int32),
        "a": ((9,), torch.float16),
        "b": ((70,), torch.float16),
    }
    assert tensor_specs(70, 9, planes=2) == {
        **tensor_specs(70, 9),
        "weight_1": ((3, 9), torch.int32),
        "a_1": ((9,), torch.float16),
        "b_1": ((70,), torch.float16),
    }


def test_packed_shape_never_equals_the_float_shape_from_the_smallest_size_on():
    """The packed tensor is named `weight`: read as a float layer it must fail by its shape."""
    clashes = [
        (n_in, n_out, bits)
        for n_in in range(1, 200)
        for n_out in range(1, 200)
        for bits in range(1, 9)
        if (word_rows(n_in, bits), n_out) == (n_out, n_in)
    ]
    assert clashes  # the rule is needed
    assert max(n_in for n_in, _, _ in clashes) < MIN_IN_FEATURES


# --- meaning ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (3, 31), (4, 32), (5, 100), (2, 3, 4, 33), (0, 40), (7, 0)])
def test_signs_round_trip(shape):
    signs = random_signs(*shape)
    numbers = torch.where(signs, 1, -1)
    weight = pack_signs(signs)
    assert torch.equal(weight, pack(signs, 1))
    for dtype in (torch.int8, torch.float16, torch.bfloat16, torch.float32):
        assert torch.equal(pack_signs(numbers.to(dtype)), weight)
        S = unpack_signs(weight, shape[-1], dtype)
        assert S.dtype == dtype
        assert S.is_contiguous()
        assert torch.equal(S, numbers.to(dtype).transpose(-1, -2))


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize(("in_features", "out_features"), [(1, 1), (33, 7), (64, 1), (100, 40)])
def test_dequantize(in_features, out_features, planes):
    tensors, W = random_planes(in_features, out_features, planes)
    stored = as_planes(tensors, planes)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        result = dequantize(stored, in_features, dtype)
        assert result.dtype == dtype
        assert result.is_contiguous()
        torch.testing.assert_close(result, W.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)
    torch.testing.assert_close(dequantize(stored, in_features, torch.float64), W, rtol=1e-12, atol=1e-12)


def test_dequantize_ignores_padding_bits():
    tensors, _ = random_planes(33, 6, 1)
    dirty = tensors["weight"].clone()
    dirty[-1] |= -2
    assert not torch.equal(dirty, tensors["weight"])
    clean = dequantize([(tensors["weight"], tensors["a"], tensors["b"])], 33)
    assert torch.equal(dequantize([(dirty, tensors["a"], tensors["b"])], 33), clean)


def test_dequantize_is_differentiable_in_the_scales():
    tensors, _ = random_planes(33, 3, 2)
    stored = [(w, a.double().requires_grad_(), b.double().requires_grad_()) for w, a, b in as_planes(tensors, 2)]
    scales = [s for _, a, b in stored for s in (a, b)]

    def value(*scales: Tensor) -> Tensor:
        planes = [(stored[p][0], scales[2 * p], scales[2 * p + 1]) for p in range(2)]
        return dequantize(planes, 33, torch.float64)

    assert torch.autograd.gradcheck(value, scales)


# --- accounting ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("in_features", "out_features", "planes", "bias_bits", "bits"),
    [
        (576, 576, 1, 0, 331776 + 16 * 1152),  # no padding: one bit a weight, fp16 scales
        (1536, 576, 1, 0, 884736 + 16 * 2112),
        (576, 1536, 2, 0, 2 * (884736 + 16 * 2112)),
        (33, 10, 1, 0, 64 * 10 + 16 * 43),  # 33 inputs take two words, 31 bits of the second are padding
        (33, 10, 2, 16, 2 * (64 * 10 + 16 * 43) + 160),
        (64, 3, 1, 32, 64 * 3 + 16 * 67 + 96),
    ],
)
def test_storage_bits(in_features, out_features, planes, bias_bits, bits):
    assert storage_bits(in_features, out_features, planes, bias_bits) == bits
    assert bits_per_weight(in_features, out_features, planes, bias_bits) == bits / (in_features * out_features)


def test_bits_per_weight_of_smollm2():
    assert round(bits_per_weight(576, 576), 4) == 1.0556
    assert round(bits_per_weight(1536, 576), 4) == 1.0382
    assert round(bits_per_weight(576, 1536), 4) == 1.0382
    assert round(bits_per_weight(576, 576, planes=2), 4) == 2.1111


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize(("in_features", "out_features"), [(32, 1), (33, 10), (576, 192)])
def test_storage_bits_are_the_bits_of_the_tensors(in_features, out_features, planes):
    tensors, _ = random_planes(in_features, out_features, planes)
    stored = 8 * sum(t.numel() * t.element_size() for t in tensors.values())
    assert storage_bits(in_features, out_features, planes) == stored


# --- fused experts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("H", "I"), [(40, 33), (64, 96)])
def test_experts_layout(H, I):  # noqa: E741 (the letters of docs/formats.md)
    """Fused tensors are per-expert tensors stacked and concatenated; undoing that gives the same bytes."""
    E = 3
    gate, up = random_signs(E, I, H, seed=1), random_signs(E, I, H, seed=2)
    down = random_signs(E, H, I, seed=3)
    a = {name: torch.randn(E, n).half() for name, n in (("gate", I), ("up", I), ("down", H))}
    b = {name: torch.rand(E, n).half() for name, n in (("gate", H), ("up", H), ("down", I))}

    # What a checkpoint with per-expert names turns into: stack the experts, then gate's words, then up's.
    per_expert = [(pack_signs(gate[e]), pack_signs(up[e]), pack_signs(down[e])) for e in range(E)]
    merged_gate, merged_up, merged_down = (torch.stack(words) for words in zip(*per_expert, strict=True))
    gate_up = torch.cat([merged_gate, merged_up], dim=1)
    gate_up_a = torch.cat([a["gate"], a["up"]], dim=1)
    gate_up_b = torch.cat([b["gate"], b["up"]], dim=1)

    assert gate_up.shape == (E, 2 * word_rows(H), I)
    assert gate_up_a.shape == (E, 2 * I)
    assert gate_up_b.shape == (E, 2 * H)
    assert merged_down.shape == (E, word_rows(I), H)
    assert torch.equal(merged_down, pack_signs(down))

    # And back, per expert.
    for e in range(E):
        words = gate_up[e].chunk(2, dim=0)
        assert torch.equal(words[0], per_expert[e][0])
        assert torch.equal(words[1], per_expert[e][1])

    # Dequantized in one go, the fused projection is [E, 2I, H]: gate's rows, then up's.
    halves = [
        dequantize([triple], H)
        for triple in zip(gate_up.chunk(2, 1), gate_up_a.chunk(2, 1), gate_up_b.chunk(2, 1), strict=True)
    ]
    for half, signs, name in zip(halves, (gate, up), ("gate", "up"), strict=True):
        expected = a[name].float()[:, :, None] * torch.where(signs, 1.0, -1.0) * b[name].float()[:, None, :]
        assert torch.equal(half, expected)
    assert torch.cat(halves, dim=1).shape == (E, 2 * I, H)
    W = dequantize([(merged_down, a["down"], b["down"])], I)
    expected = a["down"].float()[:, :, None] * torch.where(down, 1.0, -1.0) * b["down"].float()[:, None, :]
    assert torch.equal(W, expected)


@pytest.mark.parametrize("bits", range(1, 9))
def test_experts_layout_of_wider_codes(bits):
    codes = torch.randint(0, 1 << bits, (2, 3, 10, 40), dtype=torch.uint8)  # (half, expert, I, H)
    fused = torch.cat([pack(codes[0], bits), pack(codes[1], bits)], dim=1)
    assert fused.shape == (3, 2 * 2 * bits, 10)
    for e in range(3):
        gate, up = fused[e].chunk(2, dim=0)
        assert torch.equal(gate, pack(codes[0, e], bits))
        assert torch.equal(up, pack(codes[1, e], bits))


# --- what is refused ----------------------------------------------------------------------------------------


def damaged(change) -> dict[str, Tensor]:
    tensors, _ = random_planes(40, 6, 2)
    change(tensors)
    return tensors


def set_item(tensors: dict[str, Tensor], name: str, index: int, value: float) -> None:
    tensors[name][index] = value


def set_padding(tensors: dict[str, Tensor]) -> None:
    tensors["weight_1"][1, 2] |= 1 << 8  # 40 inputs: bits 8..31 of word row 1 are padding
    tensors["weight_1"][1, 3] |= -(1 << 31)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("b_1"), r"'b_1' is missing, expected torch\.float16 \(40,\)"),
        (lambda t: t.update(weight=t["weight"].long()), r"'weight' is torch\.int64 .*, expected .*int32"),
        (lambda t: t.update(weight=t["weight"].T), r"'weight' is .* \(6, 2\), expected .* \(2, 6\)"),
        (lambda t: t.update(a=t["a"].float()), r"'a' is torch\.float32 .*, expected torch\.float16 \(6,\)"),
        (lambda t: t.update(b=t["b"][:-1]), r"'b' is .* \(39,\), expected torch\.float16 \(40,\)"),
        (lambda t: set_item(t, "a", 3, float("nan")), "'a' has 1 values that are inf or nan"),
        (lambda t: set_item(t, "b_1", 0, float("inf")), "'b_1' has 1 values that are inf or nan"),
        (set_padding, r"'weight_1' has padding bits set in 2 columns, expected zeros in bits 8\.\.31"),
    ],
)  # fmt: skip
def test_validate_tensors_names_the_fault(change, message):
    validate_tensors(damaged(lambda t: None), 40, 6, 2, "model.layer")
    with pytest.raises(ValueError, match=message) as caught:
        validate_tensors(damaged(change), 40, 6, 2, "model.layer")
    assert str(caught.value).startswith("model.layer: ")
    assert "save or quantize the model again" in str(caught.value)


def test_validate_tensors_refuses_a_surplus_plane_but_not_a_bias():
    tensors, _ = random_planes(40, 6, 2)
    with pytest.raises(ValueError, match="m: got a tensor 'weight_1', expected none with planes=1"):
        validate_tensors(tensors, 40, 6, 1, "m")
    first = {name: tensors[name] for name in plane_names(0)}
    validate_tensors({**first, "bias": torch.full((6,), float("nan"))}, 40, 6, 1, "m")


def test_validate_tensors_on_meta():
    tensors = {name: t.to("meta") for name, t in random_planes(40, 6, 2)[0].items()}
    validate_tensors(tensors, 40, 6, 2, "m")
    with pytest.raises(ValueError, match="'weight' is"):
        validate_tensors(tensors, 400, 6, 2, "m")


def test_validate_tensors_without_padding():
    tensors = {
        "weight": torch.full((2, 3), -1, dtype=torch.int32),
        "a": torch.ones(3).half(),
        "b": torch.ones(64).half(),
    }
    validate_tensors(tensors, 64, 3, 1, "m")


one_word = torch.zeros(1, 3, dtype=torch.int32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plane_names(2), "plane must be between 0 and 1, got 2"),
        (lambda: plane_names(-1), "plane must be between 0 and 1, got -1"),
        (lambda: tensor_specs(32, 3, planes=3), "planes must be between 1 and 2, got 3"),
        (lambda: tensor_specs(32, -3), "out_features must not be negative, got -3"),
        (lambda: storage_bits(32, 3, planes=0), "planes must be between 1 and 2, got 0"),
        (lambda: storage_bits(32, 3, bias_bits=-1), "bias_bits must not be negative, got -1"),
        (lambda: bits_per_weight(0, 3), "has no weights"),
        (lambda: pack_signs(torch.tensor([[1.0, 0.0, -1.0]])), r"must be \+1 or -1"),
        (lambda: pack_signs(torch.tensor([[1.0, float("nan")]])), r"must be \+1 or -1"),
        (lambda: pack_signs(torch.ones(2, 2, dtype=torch.uint8)), r"a signed dtype of ±1, got torch\.uint8"),
        (lambda: unpack_signs(one_word, 32, torch.uint8), r"hold -1, got torch\.uint8"),
        (lambda: unpack_signs(one_word, 33), "take 2 word rows"),
        (lambda: dequantize([], 32), "planes must be between 1 and 2, got 0"),
        (lambda: dequantize([(one_word, ones(1), ones(32))], 32), r"a has shape \(1,\), expected .* 3\)"),
        (lambda: dequantize([(one_word, ones(3), ones(1))], 32), r"b has shape \(1,\), expected .* 32\)"),
    ],
)  # fmt: skip
def test_refusals_say_what_was_got_and_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_docs_list_the_tensors_of_a_layer():
    """docs/formats.md and tensor_specs say the same."""
    text = (Path(__file__).parents[2] / "docs" / "formats.md").read_text(encoding="utf-8")
    text = text.partition("## A group-quantized layer")[0]
    rows = re.findall(r"^\| `(weight|a|b|weight_1|a_1|b_1)` \| (int32|float16) \| `(\([^`]*\))` \|", text, re.M)
    shapes = {"(ceil(in / 32), out)": (3, 9), "(out,)": (9,), "(in,)": (70,)}
    documented = {name: (shapes[shape], getattr(torch, dtype)) for name, dtype, shape in rows}
    assert documented == tensor_specs(70, 9, planes=2)


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_the_reader_shown_in_the_docs(name):
    text = (Path(__file__).parents[2] / "docs" / "formats.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n([^`]*?def read_layer.*?)^```", text, re.M | re.S)
    scope: dict = {}
    exec(code, scope)
    expected = EXPECTED[name]
    arrays = {key: tensor.numpy() for key, tensor in load_file(GOLDEN / name).items()}
    W = scope["read_layer"](arrays, expected["layer"], expected["in"])
    assert W.tolist() == expected["matrix"]


def test_bits_per_weight_shown_in_the_docs():
    text = (Path(__file__).parents[2] / "docs" / "formats.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| (\d+) \| ([12]) \| (\d\.\d{4}) \|$", text, re.M)
    assert len(rows) == 5
    for in_features, out_features, planes, shown in rows:
        assert f"{bits_per_weight(int(in_features), int(out_features), int(planes)):.4f}" == shown
