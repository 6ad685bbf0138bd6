"""Turning keys and values by a Hadamard matrix, and values as codes, with MLX operations.

See :mod:`mlx_delta.method.codes`. Here a token's heads lie one after the other, [B, 1, L, words],
so that heads of different widths share a buffer.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import mlx.core as mx

from mlx_delta.method.codes import hadamard_size, value_group, value_words

from .storage import storage_type, to_storage

# Words, scales and biases of values.
Codes = tuple[mx.array, mx.array, mx.array]


def turn(x: mx.array) -> mx.array:
    """The product [.., D] with the matrix of ``method.codes.hadamard``, which undoes itself."""
    size = hadamard_size(x.shape[-1])
    return mx.hadamard_transform(x.reshape(*x.shape[:-1], -1, size)).reshape(x.shape)


def encode_values(values: mx.array, widths: Sequence[int]) -> Codes:
    """Codes of values [B, Hkv, L, Dv], each of [B, 1, L, ..]; scales are of the 16-bit type."""
    group = value_group(values.shape[3])
    turned = to_storage(turn(values.astype(mx.float32)).astype(_wide(values.dtype)))
    parts = []
    for width, heads in _runs(widths):
        found = mx.quantize(turned[:, heads], group, width)
        parts.append([side_by_side(x) for x in found])
    words, scales, biases = (mx.concatenate(list(x), axis=3) for x in zip(*parts, strict=True))
    return words, scales, biases


def decode_values(codes: Codes, widths: Sequence[int], head_dim: int, dtype: mx.Dtype) -> mx.array:
    """Values [B, Hkv, L, Dv] of a type that codes stand for, turned back."""
    words, scales, biases = codes
    B, _, L, _ = words.shape
    group = value_group(head_dim)
    # float32: half arithmetic is several times slower without a GPU.
    scales, biases = (
        x.reshape(B, L, len(widths), -1).swapaxes(1, 2).astype(mx.float32) for x in (scales, biases)
    )
    ends = [0, *itertools.accumulate(value_words(head_dim, widths))]
    heads = []
    for width, run in _runs(widths):
        own = words[:, 0, :, ends[run.start] : ends[run.stop]]
        own = own.reshape(B, L, run.stop - run.start, -1).swapaxes(1, 2)
        heads.append(mx.dequantize(own, scales[:, run], biases[:, run], group, width))
    values = heads[0] if len(heads) == 1 else mx.concatenate(heads, axis=1)
    return turn(values).astype(dtype)


def side_by_side(x: mx.array) -> mx.array:
    """[B, H, L, n] as [B, 1, L, H * n]."""
    B, H, L, n = x.shape
    return x.swapaxes(1, 2).reshape(B, 1, L, H * n)


def _wide(dtype: mx.Dtype) -> mx.Dtype:
    """A type that :func:`to_storage` rounds to the storage type of another."""
    return dtype if dtype == mx.float32 else storage_type(dtype)


def _runs(widths: Sequence[int]) -> list[tuple[int, slice]]:
    """Neighbouring heads of one width."""
    runs, first = [], 0
    for width, group in itertools.groupby(widths):
        end = first + len(list(group))
        runs.append((width, slice(first, end)))
        first = end
    return runs
