"""Ternary weights -1, 0, 1: how BitNet rounds to them, and the packings they come in.

A code is the value + 1, so 0, 1 or 2; code 3 has no meaning and marks a broken or foreign file.
Everything is lazy: nothing here reads a weight before its result is evaluated.
"""

from __future__ import annotations

import mlx.core as mx

# BitNet's own guard against a tensor of zeros (transformers, integrations/bitnet.py).
LEAST_MEAN = 1e-5

BITS = 2
CODES_PER_WORD = 32 // BITS
# Group sizes of MLX's quantization, the one with the fewest scales first.
GROUP_SIZES = (128, 64, 32)


def absolute_mean(weight: mx.array) -> mx.array:
    """Mean of ``|weight|``, at least ``LEAST_MEAN``: the scale of BitNet's ternary values; float32.

    Summed in float64, which only the CPU has: a float32 sum over millions of weights drifts, and
    weights beside a rounding boundary would get other codes than in transformers.
    """
    with mx.stream(mx.cpu):
        mean = mx.mean(mx.abs(weight.astype(mx.float64)))
        return mx.maximum(mean.astype(mx.float32), LEAST_MEAN)


def ternarize(weight: mx.array, mean: mx.array) -> mx.array:
    """Codes, uint8, of full-precision BitNet weights, as the model itself rounds them.

    ``clip(round(weight / mean), -1, 1) + 1``, halves to even, in float32 (``WeightQuant`` in
    transformers, integrations/bitnet.py; BitNet b1.58, arXiv 2402.17764).
    """
    scale = 1.0 / mean.astype(mx.float32)
    values = mx.clip(mx.round(weight.astype(mx.float32) * scale), -1, 1)
    return (values + 1).astype(mx.uint8)


def unpack_rows(packed: mx.array) -> mx.array:
    """Codes [out, in], uint8, from Hugging Face's packing, uint8 [out / 4, in].

    Bits 2k and 2k + 1 of byte (r, c) hold row r + k * out / 4 (``pack_weights`` in transformers,
    integrations/bitnet.py).
    """
    return mx.concatenate([(packed >> (BITS * k)) & 3 for k in range(4)], axis=0)


def pack_rows(codes: mx.array) -> mx.array:
    """The reverse of :func:`unpack_rows`; the number of rows must be a multiple of 4."""
    quarters = mx.split(codes.astype(mx.uint8), 4, axis=0)
    return quarters[0] | quarters[1] << 2 | quarters[2] << 4 | quarters[3] << 6


def pack_words(codes: mx.array) -> mx.array:
    """Codes [out, in] as MLX's 2-bit quantization holds them: uint32 [out, in / 16].

    The first code of a word has its lowest bits.

    With scales s and biases -s, ``mx.dequantize`` gives (code - 1) * s exactly. (``mx.quantize``
    with two bits would place four levels between the extremes and miss by s / 2.)
    """
    codes = codes.astype(mx.uint8)
    pairs = codes[:, 0::2] | codes[:, 1::2] << 2
    quads = pairs[:, 0::2] | pairs[:, 1::2] << 4
    return mx.contiguous(quads).view(mx.uint32)


def unpack_words(words: mx.array) -> mx.array:
    """The reverse of :func:`pack_words`: codes [out, in], uint8."""
    shifts = mx.arange(0, 32, BITS, dtype=mx.uint32)
    return ((words[..., None] >> shifts) & 3).astype(mx.uint8).reshape(words.shape[0], -1)


def has_invalid_code(packed: mx.array) -> mx.array:
    """Whether a packed array, uint8 or uint32, holds a code 3 anywhere; a boolean scalar."""
    low_bits = mx.array(0x55555555 & ((1 << 8 * packed.dtype.size) - 1), packed.dtype)
    return mx.any((packed & (packed >> 1) & low_bits) != 0)


def group_size_for(in_features: int) -> int | None:
    """The largest group size of MLX's that divides a row; ``None`` if none does."""
    return next((size for size in GROUP_SIZES if in_features % size == 0), None)
