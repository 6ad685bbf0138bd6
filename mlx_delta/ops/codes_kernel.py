"""Launching ``kernels/codes_decode.metal``: attention of a few queries, from coded keys."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import mlx.core as mx

from mlx_delta.kernels import kernel_source
from mlx_delta.method.codes import hadamard_size
from mlx_delta.widths import FIELDS, VALUE_WIDTHS

from .codes import CodedBlocks, Coding
from .decode_kernel import mask_input, row_numbers
from .launching import (
    LEAST_ELEMENTS,
    SIMD,
    check_shapes,
    constant,
    filler,
    gpu_simdgroups,
    padded,
)
from .turned import turn

TOKENS = 64  # of a block
SIMDGROUP_QUERIES = 4
HEAD_DIMS = range(16, 257, 8)
# Simdgroups of a threadgroup. They have nothing to say to each other; side by side they read the
# same keys and values at the same time.
MOST_SIMDGROUPS = 4
THREADGROUP_BYTES = 32768
# Blocks that are worth a split of their own: it writes as much as a quarter of what it reads.
LEAST_BLOCKS = 2

BODY = """
    constexpr int slots = coded_room<Queries>(coded_slots<Kinds, D>());
    constexpr int weighed = coded_room<Queries>(D / Group * CODED_TOKENS);
    threadgroup float4 scaled[Simdgroups * slots];
    constexpr int plainly = coded_room<Queries>(D);
    threadgroup float4 plain[Simdgroups * plainly];
    threadgroup float4 weights[Simdgroups * weighed];
    CodedSizes sizes = {
        grid_shape[1], queries_shape[1] / grid_shape[1], queries_shape[2], words_shape[1],
        words_shape[2], near_shape[2], near_values_shape[2], scales_shape[2],
        value_words_shape[3], n_sinks, window_blocks, far_splits, int(threadgroups_per_grid.z),
        mask_shape[0], mask_shape[2]};
    int heads_of_all = queries_shape[0] * grid_shape[1];
    int simdgroup = simdgroup_index_in_threadgroup;
    codes_decode<
        T, S, V, Kinds, ValueWidths, Group, D, Queries, Bytes, HasSinks, HasMask>(
        queries, far_queries, rows, counts, order, words, grid, sinks, near, near_values,
        sink_values, value_words, scales, biases, heads, mask, scale, sizes, partial, sums,
        scaled + simdgroup * slots, plain + simdgroup * plainly, weights + simdgroup * weighed,
        thread_index_in_simdgroup,
        int(threadgroup_position_in_grid.y) / heads_of_all * Simdgroups + simdgroup,
        threadgroup_position_in_grid.z, int(threadgroup_position_in_grid.y) % heads_of_all);
"""


COMBINE_BODY = """
    threadgroup float row[D];
    uint query = threadgroup_position_in_grid.y;
    int splits = partial_shape[1];
    codes_combine<T, D, Piece>(
        partial + long(query) * splits * D, sums + long(query) * splits * 2, out + long(query) * D,
        splits, coded, row, thread_position_in_threadgroup.x);
"""


@dataclass(frozen=True)
class CodedValues:
    """Values as codes far away, turned, and full near.

    Attributes:
        words: uint32 [B, 1, capacity, sum of the heads' words], from token 0 on.
        scales: [B, 1, capacity, Hkv * groups] of the storage type.
        biases: As ``scales``.
        near: [B, Hkv, room, D] of the storage type.
        sinks: [B, Hkv, n_sinks, D], exact values of the first tokens; as many as exact keys.
        widths: Bits of a code of each kv head.
    """

    words: mx.array
    scales: mx.array
    biases: mx.array
    near: mx.array
    sinks: mx.array
    widths: tuple[int, ...]


@cache
def codes_kernel() -> Any:
    """codes_decode, the first launch."""
    files = ("codes.h", "codes_scores.h", "codes_values.h", "codes_decode.metal")
    return mx.fast.metal_kernel(
        name="codes_decode",
        input_names=[
            *("queries", "far_queries", "rows", "counts", "order", "words", "grid", "sinks"),
            *(
                "near",
                "near_values",
                "sink_values",
                "value_words",
                "scales",
                "biases",
                "heads",
                "mask",
            ),
            *("scale", "n_sinks", "window_blocks", "far_splits"),
        ],
        output_names=["partial", "sums"],
        source=BODY,
        header="".join(kernel_source(name) for name in files),
    )


@cache
def combine_kernel() -> Any:
    """codes_combine, the second launch."""
    return mx.fast.metal_kernel(
        name="codes_combine",
        input_names=["partial", "sums", "coded"],
        output_names=["out"],
        source=COMBINE_BODY,
        header=kernel_source("codes_combine.metal"),
    )


def refusal(queries: mx.array, blocks: CodedBlocks, value_dim: int) -> str | None:
    """Why the kernel does not take queries [B, Hq, L, D] over such blocks; ``None`` if it does."""
    D = queries.shape[3]
    if blocks.words.shape[3] != TOKENS:
        return f"coded blocks have {blocks.words.shape[3]} tokens, not {TOKENS}"
    if value_dim != D:
        return f"values have another dimension ({value_dim}) than keys ({D})"
    if D not in HEAD_DIMS:
        return f"the head dimension {D} is not a multiple of 8 up to {HEAD_DIMS[-1]}"
    return None


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
    B, n_heads, steps, D = queries.shape
    kv_heads, coding = blocks.grid.shape[1], blocks.coding
    far_queries = queries
    if blocks.coding.turned:
        far_queries = turn(queries.astype(mx.float32)).astype(queries.dtype)
    if isinstance(values, CodedValues):
        near_values, piece = values.near, hadamard_size(D)
        words, scales, biases = values.words, values.scales, values.biases
        group = D * kv_heads // scales.shape[3]
        per_head = [D * width // 32 for width in values.widths]
        heads = [(width, sum(per_head[:h])) for h, width in enumerate(values.widths)]
        value_widths = sum({1 << width for width in values.widths})
    else:
        near_values, piece, group, value_widths = values, 1, D, 0
        words, scales = filler(mx.uint32).reshape(1, 1, 1, -1), values
        biases = filler(values.dtype)
        heads = [(16, 0)] * kv_heads
    counts = tuple(
        (*rows, first, 0) for rows, first in zip(coding.rows, coding.first_rows, strict=False)
    )
    parts = _Parts.of(n_heads // kv_heads * steps, D, group, coding.kinds)
    far, near_units = _units(rows, steps, window_blocks)
    has_sinks = blocks.sinks is not None and far > 0
    share = max(1, gpu_simdgroups() // (B * kv_heads * parts.simdgroups * parts.number))
    far_splits = min(share, -(-far // LEAST_BLOCKS))
    splits = far_splits + has_sinks + min(share, near_units)
    n_sinks, sinks, sink_values = 0, filler(blocks.dtype), filler(near_values.dtype)
    if has_sinks and blocks.sinks is not None:
        n_sinks, sinks = blocks.sinks.shape[2], blocks.sinks
        sink_values = values.sinks if isinstance(values, CodedValues) else sink_values
    partial, sums = codes_kernel()(
        inputs=[
            *(queries, far_queries),
            row_numbers(tuple(rows)),
            constant(counts, mx.int32),
            *(_order(blocks.coding), blocks.words, blocks.grid, sinks, near, near_values),
            *(sink_values, words, scales, biases, constant((*heads, *[(0, 0)] * 4), mx.int32)),
            *(mask_input(mask), constant(float(scale), mx.float32)),
            constant(n_sinks, mx.int32),
            *(constant(window_blocks, mx.int32), constant(far_splits, mx.int32)),
        ],
        template=[
            *(("T", queries.dtype), ("S", blocks.dtype), ("V", scales.dtype)),
            ("Kinds", sum(1 << kind for kind in coding.kinds)),
            *(("ValueWidths", value_widths), ("Group", group), ("D", D)),
            *(("Queries", parts.queries), ("Simdgroups", parts.simdgroups)),
            *(("Bytes", False), ("HasSinks", has_sinks), ("HasMask", mask is not None)),
        ],
        grid=(SIMD * parts.simdgroups, B * kv_heads * parts.number, splits),
        threadgroup=(SIMD * parts.simdgroups, 1, 1),
        output_shapes=[
            (B * n_heads * steps, splits, D),
            (max(LEAST_ELEMENTS // 2, B * n_heads * steps * splits), 2),
        ],
        output_dtypes=[mx.float32, mx.float32],
    )
    threads = -(-D // SIMD) * SIMD
    (out,) = combine_kernel()(
        inputs=[partial, sums, constant(far_splits, mx.int32)],
        template=[("T", queries.dtype), ("D", D), ("Piece", piece)],
        grid=(threads, B * n_heads * steps, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[queries.shape],
        output_dtypes=[queries.dtype],
    )
    return out


@lru_cache(maxsize=256)
def _order(coding: Coding) -> mx.array:
    """The order of a layer's channels, as the kernel takes it."""
    return padded(mx.array(coding.order, mx.int32))


@dataclass(frozen=True)
class _Parts:
    """How the queries that share a kv head are divided.

    Attributes:
        queries: Of a simdgroup.
        simdgroups: Of a threadgroup.
        number: Threadgroups.
    """

    queries: int
    simdgroups: int
    number: int

    @classmethod
    def of(cls, queries: int, head_dim: int, group: int, kinds: Sequence[int]) -> _Parts:
        """The division of so many queries: as many side by side as threadgroup memory allows."""
        total = -(-queries // SIMDGROUP_QUERIES)
        own = -(-queries // total)
        # The queries in the order of the words, whose rows are in pairs, and the weights.
        places = 2 * head_dim + sum(2 * kind for kind in kinds)
        places += TOKENS * head_dim // group
        room = 16 * places if own >= 3 else 4 * own * places + 32
        simdgroups = min(total, MOST_SIMDGROUPS, THREADGROUP_BYTES // room)
        return cls(own, simdgroups, -(-total // simdgroups))


def _units(
    rows: Sequence[tuple[int, int, int, int]], steps: int, window_blocks: int
) -> tuple[int, int]:
    """The most far blocks and the most near ones that any row's queries look at."""
    far = near = 0
    for start, packed, _, _ in rows:
        first, last = (max(start + step, 0) // TOKENS for step in (0, steps - 1))
        far = max(far, min(packed, max(last - window_blocks, 0)))
        near = max(near, last + 1 - max(first - window_blocks, 0))
    return far, near


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
    pairs = [sum(map(operator.mul, FIELDS, rows)) for rows in coding.rows]
    if not orders or pairs != [D // 2] * kv_heads:
        raise ValueError(f"[{name}] rows {coding.rows} do not fit {kv_heads} heads of {D}.")
    exact = values.near if isinstance(values, CodedValues) else values
    shapes: dict[str, Any] = {
        "queries": (queries, (B, None, None, D)),
        "words": (blocks.words, (B, capacity, coding.all_rows, None)),
        "grid": (blocks.grid, (B, kv_heads, capacity, 2, D)),
        "sinks": (blocks.sinks, None if blocks.sinks is None else (B, kv_heads, None, D)),
        "near": (near, (B, kv_heads, None, D)),
        "values": (exact, (B, kv_heads, None, D)),
    }
    types = {"sinks": blocks.dtype, "near": blocks.dtype}
    check_shapes(name, shapes, types)
    if isinstance(values, CodedValues):
        n_sinks = 0 if blocks.sinks is None else blocks.sinks.shape[2]
        _check_values(name, values, (B, kv_heads, n_sinks, D))
    if (reason := refusal(queries, blocks, D)) is not None:
        raise ValueError(f"[{name}] {reason}.")
    _, n_heads, steps, _ = queries.shape
    if not steps or not n_heads or n_heads % kv_heads:
        raise ValueError(f"[{name}] queries {tuple(queries.shape)} do not fit {kv_heads} kv heads.")
    length = max(start for start, *_ in rows) + steps if rows else 0
    if mask is not None:
        columns = mask.shape[2] if mask.ndim == 3 else None
        check_shapes(name, {"mask": (mask, (None, steps, columns))}, {"mask": mx.bool_})
        if mask.shape[0] not in (1, B) or mask.shape[2] < length:
            raise ValueError(
                f"[{name}] mask must be [1 or {B}, {steps}, {length}] but has shape "
                f"{tuple(mask.shape)}."
            )
    if len(rows) != B:
        raise ValueError(f"[{name}] got numbers of {len(rows)} rows for {B} rows of queries.")
    coded_tokens = (values.words if isinstance(values, CodedValues) else exact).shape[2]
    for start, packed, first, value_first in rows:
        near_from = max(max(start, 0) // TOKENS - window_blocks, 0) * TOKENS
        end = max(start + steps, 1)
        if (
            not 0 <= packed <= capacity
            or packed * TOKENS > coded_tokens
            or max(end - 1, 0) // TOKENS - window_blocks > packed
            or not 0 <= first <= near_from
            or not 0 <= value_first <= near_from
            or end - first > near.shape[2]
            or end - value_first > exact.shape[2]
        ):
            raise ValueError(
                f"[{name}] a row at position {start} with {packed} coded blocks, near keys from "
                f"{first} on and near values from {value_first} on does not fit {capacity} blocks, "
                f"{coded_tokens} coded tokens, {near.shape[2]} near keys and {exact.shape[2]} "
                "near values."
            )


def _check_values(name: str, values: CodedValues, sinks: tuple[int, int, int, int]) -> None:
    B, kv_heads, _, D = sinks
    if len(values.widths) != kv_heads or any(width not in VALUE_WIDTHS for width in values.widths):
        raise ValueError(f"[{name}] widths {values.widths} do not fit {kv_heads} kv heads.")
    tokens = values.words.shape[2] if values.words.ndim == 4 else None
    groups = values.scales.shape[-1]
    if groups % kv_heads or not groups or D % (8 * groups // kv_heads):
        raise ValueError(f"[{name}] {groups} scales do not fit {kv_heads} values of {D}.")
    check_shapes(
        name,
        {
            "sinks": (values.sinks, sinks),
            "words": (values.words, (B, 1, tokens, sum(D * w // 32 for w in values.widths))),
            "scales": (values.scales, (B, 1, tokens, groups)),
            "biases": (values.biases, (B, 1, tokens, groups)),
        },
        {
            **{"words": mx.uint32, "scales": values.near.dtype, "biases": values.near.dtype},
            "sinks": values.near.dtype,
        },
    )
