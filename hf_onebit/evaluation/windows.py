"""A text as the windows of tokens that are scored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    # At run time this would pull in the whole of Transformers' modelling code, for a name alone.
    from transformers import PreTrainedTokenizerBase


def token_windows(
    text: str | Sequence[str] | Sequence[int] | Tensor,
    tokenizer: PreTrainedTokenizerBase | None,
    context: int,
    max_tokens: int | None = None,
) -> list[Tensor]:
    """Cut a text into windows of tokens that do not overlap.

    Args:
        text: a string; or strings, which are joined with a blank line between them; or token ids, a sequence
            of int or an integer tensor of shape (tokens,) or (1, tokens).
        tokenizer: tokenises the whole text in one call with its defaults, so that it adds at most one
            beginning-of-text token, at the very start. Not used, and may be None, when ``text`` is token ids.
        context: tokens per window, at least 2.
        max_tokens: keep only the first ``max_tokens`` tokens of the text; None keeps all.

    Returns:
        int64 tensors of shape (context,). The last may be shorter; a last window of one token is dropped, for
        nothing in it could be scored.

    Raises:
        ValueError: ``context`` or ``max_tokens`` is below 2, or the text has fewer than two tokens.
    """
    if context < 2:
        raise ValueError(
            f"context is {context}, expected at least 2: a token is scored from the ones before it. Try context=1024."
        )
    if max_tokens is not None and max_tokens < 2:
        raise ValueError(
            f"max_tokens is {max_tokens}, expected at least 2, or None for the whole text: one token alone cannot be "
            "scored."
        )
    ids = _token_ids(text, tokenizer)[:max_tokens]
    if len(ids) < 2:
        raise ValueError(
            f"the text has {len(ids)} token(s), expected at least 2: one token alone cannot be scored. Pass a longer "
            "text."
        )
    return [window for window in ids.split(context) if len(window) > 1]


def _token_ids(text: str | Sequence[str] | Sequence[int] | Tensor, tokenizer: Any) -> Tensor:
    """Token ids of the whole text, int64, (tokens,)."""
    if isinstance(text, Tensor):
        if text.is_floating_point() or text.is_complex() or text.dtype == torch.bool:
            raise ValueError(f"token ids have dtype {text.dtype}, expected an integer dtype such as torch.int64.")
        if text.dim() == 2 and text.shape[0] == 1:
            text = text[0]
        if text.dim() != 1:
            raise ValueError(
                f"token ids have shape {tuple(text.shape)}, expected (tokens,) or (1, tokens). Pass one long text, not "
                "a batch of padded rows."
            )
        return text.long()
    if not isinstance(text, str):
        if all(isinstance(item, int) for item in text):
            return torch.tensor(list(text), dtype=torch.int64)
        if not all(isinstance(item, str) for item in text):
            raise ValueError("text mixes types, expected a string, strings, or token ids (all of type int).")
        text = "\n\n".join(str(item) for item in text)
    if tokenizer is None:
        raise ValueError("tokenizer is None, expected a tokenizer to turn the text into ids. Pass one, or token ids.")
    # verbose=False: a text longer than the model's context is the normal case here, not one to warn of.
    ids = tokenizer(text, return_attention_mask=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)
