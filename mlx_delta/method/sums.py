"""In which order numbers are added up where a sum decides a code.

A float's last bit hangs on it, and a code on that now and then. So the order is part of the
formats, and what is stored is the same on every back-end: a thread has a channel, and goes from
token to token; and 32 lanes of a GPU add up side by side.
"""

from __future__ import annotations

import numpy as np

LANES = 32


def over_tokens(x: np.ndarray) -> np.ndarray:
    """Sums float32 [..] of [n, ..], the first one first."""
    total = np.zeros(x.shape[1:], np.float32)
    for row in x:
        total = total + row
    return total


def over_lanes(x: np.ndarray) -> np.ndarray:
    """Sums float32 [..] of [.., m].

    Lane ``l`` of 32 adds up numbers ``l``, ``l + 32`` and so on, the first one first; then lanes
    ``l`` and ``l + 16`` are added, then ``l`` and ``l + 8`` of these, and so on.
    """
    filled = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % LANES)])
    sums = over_tokens(np.moveaxis(filled.reshape(*x.shape[:-1], -1, LANES), -2, 0))
    while sums.shape[-1] > 1:
        lower, upper = np.split(sums, 2, axis=-1)
        sums = lower + upper
    return sums[..., 0]
