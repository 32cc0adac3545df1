"""What is installed, which kernels answer, and whether they compute what they should."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

import torch

from hf_onebit import ops
from hf_onebit.formats import onebit as fmt
from hf_onebit.ops import kernel_cache
from hf_onebit.version import __version__

_REQUIRED = ("torch", "transformers", "accelerate", "safetensors", "huggingface_hub", "numpy", "tqdm")
_OPTIONAL = ("peft", "optimum", "datasets", "gguf", "matplotlib", "triton")
# |y - y64| <= this times Σ_k |a_n b_k x_k|: how exact a float32 product of the op must be.
_TOLERANCE = 1e-6
# On other devices, whose tensor cores add up less exactly.
_DEVICE_TOLERANCE = 5e-6


def examine(*, build: bool = False) -> dict[str, Any]:
    """Versions, devices, kernels and a self-test.

    Args:
        build: compile the CPU kernels into the user's cache first, where none are in use.

    Returns:
        {"ok", "hf_onebit", "python", "platform", "packages", "optional", "devices", "built", "build_seconds",
        "kernels", "self_test": [{device, shape, planes, error, ok}]}; ``built`` is the file that was compiled, or None;
        ``error`` is the largest |y - y64| / Σ|a b x| against float64.

    Raises:
        RuntimeError: the kernels cannot be built, or not be loaded afterwards.
    """
    built, seconds = _build() if build and ops.cpu.isa() is None else (None, None)
    devices = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    tests = [
        _self_test(device, shape, planes) for device in devices for shape in ((96, 130), (33, 257)) for planes in (1, 2)
    ]
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


def _self_test(device: str, shape: tuple[int, int], planes: int) -> dict[str, Any]:
    """One product of odd sizes against the dense float64 one."""
    out_features, in_features = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, in_features, generator=generator)
    expected, bound = (
        torch.zeros(3, out_features, dtype=torch.float64),
        torch.zeros(3, out_features, dtype=torch.float64),
    )
    arguments: list[torch.Tensor] = []
    for _ in range(planes):
        signs = torch.rand(shape, generator=generator) < 0.5
        a, b = (torch.rand(size, generator=generator).half() for size in shape)
        scaled = a.double()[:, None] * b.double()
        expected += x.double() @ (scaled * (signs.double() * 2 - 1)).t()
        bound += x.double().abs() @ scaled.t()
        arguments += [fmt.pack_signs(signs), a, b]
    weight, a, b, *second = (tensor.to(device) for tensor in arguments)
    y = ops.onebit_linear(x.to(device), weight, a, b, None, *second)
    error = float(((y.cpu().double() - expected).abs() / bound).max())
    return {
        "device": device,
        "shape": list(shape),
        "planes": planes,
        "error": error,
        "ok": error <= (_TOLERANCE if device == "cpu" else _DEVICE_TOLERANCE),
    }
