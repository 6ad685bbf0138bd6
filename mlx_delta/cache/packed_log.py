"""The packed blocks of a layer, and the log of their payloads, which grows from block to block.

How many values a block has is known on the device only. New blocks are therefore written at the
end of the payload with room for the worst case, and moved together when the next ones come: by
then their counts have long been computed, and reading them stalls nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_delta.config import DeltaConfig
from mlx_delta.ops.blocks import encode_blocks
from mlx_delta.ops.pack import EncodedBlocks, PackedBlocks, run_together, worst_words

from .buffers import Rows, grow, pad_to, take_out

BLOCK_STEP = 4  # blocks by which masks, grids and offsets grow
# Arrays of fewer than 8 elements reach a Metal kernel in another address space.
LEAST_BLOCKS = 8


class PackedLog:
    """Packed blocks of each row, one after another.

    Args:
        bits: Of a value.
        head_dim: D.
        masks: uint32 [B, Hkv, blocks, block_size - 1, words of D bits].
        payload: uint32 [B, capacity].
        offsets: int32 [B, Hkv, blocks], as NumPy: the first word of each block's run.
        grid: [B, Hkv, blocks, 2, D] of the storage type; ``None`` at 16 bits.
        zeros: int32 [B, Hkv, blocks], zero deltas.
        ends: For each row, the end of each block's words.
    """

    def __init__(
        self,
        bits: int,
        head_dim: int,
        masks: mx.array,
        payload: mx.array,
        offsets: np.ndarray,
        grid: mx.array | None,
        zeros: mx.array,
        ends: list[list[int]],
    ):
        self.bits = bits
        self.head_dim = head_dim
        self.masks = masks
        self.payload = payload
        self.grid = grid
        self.zeros = zeros
        self.ends = ends
        self._host_offsets = offsets
        self.offsets = mx.array(offsets)
        # Counts of each row's last blocks, [Hkv, blocks], while they have room for the worst case.
        self._pending: list[mx.array | None] = [None] * len(ends)

    @classmethod
    def make(cls, shape: tuple[int, int, int], size: int, bits: int, dtype: mx.Dtype) -> PackedLog:
        """An empty log for [B, Hkv, D] keys in blocks of a size."""
        B, H, D = shape
        room = (B, H, LEAST_BLOCKS)
        return cls(
            bits,
            D,
            mx.zeros((*room, size - 1, -(-D // 32)), mx.uint32),
            mx.zeros((B, 0), mx.uint32),
            np.zeros(room, np.int32),
            mx.zeros((*room, 2, D), dtype) if bits < 16 else None,
            mx.zeros(room, mx.int32),
            [[] for _ in range(B)],
        )

    @property
    def blocks(self) -> list[int]:
        """Packed blocks of each row."""
        pending = [0 if counts is None else counts.shape[1] for counts in self._pending]
        return [len(ends) + new for ends, new in zip(self.ends, pending, strict=True)]

    @property
    def _stride(self) -> int:
        """Payload words of one block of one head in the worst case."""
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

    # Appending.

    def encode(self, rows: Rows, keys: mx.array, config: DeltaConfig, done: int) -> None:
        """Hold and pack blocks of keys, behind the ``done`` ones that each of these rows has."""
        self.append(rows, encode_blocks(keys, config, done), done)

    def append(self, rows: Rows, new: EncodedBlocks, done: int) -> None:
        """Put blocks behind the ``done`` ones that each of these rows has."""
        numbers = list(range(len(self.ends)))
        numbers = numbers[rows] if isinstance(rows, slice) else [int(r) for r in np.array(rows)]
        self.settle(numbers)
        heads, blocks = new.payload.shape[1:3]
        target = done + blocks
        self._reserve_blocks(target)
        # Handles of their own: a step may still read the old ones.
        self.masks, self.zeros, self.payload = self.masks[...], self.zeros[...], self.payload[...]
        self.masks[rows, :, done:target] = new.masks
        self.zeros[rows, :, done:target] = new.counts[..., 1]
        if self.grid is not None and new.grid is not None:
            self.grid = self.grid[...]
            self.grid[rows, :, done:target] = new.grid
        counts = new.counts[..., 0]
        mx.async_eval(counts, new.payload)  # starts the work, waits for nothing
        words = blocks * heads * self._stride
        self._reserve_words(max(self._end(row) for row in numbers) + words)
        runs = self._stride * np.arange(blocks * heads).reshape(blocks, heads).T
        for i, row in enumerate(numbers):
            end = self._end(row)
            self.payload[row, end : end + words] = new.payload[i].swapaxes(0, 1).reshape(-1)
            self._host_offsets[row, :, done:target] = end + runs
            self._pending[row] = counts[i]
        self.offsets = mx.array(self._host_offsets)

    def _reserve_blocks(self, blocks: int) -> None:
        B, H, old, *rest = self.masks.shape
        if blocks <= old:
            return
        blocks = -(-blocks // BLOCK_STEP) * BLOCK_STEP
        self.masks = grow(self.masks, (B, H, blocks, *rest), mx.uint32)
        self.zeros = grow(self.zeros, (B, H, blocks), mx.int32)
        if self.grid is not None:
            self.grid = grow(self.grid, (B, H, blocks, *self.grid.shape[3:]), self.grid.dtype)
        self._host_offsets = np.pad(self._host_offsets, [(0, 0), (0, 0), (0, blocks - old)])

    def _reserve_words(self, words: int) -> None:
        """Make room in the payload, and a little more, so that it need not grow every time."""
        if words > self.payload.shape[1]:
            shape = (self.payload.shape[0], words + self._slack)
            self.payload = grow(self.payload, shape, mx.uint32, axis=1)

    @property
    def _slack(self) -> int:
        """Words of one block of all heads in the worst case."""
        return self.masks.shape[1] * self._stride

    def _end(self, row: int) -> int:
        return self.ends[row][-1] if self.ends[row] else 0

    def settle(self, rows: Sequence[int] | None = None) -> None:
        """Move the words of each row's last blocks together, now that their number is known."""
        numbers = range(len(self.ends)) if rows is None else rows
        pending = {row: x for row in numbers if (x := self._pending[row]) is not None}
        if not pending:
            return
        mx.eval(list(pending.values()))
        for row, counts in pending.items():
            self._settle_row(row, np.array(counts))
        words = max(map(self._end, range(len(self.ends)))) + self._slack
        if words < self.payload.shape[1] and not any(x is not None for x in self._pending):
            self.payload = mx.contiguous(self.payload[:, :words])
        self.offsets = mx.array(self._host_offsets)

    def _settle_row(self, row: int, counts: np.ndarray) -> None:
        """Move one row's last blocks, with ``counts`` [Hkv, blocks] values, together."""
        heads, blocks = counts.shape
        words = -(-counts.T.reshape(-1) // (32 // self.bits))
        ends = np.cumsum(words)
        first, done, end = self._end(row), len(self.ends[row]), int(ends[-1])
        chunk = self.payload[row, first : first + len(words) * self._stride]
        together = run_together(chunk.reshape(-1, self._stride), words)
        self.payload = self.payload[...]
        self.payload[row, first : first + end] = together
        begins = (first + ends - words).reshape(blocks, heads)
        self._host_offsets[row, :, done : done + blocks] = begins.T
        self.ends[row] += (first + ends[heads - 1 :: heads]).tolist()
        self._pending[row] = None

    def drop(self, first: int, blocks: Sequence[int]) -> None:
        """Take so many blocks of each row out, behind the first ones; the rest moves up."""
        self.settle()
        words = []
        offsets = np.zeros_like(self._host_offsets)
        for row, gone in enumerate(blocks):
            ends = self.ends[row]
            begin = ends[first - 1] if first else 0
            taken = (ends[first + gone - 1] if gone else begin) - begin
            kept = np.delete(self._host_offsets[row], slice(first, first + gone), axis=1)
            kept[:, first : len(ends) - gone] -= taken
            offsets[row, :, : kept.shape[1]] = kept
            self.ends[row] = [*ends[:first], *(end - taken for end in ends[first + gone :])]
            words.append((begin, taken))
        blank = self.masks.shape[2]
        self.masks, self.zeros = (take_out(x, first, blocks) for x in (self.masks, self.zeros))
        if self.grid is not None:
            self.grid = take_out(self.grid, first, blocks)
        # As many blocks as before: room that the next ones take.
        missing = blank - self.masks.shape[2]
        if missing:
            self.masks, self.zeros = pad_to(self.masks, blank), pad_to(self.zeros, blank)
            self.grid = None if self.grid is None else pad_to(self.grid, blank)
        size = self.payload.shape[1] - min(taken for _, taken in words)
        self.payload = mx.concatenate(
            [
                pad_to(take_out(self.payload[row : row + 1], begin, [taken], 1), size, 1)
                for row, (begin, taken) in enumerate(words)
            ]
        )
        self._host_offsets = offsets
        self.offsets = mx.array(offsets)

    def forget(self, row: int, blocks: int) -> None:
        """Of one row keep so many blocks."""
        if self.blocks[row] <= blocks:
            return
        if blocks > len(self.ends[row]):
            self.settle([row])
        self._pending[row] = None
        del self.ends[row][blocks:]
        # Empty masks: whatever is unpacked of a block that is not there stays in bounds.
        self.masks[row, :, blocks:] = 0
        self._host_offsets[row, :, blocks:] = 0
        self.offsets = mx.array(self._host_offsets)

    def read_bytes(self, blocks: int, float_bytes: int | None = None) -> int:
        """Bytes that the kernel ``delta_decode`` loads of the first row's first blocks.

        Per block and head a mask bit for every element but the keyframe's, the words of the values
        that changed, an offset, and with codes a grid.
        """
        self.settle([0])
        size = self.masks[0, 0, 0].nbytes + 4
        if self.grid is not None:
            item = self.grid.itemsize if float_bytes is None else float_bytes
            size += self.grid[0, 0, 0].size * item
        words = self.ends[0][blocks - 1] if blocks else 0
        return blocks * self.masks.shape[1] * size + 4 * words

    # Rows.

    def take(self, rows: list[int]) -> None:
        """Keep these rows only, in this order."""
        self.settle()
        index = mx.array(rows, mx.int32)
        self.masks, self.payload, self.zeros = (
            x[index] for x in (self.masks, self.payload, self.zeros)
        )
        self.grid = None if self.grid is None else self.grid[index]
        self._host_offsets = self._host_offsets[rows]
        self.offsets = mx.array(self._host_offsets)
        self.ends = [list(self.ends[row]) for row in rows]
        self._pending = [None] * len(rows)

    def row(self, index: int) -> PackedLog:
        """One row."""
        self.settle()
        one, blocks = slice(index, index + 1), max(LEAST_BLOCKS, len(self.ends[index]))
        return PackedLog(
            self.bits,
            self.head_dim,
            mx.contiguous(self.masks[one, :, :blocks]),
            mx.contiguous(self.payload[one, : self._end(index)]),
            self._host_offsets[one, :, :blocks].copy(),
            None if self.grid is None else mx.contiguous(self.grid[one, :, :blocks]),
            mx.contiguous(self.zeros[one, :, :blocks]),
            [list(self.ends[index])],
        )

    @classmethod
    def join(cls, parts: Sequence[PackedLog]) -> PackedLog:
        """The rows of all parts, padded to one size."""
        for part in parts:
            part.settle()
        blocks = max(part.masks.shape[2] for part in parts)
        words = max(part.payload.shape[1] for part in parts)
        grids = [pad_to(part.grid, blocks) for part in parts if part.grid is not None]
        offsets = [
            np.pad(part._host_offsets, [(0, 0), (0, 0), (0, blocks - part.masks.shape[2])])
            for part in parts
        ]
        return cls(
            parts[0].bits,
            parts[0].head_dim,
            mx.concatenate([pad_to(part.masks, blocks) for part in parts]),
            mx.concatenate([pad_to(part.payload, words, 1) for part in parts]),
            np.concatenate(offsets),
            mx.concatenate(grids) if grids else None,
            mx.concatenate([pad_to(part.zeros, blocks) for part in parts]),
            [list(ends) for part in parts for ends in part.ends],
        )

    def buffers(self) -> list[Any]:
        """Masks, payload, offsets, grid and zeros."""
        return [self.masks, self.payload, self.offsets, self.grid, self.zeros]
