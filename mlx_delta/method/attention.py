"""Hybrid delta attention in plain float32 steps, for one head.

This file is the specification: everything faster in this library must agree with it. It follows
DeltaLLM (arXiv 2507.19608), in the blocked form that :class:`mlx_delta.DeltaConfig` describes;
``DeltaConfig.paper()`` gives the paper's own setting. Where heads have thresholds of their own,
``config.for_head(head)`` is the setting to give. NumPy only, one loop per sum, no batching.

Shapes: queries [L, D], keys [N, D], values [N, Dv]; the queries are the last L positions. Keys
are taken after RoPE.
"""

from __future__ import annotations

import numpy as np

from mlx_delta.config import DeltaConfig

from .runs import block_runs
from .sequence import token_sequence


def block_threshold(keys: np.ndarray, config: DeltaConfig) -> np.float32:
    """The threshold of one complete block of keys [block_size, D].

    Relative: ``threshold * rms(keys - mean over the block's tokens)``, over all its elements.
    """
    threshold = np.float32(config.head_threshold)
    if config.threshold_mode == "absolute":
        return threshold
    deviation = keys - keys.mean(axis=0, dtype=np.float32)
    return np.float32(threshold * np.sqrt(np.mean(deviation * deviation, dtype=np.float32)))


def starts_anew(position: int, config: DeltaConfig) -> bool:
    """Whether all of a key propagates: sinks, keyframes, and always the first key."""
    keyframe = config.keyframes and position % config.block_size == 0
    return keyframe or position < max(config.sinks, 1)


def find_runs(keys: np.ndarray, config: DeltaConfig) -> np.ndarray:
    """Which elements of a whole text's keys [N, D] propagate, and so start a run, by token.

    ``keys[t, d]`` propagates if it differs from its run's first value by more than the block's
    threshold. That is the last value that *propagated*, so errors never add up. NaN propagates.
    An unfinished last block is never far from any query: all of it propagates. Settings that cut
    runs by their costs have rules of their own, see :mod:`mlx_delta.method.runs`.
    """
    if config.cuts_runs:
        return hold_by_cost(keys, config)[1]
    keys = keys.astype(np.float32)
    starts = np.ones(keys.shape, bool)
    first = np.zeros(keys.shape[1], np.float32)  # of each channel's run
    for start in range(0, len(keys) - config.block_size + 1, config.block_size):
        threshold = block_threshold(keys[start : start + config.block_size], config)
        for t in range(start, start + config.block_size):
            if not starts_anew(t, config):
                starts[t] = ~(np.abs(keys[t] - first) <= threshold)
            first = np.where(starts[t], keys[t], first)
    return starts


def hold(keys: np.ndarray, config: DeltaConfig) -> np.ndarray:
    """Held keys [N, D] of a whole text: the mean of each run, or as in the paper its first value.

    ``held[t, d]`` is ``held[t - 1, d]`` unless ``keys[t, d]`` propagates. It differs from
    ``keys[t, d]`` by at most the threshold with first values, by at most twice that with means.
    """
    if config.cuts_runs:
        return hold_by_cost(keys, config)[0]
    keys = keys.astype(np.float32)
    starts = find_runs(keys, config)
    if config.run_value == "mean":
        return run_means(keys, starts, config.sinks)
    held = keys.copy()
    for t in range(1, len(keys)):
        held[t] = np.where(starts[t], keys[t], held[t - 1])
    return held


def hold_by_cost(keys: np.ndarray, config: DeltaConfig) -> tuple[np.ndarray, np.ndarray]:
    """Held keys [N, D] in the modes that cut runs, and which elements start one, by token."""
    held = keys.astype(np.float32)
    starts = np.ones(keys.shape, bool)
    weights, salience = (x[0] for x in config.sensitivities_of_layer(1, keys.shape[1]))
    for start in range(0, len(keys) - config.block_size + 1, config.block_size):
        block = slice(start, start + config.block_size)
        held[block], starts[block] = block_runs(
            held[block],
            weights,
            salience,
            config.run_level,
            optimal=config.threshold_mode == "optimal",
            sinks=config.sinks - start,
        )
    return held, starts


def run_means(keys: np.ndarray, starts: np.ndarray, sinks: int) -> np.ndarray:
    """The mean of each element's run, float32 [N, D]; where it starts at a sink, its first value.

    ``first + sum(key - first) / count``, added up in the order of the tokens: of one value, or of
    equal ones, the mean is exactly that.

    Args:
        keys: float32 [N, D].
        starts: Which of them start a run, boolean [N, D]; all of the first row.
        sinks: Tokens at the start that keep their keys.
    """
    means = keys.copy()
    begin = np.zeros(keys.shape[1], int)
    first = total = np.zeros(keys.shape[1], np.float32)
    for t in range(len(keys)):
        begin = np.where(starts[t], t, begin)
        first = np.where(starts[t], keys[t], first)
        with np.errstate(invalid="ignore", over="ignore"):
            total = np.where(starts[t], np.float32(0), total + (keys[t] - first))
            mean = first + total / (t - begin + 1).astype(np.float32)
        means[t] = np.where(begin < sinks, first, mean)  # of the run so far
    for t in range(len(keys) - 2, -1, -1):
        means[t] = np.where(starts[t + 1], means[t], means[t + 1])  # of all of it
    return means


def text_sequence(keys: np.ndarray, config: DeltaConfig) -> np.ndarray:
    """A whole text's tokens [N] in the sequence in which keys [N, D] are held.

    That of the text, except in the modes that cut runs: there every block has its own.
    """
    sequence = np.arange(len(keys))
    if not config.cuts_runs:
        return sequence
    size, keys = config.block_size, keys.astype(np.float32)
    weights = config.sensitivities_of_layer(1, keys.shape[1])[0][0]
    for start in range(0, len(keys) - size + 1, size):
        own = token_sequence(keys[start : start + size], weights, config.sinks - start)
        sequence[start : start + size] = start + own.astype(int)
    return sequence


def delta_keys(held: np.ndarray, config: DeltaConfig) -> np.ndarray:
    """The delta key matrix: ``held[t] - held[t - 1]``, zero wherever a value was held.

    A row where the hold starts anew stands for itself. Held keys come, and deltas go, in the
    sequence of :func:`text_sequence`.
    """
    delta = held.copy()
    for t in range(1, len(held)):
        if not starts_anew(t, config):
            delta[t] = held[t] - held[t - 1]
    return delta


def recurrent_scores(query: np.ndarray, delta: np.ndarray, config: DeltaConfig) -> np.ndarray:
    """Scores of one query [D] along the delta keys [N, D], running along them in their sequence.

    ``q.held[t] = q.held[t - 1] + q.delta[t]``: every zero of the delta key matrix is a
    multiply-accumulate that need not be done.
    """
    scores = np.zeros(len(delta), np.float32)
    for t in range(len(delta)):
        changed = delta[t] != 0
        update = np.dot(query[changed], delta[t, changed])
        scores[t] = update if starts_anew(t, config) else scores[t - 1] + update
    return scores


def exact_pairs(n_queries: int, n_keys: int, config: DeltaConfig) -> np.ndarray:
    """Which pairs [L, N] are computed with the full key: near blocks, and the sinks."""
    query_block = np.arange(n_keys - n_queries, n_keys)[:, None] // config.block_size
    key = np.arange(n_keys)[None]
    near = key // config.block_size >= query_block - config.window_blocks
    return near | (key < config.sinks)


def hybrid_attention(
    queries: np.ndarray, keys: np.ndarray, values: np.ndarray, config: DeltaConfig, scale: float
) -> np.ndarray:
    """Attention output [L, Dv]: full keys near the query, held keys further away.

    Scores, then scale, causal mask, float32 softmax; the values are untouched.
    """
    queries, keys, values = (x.astype(np.float32) for x in (queries, keys, values))
    n_queries, n_keys = len(queries), len(keys)
    scores = np.where(
        exact_pairs(n_queries, n_keys, config),
        queries @ keys.T,
        queries @ hold(keys, config).T,
    )
    causal = np.arange(n_keys)[None] <= np.arange(n_keys - n_queries, n_keys)[:, None]
    scores = np.where(causal, scores * np.float32(scale), -np.inf)
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return (weights / weights.sum(axis=1, keepdims=True)) @ values


def count_zeros(keys: np.ndarray, config: DeltaConfig) -> np.ndarray:
    """How many elements of each key [N] are held: the zeros of the delta key matrix.

    Means of neighbouring runs may be equal by chance; such zeros do not count.
    """
    if config.run_value == "mean":
        return (~find_runs(keys, config)).sum(axis=1)
    delta = delta_keys(hold(keys, config), config)
    anew = np.array([starts_anew(t, config) for t in range(len(keys))])
    return np.where(anew, 0, (delta == 0).sum(axis=1))


def sparsity(keys: np.ndarray, config: DeltaConfig, first_query: int, end_query: int) -> float:
    """Multiply-accumulates of QK^T skipped / all causal ones, for a range of query positions.

    Pairs computed exactly count as not skipped.
    """
    n_keys, head_dim = keys.shape
    zeros = count_zeros(keys, config)
    exact = exact_pairs(n_keys, n_keys, config)
    skipped = total = 0
    for query in range(first_query, end_query):
        for key in range(query + 1):
            total += head_dim
            skipped += 0 if exact[query, key] else zeros[key]
    return skipped / total if total else 0.0


def paper_sparsity(keys: np.ndarray, config: DeltaConfig) -> float:
    """The paper's own figure: ``zeros(delta) / numel(delta) * (1 - w / L)``.

    Counted over the blocks that the last query sees as held; ``w`` is the longest exact span,
    ``window + block_size``.
    """
    n_keys, head_dim = keys.shape
    far = ((n_keys - 1) // config.block_size - config.window_blocks) * config.block_size
    if far <= 0:
        return 0.0
    zeros = count_zeros(keys, config)[:far].sum()
    span = min(config.window + config.block_size, n_keys)
    return zeros / (far * head_dim) * (1 - span / n_keys)
