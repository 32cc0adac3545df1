"""How a product on a GPU is launched: the plan of a size, from sizes, dtypes and the device alone. No triton here."""

import functools
import os
from typing import NamedTuple

import torch
from torch import Tensor

from hf_onebit.formats.packing import WORD_BITS

# Two codes at a time by inline PTX; other compilers and the interpreter get the same in plain Triton.
ASM = torch.version.hip is None and os.environ.get("TRITON_INTERPRET", "0") != "1"
TILE = 16  # units that multiply takes at once


class Plan(NamedTuple):
    """How a product is launched.

    ``splits`` 0: the kernel ``few_rows``, ``block_c`` rows a program. ``block_n`` 0: expand to a float matrix and leave
    the product to torch.
    """

    block_n: int
    block_c: int
    splits: int
    warps: int
    stages: int


EXPAND = Plan(0, 0, 0, 0, 0)


class Operand(NamedTuple):
    """The tensors of one layer, of either kind; ``bits`` 1 and ``group_size`` 0 for signs."""

    weight: Tensor
    scales: Tensor  # a, or the scales of the groups
    zeros: Tensor | None
    b: Tensor | None
    weight_1: Tensor | None
    a_1: Tensor | None
    b_1: Tensor | None
    bits: int
    group_size: int

    @property
    def planes(self) -> int:
        """1 or 2."""
        return 1 if self.weight_1 is None else 2

    @property
    def is_mpq(self) -> bool:
        """Whether the words are codes in groups, not signs."""
        return self.group_size != 0


class Alike(NamedTuple):
    """One tensor of the same layer of all experts, alike in shape, dtype and strides, and contiguous.

    Attributes:
        like: the first expert's.
        addresses: of all.
    """

    like: Tensor
    addresses: tuple[int, ...]


class Layers(NamedTuple):
    """The same layer of all experts.

    Attributes:
        weight: packed words.
        scales: a, or the scales of the groups.
        zeros, b, bias: of each, or None.
        bits, group_size: 1 and 0 for signs.
        in_features: K.
    """

    weight: Alike
    scales: Alike
    zeros: Alike | None
    b: Alike | None
    bias: Alike | None
    bits: int
    group_size: int
    in_features: int

    @property
    def first(self) -> Operand:
        """The layer of the first expert, without what concerns inputs."""
        zeros = None if self.zeros is None else self.zeros.like
        return Operand(self.weight.like, self.scales.like, zeros, None, None, None, None, self.bits, self.group_size)


def parts_of(operand: Operand, rows: int, dtype: torch.dtype) -> int:
    """float16 numbers that stand for one input: two where that costs nothing or x has more digits than one keeps."""
    if dtype == torch.float32:
        return 2
    # b x has up to 22 significant bits; x alone is a float16 number, up to the common factor of its row.
    return 1 if operand.is_mpq else 2 if rows <= 16 else 1


# From so many rows on, a float matrix and torch's product. Overridden by HF_ONEBIT_EXPAND_ROWS.
_EXPAND_ROWS = {"onebit": 96, "mpq": 64}
_WARPS_PER_SM = 8
MOST_SPLITS = 64
# {columns of a tile: (outputs, warps)} of the usual plan.
_TILES = {8: (64, 1), 16: (64, 2), 32: (64, 2), 64: (128, 4)}
# As many registers as a thread can have. ptxas sometimes settles for 56 to 168 of them and spills a few; told of more,
# it spills none, and the _WARPS_PER_SM warps that a plan counts on still fit into the 65536 of a multiprocessor.
_ALL_REGISTERS = 255
# The usual tiles were timed on compute capability 9 without that. Of those, these alone would spill there:
# (bits, zeros, outputs, columns, warps).
_SPILLING_ON_9 = frozenset(
    {(4, False, 64, 32, 2), (6, True, 32, 32, 2), (7, True, 32, 32, 2), (8, True, 64, 16, 2), (8, True, 32, 32, 2)}
)
# Up to so many rows signs are multiplied in one launch. A program takes at most so many rows: three digits for each
# input, as float32 needs them, leave room for two.
_FEW_ROWS = {torch.float16: 32, torch.bfloat16: 32, torch.float32: 8}
_ROWS_A_PROGRAM = {torch.float16: 4, torch.bfloat16: 4, torch.float32: 2}


# Places in a matrix with more are beyond 32 bits, in which all kernels but those that expand it count.
MOST_WORDS = (1 << 31) - 1


def expand_rows(kind: str) -> int:
    """Rows of x from which a layer is expanded and multiplied by torch; ``HF_ONEBIT_EXPAND_ROWS`` overrides it.

    Raises:
        ValueError: the variable is no whole number.
    """
    forced = os.environ.get("HF_ONEBIT_EXPAND_ROWS", "")
    if not forced:
        return _EXPAND_ROWS[kind]
    if not forced.isdigit():
        raise ValueError(f"HF_ONEBIT_EXPAND_ROWS={forced}, expected a whole number of rows; unset it, or set one")
    return int(forced)


def fits(operand: Operand, dtype: torch.dtype) -> bool:
    """Whether ``product`` keeps the digits of this layer: it multiplies codes in groups as float16 numbers."""
    return not operand.is_mpq or (dtype != torch.float32 and operand.scales.dtype == torch.float16)


def multiplies_packed(operand: Operand, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a layer is multiplied from its words on a device, however many rows; else it is expanded."""
    return fits(operand, dtype) and operand.weight.numel() <= MOST_WORDS and has_tiles(device)


def plan_for(rows: int, K: int, operand: Operand, dtype: torch.dtype, device: torch.device) -> Plan:
    """How to compute ``rows`` rows; depends on sizes and dtypes alone."""
    kind = "mpq" if operand.is_mpq else "onebit"
    if rows >= expand_rows(kind) or not multiplies_packed(operand, dtype, device):
        return EXPAND
    if has_few_rows(rows, operand, dtype, device):
        return few_rows_plan(rows, K, dtype, 8 if rows <= 4 else 4)
    columns = rows * parts_of(operand, rows, dtype)
    block_c = columns_of_tile(columns, 64)
    block_n, warps = tile_for(block_c, operand.bits, operand.is_mpq, major(device))
    splits = splits_for(operand, columns, K, block_n, block_c, warps, device)
    return Plan(block_n, block_c, splits, warps, stages_for(operand, block_n, block_c, device))


def has_tiles(device: torch.device) -> bool:
    """Whether tiles are expanded in registers there: not on NVIDIA's devices before compute capability 8.0.

    Triton multiplies such tiles without tensor cores there, spills in large ones, and compiles one for up to a minute;
    torch's product of an expanded float16 matrix has them.
    """
    return not 0 < major(device) < 8


def columns_of_tile(columns: int, most: int) -> int:
    """Columns of a tile that has to hold ``columns``, or its share of them: a power of two, at most ``most``.

    At least 8, which is what NVIDIA's matrix instructions take; AMD's take 16, and for fewer Triton uses none of them
    and spills a thousand registers.
    """
    return min(max(power_of_2(columns), 8 if torch.version.hip is None else 16), most)


def tile_for(block_c: int, bits: int, is_mpq: bool, major: int) -> tuple[int, int]:
    """(outputs, warps) of a tile of ``block_c`` columns on devices of a compute capability."""
    block_n, warps = _TILES[block_c]
    if bits > 4 and block_c == 32:  # eight words of each code's unit leave fewer registers
        block_n = 32
    if block_c == 64 and major == 8:  # twice the outputs spill, however many registers they may have
        block_n = 64
    if block_c == 64 and major >= 10:
        # With four warps Triton 3.6 takes Blackwell's own tensor instructions, and compiles this kernel to a trap. 12.0
        # has none of them, and with two warps the tile of signs spills there.
        block_n, warps = (32, 2) if is_mpq else (64, 4 if major == 12 else 2)
    return block_n, warps


def registers_of(warps: int, major: int) -> dict[str, int]:
    """What a launch says of registers, so that no thread spills any; of a block of ``warps`` warps.

    Args:
        warps: of a block; those of a single warp get what they need unasked.
        major: of the compute capability; 0 where the compiler is not NVIDIA's, which is told nothing.

    Returns:
        Options of the kernel: ``{"maxnreg": registers of a thread}``, or nothing.
    """
    return {"maxnreg": _ALL_REGISTERS} if major >= 8 and warps > 1 else {}


def registers_of_product(plan: Plan, bits: int, is_mpq: bool, zeros: bool, major: int) -> dict[str, int]:
    """The same for ``multiply``: on compute capability 9 the compiler chooses for usual tiles, if it spills none."""
    usual = tile_for(plan.block_c, bits, is_mpq, major) == (plan.block_n, plan.warps)
    if major == 9 and usual and (bits, zeros, plan.block_n, plan.block_c, plan.warps) not in _SPILLING_ON_9:
        return {}
    return registers_of(plan.warps, major)


def has_few_rows(rows: int, operand: Operand, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernel ``few_rows`` takes it: signs, on devices with its instructions."""
    return not operand.is_mpq and rows <= _FEW_ROWS[dtype] and major(device) >= 8


def few_rows_plan(rows: int, K: int, dtype: torch.dtype, warps: int) -> Plan:
    """A plan for ``few_rows``, of as many warps as have inputs: each takes 16 units at a time."""
    warps = min(warps, power_of_2(ceil(count_units(K), TILE)))
    return Plan(32, min(power_of_2(rows), _ROWS_A_PROGRAM[dtype]), 0, warps, 1)


def splits_for(
    operand: Operand, columns: int, K: int, block_n: int, block_c: int, warps: int, device: torch.device
) -> int:
    """Slices of the inputs that keep every multiprocessor busy: a power of two."""
    blocks = ceil(operand.weight.shape[1], block_n) * ceil(columns, block_c) * operand.planes
    wanted = max(multiprocessors(device) * _WARPS_PER_SM // (blocks * warps), 1)
    most = ceil(count_units(K), TILE)
    return min(power_of_2(wanted), power_of_2(most), MOST_SPLITS)


def stages_for(operand: Operand, block_n: int, block_c: int, device: torch.device) -> int:
    """How many steps of the loop of a tile are loaded at once on a device."""
    groups = (operand.scales, operand.zeros) if operand.is_mpq else ()
    group_bytes = sum(each.element_size() for each in groups if each is not None)
    return stages_of(block_n, block_c, operand.bits, group_bytes, shared_memory(device))


def stages_of(block_n: int, block_c: int, bits: int, group_bytes: int, room: int) -> int:
    """2 where what that takes of shared memory is within ``room`` bytes, else 1; on AMD's devices always 1.

    With one, ptxas keeps more in registers, and some tiles spill.

    Args:
        block_n, block_c: outputs and columns of the tile.
        bits: of a code; 1 for signs.
        group_bytes: of a scale and a zero together; 0 for signs.
        room: bytes of shared memory that a block may have.
    """
    fits = shared_of(block_n, block_c, bits, group_bytes) <= room
    return 2 if fits and torch.version.hip is None else 1


def shared_of(block_n: int, block_c: int, bits: int, group_bytes: int) -> int:
    """Bytes of shared memory that a tile takes with two stages: x, words, scales and zeros of 16 units."""
    return TILE * (WORD_BITS * 2 * block_c + (4 * bits + group_bytes) * block_n)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many there are; a few where there is no device."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes that a block may have."""
    if device.type != "cuda":
        return 0
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block))


@functools.cache
def major(device: torch.device) -> int:
    """The first number of the compute capability; 0 for what has none."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" and ASM else 0


def count_units(K: int) -> int:
    """Units, of 32 inputs each."""
    return (K + WORD_BITS - 1) // WORD_BITS


# Triton's own functions of these names are made for kernels and slow elsewhere.
def ceil(n: int, divisor: int) -> int:
    """n / divisor, rounded up."""
    return (n + divisor - 1) // divisor


def power_of_2(n: int) -> int:
    """The least power of two from n on."""
    return 1 << max(n - 1, 0).bit_length()
