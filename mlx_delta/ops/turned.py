"""Turning keys and values by a Hadamard matrix, and values as codes, with MLX operations.

See :mod:`mlx_delta.method.codes` and :mod:`mlx_delta.method.values`, with which this agrees bit for
bit; on a GPU but for turning and for scales, whose sums over numbers MLX makes in another order
there. Here a token's heads lie one after the other, [B, 1, L, words], so that heads of different
widths share a buffer.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import mlx.core as mx

from mlx_delta.method.codes import hadamard_size
from mlx_delta.method.storage import LARGEST_STEP
from mlx_delta.method.values import ALONG, NO_SCALE, SCALES, value_group, value_words

from .launching import constant
from .storage import LARGEST, short_steps, storage_type, whole_steps
from .sums import over_lanes

# Words, uint32, and scales, uint8, of values.
Codes = tuple[mx.array, mx.array]
_RUN = 8  # codes that fill whole bytes, whatever their width


def turn(x: mx.array) -> mx.array:
    """The product [.., D] with the matrix of ``method.codes.hadamard``, which undoes itself."""
    size = hadamard_size(x.shape[-1])
    return mx.hadamard_transform(x.reshape(*x.shape[:-1], -1, size)).reshape(x.shape)


def encode_values(values: mx.array, widths: Sequence[int]) -> Codes:
    """Codes of values [B, Hkv, L, Dv], each of [B, 1, L, ..]."""
    return encode_turned(turn(values.astype(mx.float32)), storage_type(values.dtype), widths)


def encode_turned(turned: mx.array, dtype: mx.Dtype, widths: Sequence[int]) -> Codes:
    """The same of values that are turned, float32; ``dtype``: the storage type."""
    B, H, L, D = turned.shape
    finite = mx.abs(turned).max(axis=3, keepdims=True) < mx.inf  # false for NaN too
    turned = mx.clip(mx.where(finite, turned, 0), -LARGEST[dtype], LARGEST[dtype])
    turned = turned.astype(dtype).astype(mx.float32)
    words, scales = [], []
    for width, heads in _runs(widths):
        numbers = turned[:, heads].reshape(B, -1, L, D // value_group(D), value_group(D))
        half = 2.0 ** (width - 1)  # plain: an array of them all would have to be broadcast
        best = _best_scales(numbers, half)
        codes = _steps(numbers, whole_steps(best), half) + half
        words.append(side_by_side(_packed(codes.astype(mx.uint8).reshape(B, -1, L, D), width)))
        scales.append(best[..., 0])
    bytes_ = mx.where(finite, mx.concatenate(scales, axis=1), constant(NO_SCALE, mx.uint8))
    return mx.concatenate(words, axis=3), side_by_side(bytes_)


def _best_scales(numbers: mx.array, half: float) -> mx.array:
    """Bytes [.., 1] of the scales at which finite numbers [.., n] err least."""
    byte = short_steps(mx.abs(numbers).max(axis=-1, keepdims=True) / half)
    byte = mx.minimum(byte, LARGEST_STEP - 1) + 1
    best, least = byte, constant(math.inf, mx.float32)
    power = over_lanes(mx.square(numbers))
    power = mx.where(power > 0, power, mx.inf)
    for _ in range(SCALES):
        scale = whole_steps(byte)
        errors = numbers - scale * (_steps(numbers, scale, half) + 0.5)
        along = over_lanes(errors * numbers)
        cost = over_lanes(mx.square(errors)) + float(ALONG) * along * (along / power)
        better = cost < least
        best, least = mx.where(better, byte, best), mx.where(better, cost, least)
        byte = mx.maximum(byte, 1) - 1
    return best


def _steps(numbers: mx.array, scale: mx.array, half: float) -> mx.array:
    """Codes without what is added to have none below 0, float32: -half to half - 1."""
    steps = mx.floor(numbers / mx.where(scale > 0, scale, mx.inf))
    return mx.clip(steps, -half, half - 1)


def _packed(codes: mx.array, width: int) -> mx.array:
    """Words [.., n * width / 32] of codes [.., n], without gaps, lowest bits first."""
    shape, count = codes.shape[:-1], codes.shape[-1] // _RUN
    shifts = mx.arange(0, width * _RUN, width, dtype=mx.uint64)
    runs = (codes.reshape(*shape, count, _RUN).astype(mx.uint64) << shifts).sum(axis=-1)
    parts = runs[..., None].view(mx.uint8)[..., :width]
    return mx.contiguous(parts).reshape(*shape, count * width).view(mx.uint32)


def decode_values(codes: Codes, widths: Sequence[int], head_dim: int, dtype: mx.Dtype) -> mx.array:
    """Values [B, Hkv, L, Dv] of a type that codes stand for, turned back."""
    words, scales = codes
    B, _, L, _ = words.shape
    group = value_group(head_dim)
    # float32: half arithmetic is several times slower without a GPU.
    units = whole_steps(scales.reshape(B, L, len(widths), -1).swapaxes(1, 2))
    ends = [0, *itertools.accumulate(value_words(head_dim, widths))]
    heads = []
    for width, run in _runs(widths):
        own = words[:, 0, :, ends[run.start] : ends[run.stop]]
        own = own.reshape(B, L, run.stop - run.start, -1).swapaxes(1, 2)
        unit = units[:, run]
        heads.append(mx.dequantize(own, unit, unit * ((1 - 2**width) / 2), group, width))
    values = heads[0] if len(heads) == 1 else mx.concatenate(heads, axis=1)
    return turn(values).astype(dtype)


def side_by_side(x: mx.array) -> mx.array:
    """[B, H, L, n] as [B, 1, L, H * n]."""
    B, H, L, n = x.shape
    return x.swapaxes(1, 2).reshape(B, 1, L, H * n)


def _runs(widths: Sequence[int]) -> list[tuple[int, slice]]:
    """Neighbouring heads of one width."""
    runs, first = [], 0
    for width, group in itertools.groupby(widths):
        end = first + len(list(group))
        runs.append((width, slice(first, end)))
        first = end
    return runs
