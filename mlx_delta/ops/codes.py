"""Coding blocks of keys in several widths, and reading them again, with MLX operations.

They agree with :mod:`mlx_delta.method.codes` bit for bit; on a GPU but for grids, whose sums over
tokens may be added up in another order there. :mod:`mlx_delta.ops.encode_kernels` is for these.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_delta.config import DeltaConfig
from mlx_delta.method.codes import FITS, MOST_WEIGHT, order_of, slots_of
from mlx_delta.widths import FIELDS, Rows, even_key_widths

from .runs import token_weights
from .storage import LARGEST, block_grid, encode_values, with_sinks
from .sums import over_lanes
from .turned import turn

MOST_CODES = 2 * max(FIELDS)  # of a word


@dataclass(frozen=True)
class Coding:
    """How the keys of a layer are coded.

    Attributes:
        order: Each head's channels as they are stored, Hkv times D.
        rows: Each head's rows of words, so many of each kind.
        turned: Whether keys are turned first.
    """

    order: tuple[tuple[int, ...], ...]
    rows: tuple[Rows, ...]
    turned: bool

    @property
    def first_rows(self) -> tuple[int, ...]:
        """Where each head's rows begin among a block's, and where the last one's end."""
        return (0, *itertools.accumulate(map(sum, self.rows)))

    @property
    def all_rows(self) -> int:
        """Rows of words of a block, of all heads."""
        return self.first_rows[-1]

    @property
    def kinds(self) -> tuple[int, ...]:
        """The kinds of rows that any of the heads has."""
        return tuple(kind for kind, *rows in zip(FIELDS, *self.rows, strict=True) if any(rows))

    @staticmethod
    def of(config: DeltaConfig, n_heads: int, head_dim: int) -> Coding:
        """Of a setting of one layer, for keys of this shape."""
        widths = None if config.key_widths is None else config.key_widths[0]
        assert config.key_bits is not None
        return _coding(widths, config.key_bits, n_heads, head_dim)


@lru_cache(maxsize=256)
def _coding(widths: tuple[str, ...] | None, bits: float, n_heads: int, head_dim: int) -> Coding:
    if widths is None:
        numbers = even_key_widths(n_heads, head_dim, bits)
    else:
        numbers = np.array([list(map(int, head)) for head in widths])
    heads = [order_of(head) for head in numbers]
    order = tuple(tuple(own.tolist()) for own, _ in heads)
    return Coding(order, tuple(rows for _, rows in heads), widths is None)


@dataclass(frozen=True)
class CodedBlocks:
    """All far blocks of a layer, as the kernels read them.

    Attributes:
        words: uint32 [B, blocks, rows, block_size], rows head after head.
        grid: [B, Hkv, blocks, 2, D] of the storage type, channels in the order.
        sinks: [B, Hkv, n_sinks, D], exact keys of the first tokens, which are read instead of
            their codes; ``None`` without sinks.
        coding: What the words are.
        head_dim: D.
    """

    words: mx.array
    grid: mx.array
    sinks: mx.array | None
    coding: Coding
    head_dim: int

    @property
    def dtype(self) -> mx.Dtype:
        """The storage type, float16 or bfloat16."""
        return self.grid.dtype

    def first(self, blocks: int) -> CodedBlocks:
        """The first blocks only."""
        return replace(self, words=self.words[:, :blocks], grid=self.grid[:, :, :blocks])

    def part(self, begin: int, end: int) -> CodedBlocks:
        """Blocks ``begin`` to ``end`` only."""
        sinks = self.sinks
        if sinks is not None:
            first = begin * self.words.shape[3]
            sinks = sinks[:, :, first:] if first < sinks.shape[2] else None
        words, grid = self.words[:, begin:end], self.grid[:, :, begin:end]
        return replace(self, words=words, grid=grid, sinks=sinks)

    def after(self, other: mx.array) -> CodedBlocks:
        """The same, to be read once another array is computed."""
        words, grid = mx.depends([self.words, self.grid], [other])
        return replace(self, words=words, grid=grid)


def code_blocks(
    keys: mx.array, coding: Coding, size: int, felt: mx.array | None = None
) -> tuple[mx.array, mx.array]:
    """Code the keys of whole blocks.

    Args:
        keys: [B, Hkv, blocks * size, D], float16 or bfloat16, after RoPE.
        coding: Of the layer.
        size: Tokens in a block.
        felt: What the model minds, of :func:`felt_by_place`.

    Returns:
        Words and grid, as of :class:`CodedBlocks`.
    """
    B, H, length, D = keys.shape
    dtype = keys.dtype
    if coding.turned:
        keys = _rounded(turn(keys.astype(mx.float32)), dtype)
    blocks = keys.astype(mx.float32).reshape(B, H, length // size, size, D)
    places = _places(coding)
    blocks = mx.take_along_axis(blocks, places.order, axis=-1)
    grid = fit_grid(blocks, places.widths, dtype, felt)
    codes = encode_values(blocks, grid, places.widths[:, None, None]) << places.shifts
    # All heads' channels of a block, of which each word takes its own.
    codes = codes.transpose(0, 2, 1, 4, 3).reshape(B, -1, H * D, size)
    taken = codes[:, :, places.members] * places.exist
    words = taken.reshape(B, -1, coding.all_rows, MOST_CODES, size).sum(axis=3)
    return words.astype(mx.uint32), grid


def felt_by_place(felt: tuple[np.ndarray, np.ndarray] | None, coding: Coding) -> mx.array | None:
    """Weights and salience of each channel, float32 [Hkv, 2, D] in the order.

    ``None`` where they are not known, each [Hkv, D] in ``felt``, or of turned keys.
    """
    if felt is None or coding.turned:
        return None
    own = np.take_along_axis(np.stack(felt, axis=1), np.array(coding.order)[:, None], axis=2)
    return mx.array(own.astype(np.float32))


class _Places(NamedTuple):
    """Where the codes of a layer's channels are.

    Attributes:
        widths: int [Hkv, D], in the order.
        order: int32 [1, Hkv, 1, 1, D], the channels in the order.
        shifts: uint32 [Hkv, 1, 1, D], in the order.
        members: int32 [rows * MOST_CODES], of each row of words its channels in the order, of those
            of all heads.
        exist: uint32 [rows * MOST_CODES, 1], 0 where a row has fewer.
        rows: int32 [Hkv * D], of each channel in its own place.
        right: uint32 [Hkv * D, 1], its shift.
        masks: uint32 [Hkv * D, 1], the bits of its code.
        back: int32 [1, Hkv, 1, 1, D], where it is in the order.
    """

    widths: np.ndarray
    order: mx.array
    shifts: mx.array
    members: mx.array
    exist: mx.array
    rows: mx.array
    right: mx.array
    masks: mx.array
    back: mx.array


@lru_cache(maxsize=256)
def _places(coding: Coding) -> _Places:
    row, shift, width = (np.array(x) for x in zip(*map(slots_of, coding.rows), strict=True))
    row += np.array(coding.first_rows[:-1])[:, None]
    members = np.zeros((coding.all_rows, MOST_CODES), np.int32)
    exist = np.zeros(members.shape, np.uint32)
    for i in range(coding.all_rows):
        own = np.flatnonzero(row.ravel() == i)
        members[i, : len(own)], exist[i, : len(own)] = own, 1
    back = np.argsort(np.array(coding.order), axis=1)
    in_place = [np.take_along_axis(x, back, axis=1).reshape(-1, 1) for x in (row, shift, width)]
    return _Places(
        width,
        mx.array(np.array(coding.order, np.int32)[None, :, None, None]),
        mx.array(shift[:, None, None].astype(np.uint32)),
        mx.array(members.ravel()),
        mx.array(exist.reshape(-1, 1)),
        mx.array(in_place[0].ravel().astype(np.int32)),
        mx.array(in_place[1].astype(np.uint32)),
        mx.array((2 ** in_place[2] - 1).astype(np.uint32)),
        mx.array(back[None, :, None, None].astype(np.int32)),
    )


def fit_grid(
    blocks: mx.array, widths: np.ndarray, dtype: mx.Dtype, felt: mx.array | None
) -> mx.array:
    """The grid of each channel, [B, Hkv, blocks, 2, D], for float32 keys [.., block_size, D].

    ``widths``: int [Hkv, D]; ``felt``: [Hkv, 2, D], or not known.
    """
    grid = block_grid(blocks, widths[:, None], dtype)
    widths = widths[:, None, None]
    shares = _token_shares(blocks, grid, felt)[..., None]
    mean_key = (shares * blocks).sum(axis=3, keepdims=True)
    for _ in range(FITS):
        codes = encode_values(blocks, grid, widths).astype(mx.float32)
        mean_code = (shares * codes).sum(axis=3, keepdims=True)
        apart = shares * (codes - mean_code)
        squares = (apart * (codes - mean_code)).sum(axis=3)
        products = (apart * (blocks - mean_key)).sum(axis=3)
        step = _rounded(products / mx.where(squares > 0, squares, 1), dtype)
        low = _rounded(mean_key[:, :, :, 0] - step * mean_code[:, :, :, 0], dtype)
        usable = (squares > 0) & (step > 0) & (step < mx.inf) & (mx.abs(low) < mx.inf)
        fitted = mx.stack([low, step], axis=3).astype(dtype)
        grid = mx.where(usable[:, :, :, None], fitted, grid)
    return grid


def _token_shares(blocks: mx.array, grid: mx.array, felt: mx.array | None) -> mx.array:
    """How much each key of a block counts, float32 [B, Hkv, blocks, block_size], for such keys."""
    if felt is not None:
        weights = token_weights(mx, blocks, felt[:, None, 0], felt[:, None, 1])
        return weights / over_lanes(weights)
    step, size = grid[:, :, :, 1:].astype(mx.float32), blocks.shape[3]
    apart = blocks - blocks.sum(axis=3, keepdims=True) / size
    squares = over_lanes(mx.where(step > 0, mx.square(apart / step), 0))[..., 0]
    mean = over_lanes(squares) / size
    weights = mx.clip(squares / mx.where(mean > 0, mean, 1), 1 / MOST_WEIGHT, MOST_WEIGHT)
    return weights / over_lanes(weights)


def _rounded(values: mx.array, dtype: mx.Dtype) -> mx.array:
    """float32 values of the storage type."""
    return mx.clip(values, -LARGEST[dtype], LARGEST[dtype]).astype(dtype).astype(mx.float32)


def decode_blocks(coded: CodedBlocks) -> mx.array:
    """Keys of all blocks, [B, Hkv, blocks * block_size, D] of the storage type."""
    coding, places = coded.coding, _places(coded.coding)
    B, H, blocks, _, D = coded.grid.shape
    size = coded.words.shape[3]
    codes = (coded.words[:, :, places.rows] >> places.right) & places.masks
    codes = codes.reshape(B, blocks, H, D, size).swapaxes(1, 2)
    grid = mx.take_along_axis(coded.grid, places.back, axis=-1)
    low, step = (grid[:, :, :, i, :, None].astype(mx.float32) for i in (0, 1))
    keys = mx.minimum(low + codes.astype(mx.float32) * step, LARGEST[coded.dtype])
    keys = keys.swapaxes(3, 4).reshape(B, H, blocks * size, D).astype(coded.dtype)
    if coding.turned:
        keys = turn(keys.astype(mx.float32)).astype(coded.dtype)
    return with_sinks(keys, coded.sinks)
