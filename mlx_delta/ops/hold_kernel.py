"""Launching ``kernels/delta_hold.metal``: blocks held by a threshold, where keys stay in full.

A kernel's functions come from ``kernels/*.metal``; the body that MLX wraps into a kernel only
declares threadgroup memory and calls one of them. Each kernel is built once. Shapes are checked
before each launch, since a kernel would read past an array's end without a word.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import mlx.core as mx

from mlx_delta.config import DeltaConfig
from mlx_delta.kernels import kernel_source

from .building import make_kernel
from .hold import block_thresholds
from .launching import SAFE_MATH, SIMD, check_shapes, constant, padded
from .storage import HEAD_DIMS, LARGEST

BODY = """
    threadgroup int zeros_of[(D + 31) / 32];
    uint block = threadgroup_position_in_grid.y;
    int first = (place[0] + int(block) % place[2]) * Size;
    delta_hold<S, D, Size, Mean>(
        keys + long(block) * Size * D, thresholds[block], place[1] - first,
        held + long(block) * Size * D, zeros + block, zeros_of, thread_index_in_threadgroup,
        thread_index_in_simdgroup, simdgroup_index_in_threadgroup);
"""


@cache
def hold_kernel() -> Any:
    """delta_hold."""
    return make_kernel(
        name="delta_hold",
        input_names=["keys", "thresholds", "place"],
        output_names=["held", "zeros"],
        source=BODY,
        header=kernel_source("delta_hold.metal"),
        compile_options=SAFE_MATH,
    )


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
    """The kernel for :func:`mlx_delta.ops.hold.hold_blocks`.

    One launch, where operations take several for every token of a block.
    """
    check_shapes("delta_hold", {"keys": (keys, (None, None, None, None))})
    B, H, length, D = keys.shape
    size = config.block_size
    blocks, words = length // size, -(-D // SIMD)
    if blocks * size != length or not blocks or not can_hold(keys, config):
        raise ValueError(
            f"[delta_hold] takes float16 or bfloat16 keys of whole blocks of {size} tokens but "
            f"got {keys.dtype} {tuple(keys.shape)}."
        )
    split = keys.reshape(B, H, blocks, size, D).astype(mx.float32)
    held, zeros = hold_kernel()(
        inputs=[
            padded(keys),
            padded(block_thresholds(split, config)),
            constant((first_block, config.sinks, blocks), mx.int32),
        ],
        template=[
            *(("S", keys.dtype), ("D", D), ("Size", size)),
            ("Mean", config.run_value == "mean"),
        ],
        grid=(SIMD * words, B * H * blocks, 1),
        threadgroup=(SIMD * words, 1, 1),
        output_shapes=[keys.shape, (B, H, blocks)],
        output_dtypes=[keys.dtype, mx.int32],
    )
    return held, zeros
