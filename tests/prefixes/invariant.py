"""The same answer, whichever way a cache came about: every setting, every way back.

    python -m tests.prefixes.invariant > docs/same-answer.md

writes the table of the documentation; the tests check the same outcomes.

A text of the demo model's tells a fact, then goes on for as long as the fact is far outside the
window. Its caches are had again in some way, a question follows, and a few tokens of the answer.
The logits of all these are compared with those of a run that was never disturbed.
"""

from __future__ import annotations

import copy
import functools
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

import mlx_delta
from mlx_delta.cache import DeltaKVCache, prompt_file, rewind
from mlx_delta.measure.settings import Setting, parse_setting
from mlx_delta.measure.text import BUNDLED_TEXT, read_text
from mlx_delta.prefixes import PrefixCache, PrefixDirectory

LENGTH = 130  # not a block's border
FACT, QUESTION = "Remember: the password of Anna is silver king. ", " The password of Anna is"
ANSWER = " silver king"
JUNK = [17, 4, 99, 1, 250]
# A batch computes several rows in one product, which may round otherwise than one row by itself;
# and where a key is rounded otherwise, its code of a few bits may be the next one.
TOLERANCE = 0.05

# Small blocks: a text of a few sentences is mostly held.
_SMALL = "delta:block_size=16,window=16"
SETTINGS = (
    "dense",
    _SMALL,
    "delta:block_size=16,window=0,keyframes=false,run_value=first,threshold=0.75",
    f"{_SMALL},key_bits=4,value_bits=16",
    f"{_SMALL},key_bits=3,value_bits=4",
    "paper:threshold=0.3",
    f"{_SMALL},key_format=codes,key_bits=4,value_bits=4",
    f"{_SMALL},key_format=codes,key_bits=3,value_bits=4,max_size=96",
    f"{_SMALL},key_format=deltas,key_bits=4,value_bits=4,max_size=96",
)


@dataclass(frozen=True)
class Outcome:
    """What a way back came to.

    Attributes:
        difference: Of the logits, the largest; 0: bit for bit.
        recalled: Whether the answer is the fact, or what the undisturbed run says.
        least: Whether bits have to be equal.
    """

    difference: float
    recalled: bool
    same_operations: bool

    @property
    def holds(self) -> bool:
        """Whether this is as it must be."""
        return self.recalled and self.difference <= (0 if self.same_operations else TOLERANCE)


@functools.cache
def demo() -> tuple[Any, list[int], list[int], list[int]]:
    """The demo model; a text with a fact, a question, and the answer."""
    model, tokenizer = mlx_delta.load("demo")
    text = tokenizer.encode(FACT)
    text += tokenizer.encode(read_text(BUNDLED_TEXT)[2000:4000], add_special_tokens=False)
    rest = (tokenizer.encode(x, add_special_tokens=False) for x in (QUESTION, ANSWER))
    question, answer = rest
    return model, text[:LENGTH], question, answer


class Run:
    """One setting: its caches after the text, and the logits of what follows, undisturbed."""

    def __init__(self, name: str):
        self.setting: Setting = parse_setting(name, demo()[0].args.delta)
        self.model, self.text, self.question, self.answer = demo()
        self.caches = self.setting.make_caches(self.model, len(self.text))
        self.setting.forward(self.model, self.text, self.caches)
        self.logits = self.go_on(copy.deepcopy(self.caches))

    def go_on(self, caches: list[Any]) -> np.ndarray:
        """Logits after the question, and after each token of the answer; [tokens, vocabulary]."""
        parts = [self.question, *([token] for token in self.answer)]
        logits = [self.setting.forward(self.model, part, caches)[-1] for part in parts]
        return np.stack([np.array(x) for x in logits])

    def forward(self, tokens: list[int], caches: list[Any]) -> None:
        """Feed some tokens."""
        self.setting.forward(self.model, tokens, caches)

    @property
    def recalls(self) -> bool:
        """Whether the undisturbed run knows the fact."""
        return self._says(self.logits)

    def _says(self, logits: np.ndarray) -> bool:
        return logits[:-1].argmax(axis=-1).tolist() == self.answer

    def outcome(self, way: str) -> Outcome:
        """Come back in a way, and compare."""
        logits = WAYS[way](self)
        difference = float(np.abs(logits - self.logits).max())
        same = np.array_equal(logits.argmax(axis=-1), self.logits.argmax(axis=-1))
        return Outcome(difference, same, way not in IN_A_BATCH)

    # Ways back.

    def from_memory(self) -> np.ndarray:
        store = PrefixCache()
        store.insert_cache("demo", self.text, self.caches)
        return self._fetched(store)

    def from_disk(self) -> np.ndarray:
        with tempfile.TemporaryDirectory() as folder:
            first = PrefixCache(directory=PrefixDirectory(folder, 1 << 30))
            first.insert_cache("demo", self.text, self.caches)
            return self._fetched(PrefixCache(directory=PrefixDirectory(folder, 1 << 30)))

    def from_a_mark(self) -> np.ndarray:
        """The text went on, and another one goes on otherwise."""
        store, caches = PrefixCache(), copy.deepcopy(self.caches)
        mark = store.mark(caches)
        self.forward(JUNK * 12, caches)
        store.insert_cache("demo", self.text + JUNK * 12, caches, marks=[mark])
        return self._fetched(store)

    def _fetched(self, store: PrefixCache) -> np.ndarray:
        caches, rest = store.fetch_nearest_cache("demo", self.text + self.question)
        assert rest == self.question, "the whole text is reused"
        return self.go_on(caches)

    def from_a_file(self) -> np.ndarray:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "x.safetensors"
            prompt_file.save(file, self.caches, {"model": "demo", "tokenizer_config": "{}"})
            caches, _ = prompt_file.load(file)
            return self.go_on(caches)

    def rewound(self) -> np.ndarray:
        caches = copy.deepcopy(self.caches)
        self.forward(JUNK, caches)
        assert rewind(caches, len(JUNK)) == 0
        return self.go_on(caches)

    def copied(self) -> np.ndarray:
        original = copy.deepcopy(self.caches)
        other = copy.deepcopy(original)
        self.forward(JUNK, original)
        return self.go_on(other)

    def left_a_batch(self) -> np.ndarray:
        """Another text joined, both went on for a step, which was taken back."""
        batch = self._batch()
        self.model(mx.array([JUNK[:1]] * 2), cache=batch)
        rewind(batch, 1) if isinstance(batch[0], DeltaKVCache) else [x.trim(1) for x in batch]
        return self.go_on([cache.extract(0) for cache in batch])

    def joined_a_batch(self) -> np.ndarray:
        batch = self._batch()
        logits = []
        for part in (self.question, *([token] for token in self.answer)):
            rows = self.model(mx.array([part] * 2), cache=batch)
            logits.append(np.array(rows[0, -1]))
        return np.stack(logits)

    def _batch(self) -> list[Any]:
        others = self.setting.make_caches(self.model, len(self.text))
        self.forward(self.text[:50], others)
        pairs = zip(copy.deepcopy(self.caches), others, strict=True)
        return [type(own).merge([own, other]) for own, other in pairs]


WAYS: dict[str, Callable[[Run], np.ndarray]] = {
    "prefix in memory": Run.from_memory,
    "prefix on disk": Run.from_disk,
    "where texts part": Run.from_a_mark,
    "prompt file": Run.from_a_file,
    "rewound": Run.rewound,
    "copied": Run.copied,
    "left a batch": Run.left_a_batch,
    "joined a batch": Run.joined_a_batch,
}
IN_A_BATCH = ("joined a batch",)


@functools.lru_cache(maxsize=1)
def run(setting: str) -> Run:
    """The run of a setting; of the last one only."""
    return Run(setting)


def main() -> None:
    """Print the page."""
    print(PAGE_BEGIN)
    print("| setting | fact recalled |", " | ".join(WAYS), "|")
    print("|---|---|" + "---|" * len(WAYS))
    for setting in SETTINGS:
        found = [run(setting).outcome(way) for way in WAYS]
        cells = ["equal" if x.difference == 0 else f"{x.difference:.0e}" for x in found]
        if not all(x.holds for x in found):
            print(f"{setting}: {found}", file=sys.stderr)
        recalled = "yes" if run(setting).recalls else "no"
        print(f"| `{setting}` | {recalled} | " + " | ".join(cells) + " |")
    print(PAGE_END)


PAGE_BEGIN = f"""\
# The same answer, whichever way back

For every setting and every way in which a cache can come about, **the next-token logits are those
of an undisturbed run with that setting, bit for bit where the operations are the same**; and a fact
that was told in the reused part is recalled as it is there.

This page is printed by `python -m tests.prefixes.invariant`, and the test suite checks the same
outcomes. The demo model reads {LENGTH} tokens whose first sentence tells a password; blocks are
small, so that it stands far outside the window. Its caches are had again in one of the ways
below; then the password is asked for, and the logits after the question and after each token of
the answer are compared with those of caches that nothing happened to. `equal`: every bit.
Otherwise the largest difference of two logits.
"""
PAGE_END = f"""
- **prefix in memory, on disk**: `PrefixCache`, which [keeps prompts](prompt-caches.md) for later
  ones; on disk after a restart.
- **where texts part**: the earlier text went on otherwise; a mark was set where the later one
  leaves it.
- **prompt file**: `--save-prompt-cache` and `--prompt-cache-file`.
- **rewound**: other tokens were fed and taken back.
- **copied**: the cache that was copied went on otherwise.
- **left a batch**: another text joined, both took a step, it was taken back, and the row left.
- **joined a batch**: question and answer are computed together with another text's. Products of
  several rows may be rounded otherwise than those of one, and a key's code may then be the next
  one: differences up to {TOLERANCE:g} pass, while the tokens are the same.

`max_size` drops the blocks between the first, in which the fact stands here, and the newest.
"""

if __name__ == "__main__":
    main()
