"""Launching ``kernels/delta_decode.metal``: attention of a few queries, from packed blocks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any

import mlx.core as mx

from mlx_delta.kernels import kernel_source

from .building import make_kernel
from .launching import LEAST_ELEMENTS, SIMD, check_shapes, constant, filler
from .pack import PackedBlocks
from .pack_kernel import check_packed

MAX_SIMDGROUPS = 32  # of a threadgroup
# Threadgroups that keep a GPU busy; more splits only add to what the second launch reads.
THREADGROUPS = 256


def _header(name: str) -> str:
    return kernel_source("packed.h") + kernel_source(f"{name}.metal")


DECODE_BODY = """
    constexpr int W = (D + 31) / 32;
    threadgroup uint mask_words[(Size - 1) * W];
    threadgroup uint starts[Size + 1];
    threadgroup uint key_words[Tile * D / 2 + 1];
    threadgroup Stored staged_values[ValueBits < 16 ? Tile * D * ValueBits / 32 : Tile * D];
    threadgroup V value_scales[ValueBits < 16 ? Tile * D / Group : 1];
    threadgroup V value_biases[ValueBits < 16 ? Tile * D / Group : 1];
    DecodeSizes sizes = {
        masks_shape[1], queries_shape[1] / masks_shape[1], queries_shape[2], masks_shape[2],
        payload_shape[1], near_shape[2], values_shape[2], n_sinks, window_blocks,
        int(threadgroups_per_grid.y), mask_shape[0], mask_shape[2]};
    delta_decode<
        T, S, V, Stored, Bits, ValueBits, Group, D, Size, Tile, Queries, HasSinks, HasMask>(
        queries, rows, masks, payload, offsets, grid, sinks, near, values, scales,
        biases, mask, scale, sizes, partial, sums, mask_words, starts, key_words,
        staged_values, value_scales, value_biases, thread_index_in_threadgroup,
        threads_per_threadgroup.x, thread_index_in_simdgroup, simdgroup_index_in_threadgroup,
        threadgroup_position_in_grid.y, threadgroup_position_in_grid.z);
"""

REDUCE_BODY = """
    uint query = threadgroup_position_in_grid.y;
    int splits = partial_shape[1];
    delta_decode_reduce<T, D>(
        partial + long(query) * splits * D, sums + long(query) * splits * 2, out + long(query) * D,
        splits, thread_position_in_threadgroup.x);
"""


@cache
def decode_kernel() -> Any:
    """delta_decode, the first launch."""
    return make_kernel(
        name="delta_decode",
        input_names=[
            *("queries", "rows", "masks", "payload", "offsets", "grid", "sinks", "near"),
            *("values", "scales", "biases", "mask", "scale", "n_sinks", "window_blocks"),
        ],
        output_names=["partial", "sums"],
        source=DECODE_BODY,
        header=_header("delta_decode"),
    )


@cache
def reduce_kernel() -> Any:
    """delta_decode, the second launch."""
    return make_kernel(
        name="delta_decode_reduce",
        input_names=["partial", "sums"],
        output_names=["out"],
        source=REDUCE_BODY,
        header=_header("delta_decode"),
    )


def max_queries(head_dim: int) -> int:
    """Queries of one simdgroup: as many as its registers hold."""
    return 8 if head_dim <= 128 else 4


def decode(
    queries: mx.array,
    rows: Sequence[tuple[int, int, int]],
    blocks: PackedBlocks,
    near: mx.array,
    values: tuple[mx.array, ...],
    value_bits: int,
    mask: mx.array | None,
    scale: float,
    window_blocks: int,
) -> mx.array:
    """Attention output [B, Hq, L, D] of queries [B, Hq, L, D] over packed blocks and near keys.

    Args:
        queries: 1 to 8 of each head, after RoPE.
        rows: For each row the position of its first query, its packed blocks, and the position
            of its first near key.
        blocks: The packed blocks.
        near: [B, Hkv, room, D].
        values: [B, Hkv, capacity, D], or words, scales and biases.
        value_bits: 8 or 4 for quantized values, otherwise those of their type.
        mask: boolean [1 or B, L, S], or ``None``; besides causality.
        scale: Factor on the scores.
        window_blocks: Blocks before a query's own that it sees in full.

    Raises:
        ValueError: A shape or count that would make the kernel read past an array's end.
    """
    _check(queries, rows, blocks, near, values, value_bits, mask, window_blocks)
    B, n_heads, steps, D = queries.shape
    kv_heads, size = blocks.masks.shape[1], blocks.masks.shape[3] + 1
    per_head = n_heads // kv_heads * steps
    simdgroups = -(-per_head // max_queries(D))
    own = -(-per_head // simdgroups)
    tile = next(t for t in (32, 16, 8) if size % t == 0 and t * D <= 4096)
    quantized = value_bits < 16
    unused = filler(values[-1].dtype)
    words, scales, biases = values if quantized else (values[0], unused, unused)
    masks = mask_input(mask)
    grid = filler(blocks.dtype) if blocks.grid is None else blocks.grid
    sinks = filler(blocks.dtype) if blocks.sinks is None else blocks.sinks
    # Blocks to read: the packed ones, the window, the query's own and perhaps the next.
    units = max(packed for _, packed, _ in rows) + window_blocks + 2
    splits = max(1, min(units, THREADGROUPS // (B * kv_heads)))
    partial, sums = decode_kernel()(
        inputs=[
            *(queries, row_numbers(tuple(rows))),
            *(blocks.masks, blocks.payload, blocks.offsets, grid, sinks, near),
            *(words, scales, biases, masks, constant(float(scale), mx.float32)),
            *(constant(n_sinks(blocks), mx.int32), constant(window_blocks, mx.int32)),
        ],
        template=[
            *(
                ("T", queries.dtype),
                ("S", blocks.dtype),
                ("V", scales.dtype),
                ("Stored", words.dtype),
            ),
            *(("Bits", blocks.bits), ("ValueBits", value_bits)),
            ("Group", D // scales.shape[3] if quantized else D),
            *(("D", D), ("Size", size), ("Tile", tile), ("Queries", own)),
            *(("HasSinks", blocks.sinks is not None), ("HasMask", mask is not None)),
        ],
        grid=(SIMD * simdgroups, splits, B * kv_heads),
        threadgroup=(SIMD * simdgroups, 1, 1),
        output_shapes=[
            (B * n_heads * steps, splits, D),
            (max(LEAST_ELEMENTS // 2, B * n_heads * steps * splits), 2),
        ],
        output_dtypes=[mx.float32, mx.float32],
    )
    threads = -(-D // SIMD) * SIMD
    (out,) = reduce_kernel()(
        inputs=[partial, sums],
        template=[("T", queries.dtype), ("D", D)],
        grid=(threads, B * n_heads * steps, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[queries.shape],
        output_dtypes=[queries.dtype],
    )
    return out


@lru_cache(maxsize=4)
def row_numbers(rows: tuple[tuple[int, ...], ...]) -> mx.array:
    """What the kernel needs to know of each row, int32 [rows, 8]; once for all layers of a step."""
    return mx.array([[*row, *[0] * (8 - len(row))] for row in rows], mx.int32)


def mask_input(mask: mx.array | None) -> mx.array:
    """A boolean mask [1 or B, L, S], or none, as the kernel takes it."""
    if mask is None:
        return filler(mx.bool_).reshape(1, 1, -1)
    if mask.shape[2] >= LEAST_ELEMENTS:
        return mask
    return mx.pad(mask, [(0, 0), (0, 0), (0, LEAST_ELEMENTS - mask.shape[2])])


def _check(
    queries: mx.array,
    rows: Sequence[tuple[int, int, int]],
    blocks: PackedBlocks,
    near: mx.array,
    values: tuple[mx.array, ...],
    value_bits: int,
    mask: mx.array | None,
    window_blocks: int,
) -> None:
    """Refuse what would make the kernel read past an array's end."""
    name = "delta_decode"
    check_packed(name, blocks)
    B, kv_heads, capacity, size, _ = blocks.masks.shape
    size, D = size + 1, blocks.head_dim
    check_shapes(
        name,
        {"queries": (queries, (B, None, None, D)), "near": (near, (B, kv_heads, None, D))},
        {"near": blocks.dtype},
    )
    _, n_heads, steps, _ = queries.shape
    if not steps or not n_heads or n_heads % kv_heads:
        raise ValueError(f"[{name}] queries {tuple(queries.shape)} do not fit {kv_heads} kv heads.")
    if n_heads // kv_heads * steps > MAX_SIMDGROUPS * max_queries(D):
        raise ValueError(
            f"[{name}] takes at most {MAX_SIMDGROUPS * max_queries(D)} queries of a kv head but "
            f"got {n_heads // kv_heads * steps}."
        )
    quantized = value_bits < 16
    if len(values) != (3 if quantized else 1):
        raise ValueError(f"[{name}] {value_bits}-bit values are not {len(values)} arrays.")
    length = max(start for start, _, _ in rows) + steps if rows else 0
    tokens = values[0].shape[2] if values[0].ndim == 4 else None
    columns = D * value_bits // 32 if quantized else D
    shapes: dict[str, Any] = {"values": (values[0], (B, kv_heads, tokens, columns))}
    if quantized:
        groups = values[1].shape[-1]
        shapes["scales"] = (values[1], (B, kv_heads, tokens, groups))
        shapes["biases"] = (values[2], (B, kv_heads, tokens, groups))
        if not groups or D % groups:
            raise ValueError(f"[{name}] {groups} scales do not fit values of {D}.")
    if mask is not None:
        shapes["mask"] = (mask, (mask.shape[0], steps, None))
    check_shapes(name, shapes, {"mask": mx.bool_} if mask is not None else None)
    if tokens is not None and tokens < length:
        raise ValueError(f"[{name}] there are {tokens} values for {length} tokens.")
    if mask is not None and (mask.shape[0] not in (1, B) or mask.shape[2] < length):
        raise ValueError(
            f"[{name}] mask must be [1 or {B}, {steps}, {length}] but has shape "
            f"{tuple(mask.shape)}."
        )
    if len(rows) != B:
        raise ValueError(f"[{name}] got numbers of {len(rows)} rows for {B} rows of queries.")
    for start, packed, first in rows:
        near_from = max(max(start, 0) // size - window_blocks, 0) * size
        if (
            not 0 <= packed <= capacity
            or first > near_from
            or start + steps - first > near.shape[2]
        ):
            raise ValueError(
                f"[{name}] a row at position {start} with {packed} packed blocks and near keys "
                f"from {first} on does not fit {capacity} blocks and {near.shape[2]} near keys."
            )


def n_sinks(blocks: PackedBlocks) -> int:
    """Tokens whose exact keys are kept beside their codes."""
    return 0 if blocks.sinks is None else blocks.sinks.shape[2]
