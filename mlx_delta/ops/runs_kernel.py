"""Launching ``kernels/delta_runs.metal``, which cuts blocks into runs by their costs."""

from __future__ import annotations

from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_delta.kernels import kernel_source

from .backend import has_kernels
from .building import make_kernel
from .launching import LEAST_ELEMENTS, SAFE_MATH, SIMD

BODY = """
    constexpr int W = (D + 31) / 32;
    threadgroup float total[Size + 1];
    threadgroup float sums[Optimal ? (Size + 1) * 32 : 1];
    threadgroup float before[Optimal ? (Size + 1) * 32 : 1];
    threadgroup uchar begins[Optimal ? (Size + 1) * 32 : 1];
    long block = threadgroup_position_in_grid.y;
    delta_runs<D, Size, Optimal>(
        keys + block * Size * D, tokens + block * Size, costs + block * D, sinks[block],
        starts + block * Size * W, means + block * Size * D, total, sums, before, begins,
        threadgroup_position_in_grid.z, thread_index_in_simdgroup);
"""


@cache
def runs_kernel() -> Any:
    """delta_runs."""
    return make_kernel(
        name="delta_runs",
        input_names=["keys", "tokens", "costs", "sinks"],
        output_names=["starts", "means"],
        source=BODY,
        header=kernel_source("rounding.h") + kernel_source("delta_runs.metal"),
        compile_options=SAFE_MATH,
    )


def has_runs_kernel(block_size: int) -> bool:
    """Whether the kernel runs for blocks of so many tokens."""
    return has_kernels() and LEAST_ELEMENTS <= block_size


def cut_runs(
    keys: mx.array, tokens: mx.array, costs: mx.array, sinks: np.ndarray, optimal: bool
) -> tuple[mx.array, mx.array]:
    """Means, float32, and which elements start a run, boolean, both [M, n, D].

    Args:
        keys: float32 [M, n, D], the blocks of all heads and rows; n is 8 to 64.
        tokens: float32 [M, n], how much each token counts.
        costs: float32 [M, D], what a run of each channel costs.
        sinks: [M], tokens of each block that stand alone, from its first on.
        optimal: Rather than greedy.
    """
    M, size, D = keys.shape
    words = -(-D // SIMD)
    alone = np.zeros(max(M, LEAST_ELEMENTS), np.int32)
    alone[:M] = sinks
    starts, means = runs_kernel()(
        inputs=[keys, tokens, costs, mx.array(alone)],
        template=[("D", D), ("Size", size), ("Optimal", optimal)],
        grid=(SIMD, M, words),
        threadgroup=(SIMD, 1, 1),
        output_shapes=[(M, size, words), (M, size, D)],
        output_dtypes=[mx.uint32, mx.float32],
    )
    bits = (starts[..., None] >> mx.arange(SIMD, dtype=mx.uint32)) & 1
    return means, bits.reshape(M, size, -1)[..., :D] > 0
