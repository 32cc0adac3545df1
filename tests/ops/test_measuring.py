"""Reading memory touches every byte; the loop around another library's dot product calls it as it should."""

import ctypes

import numpy as np
import pytest
import torch

from hf_onebit.ops import cpu, measuring

pytestmark = pytest.mark.skipif(cpu.isa() is None, reason="no compiled kernels")
ISAS = [None, *(isa for isa in ("scalar", "avx2", "avx512") if isa in cpu.isas())]


def xor_of(data: np.ndarray) -> int:
    padded = np.zeros(-(-data.size // 8) * 8, dtype=np.uint8)
    padded[: data.size] = data
    return int(np.bitwise_xor.reduce(padded.view("<u8"), initial=np.uint64(0)))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("size", [0, 1, 7, 8, 31, 32, 33, 255, 256, 257, 4096 + 511, 100_003])
def test_every_byte_is_read(size: int, isa: str | None) -> None:
    buffers = [torch.randint(0, 256, (size,), dtype=torch.uint8) for _ in range(3)]
    expected = 0
    for buffer in buffers:
        expected ^= xor_of(buffer.numpy())
    assert measuring.read_xor(buffers, isa=isa) == expected


@pytest.mark.parametrize("isa", ISAS)
def test_one_changed_bit_anywhere_changes_the_result(isa: str | None) -> None:
    buffer = torch.zeros(777, dtype=torch.uint8)
    for i in range(777):
        buffer[i] = 16
        assert measuring.read_xor([buffer], isa=isa) == 16 << (8 * (i % 8))
        buffer[i] = 0


def test_ranges_and_their_limits() -> None:
    words = torch.randint(-(2**31), 2**31, (100,), dtype=torch.int32)
    whole = measuring.read_xor([words])
    assert measuring.read_xor([words], 0, 64) ^ measuring.read_xor([words], 64) == whole
    assert measuring.read_xor([]) == 0
    for begin, end in ((-1, 8), (8, 0), (0, 401)):
        with pytest.raises(ValueError, match="expected a range inside of 0 to 400"):
            measuring.read_xor([words], begin, end)
    with pytest.raises(ValueError, match="expected contiguous tensors"):
        measuring.read_xor([words[::2]])
    with pytest.raises(ValueError, match="expected contiguous tensors"):
        measuring.read_xor([words, words[:50]])


def test_the_widest_registers_are_named() -> None:
    assert measuring.read_isa() == ISAS[-1]


def test_without_the_binary_it_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_library", None)
    with pytest.raises(RuntimeError, match="needs the compiled kernels"):
        measuring.read_xor([])


PREPARE = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
DOT = ctypes.CFUNCTYPE(
    None, ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p,
    ctypes.c_size_t, ctypes.c_int,
)  # fmt: skip


def test_the_loop_multiplies_the_rows_it_is_given() -> None:
    """With functions of ours in place of another library's: x is "prepared" by doubling it."""
    weights = [torch.randint(-3, 4, (5, 8)).float() for _ in range(2)]
    x, prepared, y = torch.randn(3, 8), torch.zeros(3, 32, dtype=torch.uint8), torch.full((3, 5), torch.nan)

    def floats(address: int, count: int) -> np.ndarray:
        return np.ctypeslib.as_array((ctypes.c_float * count).from_address(address))

    @PREPARE
    def prepare(source: int, target: int, n: int) -> None:
        floats(target, n)[:] = 2 * floats(source, n)

    @DOT
    def dot(n: int, total: int, _s: int, weight: int, _w: int, vector: int, _v: int, rows: int) -> None:
        assert rows == 1
        floats(total, 1)[0] = floats(weight, n) @ floats(vector, n)

    functions = [ctypes.cast(function, ctypes.c_void_p).value or 0 for function in (prepare, dot)]
    packed = [weight.view(torch.uint8) for weight in weights]
    measuring.foreign_linear(functions[0], functions[1], packed, x, prepared, y, 1, 4)
    torch.testing.assert_close(y[:, 1:4], 2 * x @ weights[-1][1:4].T)
    assert y[:, [0, 4]].isnan().all()
    with pytest.raises(ValueError, match="expected a range inside of 0 to 5"):
        measuring.foreign_linear(functions[0], functions[1], packed, x, prepared, y, 0, 6)
    with pytest.raises(ValueError, match="expected one size"):
        measuring.foreign_linear(functions[0], functions[1], packed, x[:2], prepared, y, 0, 5)
