"""Prefill attention without a GPU: dense, and over held and full keys, by blocks."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx_lm.models.base import scaled_dot_product_attention
from mlx_lm.models.cache import BatchKVCache

from mlx_delta.cache.single import HybridKeys
from mlx_delta.ops.exact_attention import LEAST_QUERIES, Far, exact_attention, has_blocks


def dense_attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache: Any,
    scale: float,
    mask: Any,
) -> mx.array:
    """Append keys and values to a cache of mlx-lm's, if there is one, and attend to all of it.

    Args:
        queries: [B, Hq, L, D], after RoPE.
        keys: [B, Hkv, L, D], after RoPE.
        values: [B, Hkv, L, Dv].
        cache: mlx-lm's, or ``None``; updated.
        scale: Factor on the scores.
        mask: As mlx-lm gives it: ``None``, ``"causal"`` or an array.

    Returns:
        [B, Hq, L, Dv].
    """
    if cache is not None:
        keys, values = cache.update_and_fetch(keys, values)
    # A quantized cache gives tuples. No mask at all means keys after the query are seen.
    if mask is None or not isinstance(keys, mx.array) or not has_blocks(queries):
        return scaled_dot_product_attention(
            queries, keys, values, cache=cache, scale=scale, mask=mask
        )
    start = keys.shape[2] - queries.shape[2]
    array = mask if isinstance(mask, mx.array) else None
    causal = isinstance(cache, BatchKVCache)  # its masks hide padding besides
    return exact_attention(queries, keys, values, scale, start, array, causal=causal)


def has_hybrid_blocks(queries: mx.array, view: HybridKeys) -> bool:
    """Whether attention by blocks serves these queries [B, Hq, L, D] best.

    Not where rows differ in position, nor where blocks are so small that each takes few queries.
    """
    same = len(set(view.starts)) == 1 and view.starts[0] >= 0
    return same and view.block_size >= LEAST_QUERIES and has_blocks(queries)


def hybrid_blocks(
    queries: mx.array, view: HybridKeys, scale: float, mask: mx.array | str | None
) -> mx.array:
    """Attention of queries [B, Hq, L, D] to full keys near and held keys far; [B, Hq, L, Dv]."""
    return exact_attention(
        queries,
        view.full,
        view.values,
        scale,
        view.starts[0],
        mask if isinstance(mask, mx.array) else None,
        Far(view.held, view.block_size, view.window_blocks),
        causal=False,
    )
