"""Keys as codes of several widths, and turning keys and values, in plain NumPy: one block.

This file is the specification of a storage format; ``ops/codes.py`` and the kernels must agree with
it. How turned values are stored is specified in :mod:`mlx_delta.method.values`.

**Keys.** Nothing is held: each key of a block is a code on a grid of its channel, as in
:mod:`mlx_delta.method.storage`, and channels that the model minds more get wider codes
(:mod:`mlx_delta.widths`). Both channels of a RoPE pair (d, d + D / 2) have one width, and stand in
the two halves of a word: pair d in the lower half, d + D / 2 in the upper one. A half is filled by
codes of one of a few kinds, ``FIELDS``; so a word has 2 to 8 pairs and no bit to spare. Each kv
head has

- **rows**: how many rows of words it has of each kind, in the order of ``FIELDS``. The pairs of all
  its rows sum up to D / 2.
- an **order**, int [D] of its channels: row after row, those of the lower halves in the order of
  the fields and then those of the upper ones. A field's pair is the next one of its width,
  ascending.

A block of ``n`` keys [n, D] of one kv head is stored as

- **words**, uint32 [rows, n]: row by row the codes of every token, lowest bits first. So one row is
  one load for ``n`` tokens, and no code crosses a word. The rows of all kv heads lie one after the
  other, as many as each needs.
- a **grid** [2, D], ``low`` and ``step`` of each channel in the order, values of the 16-bit type.

The grid is the line through a channel's keys that errs least, ``fit_grid``: the few largest keys of
a block may lie beyond it, by less than half the range. Tokens that stand out from their block,
which are those that attention looks for, count more, ``token_shares``: as where keys are held
(:mod:`mlx_delta.method.runs`) if the model is calibrated. A key is
``low + step * code``, rounded to the storage type. In which order sums are made is part of the
format (:mod:`mlx_delta.method.sums`). Exact keys of the first tokens (sinks) stand
beside the blocks, and are read instead of their codes.

Without calibrated widths keys can be **turned** first: multiplied by the matrix of ``hadamard``
along the head, which makes channels alike. What is stored then are turned keys; a query turned
alike has the same product with them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mlx_delta.widths import FIELDS, Rows, rows_of

from .runs import token_weights
from .storage import block_grid, decode_values, encode_values, round_to
from .sums import over_lanes, over_tokens

FITS = 2  # times that a grid is fitted to the codes it gives
MOST_WEIGHT = 8.0  # of a token, of the mean one's; and one over it the least


@dataclass(frozen=True)
class CodedBlock:
    """One block of keys; see the module for the layout."""

    words: np.ndarray  # uint32 [rows, n]
    grid: np.ndarray  # float32 [2, D], values of the storage type, in the order


class Slots(NamedTuple):
    """Where the codes of a head's channels in the order are, each int [D].

    Attributes:
        row: Its row of words.
        shift: Its lowest bit.
        width: Its bits.
    """

    row: np.ndarray
    shift: np.ndarray
    width: np.ndarray


def slots_of(rows: Rows) -> Slots:
    """Of a head with so many rows of each kind."""
    kinds = [fields for fields, n in zip(FIELDS.values(), rows, strict=True) for _ in range(n)]
    found = []
    for row, fields in enumerate(kinds):
        shifts = [sum(fields[:i]) for i in range(len(fields))]
        for half in (0, 16):
            found += [(row, half + x, width) for x, width in zip(shifts, fields, strict=True)]
    return Slots(*np.array(found, np.int64).T)


def order_of(widths: np.ndarray) -> tuple[np.ndarray, Rows]:
    """The order of a head's channels, int [D], and its rows of words.

    Args:
        widths: int [D], which fill rows.

    Raises:
        ValueError: They fill none.
    """
    rows = rows_of("".join(map(str, widths.tolist())))
    if rows is None:
        raise ValueError(f"[codes] widths {widths.tolist()} fill no rows of words.")
    half = len(widths) // 2
    next_ones = {width: iter(np.flatnonzero(widths[:half] == width)) for width in set(widths)}
    order: list[int] = []
    for fields, count in zip(FIELDS.values(), rows, strict=True):
        for _ in range(count):
            pairs = [int(next(next_ones[width])) for width in fields]
            order += [*pairs, *(pair + half for pair in pairs)]
    return np.array(order), rows


def fit_grid(
    keys: np.ndarray, bits: np.ndarray, dtype: str, felt: np.ndarray | None = None
) -> np.ndarray:
    """``low`` and ``step`` of each channel, float32 [2, D], for keys [n, D] and widths [D].

    From the grid over the channel's range on, ``FITS`` times: the codes that the grid gives, and
    then the line through keys over codes with the least squared error, tokens weighted.
    """
    grid = block_grid(keys, bits, dtype)
    shares = token_shares(keys, grid, felt)[:, None]
    for _ in range(FITS):
        with np.errstate(over="ignore", invalid="ignore"):
            codes = encode_values(keys, grid, bits).astype(np.float32)
            mean_code, mean_key = over_tokens(shares * codes), over_tokens(shares * keys)
            apart = shares * (codes - mean_code)
            squares = over_tokens(apart * (codes - mean_code))
            products = over_tokens(apart * (keys - mean_key))
            step = round_to(products / np.where(squares > 0, squares, 1), dtype)
            low = round_to(mean_key - step * mean_code, dtype)
        usable = (squares > 0) & (step > 0) & np.isfinite(step) & np.isfinite(low)
        grid = np.where(usable, np.stack([low, step]), grid)
    return grid


def token_shares(keys: np.ndarray, grid: np.ndarray, felt: np.ndarray | None = None) -> np.ndarray:
    """How much each of a block's keys [n, D] counts, float32 [n] that sum up to 1.

    As where keys are held, by channels' weights and salience, ``felt`` [2, D]. Where these are not
    known, by the square of the distance from their mean in steps of the grid.
    """
    if felt is not None:
        weights = token_weights(keys, *felt)
        return (weights / over_lanes(weights)).astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        apart = keys - over_tokens(keys) / np.float32(len(keys))
        squares = over_lanes(np.where(grid[1] > 0, np.square(apart / grid[1]), 0))
        mean = over_lanes(squares) / np.float32(len(keys))
        relative = squares / (mean if mean > 0 else 1)
    weights = np.clip(relative, 1 / MOST_WEIGHT, MOST_WEIGHT)
    return (weights / over_lanes(weights)).astype(np.float32)


def code_block(
    keys: np.ndarray, order: np.ndarray, rows: Rows, dtype: str, felt: np.ndarray | None = None
) -> CodedBlock:
    """Store keys [n, D], float32 values of the 16-bit type ``dtype``, in this order [D]."""
    keys, slots = keys[:, order], slots_of(rows)
    grid = fit_grid(keys, slots.width, dtype, None if felt is None else felt[:, order])
    codes = encode_values(keys, grid, slots.width)
    words = np.zeros((sum(rows), len(keys)), np.uint32)
    for code, row, shift in zip(codes.T, slots.row, slots.shift, strict=True):
        words[row] |= code << np.uint32(shift)
    return CodedBlock(words, grid)


def decode_block(block: CodedBlock, order: np.ndarray, rows: Rows, dtype: str) -> np.ndarray:
    """Keys [n, D] of a block, float32 values of the 16-bit type."""
    codes = np.zeros((block.words.shape[1], len(order)), np.uint32)
    for i, (row, shift, width) in enumerate(zip(*slots_of(rows), strict=True)):
        codes[:, i] = (block.words[row] >> np.uint32(shift)) & np.uint32(2**width - 1)
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


def turn(x: np.ndarray, dtype: str) -> np.ndarray:
    """Keys or values [.., D], turned and rounded to the 16-bit type, float32."""
    return round_to(turn_exactly(x), dtype)


def turn_exactly(x: np.ndarray) -> np.ndarray:
    """Keys or values [.., D], turned, in float32.

    The product with the matrix, by sums and differences of neighbours, then of those two apart,
    four apart and so on.
    """
    size = hadamard_size(x.shape[-1])
    turned = np.asarray(x, np.float32)
    step = 1
    with np.errstate(over="ignore", invalid="ignore"):
        while step < size:
            pairs = turned.reshape(*x.shape[:-1], -1, 2, step)
            lower, upper = pairs[..., 0, :], pairs[..., 1, :]
            turned = np.stack([lower + upper, lower - upper], axis=-2).reshape(x.shape)
            step *= 2
        return turned * np.float32(1 / np.sqrt(size))
