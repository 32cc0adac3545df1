"""Layers whose inputs have an order of their own: stored bytes, meaning, accounting, and what is refused."""

import itertools
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_onebit.config import OneBitConfig
from hf_onebit.formats import double_quant, mbwq, mpq
from hf_onebit.formats.double_quant import DoubleQuant
from hf_onebit.formats.packing import pack
from hf_onebit.formats.table import TableEntry
from hf_onebit.formats.weight_layout import check_rows, layout_of, pack_zero_points, unpack_zero_points
from hf_onebit.nn import MPQWeightParameter
from hf_onebit.nn.replace import entry_of, replace_layers, set_packed

GOLDEN = Path(__file__).parents[1] / "golden"
EXPECTED = json.loads((GOLDEN / "orders_v1.json").read_text(encoding="utf-8"))
BLOCKS = [
    [(4, 70, 32)],
    [(1, 33, -1)],
    [(7, 64, 64)],
    [(8, 32, 32), (6, 32, 32), (5, 64, 64), (4, 32, -1), (3, 96, 64), (2, 40, 32)],
    [(6, 1, 32), (3, 15, 32)],
    [(4, 48, 32), (2, 16, -1)],
]


def golden(name):
    expected = EXPECTED[name]
    tensors = {key.removeprefix(expected["layer"] + "."): t for key, t in load_file(GOLDEN / name).items()}
    return expected, TableEntry.from_dict(expected["entry"]), tensors


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_golden_layer(name):
    expected, entry, tensors = golden(name)
    sizes = expected["in"], expected["out"]
    assert {key: (tuple(t.shape), t.dtype) for key, t in tensors.items()} == entry.stored_specs(*sizes)
    held = entry.from_stored(tensors, *sizes, name)
    entry.validate_tensors(held, *sizes, name)
    assert set(held) == set(entry.tensor_names)
    model = torch.nn.Sequential(torch.nn.Linear(*sizes, bias=False))
    module = set_packed(model, "0", held, entry)
    assert module.dequantize().tolist() == expected["matrix"]  # exact: the stored scales have few bits
    assert torch.equal(module.weight.float_weight().T, module.dequantize())
    x = torch.randn(3, expected["in"])
    torch.testing.assert_close(model(x), x @ torch.tensor(expected["matrix"]).T, rtol=1e-4, atol=1e-4)
    bits = sum(t.numel() * t.element_size() * 8 for t in tensors.values())
    assert entry.bits_per_weight(*sizes) == bits / (sizes[0] * sizes[1])
    stored = entry.to_stored(held, expected["in"])
    assert stored.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert torch.equal(entry.from_stored(stored, *sizes, name).get(key, tensor), held.get(key, tensor))


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_table_entry_round_trips(name):
    raw = EXPECTED[name]["entry"]
    entry = TableEntry.from_dict(raw)
    assert entry.to_dict() == raw
    OneBitConfig(modules={"a": raw})
    sizes = EXPECTED[name]["in"], EXPECTED[name]["out"]
    shapes = {key: shape for key, (shape, _) in entry.tensor_specs(*sizes).items()}
    assert entry.sizes(shapes) == sizes
    model = torch.nn.Sequential(torch.nn.Linear(*sizes))
    replace_layers(model, {"0": entry})
    assert entry_of(model[0]).to_dict() == {key: v for key, v in raw.items() if key != "double_quant"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"g_idx": 1}, "g_idx"),
        ({"q_perm": "yes"}, "q_perm"),
        ({"g_idx": True, "q_perm": True}, "g_idx without q_perm or blocks"),
        ({"q_perm": True, "kind": "embedding"}, "none of the three for an embedding"),
        ({"blocks": [[3, 70, 32], [4, 2, 32]]}, "falling widths"),
        ({"blocks": [[3, 64, 32]]}, "blocks have 64 rows together, expected 70"),
        ({"blocks": [[4, 70, 32]]}, "those of the first block, 4 and 32"),
        ({"double_quant": 3}, "null or an object"),
        ({"double_quant": {"block": 33}}, "block must be a positive multiple of 32"),
        ({"double_quant": {"blocks": 32}}, "unknown keys"),
    ],
)
def test_wrong_entries_are_refused(change, message):
    entry = {"method": "mpq", "bits": 3, "group_size": 32, "symmetric": False, "in_features": 70}
    OneBitConfig(modules={"a": entry})
    with pytest.raises(ValueError, match=message):
        OneBitConfig(modules={"a": entry | change})


# --- row blocks ---------------------------------------------------------------------------------------------


def random_layer(blocks, out_features=9, symmetric=False, q_perm=True, seed=0):
    """A stored layer and, element by element in float64, the matrix it stands for."""
    generator = torch.Generator().manual_seed(seed)
    K, groups = sum(rows for _, rows, _ in blocks), sum(mbwq.block_group_counts(blocks))
    widths = [bits for bits, rows, _ in blocks for _ in range(rows)]
    codes = torch.stack([torch.randint(0, 1 << b, (out_features,), generator=generator) for b in widths], 1)
    tensors = {"weight": mbwq.pack_blocks(codes, blocks)}
    tensors["scales"] = torch.randn(groups, out_features, generator=generator).half()
    if not symmetric:
        tensors["zeros"] = torch.randn(groups, out_features, generator=generator).half()
    perm = torch.randperm(K, generator=generator) if q_perm else torch.arange(K)
    if q_perm:
        tensors["q_perm"] = perm.int()
    W = torch.zeros(out_features, K, dtype=torch.float64)
    r = g = 0
    for bits, rows, size in blocks:
        size = rows if size == -1 else size
        for i in range(rows):
            scale = tensors["scales"][g + i // size].double()
            zero = scale * mpq.zero_point(bits) if symmetric else tensors["zeros"][g + i // size].double()
            W[:, perm[r]] = scale * codes[:, r] - zero
            r += 1
        g += -(-rows // size)
    return tensors, W, codes


@pytest.mark.parametrize("q_perm", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
def test_row_blocks(blocks, symmetric, q_perm):
    tensors, W, codes = random_layer(blocks, symmetric=symmetric, q_perm=q_perm)
    K = W.shape[1]
    assert torch.equal(mbwq.unpack_blocks(tensors["weight"], blocks).T, codes)
    specs = mbwq.tensor_specs(K, 9, blocks, symmetric, q_perm)
    assert {key: (tuple(t.shape), t.dtype) for key, t in tensors.items()} == specs
    assert tuple(specs) == mbwq.tensor_names(symmetric, q_perm)
    mbwq.validate_tensors(tensors, K, 9, blocks, symmetric, q_perm, "here")
    arguments = tensors["weight"], tensors["scales"], tensors.get("zeros"), blocks, tensors.get("q_perm")
    assert torch.equal(mbwq.dequantize(*arguments, torch.float64), W)
    assert mbwq.dequantize(*arguments).is_contiguous()
    bits = sum(t.numel() * t.element_size() * 8 for t in tensors.values())
    assert mbwq.storage_bits(K, 9, blocks, symmetric, q_perm, 16) == bits + 16 * 9


def test_rows_and_group_maps_of_the_parameter():
    blocks = BLOCKS[3]
    rows = mbwq.rows_of(blocks)
    assert rows == [32, 64, 128, 160, 256, 296, 0b10111110]
    assert check_rows(rows) == tuple((bits, n) for bits, n, _ in blocks)
    groups, left = mbwq.group_map(blocks).view(-1, 2).T
    assert groups.dtype == torch.int16
    assert groups.tolist()[:33] == [0] * 32 + [1]
    assert left.tolist()[:34] == [*range(32, 0, -1), 32, 31]
    assert groups.tolist()[-8:] == [7] * 8
    assert left.tolist()[-8:] == [*range(8, 0, -1)]
    assert torch.equal(groups.long(), mbwq.groups_of_rows(blocks))
    with pytest.raises(ValueError, match=r"blocks of 8, 6, 5, 4, 3 and 2 bits, got \[7\]"):
        mbwq.rows_of([(7, 32, 32)])
    assert mbwq.group_map([(4, 40000, -1)]).dtype == torch.int32  # too many rows for 16 bits
    assert int(mbwq.group_map([(4, 40000, -1)])[1]) == 40000


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([], "at least one, got"),
        ([(4, 32)], "three whole numbers each"),
        ([(4, 32.0, 32)], "three whole numbers each"),
        ([(4, True, 32)], "three whole numbers each"),
        ([(4, 0, 32)], "at least one row each"),
        ([(9, 32, 32)], "bits must be between 1 and 8"),
        ([(4, 32, 16)], "multiple of 32"),
        ([(4, 32, 32), (4, 32, 32)], "falling widths"),
        ([(3, 32, 32), (1, 32, 32)], "falling widths among"),
    ],
)
def test_wrong_blocks_are_refused(blocks, message):
    with pytest.raises(ValueError, match=message):
        mbwq.check_blocks(blocks)


def damage(change):
    tensors, _, _ = random_layer([(6, 32, 32), (3, 38, 32)])
    change(tensors)
    return tensors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("q_perm"), "here: 'q_perm' is missing"),
        (lambda t: t["q_perm"].zero_(), r"no permutation of 0\.\.69; it is all zeros: leave it out"),
        (lambda t: t["q_perm"].__setitem__(0, t["q_perm"][1].clone()), r"no permutation of 0\.\.69$"),
        (lambda t: t["weight"][-1].fill_(-1), "block of 3 bits, has padding codes set in 9 columns"),
        (lambda t: t["scales"].__setitem__((0, 0), float("inf")), "'scales' has 1 values that are inf or nan"),
        (lambda t: t.update(weight=t["weight"][1:]), "'weight' is torch.int32"),
    ],
)
def test_damaged_tensors_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        mbwq.validate_tensors(damage(change), 70, 9, [(6, 32, 32), (3, 38, 32)], False, True, "here")


def test_groups_that_do_not_exist_are_refused():
    tensors = {"weight": pack(torch.zeros(9, 64, dtype=torch.uint8), 4), "scales": torch.ones(2, 9).half()}
    tensors["g_idx"] = torch.ones(64, dtype=torch.int32)
    mpq.validate_tensors(tensors, 64, 9, 4, 32, True, "here", g_idx=True)
    tensors["g_idx"][3] = 2
    with pytest.raises(ValueError, match=r"here: 'g_idx' has values from 1 to 2, expected 0\.\.1"):
        mpq.validate_tensors(tensors, 64, 9, 4, 32, True, "here", g_idx=True)


# --- what other programs write ------------------------------------------------------------------------------


def straightforward_words(codes, bits):
    """Bytes of a stream of codes down the inputs, least significant bit first, without any padding."""
    words = []
    for column in codes.T.tolist():
        stream = "".join(format(code, f"0{bits}b")[::-1] for code in column)
        words.append([int(stream[i : i + 32][::-1], 2) for i in range(0, len(stream), 32)])
    return torch.tensor(words, dtype=torch.int64).T.to(torch.int32)


def test_blocks_of_sixteen_rows_are_read_where_they_fill_words():
    """Foreign files end the block of 2 bits after any 16 rows: one word, not two."""
    torch.manual_seed(0)
    codes = {4: torch.randint(0, 16, (48, 9)), 2: torch.randint(0, 4, (16, 9))}
    words = torch.cat([straightforward_words(codes[b], b) for b in (4, 2)])
    assert words.shape == (7, 9)
    perm, scales = torch.randperm(64), torch.rand(3, 9) + 0.1
    group = torch.tensor([0] * 32 + [1] * 16 + [2] * 16)
    left = torch.tensor([*range(32, 0, -1), *range(16, 0, -1), *range(16, 0, -1)])
    weight = MPQWeightParameter(
        words, False, scales=scales, zeros=torch.rand(3, 9), w_bit=4, layer_type=2, q_perm=perm.to(torch.int16),
        q_group_map=torch.stack((group, left), 1).flatten().to(torch.int16), rows=[0, 0, 0, 48, 48, 64, 0b1010],
    )  # fmt: skip
    W = torch.zeros(64, 9)
    W[perm] = scales[group] * torch.cat(list(codes.values())) - weight.zeros[group]
    torch.testing.assert_close(weight.float_weight(), W)
    MPQWeightParameter.update(weight, grad=torch.zeros(64, 9))
    assert torch.equal(weight.data, words)
    weight.rows = [0, 0, 0, 32, 48, 64, 0b1110]  # 16 rows of 3 bits are a word and a half
    with pytest.raises(ValueError, match=r"of which \[\(3, 16\)\] fill no whole words"):
        weight.float_weight()


def test_permutations_beyond_32767_inputs_in_int16():
    K = 40000
    perm = torch.randperm(K)
    scales = (torch.rand(K // 32, 2) + 0.5).half().float()
    codes = torch.randint(0, 4, (K, 2))
    weight = MPQWeightParameter(
        pack(codes.T, 2), scales=scales, w_bit=2, group_size=32, layer_type=2, q_perm=perm.to(torch.int16)
    )
    W = torch.zeros(K, 2)
    W[perm] = scales.repeat_interleave(32, 0) * (codes - 2)
    assert torch.equal(weight.float_weight(), W)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_zero_points_of_gptq(bits):
    points = torch.tensor([[1, 1 << bits, 1 + (1 << bits) // 2] * 11])
    packed = pack_zero_points(points, bits)
    assert torch.equal(unpack_zero_points(packed, bits, 33), points)
    assert torch.equal(packed.T, straightforward_words((torch.nn.functional.pad(points, (0, 31), value=1) - 1).T, bits))
    with pytest.raises(ValueError, match=rf"must lie in 1\.\.{1 << bits}, got values from 0"):
        pack_zero_points(points - 1, bits)
    with pytest.raises(ValueError, match="packed zeros must be int32"):
        unpack_zero_points(packed[:, :-1].float(), bits, 33)


def test_neighbours_share_groups_that_do_not_divide_the_input():
    weight = MPQWeightParameter(
        pack(torch.ones(4, 70, dtype=torch.uint8), 4), scales=torch.tensor([1.0, 2, 3])[:, None].expand(3, 4),
        zeros=torch.zeros(3, 4), asym=True, w_bit=4, group_size=32, layer_type=1, g_idx=None,
    )  # fmt: skip
    layout = layout_of(weight, 70)
    assert layout.group.tolist() == [0] * 32 + [1] * 32 + [2] * 6
    assert weight.float_weight().shape == (96, 4)  # the words alone tell the inputs to the next 32
    for size, group in itertools.product((-1, 0), (3,)):
        weight.group_size = size
        assert int(layout_of(weight, 70).group.max()) == group - 1


# --- docs/formats.md ----------------------------------------------------------------------------------------

DOCS = (Path(__file__).parents[2] / "docs" / "formats.md").read_text(encoding="utf-8")


def section(title):
    return DOCS.partition(f"## {title}")[2].partition("\n## ")[0]


def test_docs_list_the_tensors():
    rows = dict(re.findall(r"^\| `(\w+)` \| (\w+) \|", section("Inputs in an order of their own"), re.M))
    specs = mbwq.tensor_specs(70, 9, BLOCKS[0], False, True) | mpq.tensor_specs(70, 9, 4, 32, False, True)
    assert rows == {name: str(dtype).removeprefix("torch.") for name, (_, dtype) in specs.items()}
    rows = dict(re.findall(r"^\| `(\w+)` \| (\w+) \|", section("Scales and zeros in few bits"), re.M))
    specs = double_quant.tensor_specs(3, 9, True, DoubleQuant())
    assert rows == {name: str(dtype).removeprefix("torch.") for name, (_, dtype) in specs.items()}


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_the_reader_shown_in_the_docs(name):
    (code,) = re.findall(r"^```python\n([^`]*?def read_ordered_layer.*?)^```", DOCS, re.M | re.S)
    scope: dict = {}
    exec(code, scope)
    expected, entry, tensors = golden(name)
    held = entry.from_stored(tensors, expected["in"], expected["out"], name)
    arrays = {f"{expected['layer']}.{key}": tensor.numpy() for key, tensor in held.items()}
    W = scope["read_ordered_layer"](arrays, expected["layer"], expected["entry"])
    assert W.tolist() == expected["matrix"]


def test_docs_say_what_statistics_take():
    shown = re.findall(r"^\| (\d*) ?\| (\d*) ?\| (\d*) ?\| (yes|no) \| (\d+) \| (\d\.\d{4}) \|$", DOCS, re.M)
    assert len(shown) == 5
    for scale_bits, zero_bits, block, symmetric, group_size, value in shown:
        spec = DoubleQuant(int(scale_bits), int(zero_bits or 4), int(block)) if block else None
        entry = TableEntry("mpq", 4, 1, int(group_size), symmetric == "yes", 4096, double_quant=spec)
        bits = entry.bits_per_weight(4096, 576) - 4
        assert f"{bits:.4f}" == value
