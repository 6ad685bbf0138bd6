"""Attention over keys in full, by MLX's own fused attention.

Each sub-chunk of queries is one call of ``mx.fast.scaled_dot_product_attention`` over
``[held keys ; full keys]`` with a mask that picks every key once for every query. No score matrix
is built here, and no query looks at more than the keys before its sub-chunk's end, plus one
sub-chunk and window seen twice.
"""

from __future__ import annotations

import mlx.core as mx

from mlx_delta.cache.step import Step

from .masks import chunk_columns, plain_mask

# Queries per fused call. Larger: fewer calls; smaller: less of the square above the diagonal, and
# fewer columns seen twice. On two CPU cores 128 was fastest of 128, 256, 512 and 1,024.
QUERY_CHUNK = 128


def attend_in_full(
    queries: mx.array,
    step: Step,
    scale: float,
    mask: mx.array | str | None,
    head_sinks: mx.array | None = None,
) -> mx.array:
    """Attention output [B, Hq, L, Dv] of queries [B, Hq, L, D] of a step."""
    if step.one_border:
        # Every query of a row sees the same blocks as held: the buffer is right as it stands.
        return mx.fast.scaled_dot_product_attention(
            queries,
            step.held[:, :, : step.length],
            step.held_values[:, :, : step.length],
            scale=scale,
            mask=plain_mask(step, mask),
            sinks=head_sinks,
        )
    outputs = [
        _attend_chunk(queries[:, :, first:end], step, first, end, scale, mask, head_sinks)
        for first, end in _query_chunks(step.starts[0], step.steps)
    ]
    return mx.concatenate(outputs, axis=2)


def _query_chunks(start: int, steps: int) -> list[tuple[int, int]]:
    """Cut queries into sub-chunks that end at multiples of ``QUERY_CHUNK`` of their position."""
    cuts = range(QUERY_CHUNK - start % QUERY_CHUNK, steps, QUERY_CHUNK)
    return list(zip([0, *cuts], [*cuts, steps], strict=True))


def _attend_chunk(
    queries: mx.array,
    step: Step,
    first: int,
    end: int,
    scale: float,
    mask: mx.array | str | None,
    head_sinks: mx.array | None,
) -> mx.array:
    """Attention of queries ``first`` to ``end`` of an update."""
    window = step.window_blocks
    rows = list(zip(step.starts, step.block_sizes, strict=True))
    # Columns: held keys up to where the last query begins to see full ones, then full keys from
    # where the first query begins to.
    held_end = max(max(0, (start + end - 1) // size - window) * size for start, size in rows)
    full_start = min(max(0, (start + first) // size - window) * size for start, size in rows)
    length = min(step.length, max(step.starts) + end)

    is_array = isinstance(mask, mx.array)
    chosen = chunk_columns(step, first, end, held_end, (full_start, length), not is_array)
    if isinstance(mask, mx.array):
        mask = mask[..., first:end, :] if mask.shape[-2] > 1 else mask
        seen = mx.concatenate([mask[..., :held_end], mask[..., full_start:length]], axis=-1)
        if seen.dtype == mx.bool_:
            seen = seen & chosen
        else:
            seen = mx.where(chosen, seen, mx.array(-mx.inf, seen.dtype))
    else:
        seen = chosen
    return mx.fast.scaled_dot_product_attention(
        queries,
        _join(step.held, step.full, held_end, full_start, length),
        _join(step.held_values, step.values, held_end, full_start, length),
        scale=scale,
        mask=seen,
        sinks=head_sinks,
    )


def _join(held: mx.array, full: mx.array, held_end: int, full_start: int, length: int) -> mx.array:
    """[held up to ``held_end`` ; full from ``full_start`` to ``length``]."""
    if held_end == 0:
        return full[:, :, full_start:length]
    return mx.concatenate([held[:, :, :held_end], full[:, :, full_start:length]], axis=2)
