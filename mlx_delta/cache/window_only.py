"""Dropping what the delta would hold: shows what the held keys are worth."""

from __future__ import annotations

import mlx.core as mx
from mlx_lm.models.base import create_causal_mask

from .single import DeltaKVCache


class WindowOnlyCache(DeltaKVCache):
    """The same exact pairs as a ``DeltaKVCache``, and nothing else is seen.

    A query sees its own block, the window before it, and the sinks. Far keys stay stored, which
    is simplest, and are masked.
    """

    def make_mask(
        self, N: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array:
        """Causal, and near or a sink."""
        config = self.config
        query = mx.arange(self.offset, self.offset + N)[:, None]
        key = mx.arange(self.offset + N)[None]
        near = key // config.block_size >= query // config.block_size - config.window_blocks
        causal = create_causal_mask(N, self.offset, window_size=window_size)
        return causal & (near | (key < config.sinks))

    @property
    def zeros(self) -> mx.array:
        """As if all of an encoded block were held, but for the sinks: its keys are never seen."""
        zeros = super().zeros
        size, sinks = self.config.block_size, self.config.sinks
        dropped = size - mx.clip(sinks - size * mx.arange(zeros.shape[2]), 0, size)
        return mx.broadcast_to(dropped * self.head_dim, zeros.shape)

    def kept_nbytes(self, stored: int) -> int:
        """The share of ``stored`` bytes that a cache without the far tokens would keep."""
        capacity = -(-self.size() // self.step) * self.step
        kept = self.config.sinks + self.config.window + self.config.block_size
        return stored * min(kept, capacity) // max(1, capacity)
