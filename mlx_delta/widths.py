"""How many bits each channel of keys gets, and each kv head's values, for a wanted mean.

A code of ``b`` bits errs by a part of its step, ``range / (2 ** b - 1)``. What that costs a model's
output is taken to be ``u / (2 ** b - 1) ** 2``, with ``u = weight ** p * spread ** 2``: the weight
as in :mod:`mlx_delta.method.runs`, and the spread a channel's mean square deviation from its mean
over a block, under the root. One price per bit, the same over the whole model, then gives the
widths; the price is the one at which the mean is the wanted one. ``p`` is .75 for keys (of .5, .75
and 1 the one with the least divergence: .0011, .0009 and .0009 for SmolLM2-135M's keys in 3 bits).
For values, whose grids are a token's, ``u`` is the mean over tokens of squared gradients times
squared values, to the power .75: where most is asked of a token its value is often small, and so
are errors.

Keys' codes stand in words, both channels of a RoPE pair in the two halves of one. A half has codes
of ``FIELDS``, which fill it: so a head's widths are those of whole rows of words, and any number of
pairs fills some. Each kv head has rows of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache

import numpy as np

from .sensitivities import Sensitivities

# For each layer, or None: a string of digits for each kv head, one for each channel.
KeyWidths = tuple[tuple[str, ...] | None, ...]
# For each layer, or None: a width for each kv head.
ValueWidths = tuple[tuple[int, ...] | None, ...]

# What half a word may have: for a number of codes their widths, lowest bits first.
FIELDS: dict[int, tuple[int, ...]] = {
    2: (8, 8),
    3: (5, 5, 6),
    4: (4, 4, 4, 4),
    5: (3, 3, 3, 3, 4),
    6: (2, 2, 3, 3, 3, 3),
    8: (2, 2, 2, 2, 2, 2, 2, 2),
}
WIDTHS = (8, 6, 5, 4, 3, 2)  # of keys' codes
LANE_WIDTHS = np.arange(2, 8)  # of held keys' codes, which eight channels share
VALUE_WIDTHS = WIDTHS  # those of mx.quantize
_BISECTIONS = 60

# How many rows of words of each kind a head has, in the order of FIELDS.
Rows = tuple[int, ...]


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
        costs: ``u`` of each layer's channels, [Hkv, D] with an even D of at least 4; D may differ.
        bits: What a key's number takes on average, at most.
    """
    tables, rows = [], []
    for cost in costs:
        ranked = -np.sort(-_pairs(cost), axis=1)
        loss, kinds = _least_losses(ranked)
        for own, choices in zip(loss, kinds, strict=True):
            reached = np.flatnonzero(np.isfinite(own))
            tables.append((own[reached], 32.0 * reached))
            rows.append(choices[reached])
    chosen = iter(zip(rows, _choose(tables, bits * sum(map(np.size, costs))), strict=True))
    found = []
    for cost in costs:
        order = np.argsort(-_pairs(cost), axis=1, kind="stable")
        by_rank = [_by_rank(own[choice].tolist()) for own, choice in (next(chosen) for _ in cost)]
        own = np.empty(order.shape, np.int64)
        np.put_along_axis(own, order, np.array(by_rank), axis=1)
        found.append(np.concatenate([own, own], axis=1))
    return found


def even_key_widths(n_heads: int, head_dim: int, bits: float) -> np.ndarray:
    """Widths int [Hkv, D] of channels that all count alike; alike in all heads."""
    (head,) = share_key_bits([np.ones((1, head_dim))], bits)
    return np.repeat(head, n_heads, axis=0)


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


@lru_cache(maxsize=4096)
def rows_of(widths: str) -> Rows | None:
    """The rows of words that a head's channels of these widths, a digit each, fill.

    ``None`` if they fill none, or the two channels of a pair differ.
    """
    half = len(widths) // 2
    if len(widths) < 4 or widths[:half] != widths[half:]:
        return None
    of = {width: widths[:half].count(str(width)) for width in WIDTHS}
    if sum(of.values()) != half:
        return None
    # Four rows of 6 pairs have what one of 8 and four of 5 have without one of 4.
    for sixes in range(of[2] // 2 + 1):
        eights, no_eights = divmod(of[2] - 2 * sixes, 8)
        fives, no_fives = divmod(of[3] - 4 * sixes, 4)
        fours, no_fours = divmod(of[4] - fives, 4)
        if not (no_eights or no_fives or no_fours) and min(fives, fours) >= 0:
            fits = of[8] % 2 == 0 and of[5] == 2 * of[6]
            return (of[8] // 2, of[6], fours, fives, sixes, eights) if fits else None
    return None


def _pairs(cost: np.ndarray) -> np.ndarray:
    """Both channels of a RoPE pair together, [Hkv, D / 2]."""
    first, second = np.split(np.asarray(cost, np.float64), 2, axis=1)
    return first + second


def _errors(widths: np.ndarray) -> np.ndarray:
    return 1 / (2.0**widths - 1) ** 2


def _by_rank(rows: Sequence[int]) -> list[int]:
    """Widths of pairs, those that cost most first, of so many rows of each kind."""
    kinds = zip(FIELDS.values(), rows, strict=True)
    return sorted((width for fields, n in kinds for width in fields * n), reverse=True)


@cache
def _runs(kind: int) -> tuple[tuple[float, int], ...]:
    """For the widths of a kind of row, the widest first: what one costs, and how many there are."""
    fields = FIELDS[kind]
    widths = sorted(set(fields), reverse=True)
    return tuple((float(_errors(np.array(w))), fields.count(w)) for w in widths)


def _least_losses(ranked: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The best rows of words for each number of them: dynamic programming over kinds of rows.

    Args:
        ranked: Costs of each head's pairs, [Hkv, P], descending.

    Returns:
        Losses, [Hkv, P / 2 + 1], infinite where no rows of this number have P pairs; and how many
        rows of each kind there then are, int [Hkv, P / 2 + 1, kinds].
    """
    heads, pairs = ranked.shape
    sums = np.concatenate([np.zeros((heads, 1)), np.cumsum(ranked, axis=1)], axis=1)
    most = pairs // 2
    loss = np.full((heads, pairs + 1, most + 1), np.inf)
    loss[:, 0, 0] = 0
    rows = np.zeros((*loss.shape, len(FIELDS)), np.int16)
    for i, kind in enumerate(FIELDS):
        # Wider fields have been given out, to the pairs before `done`.
        before, rows_before = loss.copy(), rows.copy()
        for done in range(pairs):
            if not np.isfinite(before[:, done]).any():
                continue
            for n in range(1, min((pairs - done) // kind, most) + 1):
                end, own = done, np.zeros(heads)
                for error, count in _runs(kind):
                    own += error * (sums[:, end + count * n] - sums[:, end])
                    end += count * n
                found = before[:, done, : most + 1 - n] + own[:, None]
                better = found < loss[:, end, n:]
                loss[:, end, n:] = np.where(better, found, loss[:, end, n:])
                choices = rows_before[:, done, : most + 1 - n].copy()
                choices[..., i] = n
                rows[:, end, n:] = np.where(better[..., None], choices, rows[:, end, n:])
    return loss[:, pairs], rows[:, pairs]


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
