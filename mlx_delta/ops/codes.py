"""Coding blocks of keys in several widths, and reading them again, with MLX operations.

They agree with :mod:`mlx_delta.method.codes`: bit for bit but for grids, whose sums may be added up
in another order.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import mlx.core as mx
import numpy as np

from mlx_delta.config import DeltaConfig
from mlx_delta.method.codes import (
    FITS,
    Classes,
    channel_widths,
    class_runs,
    count_rows,
    order_of,
)
from mlx_delta.widths import even_key_widths

from .pack import LARGEST, block_grid, encode_values, to_storage, with_sinks
from .turned import turn


@dataclass(frozen=True)
class Coding:
    """How the keys of a layer are coded.

    Attributes:
        order: Each head's channels as they are stored, Hkv times D.
        classes: (width, count) of the channels in this order.
        turned: Whether keys are turned first.
    """

    order: tuple[tuple[int, ...], ...]
    classes: Classes
    turned: bool

    @property
    def rows(self) -> int:
        """Rows of words of a block."""
        return count_rows(self.classes)

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
    order, classes = order_of(numbers)
    return Coding(tuple(map(tuple, order.tolist())), classes, widths is None)


@dataclass(frozen=True)
class CodedBlocks:
    """All far blocks of a layer, as the kernels read them.

    Attributes:
        words: uint32 [B, Hkv, blocks, rows, block_size].
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
        return replace(self, words=self.words[:, :, :blocks], grid=self.grid[:, :, :blocks])

    def part(self, begin: int, end: int) -> CodedBlocks:
        """Blocks ``begin`` to ``end`` only."""
        sinks = self.sinks
        if sinks is not None:
            first = begin * self.words.shape[4]
            sinks = sinks[:, :, first:] if first < sinks.shape[2] else None
        words, grid = self.words[:, :, begin:end], self.grid[:, :, begin:end]
        return replace(self, words=words, grid=grid, sinks=sinks)

    def after(self, other: mx.array) -> CodedBlocks:
        """The same, to be read once another array is computed."""
        words, grid = mx.depends([self.words, self.grid], [other])
        return replace(self, words=words, grid=grid)


def code_blocks(keys: mx.array, coding: Coding, size: int) -> tuple[mx.array, mx.array]:
    """Code the keys of whole blocks.

    Args:
        keys: [B, Hkv, blocks * size, D], float16 or bfloat16, after RoPE.
        coding: Of the layer.
        size: Tokens in a block.

    Returns:
        Words and grid, as of :class:`CodedBlocks`.
    """
    B, H, length, D = keys.shape
    dtype = keys.dtype
    if coding.turned:
        keys = to_storage(turn(keys.astype(mx.float32)).astype(dtype))
    blocks = keys.astype(mx.float32).reshape(B, H, length // size, size, D)
    blocks = mx.take_along_axis(blocks, mx.array(coding.order)[None, :, None, None], axis=-1)
    widths = channel_widths(coding.classes)
    grid = fit_grid(blocks, widths, dtype)
    codes = encode_values(blocks, grid, widths)
    rows = []
    for width, channels, of_class in class_runs(coding.classes):
        per_word = 32 // width
        own = codes[..., channels]
        room = (of_class.stop - of_class.start) * per_word - own.shape[-1]
        own = mx.pad(own, [(0, 0)] * 4 + [(0, room)])
        own = own.reshape(*own.shape[:-1], -1, per_word)
        rows.append((own << (width * mx.arange(per_word, dtype=mx.uint32))).sum(axis=-1))
    words = mx.concatenate(rows, axis=-1).swapaxes(3, 4).astype(mx.uint32)
    return mx.contiguous(words), grid


def fit_grid(blocks: mx.array, widths: np.ndarray, dtype: mx.Dtype) -> mx.array:
    """The grid of each channel, [B, Hkv, blocks, 2, D], for float32 keys [.., block_size, D]."""
    grid = block_grid(blocks, widths, dtype)
    mean_key = blocks.mean(axis=3)
    for _ in range(FITS):
        codes = encode_values(blocks, grid, widths).astype(mx.float32)
        mean_code = codes.mean(axis=3)
        apart = codes - mean_code[:, :, :, None]
        squares = mx.square(apart).sum(axis=3)
        products = (apart * (blocks - mean_key[:, :, :, None])).sum(axis=3)
        step = _rounded(products / mx.where(squares > 0, squares, 1), dtype)
        low = _rounded(mean_key - step * mean_code, dtype)
        usable = (squares > 0) & (step > 0) & (step < mx.inf) & (mx.abs(low) < mx.inf)
        fitted = mx.stack([low, step], axis=3).astype(dtype)
        grid = mx.where(usable[:, :, :, None], fitted, grid)
    return grid


def _rounded(values: mx.array, dtype: mx.Dtype) -> mx.array:
    """float32 values of the storage type."""
    return mx.clip(values, -LARGEST[dtype], LARGEST[dtype]).astype(dtype).astype(mx.float32)


def decode_blocks(packed: CodedBlocks) -> mx.array:
    """Keys of all blocks, [B, Hkv, blocks * block_size, D] of the storage type."""
    coding = packed.coding
    B, H, blocks, _, size = packed.words.shape
    codes = []
    for width, channels, of_class in class_runs(coding.classes):
        per_word = 32 // width
        shifts = (width * mx.arange(per_word, dtype=mx.uint32))[:, None]
        own = (packed.words[:, :, :, of_class, None] >> shifts) & (2**width - 1)
        own = own.reshape(B, H, blocks, -1, size)
        codes.append(own[:, :, :, : channels.stop - channels.start])
    joined = codes[0] if len(codes) == 1 else mx.concatenate(codes, axis=3)
    low, step = (packed.grid[:, :, :, i, :, None].astype(mx.float32) for i in (0, 1))
    keys = mx.minimum(low + joined.astype(mx.float32) * step, LARGEST[packed.dtype])
    back = mx.array(np.argsort(np.array(coding.order), axis=1))
    keys = mx.take_along_axis(keys, back[None, :, None, :, None], axis=3).swapaxes(3, 4)
    keys = keys.reshape(B, H, blocks * size, -1).astype(packed.dtype)
    if coding.turned:
        keys = turn(keys.astype(mx.float32)).astype(packed.dtype)
    return with_sinks(keys, packed.sinks)
