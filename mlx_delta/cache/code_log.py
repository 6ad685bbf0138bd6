"""The coded blocks of a layer, one after another: every block takes the same room."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_delta.config import DeltaConfig
from mlx_delta.ops.blocks import encode_codes
from mlx_delta.ops.codes import CodedBlocks, Coding, felt_by_place

from .buffers import Rows, grow, pad_to, take_out

BLOCK_STEP = 4  # blocks by which words and grids grow
WORDS_AXIS, GRID_AXIS = 1, 2  # of blocks


class CodeLog:
    """Coded blocks of each row.

    Args:
        coding: Of the layer.
        words: uint32 [B, blocks, rows of all heads, block_size].
        grid: [B, Hkv, blocks, 2, D] of the storage type.
        counts: Blocks of each row.
    """

    def __init__(self, coding: Coding, words: mx.array, grid: mx.array, counts: list[int]):
        self.coding = coding
        self.words = words
        self.grid = grid
        self.counts = counts
        self._felt: mx.array | None = None  # on the device, once it was asked for

    @classmethod
    def make(cls, shape: tuple[int, int, int], config: DeltaConfig, dtype: mx.Dtype) -> CodeLog:
        """An empty log for [B, Hkv, D] keys of a setting of one layer."""
        B, H, D = shape
        coding = Coding.of(config, H, D)
        words = mx.zeros((B, 0, coding.all_rows, config.block_size), mx.uint32)
        return cls(coding, words, mx.zeros((B, H, 0, 2, D), dtype), [0] * B)

    @property
    def head_dim(self) -> int:
        """D."""
        return self.grid.shape[4]

    @property
    def blocks(self) -> list[int]:
        """Coded blocks of each row."""
        return list(self.counts)

    @property
    def room(self) -> int:
        """Blocks that there is room for."""
        return self.words.shape[WORDS_AXIS]

    @property
    def zeros(self) -> mx.array:
        """Zero deltas of each block: nothing is held. int32 [B, Hkv, blocks]."""
        return mx.zeros(self.grid.shape[:3], mx.int32)

    def read(self, sinks: mx.array | None, dtype: mx.Dtype) -> CodedBlocks | None:
        """The blocks as the kernels read them; ``None`` while there are none."""
        if not max(self.counts, default=0):
            return None
        return CodedBlocks(self.words, self.grid, sinks, self.coding, self.head_dim)

    def encode(self, rows: Rows, keys: mx.array, config: DeltaConfig, done: int) -> None:
        """Put the blocks of keys behind the ``done`` ones that each of these rows has."""
        words, grid = encode_codes(keys, self.coding, config.block_size, self._felt_by(config))
        target = done + words.shape[1]
        room = -(-target // BLOCK_STEP) * BLOCK_STEP
        # Handles of their own: a step may still read the old ones.
        self.words = _longer(self.words, room, WORDS_AXIS)
        self.grid = _longer(self.grid, room, GRID_AXIS)
        self.words[rows, done:target] = words
        self.grid[rows, :, done:target] = grid
        numbers = range(len(self.counts)) if isinstance(rows, slice) else np.array(rows).tolist()
        for row in numbers:
            self.counts[row] = target

    def _felt_by(self, config: DeltaConfig) -> mx.array | None:
        """What the model minds, as the encoder takes it."""
        if self._felt is None and config.sensitivities is not None:
            felt = config.sensitivities_of_layer(self.grid.shape[1], self.head_dim)
            self._felt = felt_by_place(felt, self.coding)
        return self._felt

    def drop(self, first: int, blocks: Sequence[int]) -> None:
        """Take so many blocks of each row out, behind the first ones; the rest moves up."""
        room = self.room
        # As many as before: room that the next ones take.
        self.words, self.grid = (
            pad_to(take_out(x, first, blocks, axis), room, axis)
            for x, axis in ((self.words, WORDS_AXIS), (self.grid, GRID_AXIS))
        )
        self.counts = [n - gone for n, gone in zip(self.counts, blocks, strict=True)]

    def forget(self, row: int, blocks: int) -> None:
        """Of one row keep so many blocks."""
        self.counts[row] = min(self.counts[row], blocks)

    def read_bytes(self, blocks: int, float_bytes: int | None = None) -> int:
        """Bytes of words and grids of the first row's first blocks."""
        item = self.grid.itemsize if float_bytes is None else float_bytes
        words = self.words.shape[2] * self.words.shape[3]
        return blocks * (4 * words + self.grid.shape[1] * 2 * self.head_dim * item)

    # Rows.

    def take(self, rows: list[int]) -> None:
        """Keep these rows only, in this order."""
        index = mx.array(rows, mx.int32)
        self.words, self.grid = self.words[index], self.grid[index]
        self.counts = [self.counts[row] for row in rows]

    def row(self, index: int) -> CodeLog:
        """One row."""
        one, blocks = slice(index, index + 1), self.counts[index]
        words = mx.contiguous(self.words[one, :blocks])
        grid = mx.contiguous(self.grid[one, :, :blocks])
        return CodeLog(self.coding, words, grid, [blocks])

    @classmethod
    def join(cls, parts: Sequence[CodeLog]) -> CodeLog:
        """The rows of all parts, padded to one size."""
        room = max(part.room for part in parts)
        words = mx.concatenate([pad_to(part.words, room, WORDS_AXIS) for part in parts])
        grid = mx.concatenate([pad_to(part.grid, room, GRID_AXIS) for part in parts])
        return cls(parts[0].coding, words, grid, [n for part in parts for n in part.counts])

    def settle(self) -> None:
        """Nothing waits to be moved."""

    def buffers(self) -> list[Any]:
        """Words and grid."""
        return [self.words, self.grid]


def _longer(buffer: mx.array, blocks: int, axis: int) -> mx.array:
    shape = (*buffer.shape[:axis], blocks, *buffer.shape[axis + 1 :])
    return grow(buffer[...], shape, buffer.dtype, axis)
