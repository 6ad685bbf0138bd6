"""The sequence in which blocks' tokens are held, all blocks and kv heads at once.

Agrees with :mod:`mlx_delta.method.sequence`, bit for bit. With a GPU's kernels one of them does it;
else the same steps run in MLX's arrays on a GPU and in NumPy's without one.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_delta.config import DeltaConfig
from mlx_delta.method.sequence import LEAST_APART, factors, largest_code

from .proving import blocks_to_try, itself, kind_of, proven, tokens_like
from .sequence_kernel import can_order, order_tokens

# At a time in NumPy: their distances, 16 KB each, stay in the processor's cache.
BLOCKS = 32

Array = Any  # of NumPy or of MLX, as the module that comes with it


def token_sequences(keys: mx.array, config: DeltaConfig, first_block: int) -> mx.array:
    """The tokens of whole blocks in sequence, uint8 [B, Hkv, blocks, size].

    Args:
        keys: [B, Hkv, blocks * size, D], of any floating type.
        config: The setting of this layer.
        first_block: Which block of the text the first one is.
    """
    B, H, length, D = keys.shape
    size = config.block_size
    blocks = length // size
    if not blocks or not can_order(config, D):
        on_gpu = mx.default_device() == mx.Device(mx.gpu)
        return _by_operations(mx if on_gpu else np, keys, config, first_block)
    return proven(
        ("token_sequence", *kind_of(keys, size)),
        keys,
        lambda keys: order_tokens(keys, config, first_block)[0],
        # NumPy adds up in the specification's order: another bit, and a sequence is another.
        lambda keys: _by_operations(np, keys, config, first_block),
        itself,
        lambda: tokens_like(keys, blocks_to_try(config), size),
    )


def _by_operations(
    xp: ModuleType, keys: mx.array, config: DeltaConfig, first_block: int
) -> mx.array:
    """The same in MLX's arrays or in NumPy's."""
    B, H, length, D = keys.shape
    size = config.block_size
    blocks = length // size
    mx.eval(keys)
    lanes = keys.astype(mx.float32).reshape(-1, size, D)  # blocks of all heads and rows
    own = factors(config.sensitivities_of_layer(H, D)[0])
    each = np.broadcast_to(own[None, :, None], (B, H, blocks, D)).reshape(-1, 1, D)
    alone = config.sinks > size * (first_block + np.arange(blocks))
    stay = np.broadcast_to(alone, (B, H, blocks)).reshape(-1)
    if xp is mx:
        found = sequences_of(mx, lanes, mx.array(each), mx.array(stay))
    else:
        some, rows = [slice(i, i + BLOCKS) for i in range(0, len(each), BLOCKS)], np.array(lanes)
        parts = [sequences_of(np, rows[s], each[s], stay[s]) for s in some]
        found = mx.array(np.concatenate([np.zeros((0, size), np.uint8), *parts]))
    return found.reshape(B, H, blocks, size)


def sequences_of(xp: ModuleType, keys: Array, each: Array, stay: Array) -> Array:
    """uint8 [M, n] of keys [M, n, D], channels' factors [M, 1, D], and which stay as they are."""
    M, n, D = keys.shape
    with np.errstate(all="ignore"):  # what is not finite has its own rule
        apart = (keys - keys.sum(axis=1, keepdims=True) / np.float32(n)) * each
        size = xp.abs(apart)
        largest = size.max(axis=(1, 2), keepdims=True)
        usable = (size < xp.inf).all(axis=(1, 2)) & (largest > LEAST_APART).reshape(-1)
        usable = usable & xp.logical_not(stay)
        scale = float(largest_code(D)) / largest
        codes = xp.where(usable[:, None, None], xp.round(apart * scale), np.float32(0))
    # Whole numbers below 2^24: no product and no sum of them is rounded.
    squares = (codes * codes).sum(axis=2)
    products = xp.matmul(codes, codes.swapaxes(1, 2))
    distances = squares[:, :, None] + squares[:, None] - (products + products)
    index, block = xp.arange(n), xp.arange(M)
    last = xp.zeros((M,), xp.int32)
    gone = xp.zeros((M, n), xp.float32)
    rows = [last]
    for _ in range(n - 1):
        gone[block, last] = np.float32(np.inf)
        last = (distances[block, last] + gone).argmin(axis=1).astype(xp.int32)
        rows.append(last)
    found = xp.where(usable[:, None], xp.stack(rows, axis=1), index)
    return found.astype(xp.uint8)


def in_sequence(x: mx.array, sequence: mx.array) -> mx.array:
    """Tokens' rows [B, Hkv, blocks, size, ..] as they come in sequence [B, Hkv, blocks, size]."""
    return mx.take_along_axis(x, sequence.astype(mx.int32)[..., None], axis=3)


def by_token(x: mx.array, sequence: mx.array) -> mx.array:
    """Rows in sequence [B, Hkv, blocks, size, ..] as tokens come in the text."""
    return in_sequence(x, mx.argsort(sequence.astype(mx.int32), axis=3))
