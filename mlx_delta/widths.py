"""How many bits each channel of keys gets, and each kv head's values, for a wanted mean.

A code of ``b`` bits errs by a part of its step, ``range / (2 ** b - 1)``. What that costs a model's
output is taken to be ``u / (2 ** b - 1) ** 2``, with ``u = sqrt(weight) * spread ** 2``: the weight
as in :mod:`mlx_delta.method.runs`, to the same power, and the spread a channel's mean square
deviation from its mean over a block, under the root. One price per bit, the same over the whole
model, then gives the widths; the price is the one at which the mean is the wanted one.

Keys of a layer have at most ``MOST_CLASSES`` widths, the same counts of them in all its kv heads,
and the bits of a class are those of the whole rows of words that it fills (a row has
``32 // width`` channels, so that codes of 3 bits take 3.2). Values have no such gaps.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import cache, lru_cache

import numpy as np

from .sensitivities import Sensitivities

# For each layer, or None: a string of digits for each kv head, one for each channel.
KeyWidths = tuple[tuple[str, ...] | None, ...]
# For each layer, or None: a width for each kv head.
ValueWidths = tuple[tuple[int, ...] | None, ...]

WIDTHS = (8, 6, 4, 3, 2)  # of keys' codes; a word has 4, 5, 8, 10 or 16 of them
LANE_WIDTHS = np.arange(2, 8)  # of held keys' codes, which eight channels share
VALUE_WIDTHS = (8, 6, 4, 3, 2)  # mx.quantize's
MOST_CLASSES = 3
_BISECTIONS = 60


@lru_cache(maxsize=32)
def choose_key_widths(sensitivities: Sensitivities, bits: float) -> KeyWidths | None:
    """Widths of the codes of all layers' keys; ``None`` where it is not known what errors cost.

    Args:
        sensitivities: Of the model.
        bits: The mean, at most.
    """
    costs = sensitivities.key_costs()
    known = {i: cost for i, cost in enumerate(costs) if cost is not None}
    found: list[tuple[str, ...] | None] = [None] * len(costs)
    for i, widths in zip(known, share_key_bits(list(known.values()), bits), strict=True):
        found[i] = tuple("".join(map(str, head)) for head in widths.tolist())
    return tuple(found) if known else None


@lru_cache(maxsize=32)
def choose_value_widths(sensitivities: Sensitivities, bits: float) -> ValueWidths | None:
    """Widths of the codes of all layers' values, as those of keys."""
    costs = sensitivities.value_costs
    known = {i: cost for i, cost in enumerate(costs) if cost is not None}
    if not known:
        return None
    found: list[tuple[int, ...] | None] = [None] * len(costs)
    for i, widths in zip(known, share_value_bits(list(known.values()), bits), strict=True):
        found[i] = tuple(widths.tolist())
    return tuple(found)


def share_key_bits(costs: Sequence[np.ndarray], bits: float) -> list[np.ndarray]:
    """Widths of channels, int [Hkv, D] for each layer.

    Args:
        costs: ``u`` of each layer's channels, [Hkv, D] with an even D; D may differ.
        bits: What a key's number takes on average at most, rows filled up.
    """
    ranked = [np.sort(_pairs(cost), axis=1)[:, ::-1].mean(axis=0) for cost in costs]
    tables = []
    for pairs in ranked:
        borders, widths, rows = _candidates(len(pairs))
        sums = np.concatenate([[0.0], np.cumsum(pairs)])[borders]
        loss = (np.diff(sums, axis=1) * _errors(widths)).sum(axis=1)
        tables.append((loss, 32.0 * rows))
    sizes = [cost.shape[1] for cost in costs]
    chosen = _choose(tables, bits * sum(sizes))
    found = []
    for cost, pairs, choice in zip(costs, ranked, chosen, strict=True):
        borders, widths, _ = _candidates(len(pairs))
        by_rank = np.repeat(widths[choice], np.diff(borders[choice]))
        own = np.empty((len(cost), len(pairs)), np.int64)
        order = np.argsort(-_pairs(cost), axis=1, kind="stable")
        np.put_along_axis(own, order, by_rank[None], axis=1)
        found.append(np.concatenate([own, own], axis=1))
    return found


def even_key_widths(n_heads: int, head_dim: int, bits: float) -> np.ndarray:
    """Widths int [Hkv, D] of channels that all count alike."""
    return share_key_bits([np.ones((n_heads, head_dim))], bits)[0]


@lru_cache(maxsize=32)
def choose_lane_widths(sensitivities: Sensitivities, bits: float) -> KeyWidths | None:
    """Widths of the codes of all layers' held keys; ``None`` where errors' cost is not known.

    Args:
        sensitivities: Of the model.
        bits: The mean over channels, at most.
    """
    costs = sensitivities.key_costs()
    known = {i: cost for i, cost in enumerate(costs) if cost is not None}
    found: list[tuple[str, ...] | None] = [None] * len(costs)
    for i, widths in zip(known, share_lane_bits(list(known.values()), bits), strict=True):
        found[i] = tuple("".join(map(str, head)) for head in widths.tolist())
    return tuple(found) if known else None


def share_lane_bits(costs: Sequence[np.ndarray], bits: float) -> list[np.ndarray]:
    """Widths of channels, int [Hkv, D] for each layer, eight channels or a multiple of each.

    Args:
        costs: ``u`` of each layer's channels, [Hkv, D] with D a multiple of eight; D may differ.
        bits: The mean over channels, at most.
    """
    orders = [np.argsort(-_pairs(cost), axis=1, kind="stable") for cost in costs]
    tables = [
        (lane * _errors(LANE_WIDTHS), 8.0 * LANE_WIDTHS)
        for cost, order in zip(costs, orders, strict=True)
        for head in np.take_along_axis(_pairs(cost), order, axis=1)
        for lane in head.reshape(-1, 4).sum(axis=1)
    ]
    chosen = LANE_WIDTHS[_choose(tables, bits * sum(cost.size for cost in costs))]
    found, first = [], 0
    for cost, order in zip(costs, orders, strict=True):
        own = np.empty((len(cost), order.shape[1]), np.int64)
        last = first + own.size // 4
        by_rank = np.repeat(chosen[first:last], 4).reshape(own.shape)
        np.put_along_axis(own, order, by_rank, axis=1)
        found.append(np.concatenate([own, own], axis=1))
        first = last
    return found


def even_lane_widths(n_heads: int, head_dim: int, bits: float) -> np.ndarray:
    """Widths int [Hkv, D] of channels that all count alike."""
    return share_lane_bits([np.ones((n_heads, head_dim))], bits)[0]


def share_value_bits(costs: Sequence[np.ndarray], bits: float) -> list[np.ndarray]:
    """Widths of values, int [Hkv] for each layer.

    Args:
        costs: ``u`` of each layer's kv heads, [Hkv].
        bits: The mean, at most.
    """
    widths = np.array(VALUE_WIDTHS)
    heads = np.concatenate([np.asarray(cost, np.float64) for cost in costs])
    tables = [(cost * _errors(widths), widths.astype(np.float64)) for cost in heads]
    chosen = widths[_choose(tables, bits * len(heads))]
    return np.split(chosen, np.cumsum([len(cost) for cost in costs])[:-1])


def _pairs(cost: np.ndarray) -> np.ndarray:
    """Both channels of a RoPE pair together, [Hkv, D / 2]."""
    first, second = np.split(np.asarray(cost, np.float64), 2, axis=1)
    return first + second


def _errors(widths: np.ndarray) -> np.ndarray:
    return 1 / (2.0**widths - 1) ** 2


@cache
def _candidates(pairs: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All ways to cut ranked pairs into classes.

    Returns:
        Borders of the classes, int [n, MOST_CLASSES + 1]; widths, int [n, MOST_CLASSES]; and the
        rows of words that they take, [n].
    """
    first, second = np.triu_indices(pairs + 1)
    cuts = np.stack([np.zeros_like(first), first, second, np.full_like(first, pairs)], axis=1)
    kinds = np.array(list(itertools.combinations(WIDTHS, MOST_CLASSES)))
    borders = np.tile(cuts, (len(kinds), 1))
    widths = np.repeat(kinds, len(cuts), axis=0)
    rows = -(-2 * np.diff(borders, axis=1) // (32 // widths))
    return borders, widths, rows.sum(axis=1)


def _choose(tables: Sequence[tuple[np.ndarray, np.ndarray]], budget: float) -> list[int]:
    """Of each table the entry that costs least at a price per bit at which all fit the budget.

    Args:
        tables: Losses and bits of the entries to choose from.
        budget: Bits of all chosen entries together, at most; if the least take more, those.
    """

    def at(price: float) -> list[int]:
        return [int(np.argmin(loss + price * bits)) for loss, bits in tables]

    def total(chosen: Sequence[int]) -> float:
        return float(sum(bits[i] for i, (_, bits) in zip(chosen, tables, strict=True)))

    low, high = -80.0, 80.0  # of the price's logarithm: any cost in float32
    if total(at(np.exp(low))) <= budget:
        return at(np.exp(low))
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if total(at(np.exp(middle))) > budget else (low, middle)
    # What is left goes where a little more would have gone at a slightly lower price; and where
    # all tables are alike, to as many of them as there is room for.
    chosen, more = at(np.exp(high)), at(np.exp(low))
    left = budget - total(chosen)
    for i, (loss, bits) in enumerate(tables):
        fits = (bits > bits[chosen[i]]) & (bits <= bits[chosen[i]] + left)
        better = np.flatnonzero(fits & (bits <= bits[more[i]]) & (loss < loss[chosen[i]]))
        if len(better):
            best = int(better[np.argmin(loss[better])])
            left -= bits[best] - bits[chosen[i]]
            chosen[i] = best
    return chosen
