"""The 16-bit types of what is stored, grids of codes, and steps of a byte, in NumPy.

This file is a part of the specification of how keys and values are stored
(:mod:`mlx_delta.method.codes`, :mod:`mlx_delta.method.deltas`, :mod:`mlx_delta.method.values`): the
MLX operations in ``ops/storage.py`` agree with it bit for bit.

A code stands for ``low + code * step``, of its channel in a block. ``low`` is the channel's
smallest key of the block, and ``step`` a ``1 / (2 ** bits - 1)`` of its range, rounded *up* to the
storage type, so that no key lies above the grid: large changes carry what attention recalls, and
are never clipped.

A **short** step is a byte: the upper one of a half without its sign, 5 bits of exponent and 3 of
mantissa. 0 stands for 0, and 0xF7 for 61,440.
"""

from __future__ import annotations

import numpy as np

LARGEST = {"float16": 65504.0, "bfloat16": 3.3895313892515355e38}
LARGEST_STEP = 0xF7  # of bytes that are float16's finite numbers


def round_to(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values of a 16-bit type nearest to these; beyond its range, its largest."""
    values = np.asarray(values, np.float32)
    largest = np.float32(LARGEST[dtype])
    values = np.where(values > largest, largest, values)
    values = np.where(values < -largest, -largest, values)
    if dtype == "float16":
        return values.astype(np.float16).astype(np.float32)
    bits = values.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return np.where(np.isnan(values), values, rounded.view(np.float32)).astype(np.float32)


def round_up(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values of a 16-bit type, the smallest ones that are not below these (>= 0)."""
    nearest = round_to(values, dtype)
    if dtype == "float16":
        above = np.nextafter(nearest.astype(np.float16), np.float16(np.inf)).astype(np.float32)
    else:
        above = (nearest.view(np.uint32) + np.uint32(0x10000)).view(np.float32)
    return np.where(nearest < values, above, nearest)


def block_grid(keys: np.ndarray, bits: int | np.ndarray, dtype: str) -> np.ndarray:
    """``low`` and ``step`` of each channel, float32 [2, D], for keys [n, D].

    A channel with a NaN or infinity has no grid: NaN, which is what all its codes then give.
    """
    low, high = keys.min(axis=0), keys.max(axis=0)
    with np.errstate(over="ignore", invalid="ignore"):
        span = high - low
        step = round_up(span / np.float32(2**bits - 1), dtype)
        finite = np.isfinite(span)
    return np.where(finite, np.stack([low, step]), np.float32(np.nan))


def encode_values(keys: np.ndarray, grid: np.ndarray, bits: int | np.ndarray) -> np.ndarray:
    """Codes of keys [n, D], uint32: the nearest grid point, halves upwards."""
    low, step = grid
    with np.errstate(divide="ignore", invalid="ignore"):
        codes = np.floor((keys - low) / step + np.float32(0.5))
    usable = step > 0  # a channel that does not vary, or has no grid, gets code 0
    return np.where(usable, np.clip(codes, 0, 2**bits - 1), 0).astype(np.uint32)


def decode_values(codes: np.ndarray, grid: np.ndarray, dtype: str) -> np.ndarray:
    """Values of codes [n, D], rounded to the storage type."""
    low, step = grid
    with np.errstate(invalid="ignore"):
        return round_to(low + codes.astype(np.float32) * step, dtype)


def pack_words(values: np.ndarray, bits: int) -> np.ndarray:
    """uint32 words of unsigned values [count]; the last word is filled up with zeros."""
    per_word = 32 // bits
    words = np.zeros(-(-len(values) // per_word), np.uint32)
    for i, value in enumerate(values):
        words[i // per_word] |= np.uint32(value) << np.uint32(bits * (i % per_word))
    return words


def short_steps(steps: np.ndarray) -> np.ndarray:
    """The nearest steps that eight bits hold, uint8, for steps >= 0; 0 for what is no number."""
    with np.errstate(over="ignore", invalid="ignore"):
        bits = np.where(steps >= 0, steps, 0).astype(np.float16).view(np.uint16).astype(np.int64)
    return np.minimum((bits + 64) >> 7, LARGEST_STEP).astype(np.uint8)


def whole_steps(short: np.ndarray) -> np.ndarray:
    """The steps that these bits stand for, float32."""
    return (short.astype(np.uint16) << 7).view(np.float16).astype(np.float32)
