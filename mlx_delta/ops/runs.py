"""Cutting blocks into runs, all blocks, kv heads and channels at once.

Agrees with :mod:`mlx_delta.method.runs`. With Metal a kernel does it. Else the same steps run in
MLX's arrays on a GPU and in NumPy's without one: there a step is a few thousand numbers, for which
MLX's CPU operations take several times as long.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_delta.config import DeltaConfig
from mlx_delta.method.runs import LEAST_TOKEN, MOST_STRETCH, MOST_TOKEN, STRETCH
from mlx_delta.method.sequence import LEAST_WEIGHT
from mlx_delta.method.sums import over_lanes

from . import sums
from .proving import blocks_to_try, kind_of, proven, tokens_like
from .runs_kernel import can_cut, cut_runs, elements
from .sequence import by_token, in_sequence, token_sequences

# Channels at a time in NumPy: more only take memory, 256 bytes each.
LANES = 8192

Array = Any  # of NumPy or of MLX, as the module that comes with it


def hold_runs(
    blocks: mx.array, config: DeltaConfig, first_block: int
) -> tuple[mx.array, mx.array, mx.array]:
    """The runs of whole blocks, and what their elements are held as.

    Args:
        blocks: float32 [B, Hkv, n_blocks, block_size, D], the keys.
        config: The setting of this layer, with runs that are optimal or greedy.
        first_block: Which block of the text the first one is.

    Returns:
        The weighted means, float32, and which elements start a run, boolean, both shaped as
        ``blocks``; and how many of each block's elements start none, int32 [B, Hkv, n_blocks].
    """
    B, H, n_blocks, size, D = blocks.shape
    sequence = token_sequences(blocks.reshape(B, H, n_blocks * size, D), config, first_block)
    means, starts = runs_in_sequence(in_sequence(blocks, sequence), config, first_block)
    zeros = mx.logical_not(starts).sum(axis=(3, 4)).astype(mx.int32)
    return by_token(means, sequence), by_token(starts, sequence), zeros


def runs_in_sequence(
    blocks: mx.array, config: DeltaConfig, first_block: int
) -> tuple[mx.array, mx.array]:
    """Means and starts of :func:`hold_runs`, of blocks whose tokens are in sequence already."""
    B, H, n_blocks, size, D = blocks.shape
    if not n_blocks or not can_cut(config):
        return _by_operations(blocks, config, first_block)

    def apart(keys: mx.array) -> mx.array:
        return keys.reshape(*keys.shape[:2], -1, size, D)

    def kernel(keys: mx.array) -> tuple[mx.array, mx.array]:
        words, held, _ = cut_runs(keys, config, first_block)
        return held, elements(words, D)

    keys = blocks.reshape(B, H, -1, D)
    return proven(
        ("delta_runs", *kind_of(keys, size), config.threshold_mode),
        keys,
        kernel,
        lambda keys: _by_operations(apart(keys), config, first_block),
        lambda runs: runs,
        lambda: tokens_like(keys, blocks_to_try(config), size),
    )


def _by_operations(
    blocks: mx.array, config: DeltaConfig, first_block: int
) -> tuple[mx.array, mx.array]:
    """The same in MLX's arrays on a GPU, in NumPy's without one."""
    B, H, n_blocks, size, D = blocks.shape
    own = config.sensitivities_of_layer(H, D)
    first = first_block * size
    sinks = np.clip(config.sinks - first - size * np.arange(n_blocks), 0, size)
    gpu = mx.default_device() == mx.Device(mx.gpu)
    keys = blocks if gpu else np.asarray(blocks)
    lanes = keys.reshape(-1, size, D)  # [M, n, D]: blocks of all heads and rows
    weights, salience = (
        np.broadcast_to(x[None, :, None], (B, H, n_blocks, D)).reshape(-1, D) for x in own
    )
    exact = np.broadcast_to(sinks, (B, H, n_blocks)).reshape(-1)
    arguments = (config.threshold_mode == "optimal", config.run_level)
    if gpu:
        means, starts = cut_blocks(
            mx, lanes, mx.array(weights), mx.array(salience), exact, *arguments
        )
    else:
        step = max(1, LANES // D)
        some = [slice(i, i + step) for i in range(0, len(lanes), step)]
        parts = [
            cut_blocks(np, lanes[s], weights[s], salience[s], exact[s], *arguments) for s in some
        ]
        means, starts = (np.concatenate(part) for part in zip(*parts, strict=True))
    return mx.array(means.reshape(blocks.shape)), mx.array(starts.reshape(blocks.shape))


def cut_blocks(
    xp: ModuleType,
    keys: Array,
    weights: Array,
    salience: Array,
    sinks: np.ndarray,
    optimal: bool,
    level: float,
) -> tuple[Array, Array]:
    """Means and starts [M, n, D] of keys of that shape.

    Weights and salience are [M, D], ``sinks`` [M].
    """
    steps = keys.swapaxes(0, 1)  # [n, M, D]
    if xp is np:
        steps = np.ascontiguousarray(steps)
    with np.errstate(all="ignore"):  # NaN and infinities have their own rule
        tokens = token_weights(xp, keys, weights, salience)
        costs = np.float32(level) / xp.sqrt(xp.maximum(weights, LEAST_WEIGHT))
        tokens = tokens.T[..., None]  # [n, M, 1]
        if optimal and level > 0:
            starts = _optimal_starts(xp, steps, tokens, costs)
        elif optimal:
            starts = xp.concatenate([xp.ones_like(steps[:1]) > 0, steps[1:] != steps[:-1]])
        else:
            starts = _greedy_starts(xp, steps, tokens, costs)
        if sinks.any():
            alone = np.arange(len(steps))[:, None] < sinks + (sinks > 0)  # [n, M]
            starts = starts | (mx.array(alone) if xp is mx else alone)[..., None]
        means = _stretched(xp, steps, _weighted_means(xp, steps, starts, tokens), starts, tokens)
    return means.swapaxes(0, 1), starts.swapaxes(0, 1)


def token_weights(xp: ModuleType, keys: Array, weights: Array, salience: Array) -> Array:
    """How much tokens count, see :func:`mlx_delta.method.runs.token_weights`.

    Args:
        xp: Whose arrays they are.
        keys: [.., n, D].
        weights: [.., D], for all of these blocks.
        salience: As the weights.

    Returns:
        [.., n].
    """
    n = keys.shape[-2]
    deviation = keys - keys.sum(axis=-2, keepdims=True) / np.float32(n)
    share = _over_lanes(xp, deviation * deviation * weights[..., None, :])
    looked_at = _over_lanes(xp, deviation * salience[..., None, :])
    share = share * xp.exp(looked_at - looked_at.max(axis=-1, keepdims=True))
    relative = share / (_over_lanes(xp, share)[..., None] / np.float32(n))
    usable = (xp.abs(relative) < xp.inf).all(axis=-1, keepdims=True)
    clipped = xp.minimum(xp.maximum(relative, LEAST_TOKEN), MOST_TOKEN)
    return xp.where(usable, clipped, np.float32(1))


def _over_lanes(xp: ModuleType, x: Array) -> Array:
    """Sums over the last axis, in the order of :mod:`mlx_delta.method.sums`."""
    return sums.over_lanes(x)[..., 0] if xp is mx else over_lanes(x)


def _optimal_starts(xp: ModuleType, keys: Array, tokens: Array, costs: Array) -> Array:
    """Boolean [n, M, D] for keys of that shape, tokens [n, M, 1] and costs [M, D].

    All ``s`` of a ``t`` at once.
    """
    n, M, D = keys.shape
    finite = (xp.abs(keys) < xp.inf).all(axis=0)
    values = xp.where(finite, keys, np.float32(0))
    values = values - values.sum(axis=0) / np.float32(n)
    total = _prefix_sums(xp, tokens)
    first = _prefix_sums(xp, tokens * values)
    search = _search_mlx if xp is mx else _search_numpy
    begins = search(total, first, costs)
    # Back from the end: the run that ends at t begins at begins[t].
    end = xp.zeros((M, D), xp.uint8) + np.uint8(n)
    rows = []
    for t in range(n, 0, -1):
        here = end == t
        rows.append(here)
        end = xp.where(here, begins[t], end)
    rows.append(here | True)  # a run starts where another ends, and with the first token
    return xp.stack(rows[:0:-1]) | xp.logical_not(finite)


def _prefix_sums(xp: ModuleType, values: Array) -> Array:
    """Sums [n + 1, M, D] of the first 0 to n of values [n, M, D], added up in their order."""
    zero = xp.zeros(values.shape[1:], xp.float32)
    sums = [zero]
    for row in values:  # NumPy's cumsum along the first axis is many times slower
        sums.append(sums[-1] + row)
    return xp.stack(sums)


def _search_mlx(total: Array, first: Array, costs: Array) -> list[Array]:
    before = mx.zeros_like(first[:1])
    begins = [mx.zeros(costs.shape, mx.uint8)]
    for t in range(1, len(first)):
        moment = first[t] - first[:t]
        candidates = before - moment * moment / (total[t] - total[:t])
        begins.append(mx.argmin(candidates, axis=0).astype(mx.uint8))
        before = mx.concatenate([before, (candidates.min(axis=0) + costs)[None]])
    return begins


def _search_numpy(total: np.ndarray, first: np.ndarray, costs: np.ndarray) -> np.ndarray:
    n = len(first) - 1
    before = np.zeros_like(first)
    begins = np.zeros(first.shape, np.uint8)
    room = np.empty_like(first[1:])
    least = np.empty(first.shape[1:], np.float32)
    same = np.empty(room.shape, np.bool_)
    # Counted from the end, so that the largest is the earliest: one pass instead of an argmin.
    back = np.arange(n, 0, -1, dtype=np.uint8)[:, None, None]
    for t in range(1, n + 1):
        candidates, equal = room[:t], same[:t]
        np.subtract(first[t], first[:t], out=candidates)
        np.multiply(candidates, candidates, out=candidates)
        np.multiply(candidates, np.float32(1) / (total[t] - total[:t]), out=candidates)
        np.subtract(before[:t], candidates, out=candidates)
        np.min(candidates, axis=0, out=least)
        np.equal(candidates, least, out=equal)
        marks = equal.view(np.uint8)
        np.multiply(marks, back[:t], out=marks)
        np.subtract(np.uint8(n), marks.max(axis=0), out=begins[t])
        np.add(least, costs, out=before[t])
    return begins


def _greedy_starts(xp: ModuleType, keys: Array, tokens: Array, costs: Array) -> Array:
    base = xp.sqrt(costs)
    first, total, weight = keys[0], xp.zeros_like(keys[0]), tokens[0]
    rows = [first == first]
    rows[0] = rows[0] | True
    for t in range(1, len(keys)):
        key, token = keys[t], tokens[t]
        threshold = base / xp.sqrt(xp.sqrt(token))
        start = xp.logical_not(xp.abs(key - (first + total / weight)) <= threshold)
        total = xp.where(start, np.float32(0), total + token * (key - first))
        weight = xp.where(start, np.float32(0), weight) + token
        first = xp.where(start, key, first)
        rows.append(start)
    return xp.stack(rows)


def _weighted_means(xp: ModuleType, keys: Array, starts: Array, tokens: Array) -> Array:
    """[n, M, D], see :func:`mlx_delta.method.runs.weighted_means`."""
    rows = []
    first = total = weight = xp.zeros_like(keys[0])
    for key, start, token in zip(keys, starts, tokens, strict=True):
        first = xp.where(start, key, first)
        total = xp.where(start, np.float32(0), total + token * (key - first))
        weight = xp.where(start, np.float32(0), weight) + token
        rows.append(xp.where(start, first, first + total / weight))
    for t in range(len(rows) - 2, -1, -1):
        rows[t] = xp.where(starts[t + 1], rows[t], rows[t + 1])
    return xp.stack(rows)


def _stretched(xp: ModuleType, keys: Array, means: Array, starts: Array, tokens: Array) -> Array:
    """[n, M, D], see :func:`mlx_delta.method.runs.held_values`."""
    total = _sum(tokens)
    center = _sum(tokens * keys) / total
    apart = means - center
    of_keys = _sum(tokens * xp.square(keys - center))
    of_means = _sum(tokens * xp.square(apart))
    factor = xp.minimum(1 + (of_keys / of_means - 1) * float(STRETCH), float(MOST_STRETCH))
    ends = xp.concatenate([starts[1:], xp.ones_like(starts[:1])])
    stretched = xp.logical_not(starts & ends) & (factor > 1)
    return xp.where(stretched, center + apart * factor, means)


def _sum(rows: Array) -> Array:
    """Sums over the tokens [n, ..], added up in their order."""
    total = rows[0]
    for row in rows[1:]:
        total = total + row
    return total
