"""What the compiled kernels offer to measurements: reading memory, and a loop around another library's dot product.

Calls release the interpreter's lock, so threads of Python share the work.
"""

import ctypes
from collections.abc import Sequence

from torch import Tensor

from hf_onebit.ops import cpu

Pointers = ctypes.Array[ctypes.c_void_p]


def pointers(tensors: Sequence[Tensor]) -> Pointers:
    """The addresses of the tensors' data, for the functions below; the caller keeps the tensors alive."""
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))


def read_isa() -> str:
    """The widest registers that :func:`read_xor` can read with here: "avx512", "avx2" or "scalar".

    Raises:
        RuntimeError: there are no compiled kernels.
    """
    name: bytes = _library().hf_onebit_read_isa()
    return name.decode()


def read_xor(buffers: Sequence[Tensor], begin: int = 0, end: int | None = None, isa: str | None = None) -> int:
    """Read bytes ``begin`` to ``end`` of each of some equally large tensors, as fast as this machine loads.

    Args:
        buffers: contiguous CPU tensors of any dtype.
        begin, end: the range of bytes in each; ``end`` None for all.
        isa: "scalar", "avx2" or "avx512", which this machine must have; None for the widest.

    Returns:
        The exclusive or of the little-endian 64-bit words that the ranges hold, the last of each filled up with zeros;
        so no byte was left out.

    Raises:
        RuntimeError: there are no compiled kernels.
        ValueError: a tensor is not contiguous or of another size than the first, or the range is not inside of it.
    """
    library = _library()
    size = buffers[0].nbytes if buffers else 0
    end = size if end is None else end
    for tensor in buffers:
        if tensor.nbytes != size or not tensor.is_contiguous() or not tensor.is_cpu:
            raise ValueError(
                f"read_xor got a tensor of {tensor.nbytes} bytes on {tensor.device}, contiguous: "
                f"{tensor.is_contiguous()}; expected contiguous tensors on the CPU, all of {size} bytes as the first"
            )
    if not 0 <= begin <= end <= size:
        raise ValueError(f"read_xor got bytes {begin} to {end}, expected a range inside of 0 to {size}")
    addresses = (ctypes.c_void_p * len(buffers))(*(tensor.data_ptr() + begin for tensor in buffers))
    xor: int = library.hf_onebit_read(addresses, len(buffers), end - begin, None if isa is None else isa.encode())
    return xor


def foreign_linear(
    prepare: int,
    dot: int,
    weights: Sequence[Tensor],
    x: Tensor,
    prepared: Tensor,
    y: Tensor,
    begin: int,
    end: int,
) -> None:
    """y[:, begin:end] = x @ W[begin:end].T by ggml's functions of a weight type, for each of ``weights`` in turn.

    Args:
        prepare: address of ``void (const float* x, void* prepared, int64 n)``, ggml's ``from_float``.
        dot: address of ggml's ``vec_dot``.
        weights: each uint8 (out, bytes of a row).
        x: float32 (batch, in).
        prepared: uint8 (batch, bytes of a prepared row); overwritten.
        y: float32 (batch, out).
        begin, end: range of outputs.

    Raises:
        RuntimeError: there are no compiled kernels.
        ValueError: a tensor is not contiguous, or the range is not inside of the outputs.
    """
    library = _library()
    batch, out_features = y.shape
    if not all(tensor.is_contiguous() for tensor in (x, prepared, y, *weights)):
        raise ValueError("foreign_linear got a tensor that is not contiguous, expected contiguous ones only")
    sizes = {tuple(weight.shape) for weight in weights}
    if len(sizes) != 1 or next(iter(sizes))[0] != out_features or len(x) != batch or len(prepared) != batch:
        raise ValueError(
            f"foreign_linear got weights {sorted(sizes)}, x {tuple(x.shape)}, prepared {tuple(prepared.shape)} and y "
            f"{tuple(y.shape)}: expected one size of (out, bytes), and (batch, ...) thrice"
        )
    if not 0 <= begin <= end <= out_features:
        raise ValueError(f"foreign_linear got outputs {begin} to {end}, expected a range inside of 0 to {out_features}")
    library.hf_onebit_foreign_linear(
        ctypes.c_void_p(prepare), ctypes.c_void_p(dot), pointers(weights), len(weights), weights[0].shape[1],
        ctypes.c_void_p(x.data_ptr()), batch, x.shape[1], ctypes.c_void_p(prepared.data_ptr()), prepared.shape[1],
        ctypes.c_void_p(y.data_ptr()), out_features, begin, end,
    )  # fmt: skip


def _library() -> ctypes.CDLL:
    library = cpu.library()
    if library is None:
        raise RuntimeError(f"this needs the compiled kernels, which are {cpu.status()}")
    # Set in every call: tests load the binary more than once.
    int64, pointer = ctypes.c_int64, ctypes.c_void_p
    library.hf_onebit_read.restype = ctypes.c_uint64
    library.hf_onebit_read.argtypes = [pointer, int64, int64, ctypes.c_char_p]
    library.hf_onebit_read_isa.restype = ctypes.c_char_p
    library.hf_onebit_foreign_linear.restype = None
    library.hf_onebit_foreign_linear.argtypes = [
        pointer, pointer, pointer, int64, int64, pointer, int64, int64, pointer, int64, pointer, int64, int64, int64
    ]  # fmt: skip
    return library
