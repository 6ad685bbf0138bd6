"""WinoGrande, LAMBADA and questions in SQuAD 2.0's form, from local files and without a harness.

Prompts and scores follow lm-evaluation-harness (no examples, no chat template): WinoGrande compares
the likelihood of what follows either option, LAMBADA asks whether greedy decoding would write the
last word, SQuAD is the F1 of the words of a greedy answer of one line.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.nn as nn

from mlx_delta.measure.settings import Setting

from .harness_squad import question_scores
from .local_files import file_entry, read_lambada, read_squad, read_winogrande
from .rows import can_batch, can_share, generate_texts, score_texts
from .samples import figures

ANSWER_TOKENS = 24  # of an answer in SQuAD's form, at most

Pair = tuple[list[int], list[int]]  # a context and a continuation


def spread_out(count: int, limit: int | None) -> list[int]:
    """Numbers below ``count``: all, or ``limit`` of them spread evenly."""
    if limit is None or limit >= count:
        return list(range(count))
    return [i * count // limit for i in range(limit)]


class FileTask:
    """What the tasks share: which samples, and in which groups.

    Args:
        name: Names the results.
        file: The samples.
        limit: Samples at most, spread evenly over the file; ``None``: all.
        batch_size: Texts at a time.
    """

    def __init__(self, name: str, file: Path, limit: int | None, batch_size: int):
        self.name = name
        self.options: dict[str, Any] = {**file_entry(file), "limit": limit}
        self.groups: list[list[int]] = []
        self._batch_size = batch_size

    def _group(self, lengths: dict[int, int], size: int) -> None:
        """Samples of like lengths together, the longest first."""
        order = sorted(lengths, key=lambda i: (-lengths[i], i))
        self.groups = [order[i : i + size] for i in range(0, len(order), size)]


class ChoiceTask(FileTask):
    """WinoGrande: which of two texts makes their common end likelier."""

    def __init__(self, tokenizer: Any, file: Path, limit: int | None, batch_size: int):
        super().__init__("winogrande", file, limit, batch_size)
        self._items = read_winogrande(file)
        self._pairs = {
            i: [encode_pair(tokenizer, text, item.end) for text in item.beginnings]
            for i in spread_out(len(self._items), limit)
            for item in [self._items[i]]
        }
        lengths = {i: max(len(c) + len(e) for c, e in p) for i, p in self._pairs.items()}
        self._group(lengths, max(1, batch_size // 2))

    def tokens(self, index: int) -> int:
        """Of the longer text; the last token is only predicted."""
        return max(len(context) + len(end) - 1 for context, end in self._pairs[index])

    def measure(self, model: nn.Module, setting: Setting, group: list[int]) -> list[dict[str, Any]]:
        """A record for each item: 1 where the right text is the likelier one."""
        pairs = [pair for i in group for pair in self._pairs[i]]
        scored = score_pairs(model, setting, pairs, self._batch_size)
        records = []
        for i, (first, second) in zip(
            group, zip(scored[::2], scored[1::2], strict=True), strict=True
        ):
            likelier = int(second[0][0] > first[0][0])
            own = (first, second)[self._items[i].right]
            score = int(likelier == self._items[i].right)
            records.append({"index": i, "score": score, **figures(own[1])})
        return records


class CompletionTask(FileTask):
    """LAMBADA: whether greedy decoding would write the passage's end."""

    def __init__(self, tokenizer: Any, file: Path, limit: int | None, batch_size: int):
        super().__init__("lambada", file, limit, batch_size)
        items = read_lambada(file)
        self._pairs = {
            i: encode_pair(tokenizer, items[i].passage, items[i].end)
            for i in spread_out(len(items), limit)
        }
        self._group({i: len(c) + len(e) for i, (c, e) in self._pairs.items()}, batch_size)

    def tokens(self, index: int) -> int:
        """The last token is only predicted."""
        context, end = self._pairs[index]
        return len(context) + len(end) - 1

    def measure(self, model: nn.Module, setting: Setting, group: list[int]) -> list[dict[str, Any]]:
        """A record for each passage, with the end's log-likelihood."""
        pairs = [self._pairs[i] for i in group]
        return [
            {"index": i, "score": int(greedy), "logprob": round(logprob, 4), **figures(cost)}
            for i, ((logprob, greedy), cost) in zip(
                group, score_pairs(model, setting, pairs, self._batch_size), strict=True
            )
        ]


class ReadingTask(FileTask):
    """Questions on paragraphs, in SQuAD 2.0's form; whole paragraphs are taken up to the limit."""

    def __init__(
        self,
        tokenizer: Any,
        file: Path,
        limit: int | None,
        batch_size: int,
        answer_tokens: int | None = None,
    ):
        super().__init__("squad", file, limit, batch_size)
        self._tokenizer = tokenizer
        self._answer_tokens = answer_tokens or ANSWER_TOKENS
        self.options["answer_tokens"] = self._answer_tokens
        paragraphs = read_squad(file)
        self._questions = [question for questions in paragraphs for question in questions]
        firsts = [0]
        for questions in paragraphs:
            firsts.append(firsts[-1] + len(questions))
        total = firsts[-1]
        share = 1.0 if limit is None else min(1.0, limit / total)
        wanted = max(1, round(share * len(paragraphs)))
        self._texts: dict[int, Pair] = {}
        groups: list[list[int]] = [[]]
        spread = spread_out(len(paragraphs), wanted)
        # Paragraphs differ in questions: where the spread ones have too few, others follow.
        for p in [*spread, *sorted(set(range(len(paragraphs))) - set(spread))]:
            for i in range(firsts[p], firsts[p + 1]):
                if limit is not None and len(self._texts) >= limit:
                    break
                asked = f"Question: {self._questions[i].question}\n\nAnswer:"
                self._texts[i] = encode_pair(tokenizer, self._questions[i].paragraph, asked)
                if len(groups[-1]) >= batch_size:
                    groups.append([])
                groups[-1].append(i)
        self.groups = groups

    def tokens(self, index: int) -> int:
        """Prompt and answer."""
        paragraph, question = self._texts[index]
        return len(paragraph) + len(question) + self._answer_tokens

    def measure(self, model: nn.Module, setting: Setting, group: list[int]) -> list[dict[str, Any]]:
        """A record for each question: F1, whether it is exact, and what was answered."""
        batched = can_batch(model, setting)
        answers = []
        for part in [group] if batched else [[i] for i in group]:
            answers += self._answer(model, setting, part, batched)
        records = []
        for i, (text, cost) in zip(group, answers, strict=True):
            prediction = [{"prediction_text": text, "no_answer_probability": 0.0}]
            scores = question_scores(
                prediction, [{"answers": {"text": self._questions[i].answers}}]
            )
            record = {"index": i, "score": scores["f1"][0], "exact": scores["exact"][0]}
            record["answerable"] = bool(self._questions[i].answers)
            records.append({**record, "answer": text, **figures(cost)})
        return records

    def _answer(
        self, model: nn.Module, setting: Setting, part: list[int], batched: bool
    ) -> list[tuple[str, dict[str, Any]]]:
        """Greedy answers of one line, with what their caches cost."""
        prompts = [self._texts[i] for i in part]
        shared = None
        if batched and can_share(setting):
            # The questions of a paragraph go on from caches that have read it once.
            read: dict[tuple[int, ...], tuple[list[Any], int]] = {}
            for paragraph, _ in prompts:
                if tuple(paragraph) not in read:
                    caches = setting.make_caches(model, len(paragraph))
                    setting.forward(model, paragraph, caches)
                    read[tuple(paragraph)] = (caches, len(paragraph))
            shared = [read[tuple(paragraph)] for paragraph, _ in prompts]
        written = generate_texts(
            model,
            setting,
            [question if shared else paragraph + question for paragraph, question in prompts],
            [self._answer_tokens] * len(prompts),
            [lambda tokens: "\n" in self._text(tokens)] * len(prompts),
            set(self._tokenizer.eos_token_ids),
            None,
            batched,
            shared,
        )
        return [(self._text(tokens).partition("\n")[0].strip(), cost) for tokens, cost in written]

    def _text(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True)).lstrip(" ")


FILE_TASKS: dict[str, Callable[..., Any]] = {
    "winogrande": ChoiceTask,
    "lambada": CompletionTask,
    "squad": ReadingTask,
}


def encode_pair(tokenizer: Any, context: str, end: str) -> Pair:
    """Token ids of a context, and of what follows it where it stands."""
    before = list(tokenizer.encode(context, add_special_tokens=True))
    whole = list(tokenizer.encode(context + end, add_special_tokens=True))
    if whole[: len(before)] == before and len(whole) > len(before):
        return before, whole[len(before) :]
    return before, list(tokenizer.encode(end, add_special_tokens=False))


def score_pairs(
    model: nn.Module, setting: Setting, pairs: Sequence[Pair], batch_size: int
) -> list[Any]:
    """Score and cost of each continuation after its context, as ``score_texts`` gives them."""
    batched = can_batch(model, setting)
    step = batch_size if batched else 1
    scored = []
    for start in range(0, len(pairs), step):
        texts = [(context, [end]) for context, end in pairs[start : start + step]]
        scored += [one for (one,) in score_texts(model, setting, texts, batch_size, batched)]
    return scored
