"""How mlx-lm's own store of prompt caches, ``LRUPromptCache``, may use ours."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from mlx_lm.models.cache import LRUPromptCache

from .held import ANY_LENGTH


def teach_store() -> None:
    """Let mlx-lm's store take back only what is exact.

    The store, which its server uses, takes any number of tokens back from a cache that says that
    it can be trimmed, and does not look at how many really were. While it works, our caches say so
    only where any number is exact. It then keeps a cache for each prefix instead, as it does for
    other caches that can't be trimmed.
    """
    for name in ("fetch_nearest_cache", "insert_cache"):
        method = getattr(LRUPromptCache, name)
        if not hasattr(method, "__wrapped__"):
            setattr(LRUPromptCache, name, _asking_for_any_length(method))


def _asking_for_any_length(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        token = ANY_LENGTH.set(True)
        try:
            return method(*args, **kwargs)
        finally:
            ANY_LENGTH.reset(token)

    return wrapper
