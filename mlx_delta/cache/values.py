"""Storage of values (V) as they come, or in 16 bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from mlx_delta.config import DeltaConfig
from mlx_delta.ops.storage import storage_type, to_storage

from .buffers import grow, pad_to, take_out, write_tokens
from .store import token_bytes


class ValueStore:
    """The values of all tokens.

    Args:
        bits: ``None`` for the type they come in, 16 for float16 or bfloat16.
        buffer: [B, Hkv, capacity, Dv].
    """

    differs = False  # far and near values are stored alike

    def __init__(self, bits: int | None, buffer: mx.array):
        self.bits = bits
        self.buffer = buffer

    @classmethod
    def make(cls, config: DeltaConfig, values: mx.array) -> ValueStore:
        """An empty store for values of this shape and type."""
        bits = _bits(config)
        empty = _encode(values[:, :, :1], bits)
        return cls(bits, mx.zeros((*empty.shape[:2], 0, empty.shape[3]), empty.dtype))

    @staticmethod
    def check_new(config: DeltaConfig, values: mx.array) -> None:
        """Refuse values that can't be stored in this form.

        Raises:
            ValueError: Their type has no 16-bit form.
        """
        if config.value_bits is not None:
            storage_type(values.dtype)

    @staticmethod
    def count_arrays(config: DeltaConfig) -> int:
        """How many buffers a store of values has."""
        return 1

    @property
    def buffers(self) -> tuple[mx.array, ...]:
        """The buffer, as the state has it."""
        return (self.buffer,)

    @property
    def head_dim(self) -> int:
        """Dv."""
        return self.buffer.shape[3]

    @property
    def capacity(self) -> int:
        """Tokens that there is room for."""
        return self.buffer.shape[2]

    def write(
        self, values: mx.array, starts: Sequence[int], capacity: int, targets: Sequence[int]
    ) -> ValueStore:
        """Put values [B, Hkv, L, Dv] at each row's own index, making room for ``capacity``.

        Returns:
            What the step's queries read: the store itself.
        """
        part = _encode(values, self.bits)
        shape = (*part.shape[:2], capacity, part.shape[3])
        self.buffer = write_tokens(grow(self.buffer, shape, part.dtype), part, starts)
        return self

    def drop(self, first: int, blocks: Sequence[int], size: int) -> None:
        """Take so many blocks of each row out, behind the first ones; what follows moves up."""
        self.buffer = take_out(self.buffer, first * size, [n * size for n in blocks])

    def rewind(self, targets: Sequence[int]) -> None:
        """Forget that blocks from ``targets`` on are far: here they are stored as near ones."""

    def full_values(self, first: int, length: int) -> mx.array | None:
        """Full values of a single text, where those further back are others: nowhere."""
        return None

    def refill(self, held: int, near: mx.array | None) -> None:
        """Of a single text, have so many far blocks, after which ``near`` is full."""

    def wait_for(self, other: mx.array) -> None:
        """Let the buffer be evaluated only together with another array."""
        (self.buffer,) = mx.depends([self.buffer], [other])

    # What a step's queries read.

    def fetch(self, length: int, encoded: Sequence[int], dtype: mx.Dtype) -> mx.array:
        """The first values of each row, [B, Hkv, length, Dv]."""
        return self.buffer[:, :, :length].astype(dtype)

    def held(self, length: int, dtype: mx.Dtype) -> mx.array:
        """[B, Hkv, length, Dv], what stands for values far from the last query."""
        return self.fetch(length, (), dtype)

    def full(self, length: int, dtype: mx.Dtype) -> mx.array:
        """[B, Hkv, length, Dv], full values wherever they are at hand."""
        return self.fetch(length, (), dtype)

    def near_part(self, first: int, length: int, dtype: mx.Dtype) -> mx.array:
        """Full values [B, Hkv, length - first, Dv] of rows that are at one position."""
        return self.buffer[:, :, first:length].astype(dtype)

    def far(
        self, left: int, right: int, dtype: mx.Dtype, after: mx.array | None = None
    ) -> mx.array:
        """Far values [B, Hkv, right - left, Dv], once ``after`` is computed."""
        part = self.buffer[:, :, left:right]
        if after is not None:
            (part,) = mx.depends([part], [after])
        return part.astype(dtype)

    def rounded(self, values: mx.array) -> mx.array:
        """New values [B, Hkv, L, Dv] as near queries read them."""
        return _encode(values, self.bits).astype(values.dtype)

    def kept(self) -> ValueStore:
        """The same, with a handle of its own on the buffer."""
        return ValueStore(self.bits, self.buffer[...])

    def read_bytes(self, tokens: int, far: int, float_bytes: int | None = None) -> int:
        """Bytes of the first row's values that a query of so many tokens reads."""
        return tokens * token_bytes(self.buffer, float_bytes)

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return self.buffer.nbytes

    def blank(self, rows: int) -> ValueStore:
        """A store of this shape and type for so many rows without tokens."""
        _, H, _, D = self.buffer.shape
        return ValueStore(self.bits, mx.zeros((rows, H, 0, D), self.buffer.dtype))

    def take(self, rows: list[int]) -> None:
        """Keep these rows only, in this order."""
        self.buffer = self.buffer[mx.array(rows, mx.int32)]

    def row(self, index: int, length: int) -> ValueStore:
        """The first values of one row as a store of their own."""
        return ValueStore(self.bits, mx.contiguous(self.buffer[index : index + 1, :, :length]))

    @classmethod
    def join(cls, stores: Sequence[ValueStore]) -> ValueStore:
        """The rows of all stores, padded to one length."""
        capacity = max(store.capacity for store in stores)
        parts = [pad_to(store.buffer, capacity) for store in stores]
        return cls(stores[0].bits, mx.concatenate(parts))

    # State.

    def header(self) -> dict[str, Any]:
        """What belongs to the state besides the buffers, as JSON values."""
        return {}

    @classmethod
    def restore(
        cls, config: DeltaConfig, header: dict[str, Any], arrays: Sequence[Any]
    ) -> ValueStore:
        """The store of a state."""
        (buffer,) = arrays
        return cls(_bits(config), buffer)

    def check(
        self, name: str, shape: tuple[int, int], room: int | None, lengths: Any, far: Any
    ) -> int:
        """Refuse a buffer that does not fit [B, Hkv, capacity, ..].

        Args:
            name: Of the class, for the message.
            shape: B and Hkv.
            room: Tokens that there is room for; ``None``: as many as there are.
            lengths: Tokens of each row.
            far: Encoded blocks of each row.

        Returns:
            Tokens that there is room for.
        """
        leading = (*shape, self.buffer.shape[2] if room is None else room)
        if self.buffer.ndim != 4 or tuple(self.buffer.shape[:3]) != leading:
            raise ValueError(
                f"[{name}] saved values have shape {tuple(self.buffer.shape)}, expected "
                f"{leading} and a dimension."
            )
        return leading[2]


def _bits(config: DeltaConfig) -> int | None:
    return None if config.value_bits is None else int(config.value_bits)


def _encode(values: mx.array, bits: int | None) -> mx.array:
    return values if bits is None else to_storage(values)
