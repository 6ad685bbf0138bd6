"""Launching ``kernels/ternary_matvec.metal``, the product of a few rows with ternary weights."""

from __future__ import annotations

from functools import cache
from typing import Any

import mlx.core as mx

from mlx_delta.kernels import kernel_source

from .building import make_kernel
from .launching import SIMD, check_shapes

SIMDGROUPS = 8  # of a threadgroup
OUTPUTS = 4 * SIMDGROUPS  # of a threadgroup
MAX_ROWS = 4  # whose activations and sums a thread's registers hold

BODY = """
    threadgroup float largest[Rows * Simdgroups];
    ternary_matvec<T, Rows, Simdgroups, Quantize>(
        x, weight, float(scales[0]), x_shape[1], weight_shape[0], out, largest,
        threadgroup_position_in_grid.x, thread_index_in_simdgroup,
        simdgroup_index_in_threadgroup);
"""


@cache
def matvec_kernel() -> Any:
    """ternary_matvec."""
    return make_kernel(
        name="ternary_matvec",
        input_names=["x", "weight", "scales"],
        output_names=["out"],
        source=BODY,
        header=kernel_source("ternary_matvec.metal"),
    )


def ternary_matvec(x: mx.array, weight: mx.array, scales: mx.array, quantize: bool) -> mx.array:
    """x [rows, in] times the transposed weights; [rows, out] of the type of x.

    Args:
        x: 1 to ``MAX_ROWS`` rows.
        weight: uint32 [out, in / 16], codes as ``ternary.codes.pack_words`` packs them;
            out is a multiple of 4.
        scales: [out, groups]; the first one is the scale of all weights.
        quantize: Whether to round each row of x to int8 first.

    Raises:
        ValueError: A shape that the kernel does not take.
    """
    check_shapes(
        "ternary_matvec",
        {
            "x": (x, (None, None)),
            "weight": (weight, (None, x.shape[-1] // 16)),
            "scales": (scales, (weight.shape[0], None)),
        },
        {"weight": mx.uint32},
    )
    rows, outputs = x.shape[0], weight.shape[0]
    if not 0 < rows <= MAX_ROWS or x.shape[1] % 16 or outputs % 4 or not scales.size:
        raise ValueError(
            f"[ternary_matvec] takes 1 to {MAX_ROWS} rows, inputs in multiples of 16 and outputs "
            f"in multiples of 4 but got x {tuple(x.shape)} and weight {tuple(weight.shape)}."
        )
    (out,) = matvec_kernel()(
        inputs=[x, weight, scales],
        template=[
            *(("T", x.dtype), ("Rows", rows)),
            *(("Simdgroups", SIMDGROUPS), ("Quantize", quantize)),
        ],
        grid=(SIMD * SIMDGROUPS * -(-outputs // OUTPUTS), 1, 1),
        threadgroup=(SIMD * SIMDGROUPS, 1, 1),
        output_shapes=[(rows, outputs)],
        output_dtypes=[x.dtype],
    )
    return out
