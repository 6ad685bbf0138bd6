"""Values as codes, in plain NumPy: one token's.

This file is the specification of the storage format of values with ``value_bits`` of 2 to 8;
``ops/turned.py`` and the kernels must agree with it.

A token's value [Dv] of one kv head is turned (:func:`mlx_delta.method.codes.turn`), rounded to the
storage type, and coded in groups of ``value_group`` numbers. A code of ``b`` bits, 0 to 2**b - 1,
stands for ``scale * (code - (2**b - 1) / 2)``: turned numbers lie about zero, alike on both sides,
so that a grid needs no other place to begin at. Each kv head has a width of its own. Attention may
sum turned values up and turn the sum back: the matrix undoes itself.

What is stored of a token:

- **words**, uint32: codes without gaps, lowest bits first, ``width * Dv / 32`` words of each head,
  one head after the other. ``mx.dequantize`` reads them.
- **scales**, uint8, one byte for each group, ``Dv / group`` of each head: short steps, as
  :mod:`mlx_delta.method.storage` has them. Of a value that has a NaN or an infinity when it
  is turned, before it is rounded, all are the byte 255, which is a NaN.

The scale is one of four: the byte after the nearest one to ``2 * m / 2**b``, with m the group's
largest number, whose grid reaches further than m, and the three below, at which the largest numbers
are cut off and all others err less. That with the least ``|e|^2 + 64 (e.x)^2 / |x|^2`` is taken,
of equal ones the largest, where x are the numbers and e their errors. Attention adds up many
values, in which errors of all directions go out; but values that all come out shorter than they are
do not, and numbers that are cut off make them so: chosen by ``|e|^2`` alone, scales are too small.
The order of sums is part of the format (:mod:`mlx_delta.method.sums`).

Values of the first tokens (sinks) stand beside, exact, as their keys do.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .codes import turn_exactly
from .storage import LARGEST_STEP, round_to, short_steps, whole_steps
from .sums import over_lanes

VALUE_GROUP = 32  # numbers of a value that may share a scale; 64 where that divides it
SCALE_BITS = 8
SCALES = 4  # that are tried
ALONG = np.float32(64)  # times that an error along the numbers counts
NO_SCALE = 255  # of a value with something that is not finite


def value_group(head_dim: int) -> int:
    """Numbers of a token's value that share a scale.

    Raises:
        ValueError: There is no group that divides ``head_dim``.
    """
    for group in (64, VALUE_GROUP):
        if head_dim % group == 0:
            return group
    raise ValueError(
        f"[DeltaKVCache] turned values need a head_dim that is a multiple of {VALUE_GROUP} but got "
        f"{head_dim}; give value_bits=16."
    )


def value_words(head_dim: int, widths: Sequence[int]) -> list[int]:
    """Words of a token's value of each kv head."""
    return [head_dim * width // 32 for width in widths]


def codes_of(numbers: np.ndarray, scale: np.ndarray, width: int) -> np.ndarray:
    """Codes [groups, n], uint8, of float32 numbers of that shape with scales [groups]."""
    half = 1 << (width - 1)
    unit = np.where(scale > 0, scale, 1)[:, None]
    steps = np.floor(np.where(scale[:, None] > 0, numbers, 0) / unit)
    return (np.clip(steps, -half, half - 1) + half).astype(np.uint8)


def numbers_of(codes: np.ndarray, scale: np.ndarray, width: int) -> np.ndarray:
    """What codes [groups, n] stand for, float32, with scales [groups]; exactly."""
    return scale[:, None] * (codes.astype(np.float32) - np.float32((2**width - 1) / 2))


def encode_groups(numbers: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes, uint8 [groups, n], and scales [groups], of finite turned numbers [groups, n]."""
    nearest = short_steps(np.abs(numbers).max(axis=1) * np.float32(2.0 ** (1 - width)))
    top = np.minimum(nearest, LARGEST_STEP - 1) + np.uint8(1)
    best = top
    least = np.full(len(numbers), np.inf, np.float32)
    with np.errstate(over="ignore"):
        power = over_lanes(np.square(numbers))
    power = np.where(power > 0, power, np.float32(np.inf))
    for lower in range(SCALES):
        byte = np.maximum(top.astype(np.int32) - lower, 0).astype(np.uint8)
        scale = whole_steps(byte)
        with np.errstate(over="ignore", invalid="ignore"):
            errors = numbers - numbers_of(codes_of(numbers, scale, width), scale, width)
            along = over_lanes(errors * numbers)
            cost = over_lanes(np.square(errors)) + ALONG * along * (along / power)
        better = cost < least  # a NaN, of numbers beyond all scales, is not
        best, least = np.where(better, byte, best), np.where(better, cost, least)
    return codes_of(numbers, whole_steps(best), width), best


def encode_head(values: np.ndarray, width: int, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Codes, uint8 [n, Dv], and scales [n, groups], of one head's values [n, Dv].

    They are as they come, float32 values of the 16-bit type ``dtype``.
    """
    turned = turn_exactly(values)
    finite = np.isfinite(turned).all(axis=1, keepdims=True)
    turned = round_to(np.where(finite, turned, 0), dtype)
    codes, scales = encode_groups(turned.reshape(-1, value_group(values.shape[1])), width)
    scales = np.where(finite, scales.reshape(len(values), -1), NO_SCALE)
    return codes.reshape(values.shape), scales.astype(np.uint8)


def encode_value(
    value: np.ndarray, widths: Sequence[int], dtype: str
) -> tuple[np.ndarray, np.ndarray]:
    """Words and scales of a token's value [Hkv, Dv], as it comes."""
    words, scales = [], []
    for own, width in zip(value, widths, strict=True):
        codes, steps = encode_head(own[None], width, dtype)
        bits = np.unpackbits(codes.reshape(-1, 1), axis=1, count=width, bitorder="little")
        words.append(np.packbits(bits.ravel(), bitorder="little").view("<u4"))
        scales.append(steps.ravel())
    return np.concatenate(words), np.concatenate(scales)


def decode_value(
    words: np.ndarray, scales: np.ndarray, widths: Sequence[int], head_dim: int
) -> np.ndarray:
    """A token's turned values [Hkv, Dv], float32.

    Args:
        words: uint32 [sum of the heads' words].
        scales: uint8 [Hkv * groups].
        widths: Of each kv head.
        head_dim: Dv.
    """
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")
    groups = scales.reshape(len(widths), -1)
    values = np.empty((len(widths), head_dim), np.float32)
    begin = 0
    for head, width in enumerate(widths):
        own = bits[begin : begin + head_dim * width].reshape(head_dim, width)
        codes = (own @ (1 << np.arange(width))).reshape(groups.shape[1], -1)
        values[head] = numbers_of(codes, whole_steps(groups[head]), width).reshape(-1)
        begin += head_dim * width
    return values
