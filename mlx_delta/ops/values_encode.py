"""Launching ``kernels/values_encode.metal``, which stores turned values as codes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_delta.kernels import kernel_source
from mlx_delta.method.codes import hadamard_size
from mlx_delta.method.values import ALONG, NO_SCALE, SCALES, value_group, value_words
from mlx_delta.widths import VALUE_WIDTHS

from .building import make_kernel
from .launching import SAFE_MATH, SIMD, check_shapes, constant
from .storage import LARGEST
from .turned import Codes

assert (SCALES, ALONG, NO_SCALE) == (4, 64, 255), "as kernels/values_encode.metal has them"

HEAD_DIMS = range(SIMD, 257, SIMD)
SIMDGROUPS = 4  # of a threadgroup

BODY = """
    threadgroup uchar codes[Simdgroups * D];
    int simdgroup = simdgroup_index_in_threadgroup;
    int tokens = values_shape[2];
    int token = int(threadgroup_position_in_grid.y) * Simdgroups + simdgroup;
    if (token >= tokens) {
      return;
    }
    int head = threadgroup_position_in_grid.z;
    int own = head % Heads;
    long stored = long(head / Heads) * tokens + token;
    values_encode<S, D, Group>(
        values + (long(head) * tokens + token) * D, factor, heads[2 * own],
        words + stored * heads[2 * Heads + 1] + heads[2 * own + 1],
        scales + (stored * Heads + own) * (D / Group), codes + simdgroup * D,
        thread_index_in_simdgroup);
"""


@cache
def values_encode_kernel() -> Any:
    """values_encode."""
    files = ("rounding.h", "steps.h", "grids.h", "turning.h", "values_encode.metal")
    return make_kernel(
        name="values_encode",
        input_names=["values", "heads", "factor"],
        output_names=["words", "scales"],
        source=BODY,
        header="".join(kernel_source(file) for file in files),
        compile_options=SAFE_MATH,
    )


def can_encode(head_dim: int) -> bool:
    """Whether :func:`encode` takes values of so many channels."""
    return head_dim in HEAD_DIMS


def encode(values: mx.array, widths: Sequence[int]) -> Codes:
    """The kernel for :func:`mlx_delta.ops.turned.encode_values`: one launch for all heads."""
    check_shapes("values_encode", {"values": (values, (None,) * 4)})
    B, H, L, D = values.shape
    if not can_encode(D) or values.dtype not in LARGEST or not B * H * L:
        raise ValueError(
            f"[values_encode] takes float16 or bfloat16 values of a multiple of {SIMD} channels up "
            f"to {HEAD_DIMS[-1]} but got {values.dtype} {tuple(values.shape)}."
        )
    if len(widths) != H or any(width not in VALUE_WIDTHS for width in widths):
        raise ValueError(f"[values_encode] widths {tuple(widths)} do not fit {H} kv heads.")
    group, per_head = value_group(D), value_words(D, widths)
    firsts = [sum(per_head[:h]) for h in range(H + 1)]
    # The last pair has the words of a token; and there are enough to be in `device` memory.
    heads = (*zip((*widths, 0), firsts, strict=True), *[(0, 0)] * 4)
    words, scales = values_encode_kernel()(
        inputs=[
            values,
            constant(heads, mx.int32),
            constant(float(np.float32(1 / np.sqrt(hadamard_size(D)))), mx.float32),
        ],
        template=[
            *(("S", values.dtype), ("D", D), ("Group", group), ("Heads", H)),
            ("Simdgroups", SIMDGROUPS),
        ],
        grid=(SIMD * SIMDGROUPS, -(-L // SIMDGROUPS), B * H),
        threadgroup=(SIMD * SIMDGROUPS, 1, 1),
        output_shapes=[(B, 1, L, firsts[-1]), (B, 1, L, H * D // group)],
        output_dtypes=[mx.uint32, mx.uint8],
    )
    return words, scales
