"""What an update leaves for attention to read; stored keys are written out when asked for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import mlx.core as mx

from mlx_delta.config import DeltaConfig
from mlx_delta.ops.blocks import FarBlocks, unpack
from mlx_delta.ops.join import join_near
from mlx_delta.ops.tiles import TilePlan
from mlx_delta.system.tuning import store_name

from .turned_values import TurnedView
from .values import ValueStore


@dataclass(frozen=True)
class Part:
    """Some of an update's queries, and what they see.

    Attributes:
        first: The first of them.
        end: After the last one.
        step: What they see, positions counted without the blocks that were dropped.
        dropped: Tokens of each row that were dropped.
        dropped_from: Position from which on they were.
    """

    first: int
    end: int
    step: Step
    dropped: tuple[int, ...]
    dropped_from: int

    def kept(self) -> Part:
        """The same, with handles of its own on all buffers."""
        step = self.step
        far = step.far[...] if isinstance(step.far, mx.array) else step.far
        return replace(self, step=replace(step, far=far, stored_values=step.stored_values.kept()))

    def mask(self, mask: mx.array | str | None) -> mx.array | str | None:
        """Their part of a mask, that broadcasts to [B, Hq, L, S], of all queries and tokens."""
        if not isinstance(mask, mx.array):
            return mask
        if mask.shape[-2] > 1:
            mask = mask[..., self.first : self.end, :]
        column = mx.arange(self.step.length)
        gone = mx.array(self.dropped)[:, None]
        index = mx.where(column < self.dropped_from, column, column + gone)
        # Of rows that are shorter than others, once theirs are dropped: nothing is there.
        beyond, index = index >= mask.shape[-1], mx.minimum(index, mask.shape[-1] - 1)
        if len(set(self.dropped)) == 1:
            return mask[..., index[0]]
        mask = mask.reshape(*[1] * (4 - mask.ndim), *mask.shape)
        mask = mx.broadcast_to(mask, (len(self.dropped), *mask.shape[1:]))
        index = mx.broadcast_to(index[:, None, None], (*mask.shape[:3], index.shape[1]))
        found = mx.take_along_axis(mask, index, axis=-1)
        unseen = mx.array(False if mask.dtype == mx.bool_ else -mx.inf, mask.dtype)
        return mx.where(beyond[:, None, None], unseen, found)


@dataclass(frozen=True)
class Step:
    """The keys and values that the queries of one update see.

    Attributes:
        starts: Position of each row's first query.
        steps: Queries of each row.
        block_sizes: Tokens in a block of each row.
        window_blocks: Blocks before a query's own that it sees in full.
        far: Held keys: a buffer [B, Hkv, capacity, D] in which they stand in every block that is
            far from the last query, full ones elsewhere; or stored blocks; ``None``: not any.
        near: [B, Hkv, room, D]; full keys of each row from position ``firsts[b]`` on, in every
            block that is near to the first query.
        firsts: Multiples of the block size.
        encoded: Blocks of each row that the last query sees as held.
        stored_values: The values as they are stored.
        dtype: The model's type.
        config: The setting of the layer.
        tiles: How many of the far tiles to look at; ``None``: all.
    """

    starts: tuple[int, ...]
    steps: int
    block_sizes: tuple[int, ...]
    window_blocks: int
    far: mx.array | FarBlocks | None
    near: mx.array
    firsts: tuple[int, ...]
    encoded: tuple[int, ...]
    stored_values: ValueStore | TurnedView
    dtype: mx.Dtype
    config: DeltaConfig
    tiles: TilePlan | None = None

    @property
    def length(self) -> int:
        """Keys to look at, over all rows: one more than the last query's position."""
        return max(self.starts) + self.steps

    @property
    def store(self) -> str:
        """How far keys and values are stored, as tables of measurements name it."""
        return store_name(self.config)

    @property
    def block_size(self) -> int | None:
        """Tokens in a block; ``None`` where rows differ."""
        return self.block_sizes[0] if len(set(self.block_sizes)) == 1 else None

    @property
    def one_border(self) -> bool:
        """Whether the border between held and full keys is the same for all queries of a row."""
        window = self.window_blocks
        return all(
            max(0, start // size - window) == max(0, (start + self.steps - 1) // size - window)
            for start, size in zip(self.starts, self.block_sizes, strict=True)
        )

    @cached_property
    def held(self) -> mx.array:
        """[B, Hkv, length or more, D]; held keys in every block far from the last query."""
        if isinstance(self.far, mx.array):
            return self.far
        pairs = zip(self.encoded, self.block_sizes, strict=True)
        return self._joined([n * size for n, size in pairs])

    @cached_property
    def full(self) -> mx.array:
        """[B, Hkv, length or more, D]; full keys in every block near to the first query."""
        if isinstance(self.far, mx.array):
            return self.near
        return self._joined(list(self.firsts))

    @cached_property
    def values(self) -> mx.array:
        """[B, Hkv, length, Dv], of the model's type; full ones wherever ``full`` has full keys."""
        return self.stored_values.full(self.length, self.dtype)

    @cached_property
    def held_values(self) -> mx.array:
        """[B, Hkv, length, Dv]; what stands for values in every block far from the last query."""
        if not self.stored_values.differs:
            return self.values
        return self.stored_values.held(self.length, self.dtype)

    @cached_property
    def _written_out(self) -> mx.array | None:
        if self.far is None or isinstance(self.far, mx.array) or not max(self.encoded):
            return None
        return unpack(self.far, max(self.encoded))

    def _joined(self, boundaries: list[int]) -> mx.array:
        keys = join_near(self._written_out, self.near, boundaries, list(self.firsts), self.length)
        return keys.astype(self.dtype)
