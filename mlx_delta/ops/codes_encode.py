"""Launching ``kernels/codes_encode.metal``, which stores whole blocks as codes."""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_delta.kernels import kernel_source
from mlx_delta.method.codes import FITS, MOST_WEIGHT, hadamard_size, slots_of
from mlx_delta.widths import FIELDS

from .building import make_kernel
from .codes import Coding
from .launching import (
    LEAST_ELEMENTS,
    SAFE_MATH,
    SIMD,
    check_shapes,
    constant,
    filler,
    padded,
    table,
)
from .storage import HEAD_DIMS, LARGEST

assert (FITS, MOST_WEIGHT) == (2, 8.0), "as kernels/codes_encode.metal has them"

BODY = """
    threadgroup float means[D];
    threadgroup float steps[D];
    threadgroup float tokens[Size];
    threadgroup float shares[Size];
    threadgroup uchar codes[Size * (D + 4)];
    int block = threadgroup_position_in_grid.y;
    int head = threadgroup_position_in_grid.z;
    int n_blocks = threadgroups_per_grid.y;
    int own = head % Heads;
    int first = first_rows[own];
    long from = long(head) * n_blocks + block;
    long row = (long(head / Heads) * n_blocks + block) * first_rows[Heads] + first;
    codes_encode<S, D, Size, Felt, Turned>(
        keys + from * Size * D, turned + (Turned ? from * Size * D : 0), factor,
        places + own * D, felt + (Felt ? own * 2 * D : 0), rows + first,
        first_rows[own + 1] - first, words + row * Size, grid + from * 2 * D, means, steps,
        tokens, shares, codes,
        thread_index_in_threadgroup, thread_index_in_simdgroup, simdgroup_index_in_threadgroup);
"""


@cache
def codes_encode_kernel() -> Any:
    """codes_encode."""
    return make_kernel(
        name="codes_encode",
        input_names=["keys", "places", "felt", "rows", "first_rows", "factor"],
        output_names=["words", "grid", "turned"],
        source=BODY,
        header=kernel_source("rounding.h")
        + kernel_source("grids.h")
        + kernel_source("turning.h")
        + kernel_source("codes_encode.metal"),
        compile_options=SAFE_MATH,
    )


def can_encode(size: int, head_dim: int) -> bool:
    """Whether :func:`encode` takes blocks of so many tokens and keys of so many channels."""
    return LEAST_ELEMENTS <= size <= 64 and head_dim in HEAD_DIMS


def encode(
    keys: mx.array, coding: Coding, size: int, felt: mx.array | None
) -> tuple[mx.array, mx.array]:
    """The kernel for :func:`mlx_delta.ops.codes.code_blocks`: one launch for all blocks."""
    check_shapes("codes_encode", {"keys": (keys, (None, None, None, None))})
    B, H, length, D = keys.shape
    blocks = length // size if size else 0
    if (
        not can_encode(size, D)
        or blocks * size != length
        or not blocks
        or keys.dtype not in LARGEST
    ):
        raise ValueError(
            f"[codes_encode] takes float16 or bfloat16 keys of whole blocks of {size} tokens but "
            f"got {keys.dtype} {tuple(keys.shape)}."
        )
    if len(coding.order) != H or any(len(order) != D for order in coding.order):
        raise ValueError(f"[codes_encode] the coding is not of {H} kv heads of {D} channels.")
    check_shapes("codes_encode", {"felt": (felt, None if felt is None else (H, 2, D))})
    places, rows, first_rows = _tables(coding)
    words, grid, _ = codes_encode_kernel()(
        inputs=[
            padded(keys),
            places,
            filler(mx.float32) if felt is None else padded(felt),
            rows,
            first_rows,
            constant(float(np.float32(1 / np.sqrt(hadamard_size(D)))), mx.float32),
        ],
        template=[
            *(("S", keys.dtype), ("D", D), ("Size", size), ("Heads", H)),
            *(("Felt", felt is not None), ("Turned", coding.turned)),
        ],
        grid=(SIMD * -(-D // SIMD), blocks, B * H),
        threadgroup=(SIMD * -(-D // SIMD), 1, 1),
        output_shapes=[
            (B, blocks, coding.all_rows, size),
            (B, H, blocks, 2, D),
            keys.shape if coding.turned else (1,),
        ],
        output_dtypes=[mx.uint32, keys.dtype, keys.dtype],
    )
    return words, grid


@lru_cache(maxsize=256)
def _tables(coding: Coding) -> tuple[mx.array, mx.array, mx.array]:
    """Where codes go: channel and width of each place, each row's first one, heads' first rows."""
    places = [
        np.array(order) | slots_of(rows).width << 8
        for order, rows in zip(coding.order, coding.rows, strict=True)
    ]
    own_rows: list[int] = []
    for rows in coding.rows:
        first = 0
        for kind, count in zip(FIELDS, rows, strict=True):
            for _ in range(count):
                own_rows.append(first << 5 | 2 * kind)
                first += 2 * kind
    tables = np.concatenate(places), np.array(own_rows), np.array(coding.first_rows)
    channels, starts, firsts = (table(x.astype(np.int32)) for x in tables)
    return channels, starts, firsts
