"""Read a document once, then answer many questions about it, each with the passage it is in.

    python examples/document_qa.py examples/memory.txt
    python examples/document_qa.py report.txt "Who signed it?" "When?" --model smollm2

The document is fed once; every question goes on from a copy of its caches. --cache FILE keeps them,
so that the next start does not read it again. The passage shown is the paragraph whose words are
most like those of question and answer, rare ones counting more: a way to check an answer, not the
model's own reason for it.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import math
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx_delta
from mlx_delta.cache import length_of, prompt_file
from mlx_delta.chat import stopped_by_interrupt
from mlx_delta.generate import make_caches
from mlx_delta.generate.checks import check_prompt
from mlx_delta.generate.conversation import render
from mlx_delta.measure.text import read_text
from mlx_delta.system.cli import run_command

import mlx.core as mx  # isort: skip  (after mlx_delta: it chooses the BLAS)

STEP = 512  # tokens fed at a time
ASK = "Answer from this text.\n\n"
MARK = "a1question0b"
WORD = re.compile(r"\w+")


def main() -> int:
    """Read and answer; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("document", help="a text file")
    parser.add_argument("questions", nargs="*", help="without any they are read from the terminal")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--max-tokens", type=int, default=24)
    parser.add_argument("--cache", help="keep what was read in this .safetensors file")
    args = parser.parse_args()
    return run_command(lambda: run(args), "use a shorter document or a smaller model")


def run(args: argparse.Namespace) -> None:
    text = read_text(args.document)
    document = Document(args.model, text)
    document.read(None if args.cache is None else Path(args.cache))
    passages = Passages(text)
    for question in args.questions or questions():
        if args.questions:
            print(f"\n> {question}")
        answer = ""
        stopped: list[bool] = []
        with stopped_by_interrupt(lambda: stopped.append(True)):  # noqa: B023 (used at once)
            for piece in document.answer(question, args.max_tokens):
                print(piece, end="", flush=True)
                answer += piece
                if stopped:
                    break
        number, passage = passages.nearest(f"{question} {answer}")
        print(f"\n  [paragraph {number}] {passage}")


def questions() -> Iterator[str]:
    """What is typed, or comes through a pipe, line by line."""
    while True:
        if sys.stdin.isatty():
            print("\n> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


class Document:
    """A model that has read a text.

    Args:
        name: The model's.
        text: The text.
    """

    def __init__(self, name: str, text: str):
        self.model, self.tokenizer = mlx_delta.load(name)
        before, self._after = self._around(text)
        self._tokens = self.tokenizer.encode(before, add_special_tokens=not self._chats)
        check_prompt("document_qa", self.model, self._tokens)
        self._known = {"model": name, "text": hashlib.sha256(before.encode()).hexdigest()}
        self._caches: list[Any] = []

    @property
    def _chats(self) -> bool:
        return bool(self.tokenizer.has_chat_template)

    def _around(self, text: str) -> tuple[str, str]:
        """What comes before a question, the text in it, and after."""
        if not self._chats:
            return text + "\n\n", ""
        message = {"role": "user", "content": f"{ASK}{text}\n\n{MARK}"}
        before, _, after = render(self.tokenizer, [message]).rpartition(MARK)
        return before, after

    def read(self, file: Path | None) -> None:
        """Take the caches from the file, or make them and put them there."""
        if file is not None and file.exists():
            caches, known = prompt_file.load(file)
            same = all(known.get(name) == value for name, value in self._known.items())
            if same and length_of(caches) == len(self._tokens):
                self._caches = caches
                print(f"{file}: {len(self._tokens)} tokens, read before", file=sys.stderr)
                return
            raise ValueError(f"{file} is of another text or model; remove it, or give --cache.")
        if file is not None:
            prompt_file.check_writable(file)
        caches = make_caches(self.model, len(self._tokens))
        for start in range(0, len(self._tokens), STEP):
            self.model(mx.array([self._tokens[start : start + STEP]]), cache=caches)
            mx.eval([cache.state for cache in caches])  # not the logits of every token
        self._caches = caches
        megabytes = sum(cache.nbytes for cache in caches) / 1e6
        print(f"{len(self._tokens)} tokens read, {megabytes:.1f} MB of cache", file=sys.stderr)
        if file is not None:
            prompt_file.save(file, caches, {**self._known, "tokenizer_config": "{}"})
            print(f"kept in {file}", file=sys.stderr)

    def answer(self, question: str, max_tokens: int) -> Iterator[str]:
        """The answer in pieces; the caches of the document stay as they are."""
        if question != question.encode("utf-8", "replace").decode():
            raise ValueError("the question is not UTF-8 text.")
        ids = self.tokenizer.encode(question + self._after, add_special_tokens=False)
        for response in mlx_delta.stream_generate(
            self.model,
            self.tokenizer,
            ids,
            prompt_cache=copy.deepcopy(self._caches),
            max_tokens=max_tokens,
        ):
            yield response.text


class Passages:
    """The paragraphs of a text, to find the one that some words are from."""

    def __init__(self, text: str):
        self._paragraphs = [" ".join(p.split()) for p in re.split(r"\n\s*\n", text) if p.strip()]
        self._words = [set(words(paragraph)) for paragraph in self._paragraphs]
        self._frequency = Counter(word for found in self._words for word in found)

    def nearest(self, text: str) -> tuple[int, str]:
        """Number, from 1, and text of the paragraph that shares most with ``text``."""
        asked = set(words(text))
        scores = [
            sum(math.log(1 + len(self._words) / self._frequency[word]) for word in asked & found)
            / math.sqrt(1 + len(found))
            for found in self._words
        ]
        best = max(range(len(scores)), key=scores.__getitem__)
        return best + 1, self._paragraphs[best]


def words(text: str) -> list[str]:
    return [word.lower() for word in WORD.findall(text)]


if __name__ == "__main__":
    sys.exit(main())
