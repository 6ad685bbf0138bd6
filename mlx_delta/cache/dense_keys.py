"""Held keys in full: one buffer as long as the text, in which finished blocks are held in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from mlx_delta.config import DeltaConfig
from mlx_delta.ops.blocks import hold

from .buffers import equal_rows, grow, pad_to, write_tokens
from .store import KeyParts, spread, token_bytes


class DenseKeys:
    """The keys of a layer, [B, Hkv, capacity, D]: held far away, full near. A ``KeyStore``.

    Args:
        config: The setting of this layer.
        keys: [B, Hkv, capacity, D]; becomes the store's buffer.
        zeros: int32 [B, Hkv, blocks], zero deltas of encoded blocks.
        spare: [B, Hkv, block_size, D]; full keys of the last encoded block: one block of slack, so
            that rewinding by up to a block is exact.
        held: Blocks of each row that are held.
        spare_valid: Whether each row's spare is its last held block.
    """

    n_arrays = 3

    def __init__(
        self,
        config: DeltaConfig,
        keys: mx.array,
        zeros: mx.array,
        spare: mx.array,
        held: list[int],
        spare_valid: list[bool],
    ):
        self.config = config
        self.keys = keys
        self.zeros = zeros
        self.spare = spare
        self.held = held
        self.spare_valid = spare_valid

    @classmethod
    def make(cls, config: DeltaConfig, keys: mx.array, rows: int | None = None) -> DenseKeys:
        """An empty store for keys of this shape and type."""
        B, H, _, D = keys.shape
        B = B if rows is None else rows
        return cls(
            config,
            mx.zeros((B, H, 0, D), keys.dtype),
            mx.zeros((B, H, 0), mx.int32),
            mx.zeros((B, H, config.block_size, D), keys.dtype),
            [0] * B,
            [False] * B,
        )

    def with_setting(self, config: DeltaConfig) -> DenseKeys:
        """The same keys, none of which are held yet, under another setting."""
        store = DenseKeys.make(config, self.keys)
        store.keys = self.keys
        return store

    @staticmethod
    def check_new(config: DeltaConfig, keys: mx.array) -> None:
        """Every kind of key can be stored in full."""

    @property
    def head_dim(self) -> int:
        """D."""
        return self.keys.shape[3]

    @property
    def full_from(self) -> list[int]:
        """Position in each row from which on all keys are at hand in full."""
        blocks = [n - valid for n, valid in zip(self.held, self.spare_valid, strict=True)]
        return [n * self.config.block_size for n in blocks]

    def append(
        self,
        keys: mx.array,
        starts: Sequence[int],
        targets: Sequence[int],
        capacity: int,
    ) -> KeyParts:
        """Write new keys, and encode blocks up to ``targets``; see ``KeyStore``."""
        B, H, _, D = keys.shape
        blocks = -(-capacity // self.config.block_size)
        self.keys = grow(self.keys, (B, H, capacity, D), keys.dtype)
        self.zeros = grow(self.zeros, (B, H, blocks), mx.int32)
        self.keys = write_tokens(self.keys, keys, starts)
        full = self.keys[...]  # a handle of its own: encoding replaces blocks in place
        self._encode(targets)
        return self.keys, full, [0] * B

    def _encode(self, targets: Sequence[int]) -> None:
        for (done, target), rows in equal_rows(self.held, targets).items():
            if target <= done:
                continue
            start, end = done * self.config.block_size, target * self.config.block_size
            keys = self.keys[rows, :, start:end]
            previous = None
            if not self.config.keyframes and start:
                previous = self.keys[rows, :, start - 1]
            held, zeros = hold(keys, self.config, done, previous)
            self.spare[rows] = keys[:, :, -self.config.block_size :]
            self.keys[rows, :, start:end] = held
            self.zeros[rows, :, done:target] = zeros
        for row, target in enumerate(targets):
            if target > self.held[row]:
                self.held[row], self.spare_valid[row] = target, True

    def rewind(self, encoded: Sequence[int], targets: Sequence[int]) -> None:
        """Forget that blocks from ``targets`` on are encoded; see ``KeyStore``."""
        size = self.config.block_size
        for (held, target, valid), rows in equal_rows(self.held, targets, self.spare_valid).items():
            if target == held - 1 and valid:
                self.keys[rows, :, target * size : held * size] = self.spare[rows]
        for row, target in enumerate(targets):
            if target < self.held[row]:
                # Before the blocks that are full again, no other is: the spare is used up.
                self.held[row], self.spare_valid[row] = target, False

    def full_keys(self, first: int, length: int) -> mx.array:
        """Full keys of a single text from its first block that is not held; see ``KeyStore``."""
        return mx.contiguous(self.keys[:, :, first:length])

    def refill(self, held: int, near: mx.array) -> None:
        """Hold so many blocks, and have these full keys after them; see ``KeyStore``."""
        first = held * self.config.block_size
        if near.shape[2]:
            self.keys[:, :, first : first + near.shape[2]] = near
        self.held, self.spare_valid = [held], [False]

    def fetch(self, length: int, encoded: Sequence[int]) -> mx.array:
        """Keys of the first tokens, [B, Hkv, length, D]: held far away, full near."""
        return self.keys[..., :length, :]

    def read_bytes(self, tokens: int, far: int, float_bytes: int | None = None) -> int:
        """Bytes that a query reads: all that it sees, held or not."""
        return token_bytes(self.keys, float_bytes) * tokens

    # Rows.

    def blank(self, rows: int) -> DenseKeys:
        """A store of this shape and type for so many rows without tokens."""
        return DenseKeys.make(self.config, self.keys, rows)

    def take(self, rows: list[int]) -> None:
        """Keep these rows only, in this order."""
        index = mx.array(rows, mx.int32)
        self.keys, self.zeros, self.spare = (x[index] for x in (self.keys, self.zeros, self.spare))
        self.held = [self.held[row] for row in rows]
        self.spare_valid = [self.spare_valid[row] for row in rows]

    def row(self, index: int, length: int) -> DenseKeys:
        """One row as a store of its own."""
        one = slice(index, index + 1)
        blocks = -(-length // self.config.block_size)
        return DenseKeys(
            self.config,
            mx.contiguous(self.keys[one, :, :length]),
            mx.contiguous(self.zeros[one, :, :blocks]),
            mx.contiguous(self.spare[one]),
            self.held[one],
            self.spare_valid[one],
        )

    @classmethod
    def join(cls, stores: Sequence[DenseKeys]) -> DenseKeys:
        """The rows of all stores, padded at the end to one length."""
        capacity = max(store.keys.shape[2] for store in stores)
        blocks = max(store.zeros.shape[2] for store in stores)
        return cls(
            stores[0].config,
            mx.concatenate([pad_to(store.keys, capacity) for store in stores]),
            mx.concatenate([pad_to(store.zeros, blocks) for store in stores]),
            mx.concatenate([store.spare for store in stores]),
            [held for store in stores for held in store.held],
            [valid for store in stores for valid in store.spare_valid],
        )

    # State.

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return self.keys.nbytes + self.zeros.nbytes + self.spare.nbytes

    def arrays(self) -> list[Any]:
        """The buffers."""
        return [self.keys, self.zeros, self.spare]

    def header(self) -> dict[str, Any]:
        """What belongs to the state besides the buffers, as JSON values."""
        return {"held": self.held, "spare_valid": self.spare_valid}

    @classmethod
    def restore(cls, config: DeltaConfig, header: dict[str, Any], arrays: list[Any]) -> DenseKeys:
        """The store of a state."""
        keys, zeros, spare = arrays
        held = spread(header.get("held", header["encoded"]), keys.shape[0])
        valid = header["spare_valid"]
        if any(type(x) is not bool for x in valid):
            raise ValueError(f"it has spare_valid {str(valid)[:40]}")
        valid = valid * keys.shape[0] if len(valid) == 1 else valid
        return cls(config, keys, zeros, spare, held, valid)

    def check(self, name: str, lengths: Sequence[int], encoded: Sequence[int]) -> int:
        """Refuse a state whose parts do not fit together; returns its capacity in tokens."""
        B, H, capacity, head_dim = self.keys.shape
        size = self.config.block_size
        expected = {
            "zeros": (self.zeros.shape, (B, H, -(-capacity // size))),
            "spare": (self.spare.shape, (B, H, size, head_dim)),
        }
        for what, (shape, wanted) in expected.items():
            if tuple(shape) != wanted:
                raise ValueError(f"[{name}] saved {what} have shape {shape}, expected {wanted}.")
        if not len(self.held) == len(self.spare_valid) == len(lengths):
            raise ValueError(f"[{name}] saved state counts held blocks for other rows than tokens.")
        for length, done, held in zip(lengths, encoded, self.held, strict=True):
            if not done <= held <= max(done, length // size):
                raise ValueError(
                    f"[{name}] saved state counts {done} encoded blocks and {held} held ones of "
                    f"{length} tokens."
                )
        return capacity
