"""A text for the tile kernels, what the specification says of it, and that they agree."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from functools import cached_property
from unittest import mock

import mlx.core as mx
import numpy as np

from mlx_delta.method import tiles as reference
from mlx_delta.ops import tiles_kernel
from mlx_delta.ops.exact_attention import Far
from mlx_delta.ops.tiles_kernel import Tiles

from .common import as_float

SCALE = 0.25
HALF, BF16, FLOAT = mx.float16, mx.bfloat16, mx.float32
TOLERANCE = {HALF: 4e-3, BF16: 3e-2, FLOAT: 2e-5}


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


# Every part of the launches occurs: rows of queries in two threadgroups, the last of them not full,
# strips that are half a tile, blocks that begin and end in the middle.
SMALL = Case(107, 20, value_dim=16)
LISTED = (3, 3)  # the blocks of it that have lists: the first and how many


@contextlib.contextmanager
def small_launches(simdgroups: int = 2):
    """Threadgroups and strips so small that small texts take several."""
    with (
        mock.patch.object(tiles_kernel, "MAX_SIMDGROUPS", simdgroups),
        mock.patch.object(tiles_kernel, "STRIP_KEYS", 8),
    ):
        yield


def check_attention(case: Case, listed: tuple[int, int] | None = None) -> None:
    """Attention over lists of ``listed`` blocks, or over everything, is as expected."""
    tiles = None if listed is None else case.some_tiles(*listed)
    found = case.attend(tiles)
    assert found.dtype == case.dtype
    expected = case.expected(tiles)
    np.testing.assert_allclose(as_float(found), expected, atol=TOLERANCE[case.dtype])


def check_choice(case: Case, mass: float = 0.7) -> None:
    """Shares are the specification's, and so are lists for these shares."""
    tiles = case.choose(mass)
    for row, head, block in np.ndindex(case.rows, case.heads[1], len(case.whole)):
        far, near = case.expected_shares(row, head, case.whole[block])
        found = np.array(tiles.shares[row, head, block])
        tolerance = 2e-3 if case.dtype == HALF else 2e-5
        np.testing.assert_allclose(found[: len(far)], far, atol=tolerance)
        np.testing.assert_allclose(found[-1], near, atol=tolerance)
        assert not found[len(far) : -1].any()
        expected = reference.choose(found[: len(far)], float(found[-1]), mass)
        listed = case.lists(tiles, row, head, case.whole[block])
        np.testing.assert_array_equal(listed, expected)
        count = int(tiles.counts[row, head, block].item())
        assert np.all(np.diff(np.array(tiles.lists[row, head, block, :count])) > 0)


def check_pack(keys: mx.array, size: int) -> None:
    """Blocks of keys are packed as specified."""
    blocks = keys.shape[2] // size
    means, bias, spread = tiles_kernel.pack(keys, blocks, size)
    exact = as_float(keys)
    for index in np.ndindex(*keys.shape[:2], blocks):
        block = exact[index[:2]][index[2] * size : (index[2] + 1) * size]
        expected = reference.pack(block)
        tolerance = 1e-3 if keys.dtype == HALF else 1e-5
        np.testing.assert_allclose(as_float(means[index]), expected[0], tolerance, tolerance)
        np.testing.assert_allclose(2 ** np.array(bias[index]), expected[1], rtol=1e-5)
        scaled = np.array(spread[index]) * 2 / np.log(2)
        np.testing.assert_allclose(scaled, expected[2], rtol=1e-4, atol=1e-6)


def drifting(blocks: int, size: int, head_dim: int, dtype: mx.Dtype = FLOAT) -> mx.array:
    """Keys [1, 2, blocks * size, D], a few more behind; one block of equal keys."""
    keys = as_float(Case(blocks * size, head_dim=head_dim).arrays[1])
    keys[0, 0, :size] = keys[0, 0, :1]
    return mx.array(keys).astype(dtype)
