"""A prompt's way through --cache-dir: what is known of it is not read again, the rest is kept."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

import mlx.nn as nn

from mlx_delta.prefixes import Mark, PrefixCache, PrefixDirectory, fingerprint
from mlx_delta.prefixes.chain import in_common
from mlx_delta.system.memory import parse_bytes

from .conversation import opening
from .saved import Fed, feed

# Options that change what caches hold, besides the model and its setting.
_OPTIONS = ("kv_bits", "kv_group_size", "quantized_kv_start", "max_kv_size")
# Shorter beginnings are not worth a place of their own.
_LEAST = 64


class Kept:
    """The prefixes of a directory, for one prompt of one model.

    Args:
        args: The command line, with --cache-dir.
        model: Loaded.
        tokenizer: Its tokenizer.
        options: mlx-lm's options.
        processes: That share the model.

    Raises:
        ValueError: There are several: one might find what another does not.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        model: nn.Module,
        tokenizer: Any,
        options: dict[str, Any],
        processes: int = 1,
    ):
        if processes > 1:
            raise ValueError("--cache-dir does not go together with several processes; drop it.")
        directory = PrefixDirectory(args.cache_dir, parse_bytes(args.cache_budget), _say)
        self._store = PrefixCache(directory=directory)
        self._name = fingerprint(model, *(options.get(name) for name in _OPTIONS))
        self._model = model
        self._options = options
        self._opening = opening(args, tokenizer)
        self._tokens: list[int] = []
        self._marks: list[Mark] = []
        self.found = 0  # tokens that were not read again
        self.caches: list[Any] = []

    def begin(
        self, tokens: Sequence[int], rest: Sequence[int], fresh: list[Any]
    ) -> tuple[list[int], Fed]:
        """Find what is known of a prompt, and read on to where other prompts may part from it.

        Args:
            tokens: The prompt.
            rest: What follows it before the answer; not looked for.
            fresh: New caches for it.

        Returns:
            The tokens of the prompt still to be fed to ``caches``, and what was fed.
        """
        start = time.perf_counter()
        self._tokens = [*tokens, *rest]
        found, left = self._store.fetch_nearest_cache(self._name, tokens, fresh)
        self.caches = fresh if found is None else found
        self.found = read = len(tokens) - len(left)
        parting = self._store.known_blocks(self._name, tokens, fresh)
        for place in sorted({parting, in_common(self._opening, tokens)}):
            if max(read, _LEAST - 1) < place < len(tokens):
                feed(self._model, list(tokens[read:place]), self.caches, self._options)
                read = place
                self.mark()
        seconds = time.perf_counter() - start
        return list(tokens[read:]), Fed(read - self.found, seconds)

    def mark(self) -> None:
        """Let other prompts go on from here."""
        mark = self._store.mark(self.caches)
        if mark is not None:
            self._marks.append(mark)

    def progress(self, done: int, whole: int) -> None:
        """mlx-lm's callback, of the tokens that :meth:`begin` returned."""
        if 0 < done < whole:
            self.mark()
            self.keep(end=False)

    def keep(self, answer: Sequence[int] = (), end: bool = True) -> None:
        """Keep prompt and answer, as far as the caches have them.

        Args:
            answer: Tokens of it so far.
            end: Whether the text is over: else only what is marked is kept.
        """
        tokens = [*self._tokens, *answer]
        self._store.insert_cache(self._name, tokens, self.caches, marks=self._marks, end=end)


def _say(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)
