"""In which sequence the tokens of a far block are held: each beside one that is like it.

The plain specification, for one block of one kv head. Attention to a whole block does not depend on
the sequence of its tokens, and a key is held the longer the more alike its neighbours are. From
the block's first token on, the next one is always the nearest that is left, of equal ones the
earliest, by

    sum_d (c_id - c_jd)^2,    c = rint((k - mean) w^(1/4) * most / largest),

the distance in units of what makes a channel's run end, rounded to whole numbers whose sums float32
and integers have exactly: so that the sequence is the same on every machine.
"""

from __future__ import annotations

import math

import numpy as np

from .sums import over_tokens

MOST_CODE = 127  # a byte
SUMS = (1 << 24) - 1  # below it float32 has all whole numbers
LEAST_WEIGHT = np.float32(1e-30)  # has a finite inverse square root
LEAST_APART = np.float32(1e-30)  # of keys that differ at all


def largest_code(head_dim: int) -> int:
    """The largest code, with which no distance between keys of D channels exceeds ``SUMS``."""
    return min(MOST_CODE, math.isqrt(SUMS // 4 // head_dim))


def factors(weights: np.ndarray) -> np.ndarray:
    """What makes channels comparable, of their weights [.., D]: fourth roots."""
    return np.sqrt(np.sqrt(np.maximum(weights, LEAST_WEIGHT)))


def token_sequence(keys: np.ndarray, weights: np.ndarray, sinks: int) -> np.ndarray:
    """The tokens of keys [n, D] in sequence, uint8 [n].

    As they are where some stand alone (``sinks``), where nothing differs, and where a key is not
    finite.
    """
    n, D = keys.shape
    as_they_are = np.arange(n, dtype=np.uint8)
    with np.errstate(invalid="ignore", over="ignore"):
        apart = (keys - over_tokens(keys) / np.float32(n)) * factors(weights)
    largest = np.abs(apart).max()
    if sinks > 0 or not (np.isfinite(apart).all() and largest > LEAST_APART):
        return as_they_are
    codes = np.rint(apart * (np.float32(largest_code(D)) / largest)).astype(int)
    left = as_they_are.tolist()
    sequence = [left.pop(0)]
    while left:
        distances = ((codes[left] - codes[sequence[-1]]) ** 2).sum(axis=1)
        sequence.append(left.pop(int(distances.argmin())))
    return np.array(sequence, np.uint8)
