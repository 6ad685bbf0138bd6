"""What thresholds would skip and cost on a text: from its queries and keys, as they come.

The model runs once over each window. Every layer's keys are then held at a whole grid of
thresholds, and forgotten again: only the sums stay.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_delta.config import DeltaConfig
from mlx_delta.measure.sparsity import causal_pairs, queries_of_blocks
from mlx_delta.models.anatomy import watched_caches
from mlx_delta.ops.hold import hold_blocks

# In units of the spread of the keys: dense where sparsity changes fast; at 8 nearly all is held.
GRID = (0.0, 0.2, 0.35, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4, 1.6, 1.8, 2.0) + (
    *(2.4, 2.8, 3.4, 4.2, 5.5, 8.0),
)
THRESHOLDS_AT_ONCE = 8  # copies of a layer's keys in memory
SAMPLED_QUERIES = 32  # of a window, for the cost


@dataclass(frozen=True)
class Recording:
    """Sums over the windows of a text, divided by their number.

    Attributes:
        layers: Which layers of the model hold keys; the first axis of what follows.
        thresholds: [layers, G], ascending.
        sparsity: [layers, kv heads, G], prefill sparsity of a window.
        cost: [layers, kv heads, G], see :func:`measure_layer`.
    """

    layers: tuple[int, ...]
    thresholds: np.ndarray
    sparsity: np.ndarray
    cost: np.ndarray

    @property
    def units(self) -> np.ndarray:
        """[layers], what 1 on the grid is: 1, or the spread of a layer's keys."""
        return self.thresholds[:, -1] / GRID[-1]


def record(
    model: nn.Module,
    windows: Sequence[Sequence[int]],
    config: DeltaConfig,
    rng: np.random.Generator,
    progress: Callable[[], None] = lambda: None,
) -> Recording:
    """Run a model densely over windows of one length and record what thresholds would do.

    Args:
        model: From :func:`mlx_delta.load`.
        windows: Token ids.
        config: Its geometry, mode and storage are used, its thresholds are not.
        rng: Chooses the queries that the cost is measured with.
        progress: Called after each window.
    """
    config = config.resolve(len(windows[0]))
    grids: dict[int, np.ndarray] = {}
    sums: dict[int, np.ndarray] = {}

    def see(layer: int, queries: mx.array, keys: mx.array, scale: float) -> None:
        if layer not in grids:
            unit = 1.0 if config.threshold_mode == "relative" else spread(keys, config)
            grids[layer] = unit * np.array(GRID)
        first = (config.window_blocks + 1) * config.block_size  # sees a held block
        positions = rng.integers(first, keys.shape[2], SAMPLED_QUERIES)
        found = measure_layer(queries, keys, scale, config, grids[layer], positions)
        sums[layer] = sums.get(layer, 0) + np.stack(found)

    for window in windows:
        # `see` computes what it needs; the logits are left alone.
        model(mx.array(list(window))[None], cache=watched_caches(model, see))
        progress()
    layers = sorted(sums)
    sparsity, cost = np.stack([sums[i] for i in layers], axis=1) / len(windows)
    thresholds = np.stack([grids[i] for i in layers])
    return Recording(tuple(layers), thresholds, sparsity, cost)


def spread(keys: mx.array, config: DeltaConfig) -> float:
    """Root mean square of a layer's keys [1, Hkv, L, D] around the means of their blocks."""
    H, size, D = keys.shape[1], config.block_size, keys.shape[3]
    blocks = keys[0, :, : keys.shape[2] // size * size].astype(mx.float32).reshape(H, -1, size, D)
    deviation = blocks - blocks.mean(axis=2, keepdims=True)
    if size == 1:  # a block alone does not vary; its neighbours do
        deviation = blocks[:, 1:] - blocks[:, :-1]
    return float(np.sqrt(mx.square(deviation).mean()))


def measure_layer(
    queries: mx.array,
    keys: mx.array,
    scale: float,
    config: DeltaConfig,
    thresholds: np.ndarray,
    positions: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """What each threshold skips of one layer's QK^T, and what it costs.

    The cost of an error ``e`` of the scores is half its variance under the attention ``p`` of the
    query, ``(sum p e^2 - (sum p e)^2) / 2``: the KL divergence between attention with full and
    with held keys, to second order. Averaged over the sampled queries. What a layer's error does
    to the layers after it is not counted.

    Args:
        queries: [1, Hq, L, D], after RoPE.
        keys: [1, Hkv, L, D], after RoPE.
        scale: Factor on the scores.
        config: The setting, without a ``block_fraction``.
        thresholds: [G].
        positions: Of the sampled queries.

    Returns:
        Prefill sparsity and cost, each [Hkv, G].
    """
    _, H, length, D = keys.shape
    size = config.block_size
    blocks = (length - 1) // size - config.window_blocks  # far from the last query
    full = keys[:, :, : blocks * size]
    skipping = queries_of_blocks(config, blocks, 0, length) / (D * causal_pairs(0, length))
    attention = _FarAttention(queries, keys, scale, config, positions, blocks * size)

    sparsity, cost = [], []
    for start in range(0, len(thresholds), THRESHOLDS_AT_ONCE):
        some = thresholds[start : start + THRESHOLDS_AT_ONCE].tolist()
        # Copies of a head at different thresholds are heads with thresholds of their own.
        tried = dataclasses.replace(config, threshold=(tuple(some) * H,))
        held, zeros = hold_blocks(mx.repeat(full, len(some), axis=1), tried)
        held = held.reshape(H, len(some), -1, D)
        costs = mx.stack([attention.cost(held[:, g]) for g in range(len(some))], axis=1)
        mx.eval(zeros, costs)
        sparsity.append(np.array(zeros).reshape(H, len(some), blocks) @ skipping)
        cost.append(np.array(costs))
    return np.concatenate(sparsity, axis=1), np.concatenate(cost, axis=1)


def highest_sparsity(config: DeltaConfig, length: int) -> float:
    """Prefill sparsity of a text of so many tokens if every key that may be held is."""
    config = config.resolve(length)
    size = config.block_size
    blocks = max(0, (length - 1) // size - config.window_blocks)
    position = np.arange(blocks * size)
    held = position >= max(config.sinks, 1)
    if config.keyframes:
        held &= position % size != 0
    per_block = held.reshape(blocks, size).sum(axis=1)
    return float(per_block @ queries_of_blocks(config, blocks, 0, length) / causal_pairs(0, length))


class _FarAttention:
    """Attention of a few queries to the keys that they see as held ones."""

    def __init__(
        self,
        queries: mx.array,
        keys: mx.array,
        scale: float,
        config: DeltaConfig,
        positions: np.ndarray,
        end: int,
    ):
        _, H, length, D = keys.shape
        group = queries.shape[1] // H
        position = np.tile(positions, group)[:, None]
        key = np.arange(length)[None]
        far = (
            key[:, :end] // config.block_size < position // config.block_size - config.window_blocks
        )
        far &= key[:, :end] >= config.sinks
        # Scaled, and contiguous: strided products are slow on a CPU.
        sampled = queries[0][:, mx.array(positions)].astype(mx.float32) * scale
        self._queries = mx.contiguous(sampled.reshape(H, -1, D))
        full = mx.contiguous(keys[0].astype(mx.float32))
        scores = self._queries @ full.swapaxes(1, 2)
        weights = mx.softmax(mx.where(mx.array(key <= position), scores, -mx.inf), axis=-1)
        self._weights = mx.where(mx.array(far), weights[:, :, :end], 0)
        self._scores = scores[:, :, :end]

    def cost(self, held: mx.array) -> mx.array:
        """Mean over the queries [Hkv] with held keys [Hkv, N, D]."""
        held = mx.contiguous(held.astype(mx.float32))
        error = self._queries @ held.swapaxes(1, 2) - self._scores
        weighted = self._weights * error
        return 0.5 * ((weighted * error).sum(axis=-1) - weighted.sum(axis=-1) ** 2).mean(axis=-1)
