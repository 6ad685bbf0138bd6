"""Launching ``kernels/tile_pack.metal``, ``tile_score.metal`` and ``tile_attention.metal``.

The kernels for :func:`mlx_delta.ops.tiles.tile_attention`. Nothing is read back between launches:
lists go from one to the next, and how many tiles were computed is found out when someone asks.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_delta.kernels import kernel_source
from mlx_delta.method.tiles import PACKED_ROWS, POOLED_QUERIES

from .building import make_kernel
from .exact_attention import Far
from .launching import LEAST_ELEMENTS, SIMD, check_shapes, constant, filler
from .tiles import TileCount

_LOG2_E = 1.4426950408889634
TYPES = (mx.float16, mx.bfloat16, mx.float32)
MAX_HEAD_DIM = 256
# More simdgroups to a threadgroup, and each would get fewer registers than a simdgroup needs here.
MAX_SIMDGROUPS = 8
# Registers of a lane that matrices of queries and outputs may take; with those of a strip's scores,
# weights and keys under way it comes to about 110 of 128 then.
MATRIX_REGISTERS = 72
STRIP_KEYS = 32
STRIP_BYTES = 16384  # of threadgroup memory, half of what a threadgroup may take
SCRATCH_BYTES = 1 << 26  # of one scoring launch; more blocks are scored in several


def _header(name: str) -> str:
    return kernel_source("tiles.h") + kernel_source(f"{name}.metal")


PACK_BODY = """
    threadgroup float change[Size];
    threadgroup uint begins[(Size + 31) / 32];
    threadgroup float squares[Pieces * ((D + 31) / 32 + 1)];
    long block = threadgroup_position_in_grid.y;
    long head = threadgroup_position_in_grid.z;
    long to = head * threadgroups_per_grid.y + block;
    tile_pack<T, S, D, Size, Pieces>(
        keys + (head * keys_shape[2] + block * Size) * D, packed + to * Pieces * D,
        bias + to * Pieces, spread + to * Pieces, change, begins, squares,
        thread_index_in_threadgroup, thread_index_in_simdgroup, simdgroup_index_in_threadgroup);
"""

SCORE_BODY = """
    constexpr int rows = Groups * 8 * Rows;
    threadgroup float far_logs[Splits * rows];
    threadgroup float near_logs[Splits * rows];
    threadgroup float sums[2 * Simdgroups];
    long head = threadgroup_position_in_grid.z;
    int blocks = threadgroups_per_grid.y;
    int listed = blocks - 1 - int(threadgroup_position_in_grid.y);
    int room = packed_shape[2];
    ScoreSizes sizes = {
        queries_shape[1] / near_shape[1], queries_shape[2], place[0], place[1], room};
    long at = head * blocks + listed;
    tile_score<T, S, D, Size, Pieces, Pooled, Rows, Groups, Splits, Simdgroups>(
        queries + head * sizes.groups * sizes.queries * D, near + head * near_shape[2] * D,
        packed + head * room * Pieces * D, bias + head * room * Pieces,
        spread + head * room * Pieces, factor, mass, sizes, logs + at * room * rows,
        shares + at * (room + 1), lists + at * room, counts + at, far_logs, near_logs, sums,
        thread_index_in_threadgroup, thread_index_in_simdgroup, simdgroup_index_in_threadgroup,
        place[2] + listed);
"""

ATTENTION_BODY = """
    constexpr int key_quads = Keys * strip_row<T, D>() / QUAD;
    constexpr int value_quads = Keys * strip_row<T, Dv>() / QUAD;
    threadgroup vec<T, 4> key_strip[key_quads];
    threadgroup vec<T, 4> value_strip[value_quads];
    long head = threadgroup_position_in_grid.z;
    int blocks = threadgroups_per_grid.y;
    int room = lists_shape[3];
    TileSizes sizes = {
        queries_shape[1] / near_shape[1], queries_shape[2], place[0], place[1], place[2], place[3],
        room};
    long group = head * sizes.groups * sizes.queries;
    tile_attention<T, D, Dv, Size, Keys, Rows, Simdgroups>(
        queries + group * D, near + head * near_shape[2] * D, far + head * far_shape[2] * D,
        values + head * values_shape[2] * Dv, lists + head * lists_shape[2] * room,
        counts + head * lists_shape[2], factor, sizes, out + group * Dv, key_strip, value_strip,
        thread_index_in_threadgroup, thread_index_in_simdgroup, simdgroup_index_in_threadgroup,
        threadgroup_position_in_grid.x,
        sizes.start / Size + blocks - 1 - int(threadgroup_position_in_grid.y));
"""


@cache
def tile_pack_kernel() -> Any:
    """tile_pack."""
    return make_kernel(
        name="tile_pack",
        input_names=["keys"],
        output_names=["packed", "bias", "spread"],
        source=PACK_BODY,
        header=_header("tile_pack"),
    )


@cache
def tile_score_kernel() -> Any:
    """tile_score."""
    return make_kernel(
        name="tile_score",
        input_names="queries near packed bias spread factor mass place".split(),
        output_names=["logs", "shares", "lists", "counts"],
        source=SCORE_BODY,
        header=_header("tile_score"),
    )


@cache
def tile_attention_kernel() -> Any:
    """tile_attention."""
    return make_kernel(
        name="tile_attention",
        input_names=["queries", "near", "far", "values", "lists", "counts", "factor", "place"],
        output_names=["out"],
        source=ATTENTION_BODY,
        header=_header("tile_attention"),
    )


class Tiles(NamedTuple):
    """What blocks of queries look at.

    Attributes:
        first: The first of the blocks.
        lists: int32 [B, Hkv, blocks, far tiles]; of each block so many tiles as it has chosen.
        counts: int32 [B, Hkv, blocks]; how many these are.
        shares: float32 [B, Hkv, blocks, far tiles + 1]; the expected share of each tile, and of
            the near ones together.
    """

    first: int
    lists: mx.array
    counts: mx.array
    shares: mx.array


def pack(keys: mx.array, blocks: int, size: int) -> tuple[mx.array, mx.array, mx.array]:
    """The first blocks of keys [B, Hkv, blocks * size or more, D], packed for scoring.

    Returns:
        Means [B, Hkv, blocks, R, D], the logarithms of their counts and half their spread, both
        float32 [B, Hkv, blocks, R]; see :class:`mlx_delta.ops.tiles.PackedTiles`.
    """
    B, H, _, D = keys.shape
    threads = -(-D // SIMD) * SIMD
    rows = (B, H, blocks, PACKED_ROWS)
    means, bias, spread = tile_pack_kernel()(
        inputs=[keys],
        template=[
            *(("T", keys.dtype), ("S", score_type(keys.dtype)), ("D", D), ("Size", size)),
            ("Pieces", PACKED_ROWS),
        ],
        grid=(threads, blocks, B * H),
        threadgroup=(threads, 1, 1),
        output_shapes=[(*rows, D), rows, rows],
        output_dtypes=[score_type(keys.dtype), mx.float32, mx.float32],
    )
    return means, bias, spread


def score_type(dtype: mx.Dtype) -> mx.Dtype:
    """The type that scores are computed from: bfloat16 would blur them, float16 overflow."""
    return dtype if dtype == mx.float16 else mx.float32


def choose(
    queries: mx.array,
    keys: mx.array,
    scale: float,
    start: int,
    far: Far,
    scored: tuple[int, int],
    mass: float,
) -> Tiles:
    """The tiles of blocks of queries; arguments as of :func:`tile_attention`."""
    B, n_heads, _, D = queries.shape
    n_kv, size, dtype = keys.shape[1], far.block_size, score_type(queries.dtype)
    first, end = (start + scored[0]) // size, (start + scored[1]) // size
    room = max(1, end - 1 - far.window_blocks)
    packed, bias, spread = pack(far.keys, room, size)
    to_score = n_heads // n_kv * size // POOLED_QUERIES
    rows = 2 if to_score > 8 and D * dtype.size <= 512 else 1
    groups = -(-to_score // (8 * rows))
    splits = max(1, MAX_SIMDGROUPS // groups)
    simdgroups = min(MAX_SIMDGROUPS, groups * splits)
    all_rows = groups * 8 * rows
    at_once = max(1, SCRATCH_BYTES // (4 * B * n_kv * room * all_rows))
    parts = []
    for left in range(first, end, at_once):
        blocks = min(at_once, end - left)
        shape = (B, n_kv, blocks)
        _, *part = tile_score_kernel()(
            inputs=[
                *(queries, keys, packed, bias, spread),
                *(constant(scale * _LOG2_E, mx.float32), constant(float(mass), mx.float32)),
                constant((start, far.window_blocks, left), mx.int32),
            ],
            template=[
                *(("T", queries.dtype), ("S", dtype), ("D", D), ("Size", size)),
                *(("Pieces", PACKED_ROWS), ("Pooled", POOLED_QUERIES), ("Rows", rows)),
                *(("Groups", groups), ("Splits", splits), ("Simdgroups", simdgroups)),
            ],
            grid=(SIMD * simdgroups, blocks, B * n_kv),
            threadgroup=(SIMD * simdgroups, 1, 1),
            output_shapes=[(*shape, room, all_rows), (*shape, room + 1), (*shape, room), shape],
            output_dtypes=[mx.float32, mx.float32, mx.int32, mx.int32],
        )
        parts.append(part)
    if len(parts) > 1:
        parts = [[mx.concatenate(list(arrays), axis=2) for arrays in zip(*parts, strict=True)]]
    shares, lists, counts = parts[0]
    return Tiles(first, lists, counts, shares)


def attend(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    scale: float,
    start: int,
    far: Far,
    tiles: Tiles | None,
) -> mx.array:
    """Attention over the chosen tiles, or all of them where a block has not chosen.

    Arguments as of :func:`tile_attention`, but that ``start`` and ``L`` may be any.
    """
    B, n_heads, steps, D = queries.shape
    n_kv, size, value_dim = keys.shape[1], far.block_size, values.shape[3]
    item = queries.dtype.size
    rows = 2 if 2 * (value_dim // 8 * 2 + D // 8 * item // 2) <= MATRIX_REGISTERS else 1
    strip = STRIP_KEYS
    while strip > 8 and (strip * (D + value_dim) * item > STRIP_BYTES or size % strip):
        strip //= 2
    all_rows = n_heads // n_kv * size
    simdgroups = min(MAX_SIMDGROUPS, -(-all_rows // (8 * rows)))
    parts = -(-all_rows // (8 * rows * simdgroups))
    blocks = -(-(start + steps) // size) - start // size
    if tiles is None:
        first, n_lists, lists = 0, 0, filler(mx.int32).reshape(1, 1, 1, -1)
        counts = filler(mx.int32)
    else:
        first, lists, n_lists = tiles.first, tiles.lists, tiles.lists.shape[2]
        counts = tiles.counts.reshape(-1)
        if counts.size < LEAST_ELEMENTS:
            counts = mx.pad(counts, (0, LEAST_ELEMENTS - counts.size))
        if lists.size < LEAST_ELEMENTS:
            lists = mx.pad(lists, [(0, 0), (0, 0), (0, 0), (0, LEAST_ELEMENTS)])
    (out,) = tile_attention_kernel()(
        inputs=[
            *(queries, keys, far.keys, values, lists, counts),
            constant(scale * _LOG2_E, mx.float32),
            constant((start, far.window_blocks, first, n_lists), mx.int32),
        ],
        template=[
            *(("T", queries.dtype), ("D", D), ("Dv", value_dim), ("Size", size)),
            *(("Keys", strip), ("Rows", rows), ("Simdgroups", simdgroups)),
        ],
        grid=(SIMD * simdgroups * parts, blocks, B * n_kv),
        threadgroup=(SIMD * simdgroups, 1, 1),
        output_shapes=[(B, n_heads, steps, value_dim)],
        output_dtypes=[queries.dtype],
    )
    return out


def tile_attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    scale: float,
    start: int,
    far: Far,
    scored: tuple[int, int],
    mass: float,
    count: TileCount,
) -> mx.array:
    """Attention of queries of which some look at chosen tiles and the others at all.

    Args:
        queries: [B, Hq, L, D]; query ``i`` is at position ``start + i``.
        keys: [B, Hkv, start + L or more, D]; read near each query.
        values: [B, Hkv, start + L or more, Dv].
        scale: Factor on the scores.
        start: Position of the first query.
        far: Keys to choose from, and what is near.
        scored: Queries that choose, from where to where: whole blocks with far tiles.
        mass: Share of the expected attention to reach.
        count: Tiles of the blocks that chose are counted here.

    Returns:
        [B, Hq, L, Dv], of the queries' type; computed in float32.

    Raises:
        ValueError: A shape or count that would make the kernels read past an array's end.
    """
    _check(queries, keys, values, scale, start, far, scored)
    dtype = queries.dtype
    keys, values = keys.astype(dtype), values.astype(dtype)
    far = Far(far.keys.astype(dtype), far.block_size, far.window_blocks)
    tiles = choose(queries, keys, scale, start, far, scored, mass)
    heads, size = keys.shape[0] * keys.shape[1], far.block_size
    borders = [far.border(start + i) // size for i in range(*scored, size)]
    near = [(start + i) // size + 1 - b for i, b in zip(range(*scored, size), borders, strict=True)]
    count.add(tiles.counts, heads * sum(near), heads * (sum(borders) + sum(near)))
    return attend(queries, keys, values, scale, start, far, tiles)


def refusal(queries: mx.array, value_dim: int, scale: float) -> str | None:
    """Why the kernels do not take queries [B, Hq, L, D] and values of ``value_dim``, if so."""
    if not scale > 0:
        return f"the factor on scores is {scale}"
    if queries.dtype not in TYPES:
        return f"queries are of type {queries.dtype}"
    for name, dim in (("keys", queries.shape[3]), ("values", value_dim)):
        if dim % 8 or not 0 < dim <= MAX_HEAD_DIM:
            return f"{name} have dimension {dim}, not a multiple of 8 up to {MAX_HEAD_DIM}"
    return None


def _check(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    scale: float,
    start: int,
    far: Far,
    scored: tuple[int, int],
) -> None:
    """Refuse what would make the kernels read past an array's end."""
    name = "tile_attention"
    check_shapes(name, {"queries": (queries, (None,) * 4), "keys": (keys, (None,) * 4)})
    B, n_heads, steps, D = queries.shape
    n_kv, size = keys.shape[1], far.block_size
    check_shapes(
        name,
        {
            "keys": (keys, (B, n_kv, None, D)),
            "far.keys": (far.keys, (B, n_kv, None, D)),
            "values": (values, (B, n_kv, None, None)),
        },
    )
    if not n_kv or not steps or not n_heads or n_heads % n_kv:
        raise ValueError(f"[{name}] queries {tuple(queries.shape)} do not fit {n_kv} kv heads.")
    if (reason := refusal(queries, values.shape[3], scale)) is not None:
        raise ValueError(f"[{name}] {reason}.")
    if size % PACKED_ROWS or size % POOLED_QUERIES or not size:
        raise ValueError(f"[{name}] block_size must be a multiple of {PACKED_ROWS}, got {size}.")
    length = start + steps
    for what, array in (("keys", keys), ("values", values)):
        if start < 0 or array.shape[2] < length:
            raise ValueError(
                f"[{name}] there are {array.shape[2]} {what} for queries at {start} to {length}."
            )
    if far.keys.shape[2] < far.border(length - 1):
        raise ValueError(
            f"[{name}] there are {far.keys.shape[2]} far keys of {far.border(length - 1)}."
        )
    first, end = start + scored[0], start + scored[1]
    if first % size or end % size or not 0 <= scored[0] < scored[1] <= steps:
        raise ValueError(
            f"[{name}] queries that choose must be whole blocks of {size} but are {first} to {end}."
        )
