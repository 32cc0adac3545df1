"""The bit order: golden bytes, a naive oracle, odd sizes, and what is refused."""

import json
import re
import struct
from pathlib import Path

import pytest
import torch
from golden.make_format_v1 import NAMES, main, naive_pack, words_to_bytes
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_onebit.formats import packing
from hf_onebit.formats.packing import pack, unpack, unpack_rows, word_rows

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = json.loads((GOLDEN / "packing_v1.json").read_text(encoding="utf-8"))
INTEGERS = (
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64,
)  # fmt: skip


def to_bytes(words: Tensor) -> bytes:
    return b"".join(struct.pack("<i", word) for word in words.flatten().tolist())


def random_codes(shape: tuple[int, ...], bits: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 1 << bits, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def case_tensors(case: dict) -> tuple[Tensor, bytes]:
    codes = torch.tensor(list(bytes.fromhex(case["codes"])), dtype=torch.uint8)
    return codes.reshape(case["out"], case["in"]), bytes.fromhex(case["words"])


@pytest.fixture
def poisoned():
    """Fill what torch.empty returns, so that a kernel that leaves an element unwritten shows."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['bits']}bit-{c['out']}x{c['in']}")
def test_golden_bytes_both_ways(case, poisoned):
    codes, expected = case_tensors(case)
    words = pack(codes, case["bits"])
    assert words.shape == (word_rows(case["in"], case["bits"]), case["out"])
    assert to_bytes(words) == expected
    stored = torch.tensor([w for (w,) in struct.iter_unpack("<i", expected)], dtype=torch.int32).reshape(words.shape)
    assert torch.equal(unpack(stored, case["bits"], case["in"]), codes)


def test_golden_covers_every_width_and_both_paddings():
    assert {case["bits"] for case in CASES} == set(range(1, 9))
    assert {case["in"] % 32 == 0 for case in CASES} == {True, False}


@pytest.mark.parametrize("name", NAMES)
def test_golden_files_are_what_the_script_makes(name, tmp_path):
    main(tmp_path)
    assert (tmp_path / name).read_bytes() == (GOLDEN / name).read_bytes()


@given(
    bits=st.integers(1, 8),
    out_features=st.integers(0, 5),
    in_features=st.sampled_from((0, 1, 2, 31, 32, 33, 63, 64, 65, 100)),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=100, deadline=None)
def test_matches_the_naive_packer(bits, out_features, in_features, seed):
    codes = random_codes((out_features, in_features), bits, seed)
    words = pack(codes, bits)
    assert words.dtype == torch.int32
    assert words.is_contiguous()
    assert words.shape == (-(-in_features // 32) * bits, out_features)
    assert to_bytes(words) == words_to_bytes(naive_pack(codes.tolist(), bits, in_features))


@given(
    bits=st.integers(1, 8),
    batch=st.lists(st.integers(0, 3), max_size=2),
    out_features=st.integers(0, 9),
    in_features=st.integers(0, 130),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=100, deadline=None)
def test_round_trip(bits, batch, out_features, in_features, seed):
    codes = random_codes((*batch, out_features, in_features), bits, seed)
    words = pack(codes, bits)
    assert words.shape == (*batch, word_rows(in_features, bits), out_features)
    back = unpack(words, bits, in_features)
    assert back.dtype == torch.uint8
    assert back.is_contiguous()
    assert torch.equal(back, codes)
    assert torch.equal(unpack_rows(words, bits, in_features), codes.transpose(-1, -2))


@pytest.mark.parametrize("bits", range(1, 9))
def test_batch_entries_are_packed_alone(bits):
    codes = random_codes((2, 3, 4, 45), bits)
    words = pack(codes, bits)
    for i in range(2):
        for j in range(3):
            assert torch.equal(words[i, j], pack(codes[i, j], bits))


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_every_integer_dtype_gives_the_same_words(dtype):
    codes = random_codes((5, 70), 3)
    assert torch.equal(pack(codes.to(dtype), 3), pack(codes, 3))


def test_bool_codes():
    codes = random_codes((5, 70), 1)
    assert torch.equal(pack(codes.bool(), 1), pack(codes, 1))


@pytest.mark.parametrize("bits", [1, 3, 8])
def test_strides_do_not_matter(bits, poisoned):
    codes = random_codes((2, 6, 75), bits)
    words = pack(codes, bits)
    wide = torch.full((2, 12, 150), 255, dtype=torch.uint8)
    wide[:, ::2, 1::2] = codes
    assert torch.equal(pack(wide[:, ::2, 1::2], bits), words)
    assert torch.equal(pack(codes.transpose(1, 2).contiguous().transpose(1, 2), bits), words)
    assert torch.equal(pack(codes[:1].expand(3, 6, 75), bits), words[:1].expand(3, *words.shape[1:]))
    wide_words = torch.full((2, words.shape[1] * 2, 12), -1, dtype=torch.int32)
    wide_words[:, 1::2, ::2] = words
    assert torch.equal(unpack(wide_words[:, 1::2, ::2], bits, 75), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_padding_is_zero_when_packed_and_ignored_when_unpacked(bits):
    codes = torch.full((3, 33), (1 << bits) - 1, dtype=torch.uint8)
    words = pack(codes, bits)
    everything = unpack(words, bits, 64)
    assert everything[:, :33].eq((1 << bits) - 1).all()
    assert everything[:, 33:].eq(0).all()
    dirty = words | pack(torch.cat([codes * 0, codes[:, :31]], 1), bits)
    assert not torch.equal(dirty, words)
    assert torch.equal(unpack(dirty, bits, 33), codes)


def test_input_is_not_changed():
    codes = random_codes((4, 40), 5)
    before = codes.clone()
    words = pack(codes, 5)
    assert torch.equal(codes, before)
    before = words.clone()
    unpack(words, 5, 40)
    assert torch.equal(words, before)


def test_meta_tensors():
    words = pack(torch.empty(2, 7, 50, dtype=torch.uint8, device="meta"), 3)
    assert (words.device.type, words.dtype, words.shape) == ("meta", torch.int32, (2, 6, 7))
    codes = unpack(words, 3, 50)
    assert (codes.device.type, codes.dtype, codes.shape) == ("meta", torch.uint8, (2, 7, 50))


def test_traces_without_looking_at_values():
    def round_trip(codes):
        return unpack(pack(codes, 3, check=False), 3, codes.shape[-1])

    codes = random_codes((4, 40), 3)
    compiled = torch.compile(round_trip, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(codes), codes)


def test_the_drawing_in_the_docstring():
    """Every number of the drawing names the input whose bit is there."""
    bits, drawn = 0, 0
    for line in (packing.__doc__ or "").splitlines():
        if header := re.match(r"    (\d) bits? ", line):
            bits = int(header[1])
            positions = [int(p) for p in re.findall(r"\d+", line.split("bit ")[-1])]
        elif row := re.match(r"      word row \d?k(?:\+(\d))? ", line):
            first_bit = 32 * int(row[1] or 0)
            owners = [int(o) for o in re.findall(r"\d+", line[row.end() :])]
            assert owners == [(first_bit + p) // bits for p in positions]
            for p, owner in zip(positions, owners, strict=True):
                codes = torch.zeros(1, 32, dtype=torch.uint8)
                codes[0, owner] = (1 << bits) - 1
                assert int(pack(codes, bits)[first_bit // 32, 0]) >> p & 1
            drawn += 1
    assert drawn == 1 + 2 + 3


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: pack(torch.zeros(2, 32), 1), r"bool or integers, got torch\.float32"),
        (lambda: pack(torch.zeros(2, 32, dtype=torch.complex64), 1), r"got torch\.complex64"),
        (lambda: pack(torch.zeros(32, dtype=torch.uint8), 1), r"shape \(\.\.\., out, in\), got \(32,\)"),
        (lambda: pack(torch.zeros(2, 32, dtype=torch.uint8), 0), "bits must be between 1 and 8, got 0"),
        (lambda: pack(torch.zeros(2, 32, dtype=torch.uint8), 9), "bits must be between 1 and 8, got 9"),
        (lambda: pack(torch.full((2, 32), 2), 1), r"must lie in 0\.\.1, got values from 2 to 2"),
        (lambda: pack(torch.tensor([[0, -1]]), 4), r"must lie in 0\.\.15, got values from -1 to 0"),
        (lambda: pack(torch.tensor([[0, 256]]), 8), r"must lie in 0\.\.255, got values from 0 to 256"),
        (lambda: pack(torch.tensor([[2**16 - 1]], dtype=torch.uint16), 8), "from 65535 to 65535"),
        (lambda: word_rows(-1), "in_features must not be negative, got -1"),
        (lambda: unpack(torch.zeros(1, 2, dtype=torch.int64), 1, 32), r"torch\.int32, got torch\.int64"),
        (lambda: unpack(torch.zeros(3, 2, dtype=torch.int32), 1, 64), r"take 2 word rows.*got \(3, 2\)"),
        (lambda: unpack(torch.zeros(2, dtype=torch.int32), 1, 64), r"got \(2,\)"),
    ],
)
def test_refusals_say_what_was_got_and_expected(call, words):
    with pytest.raises(ValueError, match=words):
        call()
