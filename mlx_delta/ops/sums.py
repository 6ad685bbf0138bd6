"""Sums in an order of their own, with MLX operations: see :mod:`mlx_delta.method.sums`.

Those over a block's tokens are plain sums along an axis that is not the last one: without a GPU
MLX adds these up one after another, as is specified. On a GPU there are kernels for it.
"""

from __future__ import annotations

import mlx.core as mx

from mlx_delta.method.sums import LANES


def over_lanes(x: mx.array) -> mx.array:
    """Sums [.., 1] of float32 [.., m]: by 32 lanes, and these by halves."""
    missing = -x.shape[-1] % LANES
    if missing:
        x = mx.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)])
    sums = x.reshape(*x.shape[:-1], -1, LANES).sum(axis=-2)
    half = LANES // 2
    while half:
        sums = sums[..., :half] + sums[..., half:]
        half //= 2
    return sums
