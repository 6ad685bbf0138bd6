"""Checks of caches read from a file: mlx-lm's own take whatever they are given.

Held keys check themselves when their state is set.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import CacheList, KVCache, QuantizedKVCache, RotatingKVCache

from .held import HeldKeys


def leaves(caches: Sequence[Any]) -> list[Any]:
    """The caches of a model, those within a list of caches one by one."""
    found: list[Any] = []
    for cache in caches:
        found += leaves(cache.caches) if isinstance(cache, CacheList) else [cache]
    return found


def length_of(caches: Sequence[Any]) -> int:
    """Tokens that a model's caches have seen: of the longest row, in whichever layer.

    A layer with a sliding window keeps fewer than it has seen, so that its ``size`` says little.
    """
    seen = [0]
    for cache in leaves(caches):
        offset: Any = None if isinstance(cache, HeldKeys) else getattr(cache, "offset", None)
        if isinstance(offset, mx.array):  # of a batch: one for each row
            offset = offset.max().item()
        seen.append(cache.size() if offset is None else int(offset))
    return max(seen)


def check_caches(caches: Sequence[Any]) -> None:
    """Refuse caches whose counts and arrays do not fit together, or of several texts.

    Raises:
        ValueError: The first thing found.
    """
    seen = set()
    for i, cache in enumerate(leaves(caches)):
        name = f"cache {i} ({type(cache).__name__})"
        if isinstance(cache, (KVCache, RotatingKVCache)):
            _check_arrays(name, [cache.keys], [cache.values], cache.offset)
        elif isinstance(cache, QuantizedKVCache):
            _check_quantized(name, cache)
        elif isinstance(cache, HeldKeys):
            _check_held(name, cache)
        if isinstance(cache, KVCache) and cache.keys is not None:
            _check_room(name, cache.offset, cache.keys.shape[2])
        if isinstance(cache, RotatingKVCache):
            _check_rotating(name, cache)
        if hasattr(cache, "offset"):
            seen.add(length_of([cache]))
    if len(seen) > 1:
        raise ValueError(f"its caches have seen different numbers of tokens: {sorted(seen)[:4]}")


def _check_arrays(name: str, keys: Sequence[Any], values: Sequence[Any], offset: Any) -> None:
    """Keys and values [1, Hkv, S, D or less], all of the same first dimensions; a count."""
    _check_count(name, "offset", offset)
    arrays = [*keys, *values]
    if all(x is None for x in arrays) and offset == 0:
        return
    if any(not isinstance(x, mx.array) or x.ndim != 4 for x in arrays):
        raise ValueError(f"{name} lacks keys or values")
    shapes = {x.shape[:3] for x in arrays}
    if len(shapes) > 1 or arrays[0].shape[0] != 1 or 0 in arrays[0].shape:
        raise ValueError(
            f"{name} has keys of shape {tuple(arrays[0].shape)} and values of shape "
            f"{tuple(values[0].shape)}"
        )
    for x in (keys[0], values[0]):
        floats = mx.issubdtype(x.dtype, mx.floating)
        if len(keys) == 1 and not floats or len(keys) > 1 and x.dtype != mx.uint32:
            raise ValueError(f"{name} has keys or values of type {x.dtype}")


def _check_quantized(name: str, cache: QuantizedKVCache) -> None:
    """Words, scales and biases that fit the bits and the group size."""
    _check_count(name, "group_size", cache.group_size, 32)
    if cache.bits not in (2, 4, 8) or cache.group_size not in (32, 64, 128):
        raise ValueError(f"{name} has {cache.bits} bits in groups of {cache.group_size}")
    keys: Any = cache.keys
    values: Any = cache.values
    if keys is None or values is None:
        raise ValueError(f"{name} lacks keys or values")
    _check_arrays(name, keys, values, cache.offset)
    for parts in (keys, values):
        sizes = [x.shape[3] for x in parts]
        groups = sizes[0] * 32 // cache.bits // cache.group_size
        if len(parts) != 3 or sizes[1:] != [groups, groups] or not groups:
            raise ValueError(f"{name} has codes of shape {tuple(parts[0].shape)}")
    _check_room(name, cache.offset, keys[0].shape[2])


def _check_rotating(name: str, cache: RotatingKVCache) -> None:
    """Counts of a sliding window."""
    _check_count(name, "max_size", cache.max_size, 1)
    _check_count(name, "keep", cache.keep)
    _check_count(name, "index", cache._idx)
    room = 0 if cache.keys is None else cache.keys.shape[2]
    if cache.keep > cache.max_size or cache._idx > min(room, cache.offset):
        raise ValueError(f"{name} has index {cache._idx} and keeps {cache.keep} of {room} tokens")
    if cache.offset > room and room < cache.max_size:
        raise ValueError(f"{name} counts {cache.offset} tokens in room for {room}")


def _check_held(name: str, cache: HeldKeys) -> None:
    """Of one text; whole numbers in its setting. The rest was checked when its state was set."""
    if len(cache.lengths) != 1:
        raise ValueError(f"{name} is of several texts")
    for counts in (cache.lengths, cache.encoded):
        _check_count(name, "length", counts[0])
    for what in ("block_size", "window", "sinks"):
        _check_count(name, what, getattr(cache.config, what))
    mx.array(cache.config.layer_threshold, mx.float32)  # raises if it is too large


def _check_room(name: str, offset: int, room: int) -> None:
    if offset > room:
        raise ValueError(f"{name} counts {offset} tokens in room for {room}")


def _check_count(name: str, what: str, value: Any, least: int = 0) -> None:
    if type(value) is not int or not least <= value < 1 << 31:
        raise ValueError(f"{name} has {what} {str(value)[:40]}")
