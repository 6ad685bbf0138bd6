"""The batch twin of :class:`mlx_delta.DeltaKVCache`: rows of different lengths."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import mlx.core as mx

from mlx_delta.config import DeltaConfig

from .held import HeldKeys
from .single import DeltaKVCache


class BatchDeltaKVCache(HeldKeys):
    """Cache of one layer for a batch whose rows have different lengths.

    mlx-lm pads prompts left or right. Here every row's token ``t`` lies at index ``t``: tokens
    before position 0 (left padding) are not stored, and those after a row's end (right padding)
    are overwritten by the tokens that follow. So blocks begin at the same positions as in a
    cache of one text, and encode to the same held keys. Rows of the paper's preset have blocks of
    their own size each, as their prompts' lengths ask for.

    Args:
        left_padding: Padding tokens in front of each row's text.
        config: The setting of this layer; the default one when not given.
    """

    row_class: ClassVar[type[DeltaKVCache]] = DeltaKVCache
    # While right padding is being fed: how much, and where each row's text ends.
    _right_padding: list[int] | None = None
    _text_ends: list[int] | None = None

    def __init__(self, left_padding: list[int], config: DeltaConfig | None = None):
        super().__init__(config)
        self._lengths = [-int(padding) for padding in left_padding]
        self._encoded = [0] * len(self._lengths)
        self._dropped = [0] * len(self._lengths)

    @property
    def offset(self) -> mx.array:
        """Position of each row's next token, [B]; negative within left padding."""
        return mx.array(self._lengths)

    def prepare(
        self,
        *,
        left_padding: list[int] | None = None,
        lengths: list[int] | None = None,
        right_padding: list[int] | None = None,
    ) -> None:
        """Announce the padding of the tokens that are about to come.

        Raises:
            ValueError: Left padding for rows that already hold tokens.
        """
        if left_padding is not None:
            if not self.empty():
                raise ValueError(
                    "[BatchDeltaKVCache.prepare] left_padding can only be added to an empty cache."
                )
            self._lengths = [
                length - int(padding)
                for length, padding in zip(self._lengths, left_padding, strict=True)
            ]
        if right_padding is not None and max(right_padding) > 0:
            self._right_padding = [int(padding) for padding in right_padding]
            if lengths is not None:
                pairs = zip(self._lengths, lengths, strict=True)
                self._text_ends = [start + int(n) for start, n in pairs]

    def finalize(self) -> None:
        """Take the announced right padding off again."""
        if self._right_padding is not None:
            pairs = zip(self._lengths, self._right_padding, strict=True)
            self._lengths = [length - padding for length, padding in pairs]
        self._right_padding = self._text_ends = None

    def _ends(self, steps: int) -> list[int]:
        ends = super()._ends(steps)
        if self._right_padding is None:
            return ends
        if self._text_ends is None:
            # No lengths were announced: the padding belongs to this one call.
            return [end - pad for end, pad in zip(ends, self._right_padding, strict=True)]
        return [min(end, text) for end, text in zip(ends, self._text_ends, strict=True)]

    def make_mask(
        self, N: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array:
        """The causal mask [B, 1, N, S] for the next ``N`` tokens; S counts this cache's indices."""
        query = mx.array(self._lengths)[:, None] + mx.arange(N)[None]
        key = mx.arange(max(self._lengths) + N)
        # Padding in front of a text sees key 0, for want of any: no row of the softmax is empty.
        mask = key <= mx.maximum(query, 0)[..., None]
        if window_size is not None:
            mask = mask & (query[..., None] < key + window_size)
        return mask[:, None]

    def filter(self, batch_indices: list[int] | mx.array) -> None:
        """Keep these rows only, in this order."""
        kept = [int(index) for index in batch_indices]
        self._written.clear()
        if self._keys is not None and self._values is not None:
            self._keys.take(kept)
            self._values.take(kept)
        self._lengths = [self._lengths[row] for row in kept]
        self._encoded = [self._encoded[row] for row in kept]
        self._dropped = [self._dropped[row] for row in kept]
        self._sizes = self._sizes and [self._sizes[row] for row in kept]

    def extend(self, other: BatchDeltaKVCache) -> None:
        """Append the rows of another batch cache."""
        _check_same_setting("BatchDeltaKVCache.extend", [self, other])
        self._append_rows([self, other])

    @classmethod
    def merge(cls, caches: list[DeltaKVCache]) -> BatchDeltaKVCache:
        """A batch cache with one row for each of these caches of a single text."""
        _check_same_setting("DeltaKVCache.merge", caches)
        merged = cls([], caches[0].config)
        merged._append_rows(caches)
        return merged

    def extract(self, idx: int) -> DeltaKVCache:
        """One row as a cache of its own."""
        size = self.block_sizes[idx]
        cache = self.row_class(dataclasses.replace(self.config, block_size=size))
        cache._lengths = [max(0, self._lengths[idx])]
        cache._encoded = [self._encoded[idx]]
        cache._dropped = [self._dropped[idx]]
        if self._keys is not None and self._values is not None:
            length = max(1, cache.kept_tokens)
            cache._keys = self._keys.row(idx, length)
            cache._values = self._values.row(idx, length)
        cache._model, cache._item_size = self._model, self._item_size
        cache._held_from = min(self._held_from, cache.offset)
        return cache

    def _append_rows(self, caches: list[Any]) -> None:
        """Become the rows of all these caches, padded at the end to one length."""
        self._written.clear()
        filled = [cache for cache in caches if not cache.empty()]
        for cache in filled:
            _check_same_model(cache, filled[0])
        if filled:
            first = filled[0]
            self._model, self._item_size = first._model, first._item_size
            stores = [
                (cache._keys, cache._values)
                if not cache.empty()
                else (first._keys.blank(rows, cache.block_sizes), first._values.blank(rows))
                for cache in caches
                for rows in [len(cache._lengths)]
            ]
            keys, values = zip(*stores, strict=True)
            self._keys, self._values = type(keys[0]).join(keys), type(values[0]).join(values)
        sizes = [size for cache in caches for size in cache.block_sizes]
        self._sizes = None if set(sizes) <= {self.config.block_size} else sizes
        self._lengths = [n for cache in caches for n in cache._lengths]
        self._encoded = [n for cache in caches for n in cache._encoded]
        self._dropped = [n for cache in caches for n in cache._dropped]
        self._held_from = max(cache._held_from for cache in caches)


DeltaKVCache.batch_class = BatchDeltaKVCache


def _check_same_model(cache: HeldKeys, other: HeldKeys) -> None:
    """Rows of one batch are of one model."""
    if cache._model != other._model:
        raise ValueError(
            "[BatchDeltaKVCache] caches of different models can't share a batch: kv heads and head "
            f"dimensions are {cache._model} and {other._model}."
        )


def _check_same_setting(where: str, caches: list) -> None:
    """Rows of one batch share thresholds, and block boundaries unless a chain runs across them."""
    settings = {_shared(cache.config) for cache in caches}
    if len(settings) > 1:
        raise ValueError(
            f"[{where}] all caches must have the same setting but got "
            f"{' and '.join(str(setting) for setting in sorted(settings, key=str)[:2])}."
        )


def _shared(config: DeltaConfig) -> DeltaConfig:
    """What rows of a batch must agree in: of the paper's preset all but the block size."""
    absolute = not config.keyframes and config.threshold_mode == "absolute"
    return dataclasses.replace(config, block_size=1) if absolute and not config.window else config
