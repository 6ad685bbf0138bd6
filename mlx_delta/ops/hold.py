"""Holding keys with MLX operations: the encoder of finished blocks, on any device.

Agrees with :func:`mlx_delta.method.attention.hold`; works on all blocks, kv heads and rows at once.
"""

from __future__ import annotations

import mlx.core as mx

from mlx_delta.config import DeltaConfig

from .runs import hold_runs


def block_thresholds(keys: mx.array, config: DeltaConfig) -> mx.array:
    """The threshold of each block.

    Args:
        keys: float32 [B, Hkv, n_blocks, block_size, D].
        config: The setting of this layer.

    Returns:
        float32 [B, Hkv, n_blocks].
    """
    # One number, or [Hkv, 1]: one for each head.
    threshold = mx.array(config.layer_threshold, mx.float32)
    threshold = threshold[:, None] if threshold.ndim else threshold
    if config.threshold_mode == "absolute":
        return mx.broadcast_to(threshold, keys.shape[:3])
    deviation = keys - keys.mean(axis=3, keepdims=True)
    return threshold * mx.sqrt(mx.square(deviation).mean(axis=(3, 4)))


def hold_blocks(
    keys: mx.array,
    config: DeltaConfig,
    first_block: int = 0,
    previous: mx.array | None = None,
    stored: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """Hold the keys of whole blocks.

    Args:
        keys: [B, Hkv, n_blocks * block_size, D], of any floating type, after RoPE.
        config: The setting of this layer.
        first_block: Which block of the text the first one is.
        previous: [B, Hkv, D], the held key before the first one. Used without keyframes only;
            ``None`` at the start of the text.
        stored: What each key becomes once it is stored, shaped as ``keys``, where that is not
            the key itself. First values are compared as they are really stored, so that
            rounding adds nothing to the threshold's bound. Used with keyframes only, and not
            for means: of those it is the mean that is stored.

    Returns:
        The held keys, shaped and typed as ``keys``, and how many of each block's deltas are
        zero, int32 [B, Hkv, n_blocks]. Rows where the hold starts anew count as no zeros.
    """
    B, H, length, D = keys.shape
    # float32: differences of bf16 keys rounded to bf16 would move values across the threshold.
    blocks = keys.astype(mx.float32).reshape(B, H, -1, config.block_size, D)
    if config.run_value == "mean":
        held, _, zeros = hold_means(blocks, config, first_block)
        return held.reshape(keys.shape).astype(keys.dtype), zeros
    held, _ = _hold_firsts(blocks, config, first_block, previous, stored)
    held = held.reshape(keys.shape)
    zeros = _count_zeros(held, config, first_block * config.block_size, previous)
    return held.astype(keys.dtype), zeros


def hold_means(
    blocks: mx.array, config: DeltaConfig, first_block: int
) -> tuple[mx.array, mx.array, mx.array]:
    """The mean of each element's run, as the specification defines it for the setting's mode.

    Args:
        blocks: float32 [B, Hkv, n_blocks, block_size, D], the keys.
        config: The setting of this layer, with keyframes.
        first_block: Which block of the text the first one is.

    Returns:
        The means, float32, and which elements start a run, boolean, both shaped as ``blocks``;
        and how many of each block's elements start none, int32 [B, Hkv, n_blocks].
    """
    if config.cuts_runs:
        return hold_runs(blocks, config, first_block)
    size, n_blocks = config.block_size, blocks.shape[2]
    firsts, starts = _hold_firsts(blocks, config, first_block)
    deviations = blocks - firsts
    total = mx.zeros_like(blocks[:, :, :, 0])
    totals = [total]  # up to each token, added up in their order
    for t in range(1, size):
        total = mx.where(starts[:, :, :, t], 0, total + deviations[:, :, :, t])
        totals.append(total)
    token = mx.arange(size)[:, None]
    begin = mx.cummax(mx.where(starts, token, 0), axis=3)
    means = firsts + mx.stack(totals, axis=3) / (token - begin + 1).astype(mx.float32)
    exact = config.sinks - size * mx.arange(first_block, first_block + n_blocks)
    means = mx.where(begin < exact[:, None, None], firsts, means)
    # So far they are means up to each token: the last one of a run is that of all of it.
    mean = means[:, :, :, -1]
    rows = [mean]
    for t in range(size - 2, -1, -1):
        mean = mx.where(starts[:, :, :, t + 1], means[:, :, :, t], mean)
        rows.append(mean)
    zeros = mx.logical_not(starts).sum(axis=(3, 4)).astype(mx.int32)
    return mx.stack(rows[::-1], axis=3), starts, zeros


def _hold_firsts(
    blocks: mx.array,
    config: DeltaConfig,
    first_block: int,
    previous: mx.array | None = None,
    stored: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """The first value of each element's run, float32, and which elements start one.

    Both are [B, Hkv, n_blocks, block_size, D]; without keyframes of one block as long as the text.
    """
    B, H, n_blocks, block_size, D = blocks.shape
    thresholds = block_thresholds(blocks, config)[..., None]  # [B, Hkv, n_blocks, 1]
    first_position = first_block * block_size
    targets = blocks if stored is None else stored.astype(mx.float32).reshape(blocks.shape)

    if config.keyframes:
        # Blocks are independent: step through the tokens of all blocks side by side.
        lanes, steps, lane_stride = n_blocks, block_size, block_size
        held = targets[:, :, :, 0]
    else:
        lanes, steps, lane_stride = 1, n_blocks * block_size, 0
        blocks = targets = blocks.reshape(B, H, 1, steps, D)
        thresholds = mx.repeat(thresholds, block_size, axis=2)  # one per token
        held = blocks[:, :, :, 0] if previous is None else previous[:, :, None].astype(mx.float32)

    rows, starts = [], []
    for t in range(steps):
        key = blocks[:, :, :, t]  # [B, Hkv, lanes, D]
        if t == 0 and (config.keyframes or previous is None):
            rows.append(held)
            starts.append(mx.ones(held.shape, mx.bool_))
            continue
        threshold = thresholds if config.keyframes else thresholds[:, :, t : t + 1]
        # "not more than" rather than "less than": a NaN compares false and so propagates.
        keep = mx.abs(key - held) <= threshold
        exact_lanes = _lanes_before(config.sinks, first_position + t, lanes, lane_stride)
        if exact_lanes:
            keep = keep & (mx.arange(lanes) >= exact_lanes)[:, None]
        held = mx.where(keep, held, targets[:, :, :, t])
        rows.append(held)
        starts.append(mx.logical_not(keep))
    return mx.stack(rows, axis=3), mx.stack(starts, axis=3)


def _lanes_before(position: int, first: int, lanes: int, stride: int) -> int:
    """How many of the lanes at first, first + stride, ... lie before a position."""
    if first >= position:
        return 0
    return lanes if stride == 0 else min(lanes, -(-(position - first) // stride))


def _count_zeros(
    held: mx.array, config: DeltaConfig, first_position: int, previous: mx.array | None
) -> mx.array:
    """Zeros of the delta key matrix per block, int32 [B, Hkv, n_blocks]."""
    B, H, length, D = held.shape
    if previous is None:
        before = mx.concatenate([held[:, :, :1], held[:, :, :-1]], axis=2)
    else:
        before = mx.concatenate([previous[:, :, None].astype(held.dtype), held[:, :, :-1]], axis=2)
    position = mx.arange(first_position, first_position + length)
    counted = position >= max(config.sinks, 1)
    if config.keyframes:
        counted = counted & (position % config.block_size != 0)
    zeros = (held == before).sum(axis=-1) * counted
    return zeros.reshape(B, H, -1, config.block_size).sum(axis=-1).astype(mx.int32)
