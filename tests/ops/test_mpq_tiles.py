"""Products with codes by tiles of bfloat16: against float64, and against what computes the same without tiles."""

import pytest
import torch
from mpq_layers import Layer, spread
from packed_layers import Groups
from torch import Tensor

from hf_onebit import ops
from hf_onebit.ops import cpu, cpu_backward, reference_mpq

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
NEVER = 1 << 62
needs_kernels = pytest.mark.skipif(cpu.isa() is None, reason=f"no compiled CPU kernels: {cpu.status()}")
needs_tiles = pytest.mark.skipif("amx" not in cpu.isas(), reason="this machine has no AMX")


@pytest.fixture(autouse=True)
def restored():
    before = cpu.isa(), cpu.tile_rows()
    if "amx" in cpu.isas():
        cpu.select_isa("amx")
    yield
    if before[0] is not None:
        cpu.select_isa(before[0])
    cpu.select_tile_rows(before[1])


def by_tiles(*args) -> Tensor:
    cpu.select_tile_rows(1)
    return ops.mpq_linear(*args)


def without_tiles(*args) -> Tensor:
    cpu.select_tile_rows(NEVER)
    return ops.mpq_linear(*args)


def bound(in_features: int) -> float:
    """Of docs/kernels.md; half a code lies between the zero point and the middle that ``Layer`` takes."""
    return 2 * (32 + in_features / 128) * 2**-24


@needs_tiles
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(1, 9))
def test_against_float64_and_without_tiles(bits, symmetric):
    for seed, (rows, in_features, out_features, group_size) in enumerate(
        ((1, 1, 1, 32), (15, 70, 33, 32), (16, 256, 64, 64), (17, 600, 31, 96), (33, 577, 95, -1), (49, 96, 16, 64))
    ):
        for dtype in DTYPES:
            layer = Layer(rows, in_features, out_features, bits, group_size, symmetric, True, dtype, seed=seed)
            y = layer.check(by_tiles, bound(in_features))
            torch.testing.assert_close(y, without_tiles(*layer.args()), rtol=0.02, atol=0.02 * float(y.abs().max()))


@needs_tiles
@pytest.mark.parametrize("rows", [31, 700])
def test_chunks_and_blocks(rows):
    for dtype in DTYPES:
        layer = Layer(rows, 2080, 40, 4, 64, False, True, dtype)
        layer.check(by_tiles, bound(2080))


@needs_tiles
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [2, 8])
def test_sixteen_bits_lose_nothing_before_the_result_is_rounded(bits, dtype):
    layer = Layer(40, 1000, 50, bits, 64, False, True, dtype)
    y = by_tiles(*layer.args())
    layer.x = layer.x.float()
    wide = layer.check(by_tiles, bound(1000))
    assert torch.equal(y, wide.to(dtype))


@needs_tiles
@pytest.mark.parametrize("in_features", [576, 4096])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_bound_where_every_rounding_has_one_sign(bits, in_features):
    for group_size in (32, 64, -1):
        for symmetric in (True, False):
            layer = Layer(5, in_features, 40, bits, group_size, symmetric, seed=1, constant=True)
            layer.check(by_tiles, bound(in_features))


@needs_tiles
def test_a_row_depends_on_no_other_and_on_no_number_of_them():
    layer = Layer(530, 300, 70, 3, 32, False, True, torch.bfloat16)
    y = by_tiles(*layer.args())
    for picked in ([0], [529], [31, 32], list(range(100, 150))):
        assert torch.equal(by_tiles(layer.x[picked], *layer.args()[1:]), y[picked])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 8):
            torch.set_num_threads(count)
            assert torch.equal(by_tiles(*layer.args()), y)
    finally:
        torch.set_num_threads(threads)


@needs_tiles
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_sums_of_codes_cannot_hold_go_the_other_way(dtype):
    layer = Layer(40, 300, 70, 4, 64, False, True, dtype)
    fine = by_tiles(*layer.args())
    values = {3: float("inf"), 17: float("nan"), 21: torch.finfo(dtype).max}
    for row, value in values.items():
        layer.x[row, 5] = value
    if dtype != torch.float16:
        layer.x[30] *= 1e-30
    y = by_tiles(*layer.args())
    changed = [*values, *([] if dtype == torch.float16 else [30])]
    kept = [row for row in range(40) if row not in changed]
    assert torch.equal(y[kept], fine[kept])
    assert not torch.isfinite(y[[3, 17]]).any()
    alone = [without_tiles(layer.x[row : row + 1], *layer.args()[1:])[0] for row in changed]
    if dtype == torch.float16:  # its largest number is none that float32 has trouble with
        changed, alone = changed[:2], alone[:2]
    torch.testing.assert_close(y[changed], torch.stack(alone), rtol=0, atol=0, equal_nan=True)


@needs_tiles
def test_strided_words_and_rows():
    layer = Layer(40, 70, 37, 3, 32, False, True, torch.bfloat16)
    expected = by_tiles(*layer.args())
    x, weight, scales, zeros, bias, *about = layer.args()
    assert torch.equal(by_tiles(*(spread(t) for t in (x, weight, scales, zeros, bias)), *about), expected)


@needs_tiles
def test_no_inputs_give_the_bias():
    layer = Layer(20, 0, 5, 4, 64, True, True, torch.bfloat16)
    assert torch.equal(by_tiles(*layer.args()), layer.bias.bfloat16().expand(20, -1))


@needs_tiles
def test_the_table_takes_many_rows_and_leaves_few():
    for bits in range(1, 9):
        for rows, twin in ((1, without_tiles), (2, without_tiles), (16, by_tiles), (200, by_tiles)):
            layer = Layer(rows, 512, 64, bits, 64)
            expected = twin(*layer.args())
            cpu.select_tile_rows(None)
            assert torch.equal(ops.mpq_linear(*layer.args()), expected)


@needs_kernels
def test_other_instructions_have_no_tiles():
    for isa in cpu.isas():
        if isa != "amx":
            cpu.select_isa(isa)
            layer = Layer(40, 256, 64)
            assert torch.equal(by_tiles(*layer.args()), without_tiles(*layer.args()))


@needs_kernels
def test_what_is_selected_is_told_and_nonsense_refused():
    cpu.select_tile_rows(7)
    assert cpu.tile_rows() == 7
    cpu.select_tile_rows(None)
    assert cpu.tile_rows() is None
    for wrong in (0, -1, NEVER + 1):
        with pytest.raises(ValueError, match="rows must be between 1 and 2"):
            cpu.select_tile_rows(wrong)


@needs_kernels
def test_the_environment_selects(monkeypatch):
    for value, rows in (("9", 9), (" ", None)):
        monkeypatch.setattr(cpu, "_library", None)
        monkeypatch.setenv("HF_ONEBIT_TILE_ROWS", value)
        assert cpu.load() == ""
        assert cpu.tile_rows() == rows
    for value in ("few", "0", str(NEVER + 1)):
        monkeypatch.setattr(cpu, "_library", None)
        monkeypatch.setenv("HF_ONEBIT_TILE_ROWS", value)
        with pytest.raises(ValueError, match=f"HF_ONEBIT_TILE_ROWS={value}, expected a number of rows"):
            cpu.load()


@needs_kernels
@pytest.mark.parametrize("group_size", [32, 64, -1])
@pytest.mark.parametrize("symmetric", [True, False])
def test_backward_in_blocks_is_the_reference(symmetric, group_size, monkeypatch):
    layer = Groups(40, 333, 3, group_size, symmetric)
    torch.manual_seed(0)
    x, grad = torch.randn(2, 9, 333), torch.randn(2, 9, 40)
    args = (grad, x, layer.weight, layer.scales, layer.zeros, 3, group_size, [True, False, False])
    expected = reference_mpq.mpq_linear_backward(*args)[0]
    blocks = []
    for most in (1, 40 * 4 * 128, 1 << 30):
        monkeypatch.setattr(cpu_backward, "BLOCK_BYTES", most)
        blocks.append(len(list(cpu_backward._blocks(333, 40 * 4, group_size))))
        torch.testing.assert_close(cpu_backward.mpq_linear_backward(*args)[0], expected, rtol=1e-5, atol=1e-5)
    assert blocks == [6 if group_size == 64 else 11, 3, 1]
