"""One linear layer in every representation: correctness first, then time, hot and streaming."""

import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from hf_onebit import ops
from hf_onebit.bench.rounds import Contender, Threads, median_ratio, time_rounds
from hf_onebit.formats.onebit import pack_signs
from hf_onebit.ops import measuring, reference

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
MODES = ("hot", "stream")
READ = "read"

Run = Callable[[Sequence[int]], None]


class WrongResult(RuntimeError):
    """A contender computed something else than the product that it is timed for."""


class Rival(ABC):
    """A linear layer of out x in random weights, in as many copies as asked for.

    Attributes:
        name: how it is called in the results.
        out_features, in_features: its shape.
        tensors: the weights, one entry a copy.
        bits_per_weight: what it reads for each weight, scales included.
        allowed: largest |y - y64| / Σ_k |w_nk x_k| beyond the rounding of y to its dtype; what y64 is, ``expected``
            says.
        about: what a reader of its figures has to know.
    """

    name: str
    out_features: int
    in_features: int
    tensors: list[Tensor]
    bits_per_weight: float
    allowed: float
    about: str

    @property
    def weights(self) -> str:
        """The name of its copies (see ``Contender``)."""
        return self.name

    @abstractmethod
    def prepare(self, x: Tensor) -> tuple[Run, Callable[[], Tensor]]:
        """For x (batch, in) float32: a function to time, and one that returns what that one computes, (batch, out).

        Only the conversion of x to the dtype of the contender's input is done here: preparing activations for the
        product is part of the timed work.
        """

    @abstractmethod
    def expected(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(y64, Σ_k |w_nk x_k|), both float64 (batch, out), from the input and the weights that it really is given."""

    def check(self, result: Tensor, x: Tensor) -> float:
        """The largest error as ``allowed`` counts it.

        Raises:
            WrongResult: it is larger than that, or not a number.
        """
        exact, bound = self.expected(x)
        if result.shape != exact.shape:
            raise WrongResult(f"{self.name} returned {tuple(result.shape)}, expected {tuple(exact.shape)}")
        rounding = torch.finfo(result.dtype).eps / 2 if result.dtype != torch.float32 else 0.0
        beyond = ((result.double() - exact).abs() - rounding * exact.abs()).clamp(min=0)
        error = float((beyond / bound.clamp(min=1e-300)).max()) if beyond.numel() else 0.0
        if not error <= self.allowed:
            raise WrongResult(
                f"{self.name} computes a wrong product of {tuple(exact.shape)}: its error is {error:.1e} of "
                f"sum |w x|, expected at most {self.allowed:.0e}. Nothing was timed after that"
            )
        return error


class Packed(Rival):
    """Our operator, from packed bits."""

    def __init__(self, out_features: int, in_features: int, working_set: int, dtype: torch.dtype) -> None:
        self.name, self.dtype = "packed", dtype
        self.out_features, self.in_features = out_features, in_features
        self.signs = torch.rand(out_features, in_features) < 0.5
        self.a, self.b = torch.rand(out_features).half() + 0.1, torch.rand(in_features).half() + 0.1
        self.tensors = copies(pack_signs(self.signs), working_set)
        self.bits_per_weight = 1 + 16 * (out_features + in_features) / (out_features * in_features)
        # Matrix units round activations to 16-bit codes (docs/kernels.md).
        self.allowed = 1e-6 if dtype == torch.float32 else 2e-4
        self.about = f"{dtype} activations".replace("torch.", "")

    def product(self, x: Tensor, words: Tensor) -> Tensor:
        """(batch, out) of x's dtype."""
        return ops.onebit_linear(x, words, self.a, self.b)

    def prepare(self, x: Tensor) -> tuple[Run, Callable[[], Tensor]]:
        x = x.to(self.dtype)

        def run(chosen: Sequence[int]) -> None:
            for i in chosen:
                self.product(x, self.tensors[i])

        return run, lambda: self.product(x, self.tensors[0])

    def expected(self, x: Tensor) -> tuple[Tensor, Tensor]:
        u = x.to(self.dtype).double() * self.b.double()
        a = self.a.double()
        exact = u @ torch.where(self.signs, 1.0, -1.0).double().T * a
        return exact, u.abs().sum(-1, keepdim=True) * a


class Reference(Packed):
    """The operator in plain PyTorch, over the copies of ``Packed``."""

    def __init__(self, packed: Packed) -> None:
        self.__dict__.update(packed.__dict__)
        self.name, self.allowed = "reference", 5e-6

    @property
    def weights(self) -> str:
        return "packed"

    def product(self, x: Tensor, words: Tensor) -> Tensor:
        return reference.onebit_linear(x, words, self.a, self.b)


class Dense(Rival):
    """``torch.nn.functional.linear`` with float weights."""

    def __init__(self, name: str, out_features: int, in_features: int, working_set: int, dtype: torch.dtype) -> None:
        self.name, self.dtype = name, dtype
        self.out_features, self.in_features = out_features, in_features
        self.tensors = copies(torch.randn(out_features, in_features).to(dtype), working_set)
        self.bits_per_weight = 8.0 * dtype.itemsize
        self.allowed = 5e-6
        self.about = f"torch.nn.functional.linear in {dtype}".replace("torch.bf", "bf").replace("torch.fl", "fl")

    def prepare(self, x: Tensor) -> tuple[Run, Callable[[], Tensor]]:
        x = x.to(self.dtype)

        def run(chosen: Sequence[int]) -> None:
            for i in chosen:
                linear(x, self.tensors[i])

        return run, lambda: linear(x, self.tensors[0])

    def expected(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x, W = x.to(self.dtype).double(), self.tensors[0].double()
        return x @ W.T, x.abs() @ W.abs().T


def copies(tensor: Tensor, working_set: int) -> list[Tensor]:
    """As many copies as fill ``working_set`` bytes, at least two; the tensor alone where that is 0."""
    if working_set == 0:
        return [tensor]
    return [tensor.clone() for _ in range(max(2, working_set // tensor.nbytes))]


def measure(rivals: Sequence[Rival], batch: int, rounds: int, threads: Threads) -> dict[str, Any]:
    """Check every rival, then time all of them and the reading of the first one's bytes.

    Args:
        rivals: of one shape; the first is ours.
        batch: rows of x.
        rounds: timings of each.
        threads: for the reader.

    Returns:
        {name: {seconds, seconds_min, cpu_seconds, times_packed, times_read, cpu_times_packed, cpu_times_read, gb_per_s,
        weights_per_s, bits_per_weight, error, allowed, about}}, "read" among the names. ``times_packed`` is the median
        over rounds of the contender's time by that of the first rival in the same round; ``times_read`` the same by the
        time of reading the first rival's words; with cpu_, the same of the time that the process had the processor for,
        its threads added up. Without compiled kernels there is no "read", and the ratios to it are None.

    Raises:
        WrongResult: a rival is outside of its bound.
    """
    ours = rivals[0]
    x = torch.randn(batch, ours.in_features)
    contenders, errors = [], {}
    for each in rivals:
        run, result = each.prepare(x)
        errors[each.name] = each.check(result(), x)
        contenders.append(Contender(each.name, run, len(each.tensors), each.weights))
    if ops.cpu.isa() is not None:
        contenders.append(Contender(READ, _reader(ours, threads), len(ours.tensors), ours.weights))
    times = time_rounds(contenders, rounds)
    found = {}
    by_name = {rival.name: rival for rival in rivals}
    for name, mine in times.items():
        rival = by_name.get(name)
        seconds = statistics.median(mine.wall)
        packed, read = times[ours.name], times.get(READ)
        found[name] = {
            "seconds": seconds,
            "seconds_min": min(mine.wall),
            "cpu_seconds": statistics.median(mine.cpu),
            "times_packed": median_ratio(mine.wall, packed.wall),
            "times_read": read and median_ratio(mine.wall, read.wall),
            "cpu_times_packed": median_ratio(mine.cpu, packed.cpu),
            "cpu_times_read": read and median_ratio(mine.cpu, read.cpu),
            "gb_per_s": (rival or ours).tensors[0].nbytes / seconds / 1e9,
            "weights_per_s": rival and rival.in_features * rival.out_features / seconds,
            "bits_per_weight": rival and rival.bits_per_weight,
            "error": errors.get(name),
            "allowed": rival and rival.allowed,
            "about": rival.about if rival else f"loads and exclusive or, {measuring.read_isa()}",
        }
    return found


def _reader(packed: Rival, threads: Threads) -> Run:
    size = packed.tensors[0].nbytes

    def run(chosen: Sequence[int]) -> None:
        buffers = [packed.tensors[i] for i in chosen]
        threads.split(size, 64, lambda begin, end: measuring.read_xor(buffers, begin, end))

    return run
