"""What is installed, which kernels answer, and whether they compute what they should."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hf_onebit import ops
from hf_onebit.formats import onebit as fmt
from hf_onebit.formats.mpq import group_count
from hf_onebit.formats.packing import pack, word_rows
from hf_onebit.nn import (
    grouped_experts,  # noqa: F401  (importing makes its kernels known to the examination)
    packed_update,
)
from hf_onebit.ops import gpu, gpu_examination, gpu_variants, kernel_cache
from hf_onebit.version import __version__

_REQUIRED = ("torch", "transformers", "accelerate", "safetensors", "huggingface_hub", "numpy", "tqdm")
_OPTIONAL = ("peft", "optimum", "datasets", "gguf", "matplotlib", "triton")
# |y - y64| <= this times Σ_k |w_nk x_k|: how exact a float32 product of the op must be.
_TOLERANCE = 1e-6
# On other devices, whose tensor cores add up less exactly.
_DEVICE_TOLERANCE = 5e-6
_GROUP = 64


def examine(
    *, build: bool = False, all_kernels: bool = False, say: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Versions, devices, kernels and a self-test.

    Each GPU kernel is examined as at its first use (``ops.gpu_examination``): a few variants of each kind, or all.

    Args:
        build: compile the CPU kernels into the user's cache first, where none are in use.
        all_kernels: every variant of the GPU kernels; Triton compiles each, which takes minutes the first time.
        say: is given a line before what may take a while.

    Returns:
        {"ok", "hf_onebit", "python", "platform", "packages", "optional", "devices", "built", "build_seconds",
        "kernels", "self_test": [{device, op, about, error, ok, reason}]}; ``built`` is the file that was compiled, or
        None. ``error`` is the largest |y - y64| / Σ|w x| against float64, of ``packed_step`` the share of words and
        moments that are not its twin's, and None for a GPU kernel; ``reason`` says what is wrong, or is None.

    Raises:
        RuntimeError: the kernels cannot be built, or not be loaded afterwards.
    """
    built, seconds = _build() if build and ops.cpu.isa() is None else (None, None)
    devices = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    tests = [_onebit_test(device, shape, planes) for device in devices for shape, planes in _PRODUCTS]
    tests += [_mpq_test(), _embedding_test(), _step_test()]
    for device in devices[1:]:
        if not gpu.obstacle():
            say(f"Examining the kernels of {device}; where they were never used, Triton compiles them first.")
            tests += _kernel_tests(torch.device(device), all_kernels)
    return {
        "ok": all(test["ok"] for test in tests),
        "hf_onebit": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _REQUIRED},
        "optional": {name: _version(name) for name in _OPTIONAL},
        "devices": {device: _device_name(device) for device in devices},
        "built": built,
        "build_seconds": seconds,
        "kernels": ops.backends(),
        "self_test": tests,
    }


def _build() -> tuple[str, float]:
    """Compile the CPU kernels and load them; the file and the seconds."""
    file, seconds = kernel_cache.build_binary()
    reason = ops.cpu.load()
    if reason and os.environ.get("HF_ONEBIT_ISA", "").strip().lower() != "off":
        raise RuntimeError(f"Built {file}, but it is not in use: {reason}")
    return str(file), seconds


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device_name(device: str) -> str:
    return platform.processor() or platform.machine() if device == "cpu" else torch.cuda.get_device_name(device)


# (out, in) and planes of the products of signs; sizes that fill no words and no tiles.
_PRODUCTS = [(shape, planes) for shape in ((96, 130), (33, 257)) for planes in (1, 2)]


def _onebit_test(device: str, shape: tuple[int, int], planes: int) -> dict[str, Any]:
    """One product of odd sizes against the dense float64 one."""
    out_features, in_features = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, in_features, generator=generator)
    W, size = (torch.zeros(shape, dtype=torch.float64) for _ in range(2))
    arguments: list[Tensor] = []
    for _ in range(planes):
        signs = torch.rand(shape, generator=generator) < 0.5
        a, b = (torch.rand(count, generator=generator).half() for count in shape)
        scaled = a.double()[:, None] * b.double()
        W += scaled * (signs.double() * 2 - 1)
        size += scaled
        arguments += [fmt.pack_signs(signs), a, b]
    weight, a, b, *second = (tensor.to(device) for tensor in arguments)
    y = ops.onebit_linear(x.to(device), weight, a, b, None, *second)
    error = _error(y.cpu(), x.double() @ W.t(), x.double().abs() @ size.t())
    about = f"{out_features}x{in_features}, planes={planes}"
    return _result(device, "onebit_linear", about, error, _TOLERANCE if device == "cpu" else _DEVICE_TOLERANCE)


def _mpq_test() -> dict[str, Any]:
    """One product of codes on the CPU against the dense float64 one."""
    bits, shape = 4, (96, 130)
    weight, scales, zeros, W, size = _random_codes(bits, shape)
    x = torch.randn(3, shape[1], generator=torch.Generator().manual_seed(1))
    y = ops.mpq_linear(x, weight, scales, zeros, None, bits, _GROUP)
    error = _error(y, x.double() @ W.t(), x.double().abs() @ size.t())
    return _result("cpu", "mpq_linear", f"96x130, bits={bits}", error, _TOLERANCE)


def _embedding_test() -> dict[str, Any]:
    """Rows looked up on the CPU against those of the dense float64 matrix."""
    bits, shape = 3, (50, 130)
    weight, scales, zeros, W, size = _random_codes(bits, shape)
    ids = torch.tensor([[7, 0], [49, 7]])
    rows = ops.mpq_embedding(ids, weight, scales, zeros, bits, _GROUP, shape[1], torch.float32)
    return _result("cpu", "mpq_embedding", f"50x130, bits={bits}", _error(rows, W[ids], size[ids]), _TOLERANCE)


def _step_test() -> dict[str, Any]:
    """Three steps on packed codes on the CPU: the operator's words and moments are those of its twin, to the bit."""
    bits, (N, K) = 4, (33, 130)
    weight, scales, zeros, _, _ = _random_codes(bits, (N, K))
    index = torch.arange(K) // _GROUP
    gradients = torch.randn(3, K, N, generator=torch.Generator().manual_seed(2))
    after: list[list[Tensor]] = []
    for step in (torch.ops.hf_onebit.packed_step.default, packed_update.packed_step):
        words, m, v = weight.clone(), torch.zeros(K, N), torch.zeros(K, N)
        for count, gradient in enumerate(gradients, 1):
            numbers = (0.03, 0.03, 0.1, 0.9, 0.99, 1e-6, 1e-3)  # lr, eta, weight_decay, beta1, beta2, eps, inertia
            step(
                words, gradient, m, None, v, None, scales, zeros, None, index, None, [bits, K, word_rows(K, bits)],
                "stochastic", *numbers, 7, 0, count, 0, False,
            )  # fmt: skip
        after.append([words, m, v])
    differing = sum(int((ours != theirs).sum()) for ours, theirs in zip(*after, strict=True))
    share = differing / sum(tensor.numel() for tensor in after[0])
    return _result("cpu", "packed_step", f"{N}x{K}, bits={bits}", share, 0.0)


def _random_codes(bits: int, shape: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(words, scales, zeros, the float64 matrix (out, in) that they stand for, the sizes of its two terms)."""
    out_features, in_features = shape
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, shape, generator=generator, dtype=torch.uint8)
    groups = group_count(in_features, _GROUP)
    scales = (torch.rand(groups, out_features, generator=generator) + 0.5).half()
    zeros = (torch.rand(groups, out_features, generator=generator) * (1 << bits)).half()
    s, z = (t.double().t().repeat_interleave(_GROUP, 1)[:, :in_features] for t in (scales, zeros))
    scaled = codes.double() * s
    return pack(codes, bits), scales, zeros, scaled - z, scaled + z


def _kernel_tests(device: torch.device, every: bool) -> list[dict[str, Any]]:
    """Each kernel of a GPU beside the reference, as at its first use."""
    tests = []
    for kind in gpu_examination.EXAMINATIONS:
        for variant in gpu_variants.variants(kind, every):
            try:
                reason = gpu.examine(device, kind, **variant) or None
            except RuntimeError as error:  # no memory left
                reason = f"cannot be examined: {str(error).strip().splitlines()[0]}"
            about = ", ".join(f"{name}={str(value).removeprefix('torch.')}" for name, value in variant.items())
            tests.append(
                {"device": str(device), "op": f"kernel {kind}", "about": about, "error": None, "ok": not reason,
                 "reason": reason}
            )  # fmt: skip
    return tests


def _error(y: Tensor, expected: Tensor, bound: Tensor) -> float:
    return float(((y.double() - expected).abs() / bound).max())


def _result(device: str, op: str, about: str, error: float, allowed: float) -> dict[str, Any]:
    ok = error <= allowed  # not where it is no number
    reason = None if ok else f"is off by {error:.1e}, allowed {allowed:.0e}"
    return {"device": device, "op": op, "about": about, "error": error, "ok": ok, "reason": reason}
