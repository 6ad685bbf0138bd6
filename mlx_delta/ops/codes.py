"""Keys as codes of several widths, and turned values of a width for each head: how they are held.

:mod:`mlx_delta.method.codes` specifies the layout.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import mlx.core as mx

from mlx_delta.method.codes import Classes


@dataclass(frozen=True)
class PackedCodes:
    """All far blocks of a layer's keys, as the kernels read them.

    Attributes:
        words: uint32 [B, Hkv, blocks, rows, block_size].
        grid: [B, Hkv, blocks, 2, D] of the storage type: low and step, in the order.
        order: int32 [Hkv, D], each head's channels class by class.
        sinks: [B, Hkv, n_sinks, D], exact keys of the first tokens (not turned), which are read
            instead of their codes; ``None`` without sinks.
        classes: (width, count) of each class of channels.
        dtype: The storage type, float16 or bfloat16.
        head_dim: D.
        turned: Whether keys were turned before they were coded.
    """

    words: mx.array
    grid: mx.array
    order: mx.array
    sinks: mx.array | None
    classes: Classes
    dtype: mx.Dtype
    head_dim: int
    turned: bool = False

    @property
    def block_size(self) -> int:
        """Tokens to a block."""
        return self.words.shape[4]

    def part(self, begin: int, end: int) -> PackedCodes:
        """Blocks ``begin`` to ``end`` only."""
        words, grid = self.words[:, :, begin:end], self.grid[:, :, begin:end]
        sinks, first = self.sinks, begin * self.block_size
        if sinks is not None:
            sinks = sinks[:, :, first:] if first < sinks.shape[2] else None
        return replace(self, words=words, grid=grid, sinks=sinks)


@dataclass(frozen=True)
class CodedValues:
    """Turned values of a layer, as the kernels read them: codes, and those near in 16 bits.

    Attributes:
        words: uint32 [B, 1, capacity, sum of the heads' words], from token 0 on.
        scales: [B, 1, capacity, Hkv * groups] of the storage type.
        biases: As ``scales``.
        near: [B, Hkv, room, Dv] of the storage type, turned too: the values of each row from
            where its near keys begin.
        widths: Bits of a code of each kv head.
        head_dim: Dv.
    """

    words: mx.array
    scales: mx.array
    biases: mx.array
    near: mx.array
    widths: tuple[int, ...]
    head_dim: int
