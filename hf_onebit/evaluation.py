"""How good, how fast, how large: perplexity, distance from the float model, decode speed, memory.

The protocol is in docs/evaluation.md. In one sentence: the text is tokenised once, cut into windows of
`context` tokens that do not overlap, and each token of a window but its first is scored from the tokens
before it in that window.

The same code runs for float and for packed models: it sees input ids and logits, nothing else. Results are
plain dicts of numbers.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    # At run time these would pull in the whole of Transformers' modelling code, for names alone.
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

OnProgress = Callable[[int, int], object]
"""Called with (tokens scored so far, tokens in all) after each window."""

# Rows of logits are taken to fp32 a few at a time: 2^18 values are 1 MiB, which stays in a core's cache.
_CHUNK_VALUES = 1 << 18


# ------------------------------------------------------------------------------------------------------- text


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
            beginning-of-text token, at the very start. Not used, and may be None, when `text` is token ids.
        context: tokens per window, at least 2.
        max_tokens: keep only the first `max_tokens` tokens of the text; None keeps all.

    Returns:
        int64 tensors of shape (context,). The last may be shorter; a last window of one token is dropped, for
        nothing in it could be scored.

    Raises:
        ValueError: `context` or `max_tokens` is below 2, or the text has fewer than two tokens.
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


# ---------------------------------------------------------------------------------------------------- quality


def perplexity(
    model: PreTrainedModel, windows: Iterable[Tensor], *, progress: OnProgress | None = None
) -> dict[str, float | int]:
    """Score every token of every window but the first, one window at a time.

    Args:
        model: a causal language model, float or packed, on any device.
        windows: what `token_windows` returns, or an integer tensor of shape (windows, context).
        progress: called after each window with the tokens scored so far and in all.

    Returns:
        `perplexity` (exp of `nll`), `nll` (mean negative log-likelihood, nats per token), `tokens` (scored
        tokens), `context` (tokens in the longest window), `windows`.

    Raises:
        ValueError: no window, a window of one token, one longer than the model's positions, or not a causal
            language model.
        RuntimeError: the model's logits are not finite.
    """
    todo = _checked_windows(windows, model)
    nll = 0.0
    with _evaluating(model):
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
    """Score `model` as `perplexity` does, and how far it is from `reference`, in one pass over both.

    Args:
        model: a causal language model, usually the packed one.
        reference: the model it came from, usually in float; it may lie on another device.
        windows: what `token_windows` returns, or an integer tensor of shape (windows, context).
        progress: called after each window with the tokens scored so far and in all.

    Returns:
        What `perplexity` returns for `model`, and, over the same positions: `reference_perplexity`; `kl`, the
        mean divergence KL(reference || model) of the two next-token distributions, in nats per token; `top1`,
        the share of positions, 0 to 1, where the most probable token of both is the same.

    Raises:
        ValueError: as `perplexity`, for either model; or the models' vocabularies differ.
        RuntimeError: the logits of one of the models are not finite.
    """
    todo = _checked_windows(windows, model)
    _checked_windows(todo, reference)
    nll = reference_nll = kl = 0.0
    agreed = 0
    with _evaluating(model), _evaluating(reference):
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
            f"context is {longest} tokens, expected at most {limit}, the max_position_embeddings of "
            f"{type(model).__name__}. Try context={limit}."
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


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout and without gradients; leaves the model's mode as it was."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def _logits(model: PreTrainedModel, window: Tensor) -> Tensor:
    """Logits that predict window[1:], in the model's dtype: (tokens - 1, vocabulary)."""
    ids = window.to(_input_device(model), torch.int64).unsqueeze(0)
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits[0, :-1]


def _input_device(model: PreTrainedModel) -> torch.device:
    """Where the ids go. With parts of a model on several devices, `model.device` may be another one."""
    embedding: Any = model.get_input_embeddings()
    device: torch.device = embedding.weight.device
    return device


def _row_chunks(logits: Tensor) -> Iterator[slice]:
    """Slices over the rows of (rows, vocabulary) logits, small enough to hold in fp32 beside them."""
    rows = max(1, _CHUNK_VALUES // logits.shape[-1])
    for start in range(0, logits.shape[0], rows):
        yield slice(start, start + rows)


def _window_nll(logits: Tensor, target: Tensor, number: int, whose: str = "model") -> float:
    """Summed negative log-likelihood of `target` (rows,) under `logits` (rows, vocabulary); added in fp64."""
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


# --------------------------------------------------------------------------------------------- speed and size


def decode_speed(
    model: PreTrainedModel, input_ids: Tensor, new_tokens: int, *, repeats: int = 3
) -> dict[str, float | int]:
    """Tokens per second of greedy generation at batch 1, after one warm-up: the median over `repeats`.

    The clock of decoding runs from the first new token to the last, so the time of the prompt is not in it;
    the prompt has a rate of its own. The end-of-text token is suppressed, so that every run makes
    `new_tokens` tokens.

    Args:
        model: a causal language model, float or packed, on any device.
        input_ids: the prompt, integers of shape (tokens,) or (1, tokens).
        new_tokens: tokens to generate, at least 2.
        repeats: timed runs, at least 1.

    Returns:
        `tokens_per_second`, `prompt_tokens_per_second`, `new_tokens`, `prompt_tokens`, `repeats`.

    Raises:
        ValueError: a batch of prompts, an empty prompt, `new_tokens` below 2 or `repeats` below 1.
    """
    if new_tokens < 2:
        raise ValueError(
            f"new_tokens is {new_tokens}, expected at least 2: the clock runs between tokens. Try new_tokens=64."
        )
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}, expected at least 1. Try repeats=3.")
    ids = input_ids.unsqueeze(0) if input_ids.dim() == 1 else input_ids
    if ids.dim() != 2 or ids.shape[0] != 1 or ids.shape[1] == 0:
        raise ValueError(
            f"input_ids has shape {tuple(input_ids.shape)}, expected (tokens,) or (1, tokens) with at least one token. "
            "Time one prompt at a time."
        )
    ids = ids.to(_input_device(model))
    with _evaluating(model):
        timed_generation(model, ids, new_tokens)  # warm-up: kernels are chosen, caches and buffers made
        runs = [timed_generation(model, ids, new_tokens) for _ in range(repeats)]
    return {
        "tokens_per_second": (new_tokens - 1) / statistics.median(decode for _, decode in runs),
        "prompt_tokens_per_second": ids.shape[1] / statistics.median(prompt for prompt, _ in runs),
        "new_tokens": new_tokens,
        "prompt_tokens": ids.shape[1],
        "repeats": repeats,
    }


class _TokenClock:
    """A streamer for `generate` that only notes the time: of the prompt first, then of each new token.

    `generate` hands it tokens in host memory, so on an accelerator each time is taken after the work is done.
    """

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _tokens: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing to flush."""


def timed_generation(model: PreTrainedModel, ids: Tensor, new_tokens: int) -> tuple[float, float]:
    """Seconds from the call of `generate` to the first new token, and from there to the last: greedy, one sequence.

    Args:
        model: a causal language model in eval mode.
        ids: the prompt, integers of shape (1, tokens), on the model's device.
        new_tokens: tokens to generate, at least 2; the end-of-text token is suppressed.
    """
    clock = _TokenClock()
    generate: Any = model.generate
    generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        num_beams=1,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        use_cache=True,
        streamer=clock,
    )
    start, first, *rest = clock.times
    return first - start, rest[-1] - first


def peak_memory_mb() -> float | None:
    """The most memory this process ever held at once, in MB (10^6 bytes of resident set); None where it is
    not told.

    Memory of accelerators is not in it, and files mapped into memory are, as far as they were read.
    """
    linux = _peak_memory_mb_linux()
    if linux is not None:
        return linux
    try:
        import resource
    except ImportError:  # Windows
        return _peak_memory_mb_windows()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts in bytes, others in KiB.
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def _peak_memory_mb_linux() -> float | None:
    """Linux's own figure: it starts anew with each program, where getrusage's is handed down by the parent process."""
    peak = _linux_status("VmHWM:")
    return None if peak is None else peak / 1e6


def resident_bytes() -> int | None:
    """Memory that this process holds now, mapped files included as far as they were read; None outside of Linux."""
    return _linux_status("VmRSS:")


def _linux_status(key: str) -> int | None:
    """Bytes of one line of /proc/self/status; None where there is none."""
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            lines = [line for line in status if line.startswith(key)]
    except OSError:
        return None
    return int(lines[0].split()[1]) * 1024 if lines else None


def _peak_memory_mb_windows() -> float | None:
    try:
        import psutil
    except ImportError:
        return None
    peak = getattr(psutil.Process().memory_info(), "peak_wset", None)
    return None if peak is None else peak / 1e6


def tensor_bytes(model: nn.Module) -> int:
    """Bytes that the parameters and buffers of `model` hold, shared storages (tied tensors) counted once."""
    sizes: dict[object, int] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        storage = tensor.untyped_storage()
        # Meta tensors have no address: each one counts.
        key = id(tensor) if tensor.is_meta else (tensor.device, storage.data_ptr())
        sizes[key] = storage.nbytes()
    return sum(sizes.values())
