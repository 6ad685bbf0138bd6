"""Launching ``codes_decode`` for keys as codes of several widths."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any

import mlx.core as mx

from mlx_delta.widths import FIELDS

from .codes import CodedBlocks, Coding
from .far_kernel import FarInputs, far_kernel, launch
from .far_values import CodedValues, check_decode
from .far_values import refusal as values_refusal
from .launching import check_shapes, constant, padded
from .turned import turn

PARTS = {
    "ROOM": """
    constexpr int slots = coded_room<Queries>(coded_slots<Kinds, D>());
    constexpr int weighed = coded_room<Queries>(D / Group * CODED_TOKENS);
    threadgroup float4 scaled[Simdgroups * slots];
    constexpr int plainly = coded_room<Queries>(D);
    threadgroup float4 plain[Simdgroups * plainly];
    threadgroup float4 weights[Simdgroups * weighed];""",
    "KEYS": "CodedFar<S, Kinds, D, Queries, Bytes>",
    "FAR": """
    Keys far_keys;
    far_keys.counts = counts + head % grid_shape[1] * CODED_COUNTS;
    far_keys.word_rows = words_shape[2];
    long first_row = long(head / grid_shape[1]) * words_shape[1] * words_shape[2];
    far_keys.words = words + (first_row + far_keys.counts[CODED_KINDS]) * CODED_TOKENS;
    far_keys.grid = grid + long(head) * words_shape[1] * 2 * D;""",
    "SCALED": "scaled + simdgroup * slots",
    "PLAIN": "plain + simdgroup * plainly",
    "WEIGHTS": "weights + simdgroup * weighed",
}


@cache
def codes_kernel() -> Any:
    """codes_decode, the first launch."""
    return far_kernel("codes_decode", "codes_scores.h", ("counts", "words", "grid"), PARTS)


def refusal(queries: mx.array, blocks: CodedBlocks, value_dim: int) -> str | None:
    """Why the kernel does not take queries [B, Hq, L, D] over such blocks; ``None`` if it does."""
    return values_refusal(queries.shape[3], blocks.words.shape[3], value_dim)


def decode(
    queries: mx.array,
    rows: Sequence[tuple[int, int, int, int]],
    blocks: CodedBlocks,
    near: mx.array,
    values: CodedValues | mx.array,
    mask: mx.array | None,
    scale: float,
    window_blocks: int,
) -> mx.array:
    """Attention output [B, Hq, L, D] of queries [B, Hq, L, D] over coded blocks and near keys.

    Args:
        queries: 1 to 8 of each head, after RoPE.
        rows: For each row the position of its first query, its coded blocks, and the positions of
            its first near key and of its first near value.
        blocks: The coded blocks.
        near: [B, Hkv, room, D], as they are, also where coded keys are turned.
        values: Codes, or values [B, Hkv, capacity, D] as they are.
        mask: boolean [1 or B, L, S], or ``None``; besides causality.
        scale: Factor on the scores.
        window_blocks: Blocks before a query's own that it sees in full.

    Raises:
        ValueError: A shape or count that would make the kernel read past an array's end.
    """
    _check(queries, rows, blocks, near, values, mask, window_blocks)
    far_queries = queries
    if blocks.coding.turned:
        far_queries = turn(queries.astype(mx.float32)).astype(queries.dtype)
    coding = blocks.coding
    counts = tuple(
        (*own, first, 0) for own, first in zip(coding.rows, coding.first_rows, strict=False)
    )
    far = FarInputs(
        inputs=[constant(counts, mx.int32), blocks.words, blocks.grid],
        template=[("Kinds", sum(1 << kind for kind in coding.kinds))],
        order=_order(coding),
        sinks=blocks.sinks,
        # The queries in the order of the words, whose rows are in pairs; and as they are.
        places=2 * queries.shape[3] + sum(2 * kind for kind in coding.kinds),
        queries=far_queries,
    )
    kernel = codes_kernel()
    return launch(kernel, far, queries, rows, near, values, mask, scale, window_blocks)


@lru_cache(maxsize=256)
def _order(coding: Coding) -> mx.array:
    """The order of a layer's channels, as the kernel takes it."""
    return padded(mx.array(coding.order, mx.int32))


def _check(
    queries: mx.array,
    rows: Sequence[tuple[int, int, int, int]],
    blocks: CodedBlocks,
    near: mx.array,
    values: CodedValues | mx.array,
    mask: mx.array | None,
    window_blocks: int,
) -> None:
    """Refuse what would make the kernel read past an array's end."""
    name, D, coding = "codes_decode", blocks.head_dim, blocks.coding
    check_shapes(
        name,
        {"words": (blocks.words, (None,) * 4), "grid": (blocks.grid, (None,) * 5)},
        {"words": mx.uint32},
    )
    B, kv_heads, capacity, _, _ = blocks.grid.shape
    orders = len(coding.order) == kv_heads and all(len(order) == D for order in coding.order)
    pairs = [sum(map(operator.mul, FIELDS, own)) for own in coding.rows]
    if not orders or pairs != [D // 2] * kv_heads:
        raise ValueError(f"[{name}] rows {coding.rows} do not fit {kv_heads} heads of {D}.")
    shapes: dict[str, Any] = {
        "words": (blocks.words, (B, capacity, coding.all_rows, None)),
        "grid": (blocks.grid, (B, kv_heads, capacity, 2, D)),
        "near": (near, (B, kv_heads, None, D)),
    }
    check_shapes(name, shapes, {"near": blocks.dtype})
    shape = (B, kv_heads, capacity, D)
    check_decode(name, shape, blocks.sinks, queries, rows, near, values, mask, window_blocks)
    if (reason := refusal(queries, blocks, D)) is not None:
        raise ValueError(f"[{name}] {reason}.")
