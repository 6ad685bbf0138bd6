"""Storage of values (V): as they come, in 16 bits, or quantized at 8 or 4 bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from mlx_delta.ops.pack import storage_type, to_storage

from .buffers import grow, pad_to, write_tokens


class ValueStore:
    """The values of all tokens, [B, Hkv, capacity, Dv] or their quantized form.

    Args:
        bits: ``None`` for the type they come in, 16 for float16 or bfloat16; 8 or 4 for
            ``mx.quantize``'s form: words, and a scale and bias of each group of a token's values.

    Attributes:
        buffers: One array, or words, scales and biases; ``None`` before the first write.
    """

    def __init__(self, bits: int | None):
        self.bits = bits
        self.buffers: tuple[mx.array, ...] | None = None

    @property
    def quantized(self) -> bool:
        """Whether values are codes."""
        return self.bits is not None and self.bits < 16

    @property
    def head_dim(self) -> int:
        """Dv."""
        assert self.buffers is not None
        size = self.buffers[0].shape[3]
        return size * 32 // self.bits if self.quantized and self.bits else size

    @property
    def group_size(self) -> int:
        """Values that share a scale and a bias."""
        assert self.buffers is not None and self.quantized
        return self.head_dim // self.buffers[1].shape[3]

    def check_new(self, values: mx.array) -> None:
        """Refuse values that can't be stored in this form.

        Raises:
            ValueError: Their type has no 16-bit form, or their dimension no groups.
        """
        if self.bits is not None:
            storage_type(values.dtype)
        if self.quantized and values.shape[3] % 32:
            raise ValueError(
                f"[DeltaKVCache] value_bits={self.bits} needs a head_dim that is a multiple of 32 "
                f"but got {values.shape[3]}; use value_bits=16."
            )

    def write(self, values: mx.array, starts: Sequence[int], capacity: int) -> None:
        """Put values [B, Hkv, L, Dv] at each row's own index, making room for ``capacity``."""
        parts = self._encode(values)
        old = self.buffers or (None,) * len(parts)
        self.buffers = tuple(
            write_tokens(
                grow(buffer, (*part.shape[:2], capacity, part.shape[3]), part.dtype), part, starts
            )
            for buffer, part in zip(old, parts, strict=True)
        )

    def _encode(self, values: mx.array) -> tuple[mx.array, ...]:
        if self.bits is None:
            return (values,)
        if not self.quantized:
            return (to_storage(values),)
        group_size = 64 if values.shape[3] % 64 == 0 else 32
        return tuple(mx.quantize(to_storage(values), group_size, self.bits))

    def dense(self, length: int, dtype: mx.Dtype) -> mx.array:
        """The first values of each row, [B, Hkv, length, Dv] of a type."""
        assert self.buffers is not None
        parts = [x[:, :, :length] for x in self.buffers]
        if not self.quantized:
            return parts[0].astype(dtype)
        # Scales in the wanted type: without a GPU, float16 arithmetic is several times slower.
        words, scales, biases = parts
        return mx.dequantize(
            words, scales.astype(dtype), biases.astype(dtype), self.group_size, self.bits
        )

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(x.nbytes for x in self.buffers or ())

    def take(self, rows: mx.array) -> None:
        """Keep these rows only, in this order."""
        if self.buffers is not None:
            self.buffers = tuple(x[rows] for x in self.buffers)

    def row(self, index: int, length: int) -> ValueStore:
        """The first values of one row as a store of their own."""
        store = ValueStore(self.bits)
        if self.buffers is not None:
            store.buffers = tuple(
                mx.contiguous(x[index : index + 1, :, :length]) for x in self.buffers
            )
        return store

    @classmethod
    def join(cls, stores: Sequence[ValueStore], counts: Sequence[int]) -> ValueStore:
        """The rows of all stores, padded to one length; ``counts`` rows of each."""
        joined = cls(stores[0].bits)
        filled = [store.buffers for store in stores if store.buffers is not None]
        if filled:
            capacity = max(buffers[0].shape[2] for buffers in filled)
            parts = []
            for store, count in zip(stores, counts, strict=True):
                buffers = store.buffers or tuple(
                    mx.zeros((count, *x.shape[1:]), x.dtype) for x in filled[0]
                )
                parts.append([pad_to(x, capacity) for x in buffers])
            joined.buffers = tuple(mx.concatenate(list(x)) for x in zip(*parts, strict=True))
        return joined

    def arrays(self) -> list[Any]:
        """The buffers, as many as this kind of store has; ``None`` for each before any write."""
        return list(self.buffers or [None] * self.n_arrays)

    @property
    def n_arrays(self) -> int:
        """How many buffers there are."""
        return 3 if self.quantized else 1

    def check(self, name: str, leading: tuple[int, int, int]) -> None:
        """Refuse buffers that do not fit [B, Hkv, capacity, ..] or each other."""
        for buffer in self.buffers or ():
            if buffer.ndim != 4 or tuple(buffer.shape[:3]) != leading:
                raise ValueError(
                    f"[{name}] saved values have shape {tuple(buffer.shape)}, expected "
                    f"{leading} and a dimension."
                )
        if self.quantized and self.buffers is not None:
            words, scales, biases = self.buffers
            groups = scales.shape[3]
            fits = words.dtype == mx.uint32 and scales.shape == biases.shape
            if not fits or groups == 0 or self.head_dim / groups not in (32, 64):
                raise ValueError(
                    f"[{name}] saved values are not {self.bits}-bit codes: words have shape "
                    f"{tuple(words.shape)}, scales {tuple(scales.shape)}."
                )
