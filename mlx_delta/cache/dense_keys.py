"""Held keys in full: one buffer as long as the text, in which finished blocks are held in place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_delta.config import DeltaConfig
from mlx_delta.ops.hold import hold_blocks

from .buffers import equal_rows, grow, pad_to, write_tokens


@dataclass(frozen=True)
class KeyView:
    """Keys that an update leaves for attention.

    Attributes:
        held: [B, Hkv, capacity, D]; held keys in every block that is far from the last query.
        full: [B, Hkv, capacity, D]; full keys in every block that is near to the first query.
    """

    held: mx.array
    full: mx.array


class DenseKeys:
    """The keys of a layer, [B, Hkv, capacity, D]: held far away, full near.

    Args:
        config: The setting of this layer.
        rows: Rows that are told apart; 1 where all agree.
    """

    def __init__(self, config: DeltaConfig, rows: int):
        self.config = config
        self.keys: Any = None
        self.zeros: Any = None  # [B, Hkv, blocks], zero deltas of encoded blocks
        # Blocks of each row that are held. After a long rewind more than are encoded, since held
        # keys stand in for full ones: held a second time, they would drift.
        self._held = [0] * rows
        # Full keys of the last encoded block, [B, Hkv, block_size, D]: one block of slack, so
        # that rewinding by up to a block is exact.
        self._spare: Any = None
        self._spare_valid = [False] * rows

    @property
    def head_dim(self) -> int:
        """D."""
        return self.keys.shape[3]

    def check_new(self, keys: mx.array) -> None:
        """Every kind of key can be stored in full."""

    def append(
        self,
        keys: mx.array,
        starts: Sequence[int],
        targets: Sequence[int],
        capacity: int,
    ) -> KeyView:
        """Write keys [B, Hkv, L, D] from ``starts`` on, and encode blocks up to ``targets``.

        Args:
            keys: The new keys.
            starts: Each row's position of the first of them.
            targets: Blocks of each row that are to be encoded.
            capacity: Tokens to make room for.
        """
        self._reserve(keys, capacity)
        self.keys = write_tokens(self.keys, keys, starts)
        full = self.keys[...]  # a handle of its own: encoding replaces blocks in place
        self._encode(targets)
        return KeyView(self.keys, full)

    def _reserve(self, keys: mx.array, capacity: int) -> None:
        B, H, _, D = keys.shape
        blocks = -(-capacity // self.config.block_size)
        self.keys = grow(self.keys, (B, H, capacity, D), keys.dtype)
        self.zeros = grow(self.zeros, (B, H, blocks), mx.int32)
        self._spare = grow(self._spare, (B, H, self.config.block_size, D), keys.dtype)

    def _encode(self, targets: Sequence[int]) -> None:
        for (done, target), rows in equal_rows(self._held, targets).items():
            if target <= done:
                continue
            start, end = done * self.config.block_size, target * self.config.block_size
            keys = self.keys[rows, :, start:end]
            previous = None
            if not self.config.keyframes and start:
                previous = self.keys[rows, :, start - 1]
            held, zeros = hold_blocks(keys, self.config, done, previous)
            self._spare[rows] = keys[:, :, -self.config.block_size :]
            self.keys[rows, :, start:end] = held
            self.zeros[rows, :, done:target] = zeros
        for row, target in enumerate(targets):
            if target > self._held[row]:
                self._held[row], self._spare_valid[row] = target, True

    def rewind(
        self, encoded: Sequence[int], targets: Sequence[int], lengths: Sequence[int]
    ) -> None:
        """Give back full keys to blocks from ``targets`` on: those of the slack block.

        Args:
            encoded: Blocks of each row that are encoded so far.
            targets: Blocks of each row that are to stay so.
            lengths: Tokens of each row that are left.
        """
        size = self.config.block_size
        groups = equal_rows(encoded, targets, self._spare_valid)
        for (done, target, spare_valid), rows in groups.items():
            if target < done and spare_valid:
                self.keys[rows, :, (done - 1) * size : done * size] = self._spare[rows]
        for row, (done, target) in enumerate(zip(encoded, targets, strict=True)):
            if target < done:
                self._held[row] -= self._spare_valid[row]
                self._spare_valid[row] = False
            self._held[row] = min(self._held[row], max(0, lengths[row]) // size)

    def fetch(self, length: int, encoded: Sequence[int]) -> mx.array:
        """Keys of the first tokens, [B, Hkv, length, D]: held far away, full near."""
        return self.keys[..., :length, :]

    # Rows.

    def take(self, rows: list[int]) -> None:
        """Keep these rows only, in this order."""
        index = mx.array(rows, mx.int32)
        self.keys, self.zeros, self._spare = (
            None if x is None else x[index] for x in (self.keys, self.zeros, self._spare)
        )
        self._held = [self._held[row] for row in rows]
        self._spare_valid = [self._spare_valid[row] for row in rows]

    def row(self, index: int, length: int) -> DenseKeys:
        """One row as a store of its own."""
        store = DenseKeys(self.config, 1)
        store._held, store._spare_valid = [self._held[index]], [self._spare_valid[index]]
        if self.keys is not None:
            blocks = -(-length // self.config.block_size)
            store.keys = mx.contiguous(self.keys[index : index + 1, :, :length])
            store.zeros = mx.contiguous(self.zeros[index : index + 1, :, :blocks])
            store._spare = mx.contiguous(self._spare[index : index + 1])
        return store

    @classmethod
    def join(cls, stores: Sequence[DenseKeys], counts: Sequence[int]) -> DenseKeys:
        """The rows of all stores, padded at the end to one length; ``counts`` rows of each."""
        joined = cls(stores[0].config, 0)
        joined._held = [held for store in stores for held in store._held]
        joined._spare_valid = [valid for store in stores for valid in store._spare_valid]
        filled = [store for store in stores if store.keys is not None]
        if filled:
            for name in ("keys", "zeros", "_spare"):
                largest = max((getattr(s, name) for s in filled), key=lambda x: x.shape[2])
                parts = []
                for store, count in zip(stores, counts, strict=True):
                    buffer = getattr(store, name)
                    if buffer is None:
                        buffer = mx.zeros((count, *largest.shape[1:]), largest.dtype)
                    parts.append(pad_to(buffer, largest.shape[2]))
                setattr(joined, name, mx.concatenate(parts))
        return joined

    # State.

    n_arrays = 3

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(x.nbytes for x in (self.keys, self.zeros, self._spare) if x is not None)

    def arrays(self) -> list[Any]:
        """The buffers, ``None`` for each before the first write."""
        return [self.keys, self.zeros, self._spare]

    def header(self) -> dict[str, Any]:
        """What belongs to the state besides the buffers, as JSON values."""
        return {"held": self._held, "spare_valid": self._spare_valid}

    def restore(self, header: dict[str, Any], arrays: list[Any]) -> None:
        """Take over a state."""
        self._held = [int(held) for held in header.get("held", header["encoded"])]
        self._spare_valid = header["spare_valid"]
        self.keys, self.zeros, self._spare = arrays

    def check(self, name: str, lengths: Sequence[int], encoded: Sequence[int]) -> int:
        """Refuse a state whose parts do not fit together; returns its capacity in tokens."""
        B, H, capacity, head_dim = self.keys.shape
        size = self.config.block_size
        expected = {
            "zeros": (self.zeros.shape, (B, H, -(-capacity // size))),
            "spare": (self._spare.shape, (B, H, size, head_dim)),
        }
        for what, (shape, wanted) in expected.items():
            if tuple(shape) != wanted:
                raise ValueError(f"[{name}] saved {what} have shape {shape}, expected {wanted}.")
        if len(self._held) != len(lengths):
            raise ValueError(f"[{name}] saved state counts held blocks for other rows than tokens.")
        for length, done, held in zip(lengths, encoded, self._held, strict=True):
            if not done <= held <= max(done, length // size):
                raise ValueError(
                    f"[{name}] saved state counts {done} encoded blocks and {held} held ones of "
                    f"{length} tokens."
                )
        return capacity
