"""A linear layer with ternary weights and int8 activations, as BitNet b1.58 was trained with.

The weights are held exactly in MLX's 2-bit quantization, which MLX's own kernels multiply on Metal
and CUDA. Two products are ours: the Metal kernel ``ternary_matvec`` for the few rows of decode, and
without a GPU a float32 product with the weights unpacked, since MLX's quantized product is slow
there.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_delta.ops.backend import has_kernels
from mlx_delta.ops.proving import itself, proven
from mlx_delta.ops.ternary_matvec import MAX_ROWS, ternary_matvec
from mlx_delta.ternary import codes as ternary

ACTIVATION_BITS = 8
LARGEST = 127.0  # of int8
# As in the reference, against rows of zeros (transformers, integrations/bitnet.py).
LEAST_MAGNITUDE = 1e-5

# Weights unpacked at once without a GPU, 1 MB of float32: they stay in the processor's cache.
# Unpacking a whole layer first took three times as long.
CHUNK = 1 << 18


@partial(mx.compile, shapeless=True)
def quantize_rows(x: mx.array) -> tuple[mx.array, mx.array]:
    """Round each row of x [rows, in] to int8: ``clip(round(x * s), -128, 127)``, s = 127 / max|x|.

    In float32, halves to even (``ActQuant`` in transformers, integrations/bitnet.py).

    Returns:
        The integers, [rows, in] in the type of x, which holds them exactly, and 1 / s, float32
        [rows, 1].
    """
    values = x.astype(mx.float32)
    most = mx.max(mx.abs(values), axis=-1, keepdims=True)
    scale = LARGEST / mx.maximum(most, LEAST_MAGNITUDE)
    integers = mx.clip(mx.round(values * scale), -LARGEST - 1, LARGEST)
    return integers.astype(x.dtype), 1.0 / scale


@mx.compile
def unpack_values(words: mx.array) -> mx.array:
    """Values -1, 0, 1, float32 [rows, in], of packed words [rows, in / 16]."""
    return ternary.unpack_words(words).astype(mx.float32) - 1


class TernaryLinear(nn.QuantizedLinear):
    """``y = (int8(x) @ t.T) * scale``, with t in -1, 0, 1.

    Its parameters are those of ``nn.QuantizedLinear``: ``weight`` uint32 [out, in / 16] of codes
    t + 1, and ``scales``, ``biases = -scales`` [out, in / group_size].

    Args:
        in_features: A multiple of 32.
        out_features: A multiple of 4.
        bias: Whether it adds a bias.
        activation_bits: 8, or ``None`` to leave activations as they are.

    Attributes:
        one_scale: Whether all ``scales`` are known to be the same.
        keep_values: Without a GPU, keep the unpacked weights: 16 times the memory, several times
            the speed.

    Raises:
        ValueError: The sizes fit no packing.
    """

    biases: mx.array

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        activation_bits: int | None = ACTIVATION_BITS,
    ):
        nn.Module.__init__(self)  # QuantizedLinear would quantize random weights
        group_size = ternary.group_size_for(in_features)
        if group_size is None or out_features % 4:
            raise ValueError(
                "[TernaryLinear] in_features must be a multiple of 32 and out_features of 4 but "
                f"got {in_features} and {out_features}."
            )
        self.group_size, self.bits, self.mode = group_size, ternary.BITS, "affine"
        self.activation_bits = activation_bits
        self.one_scale = True
        self.keep_values = False
        self._kept: tuple[mx.array, mx.array] | None = None
        self.weight = mx.zeros((out_features, in_features // ternary.CODES_PER_WORD), mx.uint32)
        self.scales = mx.ones((out_features, in_features // group_size))
        self.biases = -self.scales
        if bias:
            self.bias = mx.zeros((out_features,))
        self.freeze()

    def to_quantized(self, **_: Any) -> TernaryLinear:
        """Itself: it is quantized already, whatever ``nn.quantize`` is asked to do."""
        return self

    def __call__(self, x: mx.array) -> mx.array:
        """Multiply x [..., in]; [..., out] in the type of x."""
        rows = x.reshape(-1, x.shape[-1])
        quantize = self.activation_bits is not None
        if quantize and self.training:
            # Straight-through: rounding has no gradient, so the layers below would get none.
            integers, step = quantize_rows(rows)
            rows = rows + mx.stop_gradient((integers * step).astype(x.dtype) - rows)
            quantize = False
        if self._has_kernel(rows):
            y = proven(
                ("ternary_matvec", rows.dtype, self.weight.shape, quantize),
                rows,
                lambda rows: ternary_matvec(rows, self.weight, self.scales, quantize),
                lambda rows: self._by_operations(rows, quantize),
                itself,
                lambda: mx.random.normal(rows.shape, rows.dtype, key=mx.random.key(0)),
            )
        else:
            y = self._by_operations(rows, quantize)
        if "bias" in self:
            y = y + self.bias
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def _by_operations(self, rows: mx.array, quantize: bool) -> mx.array:
        """The product of the type of the rows, which are rounded to int8 first if asked."""
        if not quantize:
            return self._product(rows).astype(rows.dtype)
        integers, step = quantize_rows(rows)
        return (self._product(integers) * step).astype(rows.dtype)

    def _has_kernel(self, rows: mx.array) -> bool:
        """Whether the kernel is there, knows its gradient isn't asked for, and reads less.

        Beyond a few rows MLX's matrix product reads the weights less often.
        """
        return (
            on_gpu()
            and has_kernels()
            and not self.training
            and self.one_scale
            and 0 < rows.shape[0] <= MAX_ROWS
        )

    def _product(self, rows: mx.array) -> mx.array:
        """``rows @ (t * scale).T``; without a GPU in float32."""
        if on_gpu():
            return mx.quantized_matmul(
                rows,
                self.weight,
                scales=self.scales,
                biases=self.biases,
                group_size=self.group_size,
                bits=self.bits,
            )
        rows = rows.astype(mx.float32)
        if self.one_scale:
            # Sums of integers below 2^24 are exact: with quantized activations a row gets the
            # same sums in every batch.
            return self._sums(rows) * self.scales[0, 0].astype(mx.float32)
        scales = self.scales.astype(mx.float32)
        return rows @ mx.dequantize(self.weight, scales, -scales, self.group_size, self.bits).T

    def _sums(self, rows: mx.array) -> mx.array:
        """``rows @ t.T``, float32 [rows, out]."""
        if self.keep_values and not self.training:  # in training they may be a trace's
            if self._kept is None or self._kept[0] is not self.weight:
                self._kept = (self.weight, unpack_values(self.weight))
            return rows @ self._kept[1].T
        if rows.shape[0] == 1:
            # For a single row MLX's own product is a little faster, for two already slower.
            ones = mx.ones_like(self.scales)
            return mx.quantized_matmul(
                rows, self.weight, ones, -ones, group_size=self.group_size, bits=self.bits
            )
        step = max(1, CHUNK // rows.shape[1])
        chunks = range(0, self.weight.shape[0], step)
        return mx.concatenate(
            [rows @ unpack_values(self.weight[i : i + step]).T for i in chunks], axis=1
        )


def on_gpu() -> bool:
    """Whether MLX computes on a GPU, Apple's or NVIDIA's."""
    return mx.default_device().type == mx.DeviceType.gpu
