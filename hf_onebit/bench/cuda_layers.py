"""One linear layer in every representation that is timed on a GPU, in copies that overflow its second-level cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_onebit import ops
from hf_onebit.bench.arguments import WrongArgument
from hf_onebit.bench.cuda_peers import PEERS, Call, missing, peer
from hf_onebit.bench.layers import WrongResult
from hf_onebit.choices import Choice
from hf_onebit.formats import mpq, onebit
from hf_onebit.formats.packing import word_rows

FLOAT = "float"
# Inputs that share a scale in the layers of other libraries.
PEER_GROUP = 64
# ‖y - y64‖ / ‖y64‖ that a contender may have.
ALLOWED = {torch.float16: 2e-3, torch.bfloat16: 1e-2}
# Copies of a layer at most: small ones need many to overflow a cache.
_MOST_COPIES = 96


@dataclass(frozen=True)
class CudaLayer:
    """A contender: one layer in several copies.

    Attributes:
        calls: the product x (rows, in) -> (rows, out), one for each copy of the weights.
        W: float32 (out, in), what the first copy's weights stand for.
        nbytes: of one copy, scales included.
    """

    calls: Sequence[Call]
    W: Tensor
    nbytes: int


def kind_of(packed: str) -> str:
    """What a packed layer is called in the results: "1p" is onebit, "2p" onebit2, "4g64" mpq4, "4g128" mpq4g128.

    Raises:
        ValueError: it is no name of ``choices.Choice``, or one of several widths within a layer.
    """
    choice = _choice(packed)
    if choice.planes:
        return "onebit" if choice.planes == 1 else f"onebit{choice.planes}"
    return f"mpq{int(choice.bits)}" + ("" if choice.group_size == 64 else f"g{choice.group_size}")


def peers_of(names: Sequence[str] | None) -> list[str]:
    """The contenders of other libraries.

    Args:
        names: of ``PEERS``, or "float", which is always there; None for all that are installed.

    Raises:
        ValueError: a name is none of these, or its library is not installed.
    """
    if names is None:
        return [kind for kind in PEERS if not missing(kind)]
    for name in names:
        if name not in (FLOAT, *PEERS):
            raise WrongArgument(f"against is {name!r}, expected {', '.join((FLOAT, *PEERS))} with --device cuda")
        if name != FLOAT and missing(name):
            raise WrongArgument(f"against names {name!r}, but {missing(name)}: install it, or leave the name out")
    return [name for name in names if name != FLOAT]


def float_layer(out: int, in_: int, dtype: torch.dtype, device: torch.device, l2_bytes: int) -> CudaLayer:
    """torch's own layer, out x in."""
    one = out * in_ * dtype.itemsize
    copies = [torch.randn(out, in_, device=device).to(dtype) / in_**0.5 for _ in range(_count(one, l2_bytes))]
    return CudaLayer([_float_call(W) for W in copies], copies[0].float(), one)


def packed_layer(packed: str, out: int, in_: int, device: torch.device, l2_bytes: int) -> CudaLayer:
    """One of ours, out x in, of random words; ``packed`` as for :func:`kind_of`."""
    choice = _choice(packed)
    if choice.planes:
        return _onebit(choice.planes, out, in_, device, l2_bytes)
    return _mpq(int(choice.bits), choice.group_size, out, in_, device, l2_bytes)


def peer_layer(kind: str, out: int, in_: int, dtype: torch.dtype, device: torch.device, l2_bytes: int) -> CudaLayer:
    """Another library's, out x in; ``kind`` of ``PEERS``. Whatever the library raises passes through."""
    one = out * in_ * int(kind[-1]) // 8 + 4 * out * in_ // PEER_GROUP
    pairs = [peer(kind, out, in_, PEER_GROUP, dtype, device) for _ in range(_count(one, l2_bytes))]
    return CudaLayer([call for call, _ in pairs], pairs[0][1], one)


def check(layer: CudaLayer, x: Tensor) -> float:
    """How far the first copy's product is off: ‖y - y64‖ / ‖y64‖.

    Raises:
        WrongResult: further than ``ALLOWED``.
    """
    exact = x.double() @ layer.W.double().T
    y = layer.calls[0](x)
    error = float((y.double() - exact).norm() / exact.norm()) if y.shape == exact.shape else float("inf")
    if not error <= ALLOWED[x.dtype]:
        raise WrongResult(f"off by {error:.1e} of the result's norm, allowed {ALLOWED[x.dtype]:.0e}: not timed")
    return error


def _choice(packed: str) -> Choice:
    try:
        choice = Choice.parse(packed)
    except ValueError as error:
        raise WrongArgument(f"packed is {packed!r}: {error}") from error
    if choice.mixed:
        raise WrongArgument(f"packed is {packed!r}: expected one width for the whole layer, such as 2g64")
    return choice


def _count(one: int, l2_bytes: int) -> int:
    """Copies that overflow the cache thrice."""
    return max(2, min(-(-3 * l2_bytes // one), _MOST_COPIES))


def _words(rows: int, out: int, device: torch.device) -> Tensor:
    """Random packed words."""
    return torch.randint(-(2**31), 2**31, (rows, out), dtype=torch.int32, device=device)


def _onebit(planes: int, out: int, in_: int, device: torch.device, l2_bytes: int) -> CudaLayer:
    one = planes * (4 * word_rows(in_) * out + 2 * (out + in_))
    copies: list[list[Tensor]] = []
    for _ in range(_count(one, l2_bytes)):
        tensors: list[Tensor] = []
        for _ in range(planes):
            tensors += [_words(word_rows(in_), out, device), torch.rand(out, device=device).half() + 0.5]
            tensors += [(torch.rand(in_, device=device).half() + 0.5) / in_**0.5]
        copies.append(tensors)
    first = [(copies[0][i], copies[0][i + 1], copies[0][i + 2]) for i in range(0, 3 * planes, 3)]
    return CudaLayer([_onebit_call(*t) for t in copies], onebit.dequantize(first, in_), one)


def _mpq(bits: int, group_size: int, out: int, in_: int, device: torch.device, l2_bytes: int) -> CudaLayer:
    groups = mpq.group_count(in_, group_size)
    one = 4 * word_rows(in_, bits) * out + 4 * groups * out
    copies: list[tuple[Tensor, Tensor, Tensor]] = []
    for _ in range(_count(one, l2_bytes)):
        scales = (torch.rand(groups, out, device=device) + 0.5).half() / in_**0.5
        zeros = (scales.float() * (2**bits - 1) / 2).half()
        copies.append((_words(word_rows(in_, bits), out, device), scales, zeros))
    return CudaLayer(
        [_mpq_call(*t, bits, group_size) for t in copies], mpq.dequantize(*copies[0], in_, bits, group_size), one
    )


def _float_call(W: Tensor) -> Call:
    return lambda x: F.linear(x, W)


def _onebit_call(weight: Tensor, a: Tensor, b: Tensor, *second: Tensor) -> Call:
    return lambda x: ops.onebit_linear(x, weight, a, b, None, *second)


def _mpq_call(weight: Tensor, scales: Tensor, zeros: Tensor, bits: int, group_size: int) -> Call:
    return lambda x: ops.mpq_linear(x, weight, scales, zeros, None, bits, group_size)
