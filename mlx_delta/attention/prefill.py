"""Hybrid prefill by blocks: over all keys where there is no GPU, or over chosen tiles."""

from __future__ import annotations

import mlx.core as mx

from mlx_delta.cache.step import Step
from mlx_delta.method.tiles import EXACT_BEGIN, EXACT_END
from mlx_delta.ops import tiles_kernel
from mlx_delta.ops.backend import has_kernels
from mlx_delta.ops.blocks import unpack
from mlx_delta.ops.exact_attention import LEAST_QUERIES, Far, exact_attention, has_blocks
from mlx_delta.ops.proving import proven
from mlx_delta.ops.strip_attention import strip_attention
from mlx_delta.ops.tiles import TileCount, tile_attention

from .choice import tiles_by_kernel
from .trial import kind_of_text, made_up

# Far tokens, beyond which even a single query reads stored keys strip by strip.
LONG = 4096

# Of a text to try the kernels on: far blocks, and a share with which they have to choose.
MANY, SOME = 12, 0.6

# Queries, what they see, which of them look at chosen tiles, and how much these have to reach.
Asked = tuple[mx.array, Step, tuple[int, int], float]


def attends_in_blocks(queries: mx.array, step: Step) -> bool:
    """Whether attention by blocks serves these queries [B, Hq, L, D] best.

    Not where rows differ in position, nor where blocks are so small that each takes few queries.
    """
    size = step.block_size
    return size is not None and size >= LEAST_QUERIES and _same_start(step) and has_blocks(queries)


def attend_in_blocks(
    queries: mx.array, step: Step, scale: float, mask: mx.array | str | None
) -> mx.array:
    """Attention of queries [B, Hq, L, D] to full keys near and held keys far; [B, Hq, L, Dv]."""
    assert step.block_size is not None
    return exact_attention(
        queries,
        step.full,
        step.values,
        scale,
        step.starts[0],
        mask if isinstance(mask, mx.array) else None,
        _far(step),
        causal=False,
    )


def attends_in_strips(queries: mx.array, step: Step, mask: mx.array | str | None) -> bool:
    """Whether these queries [B, Hq, L, D] attend to stored keys a strip at a time.

    Where there is no kernel, and neither a mask nor rows at different positions; few queries only
    to a long text, of which writing out all keys would take more memory than they are stored in.
    """
    far = step.far
    if far is None or isinstance(far, mx.array) or isinstance(mask, mx.array) or has_kernels():
        return False
    size = step.block_size
    if size is None:
        return False
    if not _same_start(step) or len(set(step.firsts)) > 1 or not max(step.encoded):
        return False
    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    return on_cpu and (queries.shape[2] >= LEAST_QUERIES or max(step.encoded) * size > LONG)


def attend_in_strips(queries: mx.array, step: Step, scale: float) -> mx.array:
    """Attention of queries [B, Hq, L, D] to full keys near and stored keys far; [B, Hq, L, Dv]."""
    blocks, size, first = step.far, step.block_size, step.firsts[0]
    assert blocks is not None and not isinstance(blocks, mx.array) and size is not None
    stored = step.stored_values

    def unpack_strip(left: int, right: int, latest: mx.array) -> tuple[mx.array, mx.array]:
        part = blocks.part(left // size, right // size).after(latest)
        return unpack(part, (right - left) // size), stored.far(left, right, mx.float32, latest)

    return strip_attention(
        queries,
        (step.near, stored.near_part(first, step.length, mx.float32)),
        first,
        unpack_strip,
        scale,
        step.starts[0],
        size,
        step.window_blocks,
    )


def tile_range(step: Step, mask: mx.array | str | None) -> tuple[int, int] | None:
    """Which queries of an update, from where to where, look at chosen tiles only.

    These are whole blocks behind a text's beginning, and before a prompt's end if that is known.
    ``None`` where there are none, where a mask hides more than what is to come, and where the
    rows of a batch differ in position.
    """
    plan = step.tiles
    start, size = step.starts[0], step.block_size
    if plan is None or isinstance(mask, mx.array) or not _same_start(step) or size is None:
        return None
    end = start + step.steps
    if plan.prompt_length is not None:
        end = min(end, max(0, plan.prompt_length - EXACT_END))
    # Two far blocks at least: the first is always computed.
    first = max(-(-max(start, EXACT_BEGIN) // size), step.window_blocks + 2) * size
    end = end // size * size
    return (first - start, end - start) if first < end else None


def attend_tiles(queries: mx.array, step: Step, scale: float, tiles: tuple[int, int]) -> mx.array:
    """Attention of queries [B, Hq, L, D], of which some look at chosen tiles; [B, Hq, L, Dv]."""
    assert step.tiles is not None and step.block_size is not None
    size = step.block_size

    def kernels(asked: Asked) -> tuple[mx.array, TileCount]:
        (queries, step, tiles, mass), count = asked, TileCount()
        text = step.full, step.values, scale, step.starts[0], _far(step)
        return tiles_kernel.tile_attention(queries, *text, tiles, mass, count), count

    def operations(asked: Asked) -> tuple[mx.array, TileCount]:
        queries, step, (first, end), mass = asked
        text, start, far = (step.full, step.values, scale), step.starts[0], _far(step)
        outputs, count = [], TileCount()
        if first > 0:
            outputs.append(exact_attention(queries[:, :, :first], *text, start, far=far))
        chosen = queries[:, :, first:end]
        outputs.append(tile_attention(chosen, *text, start + first, far, mass, count))
        if end < step.steps:
            outputs.append(exact_attention(queries[:, :, end:], *text, start + end, far=far))
        return mx.concatenate(outputs, axis=2), count

    asked = queries, step, tiles, step.tiles.mass
    if tiles_by_kernel(queries, step, scale):
        output, count = proven(
            ("tile_attention", *kind_of_text(queries, step)),
            asked,
            kernels,
            operations,
            lambda result: result[:1],
            lambda: (*made_up(queries, step, scale, size, MANY), (0, size), SOME),
        )
    else:
        output, count = operations(asked)
    step.tiles.count.add_all(count)
    return output


def _far(step: Step) -> Far:
    """What queries read far from them."""
    assert step.block_size is not None
    values = step.held_values if step.stored_values.differs else None
    return Far(step.held, step.block_size, step.window_blocks, values)


def _same_start(step: Step) -> bool:
    """Whether all rows are at one position, in their own text."""
    return len(set(step.starts)) == 1 and step.starts[0] >= 0
