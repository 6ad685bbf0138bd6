"""RULER's tasks that need no data set, made anew from their description (arXiv 2404.06654).

Words and texts are our own, and so are the figures made with them: the same kinds of tasks, not the
published numbers. Each maker fills a text up to a number of tokens and says what is asked.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

FILLER = (
    "The fields lie quiet. A road goes by. The mill turns slowly. Nothing else happens here. "
    "Evening comes, and morning after it."
)
CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"

Rng = np.random.Generator


@dataclass(frozen=True)
class Puzzle:
    """A text, what is asked, how the answer begins, and what must be in it.

    Attributes:
        text: What the model reads first.
        question: What is asked after it.
        begun: The beginning of the answer.
        answers: Strings; the score is the share of them that are in what follows.
        tokens: To generate at most.
    """

    text: str
    question: str
    begun: str
    answers: tuple[str, ...]
    tokens: int


def words(rng: Rng, count: int) -> list[str]:
    """Different made-up words of three syllables."""
    found: dict[str, None] = {}
    while len(found) < count:
        letters = [rng.choice(list(x)) for _ in range(3) for x in (CONSONANTS, VOWELS)]
        found["".join(map(str, letters))] = None
    return list(found)


def needle_in_filler(rng: Rng, size: int) -> Puzzle:
    """``niah_single_1``: one number in sentences that repeat."""
    (key,), number = words(rng, 1), str(rng.integers(1_000_000, 10_000_000))
    lines = [FILLER] * size
    lines.insert(int(rng.integers(size + 1)), _told(key, number))
    return _needle(lines, key, number)


def needle_in_needles(rng: Rng, size: int) -> Puzzle:
    """``niah_multikey_2``: all lines tell a number, one is asked for."""
    keys = words(rng, size)
    numbers = [str(n) for n in rng.integers(1_000_000, 10_000_000, size)]
    at = int(rng.integers(size))
    lines = [_told(key, number) for key, number in zip(keys, numbers, strict=True)]
    return _needle(lines, keys[at], numbers[at])


def needle_in_uuids(rng: Rng, size: int) -> Puzzle:
    """``niah_multikey_3``: the same with UUIDs for keys and values."""
    ids = [str(uuid.UUID(bytes=rng.bytes(16), version=4)) for _ in range(2 * size)]
    keys, values = ids[:size], ids[size:]
    at = int(rng.integers(size))
    lines = [_told(key, value) for key, value in zip(keys, values, strict=True)]
    return _needle(lines, keys[at], values[at])


def _told(key: str, value: str) -> str:
    return f"The secret code of {key} is {value}."


def _needle(lines: list[str], key: str, value: str) -> Puzzle:
    return Puzzle(
        "\n".join(lines),
        f"What is the secret code of {key} in the text above?",
        f"The secret code of {key} in the text is",
        (value,),
        len(value) + 2,
    )


def variables(rng: Rng, size: int) -> Puzzle:
    """``vt``: a variable's value is handed on four times; which variables have it?"""
    names = [name.upper() for name in words(rng, 5)]
    number = str(rng.integers(10_000, 100_000))
    told = [f"VAR {names[0]} = {number}."]
    told += [f"VAR {b} = VAR {a}." for a, b in zip(names, names[1:], strict=False)]
    lines = [FILLER] * max(size, len(told))
    places = np.sort(rng.choice(len(lines) + 1, len(told), replace=False))
    for line, place in reversed(list(zip(told, places, strict=True))):
        lines.insert(int(place), line)
    return Puzzle(
        "\n".join(lines),
        f"Find all variables that are assigned the value {number} in the text above, directly or "
        "through another variable.",
        f"The {len(names)} variables that are assigned the value {number} are:",
        tuple(names),
        40,
    )


def common_words(rng: Rng, size: int) -> Puzzle:
    """``cwe``: ten words stand ten times as often as the others; which are they?"""
    some = words(rng, 10 + size)
    common, others = some[:10], some[10:]
    listed = [*common * 10, *others]
    order = rng.permutation(len(listed))
    text = " ".join(f"{n}. {listed[i]}" for n, i in enumerate(order, 1))
    return Puzzle(
        f"A numbered list of words, of which some stand in it often:\n{text}",
        "Which ten words stand most often in the list above?",
        "The ten words that stand most often in the list are:",
        tuple(common),
        80,
    )


def frequent_words(rng: Rng, size: int) -> Puzzle:
    """``fwe``: made-up words by a zeta distribution; which three are the most frequent?

    The k-th of them stands in proportion to 1 / k**2, as RULER's default has it.
    """
    some = words(rng, 40)
    shares = 1 / np.arange(1, len(some) + 1) ** 2
    counts = np.maximum(1, np.round(size * shares / shares.sum())).astype(int)
    counts[:3] += np.array([2, 1, 0])  # no ties between the three
    counts[3:] = np.minimum(counts[3:], max(1, counts[2] - 1))
    listed = [word for word, count in zip(some, counts, strict=True) for _ in range(count)]
    text = " ".join(listed[i] for i in rng.permutation(len(listed)))
    return Puzzle(
        f"A coded text:\n{text}",
        "Which three words are the most frequent ones in the coded text above?",
        "The three most frequent words are:",
        tuple(some[:3]),
        30,
    )


# Name: the maker, and the least size that makes sense of it.
PUZZLES: dict[str, tuple[Callable[[Rng, int], Puzzle], int]] = {
    "niah_single_1": (needle_in_filler, 1),
    "niah_multikey_2": (needle_in_needles, 2),
    "niah_multikey_3": (needle_in_uuids, 2),
    "vt": (variables, 5),
    "cwe": (common_words, 10),
    "fwe": (frequent_words, 60),
}


def fit(kind: str, seed: list[int], length: int, count: Callable[[Puzzle], int]) -> Puzzle:
    """The largest puzzle of a kind that has at most so many tokens.

    Args:
        kind: One of :data:`PUZZLES`.
        seed: Of all that is random.
        length: Tokens.
        count: Counts a puzzle's tokens, answer included.

    Raises:
        ValueError: Not even the smallest one fits.
    """
    make, least = PUZZLES[kind]

    def sized(size: int) -> Puzzle:
        return make(np.random.default_rng(seed), size)

    if count(sized(least)) > length:
        raise ValueError(
            f"[ruler] the smallest text of {kind} takes {count(sized(least))} tokens but --lengths "
            f"asks for {length}."
        )
    low, high = least, 2 * least
    while count(sized(high)) <= length:
        low, high = high, 2 * high
    while high - low > max(1, low // 50):
        middle = (low + high) // 2
        low, high = (middle, high) if count(sized(middle)) <= length else (low, middle)
    return sized(low)


def describe(kinds: Any) -> str:
    """The kinds, for a message."""
    return ", ".join(f"ruler-{kind}" for kind in kinds)
