"""Needles: numbers told at several depths of texts of several lengths, and asked for.

    The special magic number for Oslo is: 48213.      (a needle, a paragraph of its own in prose)
    What is the special magic number for Oslo?        (asked in the model's chat template, if any)

A text holds a needle at each depth, is read once, and each question goes on from there. The answer
is begun for the model ("The special magic number for Oslo is:"), as RULER does, and found when each
of its tokens is ranked first. Of small models that is often by a hair, so that any change loses
some needles and gains others: both are counted. Of those that dense attention finds, how much less
likely a setting makes the answers says more than how few are lost.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_delta.measure.settings import Setting
from mlx_delta.measure.stats import wilson
from mlx_delta.measure.text import encode_piece, encode_text, first_tokens

from .figures import cache_figures, mean_figures
from .recall import FACTS
from .samples import fitting_lengths

LENGTHS = (1024, 2048, 4096, 8192)
DEPTHS = (0.05, 0.15, 0.3, 0.45, 0.6, 0.75, 0.85, 0.95)
TEXTS = 2  # of each length
MARK = "<<text>>"  # where a chat template's text goes

PLACES = (
    "Lisbon", "Cairo", "Oslo", "Lima", "Kyoto", "Perth", "Boston", "Delhi", "Vienna", "Quito",
    "Dublin", "Nairobi", "Prague", "Seoul", "Tunis", "Havana", "Riga", "Accra", "Bergen", "Turin",
)  # fmt: skip


@dataclass(frozen=True)
class Form:
    """The wording of needles.

    Attributes:
        told: A needle.
        asked: The question; empty: none but the beginning of its answer.
        begun: The beginning of the answer.
        keys: What needles are about.
        words: The value is some of these; none: a number of five digits.
        count: How many.
    """

    told: str
    asked: str
    begun: str
    keys: tuple[str, ...]
    words: tuple[str, ...] = ()
    count: int = 1

    def value(self, rng: np.random.Generator) -> str:
        """A random value."""
        if not self.words:
            return str(rng.integers(10_000, 100_000))
        return " ".join(self.words[i] for i in rng.integers(len(self.words), size=self.count))


FORMS = {
    "number": Form(
        "The special magic number for {key} is: {value}.",
        "What is the special magic number for {key}?",
        "The special magic number for {key} is:",
        PLACES,
    ),
    # Of small models, the ones that find few numbers find more of these.
    "word": Form(
        "The secret word of {key} is {value}.",
        "What is the secret word of {key}?",
        "The secret word of {key} is",
        PLACES,
        (
            "apple",
            "river",
            "castle",
            "window",
            "silver",
            "copper",
            "orange",
            "tiger",
            "violin",
            "ladder",
            "candle",
            "button",
            "rocket",
            "marble",
            "bridge",
            "forest",
        ),
    ),
    # What the bundled models were taught to recall.
    "password": Form(
        f"{FACTS['templates']['password']['told']} {{value}}.".replace("{name}", "{key}"),
        "",
        FACTS["templates"]["password"]["asked"].replace("{name}", "{key}"),
        tuple(FACTS["names"]),
        tuple(FACTS["words"]),
        2,
    ),
}


@dataclass(frozen=True)
class NeedleOptions:
    """Which needles.

    Attributes:
        seed: Of all that is random.
        lengths: Tokens of texts, questions and answers included; ``None``: 1,024, 2,048, 4,096 and
            8,192, as far as the model's context goes.
        depths: Where needles are, as shares of a text.
        texts: Texts of each length.
        chat: Whether to ask in the model's chat template, where it has one.
        form: One of :data:`FORMS`.
    """

    seed: int = 0
    lengths: tuple[int, ...] | None = None
    depths: tuple[float, ...] = DEPTHS
    texts: int = TEXTS
    chat: bool = True
    form: str = "number"


@dataclass(frozen=True)
class Haystack:
    """A text as token ids, and what is asked after it: for each depth a question and its answer."""

    ids: list[int]
    questions: list[tuple[float, list[int], list[int]]]


class NeedleTask:
    """Makes texts, deterministically from tokenizer, prose and options.

    Args:
        tokenizer: mlx-lm's wrapper.
        prose: What stands between needles.
        options: Which needles.
        context: The model's, if it has one.
        text: What says in results which prose it was.

    Raises:
        ValueError: An option is wrong, or the prose too short.
    """

    name = "needles"

    def __init__(
        self,
        tokenizer: Any,
        prose: str,
        options: NeedleOptions,
        context: int | None = None,
        text: Mapping[str, str] | None = None,
    ):
        _check(options)
        self._tokenizer, self._seed = tokenizer, options.seed
        self._form = FORMS[options.form]
        self._prose = encode_text(tokenizer, prose)
        self.depths = tuple(sorted(options.depths))
        self.lengths = fitting_lengths("needles", options.lengths, LENGTHS, context)
        if len(self._prose) < self.lengths[-1]:
            raise ValueError(
                f"[needles] the text has {len(self._prose)} tokens but a sample takes "
                f"{self.lengths[-1]}; give a longer --text or shorter --lengths."
            )
        self._before, self._after = self._frame(options.chat)
        chat = options.chat and bool(getattr(tokenizer, "has_chat_template", False))
        self.options: dict[str, Any] = {
            "seed": options.seed,
            "lengths": list(self.lengths),
            **(text or {}),
            "depths": list(self.depths),
            "texts": options.texts,
            "chat": chat,
            "form": options.form,
        }
        self._texts = options.texts
        self.groups = [[i] for i in range(len(self.lengths) * options.texts)]

    def _frame(self, chat: bool) -> tuple[list[int], str]:
        """Tokens before the prose, and the text between a question and its answer."""
        tokenizer = self._tokenizer
        if not (chat and getattr(tokenizer, "has_chat_template", False)):
            return first_tokens(tokenizer), "\n\n"
        messages = [{"role": "user", "content": MARK}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        before, _, after = str(text).partition(MARK)
        return list(tokenizer.encode(before, add_special_tokens=False)), after

    def tokens(self, index: int) -> int:
        """Of a text and its longest question."""
        return self.lengths[index // self._texts]

    def haystack(self, index: int) -> Haystack:
        """One text; the same for the same number.

        Raises:
            ValueError: The needles do not fit.
        """
        length = self.tokens(index)
        rng = np.random.default_rng([self._seed, length, index % self._texts])
        form, tokenizer = self._form, self._tokenizer
        keys = [form.keys[i] for i in rng.permutation(len(form.keys))[: len(self.depths)]]
        values = [form.value(rng) for _ in keys]
        questions = []
        for depth, key, value in zip(self.depths, keys, values, strict=True):
            asked = f"\n\n{form.asked.format(key=key)}" if form.asked else ""
            asked += self._after + form.begun.format(key=key)
            told = list(tokenizer.encode(asked, add_special_tokens=False))
            questions.append((depth, told, encode_piece(tokenizer, f" {value}")))
        room = length - len(self._before) - max(len(q) + len(a) for _, q, a in questions)
        needles = []
        for key, value in zip(keys, values, strict=True):
            text = f"\n\n{form.told.format(key=key, value=value)}\n\n"
            needles.append(list(tokenizer.encode(text, add_special_tokens=False)))
        at = int(rng.integers(len(self._prose) - max(room, 0) + 1))
        ids: list[int] = []
        for depth, needle in zip(self.depths, needles, strict=True):
            gap = round(depth * (room - len(needle))) - len(ids)
            if gap < 0:
                raise ValueError(
                    f"[needles] {len(needles)} needles do not fit into {length} tokens; give fewer "
                    "--depths or longer --lengths."
                )
            ids += self._prose[at : at + gap] + needle
            at += gap
        ids += self._prose[at : at + room - len(ids)]
        return Haystack(self._before + ids, questions)

    def measure(
        self,
        model: nn.Module,
        setting: Setting,
        group: list[int],
    ) -> list[dict[str, Any]]:
        """A record for each text: what became of each needle, and caches' figures.

        Of each depth: whether it was found; how surprising its answer was, in nats; and by how many
        nats each of its tokens was likelier than any other at least (its margin, below 0 where it
        was not found).

        Args:
            model: The model.
            setting: How keys and values are kept.
            group: Which texts.
        """
        return [self._measure(model, setting, i) for i in group]

    def _measure(self, model: nn.Module, setting: Setting, index: int) -> dict[str, Any]:
        haystack, length = self.haystack(index), self.tokens(index)
        record: dict[str, Any] = {"index": index, "length": length}
        record |= {"right": {}, "nats": {}, "margins": {}}
        caches = setting.make_caches(model, length)
        setting.prefill(model, haystack.ids, caches)
        for depth, question, answer in haystack.questions:
            own = copy.deepcopy(caches)
            logits = setting.forward(model, question + answer[:-1], own)[len(question) - 1 :]
            logs = nn.log_softmax(logits.astype(mx.float32), axis=-1)
            wanted = mx.array(answer)[:, None]
            told = mx.take_along_axis(logs, wanted, axis=-1)
            others = mx.put_along_axis(logs, wanted, mx.array(-mx.inf, logs.dtype), axis=-1)
            margin = float((told[:, 0] - others.max(axis=-1)).min())
            record["right"][str(depth)] = np.array(mx.argmax(logs, axis=-1)).tolist() == answer
            record["nats"][str(depth)] = round(-float(told.sum()), 5)
            record["margins"][str(depth)] = round(margin, 5)
        return record | cache_figures(caches, len(haystack.ids))


def _check(options: NeedleOptions) -> None:
    """Validate options.

    Raises:
        ValueError: One is out of range; the message names it.
    """
    if options.seed < 0 or options.texts < 1:
        raise ValueError(
            f"[needles] seed must be >= 0 and texts >= 1 but got {options.seed}, {options.texts}."
        )
    depths = options.depths
    if not depths or len(set(depths)) < len(depths) or not all(0 <= d <= 1 for d in depths):
        raise ValueError(f"[needles] depths must differ and be in [0, 1] but got {depths}.")
    if options.form not in FORMS:
        raise ValueError(
            f"[needles] form must be one of {', '.join(FORMS)} but got {options.form!r}."
        )
    if len(depths) > len(PLACES):
        raise ValueError(f"[needles] depths must be at most {len(PLACES)} but got {len(depths)}.")


def summarize_needles(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The share found of those asked, with Wilson's interval; and counts by length and depth."""
    counts: dict[str, int] = {}
    found = asked = 0
    for record in records:
        for depth, right in record["right"].items():
            cell = f"{record['length']}:{depth}"
            counts[f"found@{cell}"] = counts.get(f"found@{cell}", 0) + int(right)
            counts[f"asked@{cell}"] = counts.get(f"asked@{cell}", 0) + 1
            found, asked = found + int(right), asked + 1
    low, high = wilson(found, asked) if asked else (0.0, 1.0)
    measured = [record for record in records if "cache_bytes" in record]
    nothing = {f"{name}_sparsity": None for name in ("prefill", "decode", "overall")}
    return {
        "metric": "found",
        "higher_is_better": True,
        "score": found / asked if asked else 0.0,
        "low": low,
        "high": high,
        "samples": len(records),
        "metrics": {"found": found, "asked": asked, **counts},
        **(mean_figures(measured) if measured else {**nothing, "cache_bytes": 0}),
    }
