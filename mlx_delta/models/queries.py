"""Sensitivities of a model that was not calibrated: from the queries of a short sample.

An error ``e`` of a key's channel changes a query's score by ``scale * q * e``, so the mean square
of ``scale * q`` says how much the scores mind it. What later layers make of the scores is not
known; :mod:`mlx_delta.calibrate` measures that. One pass over a hundred tokens, when the model is
loaded: the mean squares hardly depend on the text.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_delta.attention.probe import Seen, held_layers, watch_keys
from mlx_delta.config import DeltaConfig
from mlx_delta.sensitivities import Sensitivities

SAMPLE = """\
The ferry left at a quarter past six, and by the time the lights of the harbour had gone Anna knew
that she had forgotten the letter. "You could telephone," said her brother. "To whom?" she asked.

def average(prices: list[float]) -> float:
    return sum(prices) / len(prices) if prices else 0.0

1. Water boils at 100 degrees at sea level; on a mountain of 3,000 metres it boils at about 90.
2. Why does it? The pressure of the air is lower there.
"""
LONGEST = 128  # tokens of the sample

_LEAST_SHARE = 1e-6  # of a layer's mean weight


def query_sensitivities(model: nn.Module, tokenizer: Any, config: DeltaConfig) -> Sensitivities:
    """Sensitivities from the queries of the sample.

    Args:
        model: With the delta's attention.
        tokenizer: Its tokenizer.
        config: Of which the probes are made.
    """
    ids = tokenizer.encode(SAMPLE)[:LONGEST]
    squares, held = QuerySquares(), held_layers(model)
    keys: dict[int, mx.array] = {}

    def see(layer: int, seen: Seen) -> None:
        squares.add(layer, seen)
        keys[layer] = seen.keys[0].astype(mx.float32)

    watch_keys(model, ids, config, held, see)
    layers: list[np.ndarray | None] = [None] * len(model.make_cache())
    spread = list(layers)
    for layer in held:
        own = squares.of_layer(layer)
        layers[layer] = np.maximum(own, _LEAST_SHARE * own.mean())
        spread[layer] = block_spread(keys[layer], config.block_size)
    return Sensitivities(layers, spread=spread)


class QuerySquares:
    """Mean squares of scaled queries, by layer."""

    def __init__(self) -> None:
        self._squares: dict[int, mx.array] = {}

    def add(self, layer: int, seen: Seen) -> None:
        """Take the queries of a text; the keys say which share one."""
        _, heads, length, head_dim = seen.keys.shape
        scaled = seen.queries[0].astype(mx.float32) * seen.scale
        groups = mx.square(scaled).reshape(heads, -1, length, head_dim)
        self._squares[layer] = groups.mean(axis=(1, 2))

    def of_layer(self, layer: int) -> np.ndarray:
        """float32 [Hkv, D], over all tokens and the queries of each kv head."""
        return shared_by_pairs(np.array(self._squares[layer]))


def block_spread(keys: mx.array, size: int) -> np.ndarray:
    """Root of the mean square by which channels deviate from their mean over a block, [Hkv, D].

    Args:
        keys: float32 [Hkv, L, D].
        size: Tokens in a block; a text that is shorter is one.
    """
    heads, length, head_dim = keys.shape
    whole = length // size * size or length
    blocks = keys[:, :whole].reshape(heads, -1, min(size, whole), head_dim)
    return np.array(mx.sqrt(mx.var(blocks, axis=2).mean(axis=1)))


def shared_by_pairs(weights: np.ndarray) -> np.ndarray:
    """Means of the two channels [.., D] that RoPE turns into each other, d and d + D / 2."""
    half = weights.shape[-1] // 2
    mean = (weights[..., :half] + weights[..., half : 2 * half]) / 2
    return np.concatenate([mean, mean, weights[..., 2 * half :]], axis=-1)
