"""Kernel or MLX operations, for decode attention and for tiles: decided here, and nowhere else.

A table that was measured on this machine says which is faster for a shape, where there is one.
Without a kernel, or for what the kernel does not take, keys are written out in full and attended to
by MLX's own attention. In decode that writes out every far key for every token; where a kernel is
at hand and still can't be used, a warning says so once, and why.
"""

from __future__ import annotations

import warnings
from functools import cache

import mlx.core as mx

from mlx_delta.cache.step import Step
from mlx_delta.ops import codes_kernel, deltas_kernel, tiles_kernel
from mlx_delta.ops.backend import has_kernels, has_matrices
from mlx_delta.ops.blocks import FarBlocks
from mlx_delta.ops.deltas import DeltaBlocks
from mlx_delta.system.tuning import SPLITS, UNPACK, Shape, decode_path

DECODE_QUERIES = 8  # of a row; for more, prefill attention over keys in full is faster


def decode_blocks(queries: mx.array, step: Step, mask: mx.array | str | None) -> FarBlocks | None:
    """The far blocks that a decode kernel is to read for queries [B, Hq, L, D].

    ``None``: none runs.
    """
    blocks = step.far
    if not isinstance(blocks, FarBlocks) or not has_kernels():
        return None
    if step.steps > DECODE_QUERIES:
        return None
    reason = _refusal(queries, step, blocks) or _mask_refusal(queries, mask)
    if reason is not None:
        _warn(f"decoding without the kernel, over keys written out: {reason}")
        return None
    return None if _measured(queries, step) == UNPACK else blocks


def simdgroups_factor(queries: mx.array, step: Step) -> float:
    """For how many times as many simdgroups the decode kernel is to cut its work."""
    return SPLITS.get(_measured(queries, step) or "", 1.0)


def _measured(queries: mx.array, step: Step) -> str | None:
    """The path that was fastest on this machine, of one query of one text; ``None``: not known."""
    rows, heads, steps, head_dim = queries.shape
    if rows * steps > 1:
        return None  # the kernel reads once for all of them: it was not measured, and gains
    return decode_path(Shape(step.store, heads, step.near.shape[1], head_dim), step.length)


def tiles_by_kernel(queries: mx.array, step: Step, scale: float) -> bool:
    """Whether the kernels choose and compute the tiles of queries [B, Hq, L, D]."""
    if not has_matrices():
        return False
    if step.stored_values.differs:
        _warn("tiles without the kernels: far values are not stored as near ones are")
        return False
    reason = tiles_kernel.refusal(queries, step.stored_values.head_dim, scale)
    if reason is not None:
        _warn(f"tiles without the kernels: {reason}")
    return reason is None


def _refusal(queries: mx.array, step: Step, blocks: FarBlocks) -> str | None:
    """Why the kernel does not take these queries, keys and values; ``None`` if it does."""
    values_dim = step.stored_values.head_dim
    if isinstance(blocks, DeltaBlocks):
        return deltas_kernel.refusal(queries, blocks, values_dim)
    return codes_kernel.refusal(queries, blocks, values_dim)


def _mask_refusal(queries: mx.array, mask: mx.array | str | None) -> str | None:
    """Why the kernels do not take this mask; ``None`` if they do."""
    B, _, steps, _ = queries.shape
    if isinstance(mask, mx.array):
        if mask.dtype != mx.bool_:
            return f"the mask is of type {mask.dtype}, not boolean"
        four = mask if mask.ndim == 4 else mask[None, None]
        if four.ndim != 4 or four.shape[0] not in (1, B) or four.shape[1:3] != (1, steps):
            return f"the mask has shape {tuple(mask.shape)}, not [L, S] or [B, 1, L, S]"
    return None


def kernel_mask(mask: mx.array | str | None) -> mx.array | None:
    """A mask in the form that the kernel takes: boolean [1 or B, L, S], or none at all."""
    if not isinstance(mask, mx.array):
        return None
    return mask[None] if mask.ndim == 2 else mask[:, 0]


@cache
def _warn(reason: str) -> None:
    """Say once for each reason that attention is slower than it could be."""
    warnings.warn(f"[delta_attention] {reason}.", stacklevel=2)
