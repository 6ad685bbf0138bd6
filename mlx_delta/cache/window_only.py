"""Dropping what the delta would hold: shows what the held keys are worth."""

from __future__ import annotations

from typing import Any, ClassVar

import mlx.core as mx
from mlx_lm.models.base import create_causal_mask

from mlx_delta.config import DeltaConfig

from .batch import BatchDeltaKVCache
from .single import DeltaKVCache


def _seen(config: DeltaConfig, query: mx.array, key: mx.array) -> mx.array:
    """Which keys are near a query or sinks, of positions that broadcast."""
    near = key // config.block_size >= query // config.block_size - config.window_blocks
    return near | (key < config.sinks)


class WindowOnlyCache(DeltaKVCache):
    """The same exact pairs as a ``DeltaKVCache``, and nothing else is seen.

    A query sees its own block, the window before it, and the sinks. Far keys stay stored, which
    is simplest, and are masked.
    """

    batch_class: ClassVar[Any]

    def make_mask(
        self, N: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array:
        """Causal, and near or a sink."""
        query = mx.arange(self.offset, self.offset + N)[:, None]
        key = mx.arange(self.offset + N)[None]
        causal = create_causal_mask(N, self.offset, window_size=window_size)
        return causal & _seen(self.config, query, key)

    @property
    def zeros(self) -> mx.array:
        """As if all of an encoded block were held, but for the sinks: its keys are never seen."""
        zeros = super().zeros
        size, sinks = self.config.block_size, self.config.sinks
        dropped = size - mx.clip(sinks - size * mx.arange(zeros.shape[2]), 0, size)
        return mx.broadcast_to(dropped * self.head_dim, zeros.shape)

    @property
    def seen_tokens(self) -> int:
        """Near tokens and sinks of the first row."""
        far = self.encoded[0] * self.config.block_size
        return self.lengths[0] - far + min(self.config.sinks, far)

    def read_bytes(self, float_bytes: int | None = None) -> int:
        """Bytes of keys and values of the tokens that are seen."""
        assert self._values is not None
        keys = self._stored.read_bytes(self.seen_tokens, 0, float_bytes)
        return keys + self._values.read_bytes(self.seen_tokens, 0, float_bytes)

    def kept_nbytes(self, stored: int) -> int:
        """The share of ``stored`` bytes that a cache without the far tokens would keep."""
        capacity = -(-self.size() // self.step) * self.step
        kept = self.config.sinks + self.config.window + self.config.block_size
        return stored * min(kept, capacity) // max(1, capacity)


class BatchWindowOnlyCache(BatchDeltaKVCache):
    """Rows of :class:`WindowOnlyCache`."""

    row_class = WindowOnlyCache

    def make_mask(
        self, N: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array:
        """Causal, and near or a sink, by each row's own positions; [B, 1, N, S]."""
        query = mx.array(self.lengths)[:, None] + mx.arange(N)[None]
        mask = super().make_mask(N, return_array, window_size)
        return mask & _seen(self.config, query[:, None, :, None], mx.arange(mask.shape[3]))


WindowOnlyCache.batch_class = BatchWindowOnlyCache
