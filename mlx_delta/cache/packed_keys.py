"""Held keys, stored packed: a log of packed blocks far away, a short buffer of full keys near.

The layout of a block is specified in :mod:`mlx_delta.method.storage`. Near keys are those of
the query's own block, of its window, and of one block of slack, so that rewinding by up to a
block is exact; they and everything else are in 16 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import mlx.core as mx

from mlx_delta.config import DeltaConfig
from mlx_delta.ops.blocks import unpack
from mlx_delta.ops.join import join_near
from mlx_delta.ops.pack import HEAD_DIMS, storage_type, to_storage

from .buffers import equal_rows, pad_to, write_first
from .near_keys import NearKeys
from .packed_log import PackedLog
from .packed_state import BUFFERS, check_lost, check_near, check_runs, check_shapes
from .store import KeyParts, float_size, spread, token_bytes

DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}


class PackedKeys:
    """The keys of a layer: packed blocks far away, full keys near. A ``KeyStore``.

    Args:
        config: The setting of this layer, with ``key_bits``.
        near: The last keys.
        log: The packed blocks, a ``PackedLog``.
        sinks: [B, Hkv, n_sinks, D], exact keys of the first tokens; ``None`` at 16 bits, or
            without sinks.
        lost: Blocks of each row whose full keys are gone. In files of version 0.1.0 these may be
            more than are encoded: held keys stand in for full ones near the query, and stay packed
            as they are, since held a second time they would drift.
        type_name: The model's type; a name, since ``mx.Dtype`` can't be copied.
    """

    n_arrays = 7

    def __init__(
        self,
        config: DeltaConfig,
        near: NearKeys,
        log: Any,
        sinks: mx.array | None,
        lost: list[int],
        type_name: str,
    ):
        self.config = config
        self.near = near
        self.log = log
        self.sinks = sinks
        self.lost = lost
        self._type = type_name

    @classmethod
    def make(cls, config: DeltaConfig, keys: mx.array) -> Self:
        """An empty store for keys of this shape and type."""
        assert config.key_bits is not None
        B, H, _, D = keys.shape
        dtype = storage_type(keys.dtype)
        sinks = None
        if config.key_bits < 16 and config.sinks:
            sinks = mx.zeros((B, H, config.sinks, D), dtype)
        return cls(
            config,
            NearKeys.make(config, keys, dtype),
            cls.make_log(config, (B, H, D), dtype),
            sinks,
            [0] * B,
            str(keys.dtype).removeprefix("mlx.core."),
        )

    @staticmethod
    def make_log(config: DeltaConfig, shape: tuple[int, int, int], dtype: mx.Dtype) -> Any:
        """An empty log for [B, Hkv, D] keys."""
        return PackedLog.make(shape, config.block_size, _whole_bits(config), dtype)

    @staticmethod
    def check_new(config: DeltaConfig, keys: mx.array) -> None:
        """Refuse keys that can't be packed.

        Raises:
            ValueError: Their type or head_dim has no kernel.
        """
        storage_type(keys.dtype)
        if keys.shape[3] not in HEAD_DIMS:
            raise ValueError(
                f"[DeltaKVCache] key_bits={config.key_bits} needs a head_dim that is a multiple of "
                f"16, up to {HEAD_DIMS[-1]}, but got {keys.shape[3]}."
            )

    @property
    def head_dim(self) -> int:
        """D."""
        return self.log.head_dim

    @property
    def zeros(self) -> mx.array:
        """Zero deltas of each encoded block, int32 [B, Hkv, blocks]."""
        return self.log.zeros

    @property
    def full_from(self) -> list[int]:
        """Position in each row from which on all keys are at hand in full."""
        size = self.config.block_size
        pairs = zip(self.near.firsts, self.lost, strict=True)
        return [max(first, lost * size) for first, lost in pairs]

    def append(
        self,
        keys: mx.array,
        starts: Sequence[int],
        targets: Sequence[int],
        capacity: int,
    ) -> KeyParts:
        """Write new keys, and encode blocks up to ``targets``; see ``KeyStore``."""
        new = to_storage(keys)
        near, firsts = self.near.written(new, starts), self.near.firsts
        if self.sinks is not None:
            self.sinks = write_first(self.sinks, new, starts)
        self._encode(near, targets)
        size = self.config.block_size
        self.near.keep(near, [max(0, target - 1) * size for target in targets])
        pairs = zip(self.lost, self.near.firsts, strict=True)
        self.lost = [max(lost, first // size) for lost, first in pairs]
        return self.log.read(self.sinks, near.dtype), near, firsts

    def _encode(self, near: mx.array, targets: Sequence[int]) -> None:
        size, packed = self.config.block_size, self.log.blocks
        if all(target <= done for done, target in zip(packed, targets, strict=True)):
            return
        for (first, done, target), rows in equal_rows(self.near.firsts, packed, targets).items():
            if target > done:
                keys = near[rows, :, done * size - first : target * size - first]
                self.log.encode(rows, keys, self.config, done)

    def drop(self, first: int, blocks: Sequence[int]) -> None:
        """Take so many blocks of each row out, behind the first ones; see ``KeyStore``."""
        size = self.config.block_size
        self.log.drop(first, blocks)
        self.near.firsts = [
            n - gone * size for n, gone in zip(self.near.firsts, blocks, strict=True)
        ]
        self.lost = [lost - gone for lost, gone in zip(self.lost, blocks, strict=True)]

    def rewind(self, encoded: Sequence[int], targets: Sequence[int]) -> None:
        """Forget that blocks from ``targets`` on are encoded; see ``KeyStore``."""
        self.near.rewind([target * self.config.block_size for target in targets])
        for row, target in enumerate(targets):
            if target < encoded[row]:
                self.lost[row] = min(self.lost[row], target)
                self.log.forget(row, target)

    def full_keys(self, first: int, length: int) -> mx.array:
        """Full keys of a single text from its first block that is not packed; see ``KeyStore``."""
        start = self.near.firsts[0]
        return mx.contiguous(self.near.keys[:, :, first - start : length - start])

    def refill(self, held: int, near: mx.array) -> None:
        """Have so many packed blocks, and these full keys after them; see ``KeyStore``."""
        first = held * self.config.block_size
        self.log.forget(0, held)
        self.near = NearKeys(pad_to(near, self.near.room), [first])
        self.lost = [held]

    def fetch(self, length: int, encoded: Sequence[int]) -> mx.array:
        """Keys of the first tokens, [B, Hkv, length, D]: held far away, full near."""
        blocks = self.log.read(self.sinks, self.near.keys.dtype)
        far = None if blocks is None or not max(encoded) else unpack(blocks, max(encoded))
        boundaries = [done * self.config.block_size for done in encoded]
        keys = join_near(far, self.near.keys, boundaries, self.near.firsts, length)
        return keys.astype(DTYPES[self._type])

    def read_bytes(self, tokens: int, far: int, float_bytes: int | None = None) -> int:
        """Bytes that a query reads: packed blocks, sinks, and the near keys."""
        near = tokens - far * self.config.block_size
        size = near * token_bytes(self.near.keys, float_bytes)
        if not far:
            return size
        if self.sinks is not None:
            size += self.sinks[0].size * float_size(self.sinks, float_bytes)
        return size + self.log.read_bytes(far, float_bytes)

    # Rows.

    def blank(self, rows: int, sizes: list[int] | None = None) -> Self:
        """A store of this shape and type for so many rows without tokens."""
        _, H, _, D = self.near.keys.shape
        return self.make(self.config, mx.zeros((rows, H, 0, D), DTYPES[self._type]))

    def take(self, rows: list[int]) -> None:
        """Keep these rows only, in this order."""
        self.near.take(rows)
        self.log.take(rows)
        self.lost = [self.lost[row] for row in rows]
        if self.sinks is not None:
            self.sinks = self.sinks[mx.array(rows, mx.int32)]

    def row(self, index: int, length: int) -> Self:
        """One row as a store of its own."""
        one = slice(index, index + 1)
        sinks = None if self.sinks is None else mx.contiguous(self.sinks[one])
        near, log = self.near.row(index), self.log.row(index)
        return type(self)(self.config, near, log, sinks, self.lost[one], self._type)

    @classmethod
    def join(cls, stores: Sequence[Self]) -> Self:
        """The rows of all stores, padded to one size."""
        sinks = [store.sinks for store in stores if store.sinks is not None]
        return cls(
            stores[0].config,
            NearKeys.join([store.near for store in stores]),
            type(stores[0].log).join([store.log for store in stores]),
            mx.concatenate(sinks) if sinks else None,
            [lost for store in stores for lost in store.lost],
            stores[0]._type,
        )

    # State.

    @property
    def nbytes(self) -> int:
        """Bytes allocated, room to grow included."""
        return sum(x.nbytes for x in self.arrays() if x is not None)

    def arrays(self) -> list[Any]:
        """The buffers, those of the log moved together."""
        self.log.settle()
        masks, payload, offsets, grid, zeros = self.log.buffers()
        return [self.near.keys, masks, payload, offsets, grid, self.sinks, zeros]

    def header(self) -> dict[str, Any]:
        """What belongs to the state besides the buffers, as JSON values."""
        counts = {"firsts": self.near.firsts, "lost": self.lost, "ends": self.log.ends}
        return {**counts, "type": self._type}

    @classmethod
    def restore(cls, config: DeltaConfig, header: dict[str, Any], arrays: list[Any]) -> Self:
        """The store of a state, each buffer of which is as it should be."""
        assert config.key_bits is not None
        near, sinks = arrays[0], arrays[5]
        if header["type"] not in DTYPES:
            raise ValueError(f"it is of type {header['type']!r}")
        firsts = spread(header["firsts"], near.shape[0])
        size = config.block_size
        lost = spread(header.get("lost", [first // size for first in firsts]), near.shape[0])
        rows = {"ends": len(header["ends"]), "firsts": len(firsts), "near": near.shape[0]}
        check_shapes(config, dict(zip(BUFFERS, arrays, strict=True)), rows)
        bits, ends = _whole_bits(config), [list(map(int, row)) for row in header["ends"]]
        log = PackedLog.restore(bits, near.shape[3], dict(zip(BUFFERS, arrays, strict=True)), ends)
        return cls(config, NearKeys(near, firsts), log, sinks, lost, header["type"])

    def check(self, name: str, lengths: Sequence[int], encoded: Sequence[int]) -> None:
        """Refuse a state whose parts do not fit together, before a kernel reads past a buffer."""
        blocks = self.log.read(self.sinks, self.near.keys.dtype)
        if blocks is None and any(encoded):
            raise ValueError(f"[{name}] saved state counts encoded blocks but has none.")
        if blocks is not None:
            check_runs(name, blocks, self.log.ends, encoded)
        firsts = self.near.firsts
        check_near(name, self.config, lengths, encoded, firsts)
        check_lost(name, self.config, lengths, self.log.blocks, firsts, self.lost)


def _whole_bits(config: DeltaConfig) -> int:
    """The width of packed values, which is no mean."""
    assert config.key_bits is not None
    return int(config.key_bits)
