"""How good: perplexity, and the distance from the float model.

The protocol is in docs/evaluation.md. In one sentence: the text is tokenised once, cut into windows of
``context`` tokens that do not overlap, and each token of a window but its first is scored from the tokens
before it in that window.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hf_onebit.arithmetic import without_slow_products
from hf_onebit.evaluation.running import input_device
from hf_onebit.modes import evaluating

if TYPE_CHECKING:
    # At run time this would pull in the whole of Transformers' modelling code, for a name alone.
    from transformers import PreTrainedModel

OnProgress = Callable[[int, int], object]
"""Called with (tokens scored so far, tokens in all) after each window."""

# Rows of logits are taken to fp32 a few at a time: 2^18 values are 1 MiB, which stays in a core's cache.
_CHUNK_VALUES = 1 << 18


def perplexity(
    model: PreTrainedModel, windows: Iterable[Tensor], *, progress: OnProgress | None = None
) -> dict[str, float | int]:
    """Score every token of every window but the first, one window at a time.

    Args:
        model: a causal language model, float or packed, on any device.
        windows: what ``token_windows`` returns, or an integer tensor of shape (windows, context).
        progress: called after each window with the tokens scored so far and in all.

    Returns:
        ``perplexity`` (exp of ``nll``), ``nll`` (mean negative log-likelihood, nats per token), ``tokens`` (scored
        tokens), ``context`` (tokens in the longest window), ``windows``.

    Raises:
        ValueError: no window, a window of one token, one longer than the model's positions, or not a causal
            language model.
        RuntimeError: the model's logits are not finite.
    """
    todo = _checked_windows(windows, model)
    nll = 0.0
    with evaluating(model), torch.no_grad():
        for done, window in _with_progress(todo, progress):
            nll += _window_nll(_logits(model, window), window[1:], done)
    return _perplexity_dict(nll, todo)


def compare(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    windows: Iterable[Tensor],
    *,
    progress: OnProgress | None = None,
) -> dict[str, float | int]:
    """Score ``model`` as ``perplexity`` does, and how far it is from ``reference``, in one pass over both.

    Args:
        model: a causal language model, usually the packed one.
        reference: the model it came from, usually in float; it may lie on another device.
        windows: what ``token_windows`` returns, or an integer tensor of shape (windows, context).
        progress: called after each window with the tokens scored so far and in all.

    Returns:
        What ``perplexity`` returns for ``model``, and, over the same positions: ``reference_perplexity``; ``kl``, the
        mean divergence KL(reference || model) of the two next-token distributions, in nats per token; ``top1``,
        the share of positions, 0 to 1, where the most probable token of both is the same.

    Raises:
        ValueError: as ``perplexity``, for either model; or the models' vocabularies differ.
        RuntimeError: the logits of one of the models are not finite.
    """
    todo = _checked_windows(windows, model)
    _checked_windows(todo, reference)
    nll = reference_nll = kl = 0.0
    agreed = 0
    with evaluating(model), evaluating(reference), torch.no_grad():
        for done, window in _with_progress(todo, progress):
            logits, target = _logits(model, window), window[1:]
            wanted = _logits(reference, window).to(logits.device)
            _check_same_vocabulary(logits, wanted)
            nll += _window_nll(logits, target, done)
            reference_nll += _window_nll(wanted, target, done, "reference model")
            window_kl, window_agreed = _divergence(wanted, logits)
            kl += window_kl
            agreed += window_agreed
    result = _perplexity_dict(nll, todo)
    scored = result["tokens"]
    result["reference_perplexity"] = _exp(reference_nll / scored)
    result["kl"] = kl / scored
    result["top1"] = agreed / scored
    return result


def _checked_windows(windows: Iterable[Tensor], model: PreTrainedModel) -> list[Tensor]:
    """The windows as a list, once it is clear that the model can take them."""
    todo = list(windows)
    if not todo:
        raise ValueError("there is no window to score, expected at least one. Make windows with token_windows().")
    shortest, longest = min(len(w) for w in todo), max(len(w) for w in todo)
    if shortest < 2:
        raise ValueError(f"a window has {shortest} token(s), expected at least 2. Make windows with token_windows().")
    config = model.config.get_text_config()
    if model.config.is_encoder_decoder or not model.can_generate():
        raise ValueError(
            f"{type(model).__name__} is not a causal language model: it does not predict each token from the ones "
            "before it alone. Load the model with AutoModelForCausalLM, or evaluate it on its own task."
        )
    # Models without learned or rotary positions (Mamba) have no such limit.
    limit = getattr(config, "max_position_embeddings", None)
    if isinstance(limit, int) and longest > limit:
        raise ValueError(
            f"a window has {longest} tokens, expected at most {limit}, the max_position_embeddings of "
            f"{type(model).__name__}. Make windows with context={limit}, in the shell --context {limit}."
        )
    return todo


def _with_progress(windows: list[Tensor], progress: OnProgress | None) -> Iterator[tuple[int, Tensor]]:
    """Each window with its number; reports after the caller is done with it."""
    total, scored = sum(len(w) - 1 for w in windows), 0
    for number, window in enumerate(windows):
        yield number, window
        scored += len(window) - 1
        if progress is not None:
            progress(scored, total)


def _logits(model: PreTrainedModel, window: Tensor) -> Tensor:
    """Logits that predict window[1:], in the model's dtype: (tokens - 1, vocabulary)."""
    ids = window.to(input_device(model), torch.int64).unsqueeze(0)
    with without_slow_products(ids.device):
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits[0, :-1]


def _row_chunks(logits: Tensor) -> Iterator[slice]:
    """Slices over the rows of (rows, vocabulary) logits, small enough to hold in fp32 beside them."""
    rows = max(1, _CHUNK_VALUES // logits.shape[-1])
    for start in range(0, logits.shape[0], rows):
        yield slice(start, start + rows)


def _window_nll(logits: Tensor, target: Tensor, number: int, whose: str = "model") -> float:
    """Summed negative log-likelihood of ``target`` (rows,) under ``logits`` (rows, vocabulary); added in fp64."""
    target = target.to(logits.device, torch.int64)
    total = 0.0
    for rows in _row_chunks(logits):
        nll = nn.functional.cross_entropy(logits[rows].float(), target[rows], reduction="none")
        total += nll.double().sum().item()
    if not math.isfinite(total):
        raise RuntimeError(
            f"the {whose}'s log-likelihood of window {number} is {total}, expected a finite number: its weights or "
            "activations overflow. Load it with dtype=torch.float32, and check the file with `hf-onebit verify`."
        )
    return total


def _divergence(reference: Tensor, logits: Tensor) -> tuple[float, int]:
    """Sum over rows of KL(reference || logits), nats; in how many rows the most probable token agrees."""
    kl, agreed = 0.0, 0
    for rows in _row_chunks(logits):
        p = reference[rows].float().log_softmax(-1)
        q = logits[rows].float().log_softmax(-1)
        # A token that the reference rules out (-inf) adds nothing, though -inf - -inf is not a number.
        terms = torch.where(p == -math.inf, 0.0, p.exp() * (p - q))
        kl += terms.sum(-1).double().sum().item()
        agreed += int((p.argmax(-1) == q.argmax(-1)).sum())
    return kl, agreed


def _check_same_vocabulary(logits: Tensor, reference: Tensor) -> None:
    if logits.shape[-1] != reference.shape[-1]:
        raise ValueError(
            f"the model has {logits.shape[-1]} logits and the reference {reference.shape[-1]}, expected the same "
            "vocabulary. Compare a quantized model with the model it was made from."
        )


def _perplexity_dict(nll: float, windows: list[Tensor]) -> dict[str, float | int]:
    tokens = sum(len(window) - 1 for window in windows)
    return {
        "perplexity": _exp(nll / tokens),
        "nll": nll / tokens,
        "tokens": tokens,
        "context": max(len(window) for window in windows),
        "windows": len(windows),
    }


def _exp(nll: float) -> float:
    """exp that answers infinity where a float ends: a ruined model is a result, not a crash."""
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf
