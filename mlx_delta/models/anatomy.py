"""What a model's layers attend with, found by watching one call rather than by names.

A call of two tokens is traced: its graph is made and never computed, so no weight is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import scaled_dot_product_attention
from mlx_lm.models.cache import CacheList, KVCache, RotatingKVCache, make_prompt_cache

from mlx_delta.attention.handed import Handed, HandedKeys, hook
from mlx_delta.cache.layout import replace_ordinary

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
        An entry for each of the caches (:func:`~mlx_delta.cache.layout.single_caches`); ``None``
        where a cache holds something else than keys and values.

    Raises:
        NotHanded: A layer computes with keys that it gets from its cache.
    """
    hook(model)
    tracers: list[_Tracer | None] = []
    caches = [_traced(cache, tracers) for cache in dense_caches(model)]
    try:
        for steps in (2, 1):  # some models take another path for one token
            model(mx.zeros((1, steps), mx.int32), cache=caches)
    except Exception as error:  # whatever a model does with an object that is not an array
        raise NotHanded(str(error)) from error
    heads = []
    for tracer in tracers:
        if tracer is not None and tracer.updated and tracer.heads is None:
            raise NotHanded("keys are fetched and not attended to")
        heads.append(None if tracer is None else tracer.heads)
    return heads


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


class _TracedKeys(HandedKeys):
    """Keys that note who attends to them."""

    def __init__(self, tracer: _Tracer, keys: mx.array, values: mx.array):
        super().__init__(keys.shape, keys.dtype)
        self.values = Handed(values.shape, values.dtype)
        self._tracer = tracer
        self._arrays = keys, values

    def attend(
        self, queries: mx.array, scale: float, mask: Any, head_sinks: mx.array | None
    ) -> mx.array:
        self._tracer.see(queries, *self._arrays)
        return scaled_dot_product_attention(
            queries, *self._arrays, cache=None, scale=scale, mask=mask, sinks=head_sinks
        )


class _Tracer:
    """One of mlx-lm's caches of keys and values, watched."""

    def __init__(self, cache: Any):
        self._cache = cache
        self._fetched: _TracedKeys | None = None
        self._readers = 0
        self.updated = False
        self.heads: Heads | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[HandedKeys, Handed]:
        self.updated, self._readers = True, 0
        self._fetched = _TracedKeys(self, *self._cache.update_and_fetch(keys, values))
        return self.keys_and_values()

    def keys_and_values(self) -> tuple[HandedKeys, Handed]:
        assert self._fetched is not None
        return self._fetched, self._fetched.values

    def see(self, queries: mx.array, keys: mx.array, values: mx.array) -> None:
        self._readers += queries.shape[1]
        self.heads = Heads(self._readers, keys.shape[1], keys.shape[3], values.shape[3])


def _traced(cache: Any, tracers: list[_Tracer | None]) -> Any:
    """A cache, watched if it holds keys and values; notes its tracer."""
    if type(cache) is CacheList:
        return CacheList(*(_traced(inner, tracers) for inner in cache.caches))
    if type(cache) in (KVCache, RotatingKVCache):
        tracers.append(_Tracer(cache))
        return tracers[-1]
    tracers.append(None)
    return cache


def kinds(caches: Sequence[Any]) -> str:
    """The kinds of caches by their names, each once."""
    return ", ".join(sorted({type(cache).__name__ for cache in caches}))
