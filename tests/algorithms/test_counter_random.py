"""Philox against its published vectors, and words that depend on nothing but their place."""

import pytest
import torch

from hf_onebit.algorithms.counter_random import fraction, philox4x32, random_words

# Of the generator's authors, for ten rounds: counter, key, words.
PUBLISHED = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), PUBLISHED)
def test_published_vectors(counter, key, words):
    made = philox4x32(tuple(torch.tensor(number) for number in counter), key)
    assert tuple(int(word) for word in made) == words


def python_word(row, column, seed, step, stream):
    """The documented rule in Python's own integers."""
    c, k = [row >> 2, column, step & 0xFFFFFFFF, stream], [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        left, right = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [
            right >> 32 ^ c[1] ^ k[0],
            right & 0xFFFFFFFF,
            left >> 32 ^ c[3] ^ k[1],
            left & 0xFFFFFFFF,
        ]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c[row & 3]


def test_words_by_their_documented_rule():
    about = {"seed": (7 << 40) + 5, "step": (1 << 32) + 3, "stream": 0xFFFFFFF0}
    words = random_words((6, 5), **about)
    for row in range(6):
        for column in range(5):
            assert int(words[row, column]) == python_word(row, column, **about)


def test_words_of_pieces_and_of_other_sizes_are_the_same():
    whole = random_words((37, 50), 1, 2, 3)
    for first, last in ((0, 50), (7, 8), (20, 49)):
        assert torch.equal(random_words((37, 50), 1, 2, 3, slice(first, last)), whole[:, first:last])
    assert torch.equal(random_words((70, 90), 1, 2, 3)[:37, :50], whole)


def test_words_are_uniform_and_independent_of_seed_step_and_stream():
    base = random_words((256, 256), 1, 2, 3)
    assert int(base.min()) >= 0
    assert int(base.max()) < 1 << 32
    for bit in range(32):
        assert abs(float((base >> bit & 1).double().mean()) - 0.5) < 5 * 0.5 / 256
    u = fraction(base, torch.float64)
    assert abs(float(u.mean()) - 0.5) < 5 * (1 / 12) ** 0.5 / 256
    for other in (random_words((256, 256), *about) for about in ((2, 2, 3), (1, 3, 3), (1, 2, 4))):
        v = fraction(other, torch.float64)
        correlation = float(((u - 0.5) * (v - 0.5)).mean() * 12)
        assert abs(correlation) < 5 / 256
    for shifted in (u.roll(1, 0), u.roll(1, 1)):
        assert abs(float(((u - 0.5) * (shifted - 0.5)).mean() * 12)) < 5 / 256


@pytest.mark.parametrize("part", [slice(0, 8), slice(4, 21), slice(3, 7), slice(8, None), slice(None)])
def test_words_of_rows_are_those_of_the_whole(part: slice) -> None:
    whole = random_words((21, 5), 11, 3, 2)
    assert torch.equal(random_words((21, 5), 11, 3, 2, rows=part), whole[part])
    assert torch.equal(random_words((21, 5), 11, 3, 2, slice(1, 4), rows=part), whole[part, 1:4])
