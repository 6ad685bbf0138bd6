"""The packed blocks of a layer."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from mlx_delta.config import DeltaConfig
from mlx_delta.ops.blocks import encode_blocks
from mlx_delta.ops.pack import PackedBlocks, worst_words

from .buffers import Rows
from .payload_log import LEAST_BLOCKS, PayloadLog


class PackedLog(PayloadLog):
    """Packed blocks of each row. Of a block's kind it knows bits of a value and D.

    Its parts are the masks, uint32 [B, Hkv, blocks, block_size - 1, words of D bits]; the zero
    deltas; and the grid, [B, Hkv, blocks, 2, D] of the storage type, but not at 16 bits.
    """

    @classmethod
    def make(cls, shape: tuple[int, int, int], size: int, bits: int, dtype: mx.Dtype) -> PackedLog:
        """An empty log for [B, Hkv, D] keys in blocks of a size."""
        B, H, D = shape
        room = (B, H, LEAST_BLOCKS)
        parts = {"masks": mx.zeros((*room, size - 1, -(-D // 32)), mx.uint32)}
        parts["zeros"] = mx.zeros(room, mx.int32)
        if bits < 16:
            parts["grid"] = mx.zeros((*room, 2, D), dtype)
        return cls.empty((bits, D), B, H, parts)

    @classmethod
    def restore(
        cls, bits: int, head_dim: int, arrays: dict[str, Any], ends: list[list[int]]
    ) -> PackedLog:
        """The log of buffers as :meth:`buffers` gives them."""
        parts = {
            name: arrays[name] for name in ("masks", "zeros", "grid") if arrays[name] is not None
        }
        offsets = np.array(arrays["offsets"])
        return cls((bits, head_dim), parts, arrays["payload"], offsets, ends)

    @property
    def bits(self) -> int:
        """Of a value."""
        return int(self.kind[0])

    @property
    def head_dim(self) -> int:
        """D."""
        return int(self.kind[1])

    @property
    def masks(self) -> mx.array:
        """Which values changed."""
        return self.parts["masks"]

    @property
    def grid(self) -> mx.array | None:
        """Of codes."""
        return self.parts.get("grid")

    @property
    def stride(self) -> int:
        """Words of one block of one head in the worst case."""
        return worst_words(self.masks.shape[3] + 1, self.head_dim, self.bits)

    def read(self, sinks: mx.array | None, dtype: mx.Dtype) -> PackedBlocks | None:
        """The packed blocks as the kernels read them; ``None`` while there are none."""
        if not self.payload.shape[1]:
            return None
        return PackedBlocks(
            masks=self.masks,
            payload=self.payload,
            offsets=self.offsets,
            grid=self.grid,
            sinks=sinks,
            bits=self.bits,
            dtype=dtype,
            head_dim=self.head_dim,
        )

    def encode(self, rows: Rows, keys: mx.array, config: DeltaConfig, done: int) -> None:
        """Hold and pack blocks of keys, behind the ``done`` ones that each of these rows has."""
        new = encode_blocks(keys, config, done)
        words = -(-new.counts[..., 0] // (32 // self.bits))
        parts = {"masks": new.masks, "zeros": new.counts[..., 1]}
        if new.grid is not None:
            parts["grid"] = new.grid
        self.append_words(rows, new.payload, words, parts, done)

    def forget(self, row: int, blocks: int) -> None:
        """Of one row keep so many blocks."""
        if self.blocks[row] > blocks:
            super().forget(row, blocks)
            # Empty masks: whatever is unpacked of a block that is not there stays in bounds.
            self.masks[row, :, blocks:] = 0

    def read_bytes(self, blocks: int, float_bytes: int | None = None) -> int:
        """Bytes that the kernel ``delta_decode`` loads of the first row's first blocks.

        Per block and head a mask bit for every element but the keyframe's, the words of the values
        that changed, an offset, and with codes a grid.
        """
        size = self.masks[0, 0, 0].nbytes + 4
        if self.grid is not None:
            item = self.grid.itemsize if float_bytes is None else float_bytes
            size += self.grid[0, 0, 0].size * item
        return blocks * self.masks.shape[1] * size + self.word_bytes(blocks)

    def buffers(self) -> list[Any]:
        """Masks, payload, offsets, grid and zeros."""
        return [self.masks, self.payload, self.offsets, self.grid, self.zeros]
