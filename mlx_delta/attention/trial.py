"""A made-up text for trying kernels that attend: small, and such that every part of it counts."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace

import mlx.core as mx

from mlx_delta.cache.single import DeltaKVCache
from mlx_delta.cache.step import Step
from mlx_delta.ops.proving import TRIED_BLOCKS, tokens_like

# Standard deviation of scores: some keys matter much more than others, and no one alone.
SPREAD = 2.0
LEAN = 6.0  # how much higher the score of a text's last key, or of its first, is


def kind_of_text(queries: mx.array, step: Step) -> tuple[Hashable, ...]:
    """What queries [B, Hq, L, D] and what they see a kernel is tried for."""
    heads, kv_heads, dims = queries.shape[1], step.near.shape[1], step.stored_values.head_dim
    return queries.dtype, heads, kv_heads, queries.shape[3], dims, step.block_size


def made_up(
    queries: mx.array, step: Step, scale: float, steps: int, far: int = TRIED_BLOCKS
) -> tuple[mx.array, Step]:
    """Queries and what they see, like others but for the text: two rows of some blocks.

    Args:
        queries: [B, Hq, L, D], those to imitate.
        step: What they see.
        scale: Factor on the scores.
        steps: How many queries, at a text's end; those of tiles begin a block.
        far: Far blocks without sinks.
    """
    config, size = replace(step.config, max_size=None), step.config.block_size
    near = step.window_blocks + 1
    blocks = near + far + config.sinks // size + -(-steps // size)
    keys = tokens_like(step.near[:, :, :0], blocks, size).astype(queries.dtype)
    values = mx.zeros((1, keys.shape[1], 0, step.stored_values.head_dim), step.dtype)
    values = tokens_like(values, blocks, size)[::-1]
    # A text that ends within a block, unless its queries are whole ones.
    length = blocks * size - (0 if steps % size == 0 else 5)
    heads, D = queries.shape[1], queries.shape[3]
    noise = mx.random.normal((2, heads, steps, D), key=mx.random.key(0))
    # Half of them lean to the newest key, the others to the first: one key of hundreds.
    ends = mx.repeat(keys[:, :, [length - 1, 0]], heads // keys.shape[1], axis=1)
    which = (mx.arange(2)[:, None] + mx.arange(heads)) % 2 == 0
    leaning = mx.where(which[..., None, None], ends[:, :, :1], ends[:, :, 1:])
    asked = noise * (SPREAD / scale / D**0.5) + leaning * (LEAN / scale / D)
    cache = DeltaKVCache(config)
    first, rest = slice(0, length - steps), slice(length - steps, length)
    cache.updates(keys[:, :, first], values[:, :, first])
    (part,) = cache.updates(keys[:, :, rest], values[:, :, rest])
    return asked.astype(queries.dtype), part.step
