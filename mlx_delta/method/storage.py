"""Packed blocks of held keys in plain NumPy steps, for one block of one kv head.

This file is the specification of the storage format; the MLX operations in ``packing.py`` and
the kernels must agree with it bit for bit. A block of ``n`` keys [n, D] is stored as

- a **mask**, uint32 [n - 1, ceil(D / 32)]: bit ``d % 32`` of word ``d // 32`` of row ``t - 1``
  says that channel ``d`` changed at token ``t``: that a run of it starts there. Token 0, the
  keyframe, has no row: a run of every channel starts with it.
- the **payload**: one value for each run, those of the keyframe first, then token by token and
  channel by channel, in uint32 words. At 16 bits a word holds two values. Codes of ``bits`` bits
  lie ``32 // bits`` to a word, lowest bits first; no code crosses a word.
- for codes, a **grid**: ``low`` and ``step`` of each channel, [2, D].

A code stands for ``low + code * step``. ``low`` is the channel's smallest key of the block, and
``step`` a ``1 / (2 ** bits - 1)`` of its range, rounded *up* to the storage type, so that no key
lies above the grid: large changes carry what attention recalls, and are never clipped. What is
stored is always the code of a value, not of a difference.

The value of a run is its mean, or its first key, as the setting's ``run_value`` says; in the modes
that cut runs by their costs (:mod:`mlx_delta.method.runs`) its weighted mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mlx_delta.config import RunValue

from .attention import run_means

LARGEST = {"float16": 65504.0, "bfloat16": 3.3895313892515355e38}


@dataclass(frozen=True)
class PackedBlock:
    """One packed block; see the module for the layout."""

    mask: np.ndarray  # uint32 [n - 1, ceil(D / 32)]
    payload: np.ndarray  # uint32 [words]
    grid: np.ndarray | None  # float32 [2, D], values of the storage type; None at 16 bits
    count: int  # values in the payload


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


def stored_values(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values as they are stored in 16 bits: rounded; what is not finite stays as it is."""
    return np.where(np.isfinite(values), round_to(values, dtype), values).astype(np.float32)


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


def hold_block(
    keys: np.ndarray, stored: np.ndarray, threshold: float, first_position: int, sinks: int
) -> np.ndarray:
    """Held keys [n, D] of a block with first values: what attention reads far from the query.

    A key is compared with what is *stored* for the token before it, so the error of a held value
    is at most the threshold, and that of a stored code at most half a step. Sinks store every
    token; their exact keys are kept beside the blocks.
    """
    held = stored.copy()
    for t in range(1, len(keys)):
        if first_position + t >= sinks:
            with np.errstate(invalid="ignore"):
                keep = np.abs(keys[t] - held[t - 1]) <= np.float32(threshold)
            held[t] = np.where(keep, held[t - 1], stored[t])
    return held


def mean_block(
    keys: np.ndarray, threshold: float, first_position: int, sinks: int
) -> tuple[np.ndarray, np.ndarray]:
    """Means [n, D] of a block's runs, float32 before they are stored, and where runs start.

    A key is compared with its run's first key, whatever is stored: it is the mean of keys.
    """
    starts = np.ones(keys.shape, bool)
    first = keys[0]
    for t in range(1, len(keys)):
        if first_position + t >= sinks:
            with np.errstate(invalid="ignore"):
                starts[t] = ~(np.abs(keys[t] - first) <= np.float32(threshold))
        first = np.where(starts[t], keys[t], first)
    return run_means(keys, starts, sinks - first_position), starts


def pack_words(values: np.ndarray, bits: int) -> np.ndarray:
    """uint32 words of unsigned values [count]; the last word is filled up with zeros."""
    per_word = 32 // bits
    words = np.zeros(-(-len(values) // per_word), np.uint32)
    for i, value in enumerate(values):
        words[i // per_word] |= np.uint32(value) << np.uint32(bits * (i % per_word))
    return words


def pack_block(
    keys: np.ndarray,
    bits: int,
    dtype: str,
    threshold: float,
    first_position: int,
    sinks: int,
    run_value: RunValue,
) -> PackedBlock:
    """Pack keys [n, D], float32 values of the 16-bit type ``dtype``, held by a threshold."""
    n, head_dim = keys.shape
    grid = block_grid(keys, bits, dtype) if bits < 16 else None
    if run_value == "mean":
        values, changed = mean_block(keys, threshold, first_position, sinks)
    else:
        values, stored = keys, keys
        if grid is not None:
            stored = decode_values(encode_values(keys, grid, bits), grid, dtype)
        held = hold_block(keys, stored, threshold, first_position, sinks)
        changed = np.ones((n, head_dim), bool)
        changed[1:] = held[1:] != held[:-1]
    return pack_runs(values, changed, grid, bits, dtype)


def pack_runs(
    values: np.ndarray, changed: np.ndarray, grid: np.ndarray | None, bits: int, dtype: str
) -> PackedBlock:
    """Pack the values [n, D] of the runs that start where ``changed``, on the keys' grid."""
    n, head_dim = values.shape
    if grid is not None:
        codes = encode_values(values, grid, bits)
    elif dtype == "float16":
        codes = values.astype(np.float16).view(np.uint16)
    else:
        codes = stored_values(values, dtype).view(np.uint32) >> 16
    mask = np.zeros((n - 1, -(-head_dim // 32)), np.uint32)
    for d in range(head_dim):
        mask[:, d // 32] |= changed[1:, d].astype(np.uint32) << np.uint32(d % 32)
    return PackedBlock(mask, pack_words(codes[changed], bits), grid, int(changed.sum()))


def unpack_block(block: PackedBlock, head_dim: int, bits: int, dtype: str) -> np.ndarray:
    """Held keys [n, D] of a packed block, float32 values of the 16-bit type."""
    per_word = 32 // bits

    def value(index: int, d: int) -> np.float32:
        shift = np.uint32(bits * (index % per_word))
        code = (block.payload[index // per_word] >> shift) & np.uint32(2**bits - 1)
        if block.grid is not None:
            return decode_values(code[None], block.grid[:, d : d + 1], dtype)[0]
        if dtype == "float16":
            return np.float32(np.uint16(code).view(np.float16))
        return np.uint32(code << np.uint32(16)).view(np.float32)

    held = np.zeros((len(block.mask) + 1, head_dim), np.float32)
    index = 0
    for t in range(len(held)):
        for d in range(head_dim):
            if t == 0 or block.mask[t - 1, d // 32] >> np.uint32(d % 32) & 1:
                held[t, d] = value(index, d)
                index += 1
            else:
                held[t, d] = held[t - 1, d]
    return held
