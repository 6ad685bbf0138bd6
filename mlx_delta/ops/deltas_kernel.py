"""Launching ``deltas_decode``: attention of a few queries, from held keys that lanes have."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any

import mlx.core as mx

from mlx_delta.method.deltas import LANE

from .deltas import DeltaBlocks, LaneCoding
from .far_kernel import FarInputs, far_kernel, launch
from .far_values import TOKENS, CodedValues, check_decode
from .far_values import refusal as values_refusal
from .launching import SIMD, check_shapes, padded

NARROW = 4  # bits of a code, of which eight are in 32

PARTS = {
    "ROOM": """
    constexpr int scored = coded_room<Queries>(delta_scores_room<D>());
    constexpr int plainly = coded_room<Queries>(D);
    // Sums of lanes while scores are computed, and weights after it.
    constexpr int summed = coded_room<Queries>(delta_shared<D, Group>());
    threadgroup float4 scores[Simdgroups * scored];
    threadgroup float4 plain[Simdgroups * plainly];
    threadgroup float4 shared_room[Simdgroups * summed];""",
    "KEYS": "DeltaFar<S, D, Queries, Wide>",
    "FAR": """
    Keys far_keys;
    far_keys.payload = payload + long(head / near_shape[1]) * payload_shape[1];
    far_keys.offsets = offsets + long(head) * low_shape[2];
    far_keys.low = low + long(head) * low_shape[2] * D;
    far_keys.steps = steps + long(head) * low_shape[2] * D;
    far_keys.sequence = sequence + long(head) * low_shape[2] * 64;
    far_keys.sums = shared_room + simdgroup * summed;
    far_keys.scores = scores + simdgroup * scored;
    far_keys.width = widths[head % near_shape[1] * (D / 8) + lane % (D / 8)];""",
    "SCALED": "plain + simdgroup * plainly",
    "PLAIN": "plain + simdgroup * plainly",
    "WEIGHTS": "shared_room + simdgroup * summed",
}


@cache
def deltas_kernel() -> Any:
    """deltas_decode, the first launch."""
    inputs = ("widths", "payload", "offsets", "low", "steps", "sequence")
    return far_kernel("deltas_decode", "deltas_scores.h", inputs, PARTS)


def refusal(queries: mx.array, blocks: DeltaBlocks, value_dim: int) -> str | None:
    """Why the kernel does not take queries [B, Hq, L, D] over such blocks; ``None`` if it does."""
    return values_refusal(queries.shape[3], blocks.size, value_dim)


def decode(
    queries: mx.array,
    rows: Sequence[tuple[int, int, int, int]],
    blocks: DeltaBlocks,
    near: mx.array,
    values: CodedValues | mx.array,
    mask: mx.array | None,
    scale: float,
    window_blocks: int,
) -> mx.array:
    """Attention output [B, Hq, L, D] of queries [B, Hq, L, D] over held blocks and near keys.

    Args:
        queries: 1 to 8 of each head, after RoPE.
        rows: For each row the position of its first query, its far blocks, and the positions of
            its first near key and of its first near value.
        blocks: The far blocks.
        near: [B, Hkv, room, D].
        values: Codes, or values [B, Hkv, capacity, D] as they are.
        mask: boolean [1 or B, L, S], or ``None``; besides causality.
        scale: Factor on the scores.
        window_blocks: Blocks before a query's own that it sees in full.

    Raises:
        ValueError: A shape or count that would make the kernel read past an array's end.
    """
    _check(queries, rows, blocks, near, values, mask, window_blocks)
    order, widths = _lanes(blocks.coding)
    most = max(max(own) for own in blocks.coding.widths)
    far = FarInputs(
        inputs=[
            *(widths, blocks.payload, padded(blocks.offsets)),
            *(blocks.low, blocks.steps, blocks.sequence),
        ],
        template=[("Wide", most > NARROW)],
        order=order,
        sinks=blocks.sinks,
        places=_places(queries.shape[3]),
        queries=queries,
    )
    return launch(deltas_kernel(), far, queries, rows, near, values, mask, scale, window_blocks)


@lru_cache(maxsize=256)
def _lanes(coding: LaneCoding) -> tuple[mx.array, mx.array]:
    """The order of a layer's channels, and the widths of its lanes, as the kernel takes them."""
    return padded(mx.array(coding.order, mx.int32)), padded(mx.array(coding.widths, mx.int32))


def _places(head_dim: int) -> int:
    """Room for queries in their order, for scores of the blocks at once, and for sums of lanes."""
    ahead = 4 if head_dim <= 64 else SIMD * LANE // head_dim
    return head_dim + ahead * TOKENS + 8 * 33


def _check(
    queries: mx.array,
    rows: Sequence[tuple[int, int, int, int]],
    blocks: DeltaBlocks,
    near: mx.array,
    values: CodedValues | mx.array,
    mask: mx.array | None,
    window_blocks: int,
) -> None:
    """Refuse what would make the kernel read past an array's end."""
    name, coding = "deltas_decode", blocks.coding
    check_shapes(name, {"low": (blocks.low, (None,) * 4)})
    B, kv_heads, capacity, D = blocks.low.shape
    orders = len(coding.order) == kv_heads and all(len(order) == D for order in coding.order)
    if not orders or any(len(own) != D // LANE for own in coding.widths):
        raise ValueError(f"[{name}] widths of lanes do not fit {kv_heads} heads of {D}.")
    shapes: dict[str, Any] = {
        "payload": (blocks.payload, (B, None)),
        "offsets": (blocks.offsets, (B, kv_heads, capacity)),
        "steps": (blocks.steps, (B, kv_heads, capacity, D)),
        "sequence": (blocks.sequence, (B, kv_heads, capacity, blocks.size)),
        "near": (near, (B, kv_heads, None, D)),
    }
    types = {"payload": mx.uint32, "offsets": mx.int32, "steps": mx.uint8, "near": blocks.dtype}
    types["sequence"] = mx.uint8
    check_shapes(name, shapes, types)
    shape = (B, kv_heads, capacity, D)
    check_decode(name, shape, blocks.sinks, queries, rows, near, values, mask, window_blocks)
    if (reason := refusal(queries, blocks, D)) is not None:
        raise ValueError(f"[{name}] {reason}.")
