"""Launching ``kernels/codes_decode.metal``: attention of a few queries over any far keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import mlx.core as mx

from mlx_delta.kernels import kernel_source
from mlx_delta.method.codes import hadamard_size

from .backend import CUDA, backend
from .building import make_kernel
from .far_values import TOKENS, CodedValues
from .launching import LEAST_ELEMENTS, SIMD, constant, filler, gpu_simdgroups

SIMDGROUP_QUERIES = 4
# Simdgroups of a threadgroup. They have nothing to say to each other; side by side they read the
# same keys and values at the same time.
MOST_SIMDGROUPS = 4
THREADGROUP_BYTES = 32768
# Blocks that are worth a split of their own: it writes as much as a quarter of what it reads.
LEAST_BLOCKS = 2

# ROOM: threadgroup memory; FAR: what the far keys are, `far_keys` of the type KEYS. SCALED, PLAIN
# and WEIGHTS: a simdgroup's part of that memory.
BODY = """
    ROOM
    CodedSizes sizes = {
        near_shape[1], queries_shape[1] / near_shape[1], queries_shape[2], near_shape[2],
        near_values_shape[2], value_words_shape[2], value_words_shape[3], n_sinks, window_blocks,
        far_splits, int(threadgroups_per_grid.z), mask_shape[0], mask_shape[2]};
    int heads_of_all = queries_shape[0] * near_shape[1];
    int simdgroup = simdgroup_index_in_threadgroup;
    int lane = thread_index_in_simdgroup;
    int head = int(threadgroup_position_in_grid.y) % heads_of_all;
    typedef KEYS Keys;
    FAR
    codes_decode<T, S, V, Keys, ValueWidths, Group, D, Queries, Bytes, HasSinks, HasMask>(
        queries, far_queries, rows, order, far_keys, sinks, near, near_values, sink_values,
        value_words, scales, heads, mask, scale, sizes, partial, sums, SCALED, PLAIN, WEIGHTS, lane,
        int(threadgroup_position_in_grid.y) / heads_of_all * Simdgroups + simdgroup,
        threadgroup_position_in_grid.z, head);
"""

COMBINE_BODY = """
    threadgroup float row[D];
    uint query = threadgroup_position_in_grid.y;
    int splits = partial_shape[1];
    codes_combine<T, D, Piece>(
        partial + long(query) * splits * D, sums + long(query) * splits * 2, out + long(query) * D,
        splits, coded, row, thread_position_in_threadgroup.x);
"""


def far_kernel(name: str, header: str, inputs: Sequence[str], parts: dict[str, str]) -> Any:
    """The first launch, for far keys of one form.

    Args:
        name: Of the kernel.
        header: The file with its scores.
        inputs: What only such keys have.
        parts: For each word in capitals in ``BODY`` what it stands for.
    """
    body = BODY
    for word, text in parts.items():
        body = body.replace(word, text.strip())
    files = ("codes.h", "steps.h", "codes_scores.h", header, "codes_values.h", "codes_decode.metal")
    return make_kernel(
        name=name,
        input_names=[
            *inputs,
            *("queries", "far_queries", "rows", "order", "sinks", "near", "near_values"),
            *("sink_values", "value_words", "scales", "heads", "mask"),
            *("scale", "n_sinks", "window_blocks", "far_splits"),
        ],
        output_names=["partial", "sums"],
        source=body,
        header="".join(kernel_source(file) for file in dict.fromkeys(files)),
    )


@cache
def combine_kernel() -> Any:
    """codes_combine, the second launch."""
    return make_kernel(
        name="codes_combine",
        input_names=["partial", "sums", "coded"],
        output_names=["out"],
        source=COMBINE_BODY,
        header=kernel_source("codes_combine.metal"),
    )


@dataclass(frozen=True)
class FarInputs:
    """Far keys as a kernel takes them.

    Attributes:
        inputs: What only such keys have.
        template: Likewise.
        order: Each head's channels as they are stored, int32.
        sinks: Exact keys of the first tokens, which are read instead of coded ones; or ``None``.
        places: Room for how many channels a simdgroup's queries take in threadgroup memory, besides
            those of a block's weights.
        queries: They, turned as the keys are, if those are.
    """

    inputs: list[mx.array]
    template: list[tuple[str, Any]]
    order: mx.array
    sinks: mx.array | None
    places: int
    queries: mx.array


def launch(
    kernel: Any,
    far: FarInputs,
    queries: mx.array,
    rows: Sequence[tuple[int, int, int, int]],
    near: mx.array,
    values: CodedValues | mx.array,
    mask: mx.array | None,
    scale: float,
    window_blocks: int,
) -> mx.array:
    """Attention output [B, Hq, L, D] of queries [B, Hq, L, D], all of which was checked.

    Args:
        kernel: Of :func:`far_kernel`.
        far: The far keys.
        queries: As for a kernel's launcher, and so are the rest.
        rows: See there.
        near: See there.
        values: See there.
        mask: See there.
        scale: See there.
        window_blocks: See there.
    """
    B, n_heads, steps, D = queries.shape
    kv_heads = near.shape[1]
    if isinstance(values, CodedValues):
        near_values, piece = values.near, hadamard_size(D)
        words, scales = values.words, values.scales
        group = D * kv_heads // scales.shape[3]
        per_head = [D * width // 32 for width in values.widths]
        heads = [(width, sum(per_head[:h])) for h, width in enumerate(values.widths)]
        value_widths = sum({1 << width for width in values.widths})
    else:
        near_values, piece, group, value_widths = values, 1, D, 0
        words, scales = filler(mx.uint32).reshape(1, 1, 1, -1), filler(mx.uint8)
        heads = [(16, 0)] * kv_heads
    parts = _Parts.of(n_heads // kv_heads * steps, far.places + TOKENS * D // group)
    far_units, near_units = _units(rows, steps, window_blocks)
    has_sinks = far.sinks is not None and far_units > 0
    share = max(1, gpu_simdgroups() // (B * kv_heads * parts.simdgroups * parts.number))
    far_splits = min(share, -(-far_units // LEAST_BLOCKS))
    splits = far_splits + has_sinks + min(share, near_units)
    n_sinks, sinks, sink_values = 0, filler(near.dtype), filler(near_values.dtype)
    if has_sinks and far.sinks is not None:
        n_sinks, sinks = far.sinks.shape[2], far.sinks
        sink_values = values.sinks if isinstance(values, CodedValues) else sink_values
    partial, sums = kernel(
        inputs=[
            *far.inputs,
            *(queries, far.queries, row_numbers(tuple(rows)), far.order, sinks, near, near_values),
            *(sink_values, words, scales, constant((*heads, *[(0, 0)] * 4), mx.int32)),
            *(mask_input(mask), constant(float(scale), mx.float32)),
            constant(n_sinks, mx.int32),
            *(constant(window_blocks, mx.int32), constant(far_splits, mx.int32)),
        ],
        template=[
            *(("T", queries.dtype), ("S", near.dtype), ("V", near_values.dtype)),
            *far.template,
            *(("ValueWidths", value_widths), ("Group", group), ("D", D)),
            *(("Queries", parts.queries), ("Simdgroups", parts.simdgroups)),
            *(("Bytes", backend() == CUDA), ("HasSinks", has_sinks), ("HasMask", mask is not None)),
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


@lru_cache(maxsize=4)
def row_numbers(rows: tuple[tuple[int, ...], ...]) -> mx.array:
    """What the kernel needs to know of each row, int32 [rows, 8]; once for all layers of a step."""
    return mx.array([[*row, *[0] * (8 - len(row))] for row in rows], mx.int32)


def mask_input(mask: mx.array | None) -> mx.array:
    """A boolean mask [1 or B, L, S], or none, as the kernel takes it."""
    if mask is None:
        return filler(mx.bool_).reshape(1, 1, -1)
    if mask.shape[2] >= LEAST_ELEMENTS:
        return mask
    return mx.pad(mask, [(0, 0), (0, 0), (0, LEAST_ELEMENTS - mask.shape[2])])


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
    def of(cls, queries: int, places: int) -> _Parts:
        """The division of so many queries, each of which has so many places.

        As many side by side as threadgroup memory allows.
        """
        total = -(-queries // SIMDGROUP_QUERIES)
        own = -(-queries // total)
        room = 16 * places if own >= 3 else 4 * own * places + 32
        simdgroups = min(total, MOST_SIMDGROUPS, THREADGROUP_BYTES // room)
        return cls(own, simdgroups, -(-total // simdgroups))


def _units(
    rows: Sequence[tuple[int, int, int, int]], steps: int, window_blocks: int
) -> tuple[int, int]:
    """The most far blocks and the most near ones that any row's queries look at."""
    far = near = 0
    for start, stored, _, _ in rows:
        first, last = (max(start + step, 0) // TOKENS for step in (0, steps - 1))
        far = max(far, min(stored, max(last - window_blocks, 0)))
        near = max(near, last + 1 - max(first - window_blocks, 0))
    return far, near
