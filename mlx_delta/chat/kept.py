"""The caches of a conversation, and which tokens they hold: brought to a prompt, and kept after."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_delta.cache import HeldKeys, length_of
from mlx_delta.cache.check_state import leaves
from mlx_delta.cache.marks import Mark, go_to, mark
from mlx_delta.cache.rewinding import reachable
from mlx_delta.generate import make_caches
from mlx_delta.prefixes.chain import in_common

from .going_back import go_back
from .options import Progress

MOST_MARKS = 7  # of the last three exchanges: where a question begins, its answer, and the end


class KeptCaches:
    """Caches of a model and of its draft model, if there is one.

    Args:
        model: The model.
        draft_model: The draft model.
        max_kv_size: Tokens that the model's caches keep; ``None``: all.

    Attributes:
        caches: The model's; none before anything was fed.
        draft_caches: The draft model's.
        known: The tokens that they hold.
    """

    def __init__(self, model: nn.Module, draft_model: nn.Module | None, max_kv_size: int | None):
        self.model = model
        self.draft_model = draft_model
        self.max_kv_size = max_kv_size
        self.check_size()
        self.forget()

    def check_size(self) -> None:
        """Refuse a number of tokens to keep that is too small for the model's setting.

        Raises:
            ValueError: It is; before anything is fed.
        """
        if self.max_kv_size is not None:
            make_caches(self.model, None, self.max_kv_size)

    def forget(self) -> None:
        """Drop the caches."""
        self._marks: list[list[Mark]] = []  # one for each model, the furthest last
        self.caches: list[Any] = []
        self.draft_caches: list[Any] = []
        self.known: list[int] = []

    def copy(self) -> KeptCaches:
        """Others that hold the same."""
        other = copy.copy(self)
        other.caches = copy.deepcopy(self.caches)
        other.draft_caches = copy.deepcopy(self.draft_caches)
        return other

    @contextlib.contextmanager
    def whole_or_nothing(self) -> Iterator[None]:
        """After an error within a step some layers may be ahead of others: drop the caches."""
        try:
            yield
        except GeneratorExit:  # between two steps
            raise
        except BaseException:
            self.forget()
            raise

    def go_back_to(self, tokens: list[int]) -> int:
        """Take the caches back to what they share with a prompt; how much that is."""
        if not self.caches:
            self.caches = make_caches(self.model, len(tokens), self.max_kv_size)
            if self.draft_model is not None:
                self.draft_caches = make_caches(self.draft_model, len(tokens))
        start = self._go_back(in_common(tokens, self.known))
        if start is None:  # a cache that can't be taken back
            self.forget()
            return self.go_back_to(tokens)
        self.known = tokens[:start]
        return start

    def _go_back(self, length: int) -> int | None:
        """Go back to ``length``, or the nearest place before it that can be reached exactly."""
        groups = [caches for caches in (self.caches, self.draft_caches) if caches]
        self._marks = [place for place in self._marks if place[0].length <= length]
        reached = min(reachable(caches, min(length, length_of(caches))) for caches in groups)
        if self._marks and reached < self._marks[-1][0].length:
            for caches, place in zip(groups, self._marks[-1], strict=True):
                if not go_to(caches, place):
                    return None
            return self._marks[-1][0].length
        return go_back(groups, length)

    def mark(self) -> None:
        """Remember the end of what was fed as a place to go back to."""
        groups = [caches for caches in (self.caches, self.draft_caches) if caches]
        length = len(self.known)
        if not length or any(length_of(caches) != length for caches in groups):
            return
        place = [mark(caches) for caches in groups]
        whole = [found for found in place if found is not None]
        if len(whole) == len(groups):
            self._marks = [*self._marks, whole][-MOST_MARKS:]

    def feed(
        self,
        prompt: list[int],
        end: int,
        step: int,
        stopped: Callable[[], bool],
        on_progress: Progress | None = None,
    ) -> Iterator[tuple[int, int]]:
        """Bring the caches to the first ``end`` tokens of a prompt.

        Yields:
            Before the first step and after each: the tokens that were there, and those fed since.
        """
        reused = start = self.go_back_to(prompt[:end])
        for cache in leaves([*self.caches, *self.draft_caches]):
            if isinstance(cache, HeldKeys):
                cache.prompt_length = len(prompt)
        yield reused, 0
        while start < end and not stopped():
            part = prompt[start : min(end, start + step)]
            _step(self.model, part, self.caches)
            if self.draft_model is not None:
                _step(self.draft_model, part, self.draft_caches)
            start += len(part)
            self.known = prompt[:start]
            if on_progress is not None:
                on_progress(start - reused, end - reused)
            yield reused, start - reused
        if start == end:
            self.mark()

    def settle(self, tokens: list[int]) -> None:
        """Note what was fed, of which the caches may lack the end or hold a little more."""
        groups = [self.caches, self.draft_caches]
        if go_back(groups, len(tokens)) is None:
            self.forget()
            return
        held = min(length_of(group) for group in groups if group)
        go_back(groups, held)  # a draft model's may be a token behind
        self.known = tokens[:held]
        self.mark()


def _step(model: nn.Module, tokens: list[int], caches: list[Any]) -> None:
    """Feed tokens; only the caches are computed, since nobody asks for the logits."""
    model(mx.array([tokens]), cache=caches)
    mx.eval([cache.state for cache in caches])
    mx.clear_cache()
