"""What a store of keys does, whether it keeps them in full or in few bits.

A store is made at the first update, complete, and has one count for each of its rows: that all
rows of a text agree is nothing special to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, Self

import mlx.core as mx

from mlx_delta.config import DeltaConfig
from mlx_delta.ops.blocks import FarBlocks

LARGEST = 1 << 31  # of a count

# What an append leaves for attention: held keys of far blocks (in place in a buffer as long as the
# text, or stored), near keys, and the position of each row's first near key.
KeyParts = tuple[mx.array | FarBlocks | None, mx.array, list[int]]


class KeyStore(Protocol):
    """The keys of a layer, [B, Hkv, tokens, D]: held far away, full near.

    Attributes:
        config: The setting of this layer.
    """

    config: DeltaConfig

    @property
    def zeros(self) -> mx.array:
        """Zero deltas of each encoded block, int32 [B, Hkv, blocks]."""
        ...

    @property
    def head_dim(self) -> int:
        """D."""
        ...

    @property
    def full_from(self) -> list[int]:
        """Position in each row from which on all keys are at hand in full; a block's border."""
        ...

    def append(
        self, keys: mx.array, starts: Sequence[int], targets: Sequence[int], capacity: int
    ) -> KeyParts:
        """Write keys [B, Hkv, L, D] from ``starts`` on, and encode blocks up to ``targets``.

        Args:
            keys: The new keys.
            starts: Each row's position of the first of them.
            targets: Blocks of each row that are to be encoded.
            capacity: Tokens to make room for, where room is needed for all of them.
        """
        ...

    def rewind(self, encoded: Sequence[int], targets: Sequence[int]) -> None:
        """Forget that blocks from ``targets`` on are encoded.

        Those that are still needed are full again: only such rewinds are asked for.

        Args:
            encoded: Blocks of each row that are encoded so far.
            targets: Blocks of each row that are to stay so.
        """
        ...

    def drop(self, first: int, blocks: Sequence[int]) -> None:
        """Take so many blocks of each row out; all that follows them moves up.

        Args:
            first: Blocks at the start that stay.
            blocks: How many go, of each row; all of them far from what comes next.
        """
        ...

    def full_keys(self, first: int, length: int) -> mx.array:
        """Full keys [1, Hkv, length - first, D] of a single text; ``first`` ends its last held one.

        An array of its own.
        """
        ...

    def refill(self, held: int, near: mx.array) -> None:
        """Of a single text, forget all but its first ``held`` blocks, after which ``near`` is full.

        Args:
            held: Blocks that are held, and have been since ``near`` was taken.
            near: [1, Hkv, n, D].
        """
        ...

    def fetch(self, length: int, encoded: Sequence[int]) -> mx.array:
        """Keys of the first tokens, [B, Hkv, length, D]: held far away, full near."""
        ...

    def read_bytes(self, tokens: int, far: int, float_bytes: int | None = None) -> int:
        """Bytes of the first row's keys that a query reads.

        Args:
            tokens: That it sees.
            far: Blocks of them that it sees as held.
            float_bytes: Count floats at this size at most, whatever they are stored in.
        """
        ...

    def blank(self, rows: int, sizes: list[int] | None = None) -> Self:
        """A store of this kind, shape and type for so many rows without tokens.

        Args:
            rows: How many.
            sizes: Tokens in a block of each; ``None``: as the setting says.
        """
        ...

    def take(self, rows: list[int]) -> None:
        """Keep these rows only, in this order."""
        ...

    def row(self, index: int, length: int) -> Self:
        """One row as a store of its own."""
        ...

    @classmethod
    def join(cls, stores: Sequence[Self]) -> Self:
        """The rows of all stores, padded at the end to one length."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes allocated, room to grow included."""
        ...

    def arrays(self) -> list[Any]:
        """The buffers, as :meth:`restore` takes them."""
        ...

    def header(self) -> dict[str, Any]:
        """What belongs to the state besides the buffers, as JSON values."""
        ...

    def check(self, name: str, lengths: Sequence[int], encoded: Sequence[int]) -> int | None:
        """Refuse a restored state whose parts do not fit together, before anything reads it.

        Args:
            name: Of the class, for the message.
            lengths: Tokens of each row.
            encoded: Encoded blocks of each row.

        Returns:
            Tokens that there is room for; ``None`` if any number will do.

        Raises:
            ValueError: They do not fit.
        """
        ...


def float_size(array: mx.array, most: int | None) -> int:
    """Bytes of an array's number; a float's at most so many."""
    if most is not None and mx.issubdtype(array.dtype, mx.floating):
        return min(array.itemsize, most)
    return array.itemsize


def token_bytes(array: mx.array, most: int | None) -> int:
    """Bytes of one token of one row in a buffer [B, heads, capacity, ..]."""
    return array.shape[1] * array.shape[3] * float_size(array, most)


def spread(counts: Any, rows: int) -> list[int]:
    """A count for each row; files of version 0.1.0 have a single one where all rows agree."""
    if any(type(count) is not int or not -LARGEST < count < LARGEST for count in counts):
        raise ValueError(f"it counts {str(list(counts))[:40]}")
    return list(counts) * rows if len(counts) == 1 else list(counts)
