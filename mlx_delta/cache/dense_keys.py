"""Held keys in full: one buffer as long as the text, in which finished blocks are held in place."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from mlx_delta.config import DeltaConfig
from mlx_delta.ops.blocks import hold
from mlx_delta.ops.hold import hold_text

from .buffers import equal_rows, grow, pad_to, take_out, write_tokens
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
        sizes: Tokens in a block of each row; ``None``: as the setting says.
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
        sizes: list[int] | None = None,
    ):
        self.config = config
        self.keys = keys
        self.zeros = zeros
        self.spare = spare
        self.held = held
        self.spare_valid = spare_valid
        self.sizes = sizes or [config.block_size] * keys.shape[0]

    @classmethod
    def make(
        cls,
        config: DeltaConfig,
        keys: mx.array,
        rows: int | None = None,
        sizes: list[int] | None = None,
    ) -> DenseKeys:
        """An empty store for keys of this shape and type."""
        B, H, _, D = keys.shape
        B = B if rows is None else rows
        size = max(sizes or [config.block_size])
        return cls(
            config,
            mx.zeros((B, H, 0, D), keys.dtype),
            mx.zeros((B, H, 0), mx.int32),
            mx.zeros((B, H, size, D), keys.dtype),
            [0] * B,
            [False] * B,
            sizes,
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
        rows = zip(self.held, self.spare_valid, self.sizes, strict=True)
        return [(n - valid) * size for n, valid, size in rows]

    def append(
        self,
        keys: mx.array,
        starts: Sequence[int],
        targets: Sequence[int],
        capacity: int,
    ) -> KeyParts:
        """Write new keys, and encode blocks up to ``targets``; see ``KeyStore``."""
        B, H, _, D = keys.shape
        blocks = -(-capacity // min(self.sizes))
        self.keys = grow(self.keys, (B, H, capacity, D), keys.dtype)
        self.zeros = grow(self.zeros, (B, H, blocks), mx.int32)
        self.keys = write_tokens(self.keys, keys, starts)
        full = self.keys[...]  # a handle of its own: encoding replaces blocks in place
        self._encode(targets)
        return self.keys, full, [0] * B

    def _encode(self, targets: Sequence[int]) -> None:
        if self.config.keyframes:
            for (done, target, size), rows in equal_rows(self.held, targets, self.sizes).items():
                if target > done:
                    keys = self.keys[rows, :, done * size : target * size]
                    self._put(rows, done, size, keys, *hold(keys, self.config, done))
        elif any(target > done for done, target in zip(self.held, targets, strict=True)):
            self._encode_chains(targets)
        for row, target in enumerate(targets):
            if target > self.held[row]:
                self.held[row], self.spare_valid[row] = target, True

    def drop(self, first: int, blocks: Sequence[int]) -> None:
        """Take so many blocks of each row out, behind the first ones; see ``KeyStore``."""
        size = self.config.block_size
        self.keys = take_out(self.keys, first * size, [n * size for n in blocks])
        self.zeros = take_out(self.zeros, first, blocks)
        self.held = [held - n for held, n in zip(self.held, blocks, strict=True)]

    def _encode_chains(self, targets: Sequence[int]) -> None:
        """Without keyframes: go on with all rows at once, wherever each of them is."""
        starts = [n * size for n, size in zip(self.held, self.sizes, strict=True)]
        ends = [n * size for n, size in zip(targets, self.sizes, strict=True)]
        length = max(end - start for start, end in zip(starts, ends, strict=True))
        if self.config.threshold_mode != "absolute":  # thresholds of whole blocks; all of one size
            length = -(-length // self.config.block_size) * self.config.block_size
        at = mx.array(starts)[:, None]
        last = self.keys.shape[2] - 1  # what lies beyond a row's own end is read, and not used
        chosen = mx.minimum(at + mx.arange(length), last)[:, None, :, None]
        keys = mx.take_along_axis(self.keys, chosen, axis=2)
        previous = None
        if any(starts):
            before = mx.maximum(at - 1, 0)[:, None, :, None]
            previous = mx.take_along_axis(self.keys, before, axis=2)[:, :, 0]
        held, zeros = hold_text(keys, self.config, starts, previous)
        for (done, target, size), rows in equal_rows(self.held, targets, self.sizes).items():
            if target > done:
                tokens = (target - done) * size
                of_blocks = zeros[rows, :, :tokens].reshape(-1, zeros.shape[1], target - done, size)
                full = keys[rows, :, :tokens]
                counts = of_blocks.sum(axis=-1).astype(mx.int32)
                self._put(rows, done, size, full, held[rows, :, :tokens], counts)

    def _put(
        self, rows: Any, done: int, size: int, full: mx.array, held: mx.array, zeros: mx.array
    ) -> None:
        """Put held blocks into their place, and keep the last one's full keys."""
        start, end = done * size, done * size + held.shape[2]
        self.spare[rows, :, :size] = full[:, :, -size:]
        self.keys[rows, :, start:end] = held
        self.zeros[rows, :, done : done + zeros.shape[2]] = zeros

    def rewind(self, encoded: Sequence[int], targets: Sequence[int]) -> None:
        """Forget that blocks from ``targets`` on are encoded; see ``KeyStore``."""
        counts = (self.held, targets, self.spare_valid, self.sizes)
        for (held, target, valid, size), rows in equal_rows(*counts).items():
            if target == held - 1 and valid:
                self.keys[rows, :, target * size : held * size] = self.spare[rows, :, :size]
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

    def blank(self, rows: int, sizes: list[int] | None = None) -> DenseKeys:
        """A store of this shape and type for so many rows without tokens."""
        return DenseKeys.make(self.config, self.keys, rows, sizes)

    def take(self, rows: list[int]) -> None:
        """Keep these rows only, in this order."""
        index = mx.array(rows, mx.int32)
        self.keys, self.zeros, self.spare = (x[index] for x in (self.keys, self.zeros, self.spare))
        self.held = [self.held[row] for row in rows]
        self.spare_valid = [self.spare_valid[row] for row in rows]
        self.sizes = [self.sizes[row] for row in rows]
        if rows:
            self.zeros = self.zeros[:, :, : -(-self.keys.shape[2] // min(self.sizes))]
            self.spare = self.spare[:, :, : max(self.sizes)]

    def row(self, index: int, length: int) -> DenseKeys:
        """One row as a store of its own."""
        one, size = slice(index, index + 1), self.sizes[index]
        return DenseKeys(
            dataclasses.replace(self.config, block_size=size),
            mx.contiguous(self.keys[one, :, :length]),
            mx.contiguous(self.zeros[one, :, : -(-length // size)]),
            mx.contiguous(self.spare[one, :, :size]),
            self.held[one],
            self.spare_valid[one],
        )

    @classmethod
    def join(cls, stores: Sequence[DenseKeys]) -> DenseKeys:
        """The rows of all stores, padded at the end to one length."""
        capacity = max(store.keys.shape[2] for store in stores)
        sizes = [size for store in stores for size in store.sizes]
        blocks = -(-capacity // min(sizes))
        return cls(
            stores[0].config,
            mx.concatenate([pad_to(store.keys, capacity) for store in stores]),
            mx.concatenate([pad_to(store.zeros, blocks) for store in stores]),
            mx.concatenate([pad_to(store.spare, max(sizes)) for store in stores]),
            [held for store in stores for held in store.held],
            [valid for store in stores for valid in store.spare_valid],
            sizes,
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
        header: dict[str, Any] = {"held": self.held, "spare_valid": self.spare_valid}
        if set(self.sizes) != {self.config.block_size}:
            header["sizes"] = self.sizes
        return header

    @classmethod
    def restore(cls, config: DeltaConfig, header: dict[str, Any], arrays: list[Any]) -> DenseKeys:
        """The store of a state."""
        keys, zeros, spare = arrays
        held = spread(header.get("held", header["encoded"]), keys.shape[0])
        valid = header["spare_valid"]
        if any(type(x) is not bool for x in valid):
            raise ValueError(f"it has spare_valid {str(valid)[:40]}")
        valid = valid * keys.shape[0] if len(valid) == 1 else valid
        sizes = header.get("sizes")
        if sizes is not None:
            sizes = spread(sizes, keys.shape[0])
            if min(sizes) < 1 or len(sizes) != keys.shape[0] or config.keyframes:
                raise ValueError(f"it has block sizes {str(sizes)[:40]}")
        return cls(config, keys, zeros, spare, held, valid, sizes)

    def check(self, name: str, lengths: Sequence[int], encoded: Sequence[int]) -> int:
        """Refuse a state whose parts do not fit together; returns its capacity in tokens."""
        B, H, capacity, head_dim = self.keys.shape
        expected = {
            "zeros": (self.zeros.shape, (B, H, -(-capacity // min(self.sizes)))),
            "spare": (self.spare.shape, (B, H, max(self.sizes), head_dim)),
        }
        for what, (shape, wanted) in expected.items():
            if tuple(shape) != wanted:
                raise ValueError(f"[{name}] saved {what} have shape {shape}, expected {wanted}.")
        if not len(self.held) == len(self.spare_valid) == len(lengths):
            raise ValueError(f"[{name}] saved state counts held blocks for other rows than tokens.")
        rows = zip(lengths, encoded, self.held, self.sizes, strict=True)
        for length, done, held, size in rows:
            if not done <= held <= max(done, length // size):
                raise ValueError(
                    f"[{name}] saved state counts {done} encoded blocks and {held} held ones of "
                    f"{length} tokens."
                )
        return capacity
