"""In which dtype large products are fast here."""

from __future__ import annotations

import torch

# {device type: whether its products in bfloat16 are faster than in float32}; of other devices it is taken to be so.
_HAS_FAST_BFLOAT16 = {
    # Without AVX-512 torch has no such product and computes it number by number.
    "cpu": lambda: torch.backends.cpu.get_cpu_capability().startswith("AVX512"),
    "cuda": lambda: torch.cuda.is_bf16_supported(including_emulation=False),
}


def product_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where it is fast, else float32."""
    return torch.bfloat16 if _is_fast(device) else torch.float32


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What products of a float model are cast to: bfloat16 where it is fast, else None: they stay as they are."""
    return torch.bfloat16 if _is_fast(device) else None


def _is_fast(device: torch.device) -> bool:
    return _HAS_FAST_BFLOAT16.get(device.type, lambda: True)()
