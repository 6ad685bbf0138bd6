"""Launching ``kernels/token_sequence.metal``, which puts blocks' tokens in sequence."""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_delta.config import DeltaConfig
from mlx_delta.kernels import kernel_source
from mlx_delta.method.sequence import LEAST_APART, factors, largest_code

from .backend import has_kernels
from .building import make_kernel
from .launching import LEAST_ELEMENTS, SAFE_MATH, SIMD, check_shapes, constant, padded, table

assert float(LEAST_APART) == float(np.float32(1e-30)), "as kernels/token_sequence.metal has it"

# Whose codes fit into a threadgroup's memory, 16 KB.
MOST_HEAD_DIM = 256

BODY = """
    threadgroup uchar codes[Size * token_pitch<D>()];
    int block = threadgroup_position_in_grid.y;
    int head = threadgroup_position_in_grid.z;
    long at = long(head) * threadgroups_per_grid.y + block;
    token_sequence<T, D, Size, Most>(
        keys + at * Size * D, factors + head % Heads * D,
        (place[0] + block) * Size < place[1], sequence + at * Size,
        ordered + at * Size * D, codes, thread_index_in_simdgroup);
"""


@cache
def sequence_kernel() -> Any:
    """token_sequence."""
    files = ("rounding.h", "grids.h", "token_sequence.metal")
    return make_kernel(
        name="token_sequence",
        input_names=["keys", "factors", "place"],
        output_names=["sequence", "ordered"],
        source=BODY,
        header="".join(kernel_source(file) for file in files),
        compile_options=SAFE_MATH,
    )


def can_order(config: DeltaConfig, head_dim: int) -> bool:
    """Whether the kernel runs, and takes blocks of keys of so many channels."""
    fits = LEAST_ELEMENTS <= config.block_size <= 64 and head_dim <= MOST_HEAD_DIM
    return has_kernels() and fits


def order_tokens(
    keys: mx.array, config: DeltaConfig, first_block: int
) -> tuple[mx.array, mx.array]:
    """The kernel for :func:`mlx_delta.ops.sequence.token_sequences`, of all blocks in one launch.

    Args:
        keys: [B, Hkv, blocks * size, D], of any floating type.
        config: The setting of this layer.
        first_block: Which block of the text the first one is.

    Returns:
        The tokens in sequence, uint8 [B, Hkv, blocks, size], and the keys in it, of their shape.
    """
    check_shapes("token_sequence", {"keys": (keys, (None,) * 4)})
    B, H, length, D = keys.shape
    size = config.block_size
    blocks = length // size
    if blocks * size != length or not blocks or not can_order(config, D):
        raise ValueError(
            f"[token_sequence] takes keys of whole blocks of {size} tokens and up to "
            f"{MOST_HEAD_DIM} channels but got {tuple(keys.shape)}."
        )
    sequence, ordered = sequence_kernel()(
        inputs=[
            padded(keys),
            _factors(config, H, D),
            constant((first_block, config.sinks), mx.int32),
        ],
        template=[
            *(("T", keys.dtype), ("D", D), ("Size", size), ("Heads", H)),
            ("Most", largest_code(D)),
        ],
        grid=(SIMD, blocks, B * H),
        threadgroup=(SIMD, 1, 1),
        output_shapes=[(B, H, blocks, size), keys.shape],
        output_dtypes=[mx.uint8, keys.dtype],
    )
    return sequence, ordered


@lru_cache(maxsize=256)
def _factors(config: DeltaConfig, n_heads: int, head_dim: int) -> mx.array:
    """What makes channels comparable, [Hkv * D], of a setting of one layer."""
    return table(factors(config.sensitivities_of_layer(n_heads, head_dim)[0]))
