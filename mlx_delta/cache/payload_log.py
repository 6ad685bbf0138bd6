"""The blocks of a layer as runs of words of any length, in a log that grows from block to block.

How many words a block has is known on the device only. New blocks are therefore written at the
end of the payload with room for the worst case, and moved together when the next ones come: by
then their counts have long been computed, and reading them stalls nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import mlx.core as mx
import numpy as np

from .buffers import Rows, grow, pad_to, take_out

BLOCK_STEP = 4  # blocks by which what each block has grows
# Arrays of fewer than 8 elements reach a Metal kernel in another address space.
LEAST_BLOCKS = 8


class PayloadLog:
    """Blocks of each row, one after another.

    Args:
        kind: What a subclass must know of a block.
        parts: What each block has besides its words, by name, each [B, Hkv, blocks, ..].
        payload: uint32 [B, capacity].
        offsets: int32 [B, Hkv, blocks], as NumPy: the first word of each block's run.
        ends: For each row, the end of each block's words.
    """

    spare = 0  # words behind the last block's that a kernel may read

    def __init__(
        self,
        kind: Any,
        parts: dict[str, mx.array],
        payload: mx.array,
        offsets: np.ndarray,
        ends: list[list[int]],
    ):
        self.kind = kind
        self.parts = parts
        self.payload = payload
        self.ends = ends
        self._host_offsets = offsets
        self.offsets = mx.array(offsets)
        # Counts of each row's last blocks, [Hkv, blocks], while they have room for the worst case.
        self._pending: list[mx.array | None] = [None] * len(ends)

    @classmethod
    def empty(cls, kind: Any, rows: int, heads: int, parts: dict[str, mx.array]) -> Self:
        """A log without blocks; ``parts`` have room for ``LEAST_BLOCKS``."""
        offsets = np.zeros((rows, heads, LEAST_BLOCKS), np.int32)
        return cls(kind, parts, mx.zeros((rows, 0), mx.uint32), offsets, [[] for _ in range(rows)])

    @property
    def blocks(self) -> list[int]:
        """Blocks of each row."""
        pending = [0 if counts is None else counts.shape[1] for counts in self._pending]
        return [len(ends) + new for ends, new in zip(self.ends, pending, strict=True)]

    @property
    def zeros(self) -> mx.array:
        """Zero deltas of each block, int32 [B, Hkv, blocks]."""
        return self.parts["zeros"]

    @property
    def stride(self) -> int:
        """Words of one block of one head in the worst case."""
        raise NotImplementedError

    # Appending.

    def append_words(
        self, rows: Rows, words: mx.array, counts: mx.array, parts: dict[str, mx.array], done: int
    ) -> None:
        """Put blocks behind the ``done`` ones that each of these rows has.

        Args:
            rows: Which.
            words: uint32 [rows, Hkv, blocks, stride].
            counts: int32 [rows, Hkv, blocks], how many of them count.
            parts: What each block has besides, [rows, Hkv, blocks, ..].
            done: Blocks of each of the rows.
        """
        numbers = list(range(len(self.ends)))
        numbers = numbers[rows] if isinstance(rows, slice) else [int(r) for r in np.array(rows)]
        self.settle(numbers)
        heads, blocks = words.shape[1:3]
        target = done + blocks
        self._reserve_blocks(target)
        # Handles of their own: a step may still read the old ones.
        self.payload = self.payload[...]
        for name, new in parts.items():
            self.parts[name] = self.parts[name][...]
            self.parts[name][rows, :, done:target] = new
        mx.async_eval(counts, words)  # starts the work, waits for nothing
        length = blocks * heads * self.stride
        self._reserve_words(max(self._end(row) for row in numbers) + length)
        runs = self.stride * np.arange(blocks * heads).reshape(blocks, heads).T
        for i, row in enumerate(numbers):
            end = self._end(row)
            self.payload[row, end : end + length] = words[i].swapaxes(0, 1).reshape(-1)
            self._host_offsets[row, :, done:target] = end + runs
            self._pending[row] = counts[i]
        self.offsets = mx.array(self._host_offsets)

    def _reserve_blocks(self, blocks: int) -> None:
        old = self._host_offsets.shape[2]
        if blocks <= old:
            return
        blocks = -(-blocks // BLOCK_STEP) * BLOCK_STEP
        for name, part in self.parts.items():
            shape = (*part.shape[:2], blocks, *part.shape[3:])
            self.parts[name] = grow(part, shape, part.dtype)
        self._host_offsets = np.pad(self._host_offsets, [(0, 0), (0, 0), (0, blocks - old)])

    def _reserve_words(self, words: int) -> None:
        """Make room in the payload, and a little more, so that it need not grow every time."""
        words += self.spare
        if words > self.payload.shape[1]:
            shape = (self.payload.shape[0], words + self._slack)
            self.payload = grow(self.payload, shape, mx.uint32, axis=1)

    @property
    def _slack(self) -> int:
        """Words of one block of all heads in the worst case."""
        return self._host_offsets.shape[1] * self.stride

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
        """Move one row's last blocks, with ``counts`` [Hkv, blocks] words, together."""
        heads, blocks = counts.shape
        words = counts.T.reshape(-1).astype(np.int64)
        ends = np.cumsum(words)
        first, done, end = self._end(row), len(self.ends[row]), int(ends[-1])
        chunk = self.payload[row, first : first + len(words) * self.stride]
        together = run_together(chunk.reshape(-1, self.stride), words)
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
            begin = ends[first - 1] if first and gone else 0  # a short row may lack the first ones
            taken = (ends[first + gone - 1] if gone else begin) - begin
            kept = np.delete(self._host_offsets[row], slice(first, first + gone), axis=1)
            kept[:, first : len(ends) - gone] -= taken
            offsets[row, :, : kept.shape[1]] = kept
            self.ends[row] = [*ends[:first], *(end - taken for end in ends[first + gone :])]
            words.append((begin, taken))
        # As many blocks as before: room that the next ones take.
        room = offsets.shape[2]
        self.parts = {
            name: pad_to(take_out(part, first, blocks), room) for name, part in self.parts.items()
        }
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
        self._host_offsets[row, :, blocks:] = 0
        self.offsets = mx.array(self._host_offsets)

    def word_bytes(self, blocks: int) -> int:
        """Bytes of the words of the first row's first blocks."""
        self.settle([0])
        return 4 * self.ends[0][blocks - 1] if blocks else 0

    # Rows.

    def take(self, rows: list[int]) -> None:
        """Keep these rows only, in this order."""
        self.settle()
        index = mx.array(rows, mx.int32)
        self.payload = self.payload[index]
        self.parts = {name: part[index] for name, part in self.parts.items()}
        self._host_offsets = self._host_offsets[rows]
        self.offsets = mx.array(self._host_offsets)
        self.ends = [list(self.ends[row]) for row in rows]
        self._pending = [None] * len(rows)

    def row(self, index: int) -> Self:
        """One row."""
        self.settle()
        one, blocks = slice(index, index + 1), max(LEAST_BLOCKS, len(self.ends[index]))
        parts = {name: mx.contiguous(part[one, :, :blocks]) for name, part in self.parts.items()}
        payload = mx.contiguous(self.payload[one, : self._end(index) + self.spare])
        offsets = self._host_offsets[one, :, :blocks].copy()
        return type(self)(self.kind, parts, payload, offsets, [list(self.ends[index])])

    @classmethod
    def join(cls, logs: Sequence[Self]) -> Self:
        """The rows of all logs, padded to one size."""
        for log in logs:
            log.settle()
        blocks = max(log._host_offsets.shape[2] for log in logs)
        words = max(log.payload.shape[1] for log in logs)
        offsets = [
            np.pad(log._host_offsets, [(0, 0), (0, 0), (0, blocks - log._host_offsets.shape[2])])
            for log in logs
        ]
        return cls(
            logs[0].kind,
            {
                name: mx.concatenate([pad_to(log.parts[name], blocks) for log in logs])
                for name in logs[0].parts
            },
            mx.concatenate([pad_to(log.payload, words, 1) for log in logs]),
            np.concatenate(offsets),
            [list(ends) for log in logs for ends in log.ends],
        )


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
