"""Keys that are stored in few bits far away, and full near: what all forms of them share.

Far keys are blocks in a log, of a form of its own: codes (``coded_keys``), or held keys
(``delta_keys``). Near keys are those of the query's own block, of its window, and of one block of
slack, so that rewinding by up to a block is exact; they and everything else are in 16 bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import mlx.core as mx

from mlx_delta.config import DeltaConfig
from mlx_delta.ops.blocks import unpack
from mlx_delta.ops.join import join_near
from mlx_delta.ops.storage import HEAD_DIMS, LARGEST, storage_type, to_storage

from .buffers import equal_rows, pad_to, write_first
from .near_keys import NearKeys
from .store import KeyParts, float_size, spread, token_bytes

DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}


class FarKeys:
    """The keys of a layer: stored blocks far away, full keys near. A ``KeyStore``, of a subclass.

    Args:
        config: The setting of this layer, with ``key_bits``.
        near: The last keys.
        log: The far blocks.
        sinks: [B, Hkv, n_sinks, D], exact keys of the first tokens; ``None`` without sinks.
        lost: Blocks of each row whose full keys are gone.
        type_name: The model's type; a name, since ``mx.Dtype`` can't be copied.
    """

    n_arrays: int

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
        B, H, _, D = keys.shape
        dtype = storage_type(keys.dtype)
        sinks = None
        if config.sinks:
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
        raise NotImplementedError

    @staticmethod
    def check_new(config: DeltaConfig, keys: mx.array) -> None:
        """Refuse keys that can't be stored.

        Raises:
            ValueError: Their type or head_dim has no kernel, or the widths are of other keys.
        """
        storage_type(keys.dtype)
        if keys.shape[3] not in HEAD_DIMS:
            raise ValueError(
                f"[DeltaKVCache] key_bits={config.key_bits} needs a head_dim that is a multiple of "
                f"16, up to {HEAD_DIMS[-1]}, but got {keys.shape[3]}."
            )
        check_widths(config, keys.shape[1], keys.shape[3])

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
        size, stored = self.config.block_size, self.log.blocks
        if all(target <= done for done, target in zip(stored, targets, strict=True)):
            return
        for (first, done, target), rows in equal_rows(self.near.firsts, stored, targets).items():
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
        """Full keys of a single text from its first block that is not stored; see ``KeyStore``."""
        start = self.near.firsts[0]
        return mx.contiguous(self.near.keys[:, :, first - start : length - start])

    def refill(self, held: int, near: mx.array) -> None:
        """Have so many far blocks, and these full keys after them; see ``KeyStore``."""
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
        """Bytes that a query reads: far blocks, sinks, and the near keys."""
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
        """The buffers, as ``restore`` of a subclass takes them."""
        raise NotImplementedError

    def header(self) -> dict[str, Any]:
        """What belongs to the state besides the buffers, as JSON values."""
        return {"firsts": self.near.firsts, "lost": self.lost, "type": self._type}

    def check(self, name: str, lengths: Sequence[int], encoded: Sequence[int]) -> None:
        """Refuse counts of a state that do not fit together.

        Near keys begin at a block's border, and reach from the stored blocks to the last token.
        Blocks without full keys are complete, stored, and all those before the near keys.
        """
        size, stored = self.config.block_size, self.log.blocks
        for length, done, own, first, gone in zip(
            lengths, encoded, stored, self.near.firsts, self.lost, strict=True
        ):
            if not 0 <= done <= own:
                raise ValueError(
                    f"[{name}] saved state counts {done} encoded blocks and {own} stored ones."
                )
            if first % size or not 0 <= first <= done * size or length - first > self.near.room:
                raise ValueError(
                    f"[{name}] saved state has near keys from position {first} on for {length} "
                    f"tokens and {done} encoded blocks."
                )
            if not first // size <= gone <= own or gone * size > max(0, length):
                raise ValueError(
                    f"[{name}] saved state counts {gone} blocks without full keys for near keys "
                    f"from position {first} on and {own} stored blocks."
                )


def check_widths(config: DeltaConfig, n_heads: int, head_dim: int) -> None:
    """Refuse widths that are of keys of another shape."""
    widths = None if config.key_widths is None else config.key_widths[0]
    if widths is None:
        return
    if len(config.key_widths or ()) != 1:
        raise ValueError("[DeltaConfig] key_widths of all layers: call for_layer first.")
    if (len(widths), len(widths[0])) != (n_heads, head_dim):
        raise ValueError(
            f"[DeltaConfig] key_widths are of {len(widths)} kv heads of {len(widths[0])} channels "
            f"but the layer has {n_heads} of {head_dim}."
        )


def check_buffers(
    config: DeltaConfig, near: Any, sinks: Any, type_name: Any, buffers: Mapping[str, Any]
) -> None:
    """Refuse near keys and sinks of a state that do not fit the setting or each other.

    Args:
        config: The setting that came with them.
        near: [B, Hkv, room, D].
        sinks: [B, Hkv, n_sinks, D], or ``None``.
        type_name: The model's type.
        buffers: By name, all that must be there besides, and how many dimensions each has.
    """
    if type_name not in DTYPES:
        raise ValueError(f"it is of type {type_name!r}")
    if any(not isinstance(x, mx.array) for x in (near, *(x for x, _ in buffers.values()))):
        raise ValueError("it lacks one of its buffers")
    odd = [name for name, (x, dimensions) in buffers.items() if x.ndim != dimensions]
    if near.ndim != 4 or odd:
        what = odd[0] if near.ndim == 4 else "near keys"
        raise ValueError(f"saved {what} do not have the right dimensions")
    B, H, _, D = near.shape
    check_widths(config, H, D)
    room = (config.window_blocks + 2) * config.block_size
    fits = near.shape[2] == room and near.dtype in LARGEST and D in HEAD_DIMS
    if not fits or near.dtype != storage_type(DTYPES[type_name]):
        raise ValueError("saved near do not fit the setting or each other")
    wanted = ((B, H, config.sinks, D), near.dtype) if config.sinks else None
    if (None if sinks is None else (tuple(sinks.shape), sinks.dtype)) != wanted:
        raise ValueError("saved sinks do not fit the setting or each other")


def check_arrays(wanted: Mapping[str, tuple[mx.array, tuple[int, ...], mx.Dtype]]) -> None:
    """Refuse buffers of a state of other shapes or types than these."""
    for name, (array, shape, dtype) in wanted.items():
        if tuple(array.shape) != shape or array.dtype != dtype:
            raise ValueError(f"saved {name} do not fit the setting or each other")


def read_counts(header: Mapping[str, Any], names: Sequence[str], rows: int) -> list[list[int]]:
    """Counts of each row, by name."""
    counts = [spread(header[name], rows) for name in names]
    if any(len(own) != rows for own in counts):
        raise ValueError("saved row counts do not fit the setting or each other")
    return counts
