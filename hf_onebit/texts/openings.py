"""How the texts that a model writes itself begin: empty dialogues, starts of documents, random words and tokens."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hf_onebit.progress import logger

_GREEDY = 3  # tokens that follow a random word: an odd start becomes the likeliest phrase that begins with it


@dataclass(frozen=True)
class Opening:
    """How a text begins.

    Attributes:
        tokens: what it starts with.
        greedy: how many tokens after these are the likeliest ones, not sampled.
        reply: what follows when the first turn of a dialogue ends; empty for plain texts.
    """

    tokens: tuple[int, ...]
    greedy: int = 0
    reply: tuple[int, ...] = ()


class Openings:
    """Varied beginnings for a tokenizer's model, without end.

    A third are empty dialogues where the tokenizer has a chat template. Of the others three tenths are the start of a
    document and no more, where there is a token for it; half go on with a random word, and the rest with any ordinary
    token.

    Args:
        tokenizer: of the model.
        seed: of the choice.
        chat: whether dialogues are wanted.
    """

    def __init__(self, tokenizer: Any, seed: int, chat: bool = True) -> None:
        self.special = special_ids(tokenizer)
        self._tokenizer = tokenizer
        self._random = random.Random(seed)
        self._ordinary = [token for token in range(len(tokenizer)) if token not in self.special]
        if not self._ordinary:
            raise ValueError("The tokenizer has special tokens only: pass the tokenizer that belongs to this model")
        self._order: Iterator[int] = iter(())
        self._dialogue = _dialogue(tokenizer) if chat else None
        self.document = _document_start(tokenizer, self.special, () if self._dialogue is None else self._dialogue[0])

    def next(self) -> Opening:
        """The next one."""
        if self._dialogue is not None and self._random.random() < 1 / 3:
            return Opening(self._dialogue[0], reply=self._dialogue[1])
        kind = self._random.random()
        if kind < 0.3 and self.document:
            return Opening(self.document)
        return Opening((*self.document, self._token(word=kind < 0.8)), greedy=_GREEDY)

    def _token(self, word: bool) -> int:
        """One that did not come yet, until all have come."""
        token = self._another()
        for _ in range(64):  # some vocabularies have no words
            if not word or self._begins_word(token):
                break
            token = self._another()
        return token

    def _another(self) -> int:
        token = next(self._order, None)
        if token is None:
            self._order = iter(self._random.sample(self._ordinary, len(self._ordinary)))
            token = next(self._order)
        return token

    def _begins_word(self, token: int) -> bool:
        piece = str(self._tokenizer.convert_ids_to_tokens(token))
        text = self._tokenizer.decode([token]).strip()
        marked = piece[:1] in ("Ġ", "▁")  # how tokenizers write a space in front
        return len(text) > 1 and text.isalpha() and (marked or not text[0].islower())


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Ids that mark something and stand for no text."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return frozenset(tokenizer.all_special_ids) | {id for id, token in added.items() if token.special}


def _document_start(tokenizer: Any, special: frozenset[int], dialogue: tuple[int, ...]) -> tuple[int, ...]:
    """What a document begins with: what the tokenizer puts before any text, or the token known for it, or nothing."""
    ids = list(tokenizer("a").input_ids)
    before = 0
    while before < len(ids) and ids[before] in special:
        before += 1
    if before:
        return tuple(ids[:before])
    # Where the tokenizer adds none, "beginning of sequence" may be the mark of a turn.
    first = tokenizer.bos_token_id
    if first is not None and first not in dialogue:
        return (first,)
    separator = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    return (separator,) if separator in special else ()


def _dialogue(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """The chat template before a user's first message, and from its end to the assistant's first word."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    message = "hf_onebit:message"
    try:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": message}], tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # a template is a program of its own, and this only asks for variety
        logger.warning_once(f"The chat template does not take one message from a user ({error}): no dialogues")
        return None
    before, found, after = str(text).partition(message)
    parts = [tuple(tokenizer(part, add_special_tokens=False).input_ids) for part in (before, after)]
    return (parts[0], parts[1]) if found and all(parts) else None
