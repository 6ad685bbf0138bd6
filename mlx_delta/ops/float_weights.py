"""Products with quantized weights where there is no GPU: through float32.

MLX's quantized product on a CPU works row by row, one multiply at a time: a weight costs about
1.1 ns for each row. Writing it out as float32 costs 4 ns, once, and a BLAS then takes a fraction of
a nanosecond for a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

# From this many rows on, writing the weights out for one product alone is faster than MLX's
# quantized product: measured for 2, 4 and 8 bits at 576 x 1,536 and 4,096 x 4,096.
LEAST_ROWS = 6
# Weights written out at once, 1 MB of float32: they stay in the processor's cache.
CHUNK = 1 << 18


@dataclass(frozen=True)
class Packing:
    """How ``mx.quantize`` packed a weight."""

    group_size: int
    bits: int
    mode: str = "affine"


def dequantize(
    weight: mx.array, scales: mx.array, biases: mx.array | None, packing: Packing
) -> mx.array:
    """The float32 values [.., out, in] of packed words, their scales and biases; lazy.

    The products of codes and scales are rounded to float32, not to the scales' own type.
    """
    if packing.mode != "affine":  # the scales of those are codes of their own
        packed = (weight, scales, biases, packing.group_size, packing.bits)
        return mx.dequantize(*packed, mode=packing.mode).astype(mx.float32)
    assert biases is not None  # affine
    scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    if packing.bits == 8:  # MLX's own takes four times as long
        groups = (*scales.shape, packing.group_size)
        codes = mx.contiguous(weight).view(mx.uint8).reshape(groups).astype(mx.float32)
        values = codes * scales[..., None] + biases[..., None]
        return values.reshape(*scales.shape[:-1], -1)
    return mx.dequantize(weight, scales, biases, packing.group_size, packing.bits)


def float_product(
    x: mx.array, weight: mx.array, scales: mx.array, biases: mx.array | None, packing: Packing
) -> mx.array:
    """``x @ dequantize(weight).T``, float32 [.., out], for x [.., in] of many rows.

    The weights are written out a piece at a time, so nothing of their float32 size is made.
    """
    x = x.astype(mx.float32)
    step = max(1, CHUNK // x.shape[-1])
    pieces = []
    for start in range(0, weight.shape[0], step):
        rows = slice(start, start + step)
        of_rows = None if biases is None else biases[rows]
        pieces.append(x @ dequantize(weight[rows], scales[rows], of_rows, packing).T)
    return mx.concatenate(pieces, axis=-1)
