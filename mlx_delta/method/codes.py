"""Keys as codes of several widths, and turned values, in plain NumPy: one block, one token.

This file is the specification of two storage formats; ``ops/codes.py``, ``ops/turned.py`` and the
kernels must agree with it.

**Keys.** Nothing is held: each key of a block is a code on a grid of its channel, as in
:mod:`mlx_delta.method.storage`, and channels that the model minds more get wider codes
(:mod:`mlx_delta.widths`). A layer has

- **classes**: pairs (width, count), widths descending; the same for all its kv heads, so that
  arrays are rectangular. Counts sum up to D.
- an **order**, int [Hkv, D]: each head's channels, those of the widest class first, ascending
  within a class. Both channels of a RoPE pair (d, d + D / 2) have one width.

A block of ``n`` keys [n, D] of one kv head is stored as

- **words**, uint32 [rows, n]: class by class, each row has ``32 // width`` neighbouring channels
  (in the order) of every token, lowest bits first. A class begins a new row, and its last row is
  filled up with zeros. So one row is one load for ``n`` tokens, and no code crosses a word.
- a **grid** [2, D], ``low`` and ``step`` of each channel in the order, values of the 16-bit type.

The grid is the line through a channel's keys that errs least, ``fit_grid``: the few largest keys of
a block may lie beyond it, by less than half the range. A key is ``low + step * code``, rounded to
the storage type. Exact keys of the first tokens (sinks) stand beside the blocks, and are read
instead of their codes.

Without calibrated widths keys can be **turned** first: multiplied by the matrix of ``hadamard``
along the head, which makes channels alike. What is stored then are turned keys; a query turned
alike has the same product with them.

**Values.** A token's value [Dv] of one kv head is turned, rounded to the storage type, and stored
as ``mx.quantize`` does in groups of ``value_group`` numbers: codes without gaps, lowest bits first,
that stand for ``bias + scale * code``. Each kv head has a width of its own. The words of a token's
heads lie one after the other, ``width * Dv / 32`` of each, and so do their scales and biases,
``Dv / group`` of each. Values of the first tokens (sinks) stand beside, exact, as their keys do.
Attention may sum turned values up and turn the sum back: the matrix undoes itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .storage import block_grid, decode_values, encode_values, round_to

FITS = 4  # times that a grid is fitted to the codes it gives

# (width, count) of each class of channels.
Classes = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class CodedBlock:
    """One block of keys; see the module for the layout."""

    words: np.ndarray  # uint32 [rows, n]
    grid: np.ndarray  # float32 [2, D], values of the storage type, in the order


def class_runs(classes: Classes) -> Iterator[tuple[int, slice, slice]]:
    """For each class its width, its channels in the order, and its rows of words."""
    channel = row = 0
    for width, count in classes:
        rows = -(-count // (32 // width))
        yield width, slice(channel, channel + count), slice(row, row + rows)
        channel, row = channel + count, row + rows


def count_rows(classes: Classes) -> int:
    """Rows of words of a block."""
    return sum(-(-count // (32 // width)) for width, count in classes)


def channel_widths(classes: Classes) -> np.ndarray:
    """The width of each channel in the order, int [D]."""
    widths, counts = np.array(classes, np.int64).T
    return np.repeat(widths, counts)


def order_of(widths: np.ndarray) -> tuple[np.ndarray, Classes]:
    """The order of a layer's channels, int [Hkv, D], and its classes.

    Args:
        widths: int [Hkv, D]; of each width the same number in all heads.
    """
    order = np.argsort(-widths, axis=1, kind="stable")
    found, counts = np.unique(widths[0], return_counts=True)
    pairs = zip(found[::-1].tolist(), counts[::-1].tolist(), strict=True)
    return order, tuple(pairs)


def fit_grid(keys: np.ndarray, bits: np.ndarray, dtype: str) -> np.ndarray:
    """``low`` and ``step`` of each channel, float32 [2, D], for keys [n, D] and widths [D].

    From the grid over the channel's range on, ``FITS`` times: the codes that the grid gives, and
    then the line through keys over codes with the least squared error.
    """
    grid = block_grid(keys, bits, dtype)
    for _ in range(FITS):
        with np.errstate(over="ignore", invalid="ignore"):
            codes = encode_values(keys, grid, bits).astype(np.float32)
            mean_code, mean_key = codes.mean(axis=0), keys.mean(axis=0)
            apart = codes - mean_code
            squares, products = (apart**2).sum(axis=0), (apart * (keys - mean_key)).sum(axis=0)
            step = round_to(products / np.where(squares > 0, squares, 1), dtype)
            low = round_to(mean_key - step * mean_code, dtype)
        usable = (squares > 0) & (step > 0) & np.isfinite(step) & np.isfinite(low)
        grid = np.where(usable, np.stack([low, step]), grid)
    return grid


def code_block(keys: np.ndarray, order: np.ndarray, classes: Classes, dtype: str) -> CodedBlock:
    """Store keys [n, D], float32 values of the 16-bit type ``dtype``, in this order [D]."""
    keys = keys[:, order]
    bits = channel_widths(classes)
    grid = fit_grid(keys, bits, dtype)
    codes = encode_values(keys, grid, bits)
    words = np.zeros((count_rows(classes), len(keys)), np.uint32)
    for width, channels, rows in class_runs(classes):
        per_word = 32 // width
        for i, code in enumerate(codes[:, channels].T):
            words[rows.start + i // per_word] |= code << np.uint32(width * (i % per_word))
    return CodedBlock(words, grid)


def decode_block(block: CodedBlock, order: np.ndarray, classes: Classes, dtype: str) -> np.ndarray:
    """Keys [n, D] of a block, float32 values of the 16-bit type."""
    codes = np.zeros((block.words.shape[1], len(order)), np.uint32)
    for width, channels, rows in class_runs(classes):
        per_word = 32 // width
        for i in range(channels.stop - channels.start):
            word = block.words[rows.start + i // per_word]
            code = (word >> np.uint32(width * (i % per_word))) & np.uint32(2**width - 1)
            codes[:, channels.start + i] = code
    keys = np.empty(codes.shape, np.float32)
    keys[:, order] = decode_values(codes, block.grid, dtype)
    return keys


def hadamard_size(head_dim: int) -> int:
    """The largest power of two that divides ``head_dim``: pieces of this size are turned."""
    return head_dim & -head_dim


def hadamard(head_dim: int) -> np.ndarray:
    """The matrix that turns keys and values, float32 [D, D]: symmetric, and its own inverse.

    A normalized Hadamard matrix where D is a power of two. Else one for each piece of
    ``hadamard_size(D)`` channels, along the diagonal: of 96 channels, three pieces of 32.
    """
    size = hadamard_size(head_dim)
    piece = np.ones((1, 1), np.float32)
    while len(piece) < size:
        piece = np.block([[piece, piece], [piece, -piece]])
    return np.kron(np.eye(head_dim // size, dtype=np.float32), piece / np.sqrt(np.float32(size)))


def value_group(head_dim: int) -> int:
    """Numbers of a token's value that share a scale and a bias.

    Raises:
        ValueError: There is no group that divides ``head_dim``.
    """
    for group in (64, 32):
        if head_dim % group == 0:
            return group
    raise ValueError(
        f"[DeltaKVCache] turned values need a head_dim that is a multiple of 32 but got {head_dim}."
    )


def value_words(head_dim: int, widths: Sequence[int]) -> list[int]:
    """Words of a token's value of each kv head."""
    return [head_dim * width // 32 for width in widths]


def turn(x: np.ndarray, dtype: str) -> np.ndarray:
    """Keys or values [.., D], turned and rounded to the 16-bit type, float32."""
    return round_to(np.asarray(x, np.float32) @ hadamard(x.shape[-1]), dtype)


def decode_value(
    words: np.ndarray, scales: np.ndarray, biases: np.ndarray, widths: Sequence[int], head_dim: int
) -> np.ndarray:
    """A token's turned values [Hkv, Dv], float32.

    Args:
        words: uint32 [sum of the heads' words].
        scales: float32 [Hkv * groups].
        biases: float32 [Hkv * groups].
        widths: Of each kv head.
        head_dim: Dv.
    """
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")
    values = np.empty((len(widths), head_dim), np.float32)
    begin = 0
    for head, width in enumerate(widths):
        own = bits[begin : begin + head_dim * width].reshape(head_dim, width)
        values[head] = own @ (1 << np.arange(width))
        begin += head_dim * width
    grouped = values.reshape(scales.size, -1)
    return (biases[:, None] + scales[:, None] * grouped).reshape(values.shape)
