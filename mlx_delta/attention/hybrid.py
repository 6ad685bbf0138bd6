"""Hybrid delta attention over a cache: full keys near each query, held keys further away.

Without a kernel of our own, each sub-chunk of queries is one fused call of
``mx.fast.scaled_dot_product_attention`` over ``[held keys ; full keys]`` with a mask that picks
every key once for every query. No score matrix is built here, and no query looks at more than
the keys before its sub-chunk's end, plus one sub-chunk and window seen twice.
"""

from __future__ import annotations

import mlx.core as mx

from mlx_delta.cache.packed_view import PackedView
from mlx_delta.cache.single import HeldKeys, HybridKeys
from mlx_delta.ops import launch
from mlx_delta.ops.dispatch import decode_mask, has_decode_kernel
from mlx_delta.ops.pack import PackedBlocks

# Queries per fused call. Larger: fewer calls; smaller: less of the square above the diagonal, and
# fewer columns seen twice. On two CPU cores 128 was fastest of 128, 256, 512 and 1,024.
QUERY_CHUNK = 128


def delta_attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache: HeldKeys,
    scale: float,
    mask: mx.array | str | None = None,
) -> mx.array:
    """Append keys and values to the cache and attend to it.

    Args:
        queries: [B, Hq, L, D], after RoPE.
        keys: [B, Hkv, L, D], after RoPE.
        values: [B, Hkv, L, Dv].
        cache: A ``DeltaKVCache`` or ``BatchDeltaKVCache``; updated.
        scale: Factor on the scores.
        mask: What a query may see besides: ``None`` or ``"causal"`` (up to its own position), or
            an array, boolean or additive, that broadcasts to [B, Hq, L, S] with S the cached
            tokens (causality is then the mask's own affair).

    Returns:
        [B, Hq, L, Dv].
    """
    if cache.attend is not None:
        return cache.attend(queries, keys, values, scale)
    return attend_to_view(queries, cache.update(keys, values), scale, mask)


def attend_to_view(
    queries: mx.array,
    view: HybridKeys,
    scale: float,
    mask: mx.array | str | None = None,
    head_sinks: mx.array | None = None,
) -> mx.array:
    """Attend to what an update of a cache left; several layers may share one update.

    Args:
        queries: [B, Hq, L, D], after RoPE; L as many as the update appended.
        view: What the update returned.
        scale: Factor on the scores.
        mask: As for :func:`delta_attention`.
        head_sinks: [Hq], a score for each head that takes part in the softmax and adds no value
            (``sinks`` of ``mx.fast.scaled_dot_product_attention``).

    Returns:
        [B, Hq, L, Dv].
    """
    steps = queries.shape[2]
    if isinstance(view.keys, PackedView) and head_sinks is None:
        blocks, stored = view.keys.blocks, view.stored_values
        if blocks is not None and has_decode_kernel(queries, blocks, stored.head_dim, mask):
            return _decode(queries, view, view.keys, blocks, scale, mask)
    if _one_boundary(view, steps):
        # Every query of a row sees the same blocks as held: the buffer is right as it stands.
        return mx.fast.scaled_dot_product_attention(
            queries,
            view.held[:, :, : view.length],
            view.values[:, :, : view.length],
            scale=scale,
            mask=_plain_mask(view, steps, mask),
            sinks=head_sinks,
        )
    outputs = []
    for first, end in _query_chunks(view.starts[0], steps):
        part = queries[:, :, first:end]
        outputs.append(_attend_chunk(part, view, first, end, scale, mask, head_sinks))
    return mx.concatenate(outputs, axis=2)


def _decode(
    queries: mx.array,
    view: HybridKeys,
    keys: PackedView,
    blocks: PackedBlocks,
    scale: float,
    mask: mx.array | str | None,
) -> mx.array:
    """Attention of a few queries by the kernel, straight from packed blocks."""
    B, _, steps, _ = queries.shape
    counts = [view.starts, keys.encoded, keys.firsts]
    if len(view.starts) == 1:  # one entry for all rows
        counts = [tuple(x) * B for x in counts]
    values = view.stored_values
    assert values.buffers is not None
    bits = values.bits if values.quantized else 8 * values.buffers[0].itemsize
    assert bits is not None
    return launch.decode(
        queries,
        list(zip(*counts, strict=True)),
        blocks,
        keys.near,
        values.buffers,
        bits,
        decode_mask(mask, B, steps),
        scale,
        view.window_blocks,
    )


def _one_boundary(view: HybridKeys, steps: int) -> bool:
    """Whether the border between held and full keys is the same for all queries of each row."""
    size, window = view.block_size, view.window_blocks
    return all(
        max(0, start // size - window) == max(0, (start + steps - 1) // size - window)
        for start in view.starts
    )


def _plain_mask(view: HybridKeys, steps: int, mask: mx.array | str | None) -> mx.array | str | None:
    """The mask for attending to the buffer as it stands."""
    if isinstance(mask, mx.array):
        return mask
    if len(set(view.starts)) == 1 and view.starts[0] >= 0:
        return "causal" if steps > 1 else None
    return _causal(_positions(view, 0, steps), mx.arange(view.length))


def _query_chunks(start: int, steps: int) -> list[tuple[int, int]]:
    """Cut queries into sub-chunks that end at multiples of ``QUERY_CHUNK`` of their position."""
    cuts = range(QUERY_CHUNK - start % QUERY_CHUNK, steps, QUERY_CHUNK)
    return list(zip([0, *cuts], [*cuts, steps], strict=True))


def _attend_chunk(
    queries: mx.array,
    view: HybridKeys,
    first: int,
    end: int,
    scale: float,
    mask: mx.array | str | None,
    head_sinks: mx.array | None,
) -> mx.array:
    """Attention of queries ``first`` to ``end`` of an update."""
    size, window = view.block_size, view.window_blocks
    # Columns: held keys up to where the last query begins to see full ones, then full keys from
    # where the first query begins to.
    held_end = max(0, (max(view.starts) + end - 1) // size - window) * size
    full_start = max(0, (min(view.starts) + first) // size - window) * size
    length = min(view.length, max(view.starts) + end)

    position = _positions(view, first, end)  # [C, 1], or [B, 1, C, 1]
    boundary = (position // size - window) * size  # first position seen with its full key
    held_column, full_column = mx.arange(held_end), mx.arange(full_start, length)
    use_held, use_full = held_column < boundary, full_column >= boundary
    if isinstance(mask, mx.array):
        mask = mask[..., first:end, :] if mask.shape[-2] > 1 else mask
        seen = mx.concatenate([mask[..., :held_end], mask[..., full_start:length]], axis=-1)
        chosen = mx.concatenate([use_held, use_full], axis=-1)
        if seen.dtype == mx.bool_:
            seen = seen & chosen
        else:
            seen = mx.where(chosen, seen, mx.array(-mx.inf, seen.dtype))
    else:
        use_full = use_full & _causal(position, full_column)
        seen = mx.concatenate([use_held, use_full], axis=-1)
    return mx.fast.scaled_dot_product_attention(
        queries,
        _join(view.held, view.full, held_end, full_start, length),
        _join(view.values, view.values, held_end, full_start, length),
        scale=scale,
        mask=seen,
        sinks=head_sinks,
    )


def _join(held: mx.array, full: mx.array, held_end: int, full_start: int, length: int) -> mx.array:
    """[held up to ``held_end`` ; full from ``full_start`` to ``length``]."""
    if held_end == 0:
        return full[:, :, full_start:length]
    return mx.concatenate([held[:, :, :held_end], full[:, :, full_start:length]], axis=2)


def _positions(view: HybridKeys, first: int, end: int) -> mx.array:
    """Positions of queries ``first`` to ``end``: [C, 1], or [B, 1, C, 1] where rows differ."""
    steps = mx.arange(first, end)[:, None]
    if len(set(view.starts)) == 1:
        return steps + view.starts[0]
    return steps + mx.array(view.starts)[:, None, None, None]


def _causal(position: mx.array, column: mx.array) -> mx.array:
    """Keys up to the query's own position; key 0 for padding queries, which have none."""
    return column <= mx.maximum(position, 0)
