"""Held keys with masks by channel, and codes in streams, in plain NumPy: one block of one kv head.

This file is the specification of ``key_format="deltas"``; ``ops/deltas.py`` and the kernels must
agree with it. A head's channels stand in an **order**, by the width of their codes, widest first;
eight neighbours of it are a **lane**, and share one width of 2 to 7 bits. So one lane of a GPU
walks through its channels token by token, and no ranks are worked out. A block of ``n`` keys [n, D]
is a run of uint32 words:

- **which lanes are held**: a bit for each, lowest first, 32 to a word. Of others every token has
  all codes.
- **masks**: of each 16 tokens (the last ones of a block may be 8), held lane by held lane, a byte
  for each token, four to a word; bit ``i``: a run of the lane's channel ``i`` begins. All do with a
  block's first token.
- **codes**: of each 16 tokens, lane by lane, token by token, the codes of the runs that begin,
  lowest channel first, as one stream of bits, lowest first, without gaps.

beside it the **sequence** of its tokens (:mod:`.sequence`), a byte for each, along which masks and
codes stand; and a **grid**: of each channel ``low``, of the storage type, and ``step``, a float16
of which only the eight bits from the highest bit of its exponent to the third of its mantissa are
kept. A code stands for ``low + code * step``, rounded to the storage type.

The grid is fitted to what is stored, a run's value as often as it is long: the line that errs
least. Tokens count as they do for runs, which are cut as in :mod:`mlx_delta.method.runs`. A lane
that would take no less as runs than as the codes of all its keys is stored as those, so no block is
larger than plain codes of these widths are. Exact keys of the first tokens (sinks) stand beside the
blocks, and are read instead of their codes; for a block they count as the key after them.

What was tried, on one window of 2,048 tokens of SmolLM2's, keys only, all bits of far keys counted
(KL divergence from dense attention in nats, at bits a number): codes without a hold .0066 at 3.0
and .0026 at 3.5; three quarters of the deltas zero, held values exact .0024, with codes of 4, 3.5
and 3 bits on average .0027 at 2.64, .0030 at 2.49 and .0038 at 2.35. Equal widths of 4 bits lose
.0048 at 2.47; widths for which a channel pays by its share of runs, .0065 at 2.21; masks of sparse
lanes for two or four tokens at once, .0046 at 2.31. A step of 8 bits instead of 16 costs 2 % of the
loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .runs import greedy_starts, held_values, optimal_starts, token_weights
from .sequence import token_sequence
from .storage import (
    block_grid,
    decode_values,
    encode_values,
    pack_words,
    round_to,
    short_steps,
    whole_steps,
)
from .sums import over_lanes, over_tokens

LANE = 8  # channels
CHUNK = 16  # tokens whose masks, and whose codes, lie side by side
FITS = 4  # times that a grid is fitted to the codes it gives


@dataclass(frozen=True)
class DeltaBlock:
    """One block of keys; see the module for the layout."""

    words: np.ndarray  # uint32 [count]
    sequence: np.ndarray  # uint8 [n], tokens
    low: np.ndarray  # float32 [D], values of the storage type, in the order
    steps: np.ndarray  # uint8 [D], in the order


def lane_order(widths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The order of one head's channels, int [D], and its lanes' widths, int [D / 8].

    Args:
        widths: Of the head's channels, int [D]; of each a multiple of eight channels.
    """
    order = np.argsort(-widths, kind="stable")
    return order, widths[order][::LANE]


def fit_grid(
    values: np.ndarray, tokens: np.ndarray, bits: np.ndarray, dtype: str
) -> tuple[np.ndarray, np.ndarray]:
    """``low``, float32 [D], and steps, uint8 [D], for what keys [n, D] are held as, and widths [D].

    ``tokens``: how much each counts, [n], of :func:`mlx_delta.method.runs.token_weights`.

    From the grid over the channel's range on, ``FITS`` times: the codes that the grid gives, the
    line through values over codes with the least squared error, its slope made short, and the best
    line of that slope.
    """
    low, step = block_grid(values, bits, dtype)
    shares = (tokens / over_lanes(tokens))[:, None]
    low, short = round_to(low, dtype), short_steps(step)
    for _ in range(FITS):
        with np.errstate(over="ignore", invalid="ignore"):
            codes = encode_values(values, np.stack([low, whole_steps(short)]), bits)
            codes = codes.astype(np.float32)
            mean_code, mean = over_tokens(shares * codes), over_tokens(shares * values)
            apart = shares * (codes - mean_code)
            squares = over_tokens(apart * (codes - mean_code))
            products = over_tokens(apart * (values - mean))
            fitted = short_steps(products / np.where(squares > 0, squares, 1))
            best = round_to(mean - whole_steps(fitted) * mean_code, dtype)
        usable = (squares > 0) & (fitted > 0) & np.isfinite(best)
        low, short = np.where(usable, best, low), np.where(usable, fitted, short)
    return low.astype(np.float32), short


def held_lanes(begins: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """Which lanes are smaller with a mask, boolean [lanes].

    Args:
        begins: Which elements begin a run, [n, D] in the order.
        widths: Of the lanes.
    """
    n = len(begins)
    runs = begins.reshape(n, -1, LANE).sum(axis=(0, 2))
    return LANE * n + runs * widths < LANE * n * widths


def pack_block(
    keys: np.ndarray,
    weights: np.ndarray,
    salience: np.ndarray,
    level: float,
    optimal: bool,
    sinks: int,
    widths: np.ndarray,
    dtype: str,
) -> DeltaBlock:
    """Hold and store keys.

    Args:
        keys: [n, D], float32 values of the 16-bit type ``dtype``; n a multiple of eight.
        weights: Of the channels, [D].
        salience: Of the channels, [D].
        level: What a run costs.
        optimal: Rather than greedy.
        sinks: Tokens at the start of the block whose exact keys stand beside it.
        widths: Of the channels, as for :func:`lane_order`.
        dtype: The storage type.
    """
    order, of_lanes = lane_order(widths)
    keys = keys.copy()
    keys[:sinks] = keys[min(sinks, len(keys) - 1)]
    sequence = token_sequence(keys, weights, sinks)
    keys = keys[sequence]
    tokens = token_weights(keys, weights, salience)
    begins = (optimal_starts if optimal else greedy_starts)(keys, weights, tokens, level)
    keys, begins = keys[:, order], begins[:, order]
    held = held_lanes(begins, of_lanes)
    own = np.repeat(held, LANE)
    begins = begins | ~own
    values = np.where(own, held_values(keys, begins, tokens), keys)
    bits = np.repeat(of_lanes, LANE)
    low, steps = fit_grid(values, tokens, bits, dtype)
    codes = encode_values(values, np.stack([low, whole_steps(steps)]), bits)
    return DeltaBlock(_write(codes, begins, held, of_lanes), sequence, low, steps)


def _write(
    codes: np.ndarray, begins: np.ndarray, held: np.ndarray, widths: np.ndarray
) -> np.ndarray:
    """The words of a block."""
    words = pack_words(held, 1).tolist()
    stream = place = 0
    for first in range(0, len(codes), CHUNK):
        chunk = slice(first, first + CHUNK)
        for lane, width in enumerate(widths.tolist()):
            channels = slice(lane * LANE, (lane + 1) * LANE)
            own = begins[chunk, channels]
            if held[lane]:
                words += np.packbits(own, bitorder="little").view(np.uint32).tolist()
            for code in codes[chunk, channels][own]:  # token by token, channel by channel
                stream |= int(code) << place
                place += width
    count = -(-place // 32)
    return np.concatenate(
        [np.array(words, np.uint32), np.frombuffer(stream.to_bytes(4 * count, "little"), "<u4")]
    ).astype(np.uint32)


def unpack_block(block: DeltaBlock, n: int, widths: np.ndarray, dtype: str) -> np.ndarray:
    """Keys [n, D] of a block, float32 values of the 16-bit type."""
    order, of_lanes = lane_order(widths)
    lanes = len(of_lanes)
    at = -(-lanes // 32)
    begins = np.ones((n, lanes, LANE), bool)
    for first in range(0, n, CHUNK):
        span = min(CHUNK, n - first)
        for lane in range(lanes):
            if block.words[lane // 32] >> np.uint32(lane % 32) & 1:
                mask = block.words[at : at + span // 4].view(np.uint8)
                begins[first : first + span, lane] = np.unpackbits(
                    mask[:, None], axis=1, bitorder="little"
                )
                at += span // 4
    stream = int.from_bytes(block.words[at:].tobytes(), "little")
    codes = np.zeros((n, lanes, LANE), np.uint32)
    for first in range(0, n, CHUNK):
        for lane, width in enumerate(of_lanes.tolist()):
            for t in range(first, min(first + CHUNK, n)):
                for i in range(LANE):
                    if begins[t, lane, i]:
                        codes[t, lane, i] = stream & ((1 << width) - 1)
                        stream >>= width
                    else:
                        codes[t, lane, i] = codes[t - 1, lane, i]
    grid = np.stack([block.low, whole_steps(block.steps)])
    keys = np.empty((n, lanes * LANE), np.float32)
    keys[np.ix_(block.sequence, order)] = decode_values(codes.reshape(n, -1), grid, dtype)
    return keys
