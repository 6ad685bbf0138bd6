"""A text for the tile kernels, and what the specification says of it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx
import numpy as np

from mlx_delta.method import tiles as reference
from mlx_delta.ops import tiles_kernel
from mlx_delta.ops.exact_attention import Far
from mlx_delta.ops.tiles_kernel import Tiles

from .common import as_float

SCALE = 0.25


@dataclass(frozen=True)
class Case:
    """Queries from position ``start`` to ``end`` of a text; more keys than that are garbage."""

    end: int
    start: int = 0
    heads: tuple[int, int] = (6, 2)
    head_dim: int = 8
    value_dim: int = 8
    size: int = 16
    window_blocks: int = 1
    dtype: mx.Dtype = mx.float32
    rows: int = 1

    def __str__(self) -> str:
        kind = str(self.dtype).replace("mlx.core.", "")
        dims = f"{self.head_dim}/{self.value_dim}"
        return f"{kind} {dims} of {self.size} heads {self.heads[0]}/{self.heads[1]}"

    @cached_property
    def arrays(self) -> tuple[mx.array, ...]:
        """Queries [B, Hq, L, D], near keys, far keys and values [B, Hkv, room, D or Dv].

        Keys drift, as real ones do; far keys differ from near ones. NaN stands wherever nothing
        may be read: near and far keys and values behind the last query.
        """
        rng = np.random.default_rng(self.end + self.head_dim)
        kv = (self.rows, self.heads[1], self.end, self.head_dim)
        keys = np.cumsum(rng.normal(size=kv) * (rng.random(kv) < 0.1), axis=2)
        keys += rng.normal(size=kv, scale=0.3)
        far = keys + rng.normal(size=kv, scale=0.1)
        values = rng.normal(size=(*kv[:3], self.value_dim))
        shape = (self.rows, self.heads[0], self.end - self.start, self.head_dim)
        queries = rng.normal(size=shape, scale=5 / np.sqrt(self.head_dim))
        room = [(0, 0), (0, 0), (0, 7), (0, 0)]
        padded = [np.pad(x, room, constant_values=np.nan) for x in (keys, far, values)]
        return tuple(mx.array(x.astype(np.float32)).astype(self.dtype) for x in (queries, *padded))

    @property
    def blocks(self) -> range:
        """Blocks that have queries."""
        return range(self.start // self.size, -(-self.end // self.size))

    @property
    def whole(self) -> range:
        """Blocks of which all queries are there, with far tiles."""
        first = max(-(-self.start // self.size), self.window_blocks + 1)
        return range(first, self.end // self.size)

    def border(self, block: int) -> int:
        """The first near block of a block of queries."""
        return max(0, block - self.window_blocks)

    @property
    def far(self) -> Far:
        """Far keys, and what is near."""
        return Far(self.arrays[2], self.size, self.window_blocks)

    def choose(self, mass: float) -> Tiles:
        """The kernels' choice for all whole blocks."""
        queries, near, *_ = self.arrays
        scored = (
            self.whole.start * self.size - self.start,
            self.whole.stop * self.size - self.start,
        )
        return tiles_kernel.choose(queries, near, SCALE, self.start, self.far, scored, mass)

    def attend(self, tiles: Tiles | None) -> mx.array:
        """The kernel's attention."""
        queries, near, _, values = self.arrays
        return tiles_kernel.attend(queries, near, values, SCALE, self.start, self.far, tiles)

    def some_tiles(self, first: int, blocks: int) -> Tiles:
        """A list for some blocks and each head, about half of the far tiles."""
        rng = np.random.default_rng(blocks)
        room = max(1, self.border(first + blocks - 1))
        lists = np.zeros((self.rows, self.heads[1], blocks, room), np.int32)
        counts = np.zeros(lists.shape[:3], np.int32)
        for index in np.ndindex(counts.shape):
            far = self.border(first + index[2])
            chosen = np.flatnonzero(rng.random(far) < 0.5)
            counts[index] = len(chosen)
            lists[index][: len(chosen)] = chosen
        return Tiles(first, mx.array(lists), mx.array(counts), mx.zeros(1))

    def lists(self, tiles: Tiles | None, row: int, head: int, block: int) -> np.ndarray:
        """The far tiles that a block of queries looks at, boolean."""
        far = self.border(block)
        listed = block - tiles.first if tiles is not None else -1
        if tiles is None or not 0 <= listed < tiles.lists.shape[2]:
            return np.ones(far, bool)
        chosen = np.zeros(far, bool)
        count = int(tiles.counts[row, head, listed].item())
        chosen[np.array(tiles.lists[row, head, listed, :count])] = True
        assert chosen.sum() == count, "no tile stands twice"
        return chosen

    def expected(self, tiles: Tiles | None) -> np.ndarray:
        """Softmax over the tiles looked at, in float64: [B, Hq, L, Dv]."""
        queries, near, far, values = (as_float(x).astype(np.float64) for x in self.arrays)
        group, size = self.heads[0] // self.heads[1], self.size
        output = np.zeros((*queries.shape[:3], self.value_dim))
        for row, head, block in np.ndindex(self.rows, self.heads[1], self.blocks.stop):
            if block < self.blocks.start:
                continue
            border, end = self.border(block) * size, min((block + 1) * size, self.end)
            first = max(block * size, self.start)
            keys = np.concatenate([far[row, head, :border], near[row, head, border:end]])
            seen = np.arange(end) <= np.arange(first, end)[:, None]
            seen[:, :border] &= np.repeat(self.lists(tiles, row, head, block), size)
            for member in range(head * group, (head + 1) * group):
                own = slice(first - self.start, end - self.start)
                scores = np.where(seen, queries[row, member, own] @ keys.T * SCALE, -np.inf)
                weights = np.exp(scores - scores.max(axis=1, keepdims=True))
                weights /= weights.sum(axis=1, keepdims=True)
                output[row, member, own] = weights @ values[row, head, :end]
        return output

    def expected_shares(self, row: int, head: int, block: int) -> tuple[np.ndarray, float]:
        """The specification's shares for a block of queries."""
        queries, near, far, _ = (as_float(x) for x in self.arrays)
        group, size = self.heads[0] // self.heads[1], self.size
        own = slice(block * size - self.start, (block + 1) * size - self.start)
        border, end = self.border(block) * size, (block + 1) * size
        return reference.shares(
            queries[row, head * group : (head + 1) * group, own] * SCALE,
            far[row, head, :border].reshape(-1, size, self.head_dim),
            near[row, head, border:end].reshape(-1, size, self.head_dim),
        )
