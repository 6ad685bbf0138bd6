"""RULER's tasks on a model: texts made up to a length, greedy answers, and what is in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.nn as nn

from mlx_delta.measure.settings import Setting

from .rows import can_batch, generate_texts
from .ruler_texts import PUZZLES, Puzzle, fit
from .samples import figures, fitting_lengths, summarize

RULER = tuple(f"ruler-{kind}" for kind in PUZZLES)
LENGTHS = (1024, 2048)
SAMPLES = 10  # of each length
MARK = "<<text>>"


@dataclass(frozen=True)
class RulerOptions:
    """Which texts.

    Attributes:
        seed: Of all that is random.
        lengths: Tokens of a text with question and answer; ``None``: 1,024 and 2,048.
        samples: Texts of each length.
        chat: Whether to ask in the model's chat template, where it has one.
        batch_size: Texts at a time.
    """

    seed: int = 0
    lengths: tuple[int, ...] | None = None
    samples: int = SAMPLES
    chat: bool = True
    batch_size: int = 8


class RulerTask:
    """One of RULER's tasks.

    Args:
        name: One of :data:`RULER`.
        tokenizer: mlx-lm's wrapper.
        options: Which texts.
        context: The model's, if it has one.

    Raises:
        ValueError: An option is wrong.
    """

    def __init__(
        self, name: str, tokenizer: Any, options: RulerOptions, context: int | None = None
    ):
        if options.seed < 0 or options.samples < 1:
            raise ValueError(
                f"[ruler] seed must be >= 0 and samples >= 1 but got {options.seed} and "
                f"{options.samples}."
            )
        lengths = list(fitting_lengths("ruler", options.lengths, LENGTHS, context))
        self.name, self._kind = name, name.removeprefix("ruler-")
        self._tokenizer, self._given = tokenizer, options
        chat = options.chat and bool(getattr(tokenizer, "has_chat_template", False))
        self._lengths, self._chat = lengths, chat
        self.options: dict[str, Any] = {
            "seed": options.seed,
            "lengths": lengths,
            "samples": options.samples,
            "chat": chat,
        }
        numbers = range(len(lengths) * options.samples)
        self.groups = [
            list(numbers[i : min(i + options.batch_size, end)])
            for start in range(0, len(numbers), options.samples)
            for end in [start + options.samples]
            for i in range(start, end, options.batch_size)
        ]

    def tokens(self, index: int) -> int:
        """Of a text with question and answer."""
        return self._lengths[index // self._given.samples]

    def puzzle(self, index: int) -> Puzzle:
        """One sample; the same for the same number."""
        seed = [self._given.seed, list(PUZZLES).index(self._kind), index]
        return fit(self._kind, seed, self.tokens(index), self._count)

    def _count(self, puzzle: Puzzle) -> int:
        return len(self._prompt(puzzle)) + puzzle.tokens

    def _prompt(self, puzzle: Puzzle) -> list[int]:
        content = f"{puzzle.text}\n\n{puzzle.question}"
        if not self._chat:
            text = f"{content}\n\n{puzzle.begun}"
            return list(self._tokenizer.encode(text, add_special_tokens=True))
        messages = [{"role": "user", "content": MARK}]
        chat = self._tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
        text = str(chat).replace(MARK, content) + puzzle.begun
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def measure(self, model: nn.Module, setting: Setting, group: list[int]) -> list[dict[str, Any]]:
        """A record for each text: the share of the answers that were given, and what was said."""
        puzzles = [self.puzzle(index) for index in group]
        batched = can_batch(model, setting)
        written = []
        for part in [puzzles] if batched else [[puzzle] for puzzle in puzzles]:
            stops = [self._stopper(puzzle) for puzzle in part]
            prompts = [self._prompt(puzzle) for puzzle in part]
            most = [puzzle.tokens for puzzle in part]
            eos = set(self._tokenizer.eos_token_ids)
            written += generate_texts(model, setting, prompts, most, stops, eos, None, batched)
        records = []
        for index, puzzle, (tokens, cost) in zip(group, puzzles, written, strict=True):
            said = self._text(tokens)
            score = _share(puzzle, said)
            record = {"index": index, "length": self.tokens(index), "score": score, "answer": said}
            records.append({**record, **figures(cost)})
        return records

    def _stopper(self, puzzle: Puzzle) -> Any:
        """Whether all is said already."""
        return lambda tokens: _share(puzzle, self._text(tokens)) == 1

    def _text(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))


def _share(puzzle: Puzzle, said: str) -> float:
    """Which part of the answers is in what was said, whatever the case of letters."""
    return sum(answer.lower() in said.lower() for answer in puzzle.answers) / len(puzzle.answers)


def summarize_ruler(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The mean share, and that of each length."""
    summary = summarize(records, "share of answers")
    for length in dict.fromkeys(record["length"] for record in records):
        scores = [record["score"] for record in records if record["length"] == length]
        summary["metrics"][f"share@{length}"] = sum(scores) / len(scores)
    return summary
