"""Launching ``kernels/delta_encode.metal`` and ``kernels/delta_unpack.metal``.

A kernel's functions come from ``kernels/*.metal``; the body that MLX wraps into a kernel only
declares threadgroup memory and calls one of them. Each kernel is built once. Shapes are checked
before each launch, since a kernel would read past an array's end without a word.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import mlx.core as mx

from mlx_delta.config import DeltaConfig
from mlx_delta.kernels import kernel_source

from .building import make_kernel
from .hold import block_thresholds
from .launching import SAFE_MATH, SIMD, check_shapes, constant, filler, padded
from .pack import HEAD_DIMS, LARGEST, EncodedBlocks, PackedBlocks, worst_words


def _header(name: str) -> str:
    return kernel_source("packed.h") + kernel_source(f"{name}.metal")


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
    return make_kernel(
        name="delta_encode",
        input_names=["keys", "thresholds", "place"],
        output_names=["masks", "payload", "counts", "grid"],
        source=ENCODE_BODY,
        header=_header("delta_encode"),
        compile_options=SAFE_MATH,
    )


def encode(keys: mx.array, config: DeltaConfig, first_block: int) -> EncodedBlocks:
    """The kernel for :func:`mlx_delta.ops.pack.pack_blocks`."""
    if config.key_bits is None:
        raise ValueError("[delta_encode] needs a setting with key_bits.")
    size, bits = config.block_size, int(config.key_bits)
    check_shapes("delta_encode", {"keys": (keys, (None, None, None, None))})
    B, H, length, D = keys.shape
    blocks, words = length // size, -(-D // SIMD)
    if blocks * size != length or not blocks or not D or keys.dtype not in LARGEST:
        raise ValueError(
            f"[delta_encode] takes float16 or bfloat16 keys of whole blocks of {size} tokens but "
            f"got {keys.dtype} {tuple(keys.shape)}."
        )
    shape = (B, H, blocks)
    split = keys.reshape(*shape, size, D).astype(mx.float32)
    grid_shape = (*shape, 2, D) if bits < 16 else (1,)
    masks, payload, counts, grid = encode_kernel()(
        inputs=[
            padded(keys),
            padded(block_thresholds(split, config)),
            constant((first_block, config.sinks, blocks), mx.int32),
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
    return make_kernel(
        name="delta_unpack",
        input_names=["masks", "payload", "offsets", "grid"],
        output_names=["held"],
        source=UNPACK_BODY,
        header=_header("delta_unpack"),
    )


def unpack(packed: PackedBlocks, blocks: int) -> mx.array:
    """The kernel for :func:`mlx_delta.ops.pack.unpack_blocks`, of the first blocks."""
    check_packed("delta_unpack", packed)
    B, H, capacity, rows, words = packed.masks.shape
    D, size = packed.head_dim, rows + 1
    if not 0 < blocks <= capacity:
        raise ValueError(f"[delta_unpack] there are {capacity} blocks but {blocks} are asked for.")
    (held,) = unpack_kernel()(
        inputs=[packed.masks, packed.payload, packed.offsets, _grid(packed)],
        template=[("S", packed.dtype), ("Bits", packed.bits), ("D", D), ("Size", size)],
        grid=(SIMD * words, blocks, B * H),
        threadgroup=(SIMD * words, 1, 1),
        output_shapes=[(B, H, blocks * size, D)],
        output_dtypes=[packed.dtype],
    )
    return held


def can_hold(keys: mx.array, config: DeltaConfig) -> bool:
    """Whether :func:`hold` takes keys [B, Hkv, L, D] under a setting."""
    return (
        config.keyframes
        and config.threshold_mode in ("relative", "absolute")
        and config.block_size % 8 == 0
        and config.block_size <= 64
        and keys.dtype in LARGEST
        and keys.shape[3] in HEAD_DIMS
    )


def hold(keys: mx.array, config: DeltaConfig, first_block: int) -> tuple[mx.array, mx.array]:
    """The kernels for :func:`mlx_delta.ops.hold.hold_blocks`: packed at 16 bits, and unpacked.

    Two launches, where operations take several for every token of a block.
    """
    encoded = encode(keys, replace(config, key_bits=16), first_block)
    B, H, blocks, words = encoded.payload.shape
    offsets = (words * mx.arange(H * blocks, dtype=mx.int32)).reshape(1, H, blocks)
    packed = PackedBlocks(
        masks=encoded.masks,
        payload=encoded.payload.reshape(B, -1),
        offsets=mx.broadcast_to(offsets, (B, H, blocks)),
        grid=None,
        sinks=None,
        bits=16,
        dtype=keys.dtype,
        head_dim=keys.shape[3],
    )
    return unpack(packed, blocks), encoded.counts[..., 1]


def _grid(packed: PackedBlocks) -> mx.array:
    """The grid, or where values are not codes something for the kernel not to look at."""
    return filler(packed.dtype) if packed.grid is None else packed.grid


def check_packed(kernel: str, packed: PackedBlocks) -> None:
    """Refuse packed blocks whose arrays do not fit each other.

    Raises:
        ValueError: They do not; the message names one of them.
    """
    check_shapes(kernel, {"masks": (packed.masks, (None,) * 5)})
    B, H, blocks, rows, _ = packed.masks.shape
    D = packed.head_dim
    codes = packed.bits < 16
    sinks = None if packed.sinks is None else (B, H, None, D)
    check_shapes(
        kernel,
        {
            "masks": (packed.masks, (B, H, blocks, rows, -(-D // SIMD))),
            "payload": (packed.payload, (B, None)),
            "offsets": (packed.offsets, (B, H, blocks)),
            "grid": (packed.grid, (B, H, blocks, 2, D) if codes else None),
            "sinks": (packed.sinks, sinks),
        },
        {
            **{"masks": mx.uint32, "payload": mx.uint32, "offsets": mx.int32},
            **{"grid": packed.dtype, "sinks": packed.dtype},
        },
    )
