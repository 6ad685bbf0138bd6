"""The caches of past requests, for those that begin alike."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from mlx_lm.models.cache import LRUPromptCache

from mlx_delta.cache import length_of, rewind

_log = logging.getLogger(__name__)


class Prefixes:
    """A store of mlx-lm's kind, asked and filled so that what comes of it is exact.

    * A prompt is never found whole: its last token is to be fed, for its logits begin the answer.
      mlx-lm's server ends when that happens.
    * What a cache holds and what it is said to hold agree. With a draft model mlx-lm's last token
      is not in the caches, and the draft's may lack two.

    Args:
        store: mlx-lm's ``LRUPromptCache``, or one with its methods.
    """

    def __init__(self, store: Any):
        self._store = store

    def close(self) -> None:
        """Let go of all caches in memory."""
        if hasattr(self._store, "close"):
            self._store.close()
        self._store = LRUPromptCache(0)

    def shrink(self) -> None:
        """Let go of the caches in memory."""
        self._store.trim_to(n_sequences=0)

    def __len__(self) -> int:
        return len(self._store)

    @property
    def nbytes(self) -> int:
        """Bytes of all caches."""
        return int(self._store.nbytes)

    def find(self, model: Any, tokens: list[int]) -> tuple[list[Any] | None, int]:
        """Caches of the longest known begin of a prompt, and its length; they are the caller's."""
        if len(tokens) < 2:
            return None, 0
        try:
            cache, rest = self._store.fetch_nearest_cache(model, tokens)
            if cache is not None and not rest:
                cache, rest = self._store.fetch_nearest_cache(model, tokens[:-1])
                rest = [*rest, tokens[-1]]
        except (OSError, ValueError) as error:  # of files: the prompt is read instead
            _log.warning("no caches are found: %s", error)
            return None, 0
        if cache is None:
            return None, 0
        found = len(tokens) - len(rest)
        return (cache, found) if found and length_of(cache) == found else (None, 0)

    def keep(
        self, model: Any, tokens: list[int], parts: Sequence[list[Any]], kind: str = "assistant"
    ) -> None:
        """Take caches in.

        Args:
            model: What tells models apart.
            tokens: What they hold, or more.
            parts: The model's caches, and after them a draft model's.
            kind: mlx-lm's: ``system``, ``user`` or ``assistant``.
        """
        length = min([len(tokens), *map(length_of, parts)])
        for caches in parts:
            if length_of(caches) > length:
                try:
                    rewind(caches, length_of(caches) - length)
                except ValueError:  # a sliding window that is full
                    return
                if length_of(caches) < length:
                    return
        if length:
            joined = [cache for caches in parts for cache in caches]
            try:
                self._store.insert_cache(model, list(tokens[:length]), joined, cache_type=kind)
            except OSError as error:  # of files: the answer is there all the same
                _log.warning("caches are not kept: %s", error)


def cut_known(
    segments: list[list[int]], kinds: list[str], known: int
) -> tuple[list[list[int]], list[str]]:
    """What is left of a prompt's segments when its first ``known`` tokens are in caches."""
    left, left_kinds = [], []
    for segment, kind in zip(segments, kinds, strict=True):
        if known < len(segment):
            left.append(segment[known:])
            left_kinds.append(kind)
        known = max(0, known - len(segment))
    return left, left_kinds
