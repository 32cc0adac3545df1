"""Calibration data: what a user has, as token sequences. What the model writes itself is in self_cache.py."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hf_onebit.config import CALIBRATION_CONTEXT, CALIBRATION_TOKENS
from hf_onebit.counts import counted

Batch = dict[str, Tensor]

# Where rows of datasets keep conversations, and what the second kind calls those who speak.
_CONVERSATION_KEYS = ("messages", "conversations")
# A line of a .jsonl file, for messages.
_LINES = '{"text": "..."}, {"messages": [{"role": "user", "content": "..."}]} or {"input_ids": [...]}'
_SPEAKERS = {"human": "user", "gpt": "assistant"}


@dataclass(frozen=True)
class CalibrationData:
    """Token sequences, and where they came from.

    Attributes:
        batches: model inputs, each at least ``input_ids`` (rows, length) int64; of text, rows is 1.
        source: what the user passed, in a few words.
        tokens: tokens in all of them, padding not counted.
        sha256: digest of the token ids, in order.
        whole: whether this is all that there was to use: every row that is not longer than what was asked for.
    """

    batches: list[Batch]
    source: str
    tokens: int
    sha256: str
    whole: bool = False


def mixed(data: CalibrationData, seed: int) -> CalibrationData:
    """The same sequences in random order.

    Layers are fitted on the first ones and distillation is judged by the last; of a text that is sorted by source, each
    would know one of them only.
    """
    batches = list(data.batches)
    random.Random(seed).shuffle(batches)
    return replace(data, batches=batches)


def load_calibration(
    dataset: Any,
    tokenizer: Any = None,
    *,
    max_tokens: int = CALIBRATION_TOKENS["closed"],
    context: int = CALIBRATION_CONTEXT,
    seed: int = 0,
) -> CalibrationData:
    """Turn what a user has into token sequences.

    Args:
        dataset: path of a local text file; list of strings (joined by blank lines, then cut); list of token dicts
            (``input_ids`` (length,) or (rows, length), optionally ``attention_mask``, as lists or tensors; each is used
            as it is or not at all); list of conversations, each a list of ``{"role", "content"}`` or a dict that holds
            one as ``messages``; path of a ``.jsonl`` file whose lines are strings or such dicts, or hold a ``text``; or
            a ``datasets.Dataset`` with a column ``input_ids``, ``messages`` or ``text``.
        tokenizer: called on text; may be None for token dicts.
        max_tokens: take at the most this many tokens, padding not counted. Where each of the token dicts holds more,
            the shortest is taken; of text, no less than two tokens.
        context: cut text into sequences of this length, or of ``max_tokens`` where that is less, and leave out the rest
            at its end where there is a whole one. A conversation, put through the tokenizer's chat template, is a
            sequence of its own, cut to this length; one of fewer than two tokens is left out.
        seed: which sequences are taken when there are more than enough; the global random state stays untouched.

    Raises:
        ValueError: no such file, no text or tokens in it, a tokenizer or its chat template is needed and missing, or an
            unsupported type.
    """
    rows, source = _rows(dataset)
    context = max(2, min(context, max_tokens))
    if not isinstance(rows, str) and rows and not isinstance(rows[0], Mapping):
        rows = _templated(rows, tokenizer, context, source)
    if isinstance(rows, str):
        sequences = _cut(_tokenize(rows, tokenizer, source), context, source)
        batches = [{"input_ids": s[None]} for s in sequences]
    else:
        batches = [_as_batch(row, index) for index, row in enumerate(rows)]
    if not batches:
        raise ValueError(f"The calibration data ({source}) holds no tokens: pass a longer text")
    chosen, whole = _choose(batches, max_tokens, seed)
    tokens = sum(real_tokens(b) for b in chosen)
    return CalibrationData(chosen, source, tokens, digest_of(chosen), whole)


def digest_of(batches: Sequence[Batch]) -> str:
    """sha256 of the token ids, in order, as int64."""
    digest = hashlib.sha256()
    for batch in batches:
        digest.update(batch["input_ids"].to(torch.int64).contiguous().numpy().tobytes())
    return digest.hexdigest()


def _rows(dataset: Any) -> tuple[str | list[Any], str]:
    """One text, a list of token rows (dicts), or a list of conversations (lists); and where it came from."""
    if isinstance(dataset, (str, os.PathLike)):
        name = os.path.basename(os.fspath(dataset))
        text = read_text(dataset)
        if not name.endswith(".jsonl"):
            return text, name
        numbers, rows = _parse_lines(text, name)
        places = [f"{name}, line {number}" for number in numbers]
        return _rows_of_list(rows, f"the lines of {name}, ", places)[0], name
    columns = getattr(dataset, "column_names", None)
    if columns is not None:
        if "input_ids" in columns:
            keys = [key for key in ("input_ids", "attention_mask") if key in columns]
            return [{key: row[key] for key in keys} for row in dataset], "datasets.Dataset"
        if chats := [key for key in _CONVERSATION_KEYS if key in columns]:
            return _rows_of_list(list(dataset[chats[0]]), f"column {chats[0]!r}, ")[0], "datasets.Dataset"
        if "text" in columns:
            return "\n\n".join(text for text in dataset["text"] if text), "datasets.Dataset"
        raise ValueError(
            f"The calibration dataset has the columns {columns}: expected 'text', 'messages' or 'input_ids' among them"
        )
    return _rows_of_list(dataset)


def _rows_of_list(dataset: Any, where: str = "", places: Sequence[str] | None = None) -> tuple[str | list[Any], str]:
    if isinstance(dataset, (list, tuple)) and dataset:
        if all(isinstance(row, str) for row in dataset):
            return "\n\n".join(dataset), counted(len(dataset), "string")
        if all(isinstance(row, Mapping) and "input_ids" in row for row in dataset):
            return list(dataset), counted(len(dataset), "token sequence")
        if all(isinstance(row, Mapping) and isinstance(row.get("text"), str) for row in dataset):
            return "\n\n".join(row["text"] for row in dataset), counted(len(dataset), "string")
        if (alone := _conversation(dataset)) is not None:
            return [alone], counted(1, "conversation")
        conversations = [_conversation(row) for row in dataset]
        if all(row is not None for row in conversations):
            return conversations, counted(len(dataset), "conversation")
        for index, row in enumerate(dataset):
            if conversations[index] is None and (problem := _problem_of(row)) is not None:
                raise ValueError(f"{f'Calibration row {index}' if places is None else places[index]}{problem}")
        if places is not None:
            raise ValueError(_problem_of_lines(dataset, places))
    raise ValueError(
        f"Cannot calibrate on {where}{type(dataset).__name__} {str(dataset)[:60]!r}: expected the path of a local text "
        "file or .jsonl file, a non-empty list of strings, a list of dicts that hold 'input_ids', a list of "
        "conversations ([{'role': ..., 'content': ...}, ...], or dicts that hold one as 'messages'), or a "
        "datasets.Dataset"
    )


def _conversation(row: Any) -> list[dict[str, Any]] | None:
    """The messages of one row, or None where it is no conversation."""
    if isinstance(row, Mapping):
        return next((_conversation(row[key]) for key in _CONVERSATION_KEYS if key in row), None)
    if not isinstance(row, (list, tuple)) or not row or not all(isinstance(message, Mapping) for message in row):
        return None
    if all("role" in message and "content" in message for message in row):
        return [dict(message) for message in row]
    if all("from" in message and "value" in message for message in row):
        return [
            {"role": _SPEAKERS.get(message["from"], message["from"]), "content": message["value"]} for message in row
        ]
    return None


def _problem_of(row: Any) -> str | None:
    """What keeps a row that was meant as a conversation from being one; None where it was not meant as one."""
    what, messages = "", row
    if isinstance(row, Mapping):
        key = next((key for key in _CONVERSATION_KEYS if key in row), None)
        if key is None:
            return None
        what, messages = f"'{key}' ", row[key]
    elif not isinstance(row, (list, tuple)):
        return None
    if not isinstance(messages, (list, tuple)) or not messages:
        return f" has {what}{str(messages)[:60]!r}: expected a list of messages, each with 'role' and 'content'"
    pair = ("from", "value") if isinstance(messages[0], Mapping) and "from" in messages[0] else ("role", "content")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping):
            return f", message {number} is {str(message)[:60]!r}: expected a dict with {pair[0]!r} and {pair[1]!r}"
        if not all(key in message for key in pair):
            return f", message {number} has keys {[*message]}: expected {pair[0]!r} and {pair[1]!r}"
    return None


def _problem_of_lines(rows: Sequence[Any], places: Sequence[str]) -> str:
    """The first of a file's rows that is of no kind, or of another kind than the first row."""
    kinds = [_kind(row) for row in rows]
    index = next((i for i, kind in enumerate(kinds) if kind is None), None)
    if index is not None:
        row = rows[index]
        got = f"is {str(row)[:60]!r}"
        if isinstance(row, Mapping):
            got = f"has 'text' {str(row['text'])[:60]!r}" if "text" in row else f"has the keys {[*row]}"
        return f"{places[index]} {got}: expected a string, or {_LINES}"
    index = next(i for i, kind in enumerate(kinds) if kind != kinds[0])
    return (
        f"{places[index]} holds {kinds[index]}, and {places[0]} {kinds[0]}: expected rows of one kind. Calibrate on a "
        "file of each, or bring them into one form"
    )


def _kind(row: Any) -> str | None:
    """What a row that can be used holds."""
    if isinstance(row, str):
        return "a string"
    if _conversation(row) is not None:
        return "a conversation"
    if isinstance(row, Mapping) and row.get("input_ids") is not None:
        return "'input_ids'"
    return "'text'" if isinstance(row, Mapping) and isinstance(row.get("text"), str) else None


def _parse_lines(text: str, name: str) -> tuple[list[int], list[Any]]:
    """Numbers of a file's lines and their JSON values; empty lines are passed over."""
    numbers, rows = [], []
    for number, line in enumerate(text.split("\n"), 1):  # splitlines() also ends lines at U+2028, within strings
        if line.strip():
            try:
                rows.append(json.loads(line))
                numbers.append(number)
            except ValueError as error:
                raise ValueError(
                    f"Line {number} of {name} is no JSON ({error}): expected one value a line, such as {_LINES}"
                ) from error
    return numbers, rows


def _templated(conversations: list[Any], tokenizer: Any, context: int, source: str) -> list[dict[str, Any]]:
    """Token rows of conversations."""
    tokenizer = _loaded(tokenizer, source)
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"The calibration rows ({source}) are conversations, and the tokenizer has no chat template: pass a chat "
            "model's tokenizer, set tokenizer.chat_template, or pass the text of the conversations as strings"
        )
    rows = []
    for index, messages in enumerate(conversations):
        try:
            ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
        except Exception as error:  # the template is a program of its own: it may raise anything
            raise ValueError(
                f"The chat template does not take calibration row {index} ({str(messages)[:60]!r}): {error}. Leave the "
                "row out, or change its roles"
            ) from error
        if len(ids) > 1:
            rows.append({"input_ids": ids[:context]})
    return rows


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a local UTF-8 file.

    Raises:
        ValueError: there is no such file, or it is not UTF-8.
    """
    path = os.fspath(path)
    if os.path.isdir(path):
        raise ValueError(f"{path!r} is a folder: pass the path of a text file in it")
    if not os.path.isfile(path):
        raise ValueError(f"There is no file {path!r}: pass the path of a local text file")
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path!r} is not UTF-8 text ({error}): convert it, or pass another file") from error


def _loaded(tokenizer: Any, source: str) -> Any:
    """A tokenizer, which may have been given by name."""
    if tokenizer is None:
        raise ValueError(
            f"Calibrating on text ({source}) needs a tokenizer: pass tokenizer=..., or rows of input_ids, or "
            "copy the tokenizer's files into the model's folder"
        )
    if isinstance(tokenizer, (str, os.PathLike)):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    if not callable(tokenizer):
        raise ValueError(f"Cannot tokenize with a {type(tokenizer).__name__}: expected a tokenizer, or the name of one")
    return tokenizer


def _tokenize(text: str, tokenizer: Any, source: str) -> Tensor:
    tokenizer = _loaded(tokenizer, source)
    # A long text is one sequence to the tokenizer, which would warn that no model takes so many tokens.
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    return torch.as_tensor(ids, dtype=torch.int64)


def _cut(ids: Tensor, context: int, source: str) -> list[Tensor]:
    if ids.numel() < 2:
        raise ValueError(f"The calibration text ({source}) holds {counted(ids.numel(), 'token')}: pass a longer one")
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
            f"Calibration row {index} has input_ids of shape {tuple(ids.shape)}: expected (length,) or (rows, length)"
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


def _choose(batches: list[Batch], max_tokens: int, seed: int) -> tuple[list[Batch], bool]:
    """Those taken, in their own order, and whether these are all that are short enough."""
    order = list(range(len(batches)))
    random.Random(seed).shuffle(order)
    tokens = [real_tokens(batch) for batch in batches]
    usable = [index for index in order if tokens[index] <= max_tokens]
    if not usable:
        return [batches[min(order, key=tokens.__getitem__)]], len(batches) == 1
    chosen: list[int] = []
    left = max_tokens
    for index in usable:
        if tokens[index] <= left:
            chosen.append(index)
            left -= tokens[index]
    return [batches[index] for index in sorted(chosen)], len(chosen) == len(usable)


def real_tokens(batch: Batch) -> int:
    """Tokens of a batch, padding not counted."""
    mask = batch.get("attention_mask")
    return int(mask.sum()) if mask is not None else batch["input_ids"].numel()
