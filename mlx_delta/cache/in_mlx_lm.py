"""What mlx-lm has to know of our caches: their names, and how its own store may use them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from mlx_lm.models import cache as mlx_lm_cache

from .batch import BatchDeltaKVCache
from .held import ANY_LENGTH
from .single import DeltaKVCache


def enter() -> None:
    """Enter our caches in mlx-lm.

    ``load_prompt_cache`` looks classes up by name in mlx-lm's own module. ``LRUPromptCache``, the
    store that mlx-lm's server uses, takes any number of tokens back from a cache that says that
    it can be trimmed, and does not look at how many really were. While it works, our caches say so
    only where any number is exact. It then keeps a cache for each prefix instead, as it does for
    other caches that can't be trimmed.
    """
    vars(mlx_lm_cache).update(DeltaKVCache=DeltaKVCache, BatchDeltaKVCache=BatchDeltaKVCache)
    store = mlx_lm_cache.LRUPromptCache
    for name in ("fetch_nearest_cache", "insert_cache"):
        method = getattr(store, name)
        if not hasattr(method, "__wrapped__"):
            setattr(store, name, _asking_for_any_length(method))


def _asking_for_any_length(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        token = ANY_LENGTH.set(True)
        try:
            return method(*args, **kwargs)
        finally:
            ANY_LENGTH.reset(token)

    return wrapper
