"""Prefill attention by blocks: of all keys where there is no GPU, or of chosen tiles."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx_lm.models.base import scaled_dot_product_attention
from mlx_lm.models.cache import BatchKVCache

from mlx_delta.cache.single import HeldKeys, HybridKeys
from mlx_delta.method.tiles import EXACT_END
from mlx_delta.ops.exact_attention import LEAST_QUERIES, Far, exact_attention, has_blocks
from mlx_delta.ops.tiles import tile_attention


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


def tile_range(
    view: HybridKeys, steps: int, cache: HeldKeys, mask: mx.array | str | None
) -> tuple[int, int] | None:
    """Which queries of an update, from where to where, look at chosen tiles only.

    These are whole blocks with tiles to choose from, before a prompt's end if that is known.
    ``None`` where there are none, where a mask hides more than what is to come, and where the
    rows of a batch differ in position.
    """
    same = len(set(view.starts)) == 1 and view.starts[0] >= 0
    if cache.config.prefill != "tiles" or isinstance(mask, mx.array) or not same:
        return None
    start, size = view.starts[0], view.block_size
    end = start + steps
    if cache.prompt_length is not None:
        end = min(end, max(0, cache.prompt_length - EXACT_END))
    # Two far blocks at least: the first is always computed.
    first = max(-(-start // size), view.window_blocks + 2) * size
    end = end // size * size
    return (first - start, end - start) if first < end else None


def hybrid_tiles(
    queries: mx.array, view: HybridKeys, scale: float, cache: HeldKeys, tiles: tuple[int, int]
) -> mx.array:
    """Attention of queries [B, Hq, L, D], of which some look at chosen tiles; [B, Hq, L, Dv]."""
    first, end = tiles
    start, steps = view.starts[0], queries.shape[2]
    far = Far(view.held, view.block_size, view.window_blocks)
    texts = view.full, view.values, scale
    outputs = []
    if first > 0:
        outputs.append(exact_attention(queries[:, :, :first], *texts, start, far=far))
    outputs.append(
        tile_attention(
            queries[:, :, first:end],
            *texts,
            start + first,
            far,
            cache.config.tiles,
            cache.tile_count,
        )
    )
    if end < steps:
        outputs.append(exact_attention(queries[:, :, end:], *texts, start + end, far=far))
    return mx.concatenate(outputs, axis=2)
