"""Exact attention over stored keys, written out a strip at a time: no copy of them all is made.

As :mod:`mlx_delta.ops.exact_attention`, with the loops the other way round: a strip of far keys and
values is written out once, for all blocks of queries, each of which keeps the running maximum and
sum of its softmax. So what is in memory besides the stored keys is one strip, however long the
text.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import mlx.core as mx

from .exact_attention import Far, Weighted, hide, query_blocks, with_ones

# Tokens of a strip: what a processor's cache holds, written out.
STRIP = 1024

_LOG2_E = math.log2(math.e)

# Keys and values [B, Hkv, right - left, ..] of positions left to right, once something is computed.
Unpack = Callable[[int, int, mx.array], tuple[mx.array, mx.array]]


def strip_attention(
    queries: mx.array,
    near: tuple[mx.array, mx.array],
    near_start: int,
    unpack: Unpack,
    scale: float,
    start: int,
    block_size: int,
    window_blocks: int,
) -> mx.array:
    """Causal attention of the queries from position ``start`` on, within 1e-5 of float32 softmax.

    Args:
        queries: [B, Hq, L, D]; query ``i`` is at position ``start + i``.
        near: Keys and values [B, Hkv, n, ..] from position ``near_start`` to the last query's.
        near_start: No later than the first query's border.
        unpack: Gives far keys and values; called for strips of whole blocks.
        scale: Factor on the scores.
        start: Position of the first query.
        block_size: Tokens in a block.
        window_blocks: Blocks before a query's own that it sees near.

    Returns:
        [B, Hq, L, Dv], of the queries' type; computed in float32.
    """
    B, n_heads, steps, D = queries.shape
    keys, values = near[0].astype(mx.float32), with_ones(near[1])
    n_kv = keys.shape[1]
    group = n_heads // n_kv
    scaled = (queries.astype(mx.float32) * (scale * _LOG2_E)).reshape(B, n_kv, group, steps, D)
    far = Far(keys, block_size, window_blocks)
    rows: list[tuple[mx.array, int]] = []
    found: list[Weighted] = []
    for first, end in query_blocks(start, steps, far):
        part = scaled[:, :, :, first - start : end - start]
        if found:
            (part,) = mx.depends([part], [found[-1].sums])
        part = part.reshape(B, n_kv, group * (end - first), D)
        border = far.border(first)
        span = slice(border - near_start, end - near_start)
        scores = part @ keys[:, :, span].swapaxes(-1, -2)
        seen = mx.arange(border, end) <= mx.arange(first, end)[:, None]
        found.append(Weighted.of(hide(scores, seen, group), values[:, :, span]))
        rows.append((part, border))
    latest = found[-1].sums
    width = max(1, STRIP // block_size) * block_size
    for left in range(0, rows[-1][1], width):
        right = min(left + width, rows[-1][1])
        strip_keys, strip_values = unpack(left, right, latest)
        strip_keys, strip_values = strip_keys.astype(mx.float32), with_ones(strip_values)
        for i, (part, border) in enumerate(rows):
            count = min(right, border) - left
            if count > 0:
                (part,) = mx.depends([part], [latest])
                scores = part @ strip_keys[:, :, :count].swapaxes(-1, -2)
                found[i] = found[i].merged(Weighted.of(scores, strip_values[:, :, :count]))
                latest = found[i].sums
    outputs = [
        x.mean().reshape(B, n_kv, group, part.shape[2] // group, -1)
        for x, (part, _) in zip(found, rows, strict=True)
    ]
    joined = mx.concatenate(outputs, axis=3)
    return joined.reshape(B, n_heads, steps, -1).astype(queries.dtype)
