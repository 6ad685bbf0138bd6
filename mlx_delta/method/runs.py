"""Which runs a block of keys is cut into, by what the model feels of each channel's error.

The plain specification, in float32, for one block of one kv head: keys [n, D] after RoPE, and
weights w [D], how much the model's output minds a squared error of each channel, and salience
u [D], along which keys are looked at more. Everything faster must agree with it.

Runs go along the block's tokens in a sequence of its own (:mod:`.sequence`). A run's elements are
all held as their weighted mean. Tokens weigh

    m_t = clip(p_t / mean(p), 1/8, 8),
    p_t = exp(sum_d u_d k_td) sum_d w_d (k_td - mean_d)^2:

those that stand out from their block carry what attention recalls, and of these, those that lie
where queries look. A channel's runs cost

    sum_t m_t (k_td - mean of the run)^2 + (level / sqrt(w_d)) * runs.

Means lie closer together than keys, and a key that stands out, which is what recall looks for, is
scored the lower for it. So in each channel the means of runs of several tokens are *stretched* away
from the mean of all, by half of what the keys' variance (tokens weighed) is larger by, half as far
again at most.

*Optimal* runs have the smallest cost; *greedy* ones start where a key differs from the running
weighted mean of the run by more than ``sqrt(level) * w_d^(-1/4) * m_t^(-1/4)``, which takes one
pass. Scaling the keys by ``c``, the salience by ``1 / c`` and the weights by ``c^-2`` changes
nothing if the level is scaled by ``c``.
"""

from __future__ import annotations

import numpy as np

from .sequence import LEAST_WEIGHT, token_sequence
from .sums import over_lanes, over_tokens

LEAST_TOKEN, MOST_TOKEN = np.float32(1 / 8), np.float32(8)
STRETCH, MOST_STRETCH = np.float32(0.5), np.float32(1.5)


def token_weights(keys: np.ndarray, weights: np.ndarray, salience: np.ndarray) -> np.ndarray:
    """How much each token of keys [n, D] counts, [n]; all alike if the keys do not vary."""
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        deviation = keys - over_tokens(keys) / np.float32(len(keys))
        share = over_lanes(deviation * deviation * weights)
        looked_at = over_lanes(deviation * salience)
        share = share * np.exp(looked_at - looked_at.max())  # only ratios matter
        relative = share / (over_lanes(share) / np.float32(len(keys)))
    if not np.isfinite(relative).all():
        return np.ones(len(keys), np.float32)
    return np.clip(relative, LEAST_TOKEN, MOST_TOKEN)


def run_costs(weights: np.ndarray, level: float) -> np.ndarray:
    """What one more run of each channel costs, [D]."""
    return np.float32(level) / np.sqrt(np.maximum(weights, LEAST_WEIGHT))


def changes(keys: np.ndarray) -> np.ndarray:
    """Elements of keys [n, D] that differ from those of the token before; the first row."""
    starts = np.ones(keys.shape, bool)
    starts[1:] = keys[1:] != keys[:-1]  # a NaN differs from everything
    return starts


def optimal_starts(
    keys: np.ndarray, weights: np.ndarray, tokens: np.ndarray, level: float
) -> np.ndarray:
    """Which elements start a run, boolean [n, D], by dynamic programming for each channel.

    ``best[t]``, the least cost of the first ``t`` tokens, is the least over ``s < t`` of
    ``best[s]``, the error of one run from ``s`` to ``t``, and one more run; of equal ones the
    longest run. Prefix sums of deviations from the channel's mean give each run's error. A
    channel with NaN or infinity is not cut: every element starts a run, as at level 0 every
    change does.
    """
    if level == 0:
        return changes(keys)
    n, D = keys.shape
    finite = np.isfinite(keys).all(axis=0)
    values = np.where(finite, keys, np.float32(0))
    values = values - over_tokens(values) / np.float32(n)
    cost = run_costs(weights, level)
    total = np.concatenate([[0], np.cumsum(tokens, dtype=np.float32)]).astype(np.float32)
    first = np.zeros((n + 1, D), np.float32)
    for t in range(n):
        first[t + 1] = first[t] + tokens[t] * values[t]
    # best[s] - sum_(t < s) m_t k_td^2: the squares are in every cut's cost, and so in none.
    before = np.zeros((n + 1, D), np.float32)
    begin = np.zeros((n + 1, D), int)  # where the last run of the first t tokens begins
    for t in range(1, n + 1):
        least = np.full(D, np.inf, np.float32)
        for s in range(t):
            moment = first[t] - first[s]
            inverse = np.float32(1) / (total[t] - total[s])
            candidate = before[s] - moment * moment * inverse
            better = candidate < least
            least = np.where(better, candidate, least)
            begin[t] = np.where(better, s, begin[t])
        before[t] = least + cost
    starts = np.zeros((n, D), bool)
    starts[0] = True
    for d in range(D):
        t = n
        while t > 0:
            t = begin[t, d]
            starts[t, d] = True
    return starts | ~finite


def greedy_starts(
    keys: np.ndarray, weights: np.ndarray, tokens: np.ndarray, level: float
) -> np.ndarray:
    """Which elements start a run, boolean [n, D], in one pass over the tokens. NaN propagates."""
    starts = np.ones(keys.shape, bool)
    base = np.sqrt(run_costs(weights, level))
    first, total, weight = keys[0], np.zeros_like(keys[0]), np.full_like(keys[0], tokens[0])
    for t in range(1, len(keys)):
        threshold = base / np.sqrt(np.sqrt(tokens[t]))
        with np.errstate(invalid="ignore", over="ignore"):
            mean = first + total / weight
            starts[t] = ~(np.abs(keys[t] - mean) <= threshold)
            step = tokens[t] * (keys[t] - first)
            total = np.where(starts[t], np.float32(0), total + step)
        weight = np.where(starts[t], np.float32(0), weight) + tokens[t]
        first = np.where(starts[t], keys[t], first)
    return starts


def block_runs(
    keys: np.ndarray,
    weights: np.ndarray,
    salience: np.ndarray,
    level: float,
    optimal: bool,
    sinks: int,
) -> tuple[np.ndarray, np.ndarray]:
    """What a block's keys [n, D] are held as, float32, and which elements start a run.

    Both by token; a run goes on to the next token of the sequence.

    Args:
        keys: float32.
        weights: Of the channels, [D].
        salience: Of the channels, [D].
        level: What a run costs.
        optimal: Rather than greedy.
        sinks: Tokens at the start of the block that keep their keys.
    """
    sequence = token_sequence(keys, weights, sinks)
    in_sequence = keys[sequence]
    tokens = token_weights(in_sequence, weights, salience)
    cut = optimal_starts if optimal else greedy_starts
    cuts = cut_sinks(cut(in_sequence, weights, tokens, level), sinks)
    held, starts = np.empty_like(keys), np.empty_like(cuts)
    held[sequence] = held_values(in_sequence, cuts, tokens)
    starts[sequence] = cuts
    return held, starts


def cut_sinks(starts: np.ndarray, sinks: int) -> np.ndarray:
    """The same runs, cut so that each of the first ``sinks`` tokens stands alone, exact."""
    starts = starts.copy()
    if sinks > 0:
        starts[: sinks + 1] = True
    return starts


def weighted_means(keys: np.ndarray, starts: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """The weighted mean of each element's run, float32 [n, D].

    ``first + sum(m (key - first)) / sum(m)``, added up in the order of the tokens: of one value,
    or of equal ones, the mean is exactly that.
    """
    means = keys.copy()
    first = total = weight = np.zeros(keys.shape[1], np.float32)
    for t in range(len(keys)):
        first = np.where(starts[t], keys[t], first)
        with np.errstate(invalid="ignore", over="ignore"):
            step = tokens[t] * (keys[t] - first)
            total = np.where(starts[t], np.float32(0), total + step)
            weight = np.where(starts[t], np.float32(0), weight) + tokens[t]
            means[t] = np.where(starts[t], first, first + total / weight)  # of the run so far
    for t in range(len(keys) - 2, -1, -1):
        means[t] = np.where(starts[t + 1], means[t], means[t + 1])  # of all of it
    return means


def held_values(keys: np.ndarray, starts: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """What keys [n, D] with these runs are held as: their means, stretched.

    A run of one token stays that token's key; so do runs of equal keys, where all are held exactly.
    """
    means = weighted_means(keys, starts, tokens)
    weights, total = tokens[:, None], np.float32(0)
    for token in tokens:
        total = total + token
    with np.errstate(all="ignore"):
        center = over_tokens(weights * keys) / total
        apart = means - center
        of_keys = over_tokens(weights * ((keys - center) * (keys - center)))
        of_means = over_tokens(weights * (apart * apart))
        factor = np.minimum(1 + STRETCH * (of_keys / of_means - 1), MOST_STRETCH)
        alone = starts & np.append(starts[1:], np.ones_like(starts[:1]), axis=0)
        # NaN, of a channel that is constant or not finite, is not more than 1.
        return np.where(~alone & (factor > 1), center + apart * factor, means)


def runs_cost(
    keys: np.ndarray, starts: np.ndarray, weights: np.ndarray, tokens: np.ndarray, level: float
) -> np.ndarray:
    """What these runs of keys [n, D] cost, float64 [D]."""
    exact = weighted_means(keys.astype(np.float64), starts, tokens.astype(np.float64))
    error = (tokens[:, None] * (keys - exact) ** 2).sum(axis=0)
    return error + run_costs(weights, level) * starts.sum(axis=0)
