"""Calibration data: what a user has, as token sequences; or a text that the model writes itself."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class CalibrationData:
    """Token sequences, and where they came from.

    Attributes:
        batches: model inputs, each at least ``input_ids`` (1, length) int64.
        source: what the user passed, in a few words.
        tokens: tokens in all of them, padding not counted.
        sha256: digest of the token ids, in order.
    """

    batches: list[Batch]
    source: str
    tokens: int
    sha256: str


def load_calibration(
    dataset: Any, tokenizer: Any = None, *, max_tokens: int = 16384, context: int = 1024, seed: int = 0
) -> CalibrationData:
    """Turn what a user has into token sequences.

    Args:
        dataset: path of a local text file; list of strings (joined by blank lines, then cut); list of token dicts
            (``input_ids``, optionally ``attention_mask``, as lists or tensors; used as they are); or a
            ``datasets.Dataset`` with a column ``input_ids`` or ``text``.
        tokenizer: called on text; may be None for token dicts.
        max_tokens: take no more than about this many tokens.
        context: cut text into sequences of this length.
        seed: which sequences are taken when there are more than enough; the global random state stays untouched.

    Raises:
        ValueError: no such file, no text or tokens in it, a tokenizer is needed and missing, or an unsupported type.
    """
    rows, source = _rows(dataset)
    if isinstance(rows, str):
        sequences = _cut(_tokenize(rows, tokenizer, source), context, source)
        batches = [{"input_ids": s[None]} for s in sequences]
    else:
        batches = [_as_batch(row, index) for index, row in enumerate(rows)]
    if not batches:
        raise ValueError(f"The calibration data ({source}) holds no tokens: pass a longer text")
    batches = _choose(batches, max_tokens, seed)
    digest = hashlib.sha256()
    for batch in batches:
        digest.update(batch["input_ids"].to(torch.int64).contiguous().numpy().tobytes())
    return CalibrationData(batches, source, sum(_real_tokens(b) for b in batches), digest.hexdigest())


def _rows(dataset: Any) -> tuple[str | list[Any], str]:
    """Either one text, or a list of token rows; and a few words about where it came from."""
    if isinstance(dataset, (str, os.PathLike)):
        return read_text(dataset), os.path.basename(os.fspath(dataset))
    columns = getattr(dataset, "column_names", None)
    if columns is not None:
        if "input_ids" in columns:
            keys = [key for key in ("input_ids", "attention_mask") if key in columns]
            return [{key: row[key] for key in keys} for row in dataset], "datasets.Dataset"
        if "text" in columns:
            return "\n\n".join(text for text in dataset["text"] if text), "datasets.Dataset"
        raise ValueError(
            f"The calibration dataset has the columns {columns}: expected 'text' or 'input_ids' among them"
        )
    if isinstance(dataset, (list, tuple)) and dataset:
        if all(isinstance(row, str) for row in dataset):
            return "\n\n".join(dataset), f"{len(dataset)} strings"
        if all(isinstance(row, Mapping) and "input_ids" in row for row in dataset):
            return list(dataset), f"{len(dataset)} token sequences"
    raise ValueError(
        f"Cannot calibrate on {type(dataset).__name__} {str(dataset)[:60]!r}: expected the path of a local text file, "
        "a non-empty list of strings, a list of dicts that hold 'input_ids', or a datasets.Dataset"
    )


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a local UTF-8 file.

    Raises:
        ValueError: there is no such file, or it is not UTF-8.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise ValueError(f"There is no file {path!r}: pass the path of a local text file")
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path!r} is not UTF-8 text ({error}): convert it, or pass another file") from error


def _tokenize(text: str, tokenizer: Any, source: str) -> Tensor:
    if tokenizer is None:
        raise ValueError(f"Calibrating on text ({source}) needs a tokenizer: pass tokenizer=..., or rows of input_ids")
    if isinstance(tokenizer, (str, os.PathLike)):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    if not callable(tokenizer):
        raise ValueError(f"Cannot tokenize with a {type(tokenizer).__name__}: expected a tokenizer, or the name of one")
    # A long text is one sequence to the tokenizer, which would warn that no model takes so many tokens.
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    return torch.as_tensor(ids, dtype=torch.int64)


def _cut(ids: Tensor, context: int, source: str) -> list[Tensor]:
    if ids.numel() < 2:
        raise ValueError(f"The calibration text ({source}) holds {ids.numel()} tokens: pass a longer one")
    whole = [ids[i : i + context] for i in range(0, ids.numel() - context + 1, context)]
    return whole or [ids]


def _as_batch(row: Any, index: int) -> Batch:
    batch = {}
    for key in ("input_ids", "attention_mask"):
        if key == "input_ids" or row.get(key) is not None:
            value = _whole_numbers(row[key], key, index)
            batch[key] = value[None] if value.dim() == 1 else value
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    if ids.dim() != 2 or ids.numel() == 0:
        raise ValueError(
            f"Calibration row {index} has input_ids of shape {tuple(ids.shape)}: expected (length,) or (1, length)"
        )
    if mask is not None and (mask.shape != ids.shape or not bool(mask.any())):
        raise ValueError(
            f"Calibration row {index} has an attention_mask of shape {tuple(mask.shape)} with {int(mask.sum())} ones: "
            f"expected the shape of its input_ids, {tuple(ids.shape)}, and a 1 for every token that is no padding"
        )
    return batch


def _whole_numbers(value: Any, key: str, index: int) -> Tensor:
    try:
        tensor = torch.as_tensor(value)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"Calibration row {index} has {key} {str(value)[:60]!r}: expected one list or tensor of whole numbers"
        ) from error
    if tensor.is_floating_point() and tensor.numel():
        raise ValueError(f"Calibration row {index} has {key} of {tensor.dtype}: expected whole numbers")
    return tensor.to(torch.int64)


def _choose(batches: list[Batch], max_tokens: int, seed: int) -> list[Batch]:
    order = list(range(len(batches)))
    random.Random(seed).shuffle(order)
    chosen: list[int] = []
    total = 0
    for index in order:
        tokens = _real_tokens(batches[index])
        if chosen and total + tokens > max_tokens:
            break
        chosen.append(index)
        total += tokens
    return [batches[index] for index in sorted(chosen)]


def _real_tokens(batch: Batch) -> int:
    mask = batch.get("attention_mask")
    return int(mask.sum()) if mask is not None else batch["input_ids"].numel()


@torch.no_grad()
def written_by_model(model: Any, tokenizer: Any, tokens: int, seed: int = 0, batch_size: int = 16) -> str:
    """Text that a language model writes itself, sampled at temperature 1 from varied starts.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        tokens: about how many tokens to write.
        seed: of the sampling; the global random state is restored.
        batch_size: texts written side by side.

    Returns:
        The texts, joined by blank lines.
    """
    special = set(tokenizer.all_special_ids)
    ordinary = [token for token in range(len(tokenizer)) if token not in special]
    starts = random.Random(seed).sample(ordinary, min(batch_size, len(ordinary)))
    with torch.random.fork_rng():  # of every device, whichever samples
        torch.manual_seed(seed)
        written = model.generate(
            torch.tensor(starts, device=model.device)[:, None],
            attention_mask=torch.ones(len(starts), 1, dtype=torch.int64, device=model.device),
            max_new_tokens=max(2, tokens // len(starts)),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else starts[0],
        )
    return "\n\n".join(tokenizer.batch_decode(written, skip_special_tokens=True))
