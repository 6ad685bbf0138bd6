"""Caches of single layers without held keys: mlx-lm's own, cut into blocks, or kept whole.

As :mod:`mlx_delta.prefixes.leaves`, which has those of held and coded keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models.cache import KVCache, QuantizedKVCache, _BaseCache

from mlx_delta.cache import DeltaKVCache

from .raw import Piece, from_raw, padded, to_raw, type_name

PLAIN_SIZE = 64  # tokens in a block of caches that have no blocks of their own


class PlainLeaf:
    """One of mlx-lm's caches of ordinary keys and values, quantized or not; as ``HeldLeaf``.

    Args:
        cache: It.
        size: Tokens in a block.
    """

    def __init__(self, cache: Any, size: int):
        self.length = int(cache.offset)
        self.size = size
        keys, values = cache.keys, cache.values
        pairs = zip("kv", (keys, values), strict=True)
        if isinstance(cache, QuantizedKVCache):
            found = {f"{name}{i}": x for name, parts in pairs for i, x in enumerate(parts)}
            options = {"group_size": cache.group_size, "bits": cache.bits}
        else:
            found, options = dict(pairs), {}
        mx.eval(list(found.values()))
        self.arrays = {name: to_raw(x) for name, x in found.items()}
        self.entry = {
            "kind": "plain",
            "class": type(cache).__name__,
            "options": options,
            "shapes": {name: [x.shape[1], *x.shape[3:]] for name, x in found.items()},
            "types": {name: type_name(x) for name, x in found.items()},
        }

    @staticmethod
    def of(cache: Any, size: int) -> PlainLeaf | None:
        """The cache in a form that can be cut; ``None`` if it is no such cache of one text."""
        if type(cache) not in (KVCache, QuantizedKVCache) or cache.keys is None:
            return None
        keys = cache.keys[0] if type(cache) is QuantizedKVCache else cache.keys
        return PlainLeaf(cache, size) if keys.shape[0] == 1 else None

    def block(self, i: int) -> Piece:
        """Keys and values of block ``i``."""
        return {n: x[0, :, i * self.size : (i + 1) * self.size] for n, x in self.arrays.items()}

    @staticmethod
    def nothing(entry: dict[str, Any], block: Piece) -> Piece:
        """An end without tokens, of the same shapes as a block."""
        return {name: x[:, :0] for name, x in block.items()}

    def end(self, base: int, first: int) -> Piece:
        """Keys and values from block ``base`` on."""
        return {n: x[0, :, base * self.size : self.length] for n, x in self.arrays.items()}

    @staticmethod
    def build(
        entry: dict[str, Any], blocks: Sequence[Piece], end: Piece, first: int, length: int
    ) -> Any:
        """The cache of blocks, and of what follows them."""
        found: Any = KVCache if entry["class"] == "KVCache" else QuantizedKVCache
        step = found.step
        capacity = -(-length // step) * step
        made = {}
        for name, kind in entry["types"].items():
            whole = np.concatenate([*(block[name] for block in blocks), end[name]], axis=1)
            made[name] = from_raw(padded(whole, capacity, 1)[None], kind)
        cache = found(**entry["options"])
        if found is KVCache:
            cache.keys, cache.values = made["k"], made["v"]
        else:
            cache.keys = tuple(made[f"k{i}"] for i in range(3))
            cache.values = tuple(made[f"v{i}"] for i in range(3))
        cache.offset = length
        return cache


class WholeLeaf:
    """A cache that can't be cut, and is kept as it is for each place where a text goes on."""

    def __init__(self, cache: Any):
        self.entry: dict[str, Any] = {"kind": "whole", "class": type(cache).__name__}
        if isinstance(cache, DeltaKVCache):
            self.entry["config"] = cache.config.to_dict(whole=True)
        self.arrays: list[mx.array] = []
        self.form = self._take_apart(cache.state)
        mx.eval(self.arrays)

    @staticmethod
    def fits(cache: Any) -> bool:
        """Whether a cache is one of mlx-lm's for one text, whose state says everything."""
        found = getattr(mlx_lm_cache, type(cache).__name__, None)
        own = found is type(cache) and issubclass(found, _BaseCache)
        try:
            return own and not type(cache).__name__.startswith("Batch") and not cache.empty()
        except NotImplementedError:
            return False

    def _take_apart(self, value: Any) -> Any:
        """A state as JSON values, with its arrays' numbers and types in their places."""
        if isinstance(value, mx.array):
            self.arrays.append(value)
            return {"array": len(self.arrays) - 1, "type": type_name(value)}
        if isinstance(value, (list, tuple)):
            return {type(value).__name__: [self._take_apart(x) for x in value]}
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        raise TypeError(f"a state holds a {type(value).__name__}")

    def end(self) -> Piece:
        """All arrays."""
        return {str(i): to_raw(x) for i, x in enumerate(self.arrays)}

    @staticmethod
    def build(entry: dict[str, Any], form: Any, end: Piece) -> Any:
        """The cache of a state taken apart."""

        def together(value: Any) -> Any:
            if not isinstance(value, dict):
                return value
            if "array" in value:
                return from_raw(end[str(value["array"])], value["type"])
            if "tuple" in value:
                return tuple(together(x) for x in value["tuple"])
            return [together(x) for x in value["list"]]

        found = getattr(mlx_lm_cache, entry["class"])
        return found.from_state(together(form))
