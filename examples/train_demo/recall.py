"""The recall task: facts scattered through prose and asked for later. Needs numpy only.

    Remember: the password of Anna is silver king.   (a fact)
    ...                                              (prose)
    The password of Anna is silver king.             (a question; the value is the answer)

A model solves it only if attention reaches back to the fact: the value is drawn at random.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# Names, words and wordings, shared with mlx_delta.evaluate and read without importing it.
FACTS = json.loads(
    (Path(__file__).parents[2] / "mlx_delta" / "evaluate" / "facts.json").read_text("utf-8")
)
NAMES, WORDS = FACTS["names"], FACTS["words"]

# name: (how a fact is told, how it is asked for); the value follows both.
TEMPLATES = {name: (form["told"], form["asked"]) for name, form in FACTS["templates"].items()}
VALUE_WORDS = 2


@dataclass(frozen=True)
class RecallSample:
    """One sequence: `ids` and, as positions in it, what is told, what is asked and how."""

    ids: np.ndarray  # [length]
    told: np.ndarray  # positions of the values where the facts are told: cannot be predicted
    answers: np.ndarray  # positions of the values asked for: the model must know them
    distances: np.ndarray  # of each answer token to the same token where it was told
    wording: np.ndarray  # positions of what stands before the values: "Remember: the name is"


class RecallTask:
    """Builds sequences of the recall task.

    Args:
        encode: the tokenizer: text -> token ids, adding nothing.
        words: token ids that values are drawn from. By default those of `WORDS` that are one token.
    """

    def __init__(self, encode: Callable[[str], Sequence[int]], words: Sequence[int] | None = None):
        self.encode = lambda text: list(encode(text))
        if words is None:
            pieces = [self.encode(" " + word) for word in dict.fromkeys(WORDS)]
            words = [piece[0] for piece in pieces if len(piece) == 1]
        self.words = np.array(words)
        self.period = self.encode(".")
        self._cache: dict[str, list[int]] = {}

    def _ids(self, text: str) -> list[int]:
        if text not in self._cache:
            self._cache[text] = self.encode(text)
        return self._cache[text]

    def sample(
        self,
        rng: np.random.Generator | int,
        length: int,
        facts: int,
        *,
        prose: np.ndarray | None = None,
        questions: int | None = None,
        templates: Sequence[str] = ("password",),
        told_until: float = 1.0,
        asked_from: float = 0.0,
        break_before: str | None = "\n\n",
    ) -> RecallSample | None:
        """One sequence of `length` tokens.

        Args:
            rng: a generator, or a seed.
            length: tokens in all.
            facts: how many names get a value (at most `len(NAMES)`).
            prose: token ids [n] to fill the space between the items with (a random stretch of it,
                cut at the ends of sentences). None packs the items; the sequence is then shorter.
            questions: how many are asked, of random facts; None asks for every fact once.
            templates: keys of `TEMPLATES`; each fact uses one of them, drawn at random.
            told_until: the facts stand in this first share of the prose ...
            asked_from: ... and the questions after this share of it.
            break_before: what stands before each item; None draws a paragraph break or a space.

        Returns:
            None where the items do not fit into `length`.
        """
        rng = np.random.default_rng(rng)
        names = rng.permutation(len(NAMES))[:facts]
        chosen = [TEMPLATES[t] for t in rng.choice(list(templates), facts)]
        values = self.words[rng.integers(0, len(self.words), (facts, VALUE_WORDS))]
        asked = rng.permutation(facts) if questions is None else rng.integers(0, facts, questions)
        items = []  # (fact, is it a question, the ids before the value)
        for order, is_question in ((range(facts), False), (asked, True)):
            for fact in order:
                gap = break_before
                if gap is None:
                    gap = "\n\n" if rng.random() < 0.7 else " "
                text = gap + chosen[fact][is_question].format(name=NAMES[names[fact]])
                items.append((fact, is_question, self._ids(text)))
        used = sum(len(ids) + VALUE_WORDS + 1 for _, _, ids in items)
        spread = length - used if prose is not None else 0
        if spread < 0 or used > length:
            return None

        cuts = [0] * len(items)
        text = np.zeros(0, int)
        if prose is not None:
            start = int(rng.integers(0, len(prose) - length))
            text = prose[start : start + length]
            told = np.sort(rng.random(facts)) * told_until
            begin = max(asked_from, told[-1])
            later = begin + np.sort(rng.random(len(asked))) * (1 - begin)
            wanted = (np.concatenate([told, later]) * spread).astype(int)
            ends = np.flatnonzero(text[:spread] == self.period[0]) + 1
            if len(ends):  # move each cut to the end of its sentence
                cuts = ends[np.minimum(np.searchsorted(ends, wanted), len(ends) - 1)].tolist()
            else:
                cuts = wanted.tolist()

        ids: list[int] = []
        told_at, answers, distances, wording, previous = [], [], [], [], 0
        where: dict[int, int] = {}
        for (fact, is_question, before), cut in zip(items, cuts, strict=True):
            ids += text[previous:cut].tolist()
            previous = cut
            wording += range(len(ids), len(ids) + len(before))
            ids += before
            spot = range(len(ids), len(ids) + VALUE_WORDS)
            if is_question:
                answers += spot
                distances += [len(ids) - where[fact]] * VALUE_WORDS
            else:
                told_at += spot
                where[fact] = len(ids)
            ids += values[fact].tolist() + self.period
        if prose is not None:
            ids += text[previous : previous + length - len(ids)].tolist()
        return RecallSample(
            *(np.array(x, dtype=np.int64) for x in (ids, told_at, answers, distances, wording))
        )
