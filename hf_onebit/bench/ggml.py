"""ggml's own layers: its dot products and its quantization of activations, from the libggml of llama-cpp-python.

The library is loaded by ctypes from where that package is installed; the package itself is not imported. What is
called is in ggml's public headers ggml.h and ggml-cpu.h: ``ggml_get_type_traits_cpu`` and ``ggml_quantize_chunk``. Each
type's number is held against its name before anything is called with it.
"""

import ctypes
import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from hf_onebit.bench.layers import Rival, Run, copies
from hf_onebit.bench.rounds import Threads
from hf_onebit.ops import measuring

# enum ggml_type, and the name that ggml_type_name must give.
TYPES = {"q1_0": 41, "tq2_0": 35, "q4_0": 2}
INSTALL = 'pip install "hf_onebit[bench]" builds llama-cpp-python from source, which takes minutes'
_SUFFIX = {"darwin": "dylib", "win32": "dll"}.get(sys.platform, "so")


class _Traits(ctypes.Structure):
    """The beginning of struct ggml_type_traits (ggml.h)."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("block", ctypes.c_int64),
        ("interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    )


class _CpuTraits(ctypes.Structure):
    """struct ggml_type_traits_cpu (ggml-cpu.h)."""

    _fields_ = (
        ("from_float", ctypes.c_void_p),
        ("vec_dot", ctypes.c_void_p),
        ("vec_dot_type", ctypes.c_int),
        ("rows", ctypes.c_int64),
    )


class Ggml:
    """The loaded library.

    Raises:
        ImportError: there is none.
    """

    def __init__(self) -> None:
        folder = library_folder()
        if folder is None:
            raise ImportError(f"llama-cpp-python is not installed ({INSTALL})")
        try:
            self.base = ctypes.CDLL(str(folder / f"libggml-base.{_SUFFIX}"))
            self.cpu = ctypes.CDLL(str(folder / f"libggml-cpu.{_SUFFIX}"))
            self._declare()
        except (OSError, AttributeError) as error:  # not to be loaded; without a function of that name
            raise ImportError(f"the libggml of llama-cpp-python in {folder} cannot be used: {error}") from error
        self.cpu.ggml_cpu_init()

    def _declare(self) -> None:
        number, pointer, size = ctypes.c_int, ctypes.c_void_p, ctypes.c_int64
        base, cpu = self.base, self.cpu
        base.ggml_type_name.restype, base.ggml_type_name.argtypes = ctypes.c_char_p, [number]
        base.ggml_row_size.restype, base.ggml_row_size.argtypes = ctypes.c_size_t, [number, size]
        base.ggml_get_type_traits.restype, base.ggml_get_type_traits.argtypes = ctypes.POINTER(_Traits), [number]
        base.ggml_quantize_chunk.restype = ctypes.c_size_t
        base.ggml_quantize_chunk.argtypes = [number, pointer, pointer, size, size, size, pointer]
        base.ggml_version.restype = ctypes.c_char_p
        cpu.ggml_get_type_traits_cpu.restype = ctypes.POINTER(_CpuTraits)
        cpu.ggml_get_type_traits_cpu.argtypes = [number]
        cpu.ggml_cpu_init.restype, cpu.ggml_cpu_init.argtypes = None, []

    @property
    def version(self) -> str:
        """ggml's own version."""
        return str(self.base.ggml_version().decode())

    def name_of(self, number: int) -> str:
        """The name of a type; an empty string where there is none of that number."""
        return (self.base.ggml_type_name(number) or b"").decode()

    def obstacle(self, name: str, in_features: int) -> str | None:
        """Why layers of that type and that many inputs cannot be timed, or None."""
        number = TYPES[name]
        if self.name_of(number) != name:
            return f"type {number} of ggml {self.version} is {self.name_of(number) or 'not there'}, expected {name}"
        block = self.base.ggml_get_type_traits(number).contents.block
        if in_features % block:
            return f"{in_features} inputs are no multiple of its block of {block}"
        traits = self.cpu.ggml_get_type_traits_cpu(number).contents
        activations = self.name_of(traits.vec_dot_type)
        if not traits.vec_dot or not activations.startswith("q8_"):
            return f"its dot product takes activations in {activations!r}, expected q8_0, q8_1 or q8_K"
        return None

    def quantize(self, name: str, W: Tensor) -> Tensor:
        """Weights (out, in), float32, to uint8 (out, bytes of a row), by ggml's own rounding."""
        W = W.float().contiguous()
        out_features, in_features = W.shape
        packed = torch.empty(out_features, self.base.ggml_row_size(TYPES[name], in_features), dtype=torch.uint8)
        address = ctypes.c_void_p(packed.data_ptr())
        written = self.base.ggml_quantize_chunk(
            TYPES[name], ctypes.c_void_p(W.data_ptr()), address, 0, out_features, in_features, None
        )
        if written != packed.nbytes:
            raise RuntimeError(f"ggml_quantize_chunk wrote {written} bytes of {name}, expected {packed.nbytes}")
        return packed

    def dequantize(self, name: str, packed: Tensor, in_features: int) -> Tensor:
        """The float32 weights (out, in) that quantized ones stand for."""
        W = torch.empty(len(packed), in_features)
        to_float = self.base.ggml_get_type_traits(TYPES[name]).contents.to_float
        to_float(packed.data_ptr(), W.data_ptr(), W.numel())
        return W


class GgmlDot(Rival):
    """Row by row: activations quantized as ggml does it, then its dot product for each output.

    Rows are split over threads of Python, each of which prepares the activations for itself; nobody waits for anybody
    between layers, which is a little less work than ggml's own scheduler does.
    """

    def __init__(
        self, ggml: Ggml, kind: str, out_features: int, in_features: int, working_set: int, threads: Threads
    ) -> None:
        self.name, self.ggml, self.kind, self.threads = f"ggml {kind}", ggml, kind, threads
        self.out_features, self.in_features = out_features, in_features
        # Ternary numbers for a ternary type, which rounds most of any others to zero.
        W = (
            torch.randint(-1, 2, (out_features, in_features))
            if kind == "tq2_0"
            else torch.randn(out_features, in_features)
        )
        quantized = ggml.quantize(kind, W)
        self.W = ggml.dequantize(kind, quantized, in_features)
        self.tensors = copies(quantized, working_set)
        self.bits_per_weight = 8 * quantized.nbytes / self.W.numel()
        traits = ggml.cpu.ggml_get_type_traits_cpu(TYPES[kind]).contents
        activations = ggml.cpu.ggml_get_type_traits_cpu(traits.vec_dot_type).contents
        self.dot, self.quantize_x = traits.vec_dot, activations.from_float
        self.prepared_bytes = ggml.base.ggml_row_size(traits.vec_dot_type, in_features)
        # Activations are rounded to eight bits: errors of about 0.006 each, in either direction, where a wrong product
        # is off by about as much as the sum's own terms.
        self.allowed = 0.1 / math.sqrt(in_features)
        self.about = f"vec_dot, {ggml.name_of(traits.vec_dot_type)} activations"

    def prepare(self, x: Tensor) -> tuple[Run, Callable[[], Tensor]]:
        x = x.float().contiguous()
        y = torch.empty(len(x), self.out_features)
        prepared = [torch.empty(len(x), self.prepared_bytes, dtype=torch.uint8) for _ in range(self.threads.count)]

        def run(chosen: Sequence[int]) -> None:
            weights = [self.tensors[i] for i in chosen]
            share = -(-self.out_features // self.threads.count)

            def rows(begin: int, end: int) -> None:
                own = prepared[begin // share]
                measuring.foreign_linear(self.quantize_x, self.dot, weights, x, own, y, begin, end)

            self.threads.split(self.out_features, 1, rows)

        def result() -> Tensor:
            y.fill_(torch.nan)
            run([0])
            return y.clone()

        return run, result

    def expected(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x, W = x.double(), self.W.double()
        return x @ W.T, x.abs() @ W.abs().T


def library_folder() -> Path | None:
    """Where llama-cpp-python keeps its libraries; the package is not imported. None where it is not installed."""
    spec = importlib.util.find_spec("llama_cpp")
    places = spec.submodule_search_locations if spec else None
    folder = Path(next(iter(places))) / "lib" if places else None
    return folder if folder is not None and folder.is_dir() else None
