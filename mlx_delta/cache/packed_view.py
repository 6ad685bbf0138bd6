"""What packed keys look like to attention: unpacked when they are asked for, and not before."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import mlx.core as mx

from mlx_delta.ops.dispatch import unpack
from mlx_delta.ops.pack import PackedBlocks

from .buffers import pad_to


class PackedView:
    """Keys that an update leaves for attention, unpacked when they are asked for.

    Attributes:
        blocks: The packed far blocks, of which row ``b`` has ``encoded[b]``; ``None`` without any.
        near: [B, Hkv, room, D]; full keys of each row from position ``firsts[b]`` on, in every
            block that is near to the first query.
        firsts: Multiples of the block size.
        encoded: Blocks that the last query sees as held.
        length: Tokens of the longest row.
        dtype: The model's type, of ``held`` and ``full``.
    """

    def __init__(
        self,
        blocks: PackedBlocks | None,
        near: mx.array,
        firsts: Sequence[int],
        encoded: Sequence[int],
        length: int,
        block_size: int,
        dtype: mx.Dtype,
    ):
        self.blocks = blocks
        self.near = near
        self.firsts = tuple(firsts)
        self.encoded = tuple(encoded)
        self.length = length
        self.block_size = block_size
        self.dtype = dtype

    @cached_property
    def unpacked(self) -> mx.array | None:
        """Held keys of all far blocks, [B, Hkv, blocks * block_size, D] of the storage type."""
        if self.blocks is None or not max(self.encoded):
            return None
        return unpack(self.blocks, max(self.encoded))

    @cached_property
    def held(self) -> mx.array:
        """[B, Hkv, length, D]; held keys in every block that is far from the last query."""
        return self._joined([n * self.block_size for n in self.encoded])

    @cached_property
    def full(self) -> mx.array:
        """[B, Hkv, length, D]; full keys in every block that is near to the first query."""
        return self._joined(list(self.firsts))

    def _joined(self, boundaries: list[int]) -> mx.array:
        """Unpacked keys before each row's boundary, near keys from there on."""
        far = self.unpacked
        if far is None:
            far = self.near[:, :, :0]
        if len(set(zip(boundaries, self.firsts, strict=True))) == 1:
            boundary, first = boundaries[0], self.firsts[0]
            near = self.near[:, :, boundary - first : self.length - first]
            keys = mx.concatenate([far[:, :, :boundary], near], axis=2) if boundary else near
            return pad_to(keys, self.length).astype(self.dtype)
        token = mx.arange(self.length)
        in_near = token - mx.array(self.firsts)[:, None]
        in_near = mx.clip(in_near, 0, self.near.shape[2] - 1) + far.shape[2]
        index = mx.where(token < mx.array(boundaries)[:, None], token, in_near)
        keys = mx.concatenate([far, self.near], axis=2)
        return mx.take_along_axis(keys, index[:, None, :, None], axis=2).astype(self.dtype)
