"""Launching ``kernels/deltas_encode.metal``, which stores blocks of runs by lanes."""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_delta.config import DeltaConfig
from mlx_delta.kernels import kernel_source
from mlx_delta.method.deltas import CHUNK, FITS, LANE

from .building import make_kernel
from .deltas import LaneCoding, StoredDeltas
from .launching import SAFE_MATH, SIMD, check_shapes, constant, padded, table
from .runs_kernel import can_cut, cut_runs
from .sequence_kernel import order_tokens
from .storage import HEAD_DIMS, LARGEST

assert (CHUNK, FITS, LANE) == (16, 4, 8), "as kernels/deltas_encode.metal has them"

BODY = """
    constexpr int W = (D + 31) / 32;
    constexpr int Streams = (Size + 15) / 16 * (D / 8);
    threadgroup float shares[Size];
    threadgroup uint marks[Size * W];
    threadgroup int first_codes[Streams];
    threadgroup int first_bits[Streams + 1];
    threadgroup uchar held_lanes[D / 8];
    threadgroup int runs[W];
    threadgroup uchar codes[Size * D];
    int block = threadgroup_position_in_grid.y;
    int head = threadgroup_position_in_grid.z;
    long from = long(head) * threadgroups_per_grid.y + block;
    int exact = max(min(place[1] - (place[0] + block) * Size, Size - 1), 0);
    deltas_encode<S, D, Size, Room>(
        keys + from * Size * D, exact, starts + from * Size * W, means + from * Size * D,
        tokens + from * Size, places + head % Heads * D, words + from * Room, counts + from,
        zeros + from, low + from * D, steps + from * D, shares, marks, first_codes, first_bits,
        held_lanes, runs, codes, thread_index_in_threadgroup, thread_index_in_simdgroup,
        simdgroup_index_in_threadgroup);
"""


@cache
def deltas_encode_kernel() -> Any:
    """deltas_encode."""
    return make_kernel(
        name="deltas_encode",
        input_names=["keys", "starts", "means", "tokens", "places", "place"],
        output_names=["words", "counts", "zeros", "low", "steps"],
        source=BODY,
        header=kernel_source("rounding.h")
        + kernel_source("steps.h")
        + kernel_source("grids.h")
        + kernel_source("deltas_encode.metal"),
        compile_options=SAFE_MATH,
    )


def can_encode(config: DeltaConfig, head_dim: int) -> bool:
    """Whether the kernels run, and :func:`encode` takes keys of so many channels."""
    return can_cut(config) and head_dim in HEAD_DIMS


def encode(
    keys: mx.array, config: DeltaConfig, coding: LaneCoding, first_block: int
) -> StoredDeltas:
    """The kernels for :func:`mlx_delta.ops.deltas.store_deltas`: three launches for all blocks."""
    sequence, keys = order_tokens(keys, config, first_block)
    runs = cut_runs(keys, config, first_block, alike=True)
    return write(keys, *runs, sequence, config, coding, first_block)


def write(
    keys: mx.array,
    starts: mx.array,
    means: mx.array,
    tokens: mx.array,
    sequence: mx.array,
    config: DeltaConfig,
    coding: LaneCoding,
    first_block: int,
) -> StoredDeltas:
    """The last launch.

    Args:
        keys: [B, Hkv, blocks * size, D], float16 or bfloat16, after RoPE, in sequence.
        starts: Which elements start a run, uint32 [B, Hkv, blocks, size, ceil(D / 32)].
        means: Of the runs, float32 [B, Hkv, blocks, size, D].
        tokens: How much each counts, float32 [B, Hkv, blocks, size].
        sequence: Which tokens they are, uint8 [B, Hkv, blocks, size].
        config: The setting of this layer.
        coding: Of the layer.
        first_block: Which block of the text the first one is.
    """
    check_shapes("deltas_encode", {"keys": (keys, (None,) * 4)})
    B, H, length, D = keys.shape
    size = config.block_size
    blocks = length // size
    if blocks * size != length or not blocks or size > 64 or size % 8 or keys.dtype not in LARGEST:
        raise ValueError(
            f"[deltas_encode] takes float16 or bfloat16 keys of whole blocks of {size} tokens, a "
            f"multiple of 8 up to 64, but got {keys.dtype} {tuple(keys.shape)}."
        )
    if len(coding.order) != H or any(len(order) != D for order in coding.order):
        raise ValueError(f"[deltas_encode] the coding is not of {H} kv heads of {D} channels.")
    W, shape, room = -(-D // SIMD), (B, H, blocks), coding.worst_words(size)
    check_shapes(
        "deltas_encode",
        {
            "starts": (starts, (*shape, size, W)),
            "means": (means, (*shape, size, D)),
            "tokens": (tokens, (*shape, size)),
        },
        {"starts": mx.uint32, "means": mx.float32, "tokens": mx.float32},
    )
    words, counts, zeros, low, steps = deltas_encode_kernel()(
        inputs=[
            padded(keys),
            padded(starts),
            padded(means),
            padded(tokens),
            _places(coding),
            constant((first_block, config.sinks), mx.int32),
        ],
        template=[("S", keys.dtype), ("D", D), ("Size", size), ("Heads", H), ("Room", room)],
        grid=(SIMD * W, blocks, B * H),
        threadgroup=(SIMD * W, 1, 1),
        output_shapes=[(*shape, room), shape, shape, (*shape, D), (*shape, D)],
        output_dtypes=[mx.uint32, mx.int32, mx.int32, keys.dtype, mx.uint8],
    )
    return StoredDeltas(words, counts, zeros, low, steps, sequence)


@lru_cache(maxsize=256)
def _places(coding: LaneCoding) -> mx.array:
    """Channel and width of each place of the order, of all heads, as the kernel takes them."""
    widths = np.repeat(np.array(coding.widths), LANE, axis=1)
    return table((np.array(coding.order) | widths << 8).astype(np.int32))
