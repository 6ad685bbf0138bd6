"""What a model's layers attend with, found by watching one call rather than by names.

A call of two tokens is traced: its graph is made and never computed, so no weight is read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import scaled_dot_product_attention
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

from mlx_delta.attention.handed import Handed, HandedKeys, hook
from mlx_delta.cache.layout import map_caches, replace_ordinary

# Names that a context's length goes by in configurations of mlx-lm's models.
CONTEXT_NAMES = (
    "max_position_embeddings",
    "max_sequence_length",
    "max_seq_len",
    "seq_length",
    "n_positions",
    "n_ctx",
    "max_context_length",
)


@dataclass(frozen=True)
class Heads:
    """How the layers attend that read one cache.

    Attributes:
        queries: Query heads, over all of the layers that read this cache.
        kv_heads: Heads of keys and values.
        key_dim: Elements of a key.
        value_dim: Elements of a value.
    """

    queries: int
    kv_heads: int
    key_dim: int
    value_dim: int


class NotHanded(Exception):
    """A layer does something else with its keys than pass them on to mlx-lm's attention."""


def dense_caches(model: nn.Module) -> list[Any]:
    """New caches of mlx-lm's for a model, whether the delta is on or off."""
    return replace_ordinary(make_prompt_cache(model), lambda _: KVCache())


def trace_heads(model: nn.Module) -> list[Heads | None]:
    """How a model attends to each of its caches.

    Args:
        model: From :func:`mlx_delta.load` or mlx-lm's.

    Returns:
        An entry for each of the caches (:func:`~mlx_delta.cache.check_state.leaves`); ``None``
        where a cache holds something else than keys and values.

    Raises:
        NotHanded: A layer computes with keys that it gets from its cache.
    """
    found: dict[int, Heads] = {}
    watched: dict[int, WatchedCache] = {}
    kept = 0

    def watch(cache: Any, _: int) -> Any:
        nonlocal kept
        index, kept = kept, kept + 1
        if type(cache) not in (KVCache, RotatingKVCache):
            return cache

        def see(queries: mx.array, keys: mx.array, values: mx.array, scale: float) -> None:
            others = found[index].queries if index in found else 0  # that share the keys
            readers = others + queries.shape[1]
            found[index] = Heads(readers, keys.shape[1], keys.shape[3], values.shape[3])

        watched[index] = WatchedCache(cache, see)
        return watched[index]

    hook(model)
    caches = map_caches(dense_caches(model), watch)
    try:
        for steps in (2, 1):  # some models take another path for one token
            found.clear()
            model(mx.zeros((1, steps), mx.int32), cache=caches)
    except Exception as error:  # whatever a model does with an object that is not an array
        raise NotHanded(str(error)) from error
    if any(cache.fetched and index not in found for index, cache in watched.items()):
        raise NotHanded("keys are fetched and not attended to")
    return [found.get(index) for index in range(kept)]


def watched_caches(
    model: nn.Module, see: Callable[[int, mx.array, mx.array, float], None]
) -> list[Any]:
    """Caches of mlx-lm's for a model, of which those of ordinary keys show what they are read with.

    Args:
        model: From :func:`mlx_delta.load`.
        see: Called with the index of a cache, queries [B, Hq, L, D], all keys [B, Hkv, S, D] and
            the factor on the scores, for each layer that attends to the cache.
    """
    hook(model)

    def watch(cache: Any, index: int) -> Any:
        if type(cache) is not KVCache:
            return cache
        return WatchedCache(cache, lambda q, k, _, scale: see(index, q, k, scale))

    return map_caches(dense_caches(model), watch)


def query_heads(model: nn.Module) -> list[int | None]:
    """Query heads that read each of a model's caches; ``None`` for one without keys.

    Where a model's attention can't be watched, its configuration is believed.
    """
    try:
        return [None if heads is None else heads.queries for heads in trace_heads(model)]
    except NotHanded:
        count = getattr(model.args, "num_attention_heads", None)
        return [count for _ in dense_caches(model)]


def context_length(model: Any) -> int | None:
    """How many tokens a model was made for, where its configuration says so."""
    for args in _configurations(model):
        for name in CONTEXT_NAMES:
            found = args.get(name) if isinstance(args, dict) else getattr(args, name, None)
            if isinstance(found, int) and found > 0:
                return found
    return None


def _configurations(model: Any) -> list[Any]:
    """A model's configuration, and that of its text part, if it has one."""
    found = [getattr(model, name, None) for name in ("args", "config")]
    found = [args for args in found if args is not None]
    inner = [getattr(args, "text_config", None) for args in found]
    return found + [args for args in inner if args is not None]


class WatchedCache:
    """One of mlx-lm's caches of keys and values; says when a layer attends to it.

    Args:
        cache: It.
        see: Called with queries [B, Hq, L, D], keys [B, Hkv, S, D], values [B, Hkv, S, Dv] and
            the factor on the scores.
    """

    def __init__(self, cache: Any, see: Callable[[mx.array, mx.array, mx.array, float], None]):
        self._cache = cache
        self._see = see
        self.fetched: _WatchedKeys | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[HandedKeys, Handed]:
        """Append keys and values; all of them, to be handed on."""
        keys, values = self._cache.update_and_fetch(keys, values)
        self.fetched = _WatchedKeys(keys, values, self._see)
        return self.keys_and_values()

    def keys_and_values(self) -> tuple[HandedKeys, Handed]:
        """What was fetched last."""
        if self.fetched is None:
            raise ValueError("a layer asks for shared keys before they are computed")
        return self.fetched, self.fetched.values


class _WatchedKeys(HandedKeys):
    """Keys that say when they are attended to."""

    def __init__(self, keys: mx.array, values: mx.array, see: Callable[..., None]):
        super().__init__(keys.shape, keys.dtype)
        self.values = Handed(values.shape, values.dtype)
        self._arrays = keys, values
        self._see = see

    def attend(
        self, queries: mx.array, scale: float, mask: Any, head_sinks: mx.array | None
    ) -> mx.array:
        """mlx-lm's attention of queries [B, Hq, L, D]; [B, Hq, L, Dv]."""
        self._see(queries, *self._arrays, scale)
        return scaled_dot_product_attention(
            queries, *self._arrays, cache=None, scale=scale, mask=mask, sinks=head_sinks
        )
