"""Which tiles of a prompt's attention are computed, in plain float32 steps, for one kv head.

This file is the specification of :mod:`mlx_delta.ops.tiles`. Queries and keys are cut into blocks
of ``T`` tokens by absolute position; a tile is one block of keys seen by one block of queries. A
query block computes the first tile, the near ones and its own, and of the others those that its
queries are expected to look at most; the rest are dropped from its softmax. All query heads that
share a kv head choose together.

A block's keys are packed into a few rows: it is cut where a key differs most from the one before,
and each piece stands as its mean. ``exp(q.k)`` summed over a piece of ``n`` keys is about
``n exp(q.mean + |q|**2 spread / 2)``, as for normal deviations, alike in all directions.
What decides is the *most* that any group of four neighbouring queries of any head looks at a
tile: a block's mean query loses the few rows that look far, such as a question's.

Shapes: T tokens of a block, R packed rows, G query heads, D elements. Queries come scaled.
"""

from __future__ import annotations

import numpy as np

# Rows that a block's keys are packed into, and neighbouring queries that are scored as their mean.
PACKED_ROWS = 16
POOLED_QUERIES = 4
# Tokens at a prompt's end (at least) that compute all tiles: an answer begins from these.
EXACT_END = 192
# And at a text's beginning, where so few tiles lie before a query that choosing takes as long as
# computing them, and loses something.
EXACT_BEGIN = 1024


def pack(keys: np.ndarray, rows: int = PACKED_ROWS) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The pieces of one block of keys [T, D].

    Pieces begin at the first key and at the ``rows - 1`` others that differ most from the one
    before them; of equal differences the earlier counts.

    Returns:
        The means, [R, D]; how many keys each is of, [R]; and their spread, [R]: the mean over
        elements of the keys' variance around the mean.
    """
    keys = keys.astype(np.float32)
    change = np.square(keys[1:] - keys[:-1]).sum(axis=1)
    begins = np.sort(np.append(np.argsort(-change, kind="stable")[: rows - 1] + 1, 0))
    pieces = np.split(keys, begins[1:])
    means = np.stack([piece.mean(axis=0) for piece in pieces])
    counts = np.array([len(piece) for piece in pieces])
    spread = np.array([np.square(x - x.mean(axis=0)).mean() for x in pieces], np.float32)
    return means, counts, spread


def shares(
    queries: np.ndarray, far: np.ndarray, near: np.ndarray, pooled: int = POOLED_QUERIES
) -> tuple[np.ndarray, float]:
    """The share of its attention that a block of queries is expected to give each tile.

    Args:
        queries: [G, T, D], scaled.
        far: [n, T, D], the blocks of keys to choose from.
        near: [m, T, D], those that are computed in any case; the last is the queries' own.
        pooled: Neighbouring queries that are scored as their mean.

    Returns:
        The share of each far tile, [n], and of the near ones together; their sum is 1.
    """
    G, T, D = queries.shape
    means = queries.astype(np.float32).reshape(G * T // pooled, pooled, D).mean(axis=1)
    square = np.square(means).sum(axis=1, keepdims=True)
    packed = [pack(block) for block in far]
    scores = [means @ k.T + np.log(count) + square * spread / 2 for k, count, spread in packed]
    # A group sees what its last query sees.
    last = np.tile(np.arange(pooled - 1, T, pooled), G)[:, None]
    position = np.arange(near.shape[0] * T) - (near.shape[0] - 1) * T
    exact = means @ near.reshape(-1, D).T
    scores.append(np.where(position <= last, exact, -np.inf))
    joined = np.concatenate(scores, axis=1)
    weights = np.exp(joined - joined.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    rows = PACKED_ROWS
    parts = [weights[:, i * rows : (i + 1) * rows].sum(axis=1) for i in range(len(far))]
    parts.append(weights[:, len(far) * rows :].sum(axis=1))
    most = np.stack(parts, axis=1).max(axis=0)
    most /= most.sum()
    return most[:-1], float(most[-1])


def choose(far_shares: np.ndarray, near_share: float, mass: float) -> np.ndarray:
    """Which far tiles are computed: the first, then the largest until ``mass`` is reached.

    Args:
        far_shares: [n], as from :func:`shares`.
        near_share: Of the tiles that are computed in any case.
        mass: The share to reach, ``tiles`` of the configuration.

    Returns:
        Boolean [n].
    """
    order = np.argsort(-far_shares, kind="stable")
    order = np.concatenate([order[order == 0], order[order != 0]])
    reached = near_share + np.cumsum(far_shares[order])
    chosen = np.zeros(len(far_shares), bool)
    chosen[order[:1]] = True
    chosen[order[1:][reached[:-1] < mass]] = True
    return chosen
