"""Dense attention over a cache of mlx-lm's: by blocks where there is no GPU."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import BatchKVCache, KVCache, QuantizedKVCache

from mlx_delta.ops.exact_attention import exact_attention, has_blocks

from .handed import scaled_dot_product_attention

# Of a cache that is to be served by MLX's own attention.
_MARK = "mlx_attention_only"


def stock_cache() -> KVCache:
    """mlx-lm's cache, whose queries MLX's attention serves even where blocks are faster.

    To compare with: what a model of ours does with it is what stock mlx-lm does.
    """
    cache = KVCache()
    setattr(cache, _MARK, True)
    return cache


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
    if isinstance(cache, QuantizedKVCache) and has_blocks(queries):
        # MLX's quantized product on a CPU takes ten times as long as writing the codes out.
        size, bits = cache.group_size, cache.bits
        keys, values = (
            mx.dequantize(words, scales, biases, size, bits).astype(queries.dtype)
            for words, scales, biases in (keys, values)
        )
    # Not arrays: of a quantized cache, or of one that is watched. No mask: all keys are seen.
    stock = mask is None or not isinstance(keys, mx.array) or hasattr(cache, _MARK)
    if stock or not has_blocks(queries):
        return scaled_dot_product_attention(
            queries, keys, values, cache=cache, scale=scale, mask=mask
        )
    start = keys.shape[2] - queries.shape[2]
    array = mask if isinstance(mask, mx.array) else None
    causal = isinstance(cache, BatchKVCache)  # its masks hide padding besides
    return exact_attention(queries, keys, values, scale, start, array, causal=causal)
