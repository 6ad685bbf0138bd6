"""The 16-bit types that far keys are stored in, and grids that codes of them lie on.

The twin of :mod:`mlx_delta.method.storage`, with which it agrees bit for bit.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from mlx_delta.method.storage import LARGEST_STEP

HEAD_DIMS = range(16, 257, 16)  # for which there are kernels
LARGEST = {mx.float16: 65504.0, mx.bfloat16: 3.3895313892515355e38}


def storage_type(dtype: mx.Dtype) -> mx.Dtype:
    """The 16-bit type that keys of a type are stored in.

    Raises:
        ValueError: There is none.
    """
    if dtype in LARGEST:
        return dtype
    if dtype == mx.float32:
        return mx.float16
    raise ValueError(f"[DeltaKVCache] keys must be float16, bfloat16 or float32 but are {dtype}.")


def to_storage(values: mx.array) -> mx.array:
    """Round to the 16-bit storage type; finite values beyond its range become its largest."""
    return to_type(values, storage_type(values.dtype))


def to_type(values: mx.array, dtype: mx.Dtype) -> mx.array:
    """Round to a type; finite values beyond a 16-bit one's range become its largest."""
    if values.dtype == dtype:
        return values
    if dtype not in LARGEST:
        return values.astype(dtype)
    largest = LARGEST[dtype]
    finite = mx.abs(values) < mx.inf  # false for NaN and infinities, which stay what they are
    return mx.where(finite, mx.clip(values, -largest, largest), values).astype(dtype)


def with_sinks(held: mx.array, sinks: mx.array | None) -> mx.array:
    """Exact keys in place of what the first tokens' codes stand for."""
    if sinks is None:
        return held
    n_sinks = min(sinks.shape[2], held.shape[2])
    return mx.concatenate([sinks[:, :, :n_sinks], held[:, :, n_sinks:]], axis=2)


def block_grid(blocks: mx.array, bits: int | np.ndarray, dtype: mx.Dtype) -> mx.array:
    """The grid of each channel, [B, Hkv, blocks, 2, D], for float32 keys [.., block_size, D].

    ``bits`` of all channels, or of each, [D].
    """
    low, high = blocks.min(axis=3), blocks.max(axis=3)
    span = high - low
    exact = span / _largest_code(bits)
    nearest = exact.astype(dtype)
    above = (nearest.view(mx.uint16) + 1).view(dtype)
    step = mx.where(nearest.astype(mx.float32) < exact, above, nearest)
    # One NaN or infinity, and the channel can't be coded: every value of it becomes NaN.
    usable = (mx.abs(blocks) < mx.inf).all(axis=3) & (span < mx.inf)
    # What keys are held as may lie beyond the type's range.
    low = mx.clip(low, -LARGEST[dtype], LARGEST[dtype]).astype(dtype)
    grid = mx.stack([low, step], axis=3)
    return mx.where(usable[:, :, :, None], grid, mx.array(mx.nan, dtype))


def encode_values(blocks: mx.array, grid: mx.array, bits: int | np.ndarray) -> mx.array:
    """Codes, uint32 [B, Hkv, blocks, block_size, D], of float32 keys of that shape."""
    low, step = (grid[:, :, :, i : i + 1].astype(mx.float32) for i in (0, 1))
    usable = step > 0
    codes = mx.floor((blocks - low) / mx.where(usable, step, 1) + 0.5)
    return mx.where(usable, mx.clip(codes, 0, _largest_code(bits)), 0).astype(mx.uint32)


def short_steps(steps: mx.array) -> mx.array:
    """The nearest steps that eight bits hold, uint8, for steps >= 0; 0 for what is no number."""
    bits = mx.where(steps >= 0, steps, 0).astype(mx.float16).view(mx.uint16).astype(mx.int32)
    return mx.minimum((bits + 64) >> 7, LARGEST_STEP).astype(mx.uint8)


def whole_steps(short: mx.array) -> mx.array:
    """The steps that these bits stand for, float32."""
    return (short.astype(mx.uint16) << 7).view(mx.float16).astype(mx.float32)


def _largest_code(bits: int | np.ndarray) -> Any:
    return 2**bits - 1 if isinstance(bits, int) else mx.array((2**bits - 1).astype(np.float32))
