"""Calibration data that the model writes itself, written once and kept: ``dataset="self"``.

``<cache>/texts/<key>.safetensors`` holds the token ids and ``<key>.json`` what they were made from and their digest.
The cache is the one of ``ops/kernel_cache.py`` (``HF_ONEBIT_CACHE``), the key a hash of all that the texts depend on.
What is in there is never trusted: ids whose digest or description differs are written again.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_onebit.calibration import CalibrationData, digest_of
from hf_onebit.ops import kernel_cache
from hf_onebit.progress import logger
from hf_onebit.texts.openings import special_ids
from hf_onebit.texts.self_text import ALGORITHM, LONGEST, check_writes, write_texts

_SAMPLED = 1024  # values of each tensor that go into the digest one by one


def self_calibration(
    model: Any,
    tokenizer: Any,
    *,
    max_tokens: int = 16384,
    context: int = 1024,
    seed: int = 0,
    starts: Callable[[int, int], None] | None = None,
) -> CalibrationData:
    """Token sequences that a model wrote itself, from the cache where it wrote them before.

    Args:
        model: a causal language model, whole in memory.
        tokenizer: its tokenizer.
        max_tokens: how many tokens, but for an incomplete last sequence.
        context: length of a sequence; texts are laid end to end and cut, so that all have this length.
        seed: of the openings and of the sampling.
        starts: called before writing starts, if it has to, with how many tokens there will be and the longest text's.

    Returns:
        Data whose source reads ``self (seed N)``.

    Raises:
        ValueError: as ``self_text.write_texts``.
    """
    rows, length, made_from, file = _wanted(model, tokenizer, max_tokens, context, seed)
    ids = None if file is None else _read(file, made_from, rows, length)
    if ids is None:
        longest = min(LONGEST, length)
        if starts is not None:
            starts(rows * length, longest)
        texts = write_texts(model, tokenizer, rows * length, longest=longest, seed=seed)
        ids = torch.tensor([token for text in texts for token in text])[: rows * length].view(rows, length)
        if file is not None:
            _write(file, made_from, ids)
    else:
        logger.info(f"The model's own text comes from the cache: {file}")
    batches = [{"input_ids": row[None].clone()} for row in ids]
    return CalibrationData(batches, f"self (seed {seed})", ids.numel(), digest_of(batches))


def to_be_written(
    model: Any, tokenizer: Any, *, max_tokens: int = 16384, context: int = 1024, seed: int = 0
) -> tuple[int, int] | None:
    """How many tokens ``self_calibration`` would have the model write, and the longest text's; None where it would not,
    since they are in the cache.

    Raises:
        ValueError: the model cannot write (``self_text.check_writes``).
    """
    rows, length, made_from, file = _wanted(model, tokenizer, max_tokens, context, seed)
    known = None if file is None else _read(file, made_from, rows, length)
    return (rows * length, min(LONGEST, length)) if known is None else None


def _wanted(
    model: Any, tokenizer: Any, max_tokens: int, context: int, seed: int
) -> tuple[int, int, dict[str, Any], Path | None]:
    """Rows and length of the text that is asked for, what it is made from, and where it is kept."""
    check_writes(model, tokenizer)
    length = min(context, max_tokens)
    rows = max(1, max_tokens // length)
    made_from = {
        "algorithm": ALGORITHM,
        "model": model_digest(model),
        "tokenizer": tokenizer_digest(tokenizer),
        "rows": rows,
        "length": length,
        "seed": seed,
        "torch": torch.__version__,
    }
    key = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:32]
    folder = kernel_cache.folder()
    file = None if folder is None else folder / "texts" / f"{key}.safetensors"
    return rows, length, made_from, file


def model_digest(model: Any) -> str:
    """sha256 over the config, and over name, shape, dtype and contents of every parameter and buffer.

    Of the contents, 1024 evenly spaced values and the wrapping sum of all bits as integers: a single changed value
    changes the sum, and reading all of it once takes a second for some billion weights.
    """
    digest = hashlib.sha256()
    config = {k: v for k, v in model.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(_contents(tensor))
    return digest.hexdigest()


def _contents(tensor: Tensor) -> bytes:
    flat = tensor.detach().reshape(-1)
    if flat.dtype.is_complex or flat.numel() == 0:
        return torch.view_as_real(flat).cpu().numpy().tobytes() if flat.numel() else b""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = flat.view(integers[flat.element_size()])
    spaced = bits[:: max(1, bits.numel() // _SAMPLED)][:_SAMPLED]
    total = int(bits.sum(dtype=torch.int64))
    return spaced.cpu().contiguous().numpy().tobytes() + total.to_bytes(8, "little", signed=True)


def tokenizer_digest(tokenizer: Any) -> str:
    """sha256 over vocabulary, special tokens, chat template, and what the tokenizer puts around a text."""
    about = [
        sorted(tokenizer.get_vocab().items()),
        sorted(special_ids(tokenizer)),
        tokenizer.eos_token_id,
        getattr(tokenizer, "chat_template", None),
        list(tokenizer("a").input_ids),
    ]
    return hashlib.sha256(json.dumps(about, default=str).encode()).hexdigest()


def _read(file: Path, made_from: dict[str, Any], rows: int, length: int) -> Tensor | None:
    """The ids (rows, length) int64 in the cache, or None where there are none that can be trusted."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    description = file.with_suffix(".json")
    if not file.exists() and not description.exists():
        return None
    try:
        said = json.loads(description.read_text(encoding="utf-8"))
        ids = load_file(file)["input_ids"]
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        logger.warning(f"The cached text {file} cannot be read ({error}): it is written again")
        return None
    expected = {**made_from, "sha256": _digest(ids)}
    if said != expected or ids.dtype != torch.int64 or ids.shape != (rows, length):
        logger.warning(f"The cached text {file} is not what its description says: it is written again")
        return None
    return ids


def _write(file: Path, made_from: dict[str, Any], ids: Tensor) -> None:
    """Both files, each whole or not at all; where the cache cannot be written to, none."""
    from safetensors.torch import save

    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _replace(file, save({"input_ids": ids.contiguous()}))
        text = json.dumps({**made_from, "sha256": _digest(ids)}, indent=1)
        _replace(file.with_suffix(".json"), text.encode())
    except OSError as error:
        logger.warning(f"The text that the model wrote is not kept: cannot write to {file.parent} ({error})")


def _replace(file: Path, content: bytes) -> None:
    handle, temporary = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    except BaseException:
        os.unlink(temporary)
        raise


def _digest(ids: Tensor) -> str:
    return hashlib.sha256(ids.to(torch.int64).contiguous().numpy().tobytes()).hexdigest()
