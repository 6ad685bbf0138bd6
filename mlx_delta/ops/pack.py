"""Packing held keys and unpacking them again with MLX operations.

These are the kernels' twins, and what runs without Metal; they agree with
:mod:`mlx_delta.method.storage` bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_delta.config import DeltaConfig

from .hold import hold_blocks, hold_means

HEAD_DIMS = range(16, 257, 16)  # for which there are kernels
LARGEST = {mx.float16: 65504.0, mx.bfloat16: 3.3895313892515355e38}


@dataclass(frozen=True)
class EncodedBlocks:
    """What the encoder makes of whole blocks, before their payloads are put end to end.

    Attributes:
        masks: uint32 [B, Hkv, blocks, block_size - 1, words of D bits].
        payload: uint32 [B, Hkv, blocks, worst_words]; what follows a block's values is undefined.
        counts: int32 [B, Hkv, blocks, 2]; values in the payload, and zero deltas.
        grid: [B, Hkv, blocks, 2, D] of the storage type; ``None`` at 16 bits.
    """

    masks: mx.array
    payload: mx.array
    counts: mx.array
    grid: mx.array | None


@dataclass(frozen=True)
class PackedBlocks:
    """All far blocks of a layer, as the kernels read them.

    Attributes:
        masks: uint32 [B, Hkv, blocks, block_size - 1, words of D bits].
        payload: uint32 [B, capacity]; each block of each head has a run of words of its own.
        offsets: int32 [B, Hkv, blocks]; the first word of that run.
        grid: [B, Hkv, blocks, 2, D] of the storage type; ``None`` at 16 bits.
        sinks: [B, Hkv, n_sinks, D], exact keys of the first tokens, which are read instead of
            their codes; ``None`` at 16 bits, or without sinks.
        bits: Bits of a value.
        dtype: The storage type, float16 or bfloat16.
        head_dim: D.
    """

    masks: mx.array
    payload: mx.array
    offsets: mx.array
    grid: mx.array | None
    sinks: mx.array | None
    bits: int
    dtype: mx.Dtype
    head_dim: int

    def first(self, blocks: int) -> PackedBlocks:
        """The first blocks only."""
        grid = None if self.grid is None else self.grid[:, :, :blocks]
        masks, offsets = self.masks[:, :, :blocks], self.offsets[:, :, :blocks]
        return replace(self, masks=masks, offsets=offsets, grid=grid)

    def part(self, begin: int, end: int) -> PackedBlocks:
        """Blocks ``begin`` to ``end`` only."""
        grid = None if self.grid is None else self.grid[:, :, begin:end]
        masks, offsets = self.masks[:, :, begin:end], self.offsets[:, :, begin:end]
        sinks = self.sinks
        if sinks is not None:
            first = begin * (self.masks.shape[3] + 1)
            sinks = sinks[:, :, first:] if first < sinks.shape[2] else None
        return replace(self, masks=masks, offsets=offsets, grid=grid, sinks=sinks)

    def after(self, other: mx.array) -> PackedBlocks:
        """The same, to be read once another array is computed."""
        masks, offsets = mx.depends([self.masks, self.offsets], [other])
        return replace(self, masks=masks, offsets=offsets)


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
    dtype = storage_type(values.dtype)
    if values.dtype == dtype:
        return values
    largest = LARGEST[dtype]
    finite = mx.abs(values) < mx.inf  # false for NaN and infinities, which stay what they are
    return mx.where(finite, mx.clip(values, -largest, largest), values).astype(dtype)


def worst_words(block_size: int, head_dim: int, bits: int) -> int:
    """Words of a block's payload if every value changes."""
    return -(-block_size * head_dim // (32 // bits))


def pack_blocks(keys: mx.array, config: DeltaConfig, first_block: int) -> EncodedBlocks:
    """Hold and pack the keys of whole blocks.

    Args:
        keys: [B, Hkv, blocks * block_size, D], float16 or bfloat16, after RoPE.
        config: The setting of this layer, with ``key_bits``.
        first_block: Which block of the text the first one is.
    """
    B, H, length, D = keys.shape
    assert config.key_bits is not None
    bits, size = int(config.key_bits), config.block_size
    shape = (B, H, length // size, size, D)
    blocks = keys.reshape(shape).astype(mx.float32)
    grid = block_grid(blocks, bits, keys.dtype) if bits < 16 else None
    values, starts, zeros = _runs(keys, blocks, grid, config, first_block)
    if grid is None:
        codes = values.astype(keys.dtype).view(mx.uint16)
    else:
        codes = encode_values(values, grid, bits)
    everything = starts.reshape(*shape[:3], size * D)
    rank = mx.cumsum(everything.astype(mx.int32), axis=-1)
    # Values that did not change go to one place behind the others, which is cut off.
    place = mx.where(everything, rank - 1, size * D)
    per_word = 32 // bits
    room = mx.zeros((*shape[:3], worst_words(size, D, bits) * per_word + 1), mx.uint32)
    codes = codes.reshape(everything.shape).astype(mx.uint32)
    compact = mx.put_along_axis(room, place, codes, axis=-1)[..., :-1]
    shifts = bits * mx.arange(per_word, dtype=mx.uint32)
    payload = (compact.reshape(*shape[:3], -1, per_word) << shifts).sum(axis=-1)
    return EncodedBlocks(
        masks=_pack_bits(starts[:, :, :, 1:]),
        payload=payload.astype(mx.uint32),
        counts=mx.stack([rank[..., -1], zeros], axis=-1),
        grid=grid,
    )


def _runs(
    keys: mx.array, blocks: mx.array, grid: mx.array | None, config: DeltaConfig, first_block: int
) -> tuple[mx.array, mx.array, mx.array]:
    """What is stored of keys: float32 values, where runs of them start, and zeros of each block.

    The first two are shaped as ``blocks``, which are the keys in float32.
    """
    if config.run_value == "mean":
        return hold_means(blocks, config, first_block)
    stored = None
    if grid is not None:
        assert config.key_bits is not None
        codes = encode_values(blocks, grid, int(config.key_bits))
        stored = decode_values(codes, grid, keys.dtype)
    held, zeros = hold_blocks(keys, config, first_block, stored=stored)
    held = held.reshape(blocks.shape)
    changed = held[:, :, :, 1:] != held[:, :, :, :-1]  # a code may repeat: not stored again
    first = mx.ones((*blocks.shape[:3], 1, blocks.shape[4]), mx.bool_)
    return blocks, mx.concatenate([first, changed], axis=3), zeros


def run_together(runs: mx.array, words: np.ndarray) -> mx.array:
    """The first words of each run, one run after another.

    Args:
        runs: [n, room].
        words: How many of each run, at least one; [n].

    Returns:
        [sum of words].
    """
    ends = np.cumsum(words)
    begins = ends - words
    shifts = np.arange(len(words)) * runs.shape[1] - begins
    begins, shifts = mx.array(np.stack([begins, shifts]).astype(np.int32))
    # Word i of the result is in the run whose number is how many begin at 1 to i.
    index = mx.arange(int(ends[-1]))
    marks = mx.zeros(index.shape, mx.int32)
    marks[begins[1:]] = 1
    return runs.reshape(-1)[index + shifts[mx.cumsum(marks)]]


def unpack_blocks(packed: PackedBlocks) -> mx.array:
    """Held keys of all blocks, [B, Hkv, blocks * block_size, D] of the storage type."""
    B, H, blocks, rows, _ = packed.masks.shape
    D, bits = packed.head_dim, packed.bits
    shape = (B, H, blocks, rows + 1, D)
    changed = _unpack_bits(packed.masks, D)
    changed = mx.concatenate([mx.ones((*shape[:3], 1, D), mx.int32), changed], axis=3)
    rank = mx.cumsum(changed.reshape(B, H, blocks, -1), axis=-1).reshape(shape) - 1
    # The latest change of a channel is the one with the highest rank so far.
    latest = mx.cummax(rank * changed, axis=3)
    per_word = 32 // bits
    if bits == 16:
        index = (latest + 2 * packed.offsets[..., None, None]).reshape(B, -1)
        values = packed.payload.view(packed.dtype)
        held = mx.take_along_axis(values, index, axis=1).reshape(shape)
    else:
        assert packed.grid is not None
        word, place = _divide(latest, per_word)
        index = (word + packed.offsets[..., None, None]).reshape(B, -1)
        words = mx.take_along_axis(packed.payload, index, axis=1).reshape(shape)
        codes = (words >> (bits * place).astype(mx.uint32)) & (2**bits - 1)
        held = decode_values(codes, packed.grid, packed.dtype)
    return with_sinks(held.reshape(B, H, -1, D), packed.sinks)


def _divide(number: mx.array, by: int) -> tuple[mx.array, mx.array]:
    """Quotient and remainder; by bit operations if they do, which are much faster on a CPU."""
    if by & (by - 1) == 0:
        return number >> (by.bit_length() - 1), number & (by - 1)
    quotient = number // by
    return quotient, number - quotient * by


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
    grid = mx.stack([low.astype(dtype), step], axis=3)
    return mx.where(usable[:, :, :, None], grid, mx.array(mx.nan, dtype))


def encode_values(blocks: mx.array, grid: mx.array, bits: int | np.ndarray) -> mx.array:
    """Codes, uint32 [B, Hkv, blocks, block_size, D], of float32 keys of that shape."""
    low, step = (grid[:, :, :, i : i + 1].astype(mx.float32) for i in (0, 1))
    usable = step > 0
    codes = mx.floor((blocks - low) / mx.where(usable, step, 1) + 0.5)
    return mx.where(usable, mx.clip(codes, 0, _largest_code(bits)), 0).astype(mx.uint32)


def _largest_code(bits: int | np.ndarray) -> Any:
    return 2**bits - 1 if isinstance(bits, int) else mx.array((2**bits - 1).astype(np.float32))


def decode_values(codes: mx.array, grid: mx.array, dtype: mx.Dtype) -> mx.array:
    """What codes [B, Hkv, blocks, block_size, D] stand for, of the storage type."""
    low, step = (grid[:, :, :, i : i + 1].astype(mx.float32) for i in (0, 1))
    # The product is exact in float32, so it makes no difference whether it is fused with the sum.
    return mx.minimum(low + codes.astype(mx.float32) * step, LARGEST[dtype]).astype(dtype)


def _pack_bits(changed: mx.array) -> mx.array:
    """uint32 words [.., ceil(D / 32)] of booleans [.., D], lowest bit first."""
    *shape, D = changed.shape
    bits = mx.pad(changed.astype(mx.uint32), [(0, 0)] * len(shape) + [(0, -D % 32)])
    return (bits.reshape(*shape, -1, 32) << mx.arange(32, dtype=mx.uint32)).sum(axis=-1)


def _unpack_bits(masks: mx.array, head_dim: int) -> mx.array:
    """0 or 1, int32 [.., D], of uint32 words [.., ceil(D / 32)]."""
    bits = (masks[..., None] >> mx.arange(32, dtype=mx.uint32)) & 1
    return bits.reshape(*masks.shape[:-1], -1)[..., :head_dim].astype(mx.int32)
