"""Holding keys with MLX operations: the encoder of finished blocks, on any device.

Agrees with :func:`mlx_delta.method.attention.hold`; works on all blocks, kv heads and rows at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_delta.config import DeltaConfig

from .chain import walk_chain
from .runs import hold_runs
from .storage import to_type


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
) -> tuple[mx.array, mx.array]:
    """Hold the keys of whole blocks.

    Args:
        keys: [B, Hkv, n_blocks * block_size, D], of any floating type, after RoPE.
        config: The setting of this layer.
        first_block: Which block of the text the first one is.
        previous: [B, Hkv, D], the held key before the first one. Used without keyframes only;
            ``None`` at the start of the text.

    Returns:
        The held keys, shaped and typed as ``keys``, and how many of each block's deltas are
        zero, int32 [B, Hkv, n_blocks]. Rows where the hold starts anew count as no zeros.
    """
    B, H, length, D = keys.shape
    size = config.block_size
    if not config.cuts_runs and config.layer_threshold == 0:
        # What has changed at all propagates.
        zeros = _count_zeros(keys, config, [first_block * size] * B, previous)
        return keys, _of_blocks(zeros, size)
    if not config.keyframes:
        held, zeros = hold_text(keys, config, [first_block * size] * B, previous)
        return held, _of_blocks(zeros, size)
    # float32: differences of bf16 keys rounded to bf16 would move values across the threshold.
    blocks = keys.astype(mx.float32).reshape(B, H, -1, config.block_size, D)
    if config.run_value == "mean":
        held, _, zeros = hold_means(blocks, config, first_block)
        # Stretched means may lie beyond the type's range.
        return to_type(held.reshape(keys.shape), keys.dtype), zeros
    held, _ = _hold_firsts(blocks, config, first_block)
    held = held.reshape(keys.shape)
    zeros = _count_zeros(held, config, [first_block * config.block_size] * B, None)
    return held.astype(keys.dtype), _of_blocks(zeros, size)


def hold_text(
    keys: mx.array, config: DeltaConfig, starts: Sequence[int], previous: mx.array | None = None
) -> tuple[mx.array, mx.array]:
    """Hold keys as one chain, without keyframes; rows of a batch may be at different positions.

    Args:
        keys: [B, Hkv, L, D], of any floating type, after RoPE. Where thresholds depend on a block's
            keys, L is a multiple of the block size.
        config: The setting of this layer.
        starts: Position of each row's first key.
        previous: [B, Hkv, D], the held key before the first one, of rows that don't start at 0;
            ``None``: the chains start here.

    Returns:
        The held keys, shaped and typed as ``keys``, and how many deltas of each are zero, int32
        [B, Hkv, L].
    """
    B, H, length, D = keys.shape
    exact = np.array(starts)[:, None] + np.arange(length) < max(config.sinks, 1)  # [B, L]
    if previous is None:
        exact[:, 0] = True
    if config.threshold_mode == "absolute":
        own = np.broadcast_to(np.array(config.layer_threshold, np.float32), (H,))[None, :, None]
        thresholds = np.broadcast_to(own, (B, H, length))
    else:
        blocks = keys.astype(mx.float32).reshape(B, H, -1, config.block_size, D)
        thresholds = np.repeat(_array(np, block_thresholds(blocks, config)), config.block_size, 2)
    thresholds = np.where(exact[:, None], np.float32(-1), thresholds)
    before = mx.zeros((B, H, D)) if previous is None else previous.astype(mx.float32)
    held = walk_chain(
        _by_token(np, keys.astype(mx.float32)[:, :, None]),
        thresholds.reshape(B * H, length).T[:, :, None],
        _array(np, before).reshape(-1, D),
    )
    rows = _by_block(held, (B, H, 1, length, D)).reshape(keys.shape)
    return rows.astype(keys.dtype), _count_zeros(rows, config, starts, previous)


@np.errstate(all="ignore")  # NaN and infinities have their own rule
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
    xp = _module()
    keys, firsts, starts = (_by_token(xp, x) for x in (blocks, firsts, starts))
    token = xp.arange(size)[:, None, None]
    begin = _cummax(xp, xp.where(starts, token, 0))
    means = firsts + _run_totals(xp, keys - firsts, starts) / (token - begin + 1).astype(xp.float32)
    # Block b's sinks are exact: of each lane, of which blocks are the innermost.
    exact = config.sinks - size * (first_block + xp.arange(n_blocks))
    lanes = keys.shape[1] // n_blocks
    exact = xp.broadcast_to(exact, (lanes, n_blocks)).reshape(1, -1, 1)
    means = xp.where(begin < exact, firsts, means)
    # So far they are means up to each token: the last one of a run is that of all of it.
    mean = means[size - 1]
    rows = [mean]
    for t in range(size - 2, -1, -1):
        mean = xp.where(starts[t + 1], means[t], mean)
        rows.append(mean)
    held = _by_block(xp.stack(rows[::-1]), blocks.shape)
    starts = _by_block(starts, blocks.shape)
    zeros = mx.logical_not(starts).sum(axis=(3, 4)).astype(mx.int32)
    return held, starts, zeros


@np.errstate(all="ignore")
def _hold_firsts(
    blocks: mx.array, config: DeltaConfig, first_block: int
) -> tuple[mx.array, mx.array]:
    """The first value of each element's run, float32, and which elements start one.

    Both are [B, Hkv, n_blocks, block_size, D]. Blocks are independent, with keyframes: the tokens
    of all blocks are stepped through side by side.
    """
    B, H, n_blocks, size, D = blocks.shape
    xp = _module()
    keys = _by_token(xp, blocks)
    thresholds = _array(xp, block_thresholds(blocks, config).reshape(-1, 1))
    position = first_block * size + np.arange(size)[:, None] + size * np.arange(n_blocks)
    exact = position < config.sinks  # [size, n_blocks]: they stand for themselves
    sinks = [_array(xp, mx.array(np.tile(row, B * H)[:, None])) for row in exact if row.any()]

    held = keys[0]  # the first value of a block
    firsts, starts = [held], [xp.ones(held.shape, xp.bool_)]
    for t in range(1, size):
        # "not more than" rather than "less than": a NaN compares false and so propagates.
        keep = xp.abs(keys[t] - held) <= thresholds
        if exact[t].any():
            keep = keep & ~sinks[t]
        held = xp.where(keep, held, keys[t])
        starts.append(~keep)
        firsts.append(held)
    return _by_block(xp.stack(firsts), blocks.shape), _by_block(xp.stack(starts), blocks.shape)


# A step along the tokens is a few thousand numbers. On a GPU that is a launch of MLX's; without one
# NumPy does it several times faster than MLX's CPU operations, which also weigh on the graph.


def _module() -> ModuleType:
    """Whose arrays the steps are made of: MLX's on a GPU, else NumPy's."""
    return mx if mx.default_device() == mx.Device(mx.gpu) else np


def _array(xp: Any, x: Any) -> Any:
    """MLX's array as one of the module's."""
    if xp is not np:
        return x
    mx.eval(x)  # said, not left to NumPy: so that it is seen by who counts
    return np.asarray(x)


def _by_token(xp: Any, x: mx.array) -> Any:
    """[B, Hkv, n, T, D] as [T, lanes, D]."""
    steps = x.transpose(3, 0, 1, 2, 4).reshape(x.shape[3], -1, x.shape[4])
    return np.ascontiguousarray(_array(xp, steps)) if xp is np else steps


def _by_block(x: Any, shape: tuple[int, ...]) -> mx.array:
    """[T, lanes, D] as [B, Hkv, n, T, D]."""
    B, H, n, steps, D = shape
    return mx.array(x).reshape(steps, B, H, n, D).transpose(1, 2, 3, 0, 4)


def _cummax(xp: Any, x: Any) -> Any:
    return np.maximum.accumulate(x, axis=0) if xp is np else mx.cummax(x, axis=0)


def _run_totals(xp: Any, deviations: Any, starts: Any) -> Any:
    """Sums [T, ..] of each run up to each token, added up in the order of the tokens."""
    total = xp.zeros_like(deviations[0])
    totals = [total]
    zero = xp.zeros_like(total)
    for t in range(1, len(deviations)):
        total = xp.where(starts[t], zero, total + deviations[t])
        totals.append(total)
    return xp.stack(totals)


def _of_blocks(zeros: mx.array, size: int) -> mx.array:
    """Zeros of tokens [B, Hkv, L] as those of blocks, int32 [B, Hkv, L / size]."""
    return zeros.reshape(*zeros.shape[:2], -1, size).sum(axis=-1).astype(mx.int32)


def _count_zeros(
    held: mx.array, config: DeltaConfig, starts: Sequence[int], previous: mx.array | None
) -> mx.array:
    """Zeros of each row of the delta key matrix, int32 [B, Hkv, L]; ``starts`` as positions."""
    if previous is None:
        before = mx.concatenate([held[:, :, :1], held[:, :, :-1]], axis=2)
    else:
        before = mx.concatenate([previous[:, :, None].astype(held.dtype), held[:, :, :-1]], axis=2)
    position = mx.array(list(starts))[:, None] + mx.arange(held.shape[2])  # [B, L]
    counted = position >= max(config.sinks, 1)
    if config.keyframes:
        counted = counted & (position % config.block_size != 0)
    return ((held == before).sum(axis=-1) * counted[:, None]).astype(mx.int32)
