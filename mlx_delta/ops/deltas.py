"""Held keys with masks by channel: storing whole blocks, and reading them, with MLX operations.

They agree with :mod:`mlx_delta.method.deltas` bit for bit but for runs, whose tokens' weights may
be another in the last bit; on a GPU but for grids too, whose sums over tokens may be added up in
another order there. :mod:`mlx_delta.ops.encode_kernels` is for these.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_delta.config import DeltaConfig
from mlx_delta.method.deltas import CHUNK, FITS, LANE, lane_order
from mlx_delta.widths import even_lane_widths

from .runs import runs_in_sequence, token_weights
from .sequence import by_token, in_sequence, token_sequences
from .storage import (
    LARGEST,
    block_grid,
    encode_values,
    short_steps,
    whole_steps,
    with_sinks,
)
from .sums import over_lanes

WORD = 32  # bits


@dataclass(frozen=True)
class LaneCoding:
    """How the held keys of a layer are stored.

    Attributes:
        order: Each head's channels as they are stored, Hkv times D.
        widths: Bits of the codes of each head's lanes, Hkv times D / 8.
    """

    order: tuple[tuple[int, ...], ...]
    widths: tuple[tuple[int, ...], ...]

    @staticmethod
    def of(config: DeltaConfig, n_heads: int, head_dim: int) -> LaneCoding:
        """Of a setting of one layer, for keys of this shape."""
        widths = None if config.key_widths is None else config.key_widths[0]
        assert config.key_bits is not None
        return _coding(widths, config.key_bits, n_heads, head_dim)

    def worst_words(self, size: int) -> int:
        """Words that a block of so many tokens has at most."""
        lanes = len(self.widths[0])
        return -(-lanes // WORD) + max(map(sum, self.widths)) * size * LANE // 32


@lru_cache(maxsize=256)
def _coding(widths: tuple[str, ...] | None, bits: float, n_heads: int, head_dim: int) -> LaneCoding:
    if widths is None:
        numbers = even_lane_widths(n_heads, head_dim, bits)
    else:
        numbers = np.array([list(map(int, head)) for head in widths])
    found = [lane_order(own) for own in numbers]
    return LaneCoding(
        tuple(tuple(order.tolist()) for order, _ in found),
        tuple(tuple(own.tolist()) for _, own in found),
    )


@dataclass(frozen=True)
class DeltaBlocks:
    """All far blocks of a layer, as the kernel reads them.

    Attributes:
        payload: uint32 [B, capacity]; each block of each head has a run of words of its own, and
            behind the last one are two more, which the kernel reads and does not use.
        offsets: int32 [B, Hkv, blocks]; the first word of that run.
        low: [B, Hkv, blocks, D] of the storage type, channels in the order.
        steps: uint8 [B, Hkv, blocks, D], likewise.
        sequence: uint8 [B, Hkv, blocks, size], the tokens of a block as they are stored.
        sinks: [B, Hkv, n_sinks, D], exact keys of the first tokens, which are read instead of
            what is stored of them; ``None`` without sinks.
        coding: What the words are.
        size: Tokens of a block.
    """

    payload: mx.array
    offsets: mx.array
    low: mx.array
    steps: mx.array
    sequence: mx.array
    sinks: mx.array | None
    coding: LaneCoding
    size: int

    @property
    def head_dim(self) -> int:
        """D."""
        return self.low.shape[3]

    @property
    def dtype(self) -> mx.Dtype:
        """The storage type, float16 or bfloat16."""
        return self.low.dtype

    def first(self, blocks: int) -> DeltaBlocks:
        """The first blocks only."""
        return self._blocks(slice(0, blocks), self.sinks)

    def part(self, begin: int, end: int) -> DeltaBlocks:
        """Blocks ``begin`` to ``end`` only."""
        sinks = self.sinks
        if sinks is not None:
            first = begin * self.size
            sinks = sinks[:, :, first:] if first < sinks.shape[2] else None
        return self._blocks(slice(begin, end), sinks)

    def _blocks(self, some: slice, sinks: mx.array | None) -> DeltaBlocks:
        names = ("offsets", "low", "steps", "sequence")
        found = {name: getattr(self, name)[:, :, some] for name in names}
        return replace(self, sinks=sinks, **found)

    def after(self, other: mx.array) -> DeltaBlocks:
        """The same, to be read once another array is computed."""
        payload, offsets = mx.depends([self.payload, self.offsets], [other])
        return replace(self, payload=payload, offsets=offsets)


class StoredDeltas(NamedTuple):
    """What the encoder makes of whole blocks, before their words are put end to end.

    Attributes:
        words: uint32 [B, Hkv, blocks, worst_words]; zeros behind a block's words.
        counts: int32 [B, Hkv, blocks], words of each.
        zeros: int32 [B, Hkv, blocks], numbers that begin no run.
        low: As of :class:`DeltaBlocks`.
        steps: As of :class:`DeltaBlocks`.
        sequence: As of :class:`DeltaBlocks`.
    """

    words: mx.array
    counts: mx.array
    zeros: mx.array
    low: mx.array
    steps: mx.array
    sequence: mx.array

    def apart(self, coding: LaneCoding, size: int) -> DeltaBlocks:
        """The blocks as they can be read, with the room behind each one's words left in."""
        B, H, blocks, room = self.words.shape
        payload = mx.pad(self.words.reshape(B, -1), [(0, 0), (0, 2)])
        firsts = mx.arange(H * blocks, dtype=mx.int32).reshape(1, H, blocks) * room
        offsets = mx.broadcast_to(firsts, (B, H, blocks))
        parts = self.low, self.steps, self.sequence
        return DeltaBlocks(payload, offsets, *parts, None, coding, size)


def store_deltas(
    keys: mx.array, config: DeltaConfig, coding: LaneCoding, first_block: int
) -> StoredDeltas:
    """Hold and store the keys of whole blocks.

    Args:
        keys: [B, Hkv, blocks * block_size, D], float16 or bfloat16, after RoPE.
        config: The setting of this layer.
        coding: Of the layer.
        first_block: Which block of the text the first one is.
    """
    B, H, length, D = keys.shape
    size = config.block_size
    sequence = token_sequences(keys, config, first_block)
    blocks = keys.astype(mx.float32).reshape(B, H, length // size, size, D)
    # Blocks with sinks stay as they are.
    blocks = in_sequence(_without_sinks(blocks, config.sinks - first_block * size), sequence)
    runs = runs_in_sequence(blocks, dataclasses.replace(config, sinks=0), first_block)
    weights, salience = (mx.array(x)[:, None] for x in config.sensitivities_of_layer(H, D))
    tokens = token_weights(mx, blocks, weights, salience)
    index = mx.array(coding.order)[None, :, None, None]
    blocks, means, begins = (mx.take_along_axis(x, index, axis=-1) for x in (blocks, *runs))
    widths = np.array(coding.widths)
    held = _held_lanes(begins, widths)
    own = mx.repeat(held, LANE, axis=3)[:, :, :, None]
    values, begins = mx.where(own, means, blocks), begins | mx.logical_not(own)
    bits = np.repeat(widths, LANE, axis=1)
    low, steps = _fit_grid(values, tokens, bits, keys.dtype)
    codes = _encode(values, low, steps, bits)
    words, counts = _write(codes, begins, held, widths, coding.worst_words(size))
    zeros = mx.logical_not(begins).sum(axis=(3, 4)).astype(mx.int32)
    return StoredDeltas(words, counts, zeros, low, steps, sequence)


def _without_sinks(blocks: mx.array, sinks: int) -> mx.array:
    """Blocks in which the first tokens of the text are like the one after them."""
    B, H, n, size, D = blocks.shape
    if sinks <= 0 or not n:
        return blocks
    index = np.arange(n * size).reshape(n, size)
    for block in index:
        own = min(sinks - block[0], size)
        if own > 0:
            block[:own] = block[min(own, size - 1)]
    flat = blocks.reshape(B, H, n * size, D)
    return flat[:, :, mx.array(index.reshape(-1))].reshape(blocks.shape)


def _held_lanes(begins: mx.array, widths: np.ndarray) -> mx.array:
    """Which lanes are smaller with a mask, boolean [B, Hkv, blocks, lanes]."""
    size, each = begins.shape[3], mx.array(widths, mx.int32)[:, None]
    runs = begins.reshape(*begins.shape[:4], -1, LANE).sum(axis=(3, 5)).astype(mx.int32)
    return LANE * size + runs * each < size * LANE * each


def _fit_grid(
    values: mx.array, tokens: mx.array, bits: np.ndarray, dtype: mx.Dtype
) -> tuple[mx.array, mx.array]:
    """``low`` and steps, [B, Hkv, blocks, D], for what float32 keys [.., size, D] are held as.

    ``tokens``: how much each counts, [.., size].
    """
    across = bits[:, None]
    grid = block_grid(values, across, dtype)
    low, short = grid[:, :, :, 0], short_steps(grid[:, :, :, 1].astype(mx.float32))
    shares = (tokens / over_lanes(tokens))[..., None]
    mean = (shares * values).sum(axis=3, keepdims=True)
    for _ in range(FITS):
        codes = _encode(values, low, short, bits).astype(mx.float32)
        mean_code = (shares * codes).sum(axis=3, keepdims=True)
        apart = shares * (codes - mean_code)
        squares = (apart * (codes - mean_code)).sum(axis=3)
        products = (apart * (values - mean)).sum(axis=3)
        fitted = short_steps(products / mx.where(squares > 0, squares, 1))
        best = mean[:, :, :, 0] - whole_steps(fitted) * mean_code[:, :, :, 0]
        usable = (squares > 0) & (fitted > 0) & (mx.abs(best) < mx.inf)
        best = mx.clip(best, -LARGEST[dtype], LARGEST[dtype]).astype(dtype)
        low, short = mx.where(usable, best, low), mx.where(usable, fitted, short)
    return low, short


def _encode(values: mx.array, low: mx.array, short: mx.array, bits: np.ndarray) -> mx.array:
    grid = mx.stack([low.astype(mx.float32), whole_steps(short)], axis=3)
    return encode_values(values, grid, bits[:, None, None])


def _mask_places(held: mx.array, size: int) -> tuple[mx.array, mx.array]:
    """Where masks lie in a block.

    Returns:
        The first word of each lane's mask, int32 [B, Hkv, blocks, chunks, lanes]; and the first one
        of the codes, int32 [B, Hkv, blocks].
    """
    spans = [min(CHUNK, size - first) // 4 for first in range(0, size, CHUNK)]
    words = mx.stack([held.astype(mx.int32) * span for span in spans], axis=3)
    flat = words.reshape(*words.shape[:3], -1)
    ends = mx.cumsum(flat, axis=3) + -(-held.shape[3] // WORD)
    return (ends - flat).reshape(words.shape), ends[..., -1]


def _write(
    codes: mx.array, begins: mx.array, held: mx.array, widths: np.ndarray, room: int
) -> tuple[mx.array, mx.array]:
    """Words [B, Hkv, blocks, room] of blocks, and how many each has."""
    B, H, n, size, D = codes.shape
    lanes = D // LANE
    mask_at, codes_at = _mask_places(held, size)
    chunks = mask_at.shape[3]

    def by_lane(x: mx.array) -> mx.array:
        """[.., size, D] as [.., chunks, lanes, CHUNK, LANE]."""
        x = mx.pad(x, [(0, 0)] * 3 + [(0, chunks * CHUNK - size), (0, 0)])
        return x.reshape(B, H, n, chunks, CHUNK, lanes, LANE).swapaxes(4, 5)

    codes, stored = by_lane(codes), by_lane(begins)
    ends = mx.cumsum((stored * _each(widths)).reshape(B, H, n, -1), axis=3)
    at = (ends - (stored * _each(widths)).reshape(ends.shape)) + WORD * codes_at[..., None]
    own = mx.where(stored, codes, 0).reshape(at.shape)
    shift = (at & 31).astype(mx.uint32)
    # A code may go on in the next word; of those that do not, nothing is left for it.
    over = (own >> 1) >> (31 - shift)
    bits = stored.astype(mx.uint32).reshape(*mask_at.shape, 4, WORD)
    masks = (bits << mx.arange(WORD, dtype=mx.uint32)).sum(axis=6)
    index, inside = mx.arange(4), np.arange(4 * chunks).reshape(chunks, 1, 4) < size // 4
    there = held[:, :, :, None, :, None] & mx.array(inside)
    # What is not there goes to one place behind all words, which is cut off.
    places = mx.where(there, mask_at[..., None] + index, room + 1).reshape(B, H, n, -1)
    head = mx.pad(held.astype(mx.uint32), [(0, 0)] * 3 + [(0, -lanes % WORD)])
    head = (head.reshape(B, H, n, -1, WORD) << mx.arange(WORD, dtype=mx.uint32)).sum(axis=4)
    parts = [
        (at >> 5, own << shift),
        ((at >> 5) + 1, over),
        (places, masks.reshape(places.shape)),
        (mx.broadcast_to(mx.arange(head.shape[3]), head.shape), head),
    ]
    index = mx.concatenate([place.astype(mx.int32) for place, _ in parts], axis=3)
    values = mx.concatenate([value.astype(mx.uint32) for _, value in parts], axis=3)
    index = index + (room + 2) * mx.arange(B * H * n, dtype=mx.int32).reshape(B, H, n, 1)
    words = mx.zeros(B * H * n * (room + 2), mx.uint32)
    words = words.at[index.reshape(-1)].add(values.reshape(-1))
    counts = codes_at + ((ends[..., -1] + 31) >> 5)
    return words.reshape(B, H, n, room + 2)[..., :room], counts.astype(mx.int32)


def _each(widths: np.ndarray) -> mx.array:
    """Widths of lanes, for arrays [B, Hkv, blocks, chunks, lanes, CHUNK, LANE]."""
    return mx.array(widths, mx.int32)[None, :, None, None, :, None, None]


def read_structure(blocks: DeltaBlocks) -> tuple[mx.array, mx.array, mx.array]:
    """What the masks of blocks say.

    Returns:
        Which codes there are, boolean [B, Hkv, blocks, chunks, lanes, CHUNK, LANE]; the bit after
        the end of each, int32 of that shape; and the words of each block, int32 [B, Hkv, blocks].
    """
    B, H, n = blocks.offsets.shape
    lanes, size = blocks.head_dim // LANE, blocks.size
    index = mx.arange(-(-lanes // WORD))
    head = _read(blocks, mx.broadcast_to(index, (B, H, n, len(index))))
    held = ((head[..., None] >> mx.arange(WORD, dtype=mx.uint32)) & 1).reshape(B, H, n, -1) > 0
    held = held[..., :lanes]
    mask_at, codes_at = _mask_places(held, size)
    words = _read(blocks, mask_at[..., None] + mx.arange(4))
    bits = ((words[..., None] >> mx.arange(WORD, dtype=mx.uint32)) & 1) > 0
    shape = (*mask_at.shape, CHUNK, LANE)
    bits = bits.reshape(shape) | mx.logical_not(held)[:, :, :, None, :, None, None]
    inside = np.arange(shape[3] * CHUNK).reshape(shape[3], 1, CHUNK, 1) < size
    stored = bits & mx.array(inside)
    ends = mx.cumsum((stored * _each(np.array(blocks.coding.widths))).reshape(B, H, n, -1), axis=3)
    ends = ends + WORD * codes_at[..., None]
    return stored, ends.reshape(shape), (ends[..., -1] + 31) >> 5


def _read(blocks: DeltaBlocks, places: mx.array) -> mx.array:
    """Words of blocks at places [B, Hkv, blocks, ..] behind their offsets; none past the end."""
    B, H, n = blocks.offsets.shape
    offsets = blocks.offsets.reshape(B, H, n, *[1] * (places.ndim - 3))
    index = mx.minimum(places + offsets, blocks.payload.shape[1] - 1)
    found = mx.take_along_axis(blocks.payload, index.reshape(B, -1), axis=1)
    return found.reshape(index.shape)


def read_deltas(blocks: DeltaBlocks) -> mx.array:
    """Held keys of all blocks, [B, Hkv, blocks * block_size, D] of the storage type."""
    B, H, n = blocks.offsets.shape
    D, size, coding = blocks.head_dim, blocks.size, blocks.coding
    stored, ends, _ = read_structure(blocks)
    each = _each(np.array(coding.widths))
    # A code's place grows with its token: the latest one is that of the highest place.
    at = mx.where(stored, ends - each, 0).swapaxes(4, 5).reshape(B, H, n, -1, D)[:, :, :, :size]
    at = mx.cummax(at, axis=3)
    word = at >> 5
    shift = (at & 31).astype(mx.uint32)
    codes = (_read(blocks, word) >> shift) | ((_read(blocks, word + 1) << 1) << (31 - shift))
    most = (1 << np.repeat(np.array(coding.widths), LANE, axis=1)) - 1
    codes = (codes & mx.array(most, mx.uint32)[:, None, None]).astype(mx.float32)
    low, step = blocks.low.astype(mx.float32), whole_steps(blocks.steps)
    held = mx.minimum(low[:, :, :, None] + codes * step[:, :, :, None], LARGEST[blocks.dtype])
    back = mx.array(np.argsort(np.array(coding.order), axis=1))
    held = by_token(mx.take_along_axis(held, back[None, :, None, None], axis=4), blocks.sequence)
    return with_sinks(held.reshape(B, H, n * size, D).astype(blocks.dtype), blocks.sinks)
