"""Storage of values (V): as they come, in 16 bits, or quantized at 8 or 4 bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from mlx_delta.config import DeltaConfig
from mlx_delta.ops.pack import storage_type, to_storage

from .buffers import grow, pad_to, take_out, write_tokens
from .store import token_bytes


class ValueStore:
    """The values of all tokens, [B, Hkv, capacity, Dv] or their quantized form.

    Args:
        bits: ``None`` for the type they come in, 16 for float16 or bfloat16; 8 or 4 for
            ``mx.quantize``'s form: words, and a scale and bias of each group of a token's values.
        buffers: One array, or words, scales and biases.
    """

    differs = False  # far and near values are stored alike

    def __init__(self, bits: int | None, buffers: tuple[mx.array, ...]):
        self.bits = bits
        self.buffers = buffers

    @classmethod
    def make(cls, config: DeltaConfig, values: mx.array) -> ValueStore:
        """An empty store for values of this shape and type."""
        bits = _bits(config)
        parts = _encode(values[:, :, :1], bits)
        empty = [mx.zeros((*x.shape[:2], 0, x.shape[3]), x.dtype) for x in parts]
        return cls(bits, tuple(empty))

    @staticmethod
    def check_new(config: DeltaConfig, values: mx.array) -> None:
        """Refuse values that can't be stored in this form.

        Raises:
            ValueError: Their type has no 16-bit form, or their dimension no groups.
        """
        bits = config.value_bits
        if bits is not None:
            storage_type(values.dtype)
        if _is_quantized(_bits(config)) and values.shape[3] % 32:
            raise ValueError(
                f"[DeltaKVCache] value_bits={bits} needs a head_dim that is a multiple of 32 "
                f"but got {values.shape[3]}; use value_bits=16."
            )

    @staticmethod
    def count_arrays(config: DeltaConfig) -> int:
        """How many buffers a store of values has."""
        return 3 if _is_quantized(_bits(config)) else 1

    @property
    def quantized(self) -> bool:
        """Whether values are codes."""
        return _is_quantized(self.bits)

    @property
    def width(self) -> int:
        """Bits of a value as it is stored."""
        return self.bits if self.quantized and self.bits else 8 * self.buffers[0].itemsize

    @property
    def head_dim(self) -> int:
        """Dv."""
        size = self.buffers[0].shape[3]
        return size * 32 // self.width if self.quantized else size

    @property
    def group_size(self) -> int:
        """Values that share a scale and a bias, of quantized ones."""
        return self.head_dim // self.buffers[1].shape[3]

    @property
    def capacity(self) -> int:
        """Tokens that there is room for."""
        return self.buffers[0].shape[2]

    def write(
        self, values: mx.array, starts: Sequence[int], capacity: int, targets: Sequence[int]
    ) -> ValueStore:
        """Put values [B, Hkv, L, Dv] at each row's own index, making room for ``capacity``.

        Returns:
            What the step's queries read: the store itself.
        """
        self.buffers = tuple(
            write_tokens(
                grow(buffer, (*part.shape[:2], capacity, part.shape[3]), part.dtype), part, starts
            )
            for buffer, part in zip(self.buffers, _encode(values, self.bits), strict=True)
        )
        return self

    def drop(self, first: int, blocks: Sequence[int], size: int) -> None:
        """Take so many blocks of each row out, behind the first ones; what follows moves up."""
        tokens = [n * size for n in blocks]
        self.buffers = tuple(take_out(buffer, first * size, tokens) for buffer in self.buffers)

    def rewind(self, targets: Sequence[int]) -> None:
        """Forget that blocks from ``targets`` on are far: here they are stored as near ones."""

    def full_values(self, first: int, length: int) -> mx.array | None:
        """Full values of a single text, where those further back are others: nowhere."""
        return None

    def refill(self, held: int, near: mx.array | None) -> None:
        """Of a single text, have so many far blocks, after which ``near`` is full."""

    def wait_for(self, other: mx.array) -> None:
        """Let the buffers be evaluated only together with another array."""
        waiting: Any = mx.depends(list(self.buffers), [other])
        self.buffers = tuple(waiting)

    # What a step's queries read.

    def fetch(self, length: int, encoded: Sequence[int], dtype: mx.Dtype) -> mx.array:
        """The first values of each row, [B, Hkv, length, Dv]."""
        return self._dense([x[:, :, :length] for x in self.buffers], dtype)

    def held(self, length: int, dtype: mx.Dtype) -> mx.array:
        """[B, Hkv, length, Dv], what stands for values far from the last query."""
        return self.fetch(length, (), dtype)

    def full(self, length: int, dtype: mx.Dtype) -> mx.array:
        """[B, Hkv, length, Dv], full values wherever they are at hand."""
        return self.fetch(length, (), dtype)

    def near_part(self, first: int, length: int, dtype: mx.Dtype) -> mx.array:
        """Full values [B, Hkv, length - first, Dv] of rows that are at one position."""
        return self._dense([x[:, :, first:length] for x in self.buffers], dtype)

    def far(
        self, left: int, right: int, dtype: mx.Dtype, after: mx.array | None = None
    ) -> mx.array:
        """Far values [B, Hkv, right - left, Dv], once ``after`` is computed."""
        parts: Any = [x[:, :, left:right] for x in self.buffers]
        return self._dense(parts if after is None else mx.depends(parts, [after]), dtype)

    def rounded(self, values: mx.array) -> mx.array:
        """New values [B, Hkv, L, Dv] as near queries read them."""
        if self.bits is None:
            return values
        return self._dense(_encode(values, self.bits), values.dtype)

    def _dense(self, parts: Sequence[mx.array], dtype: mx.Dtype) -> mx.array:
        if not self.quantized:
            return parts[0].astype(dtype)
        # Scales in the wanted type: without a GPU, float16 arithmetic is several times slower.
        words, scales, biases = parts
        return mx.dequantize(
            words, scales.astype(dtype), biases.astype(dtype), self.group_size, self.bits
        )

    def kept(self) -> ValueStore:
        """The same, with handles of its own on all buffers."""
        return ValueStore(self.bits, tuple(x[...] for x in self.buffers))

    def read_bytes(self, tokens: int, far: int, float_bytes: int | None = None) -> int:
        """Bytes of the first row's values that a query of so many tokens reads."""
        return tokens * sum(token_bytes(x, float_bytes) for x in self.buffers)

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(x.nbytes for x in self.buffers)

    def blank(self, rows: int) -> ValueStore:
        """A store of this shape and type for so many rows without tokens."""
        empty = [mx.zeros((rows, x.shape[1], 0, x.shape[3]), x.dtype) for x in self.buffers]
        return ValueStore(self.bits, tuple(empty))

    def take(self, rows: list[int]) -> None:
        """Keep these rows only, in this order."""
        index = mx.array(rows, mx.int32)
        self.buffers = tuple(x[index] for x in self.buffers)

    def row(self, index: int, length: int) -> ValueStore:
        """The first values of one row as a store of their own."""
        one = slice(index, index + 1)
        return ValueStore(self.bits, tuple(mx.contiguous(x[one, :, :length]) for x in self.buffers))

    @classmethod
    def join(cls, stores: Sequence[ValueStore]) -> ValueStore:
        """The rows of all stores, padded to one length."""
        capacity = max(store.capacity for store in stores)
        parts = [[pad_to(x, capacity) for x in store.buffers] for store in stores]
        return cls(stores[0].bits, tuple(mx.concatenate(list(x)) for x in zip(*parts, strict=True)))

    # State.

    def header(self) -> dict[str, Any]:
        """What belongs to the state besides the buffers, as JSON values."""
        return {}

    @classmethod
    def restore(
        cls, config: DeltaConfig, header: dict[str, Any], arrays: Sequence[Any]
    ) -> ValueStore:
        """The store of a state."""
        return cls(_bits(config), tuple(arrays))

    def check(
        self, name: str, shape: tuple[int, int], room: int | None, lengths: Any, far: Any
    ) -> int:
        """Refuse buffers that do not fit [B, Hkv, capacity, ..] or each other.

        Args:
            name: Of the class, for the message.
            shape: B and Hkv.
            room: Tokens that there is room for; ``None``: as many as for the first buffer.
            lengths: Tokens of each row.
            far: Encoded blocks of each row.

        Returns:
            Tokens that there is room for.
        """
        leading = (*shape, room or self.capacity)
        for buffer in self.buffers:
            if buffer.ndim != 4 or tuple(buffer.shape[:3]) != leading:
                raise ValueError(
                    f"[{name}] saved values have shape {tuple(buffer.shape)}, expected "
                    f"{leading} and a dimension."
                )
        if self.quantized:
            words, scales, biases = self.buffers
            groups = scales.shape[3]
            fits = words.dtype == mx.uint32 and scales.shape == biases.shape
            if not fits or groups == 0 or self.head_dim / groups not in (32, 64):
                raise ValueError(
                    f"[{name}] saved values are not {self.bits}-bit codes: words have shape "
                    f"{tuple(words.shape)}, scales {tuple(scales.shape)}."
                )
        return leading[2]


def _bits(config: DeltaConfig) -> int | None:
    return None if config.value_bits is None else int(config.value_bits)


def _is_quantized(bits: int | None) -> bool:
    return bits is not None and bits < 16


def _encode(values: mx.array, bits: int | None) -> tuple[mx.array, ...]:
    if bits is None:
        return (values,)
    if not _is_quantized(bits):
        return (to_storage(values),)
    group_size = 64 if values.shape[3] % 64 == 0 else 32
    return tuple(mx.quantize(to_storage(values), group_size, bits))
