"""Prefill attention over chosen tiles, with MLX operations; see :mod:`mlx_delta.method.tiles`.

A block of queries is scored by itself, with the same shapes whichever chunk it comes in, so the
lists do not depend on how a prompt is cut at multiples of the block. The lists are read back
before the tiles are computed, so this can't be traced by MLX's transformations.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx
import numpy as np

from mlx_delta.method.tiles import PACKED_ROWS, POOLED_QUERIES, choose

from .exact_attention import HIDDEN, Far, Weighted, hide, with_ones
from .exp2 import exp2_below

_LOG2_E = 1.4426950408889634
# Scores of a strip of gathered tiles: what a processor's cache holds.
STRIP_SCORES = 1 << 19


class TileCount:
    """Tiles computed and tiles below the diagonal, own ones included, over all kv heads.

    Attributes:
        all: Tiles below the diagonal.
    """

    def __init__(self) -> None:
        self.all = 0
        self._computed = 0
        self._waiting: list[mx.array] = []  # what kernels have counted, not looked at yet

    def add(self, chosen: int | mx.array, near: int, every: int) -> None:
        """Count far tiles that were chosen, near ones, and how many there were of both."""
        self._computed += near
        self.all += every
        if isinstance(chosen, mx.array):
            self._waiting.append(chosen)
        else:
            self._computed += chosen

    def add_all(self, other: TileCount) -> None:
        """Count what another one has counted."""
        self._computed += other._computed
        self.all += other.all
        self._waiting += other._waiting

    @property
    def computed(self) -> int:
        """Tiles computed."""
        self._computed += sum(int(np.array(counts).sum()) for counts in self._waiting)
        self._waiting.clear()
        return self._computed

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TileCount):
            return NotImplemented
        return (self.computed, self.all) == (other.computed, other.all)

    __hash__ = None  # type: ignore[assignment]

    @property
    def density(self) -> float:
        """The part that was computed; 1 where none was skipped."""
        return self.computed / self.all if self.all else 1.0


@dataclass(frozen=True)
class TilePlan:
    """What a cache asks for where a prompt's queries look at chosen tiles only.

    Attributes:
        mass: Share of the expected attention to reach.
        prompt_length: Where the prompt ends, if that is known: its end looks at everything.
        count: Tiles are counted here.
    """

    mass: float
    prompt_length: int | None
    count: TileCount


@dataclass(frozen=True)
class PackedTiles:
    """Blocks of keys packed for scoring.

    Attributes:
        keys: [B, Hkv, n, R, D]; means of the pieces.
        bias: [B, Hkv, n, R]; log2 of how many keys each is of.
        spread: [B, Hkv, n, R]; half their spread, in units for scores in powers of two.
    """

    keys: mx.array
    bias: mx.array
    spread: mx.array

    @cached_property
    def rows(self) -> mx.array:
        """[B, Hkv, n * R, D + 2]: a product with ``[q, 1, |q|**2]`` is a piece's score."""
        B, H, n, R, D = self.keys.shape
        rows = mx.concatenate([self.keys, self.bias[..., None], self.spread[..., None]], axis=-1)
        return rows.reshape(B, H, n * R, D + 2)


def pack_tiles(keys: mx.array) -> PackedTiles:
    """Pack blocks of keys, float32 [B, Hkv, n, T, D]; as ``method.tiles.pack``."""
    T, D = keys.shape[3:]
    # Sums over elements are products with ones, which are faster here.
    ones = mx.ones((D, 1))
    change = (mx.square(keys[:, :, :, 1:] - keys[:, :, :, :-1]) @ ones)[..., 0]
    # argsort is stable, so of equal changes the earlier counts.
    order = mx.argsort(-change, axis=-1)[..., : PACKED_ROWS - 1] + 1
    begins = (mx.arange(T) == order[..., None]).any(axis=-2)
    piece = mx.cumsum(begins.astype(mx.int32), axis=-1)
    member = (mx.arange(PACKED_ROWS)[:, None] == piece[..., None, :]).astype(mx.float32)
    count = member.sum(axis=-1)  # [B, Hkv, n, R]
    means = (member @ keys) / count[..., None]
    deviation = keys - member.swapaxes(-1, -2) @ means
    variance = (member @ (mx.square(deviation) @ ones))[..., 0] / (count * D)
    # |q|**2 / 2 * variance in powers of e, for a query that is scaled by log2(e):
    # |q log2(e)|**2 / 2 * variance / log2(e) in powers of two.
    return PackedTiles(means, mx.log2(count), variance * (0.5 / _LOG2_E))


def tile_shares(queries: mx.array, packed: PackedTiles, near: mx.array, far: int) -> mx.array:
    """As ``method.tiles.shares``, for all rows and kv heads.

    Scores are laid out with the queries last: largest ones and sums then go down the columns,
    which MLX vectorizes.

    Args:
        queries: [B, Hkv, G, T, D], scaled for scores in powers of two.
        packed: The packed blocks, of which the first ``far`` are to choose from.
        near: [B, Hkv, m * T, D], keys that are seen in any case, the queries' own last.
        far: How many tiles there are to choose from.

    Returns:
        [B, Hkv, far + 1]; the last is the share of the near tiles together.
    """
    B, H, G, T, D = queries.shape
    groups = T // POOLED_QUERIES
    pooled = queries.reshape(B, H, G * groups, POOLED_QUERIES, D).mean(axis=3)
    square = mx.square(pooled).sum(axis=-1, keepdims=True)
    terms = mx.concatenate([pooled, mx.ones_like(square), square], axis=-1)
    scores = packed.rows[:, :, : far * PACKED_ROWS] @ terms.swapaxes(-1, -2)
    exact = near @ pooled.swapaxes(-1, -2)  # [B, Hkv, m * T, G * groups]
    last = mx.tile(mx.arange(POOLED_QUERIES - 1, T, POOLED_QUERIES), G)
    seen = (mx.arange(near.shape[2]) - (near.shape[2] - T))[:, None] <= last
    exact = mx.where(seen, exact, HIDDEN)
    top = mx.maximum(scores.max(axis=2, keepdims=True), exact.max(axis=2, keepdims=True))
    tiles = exp2_below(scores, top).reshape(B, H, far, PACKED_ROWS, -1).sum(axis=3)
    own = exp2_below(exact, top).sum(axis=2, keepdims=True)
    weights = mx.concatenate([tiles, own], axis=2)
    most = (weights / weights.sum(axis=2, keepdims=True)).max(axis=3)
    return most / most.sum(axis=-1, keepdims=True)


def tile_attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    scale: float,
    start: int,
    far: Far,
    mass: float,
    count: TileCount,
) -> mx.array:
    """Attention of whole blocks of queries over chosen tiles.

    Args:
        queries: [B, Hq, L, D]; query ``i`` is at position ``start + i``. ``start`` and ``L`` are
            multiples of the block size.
        keys: [B, Hkv, start + L or more, D]; read near each query.
        values: [B, Hkv, start + L or more, Dv].
        scale: Factor on the scores.
        start: Position of the first query.
        far: Keys to choose from, and what is near.
        mass: Share of the expected attention to reach.
        count: Tiles are counted here.

    Returns:
        [B, Hq, L, Dv], of the queries' type; computed in float32.
    """
    B, n_heads, steps, D = queries.shape
    n_kv, T = keys.shape[1], far.block_size
    group, blocks = n_heads // n_kv, steps // T
    dtype = queries.dtype
    queries = (queries.astype(mx.float32) * (scale * _LOG2_E)).reshape(B, n_kv, group, steps, D)
    keys, values = keys.astype(mx.float32), with_ones(values[:, :, : start + steps])
    borders = [far.border(start + i * T) for i in range(blocks)]
    last = borders[-1]
    tiles = far.keys[:, :, :last].astype(mx.float32).reshape(B, n_kv, last // T, T, D)
    distant = values if far.values is None else with_ones(far.values[:, :, :last])
    tile_values = distant[:, :, :last].reshape(B, n_kv, last // T, T, -1)
    parts = [queries[:, :, :, i * T : (i + 1) * T] for i in range(blocks)]
    lists = _choose(parts, tiles, keys, borders, start, mass)
    near_parts: list[Weighted] = []
    far_parts: list[Weighted] = []
    for i, part in enumerate(parts):
        border, end = borders[i], start + (i + 1) * T
        near = slice(border, end)
        own = part.reshape(B, n_kv, group * T, D)
        seen = mx.arange(border, end) <= mx.arange(end - T, end)[:, None]
        scores = hide(own @ keys[:, :, near].swapaxes(-1, -2), seen, group)
        near_parts.append(Weighted.of(scores, values[:, :, near]))
        for row, head in np.ndindex(B, n_kv):
            text = tiles[row, head], tile_values[row, head]
            far_parts.append(_attend(own[row, head], *text, lists[i][row, head]))
        # Block by block, so that strips stay in the cache.
        mx.async_eval([near_parts[-1].sums, [part.sums for part in far_parts[-B * n_kv :]]])
        near_tiles = (end - border) // T
        count.add(int(lists[i].sum()), B * n_kv * near_tiles, B * n_kv * end // T)
    shape = (blocks, B, n_kv, group * T)
    near_all, far_all = (
        Weighted(
            mx.stack([part.top for part in some]).reshape(*shape, 1),
            mx.stack([part.sums for part in some]).reshape(*shape, -1),
        )
        for some in (near_parts, far_parts)
    )
    output = near_all.merged(far_all).mean().reshape(blocks, B, n_kv, group, T, -1)
    return output.transpose(1, 2, 3, 0, 4, 5).reshape(B, n_heads, steps, -1).astype(dtype)


def _attend(queries: mx.array, tiles: mx.array, values: mx.array, chosen: np.ndarray) -> Weighted:
    """Queries [R, D] over the chosen ones of tiles [n, T, D], with values [n, T, Dv + 1]."""
    T, found = tiles.shape[1], None
    for index in _strips(chosen, queries.shape[0], T):
        scores = queries @ _gather(tiles, index).T
        strip = Weighted.of(scores, _gather(values, index))
        found = strip if found is None else found.merged(strip)
    if found is not None:
        return found
    rows = queries.shape[0]
    return Weighted(mx.full((rows, 1), HIDDEN), mx.zeros((rows, values.shape[-1])))


def _choose(
    parts: list[mx.array],
    tiles: mx.array,
    keys: mx.array,
    borders: list[int],
    start: int,
    mass: float,
) -> list[np.ndarray]:
    """The tiles of each block of queries: boolean [B, Hkv, far tiles]."""
    B, n_kv, _, T, _ = parts[0].shape
    packed = pack_tiles(tiles) if tiles.shape[2] > 1 else None
    shares: list[mx.array | None] = []
    for i, (part, border) in enumerate(zip(parts, borders, strict=True)):
        if packed is None or border <= T:  # the first tile is always computed
            shares.append(None)
            continue
        near = keys[:, :, border : start + (i + 1) * T]
        shares.append(tile_shares(part, packed, near, border // T))
        mx.async_eval(shares[-1])
    lists = []
    for share, border in zip(shares, borders, strict=True):
        chosen = np.ones((B, n_kv, border // T), bool)
        if share is not None:
            found = np.array(share)
            for row, head in np.ndindex(B, n_kv):
                own = found[row, head]
                chosen[row, head] = choose(own[:-1], float(own[-1]), mass)
        lists.append(chosen)
    return lists


def _strips(chosen: np.ndarray, rows: int, T: int) -> Iterator[np.ndarray]:
    """Chosen tiles by their number, so many at a time as a strip holds."""
    index = np.flatnonzero(chosen)
    width = max(1, STRIP_SCORES // (rows * T))
    for left in range(0, len(index), width):
        yield index[left : left + width]


def _gather(tiles: mx.array, index: np.ndarray) -> mx.array:
    """Tiles [n, T, D] one below the other; neighbours without copying."""
    first, last = int(index[0]), int(index[-1])
    if last - first + 1 == len(index):
        return tiles[first : last + 1].reshape(-1, tiles.shape[-1])
    return tiles[mx.array(index.astype(np.int32))].reshape(-1, tiles.shape[-1])
