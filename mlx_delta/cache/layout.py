"""The caches of a whole model: which of them hold ordinary keys and values.

mlx-lm gives a model one cache for each layer, or for each layer that needs one; some of them are
lists of caches in turn. Only a plain ``KVCache`` stands for keys and values of all tokens: windows
(``RotatingKVCache``), chunks and recurrent states (``ArraysCache``) are a model's own affair.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import CacheList, KVCache

from .single import DeltaKVCache


def map_caches(caches: Sequence[Any], change: Callable[[Any, int], Any]) -> list[Any]:
    """Put each cache through a function, those within a ``CacheList`` too.

    Args:
        caches: Of a model, one for each layer that has one.
        change: Called with a cache and its index in ``caches``; returns what takes its place.
    """

    def put(cache: Any, index: int) -> Any:
        if isinstance(cache, CacheList):
            return CacheList(*(put(inner, index) for inner in cache.caches))
        return change(cache, index)

    return [put(cache, index) for index, cache in enumerate(caches)]


def settle(caches: Any) -> None:
    """Compute all that caches of a model, or of several texts, keep, so that any thread can go on.

    Some of it, such as codes of a block that is complete, is needed by later tokens only.
    """
    if isinstance(caches, (list, tuple)):
        for cache in caches:
            settle(cache)
    elif not caches.empty():
        mx.eval(caches.state)


def replace_ordinary(caches: Sequence[Any], make: Callable[[int], Any]) -> list[Any]:
    """The caches, with new ones in place of those that hold ordinary keys and values.

    Args:
        caches: Of a model, one for each layer that has one.
        make: Called with the index in ``caches``; returns the new cache.
    """
    return map_caches(
        caches, lambda cache, i: make(i) if type(cache) in (KVCache, DeltaKVCache) else cache
    )
