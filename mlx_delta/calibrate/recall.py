"""A text whose end can only be known from what was said far before it.

Prose hardly ever comes back to a detail, so heads that look details up count for little in a mean
over prose, and facts told once are the first that a held key loses. Here they count: codes are told
at several places of a text and asked for at its end, and passages of it are quoted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_delta.measure.text import encode_piece, first_tokens

TOLD = "\n\nPlease remember that the code of the {thing} is {value}.\n\n"
ASKED = "\n\nThe code of the {thing} is"
THINGS = (
    "gate", "engine", "library", "archive", "cellar", "harbour", "tower", "laboratory", "office",
    "garden", "bakery", "studio",
)  # fmt: skip
WORDS = (
    "walnut", "thunder", "mirror", "cotton", "anchor", "falcon", "pepper", "crystal", "meadow",
    "lantern",
)  # fmt: skip
FACTS = 8
QUOTED = 24  # tokens of a passage
BEGUN = 4  # of them that say which passage it is
TAIL = 0.28  # of a text that its questions and quotations take, about; none is too little


@dataclass(frozen=True)
class Recall:
    """A text and what is asked of it.

    Attributes:
        ids: Token ids.
        asked: Positions of tokens whose next one has to be recalled.
        told: Tokens before the first question: of those keys, errors matter to the answers.
    """

    ids: list[int]
    asked: list[int]
    told: int


def make_recall(tokenizer: Any, prose: Sequence[int], length: int, seed: int) -> Recall:
    """A text of at most ``length`` tokens, with as many facts and quotations as it has room for.

    Args:
        tokenizer: mlx-lm's wrapper.
        prose: Token ids of prose, as many as the text is to have.
        length: Tokens.
        seed: Of what is told and quoted.
    """
    rng = np.random.default_rng(seed)
    tail, facts = round(TAIL * length), []
    room = tail // 2
    for i, thing in enumerate(rng.permutation(THINGS)[:FACTS]):
        value = str(rng.integers(1_000, 100_000)) if i % 2 else str(rng.choice(WORDS))
        told = _encode(tokenizer, TOLD.format(thing=thing, value=value))
        question = _encode(tokenizer, ASKED.format(thing=thing))
        answer = encode_piece(tokenizer, f" {value}")
        room -= len(question) + len(answer)
        if room < 0:
            break
        facts.append((told, question, answer))
    ids = first_tokens(tokenizer)
    gap = max(0, length - tail - len(ids) - sum(len(told) for told, *_ in facts))
    gap //= max(1, len(facts))
    for i, (told, *_) in enumerate(facts):
        ids += [*prose[i * gap : (i + 1) * gap], *told]
    if not facts:
        ids += list(prose[: length - tail - len(ids)])
    told_tokens = len(ids)
    asked: list[int] = []
    for i in rng.permutation(len(facts)):
        _, question, answer = facts[i]
        ids += question
        asked += range(len(ids) - 1, len(ids) - 1 + len(answer))
        ids += answer
    passages = max(0, told_tokens - QUOTED)
    while passages and len(ids) + QUOTED + 2 <= length:
        start = int(rng.integers(passages))
        ids += _encode(tokenizer, "\n\n") + ids[start : start + BEGUN]
        asked += range(len(ids) - 1, len(ids) - 1 + QUOTED - BEGUN)
        ids += ids[start + BEGUN : start + QUOTED]
    return Recall(ids, asked, told_tokens)


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))
