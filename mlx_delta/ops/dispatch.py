"""Kernel or MLX operations: the choice, made in one place and explicitly.

With Metal the kernels run; without, their twins do: :mod:`mlx_delta.ops.pack` for packing, and for
decode attention over the unpacked keys, :mod:`mlx_delta.attention.hybrid`.
"""

from __future__ import annotations

import mlx.core as mx

from mlx_delta.config import DeltaConfig
from mlx_delta.ops import launch

from .pack import EncodedBlocks, PackedBlocks, pack_blocks, unpack_blocks, with_sinks

DECODE_QUERIES = 8  # of a row; for more, prefill attention over unpacked keys is faster


def encode_blocks(keys: mx.array, config: DeltaConfig, first_block: int) -> EncodedBlocks:
    """Hold and pack the keys of whole blocks; see :func:`mlx_delta.ops.pack.pack_blocks`."""
    if not mx.metal.is_available() or config.cuts_runs:  # no kernel cuts by cost yet
        return pack_blocks(keys, config, first_block)
    return launch.encode(keys, config, first_block)


def unpack(packed: PackedBlocks, blocks: int) -> mx.array:
    """Held keys of the first blocks, [B, Hkv, blocks * block_size, D] of the storage type."""
    if not mx.metal.is_available():
        return unpack_blocks(packed.first(blocks))
    return with_sinks(launch.unpack(packed, blocks), packed)


def decode_mask(mask: mx.array | str | None, rows: int, steps: int) -> mx.array | None:
    """A mask in the form that the decode kernel takes: boolean [1 or B, L, S], or none at all.

    Raises:
        ValueError: It has another form.
    """
    if not isinstance(mask, mx.array):
        return None
    mask = mask[None, None] if mask.ndim == 2 else mask
    if mask.dtype == mx.bool_ and mask.ndim == 4 and mask.shape[:1] in ((1,), (rows,)):
        if mask.shape[1] == 1 and mask.shape[2] == steps:
            return mask[:, 0]
    raise ValueError(f"[delta_decode] no kernel takes a {mask.dtype} mask of {mask.shape}.")


def has_decode_kernel(
    queries: mx.array, blocks: PackedBlocks | None, value_dim: int, mask: mx.array | str | None
) -> bool:
    """Whether the decode kernel runs for these queries [B, Hq, L, D]."""
    if blocks is None or not mx.metal.is_available():
        return False
    B, n_heads, steps, head_dim = queries.shape
    per_head = n_heads // blocks.masks.shape[1] * steps
    try:
        decode_mask(mask, B, steps)
    except ValueError:
        return False
    return (
        steps <= DECODE_QUERIES
        and value_dim == head_dim
        and per_head <= launch.MAX_SIMDGROUPS * launch.max_queries(head_dim)
    )
