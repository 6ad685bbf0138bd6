"""Text, tokens and batches: prose mixed with the recall task as a stage of the recipe says."""

from __future__ import annotations

import lzma
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from recall import NAMES, RecallSample, RecallTask
from tokenizers import Tokenizer


@dataclass(kw_only=True)
class Mix:
    """What the batches of a stage are made of; the recipes say what the fields mean."""

    name: str
    lengths: dict[str, float]
    prose: float = 0.5
    packed: float = 0.0
    templates: dict[str, float] = field(default_factory=lambda: {"direct": 1.0})
    any_word: float = 0.0
    max_facts: int = 40
    apart: float = 0.5
    packed_to: int | None = None
    wording: bool = True


@dataclass(kw_only=True)
class Stage(Mix):
    """A stage that lasts for a number of tokens; see `recipe.toml`."""

    tokens: float  # millions
    lr: tuple[float, float] = (1.0, 1.0)
    ternary: bool = True


def read_recipe(path: Path, kind: type[Mix] = Stage) -> list:
    """The stages of a recipe file."""
    return [kind(**stage) for stage in tomllib.loads(path.read_text("utf-8"))["stage"]]


def read_text(path: Path, megabytes: float | None = None) -> list[str]:
    """The documents (separated by form feeds) of a .txt or .xz file."""
    opener = lzma.open if path.suffix == ".xz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        text = file.read(int(megabytes * 1e6) if megabytes else -1)
    return [document for document in text.split("\f") if document.strip()]


def encode_documents(tokenizer: Tokenizer, documents: list[str]) -> np.ndarray:
    """All documents as token ids [n], each behind a beginning-of-text token (id 0)."""
    pieces = [np.array([0, *e.ids], np.uint16) for e in tokenizer.encode_batch(documents)]
    return np.concatenate(pieces)


def common_words(tokenizer: Tokenizer) -> list[int]:
    """Tokens that are a space and a lower-case word of at least three letters."""
    space = tokenizer.encode(" a").tokens[0][0]
    vocab = tokenizer.get_vocab()
    return sorted(
        i
        for token, i in vocab.items()
        if token[0] == space and len(token) > 3 and token[1:].isascii() and token[1:].islower()
        if token[1:].isalpha()
    )


class Batches:
    """Draws the training batches. Step i is the same whether or not training was interrupted."""

    def __init__(self, tokenizer: Tokenizer, prose: np.ndarray, tokens_per_step: int, seed: int):
        def encode(text: str) -> list[int]:
            return tokenizer.encode(text).ids

        self.prose, self.tokens_per_step, self.seed = prose, tokens_per_step, seed
        self.task = RecallTask(encode)
        self.any_word_task = RecallTask(encode, common_words(tokenizer))

    def draw(self, stage: Mix, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One batch: ids [B, T + 1], masks [B, T] of the targets without loss and of the answers.

        Without loss are the values where they are told, which are random, and the wording around
        them where the stage says so.
        """
        rng = np.random.default_rng((self.seed, step))
        lengths = [int(length) for length in stage.lengths]
        # A step of length T holds the same number of tokens whatever T is.
        length = int(rng.choice(lengths, p=normalised(stage.lengths.values())))
        rows = max(1, self.tokens_per_step // length)
        ids = np.empty((rows, length + 1), np.int64)
        silent, answers = np.zeros((rows, length), bool), np.zeros((rows, length), bool)
        for row in range(rows):
            sample = None
            if rng.random() >= stage.prose:
                sample = self._recall_row(rng, stage, length + 1)
            if sample is None:
                start = int(rng.integers(0, len(self.prose) - length - 1))
                ids[row] = self.prose[start : start + length + 1]
            else:
                ids[row, : len(sample.ids)] = sample.ids
                missing = length + 1 - len(sample.ids)
                if missing:  # a packed row: fill the rest with prose
                    start = int(rng.integers(0, len(self.prose) - missing))
                    ids[row, -missing:] = self.prose[start : start + missing]
                silent[row, sample.told - 1] = True
                if not stage.wording:  # the first token of all is nobody's target
                    silent[row, sample.wording[sample.wording > 0] - 1] = True
                answers[row, sample.answers - 1] = True
        return ids, silent, answers

    def _recall_row(self, rng: np.random.Generator, stage: Mix, length: int) -> RecallSample | None:
        packed = rng.random() < stage.packed
        if packed and stage.packed_to and length > stage.packed_to + 1:
            return None
        task = self.any_word_task if rng.random() < stage.any_word else self.task
        names = list(stage.templates)
        count = 1 if rng.random() < 0.7 else len(names)
        templates = rng.choice(names, count, p=normalised(stage.templates.values()))
        most = min(stage.max_facts, length // 32, len(NAMES))
        facts = int(np.exp(rng.uniform(0, np.log(most + 1))))  # one fact is as likely as many
        layout = {}
        if packed:
            facts = int(rng.integers(2, min(max(3, length // 24), len(NAMES) + 1)))
            layout = {"questions": (length - 14 * facts) // 10, "prose": None}
        else:
            layout = {"questions": int(rng.integers(1, 2 * facts + 2)), "prose": self.prose}
            if rng.random() < stage.apart:  # told early, asked late: the far end of the distances
                layout |= {
                    "told_until": rng.uniform(0.05, 0.5),
                    "asked_from": rng.uniform(0.5, 0.98),
                }
        sample = None
        while sample is None:
            sample = task.sample(
                rng, length, facts, templates=templates, break_before=None, **layout
            )
            layout["questions"] -= max(1, layout["questions"] // 10)
            if layout["questions"] < 1:
                return None
        return sample


def normalised(shares) -> np.ndarray:
    """Shares scaled to add up to 1."""
    shares = np.array(list(shares), float)
    return shares / shares.sum()
