"""Statistics in few bits: exact once stored, close before, small, and refused where damaged."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_onebit.formats import mbwq, mpq
from hf_onebit.formats.double_quant import (
    DoubleQuant,
    compress,
    expand,
    storage_bits,
    tensor_names,
    tensor_specs,
    through,
)


def statistics(groups=5, outputs=200, symmetric=False, seed=0, spread=0.4, size=0.01, sign=False):
    generator = torch.Generator().manual_seed(seed)
    scales = (torch.randn(groups, outputs, generator=generator) * spread).exp() * size
    if sign:
        scales *= torch.randint(0, 2, scales.shape, generator=generator) * 2 - 1
    zeros = scales * (8 + torch.randn(groups, outputs, generator=generator))
    scales, zeros = (t.clamp(-65504, 65504).half() for t in (scales, zeros))
    return scales, None if symmetric else zeros


def equal(a, b):
    return all((x is None and y is None) or torch.equal(x, y) for x, y in zip(a, b, strict=True))


@settings(max_examples=200, deadline=None)
@given(
    scale_bits=st.integers(3, 8),
    zero_bits=st.integers(3, 8),
    block=st.sampled_from([32, 64, 256]),
    outputs=st.integers(1, 300),
    symmetric=st.booleans(),
    seed=st.integers(0, 10000),
    spread=st.sampled_from([0.0, 0.01, 0.4, 3.0]),
    size=st.sampled_from([1e-7, 1e-5, 1e-3, 0.1, 30.0]),
    sign=st.booleans(),
    bits=st.integers(1, 8),
)
def test_what_was_stored_is_stored_again(
    scale_bits, zero_bits, block, outputs, symmetric, seed, spread, size, sign, bits
):
    spec, middle = DoubleQuant(scale_bits, zero_bits, block), mpq.zero_point(bits)
    first = through(*statistics(3, outputs, symmetric, seed, spread, size, sign), middle, spec)
    tensors = compress(*first, middle, spec)
    again = expand(tensors, 3, outputs, symmetric, middle, spec)
    assert equal(again, first)
    for tensor in tensors.values():
        assert tensor.dtype == torch.int32 or bool(tensor.isfinite().all())


@pytest.mark.parametrize("symmetric", [True, False])
def test_errors_are_at_most_half_a_step(symmetric):
    for spec in (DoubleQuant(), DoubleQuant(8, 8, 64), DoubleQuant(4, 4, 32)):
        scales, zeros = statistics(symmetric=symmetric)
        tensors = compress(scales, zeros, 8.0, spec)
        restored = expand(tensors, 5, 200, symmetric, 8.0, spec)
        for i, name in enumerate(("scales", "zeros")[: 2 - symmetric]):
            wanted, got = (scales, zeros)[i].float(), restored[i].float()
            step = tensors[f"q{name}_scales"].float().repeat_interleave(spec.block, 1)[:, :200]
            rounding = got.abs() * 2**-10
            assert ((got - wanted).abs() <= step / 2 + rounding).all()
            # And the steps are about as small as the range allows.
            base = torch.zeros_like(wanted) if i == 0 else restored[0].float() * 8
            for g in range(5):
                for b, first in enumerate(range(0, 200, spec.block)):
                    part = (wanted - base)[g, first : first + spec.block]
                    width = float(part.max() - part.min()) / (2 ** spec.bits_of(name) - 2)
                    most = max(width, float(wanted[g, first : first + spec.block].abs().max()) / 512)
                    assert float(tensors[f"q{name}_scales"][g, b]) <= 1.15 * most


def test_constant_and_empty_statistics():
    spec = DoubleQuant()
    for scales in (torch.zeros(2, 40), torch.full((2, 40), 0.125), torch.full((2, 40), -3e-8)):
        assert equal(through(scales.half(), scales.half() * 8, 8.0, spec)[:1], (scales.half(),))
    scales, zeros = through(torch.zeros(2, 0), torch.zeros(2, 0), 8.0, spec)
    assert scales.shape == zeros.shape == (2, 0)


def test_widths_that_differ_from_group_to_group():
    blocks = [(6, 32, 32), (3, 64, 32)]
    scales, zeros = statistics(groups=3)
    middle, spec = mbwq.zero_points(blocks), DoubleQuant()
    first = through(scales, zeros, middle, spec)
    assert equal(through(*first, middle, spec), first)
    assert float((first[1] - zeros).abs().max()) < float(zeros.abs().max())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("outputs", [32, 64, 96, 128, 192, 320, 576, 1536, 4096])
def test_groups_of_32_take_less_than_three_tenths_of_a_bit(outputs, symmetric):
    spec = DoubleQuant.default(symmetric, outputs)
    assert outputs < 128 or spec == DoubleQuant.default(symmetric)
    groups = 18
    assert storage_bits(groups, outputs, symmetric, spec) < 0.3 * 32 * groups * outputs
    tensors = compress(*statistics(groups, outputs, symmetric), 8.0, spec)
    assert {n: (tuple(t.shape), t.dtype) for n, t in tensors.items()} == tensor_specs(groups, outputs, symmetric, spec)
    assert tuple(tensors) == tensor_names(symmetric)
    assert storage_bits(groups, outputs, symmetric, spec) == sum(8 * t.nbytes for t in tensors.values())


def test_refusals():
    for arguments in ((2, 4, 64), (9, 4, 64), (True, 4, 64), (5, 4, 40), (5, 4.0, 64), (5, 4, 0)):
        with pytest.raises(ValueError, match="double_quant: "):
            DoubleQuant(*arguments)
    assert DoubleQuant.from_dict({"block": 64}) == DoubleQuant(block=64)
    assert DoubleQuant.from_dict(DoubleQuant(6, 5, 96).to_dict()) == DoubleQuant(6, 5, 96)
    tensors = compress(*statistics(), 8.0, DoubleQuant())
    with pytest.raises(ValueError, match="here: 'qzeros_scales' is missing"):
        expand({k: v for k, v in tensors.items() if k != "qzeros_scales"}, 5, 200, False, 8.0, DoubleQuant(), "here")
    with pytest.raises(ValueError, match=r"'qscales' is torch.int32 \(35, 5\), expected torch.int32 \(56, 5\)"):
        expand(tensors, 5, 200, False, 8.0, DoubleQuant(scale_bits=8))
