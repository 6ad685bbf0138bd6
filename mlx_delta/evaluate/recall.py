"""Recall: facts told in a text, and asked for at chosen distances.

    Remember: the password of Anna is silver king.   (a fact, somewhere in prose)
    The password of Anna is silver king.             (a question; the value is the answer)

Values are two random words, so no model can know them but from the text. A sample is prose with
facts in it, which is prefilled, and a tail that asks one question per distance, which is
teacher-forced: each told value stands exactly its distance before the place where it is asked.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_delta.measure.settings import Setting
from mlx_delta.measure.stats import wilson
from mlx_delta.measure.text import encode_piece, encode_text, first_tokens

from .figures import cache_figures, mean_figures

FACTS = json.loads((Path(__file__).parent / "facts.json").read_text("utf-8"))
TEMPLATES: dict[str, dict[str, str]] = FACTS["templates"]
DISTANCES = (256, 512, 1024, 1900)
LENGTH = 2048
TOKENS_PER_FACT = 112  # by default: 18 facts in 2,048 tokens

_LAYOUTS = 100  # tries, before facts are said not to fit


@dataclass(frozen=True)
class RecallOptions:
    """What samples look like; see :class:`RecallTask` for what is chosen where it says ``None``.

    Attributes:
        seed: Of all that is random.
        answers: Answers per distance and template.
        distances: Tokens from a value asked for back to where it was told.
        templates: Wordings, each in samples of its own.
        length: Tokens of a sample.
        facts: Facts in a sample, those that are not asked included.
    """

    seed: int = 0
    answers: int = 20
    distances: tuple[int, ...] | None = None
    templates: tuple[str, ...] = ("direct", "password")
    length: int | None = None
    facts: int | None = None


@dataclass(frozen=True)
class Question:
    """An answer in a sample: where it begins, how long it is, and how far back it was told."""

    distance: int
    start: int
    tokens: int


@dataclass(frozen=True)
class RecallSample:
    """A text as token ids, how many of them are prefilled, and what is asked after those."""

    ids: list[int]
    prefix: int
    questions: list[Question]


@dataclass(frozen=True)
class _Item:
    """A fact: how it is told and asked up to the value, and the value."""

    told: list[int]
    asked: list[int]
    value: list[int]


class RecallTask:
    """Makes samples, deterministically from tokenizer, text and options.

    Args:
        tokenizer: Any tokenizer; values may take several tokens.
        text: Prose to stand between the facts.
        options: Where they don't say: ``length`` is 2,048 tokens, or more for longer distances,
            or the model's context if that is less; ``distances`` are those of 256, 512, 1,024 and
            1,900 that fit; ``facts`` one per 112 tokens.
        context: The model's.

    Raises:
        ValueError: An option is wrong, or the text too short.
    """

    def __init__(
        self, tokenizer: Any, text: str, options: RecallOptions, context: int | None = None
    ):
        _check(options)
        self.options = options
        self._tokenizer = tokenizer
        self._pieces: dict[str, list[int]] = {}
        self._first = first_tokens(tokenizer)
        self._period = self._encode(".")
        self.length, self.distances = self._choose(context)
        questions = len(self.distances)
        facts = max(questions, self.length // TOKENS_PER_FACT)
        self.facts = options.facts or min(facts, len(FACTS["names"]))
        if self.facts < questions:
            raise ValueError(
                f"[recall] facts must be at least one per distance ({questions}) but got "
                f"{self.facts}."
            )
        self._prose = encode_text(tokenizer, text)
        if len(self._prose) < self.length:
            raise ValueError(
                f"[recall] the text has {len(self._prose)} tokens but a sample takes "
                f"{self.length}; give a longer --text or a smaller --length."
            )

    def _choose(self, context: int | None) -> tuple[int, tuple[int, ...]]:
        """Length and distances, where they fit for every name and value.

        Raises:
            ValueError: They don't.
        """
        told, asked, value = self._longest()
        distances = self.options.distances

        def needed(distance: int, questions: int) -> int:
            return len(self._first) + told + distance + questions * (asked + value)

        wanted = needed(max(distances), len(distances)) if distances else 0
        length = self.options.length or min(max(LENGTH, wanted), context or wanted + LENGTH)
        if context is not None and length > context:
            raise ValueError(
                f"[recall] a sample of {length} tokens is longer than the model's context of "
                f"{context}; give a smaller --length."
            )
        if distances is None:
            distances = tuple(d for d in DISTANCES if needed(d, len(DISTANCES)) <= length)
        if not distances:
            raise ValueError(
                f"[recall] samples of {length} tokens are too short for any of the distances "
                f"{', '.join(map(str, DISTANCES))}; give --distances."
            )
        if wanted > length:
            raise ValueError(
                f"[recall] a distance of {max(distances)} needs samples of {wanted} tokens but "
                f"they have {length}; give a smaller one, or a larger --length as far as the "
                "model's context goes."
            )
        questions = len(distances)
        if min(distances) < questions * (asked + value):
            raise ValueError(
                f"[recall] a distance of {min(distances)} is too short: with {questions} questions "
                f"it must be at least {questions * (asked + value)}, or a fact would stand among "
                "them."
            )
        return length, distances

    def _longest(self) -> tuple[int, int, int]:
        """Most tokens of a fact and of a question before the value, and of a value with period."""
        told, asked = (
            max(
                len(self._encode(_item_text(TEMPLATES[template][part], name)))
                for template in self.options.templates
                for name in FACTS["names"]
            )
            for part in ("told", "asked")
        )
        value = 2 * max(len(self._encode(f" {word}")) for word in FACTS["words"])
        return told, asked, value + len(self._period)

    @property
    def samples(self) -> list[tuple[str, int]]:
        """All samples that the options ask for, as pairs of a template and an index."""
        return [(t, i) for t in self.options.templates for i in range(self.options.answers)]

    def sample(self, template: str, index: int) -> RecallSample:
        """One sample; the same for the same template and index, however many there are.

        Raises:
            ValueError: The facts don't fit.
        """
        rng = np.random.default_rng([self.options.seed, zlib.crc32(template.encode()), index])
        items = self._items(rng, template)
        questions = len(self.distances)
        for _ in range(_LAYOUTS):
            distances = [self.distances[i] for i in rng.permutation(questions)]
            length = sum(len(i.asked + i.value + self._period) for i in items[:questions])
            prefix, tail, asked = self.length - length, [], []
            spots: dict[int, list[int]] = {}  # where each fact begins, and its tokens
            for item, distance in zip(items[:questions], distances, strict=True):
                tail += item.asked
                start = prefix + len(tail)
                asked.append(Question(distance, start, len(item.value)))
                tail += item.value + self._period
                spots[start - distance - len(item.told)] = self._fact(item)
            if (
                len(spots) == questions
                and _apart(spots)
                and self._scatter(rng, items, spots, prefix)
            ):
                return RecallSample(self._fill(rng, spots, prefix) + tail, prefix, asked)
        raise ValueError(
            f"[recall] {self.facts} facts with distances {', '.join(map(str, self.distances))} "
            f"don't fit into {self.length} tokens without touching each other; give distances "
            "further apart, fewer --facts or a larger --length."
        )

    def _items(self, rng: np.random.Generator, template: str) -> list[_Item]:
        """Facts with different names and values."""
        names = rng.permutation(len(FACTS["names"]))[: self.facts]
        words = FACTS["words"]
        # A pair of words as one number: drawn without repeating any.
        pairs = rng.choice(len(words) ** 2, self.facts, replace=False)
        items = []
        for name, pair in zip(names, pairs, strict=True):
            told, asked = (
                self._encode(_item_text(TEMPLATES[template][part], FACTS["names"][name]))
                for part in ("told", "asked")
            )
            value = [f" {words[pair // len(words)]}", f" {words[pair % len(words)]}"]
            ids = self._encode(value[0]) + self._encode(value[1])
            items.append(_Item(told, asked, ids))
        return items

    def _scatter(
        self, rng: np.random.Generator, items: list[_Item], spots: dict[int, list[int]], end: int
    ) -> bool:
        """Add the facts that are not asked to ``spots``, anywhere free; ``False``: no room."""
        for item in items[len(self.distances) :]:
            ids = self._fact(item)
            free, before = [], len(self._first)
            for start in [*sorted(spots), end]:
                free.append((before, start - before - len(ids) + 1))
                before = start + len(spots.get(start, []))
            room = np.array([max(0, places) for _, places in free])
            if not room.sum():
                return False
            place = int(rng.integers(room.sum()))
            gap = int(np.searchsorted(np.cumsum(room), place, side="right"))
            spots[free[gap][0] + place - int(room[:gap].sum())] = ids
        return True

    def _fill(self, rng: np.random.Generator, spots: dict[int, list[int]], end: int) -> list[int]:
        """``end`` tokens: the facts at their places, a random stretch of prose between them."""
        at = int(rng.integers(len(self._prose) - self.length + 1))
        ids = list(self._first)
        for start in sorted(spots):
            gap = start - len(ids)
            ids += self._prose[at : at + gap] + spots[start]
            at += gap
        return ids + self._prose[at : at + end - len(ids)]

    def _fact(self, item: _Item) -> list[int]:
        return item.told + item.value + self._period

    def _encode(self, piece: str) -> list[int]:
        if piece not in self._pieces:
            self._pieces[piece] = encode_piece(self._tokenizer, piece)
        return self._pieces[piece]


def _check(options: RecallOptions) -> None:
    """Validate options.

    Raises:
        ValueError: One is out of range; the message names it.
    """
    for name in ("seed", "answers", "length", "facts"):
        value, least = getattr(options, name), 0 if name == "seed" else 1
        if value is not None and value < least:
            raise ValueError(f"[recall] {name} must be >= {least} but got {value}.")
    if options.facts is not None and options.facts > len(FACTS["names"]):
        raise ValueError(
            f"[recall] facts must be at most {len(FACTS['names'])}, one per name, but got "
            f"{options.facts}."
        )
    unknown = [name for name in options.templates if name not in TEMPLATES]
    if unknown or not options.templates:
        raise ValueError(
            f"[recall] templates must be some of {', '.join(TEMPLATES)} but got "
            f"{unknown[0] if unknown else 'none'!r}."
        )
    for name in ("templates", "distances"):
        values = getattr(options, name)
        if values is not None and len(set(values)) < len(values):
            raise ValueError(f"[recall] {name} must differ but got {' '.join(map(str, values))}.")


def _item_text(form: str, name: str) -> str:
    """The start of a fact or question: a paragraph of its own."""
    return "\n\n" + form.format(name=name)


def _apart(spots: dict[int, list[int]]) -> bool:
    """Whether no fact reaches into the next."""
    starts = sorted(spots)
    return all(a + len(spots[a]) <= b for a, b in zip(starts, starts[1:], strict=False))


def measure_sample(
    model: nn.Module, setting: Setting, task: RecallTask, template: str, index: int
) -> dict[str, Any]:
    """Measure one sample with one setting.

    Args:
        model: From :func:`mlx_delta.load`.
        setting: How to keep keys and values.
        task: Makes the sample.
        template: Its wording.
        index: Its number.

    Returns:
        ``right``: by distance, whether every token of the answer was ranked first; and the caches'
        figures.
    """
    sample = task.sample(template, index)
    caches = setting.make_caches(model, sample.prefix)
    setting.prefill(model, sample.ids[: sample.prefix], caches)
    logits = setting.forward(model, sample.ids[sample.prefix : -1], caches)
    best = np.array(mx.argmax(logits, axis=-1)).tolist()
    right = {}
    for question in sorted(sample.questions, key=lambda q: q.distance):
        end = question.start + question.tokens
        # The guess of a token comes from the token before it.
        guess = best[question.start - 1 - sample.prefix : end - 1 - sample.prefix]
        right[str(question.distance)] = guess == sample.ids[question.start : end]
    figures = cache_figures(caches, sample.prefix)
    return {"template": template, "index": index, "right": right, **figures}


def summarize_recall(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Accuracy with Wilson's 95 % interval, over all and per distance and template."""
    answers = [
        (distance, record["template"], right)
        for record in records
        for distance, right in record["right"].items()
    ]
    metrics: dict[str, float] = {}
    for column, mark in ((0, "@"), (1, ":")):
        for key in dict.fromkeys(answer[column] for answer in answers):
            some = [answer[2] for answer in answers if answer[column] == key]
            low, high = wilson(sum(some), len(some))
            metrics[f"accuracy{mark}{key}"] = sum(some) / len(some)
            metrics[f"low{mark}{key}"], metrics[f"high{mark}{key}"] = low, high
    right = sum(answer[2] for answer in answers)
    low, high = wilson(right, len(answers))
    return {
        "metric": "accuracy",
        "higher_is_better": True,
        "score": right / len(answers),
        "low": low,
        "high": high,
        "samples": len(records),
        "metrics": metrics,
        **mean_figures(records),
    }
