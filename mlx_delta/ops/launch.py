"""Launching the Metal kernels: sources, template arguments and grids. Nothing runs without Metal.

A kernel's functions come from ``kernels/*.metal``; the body that MLX wraps into a kernel only
declares threadgroup memory and calls one of them. Each kernel is built once.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import mlx.core as mx

from mlx_delta.config import DeltaConfig
from mlx_delta.kernels import kernel_source

from .hold import block_thresholds
from .pack import EncodedBlocks, PackedBlocks, worst_words

LEAST_ELEMENTS = 8  # smaller inputs reach a kernel as `constant` instead of `device` memory
SIMD = 32  # lanes of a simdgroup
MAX_SIMDGROUPS = 32  # of a threadgroup
# Threadgroups that keep a GPU busy; more splits only add to what the second launch reads.
THREADGROUPS = 256


def _header(name: str) -> str:
    return kernel_source("packed.h") + kernel_source(f"{name}.metal")


def _padded(array: mx.array) -> mx.array:
    """The array as a row, long enough to be `device` memory."""
    flat = array.reshape(-1)
    if flat.size >= LEAST_ELEMENTS:
        return flat
    return mx.concatenate([flat, mx.zeros(LEAST_ELEMENTS - flat.size, flat.dtype)])


ENCODE_BODY = """
    constexpr int W = (D + 31) / 32;
    constexpr int Words = (Size * D + 32 / Bits - 1) / (32 / Bits);
    threadgroup uint words[Size * W];
    threadgroup uint starts[Size * W];
    threadgroup uchar codes[Bits < 16 ? Size * D : 1];
    uint block = threadgroup_position_in_grid.y;
    int first = (place[0] + int(block) % place[2]) * Size;
    delta_encode<S, Bits, D, Size, Mean>(
        keys + long(block) * Size * D, thresholds[block], place[1] - first,
        masks + long(block) * (Size - 1) * W, payload + long(block) * Words, counts + block * 2,
        grid + (Bits < 16 ? long(block) * 2 * D : 0), words, starts, codes,
        thread_index_in_threadgroup, thread_index_in_simdgroup, simdgroup_index_in_threadgroup);
"""


@cache
def encode_kernel() -> Any:
    """delta_encode."""
    return mx.fast.metal_kernel(
        name="delta_encode",
        input_names=["keys", "thresholds", "place"],
        output_names=["masks", "payload", "counts", "grid"],
        source=ENCODE_BODY,
        header=_header("delta_encode"),
    )


def encode(keys: mx.array, config: DeltaConfig, first_block: int) -> EncodedBlocks:
    """The kernel for :func:`mlx_delta.ops.pack.pack_blocks`."""
    B, H, length, D = keys.shape
    assert config.key_bits is not None
    size, bits = config.block_size, config.key_bits
    blocks, words = length // size, -(-D // SIMD)
    shape = (B, H, blocks)
    split = keys.reshape(*shape, size, D).astype(mx.float32)
    grid_shape = (*shape, 2, D) if bits < 16 else (1,)
    masks, payload, counts, grid = encode_kernel()(
        inputs=[
            _padded(keys),
            _padded(block_thresholds(split, config)),
            mx.array([first_block, config.sinks, blocks], mx.int32),
        ],
        template=[
            *(("S", keys.dtype), ("Bits", bits), ("D", D), ("Size", size)),
            ("Mean", config.run_value == "mean"),
        ],
        grid=(SIMD * words, B * H * blocks, 1),
        threadgroup=(SIMD * words, 1, 1),
        output_shapes=[
            (*shape, size - 1, words),
            (*shape, worst_words(size, D, bits)),
            (*shape, 2),
            grid_shape,
        ],
        output_dtypes=[mx.uint32, mx.uint32, mx.int32, keys.dtype],
    )
    return EncodedBlocks(masks, payload, counts, grid if bits < 16 else None)


UNPACK_BODY = """
    constexpr int W = (D + 31) / 32;
    threadgroup uint words[(Size - 1) * W];
    uint block = threadgroup_position_in_grid.y;
    uint head = threadgroup_position_in_grid.z;
    uint row = head / uint(masks_shape[1]);
    long from = long(head) * masks_shape[2] + block;
    delta_unpack<S, Bits, D, Size>(
        masks + from * (Size - 1) * W, payload + long(row) * payload_shape[1] + offsets[from],
        grid + (Bits < 16 ? from * 2 * D : 0),
        held + (long(head) * threadgroups_per_grid.y + block) * Size * D, words,
        thread_index_in_threadgroup, thread_index_in_simdgroup, simdgroup_index_in_threadgroup);
"""


@cache
def unpack_kernel() -> Any:
    """delta_unpack."""
    return mx.fast.metal_kernel(
        name="delta_unpack",
        input_names=["masks", "payload", "offsets", "grid"],
        output_names=["held"],
        source=UNPACK_BODY,
        header=_header("delta_unpack"),
    )


def unpack(packed: PackedBlocks, blocks: int) -> mx.array:
    """The kernel for :func:`mlx_delta.ops.pack.unpack_blocks`, of the first blocks."""
    B, H, _, rows, words = packed.masks.shape
    D, size = packed.head_dim, rows + 1
    (held,) = unpack_kernel()(
        inputs=[packed.masks, packed.payload, packed.offsets, _grid(packed)],
        template=[("S", packed.dtype), ("Bits", packed.bits), ("D", D), ("Size", size)],
        grid=(SIMD * words, blocks, B * H),
        threadgroup=(SIMD * words, 1, 1),
        output_shapes=[(B, H, blocks * size, D)],
        output_dtypes=[packed.dtype],
    )
    return held


def _grid(packed: PackedBlocks) -> mx.array:
    """The grid, or where values are not codes something for the kernel not to look at."""
    return mx.zeros(LEAST_ELEMENTS, packed.dtype) if packed.grid is None else packed.grid


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
    return mx.fast.metal_kernel(
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
    return mx.fast.metal_kernel(
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
    rows: list[tuple[int, int, int]],
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
    """
    B, n_heads, steps, D = queries.shape
    kv_heads, size = blocks.masks.shape[1], blocks.masks.shape[3] + 1
    per_head = n_heads // kv_heads * steps
    simdgroups = -(-per_head // max_queries(D))
    own = -(-per_head // simdgroups)
    tile = next(t for t in (32, 16, 8) if size % t == 0 and t * D <= 4096)
    quantized = value_bits < 16
    unused = mx.zeros(LEAST_ELEMENTS, values[-1].dtype)
    words, scales, biases = values if quantized else (values[0], unused, unused)
    if mask is None:
        masks = mx.zeros((1, 1, LEAST_ELEMENTS), mx.bool_)
    else:
        short = max(0, LEAST_ELEMENTS - mask.shape[2])
        masks = mx.pad(mask, [(0, 0), (0, 0), (0, short)])
    has_sinks = blocks.sinks is not None
    sinks = blocks.sinks if blocks.sinks is not None else mx.zeros(LEAST_ELEMENTS, blocks.dtype)
    # Blocks to read: the packed ones, the window, the query's own and perhaps the next.
    units = max(packed for _, packed, _ in rows) + window_blocks + 2
    splits = max(1, min(units, THREADGROUPS // (B * kv_heads)))
    partial, sums = decode_kernel()(
        inputs=[
            *(queries, mx.array([[*row, 0, 0, 0, 0, 0] for row in rows], mx.int32)),
            *(blocks.masks, blocks.payload, blocks.offsets, _grid(blocks), sinks, near),
            *(words, scales, biases, masks, mx.array(scale, mx.float32)),
            *(mx.array(n_sinks(blocks), mx.int32), mx.array(window_blocks, mx.int32)),
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
            *(("HasSinks", has_sinks), ("HasMask", mask is not None)),
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


def n_sinks(blocks: PackedBlocks) -> int:
    """Tokens whose exact keys are kept beside their codes."""
    return 0 if blocks.sinks is None else blocks.sinks.shape[2]
