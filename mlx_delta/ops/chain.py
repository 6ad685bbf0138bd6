"""One chain of held values over a text: each value is compared with the one held before it.

Taken literally that is a step for each token. Here a text is cut into segments that are walked side
by side. What a segment is handed by the one before is guessed at first, and walked again where the
guess was wrong: a chain forgets what it was handed as soon as it starts a run, so that few values
are walked more than twice. Comparisons do not round, so the result is the literal one, bit for bit.
"""

from __future__ import annotations

import numpy as np

SEGMENT = 64  # tokens


@np.errstate(all="ignore")  # NaN compares false, and so propagates
def walk_chain(keys: np.ndarray, thresholds: np.ndarray, previous: np.ndarray) -> np.ndarray:
    """The held values of a text.

    Args:
        keys: float32 [L, lanes, D].
        thresholds: float32, broadcasts to [L, lanes, 1]: up to which difference a value is held;
            negative where it never is.
        previous: float32 [lanes, D], what is held before the first token; NaN: nothing.

    Returns:
        [L, lanes, D].
    """
    length, lanes, D = keys.shape
    thresholds = np.broadcast_to(thresholds, (length, lanes, 1))
    if length <= 2 * SEGMENT:
        return _walk(keys, thresholds, previous)
    count = -(-length // SEGMENT)
    padding = ((0, count * SEGMENT - length), (0, 0), (0, 0))
    # [SEGMENT, segments, lanes, ..]
    keys, thresholds = (
        np.ascontiguousarray(np.pad(x, padding).reshape(count, SEGMENT, lanes, -1).swapaxes(0, 1))
        for x in (keys, thresholds)
    )
    handed = np.full((count, lanes, D), np.nan, np.float32)
    handed[0] = previous
    held = _walk(keys, thresholds, handed)
    while True:
        found = held[-1, :-1]
        # By their bits: NaN is not equal to itself.
        segment, lane, channel = np.nonzero(found.view(np.int32) != handed[1:].view(np.int32))
        if not len(segment):
            break
        handed[1:] = found
        where = (slice(None), segment + 1, lane, channel)
        again = _walk(keys[where], thresholds[:, segment + 1, lane, 0], handed[where[1:]])
        held[where] = again
    return held.swapaxes(0, 1).reshape(-1, lanes, D)[:length]


def _walk(keys: np.ndarray, thresholds: np.ndarray, held: np.ndarray) -> np.ndarray:
    """Held values [T, ..] of keys [T, ..], token by token."""
    rows = np.empty_like(keys)
    for t in range(len(keys)):
        held = np.where(np.abs(keys[t] - held) <= thresholds[t], held, keys[t])
        rows[t] = held
    return rows
