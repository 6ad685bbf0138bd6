"""Launching ``kernels/delta_runs.metal``, which cuts blocks into runs by their costs."""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_delta.config import DeltaConfig
from mlx_delta.kernels import kernel_source
from mlx_delta.method.runs import MOST_STRETCH, STRETCH, run_costs

from .backend import has_kernels
from .building import make_kernel
from .launching import LEAST_ELEMENTS, SAFE_MATH, SIMD, check_shapes, constant, padded, table

assert (STRETCH, MOST_STRETCH) == (0.5, 1.5), "as kernels/delta_runs.metal has them"

BODY = """
    constexpr int W = (D + 31) / 32;
    threadgroup float tokens[Size];
    threadgroup float looked_at[Size];
    threadgroup float total[Size + 1];
    threadgroup float sums[Optimal ? (Size + 1) * 32 : 1];
    threadgroup float before[Optimal ? (Size + 1) * 32 : 1];
    threadgroup uchar begins[Optimal ? (Size + 1) * 32 : 1];
    int block = threadgroup_position_in_grid.y;
    int head = threadgroup_position_in_grid.z;
    long at = long(head) * threadgroups_per_grid.y + block;
    int sinks = max(min(place[1] - (place[0] + block) * Size, Size), 0);
    const device float* own = felt + head % Heads * D;
    delta_runs<T, D, Size, Optimal>(
        keys + at * Size * D, Alike ? min(sinks, Size - 1) : 0, Alike ? 0 : sinks,
        own, own + Heads * D, own + 2 * Heads * D, starts + at * Size * W, means + at * Size * D,
        counts + at * Size, tokens, looked_at, total, sums, before, begins,
        threadgroup_position_in_grid.x, thread_index_in_simdgroup);
"""


@cache
def runs_kernel() -> Any:
    """delta_runs."""
    return make_kernel(
        name="delta_runs",
        input_names=["keys", "felt", "place"],
        output_names=["starts", "means", "counts"],
        source=BODY,
        header=kernel_source("rounding.h")
        + kernel_source("grids.h")
        + kernel_source("delta_runs.metal"),
        compile_options=SAFE_MATH,
    )


def can_cut(config: DeltaConfig) -> bool:
    """Whether the kernel runs, and cuts blocks under a setting of one layer."""
    return has_kernels() and LEAST_ELEMENTS <= config.block_size <= 64 and config.run_level > 0


def cut_runs(
    keys: mx.array, config: DeltaConfig, first_block: int, alike: bool = False
) -> tuple[mx.array, mx.array, mx.array]:
    """Where runs start, their means and how much tokens count: of whole blocks, in one launch.

    Args:
        keys: [B, Hkv, blocks * size, D], of any floating type.
        config: The setting of this layer, with runs that are optimal or greedy.
        first_block: Which block of the text the first one is.
        alike: The first tokens of the text (sinks) are as the one after them; otherwise they stand
            alone.

    Returns:
        Which elements start a run, a bit for each channel, uint32 [B, Hkv, blocks, size,
        ceil(D / 32)]; the means, float32 [B, Hkv, blocks, size, D]; and how much each token counts,
        float32 [B, Hkv, blocks, size].
    """
    check_shapes("delta_runs", {"keys": (keys, (None,) * 4)})
    B, H, length, D = keys.shape
    size = config.block_size
    blocks, words = length // size, -(-D // SIMD)
    if blocks * size != length or not blocks or not can_cut(config):
        raise ValueError(
            f"[delta_runs] takes keys of whole blocks of {size} tokens and a level above 0 but got "
            f"{tuple(keys.shape)} and {config.run_level}."
        )
    starts, means, counts = runs_kernel()(
        inputs=[
            padded(keys),
            _felt(config, H, D),
            constant((first_block, config.sinks), mx.int32),
        ],
        template=[
            *(("T", keys.dtype), ("D", D), ("Size", size), ("Heads", H), ("Alike", alike)),
            ("Optimal", config.threshold_mode == "optimal"),
        ],
        grid=(SIMD * words, blocks, B * H),
        threadgroup=(SIMD, 1, 1),
        output_shapes=[(B, H, blocks, size, words), (B, H, blocks, size, D), (B, H, blocks, size)],
        output_dtypes=[mx.uint32, mx.float32, mx.float32],
    )
    return starts, means, counts


def elements(starts: mx.array, head_dim: int) -> mx.array:
    """Which elements start a run, boolean [.., size, D], of words [.., size, ceil(D / 32)]."""
    bits = (starts[..., None] >> mx.arange(SIMD, dtype=mx.uint32)) & 1
    return bits.reshape(*starts.shape[:-1], -1)[..., :head_dim] > 0


@lru_cache(maxsize=256)
def _felt(config: DeltaConfig, n_heads: int, head_dim: int) -> mx.array:
    """Weights, salience and what a run costs, [3 * Hkv * D], of a setting of one layer."""
    weights, salience = config.sensitivities_of_layer(n_heads, head_dim)
    parts = np.stack([weights, salience, run_costs(weights, config.run_level)])
    return table(parts.astype(np.float32))
