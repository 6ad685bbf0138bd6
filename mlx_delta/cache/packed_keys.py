"""Held keys, stored packed: blocks of changed values far away, a short buffer of full keys near.

The layout of a block is specified in :mod:`mlx_delta.method.storage`. Near keys are those of
the query's own block, of its window, and of one block of slack, so that rewinding by up to a
block is exact; they and everything else are in 16 bits.

How many values a block has is known on the GPU only. In decode a new block is therefore written
at the end of the payload with room for the worst case, and moved together when the next block
comes: by then its count has long been computed, and reading it stalls nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_delta.config import DeltaConfig
from mlx_delta.ops.dispatch import encode_blocks, unpack
from mlx_delta.ops.pack import EncodedBlocks, PackedBlocks, storage_type, to_storage, worst_words

from .buffers import Rows, equal_rows, grow, pad_to, write_tokens
from .packed_state import BUFFERS, HEAD_DIMS, check_lost, check_near, check_runs, check_shapes
from .packed_view import PackedView

DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}
BLOCK_STEP = 4  # blocks by which masks, grids and offsets grow
# Arrays of fewer than 8 elements reach a Metal kernel in another address space.
LEAST_BLOCKS = 8


class PackedKeys:
    """The keys of a layer: packed blocks far away, full keys near.

    Args:
        config: The setting of this layer, with ``key_bits``.
        rows: Rows that are told apart; 1 where all agree.
    """

    n_arrays = 7

    def __init__(self, config: DeltaConfig, rows: int):
        assert config.key_bits is not None
        self.config = config
        self.bits: int = config.key_bits
        self._type: str | None = None  # the model's; a name, since mx.Dtype can't be copied
        self.zeros: Any = None  # int32 [B, Hkv, blocks], zero deltas of encoded blocks
        self._near: Any = None  # [B, Hkv, room, D] of the storage type
        self._firsts = [0] * rows  # position of each row's first near key
        # Blocks of each row whose full keys are gone. After a long rewind their held keys stand in
        # near the query, and they stay packed as they are: held a second time, they would drift.
        self._lost = [0] * rows
        self._masks: Any = None  # uint32 [B, Hkv, blocks, block_size - 1, words of D bits]
        self._grid: Any = None  # [B, Hkv, blocks, 2, D]
        self._sinks: Any = None  # [B, Hkv, n_sinks, D]
        self._payload: Any = None  # uint32 [B, capacity]
        self._offsets: Any = None  # int32 [B, Hkv, blocks]
        self._host_offsets: Any = None  # the same, as NumPy
        self._ends: list[list[int]] = []  # per row of B: end of each block's words
        # Per row of B: the last block's counts, while it still has room for the worst case.
        self._pending: list[mx.array | None] = []

    @property
    def head_dim(self) -> int:
        """D."""
        return self._near.shape[3]

    @property
    def dtype(self) -> mx.Dtype:
        """The model's type."""
        assert self._type is not None
        return DTYPES[self._type]

    @property
    def _room(self) -> int:
        """Near keys to make room for: the window, the block being filled, and one of slack."""
        return (self.config.window_blocks + 2) * self.config.block_size

    @property
    def _stride(self) -> int:
        """Payload words of one block of one head in the worst case."""
        return worst_words(self.config.block_size, self.head_dim, self.bits)

    def append(
        self,
        keys: mx.array,
        starts: Sequence[int],
        targets: Sequence[int],
        capacity: int,
    ) -> PackedView:
        """Write keys [B, Hkv, L, D] from ``starts`` on, and encode blocks up to ``targets``.

        Args:
            keys: The new keys.
            starts: Each row's position of the first of them.
            targets: Blocks of each row that are to be encoded.
            capacity: Not used: packed blocks grow by what they need.
        """
        new = to_storage(keys)
        if self._near is None:
            self._allocate(new, keys.dtype)
        steps, size = keys.shape[2], self.config.block_size
        places = [start - first for start, first in zip(starts, self._firsts, strict=True)]
        near = self._near[...]  # a handle of its own: a view may still read the old one
        near = grow(near, (*near.shape[:2], max(places) + steps, near.shape[3]), near.dtype)
        near = write_tokens(near, new, places)
        self._write_sinks(new, starts)
        self._encode(near, targets)
        view = PackedView(
            blocks=self.blocks(),
            near=near,
            firsts=self._firsts,
            encoded=targets,
            length=max(starts) + steps,
            block_size=size,
            dtype=keys.dtype,
        )
        self._keep_near(near, [max(0, target - 1) * size for target in targets])
        return view

    def check_new(self, keys: mx.array) -> None:
        """Refuse keys that can't be packed.

        Raises:
            ValueError: Their type or head_dim has no kernel.
        """
        storage_type(keys.dtype)
        if keys.shape[3] not in HEAD_DIMS:
            raise ValueError(
                f"[DeltaKVCache] key_bits={self.bits} needs a head_dim that is a multiple of 16, "
                f"up to {HEAD_DIMS[-1]}, but got {keys.shape[3]}."
            )

    def _allocate(self, keys: mx.array, dtype: mx.Dtype) -> None:
        B, H, _, D = keys.shape
        self._type = str(dtype).removeprefix("mlx.core.")
        self._near = mx.zeros((B, H, self._room, D), keys.dtype)
        self._ends = [[] for _ in range(B)]
        self._pending = [None] * B
        self._payload = mx.zeros((B, 0), mx.uint32)
        if self.bits < 16 and self.config.sinks:
            self._sinks = mx.zeros((B, H, self.config.sinks, D), keys.dtype)
        self._reserve_blocks(LEAST_BLOCKS)

    def _reserve_blocks(self, blocks: int) -> None:
        B, H, _, D = self._near.shape
        old = 0 if self._masks is None else self._masks.shape[2]
        if blocks <= old:
            return
        blocks = max(LEAST_BLOCKS, -(-blocks // BLOCK_STEP) * BLOCK_STEP)
        rows, words = self.config.block_size - 1, -(-D // 32)
        self._masks = grow(self._masks, (B, H, blocks, rows, words), mx.uint32)
        self.zeros = grow(self.zeros, (B, H, blocks), mx.int32)
        if self.bits < 16:
            self._grid = grow(self._grid, (B, H, blocks, 2, D), self._near.dtype)
        offsets = np.zeros((B, H, blocks), np.int32)
        if self._host_offsets is not None:
            offsets[:, :, :old] = self._host_offsets
        self._host_offsets = offsets
        self._offsets = mx.array(offsets)

    def _reserve_words(self, words: int) -> None:
        """Make room in the payload, and a little more, so that it need not grow every time."""
        if words > self._payload.shape[1]:
            extra = self._near.shape[1] * self._stride
            shape = (self._payload.shape[0], words + extra)
            self._payload = grow(self._payload, shape, mx.uint32, axis=1)

    def _write_sinks(self, keys: mx.array, starts: Sequence[int]) -> None:
        if self._sinks is None:
            return
        n_sinks = self._sinks.shape[2]
        for (start,), rows in equal_rows(starts).items():
            first, end = max(0, start), min(n_sinks, start + keys.shape[2])
            if first < end:
                self._sinks[rows, :, first:end] = keys[rows, :, first - start : end - start]

    def _keep_near(self, near: mx.array, firsts: list[int]) -> None:
        """Keep the near keys from these positions on, and forget those before."""
        firsts = [max(old, new) for old, new in zip(self._firsts, firsts, strict=True)]
        shifts = [new - old for new, old in zip(firsts, self._firsts, strict=True)]
        room = self._room
        longest = max(shifts) + room
        if near.shape[2] < longest:
            near = pad_to(near, longest)
        if len(set(shifts)) == 1:
            near = near[:, :, shifts[0] : shifts[0] + room]
        else:
            index = mx.array(shifts)[:, None] + mx.arange(room)
            near = mx.take_along_axis(near, index[:, None, :, None], axis=2)
        # Contiguous: a slice would keep all of a chunk's keys in memory.
        self._near, self._firsts = mx.contiguous(near), firsts
        size = self.config.block_size
        self._lost = [
            max(lost, first // size) for lost, first in zip(self._lost, firsts, strict=True)
        ]

    # Encoding.

    def blocks(self) -> PackedBlocks | None:
        """The packed blocks as the kernels read them; ``None`` while there are none."""
        if self._near is None or not self._payload.shape[1]:
            return None
        return PackedBlocks(
            masks=self._masks,
            payload=self._payload,
            offsets=self._offsets,
            grid=self._grid,
            sinks=self._sinks,
            bits=self.bits,
            dtype=self._near.dtype,
            head_dim=self.head_dim,
        )

    def _packed_blocks(self) -> list[int]:
        """Blocks of each row that are packed; after a long rewind more than are encoded."""
        rows = range(len(self._firsts))  # one count may speak for all rows
        return [len(self._ends[row]) + (self._pending[row] is not None) for row in rows]

    def _encode(self, near: mx.array, targets: Sequence[int]) -> None:
        size = self.config.block_size
        groups = equal_rows(self._firsts, self._packed_blocks(), targets)
        for (first, done, target), rows in groups.items():
            if target <= done:
                continue
            keys = near[rows, :, done * size - first : target * size - first]
            new = encode_blocks(keys, self.config, done)
            self._reserve_blocks(target)
            # Handles of their own, as for the near keys.
            self._masks, self.zeros = self._masks[...], self.zeros[...]
            self._masks[rows, :, done:target] = new.masks
            self.zeros[rows, :, done:target] = new.counts[..., 1]
            if new.grid is not None:
                self._grid = self._grid[...]
                self._grid[rows, :, done:target] = new.grid
            self._store_payload(self._row_numbers(rows), new, done, target)
        self._offsets = mx.array(self._host_offsets)

    def _row_numbers(self, rows: Rows) -> list[int]:
        return list(range(len(self._ends)))[rows] if isinstance(rows, slice) else _numbers(rows)

    def _store_payload(self, rows: list[int], new: EncodedBlocks, done: int, target: int) -> None:
        """Put the words of blocks ``done`` to ``target`` behind those of the blocks before."""
        self._settle(rows)
        if target - done > 1:  # a prompt: wait for the counts
            counts = np.array(new.counts[..., 0])
            for i, row in enumerate(rows):
                self._place(row, new.payload[i].swapaxes(0, 1), counts[i].T)
            return
        stride, heads = self._stride, new.payload.shape[1]
        counts_of_rows = [new.counts[i, :, 0, 0] for i in range(len(rows))]
        mx.async_eval(counts_of_rows, new.payload)  # starts the work, waits for nothing
        for i, row in enumerate(rows):
            end = self._end(row)
            self._reserve_words(end + heads * stride)
            self._payload = self._payload[...]
            self._payload[row, end : end + heads * stride] = new.payload[i].reshape(-1)
            self._host_offsets[row, :, done] = end + stride * np.arange(heads)
            self._pending[row] = counts_of_rows[i]

    def _end(self, row: int) -> int:
        return self._ends[row][-1] if self._ends[row] else 0

    def _settle(self, rows: Sequence[int] | None = None) -> None:
        """Move the words of each row's last block together, now that their number is known."""
        for row in range(len(self._ends)) if rows is None else rows:
            counts = self._pending[row]
            if counts is None:
                continue
            end = self._end(row)
            heads, stride = counts.shape[0], self._stride
            chunk = self._payload[row, end : end + heads * stride].reshape(1, heads, stride)
            self._pending[row] = None
            self._place(row, chunk, np.array(counts)[None])
        if self._host_offsets is not None:
            self._offsets = mx.array(self._host_offsets)

    def _place(self, row: int, chunk: mx.array, counts: np.ndarray) -> None:
        """Append blocks [blocks, Hkv, stride] with ``counts`` [blocks, Hkv] values each."""
        blocks, heads, stride = chunk.shape
        words = -(-counts.reshape(-1) // (32 // self.bits))
        ends = np.cumsum(words)
        begins = ends - words
        # Word i of the run is word i - begin of the chunk that it belongs to.
        moved = np.repeat(np.arange(len(words)) * stride - begins, words) + np.arange(ends[-1])
        first, done = self._end(row), len(self._ends[row])
        self._reserve_words(first + int(ends[-1]))
        self._payload = self._payload[...]
        together = chunk.reshape(-1)[mx.array(moved.astype(np.int32))]
        self._payload[row, first : first + int(ends[-1])] = together
        offsets = (first + begins).reshape(blocks, heads)
        self._host_offsets[row, :, done : done + blocks] = offsets.T
        self._ends[row] += (first + ends[heads - 1 :: heads]).tolist()

    def rewind(
        self, encoded: Sequence[int], targets: Sequence[int], lengths: Sequence[int]
    ) -> None:
        """Forget blocks from ``targets`` on; where full keys are gone, held ones replace them.

        Args:
            encoded: Blocks of each row that are encoded so far.
            targets: Blocks of each row that are to stay so.
            lengths: Tokens of each row that are left.
        """
        if self._near is None:
            return
        size, room = self.config.block_size, self._room
        far = None
        for (first, _, target), rows in equal_rows(self._firsts, encoded, targets).items():
            if target * size >= first:
                continue
            if far is None:
                far = self._unpacked(max(encoded))
            near = mx.concatenate([far[rows, :, target * size : first], self._near[rows]], axis=2)
            self._near[rows] = near[:, :, :room]
        for row, packed in enumerate(self._packed_blocks()):
            self._firsts[row] = min(self._firsts[row], targets[row] * size)
            self._lost[row] = min(self._lost[row], max(0, lengths[row]) // size)
            kept = max(targets[row], self._lost[row])
            if kept < packed:
                all_rows = range(len(self._ends))  # of which a single count speaks for all
                self._forget_blocks([row] if len(targets) > 1 else all_rows, kept)
        self._offsets = mx.array(self._host_offsets)

    def _unpacked(self, blocks: int) -> mx.array:
        packed = self.blocks()
        assert packed is not None
        return unpack(packed, blocks)

    def _forget_blocks(self, rows: Sequence[int], target: int) -> None:
        for row in rows:
            self._pending[row] = None  # it can only be the last block
            del self._ends[row][target:]
            # Empty masks: whatever is unpacked of a block that is not there stays in bounds.
            self._masks[row, :, target:] = 0
            self._host_offsets[row, :, target:] = 0

    def fetch(self, length: int, encoded: Sequence[int]) -> mx.array:
        """Keys of the first tokens, [B, Hkv, length, D]: held far away, full near."""
        size = self.config.block_size
        blocks = self.blocks()
        return PackedView(blocks, self._near, self._firsts, encoded, length, size, self.dtype).held

    # Rows.

    def take(self, rows: list[int]) -> None:
        """Keep these rows only, in this order."""
        self._settle()
        self._firsts = [self._firsts[row] for row in rows]
        self._lost = [self._lost[row] for row in rows]
        if self._near is None:
            return
        index = mx.array(rows, mx.int32)
        for name in ("_near", "_masks", "_grid", "_sinks", "_payload", "zeros"):
            buffer = getattr(self, name)
            setattr(self, name, None if buffer is None else buffer[index])
        self._host_offsets = self._host_offsets[rows]
        self._offsets = mx.array(self._host_offsets)
        self._ends = [list(self._ends[row]) for row in rows]
        self._pending = [None] * len(rows)

    def row(self, index: int, length: int) -> PackedKeys:
        """One row as a store of its own."""
        self._settle()
        store = PackedKeys(self.config, 1)
        store._firsts, store._lost = [self._firsts[index]], [self._lost[index]]
        if self._near is not None:
            store._type = self._type
            one = slice(index, index + 1)
            store._near = mx.contiguous(self._near[one])
            blocks = max(LEAST_BLOCKS, len(self._ends[index]))
            for name in ("_masks", "_grid", "zeros"):
                buffer = getattr(self, name)
                setattr(
                    store, name, None if buffer is None else mx.contiguous(buffer[one, :, :blocks])
                )
            store._sinks = None if self._sinks is None else mx.contiguous(self._sinks[one])
            store._payload = mx.contiguous(self._payload[one, : self._end(index)])
            store._host_offsets = self._host_offsets[one, :, :blocks].copy()
            store._offsets = mx.array(store._host_offsets)
            store._ends = [list(self._ends[index])]
            store._pending = [None]
        return store

    @classmethod
    def join(cls, stores: Sequence[PackedKeys], counts: Sequence[int]) -> PackedKeys:
        """The rows of all stores, padded to one size; ``counts`` rows of each."""
        joined = cls(stores[0].config, 0)
        joined._firsts = [first for store in stores for first in store._firsts]
        joined._lost = [lost for store in stores for lost in store._lost]
        filled = [store for store in stores if store._near is not None]
        if not filled:
            return joined
        parts = []
        for store, count in zip(stores, counts, strict=True):
            if store._near is None:
                H, room, D = filled[0]._near.shape[1:]
                store = cls(joined.config, count)
                near = mx.zeros((count, H, room, D), filled[0]._near.dtype)
                store._allocate(near, filled[0].dtype)
            store._settle()
            parts.append(store)
        blocks = max(part._masks.shape[2] for part in parts)
        words = max(part._payload.shape[1] for part in parts)
        for part in parts:
            joined._ends += [list(ends) for ends in part._ends]
        joined._type = filled[0]._type
        joined._pending = [None] * len(joined._ends)
        for name in ("_masks", "_grid", "zeros"):
            if getattr(parts[0], name) is not None:
                padded = [pad_to(getattr(part, name), blocks) for part in parts]
                setattr(joined, name, mx.concatenate(padded))
        joined._near = mx.concatenate([part._near for part in parts])
        if parts[0]._sinks is not None:
            joined._sinks = mx.concatenate([part._sinks for part in parts])
        joined._payload = mx.concatenate([pad_to(part._payload, words, 1) for part in parts])
        joined._host_offsets = np.concatenate(
            [
                np.pad(part._host_offsets, [(0, 0), (0, 0), (0, blocks - part._masks.shape[2])])
                for part in parts
            ]
        )
        joined._offsets = mx.array(joined._host_offsets)
        return joined

    # State.

    @property
    def nbytes(self) -> int:
        """Bytes allocated, room to grow included."""
        return sum(x.nbytes for x in self._buffers() if x is not None)

    def _buffers(self) -> list[Any]:
        return [
            self._near,
            self._masks,
            self._payload,
            self._offsets,
            self._grid,
            self._sinks,
            self.zeros,
        ]

    def arrays(self) -> list[Any]:
        """The buffers, ``None`` for each before the first write."""
        self._settle()
        return self._buffers()

    def header(self) -> dict[str, Any]:
        """What belongs to the state besides the buffers, as JSON values."""
        counts = {"firsts": self._firsts, "lost": self._lost, "ends": self._ends}
        return {**counts, "type": self._type}

    def restore(self, header: dict[str, Any], arrays: list[Any]) -> None:
        """Take over a state."""
        self._firsts, self._ends = header["firsts"], header["ends"]
        size = self.config.block_size
        lost = header.get("lost", [first // size for first in self._firsts])
        self._lost = [int(blocks) for blocks in lost]
        self._type = header["type"]
        if self._type not in (None, *DTYPES):
            raise ValueError(f"it is of type {self._type!r}")
        (
            self._near,
            self._masks,
            self._payload,
            self._offsets,
            self._grid,
            self._sinks,
            self.zeros,
        ) = arrays
        self._pending = [None] * len(self._ends)

    def check(self, name: str, lengths: Sequence[int], encoded: Sequence[int]) -> int | None:
        """Refuse a state whose parts do not fit together, before a kernel reads past a buffer.

        Returns:
            ``None``: the keys put no limit on the number of tokens.
        """
        if any(not isinstance(x, mx.array) for x in (self._masks, self._payload, self._offsets)):
            raise ValueError(f"[{name}] saved state lacks one of its buffers.")
        rows = {"ends": len(self._ends), "firsts": len(self._firsts), "lengths": len(lengths)}
        check_shapes(name, self.config, dict(zip(BUFFERS, self._buffers(), strict=True)), rows)
        self._host_offsets = np.array(self._offsets)
        blocks = self.blocks()
        if blocks is None and any(encoded):
            raise ValueError(f"[{name}] saved state counts encoded blocks but has none.")
        if blocks is not None:
            check_runs(name, blocks, self._ends, encoded)
        check_near(name, self.config, lengths, encoded, self._firsts)
        check_lost(name, self.config, lengths, self._packed_blocks(), self._firsts, self._lost)
        return None


def _numbers(rows: mx.array) -> list[int]:
    return [int(row) for row in np.array(rows)]
