"""Random words that are a function of where they are used: Philox 4x32-10.

No state is kept: the words of a weight at a step follow from (seed, step, stream, row, column) alone. So a run can be
stopped anywhere and resumed, split into pieces of any shape, and repeated on another device bit for bit.

The generator is Philox 4x32-10 of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3"
(SC 2011). Of a matrix of words, row r and column c::

    counter = (r >> 2, c, step mod 2^32, stream)         key = (seed mod 2^32, seed >> 32)
    word[r, c] = philox4x32_10(counter, key)[r & 3]      an integer from 0 to 2^32 - 1

One call serves four neighbouring rows of a column.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["fraction", "philox4x32", "random_words"]

_WORD = 0xFFFFFFFF
_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Four random words of each counter.

    Args:
        counter: int64 tensors of values 0..2^32 - 1, of shapes that broadcast.
        key: two numbers 0..2^32 - 1.

    Returns:
        Four int64 tensors of values 0..2^32 - 1.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # int64 products wrap around, which leaves all of their 64 bits right; the shift drags the sign along.
        left, right = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = _xor(_high(right), c1, k0)
        c2 = _xor(_high(left), c3, k1)
        c1, c3 = right.bitwise_and_(_WORD), left.bitwise_and_(_WORD)
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def random_words(
    shape: tuple[int, int],
    seed: int,
    step: int,
    stream: int,
    columns: slice = slice(None),
    device: torch.device | str | None = None,
    rows: slice = slice(None),
) -> Tensor:
    """Words of some columns, or rows, of a matrix; see the module's docstring.

    Args:
        shape: (rows, columns) of the whole matrix.
        seed: 0..2^64 - 1.
        step: how many steps there were, with this one; its low 32 bits count.
        stream: 0..2^32 - 1, which matrix it is.
        columns: which of its columns.
        device: where the words are made.
        rows: which of its rows.

    Returns:
        int64 (len(rows), len(columns)), values 0..2^32 - 1.
    """
    (top, bottom, _), (first, last, _) = rows.indices(shape[0]), columns.indices(shape[1])
    quads = torch.arange(top // 4, -(-bottom // 4), device=device)[:, None]
    across = torch.arange(first, last, device=device)[None, :]
    counter = (quads, across, torch.tensor(step & _WORD, device=device), torch.tensor(stream & _WORD, device=device))
    lanes = philox4x32(counter, (seed & _WORD, seed >> 32 & _WORD))
    return torch.stack(lanes, 1).view(-1, last - first)[top % 4 :][: bottom - top]


def fraction(words: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """u = word / 2^32: the word rounded to float32, times 2^-32 exactly; in [0, 1], with the words' resolution."""
    return words.to(torch.float32).mul_(2.0**-32).to(dtype)


def _high(product: Tensor) -> Tensor:
    return (product >> 32).bitwise_and_(_WORD)


def _xor(high: Tensor, word: Tensor, key: int) -> Tensor:
    # ``high`` may be smaller than what it meets, in the first two rounds.
    mixed = high.bitwise_xor_(key)
    return mixed.bitwise_xor_(word) if mixed.shape == word.shape else mixed ^ word
