"""Held keys with masks by channel, and codes in streams, in plain NumPy: one block of one kv head.

This file is the specification of ``key_format="deltas"``; ``ops/deltas.py`` and the kernels must
agree with it. A head's channels stand in an **order**, by the width of their codes, widest first;
eight neighbours of it are a **lane**, and share one width of 2 to 8 bits. So one lane of a GPU
walks through its channels token by token, and no ranks are worked out. A block of ``n`` keys [n, D]
is a run of uint32 words:

- **kinds**: two bits for each lane, lowest first, 16 lanes to a word. 0: every token has all of the
  lane's codes. 1, 2, 3: only those of runs that begin, and runs begin at every token, every second
  or every fourth.
- **masks**: of each 16 tokens (the last ones of a block may be 8), lane by lane, a byte for each
  token at which runs may begin, four to a word; bit ``i``: a run of the lane's channel ``i``
  begins. All do with a block's first token. Lanes of kind 0 have none.
- **codes**: of each 16 tokens, lane by lane, token by token, the codes of the runs that begin,
  lowest channel first, as one stream of bits, lowest first, without gaps.

and beside it a **grid**: of each channel ``low``, of the storage type, and ``step``, a float16 of
which only the eight bits from the highest bit of its exponent to the third of its mantissa are
kept. A code stands for ``low + code * step``, rounded to the storage type.

The grid is fitted to what is stored, a run's mean as often as it is long: the line that errs least.
Runs are cut as in :mod:`mlx_delta.method.runs`. A lane whose runs are few is cut anew, as if two or
four tokens were one, their weighted mean: of its mask a half or a quarter is left. A lane that
would take no less as runs than as the codes of all its keys is stored as those, so no block is
larger than plain codes of these widths are. Exact keys of the first tokens (sinks) stand beside the
blocks, and are read instead of their codes; for a block they count as the key after them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .runs import greedy_starts, optimal_starts, token_weights, weighted_means
from .storage import block_grid, decode_values, encode_values, round_to

LANE = 8  # channels
CHUNK = 16  # tokens whose masks, and whose codes, lie side by side
FITS = 4  # times that a grid is fitted to the codes it gives
MOST_KIND = 3
LARGEST_STEP = 0xF7  # of float16's finite ones
# A lane is cut anew at every second token, or every fourth, if at most such a share of its numbers
# begin runs.
SPARSE = {2: 0.2, 3: 0.08}


@dataclass(frozen=True)
class DeltaBlock:
    """One block of keys; see the module for the layout."""

    words: np.ndarray  # uint32 [count]
    low: np.ndarray  # float32 [D], values of the storage type, in the order
    steps: np.ndarray  # uint8 [D], in the order


def lane_order(widths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The order of one head's channels, int [D], and its lanes' widths, int [D / 8].

    Args:
        widths: Of the head's channels, int [D]; of each a multiple of eight channels.
    """
    order = np.argsort(-widths, kind="stable")
    return order, widths[order][::LANE]


def short_steps(steps: np.ndarray) -> np.ndarray:
    """The nearest steps that eight bits hold, uint8, for steps >= 0; 0 for what is no number."""
    with np.errstate(over="ignore", invalid="ignore"):
        bits = np.where(steps >= 0, steps, 0).astype(np.float16).view(np.uint16).astype(np.int64)
    return np.minimum((bits + 64) >> 7, LARGEST_STEP).astype(np.uint8)


def whole_steps(short: np.ndarray) -> np.ndarray:
    """The steps that these bits stand for, float32."""
    return (short.astype(np.uint16) << 7).view(np.float16).astype(np.float32)


def fit_grid(values: np.ndarray, bits: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """``low``, float32 [D], and steps, uint8 [D], for values [n, D] and widths [D].

    From the grid over the channel's range on, ``FITS`` times: the codes that the grid gives, the
    line through values over codes with the least squared error, its slope made short, and the best
    line of that slope.
    """
    low, step = block_grid(values, bits, dtype)
    short = short_steps(step)
    for _ in range(FITS):
        with np.errstate(over="ignore", invalid="ignore"):
            codes = encode_values(values, np.stack([low, whole_steps(short)]), bits)
            codes = codes.astype(np.float32)
            mean_code, mean = codes.mean(axis=0), values.mean(axis=0)
            apart = codes - mean_code
            squares, products = (apart**2).sum(axis=0), (apart * (values - mean)).sum(axis=0)
            fitted = short_steps(products / np.where(squares > 0, squares, 1))
            best = round_to(mean - whole_steps(fitted) * mean_code, dtype)
        usable = (squares > 0) & (fitted > 0) & np.isfinite(best)
        low, short = np.where(usable, best, low), np.where(usable, fitted, short)
    return low.astype(np.float32), short


def cut_merged(
    keys: np.ndarray,
    weights: np.ndarray,
    salience: np.ndarray,
    level: float,
    optimal: bool,
    merged: int,
) -> tuple[np.ndarray, np.ndarray]:
    """What keys [n, D] are held as, and which elements begin a run, if ``merged`` tokens are one.

    Of so many tokens the weighted mean stands for all, and counts as much as they together.
    """
    tokens = token_weights(keys, weights, salience)
    together = tokens.reshape(-1, merged).sum(axis=1, dtype=np.float32)
    if merged > 1:
        weighted = (keys * tokens[:, None]).reshape(-1, merged, keys.shape[1])
        keys = weighted.sum(axis=1, dtype=np.float32) / together[:, None]
    cut = optimal_starts if optimal else greedy_starts
    starts = cut(keys, weights, together, level)
    means = weighted_means(keys, starts, together)
    begins = np.zeros((len(tokens), keys.shape[1]), bool)
    begins[::merged] = starts
    return np.repeat(means, merged, axis=0), begins


def mask_words(kind: int, tokens: int) -> int:
    """Words of a lane's mask for so many tokens, at most 16."""
    return -(-tokens // (4 << (kind - 1))) if kind else 0


def lane_kinds(begins: dict[int, np.ndarray], widths: np.ndarray) -> np.ndarray:
    """The kind of each lane, int [lanes].

    Args:
        begins: For each kind but 0 which elements begin a run, [n, D] in the order.
        widths: Of the lanes.
    """
    n = len(begins[1])
    share = begins[1].reshape(n, -1, LANE).mean(axis=(0, 2))
    kinds = np.where(share <= SPARSE[3], 3, np.where(share <= SPARSE[2], 2, 1))
    for lane, width in enumerate(widths):
        kind = int(kinds[lane])
        runs = begins[kind][:, lane * LANE : (lane + 1) * LANE].sum()
        masks = sum(mask_words(kind, min(CHUNK, n - t)) for t in range(0, n, CHUNK))
        if 32 * masks + runs * width >= n * LANE * width:
            kinds[lane] = 0
    return kinds


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
    keys, weights, salience = (x[..., order] for x in (keys, weights, salience))
    keys = keys.copy()
    keys[:sinks] = keys[min(sinks, len(keys) - 1)]
    cuts = {
        kind: cut_merged(keys, weights, salience, level, optimal, 1 << (kind - 1))
        for kind in range(1, MOST_KIND + 1)
    }
    kinds = lane_kinds({kind: begins for kind, (_, begins) in cuts.items()}, of_lanes)
    values, begins = keys.copy(), np.ones(keys.shape, bool)
    for kind, (means, starts) in cuts.items():
        own = np.repeat(kinds == kind, LANE)
        values[:, own], begins[:, own] = means[:, own], starts[:, own]
    bits = np.repeat(of_lanes, LANE)
    low, steps = fit_grid(values, bits, dtype)
    codes = encode_values(values, np.stack([low, whole_steps(steps)]), bits)
    return DeltaBlock(_write(codes, begins, kinds, of_lanes), low, steps)


def _write(
    codes: np.ndarray, begins: np.ndarray, kinds: np.ndarray, widths: np.ndarray
) -> np.ndarray:
    """The words of a block."""
    words = [0] * -(-len(kinds) // 16)
    for lane, kind in enumerate(kinds):
        words[lane // 16] |= int(kind) << (2 * (lane % 16))
    stream = place = 0
    for first in range(0, len(codes), CHUNK):
        chunk = slice(first, first + CHUNK)
        for lane, (kind, width) in enumerate(zip(kinds, widths, strict=True)):
            channels = slice(lane * LANE, (lane + 1) * LANE)
            own = begins[chunk, channels]
            if kind:
                rows = own[:: 1 << (kind - 1)]
                masks = np.zeros(4 * mask_words(int(kind), len(own)), np.uint8)
                masks[: len(rows)] = np.packbits(rows, axis=1, bitorder="little")[:, 0]
                words += masks.view(np.uint32).tolist()
            for code in codes[chunk, channels][own]:  # token by token, channel by channel
                stream |= int(code) << place
                place += int(width)
    count = -(-place // 32)
    return np.concatenate(
        [np.array(words, np.uint32), np.frombuffer(stream.to_bytes(4 * count, "little"), "<u4")]
    ).astype(np.uint32)


def unpack_block(block: DeltaBlock, n: int, widths: np.ndarray, dtype: str) -> np.ndarray:
    """Keys [n, D] of a block, float32 values of the 16-bit type."""
    order, of_lanes = lane_order(widths)
    lanes = len(of_lanes)
    at = -(-lanes // 16)
    kinds = [
        int(block.words[lane // 16] >> np.uint32(2 * (lane % 16))) & 3 for lane in range(lanes)
    ]
    masks: dict[tuple[int, int], np.ndarray] = {}
    for first in range(0, n, CHUNK):
        for lane, kind in enumerate(kinds):
            count = mask_words(kind, min(CHUNK, n - first))
            masks[first, lane] = block.words[at : at + count].view(np.uint8)
            at += count
    stream = int.from_bytes(block.words[at:].tobytes(), "little")
    codes = np.zeros((n, lanes * LANE), np.uint32)
    for first in range(0, n, CHUNK):
        for lane, (kind, width) in enumerate(zip(kinds, of_lanes.tolist(), strict=True)):
            for t in range(first, min(first + CHUNK, n)):
                apart = 1 << max(0, kind - 1)
                mask = (
                    0xFF
                    if not kind
                    else 0
                    if t % apart
                    else int(masks[first, lane][(t - first) // apart])
                )
                for channel in range(lane * LANE, (lane + 1) * LANE):
                    if mask >> (channel - lane * LANE) & 1:
                        codes[t, channel] = stream & ((1 << width) - 1)
                        stream >>= width
                    else:
                        codes[t, channel] = codes[t - 1, channel]
    keys = np.empty(codes.shape, np.float32)
    keys[:, order] = decode_values(codes, np.stack([block.low, whole_steps(block.steps)]), dtype)
    return keys
