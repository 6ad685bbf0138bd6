"""Hybrid delta attention over a cache: full keys near each query, held keys further away."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from mlx_delta.cache.held import HeldKeys
from mlx_delta.cache.step import Part, Step
from mlx_delta.cache.turned_values import TurnedView
from mlx_delta.ops import codes_kernel, deltas_kernel
from mlx_delta.ops.blocks import FarBlocks
from mlx_delta.ops.deltas import DeltaBlocks
from mlx_delta.ops.far_values import CodedValues
from mlx_delta.ops.launching import simdgroups_times
from mlx_delta.ops.proving import itself, proven

from .choice import decode_blocks, kernel_mask, simdgroups_factor
from .masks import begin
from .operations import attend_in_full
from .prefill import (
    attend_in_blocks,
    attend_in_strips,
    attend_tiles,
    attends_in_blocks,
    attends_in_strips,
    tile_range,
)
from .trial import kind_of_text, made_up


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

    Raises:
        ValueError: Shapes that do not fit each other or the cache; nothing is appended then.
    """
    _check_shapes(queries, keys, cache, mask)
    if cache.attend is not None:
        return cache.attend(queries, keys, values, scale)
    return attend_to_parts(queries, cache.updates(keys, values), scale, mask)


def attend_to_parts(
    queries: mx.array,
    parts: Sequence[Part],
    scale: float,
    mask: mx.array | str | None = None,
    head_sinks: mx.array | None = None,
) -> mx.array:
    """Attend to what an update left, in as many parts as it came; see :func:`attend_to_step`."""
    if len(parts) == 1 and not any(parts[0].dropped):
        return attend_to_step(queries, parts[0].step, scale, mask, head_sinks)
    outputs = [
        attend_to_step(
            queries[:, :, part.first : part.end], part.step, scale, part.mask(mask), head_sinks
        )
        for part in parts
    ]
    return mx.concatenate(outputs, axis=2)


def attend_to_step(
    queries: mx.array,
    step: Step,
    scale: float,
    mask: mx.array | str | None = None,
    head_sinks: mx.array | None = None,
) -> mx.array:
    """Attend to what an update of a cache left; several layers may share one update.

    Args:
        queries: [B, Hq, L, D], after RoPE; L as many as the update appended.
        step: What the update returned.
        scale: Factor on the scores.
        mask: As for :func:`delta_attention`.
        head_sinks: [Hq], a score for each head that takes part in the softmax and adds no value
            (``sinks`` of ``mx.fast.scaled_dot_product_attention``).

    Returns:
        [B, Hq, L, Dv].
    """
    begin(step)
    blocks = decode_blocks(queries, step, mask) if head_sinks is None else None
    if blocks is not None:

        def decode(asked: tuple[mx.array, Step, mx.array | str | None]) -> mx.array:
            with simdgroups_times(simdgroups_factor(asked[0], asked[1])):
                return _decode(*asked, scale)

        name = "deltas_decode" if isinstance(blocks, DeltaBlocks) else "codes_decode"
        return proven(
            (name, *kind_of_text(queries, step)),
            (queries, step, mask),
            decode,
            lambda asked: attend_in_full(asked[0], asked[1], scale, asked[2]),
            itself,
            lambda: (*made_up(queries, step, scale, 1), None),
        )
    if head_sinks is None:
        if (tiles := tile_range(step, mask)) is not None:
            return attend_tiles(queries, step, scale, tiles)
        if attends_in_strips(queries, step, mask):
            return attend_in_strips(queries, step, scale)
        if attends_in_blocks(queries, step):
            return attend_in_blocks(queries, step, scale, mask)
    return attend_in_full(queries, step, scale, mask, head_sinks)


def _check_shapes(
    queries: mx.array, keys: mx.array, cache: HeldKeys, mask: mx.array | str | None
) -> None:
    """Refuse queries and masks that do not fit; keys and values are the cache's to check."""
    B, _, steps, D = keys.shape if keys.ndim == 4 else (0, 0, 0, 0)
    shape = tuple(queries.shape)
    fits = len(shape) == 4 and keys.ndim == 4 and (shape[0], *shape[2:]) == (B, steps, D)
    if not fits or not shape[1] or not keys.shape[1] or shape[1] % keys.shape[1] or not steps:
        raise ValueError(
            f"[delta_attention] queries {shape} do not fit keys {tuple(keys.shape)}: both are "
            "[B, heads, L, D], and query heads a multiple of kv heads."
        )
    if isinstance(mask, str) and mask != "causal":
        raise ValueError(f"[delta_attention] mask must be 'causal' or an array but got {mask!r}.")
    if isinstance(mask, mx.array):
        full = (B, shape[1], steps, max(0, *cache.lengths) + steps)
        aligned = (1,) * (4 - mask.ndim) + tuple(mask.shape)
        # Columns are never broadcast: a mask of one column for many keys is a mistake.
        fits = len(aligned) == 4 and aligned[3] == full[3]
        if not fits or any(m not in (1, n) for m, n in zip(aligned[:3], full[:3], strict=True)):
            raise ValueError(
                f"[delta_attention] mask must broadcast to [B, Hq, L, S] = {full} but has shape "
                f"{tuple(mask.shape)}."
            )


def _decode(queries: mx.array, step: Step, mask: mx.array | str | None, scale: float) -> mx.array:
    """Attention of a few queries by a kernel, straight from far blocks."""
    blocks = step.far
    assert isinstance(blocks, FarBlocks)
    values, window = step.stored_values, step.window_blocks
    rows = zip(step.starts, step.encoded, step.firsts, strict=True)
    if isinstance(values, TurnedView):
        firsts = tuple(values.firsts)
        stored: mx.array | CodedValues = CodedValues(
            *values.codes, values.near, values.sinks, values.widths
        )
    else:
        firsts, stored = (0,) * len(step.starts), values.buffer
    numbers = [(*row, first) for row, first in zip(rows, firsts, strict=True)]
    rest = (step.near, stored, kernel_mask(mask), scale, window)
    if isinstance(blocks, DeltaBlocks):
        return deltas_kernel.decode(queries, numbers, blocks, *rest)
    return codes_kernel.decode(queries, numbers, blocks, *rest)
