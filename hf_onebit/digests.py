"""SHA-256 of files and of tensors, as side files and work folders record them."""

from __future__ import annotations

import hashlib
import os

import torch
from torch import Tensor

_CHUNK = 1 << 20


def sha256_of_file(path: str | os.PathLike[str]) -> str:
    """Digest of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_of_tensor(tensor: Tensor) -> str:
    """Digest of a tensor's bytes as safetensors stores them (row by row, little end first)."""
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().data).hexdigest()
