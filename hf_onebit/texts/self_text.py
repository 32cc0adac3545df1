"""Text that a causal language model writes itself: calibration data where there is none, in what the model knows best.

Many texts are written side by side, each token sampled at temperature 1 from the whole vocabulary. They begin in varied
ways (``Openings``), end where the model ends them, and a new one takes the place of each that ended. Writing one's own
data is that of Liu et al. 2023 (LLM-QAT, arXiv:2305.17888), who also take the first few tokens after a random one
greedily; letting a chat model fill in both sides of its empty template is that of Xu et al. 2024 (Magpie,
arXiv:2406.08464).
"""

from __future__ import annotations

import inspect
import math
import random
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_onebit.arithmetic import without_slow_products
from hf_onebit.modes import evaluating
from hf_onebit.progress import Progress, logger
from hf_onebit.texts.model_states import reserve, state_bytes, state_name
from hf_onebit.texts.openings import Opening, Openings

# Raise it with every change that makes other texts from the same seed: what is in caches is then written again.
ALGORITHM = 1

LONGEST = 512  # tokens of one text: the attention of long ones takes more time than all else
SIDE_BY_SIDE = 128
_CACHE_BYTES = 1.6e9  # of keys and values; fewer texts side by side where they would take more
_SHORTEST = 16  # texts with fewer sampled tokens are dropped: mostly a model's refusal to go on from an odd start
_TURN = 128  # tokens after which the user's turn of a dialogue ends, where the model does not end it
_WINDOW = 64  # a text is dropped for this many tokens in a row ...
_NGRAM = 4
_FEWEST = 8
_LEAST_DISTINCT = 0.5  # ... whose n-grams are to a smaller share than this different ones
_BLOCK = 256  # see ``draw``
_MOST_WORK = 4.0  # times the tokens wanted; beyond it the model is taken to be unable to write


def repeats(tokens: list[int]) -> bool:
    """Whether somewhere in a text, over 64 tokens or the whole of a short one, most 4-grams occur more than once."""
    for end in range(len(tokens), _NGRAM, -_WINDOW // 2):
        window = tokens[max(0, end - _WINDOW) : end]
        grams = [tuple(window[i : i + _NGRAM]) for i in range(len(window) - _NGRAM + 1)]
        if len(grams) >= _FEWEST and len(set(grams)) < _LEAST_DISTINCT * len(grams):
            return True
    return False


def check_writes(model: Any, tokenizer: Any) -> None:
    """Refuse models that cannot write.

    Raises:
        ValueError: no causal language model, or no tokenizer.
    """
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False) or not model.can_generate() or state_name(model) is None:
        raise ValueError(
            f"{name} cannot write its own calibration text: that takes a causal language model. Pass a text: "
            "dataset=FILE (--calibration FILE)"
        )
    if tokenizer is None:
        raise ValueError(
            f"{name} cannot write its own calibration text without a tokenizer: pass tokenizer=..., or rows of "
            "input_ids as dataset=, or copy the tokenizer's files into the model's folder"
        )
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens, and {name} knows the ids 0 to {rows - 1}: pass the tokenizer "
            "that belongs to this model"
        )


@dataclass
class _Text:
    """A text being written."""

    opening: Opening
    tokens: list[int] = field(default_factory=list)
    forced: list[int] = field(default_factory=list)  # what comes next whatever the model would write, last first
    greedy: int = 0
    sampled: int = 0
    turn_over: bool = True

    @classmethod
    def begin(cls, opening: Opening) -> _Text:
        return cls(opening, forced=list(reversed(opening.tokens)), greedy=opening.greedy, turn_over=not opening.reply)

    def reply(self) -> None:
        """End the first turn of a dialogue."""
        self.forced = list(reversed(self.opening.reply))
        self.turn_over = True


@torch.no_grad()
def write_texts(
    model: Any,
    tokenizer: Any,
    tokens: int,
    *,
    longest: int = LONGEST,
    seed: int = 0,
    side_by_side: int = SIDE_BY_SIDE,
    chat: bool = True,
) -> list[list[int]]:
    """Let a causal language model write texts at temperature 1.

    The same seed gives the same texts on the same machine, with the same number of threads: sums in another order round
    otherwise. No global random state is read or changed, and the model is used in its own dtype.

    Args:
        model: a causal language model, whole in memory.
        tokenizer: its tokenizer.
        tokens: how many to write at least.
        longest: tokens of one text at the most; no more than the model has positions.
        seed: of the openings and of the sampling.
        side_by_side: texts written at a time, at the most.
        chat: whether some are dialogues, where the tokenizer has a chat template.

    Returns:
        Token ids of each text, in random order. Each starts with its opening, and ends with the model's end token where
        it wrote one.

    Raises:
        ValueError: the model cannot write (``check_writes``), gives NaN, or writes next to nothing but repetitions.
    """
    check_writes(model, tokenizer)
    openings = Openings(tokenizer, seed, chat)
    longest = longest_text(model, longest)
    writer = Writer(model, tokenizer, openings, longest, seed)
    width = most_rows(model, longest, side_by_side)
    work = 0  # tokens, those dropped counted in
    texts: list[list[int]] = []
    with evaluating(model):
        while (missing := tokens - sum(map(len, texts))) > 0:
            if work > _MOST_WORK * tokens + width * longest:
                raise ValueError(
                    f"{type(model).__name__} wrote {tokens - missing} usable tokens of {tokens}; the rest are texts "
                    "that repeat themselves or end at once. Pass a text: dataset=FILE (--calibration FILE)"
                )
            rows = rows_of_wave(missing, width, longest)
            texts += writer.wave(rows, longest)
            work += rows * longest
    random.Random(seed).shuffle(texts)
    if writer.dropped:
        logger.info(f"Dropped {writer.dropped} texts that repeated themselves, {writer.short} that ended at once")
    return texts


def longest_text(model: Any, longest: int = LONGEST) -> int:
    """Tokens of one text at the most: no more than the model has positions."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return min(longest, positions) if isinstance(positions, int) else longest


def most_rows(model: Any, longest: int, side_by_side: int = SIDE_BY_SIDE) -> int:
    """Texts side by side at the most, by what their keys and values take."""
    return min(side_by_side, max(8, int(_CACHE_BYTES / (longest * state_bytes(model)))))


def rows_of_wave(missing: int, width: int, longest: int) -> int:
    """Texts of the next wave where so many tokens are missing: all waves alike, and a little more than is missing."""
    rounds = math.ceil(missing * 1.05 / (width * longest))
    return max(min(8, width), min(width, math.ceil(missing * 1.05 / (rounds * longest))))


def draw(probabilities: Tensor, u: Tensor) -> Tensor:
    """Tokens by their probabilities: the first whose cumulated probability exceeds u.

    The vocabulary is cumulated in two levels, since a cumulated sum is slow on a CPU and a sum is not.

    Args:
        probabilities: (rows, vocabulary) float32, at least 0, some of each row above 0; their sum does not matter.
        u: (rows,) float32 in [0, 1).

    Returns:
        (rows,) int64; a token of probability 0 is never drawn.
    """
    rows, vocabulary = probabilities.shape
    if missing := -vocabulary % _BLOCK:
        probabilities = nn.functional.pad(probabilities, (0, missing))
    blocks = probabilities.view(rows, -1, _BLOCK)
    sums = blocks.sum(-1).double()
    cumulated = sums.cumsum(-1)
    target = u[:, None].to(sums.device).double() * cumulated[:, -1:]  # below the total: u has 24 bits, this has 53
    block = torch.searchsorted(cumulated, target, right=True)
    inside = sums.gather(1, block)
    share = ((target - cumulated.gather(1, block)) / inside + 1).clamp(0, 1 - 2**-24)
    chosen = blocks[torch.arange(rows, device=block.device), block[:, 0]].double().cumsum(-1)
    return block[:, 0] * _BLOCK + torch.searchsorted(chosen, share * chosen[:, -1:], right=True)[:, 0]


class Writer:
    """Writes texts, wave by wave.

    Args:
        model: a causal language model, whole in memory.
        tokenizer: its tokenizer.
        openings: how texts begin.
        longest: tokens of one text at the most.
        seed: of the sampling.
    """

    def __init__(self, model: Any, tokenizer: Any, openings: Openings, longest: int, seed: int) -> None:
        self.model, self.openings = model, openings
        self._longest, self._shortest = longest, min(_SHORTEST, longest // 2)
        self.dropped = self.short = 0
        self._generator = torch.Generator().manual_seed(seed)
        self._vocabulary = len(tokenizer)
        ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        self._ends = frozenset([ends] if isinstance(ends, int) else ends or []) | {tokenizer.eos_token_id}
        self._stops = openings.special | self._ends
        self._parameters = inspect.signature(model.forward).parameters
        # A recurrent state cannot be masked: there a new text follows on the one before.
        self._masked = not getattr(model, "_is_stateful", False)

    def wave(self, rows: int, steps: int) -> list[list[int]]:
        """``rows`` texts at a time, for ``steps`` tokens; those that ended make room for others."""
        texts = [_Text.begin(self.openings.next()) for _ in range(rows)]
        done: list[list[int]] = []
        device = self.model.device
        mask = torch.zeros(rows, steps, dtype=torch.int64, device=device)
        positions = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        current = torch.zeros(rows, 1, dtype=torch.int64)
        state: Any = None
        logits: Tensor | None = None
        with Progress(steps, f"Writing {rows} texts", "token") as progress:
            for step in range(steps):
                tokens = self._sample(logits, texts)
                for row, token in enumerate(tokens):
                    text = texts[row]
                    if self._is_over(text, token, step):
                        self._keep(text, done)
                        texts[row] = _Text.begin(self.openings.next())
                        mask[row], positions[row] = 0, 0
                    current[row] = self._append(texts[row], token)
                mask[:, step] = 1
                logits, state = self.forward(current.to(device), mask[:, : step + 1], positions, state)
                positions += 1
                progress.step("")
        for text in texts:
            self._keep(text, done)
        return done

    def forward(self, ids: Tensor, mask: Tensor, positions: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Logits (rows, vocabulary) after one more token of each text, and the state then."""
        name = state_name(self.model)
        assert name is not None
        inputs: dict[str, Any] = {name: state} if state is not None else {}
        if self._masked:
            inputs["attention_mask"] = mask
            if "position_ids" in self._parameters:
                inputs["position_ids"] = positions.clone()
        with without_slow_products(ids.device):
            output = self.model(input_ids=ids, use_cache=True, **inputs)
        kept = getattr(output, name)
        if state is None:
            reserve(kept, self._longest)
        return output.logits[:, -1, : self._vocabulary], kept

    def _sample(self, logits: Tensor | None, texts: list[_Text]) -> list[int]:
        """For each text the model's next token: drawn by its probability, or the likeliest one."""
        if logits is None:
            return [0] * len(texts)  # each text starts with its opening
        probabilities = logits.float().softmax(-1)
        if not bool(torch.isfinite(probabilities[:, 0]).all()):  # a row with one NaN or inf is all NaN
            raise ValueError(f"{type(self.model).__name__} gives NaN or inf as logits: the float checkpoint is damaged")
        tokens: list[int] = draw(probabilities, torch.rand(len(texts), generator=self._generator)).tolist()
        for row, text in enumerate(texts):
            if text.greedy and not text.forced:
                likeliest = int(logits[row].argmax())
                tokens[row] = tokens[row] if likeliest in self._stops else likeliest
        return tokens

    def _is_over(self, text: _Text, token: int, step: int) -> bool:
        """Whether a text ends with the token that its model wrote; where it is the end token, it is added."""
        if text.forced:
            return False
        if token in self._stops and text.turn_over:
            if token in self._ends:
                text.tokens.append(token)
            return True
        looked_at = step % (_WINDOW // 2) == 0 and text.sampled >= _WINDOW
        return looked_at and repeats(text.tokens[-_WINDOW:])

    def _append(self, text: _Text, token: int) -> int:
        """The text's next token: what its opening wants, else the model's."""
        if not text.forced and not text.turn_over and (token in self._stops or text.sampled >= _TURN):
            text.reply()
        if text.forced:
            token = text.forced.pop()
        else:
            text.greedy = max(0, text.greedy - 1)
            text.sampled += 1
        text.tokens.append(token)
        return token

    def _keep(self, text: _Text, done: list[list[int]]) -> None:
        if text.sampled < self._shortest:
            self.short += 1
        elif repeats(text.tokens):
            self.dropped += 1
        else:
            done.append(text.tokens)


def written_by_model(model: Any, tokenizer: Any, tokens: int, seed: int = 0, batch_size: int = 16) -> str:
    """Plain text that a language model writes itself, to look at or to score.

    For calibration use ``dataset="self"``, which keeps the token ids as they are.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        tokens: about how many tokens to write.
        seed: of the sampling; no global random state is touched.
        batch_size: texts written side by side.

    Returns:
        The texts, joined by blank lines.

    Raises:
        ValueError: as ``write_texts``.
    """
    longest = min(LONGEST, max(_SHORTEST + 8, tokens // batch_size))
    texts = write_texts(model, tokenizer, tokens, longest=longest, seed=seed, side_by_side=batch_size, chat=False)
    return "\n\n".join(tokenizer.batch_decode(texts, skip_special_tokens=True))
