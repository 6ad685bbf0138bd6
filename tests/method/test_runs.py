"""Runs that cost least: the specification against brute force, and the operations against it."""

from __future__ import annotations

import itertools

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_delta import DeltaConfig
from mlx_delta.method import attention as reference
from mlx_delta.method import runs
from mlx_delta.method.sequence import token_sequence
from mlx_delta.ops.runs import hold_runs
from mlx_delta.sensitivities import Sensitivities

from ..tiny import smooth_keys

few = settings(max_examples=40, deadline=None)


NONE = np.float32(0)  # of salience: queries look at all keys alike


def _block(seed: int, n: int, channels: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    keys = smooth_keys((n, channels), seed) * rng.uniform(0.3, 3, channels).astype(np.float32)
    weights = rng.lognormal(0, 2, channels).astype(np.float32)
    return keys, weights, runs.token_weights(keys, weights, NONE)


def _sensitivities(heads: int, channels: int, seed: int = 0) -> Sensitivities:
    rng = np.random.default_rng(seed)
    weights = rng.lognormal(0, 2, (heads, channels))
    return Sensitivities([weights], salience=[rng.normal(0, 0.3, weights.shape)])


@few
@given(seed=st.integers(0, 10**6), n=st.integers(1, 7), level=st.floats(0.01, 10))
def test_optimal_runs_cost_no_more_than_any_others(seed, n, level):
    keys, weights, tokens = _block(seed, n, 2)
    starts = runs.optimal_starts(keys, weights, tokens, level)
    found = runs.runs_cost(keys, starts, weights, tokens, level)
    every = []
    for cuts in itertools.product([False, True], repeat=n - 1):
        tried = np.repeat(np.array([True, *cuts])[:, None], 2, axis=1)
        every.append(runs.runs_cost(keys, tried, weights, tokens, level))
    least = np.min(every, axis=0)
    np.testing.assert_allclose(found, least, rtol=1e-4, atol=1e-5)


@few
@given(seed=st.integers(0, 10**6), level=st.floats(0.01, 10))
def test_optimal_runs_cost_no_more_than_greedy_ones(seed, level):
    keys, weights, tokens = _block(seed, 32, 8)
    costs = [
        runs.runs_cost(keys, cut(keys, weights, tokens, level), weights, tokens, level)
        for cut in (runs.optimal_starts, runs.greedy_starts)
    ]
    assert (costs[0] <= costs[1] * (1 + 1e-4)).all()


@pytest.mark.parametrize("optimal", [True, False], ids=["optimal", "greedy"])
def test_level_0_is_exact(optimal):
    keys, weights, _ = _block(3, 64, 8)
    keys[10:20, 3] = keys[10, 3]
    held, starts = runs.block_runs(keys, weights, NONE, 0.0, optimal, sinks=0)
    np.testing.assert_array_equal(held, keys)
    sequence = token_sequence(keys, weights, 0)
    np.testing.assert_array_equal(starts[sequence], runs.changes(keys[sequence]))
    assert not starts[:, 3].all()


@few
@given(
    seed=st.integers(0, 10**6),
    factor=st.sampled_from([0.125, 0.5, 4.0, 64.0]),
    optimal=st.booleans(),
)
def test_units_of_the_keys_do_not_matter(seed, factor, optimal):
    """Powers of 4 and 16: exact, with their square roots."""
    keys, weights, _ = _block(seed, 32, 8)
    held, starts = runs.block_runs(keys, weights, NONE, 0.5, optimal, sinks=2)
    scaled = np.float32(factor)
    other, cuts = runs.block_runs(
        keys * scaled, weights / scaled**2, NONE, 0.5 * factor, optimal, sinks=2
    )
    assert (starts != cuts).mean() < 0.01  # square roots round
    if np.array_equal(starts, cuts):
        np.testing.assert_allclose(other, held * scaled, rtol=1e-5)


@few
@given(seed=st.integers(0, 10**6))
def test_optimal_runs_read_the_same_backwards(seed):
    keys, weights, tokens = _block(seed, 24, 8)
    cost = [
        runs.runs_cost(k, runs.optimal_starts(k, weights, m, 0.5), weights, m, 0.5)
        for k, m in ((keys, tokens), (keys[::-1].copy(), tokens[::-1].copy()))
    ]
    np.testing.assert_allclose(cost[0], cost[1], rtol=1e-4)


def test_an_offset_of_a_channel_does_not_matter():
    keys, weights, _ = _block(5, 64, 8)
    _, starts = runs.block_runs(keys, weights, NONE, 0.5, True, sinks=0)
    _, moved = runs.block_runs(keys + np.float32(16), weights, NONE, 0.5, True, sinks=0)
    assert (starts != moved).mean() < 0.02


def test_tokens_that_stand_out_count_more():
    keys = smooth_keys((64, 8)) * np.float32(0.1)
    keys[40] += 5
    tokens = runs.token_weights(keys, np.ones(8, np.float32), NONE)
    assert tokens.argmax() == 40
    assert tokens[40] == 8
    assert tokens.min() >= 0.125


def test_tokens_that_queries_look_at_count_more():
    keys = np.random.default_rng(0).normal(0, 1, (64, 8)).astype(np.float32)
    along = np.zeros(8, np.float32)
    along[2] = 3
    looked_at = runs.token_weights(keys, np.ones(8, np.float32), along)
    alike = runs.token_weights(keys, np.ones(8, np.float32), NONE)
    assert np.corrcoef(np.log(looked_at), keys[:, 2])[0, 1] > 0.7
    assert abs(np.corrcoef(np.log(alike), keys[:, 2])[0, 1]) < 0.3


def test_salience_has_no_units_of_its_own():
    """Keys of thousands overflow no exponential."""
    keys = np.random.default_rng(1).normal(0, 1e3, (16, 8)).astype(np.float32)
    tokens = runs.token_weights(keys, np.ones(8, np.float32), np.ones(8, np.float32))
    np.testing.assert_array_equal(np.unique(tokens), np.float32([0.125, 8]))
    moved = runs.token_weights(keys + 64, np.ones(8, np.float32), np.ones(8, np.float32))
    np.testing.assert_array_equal(tokens, moved)


@few
@given(seed=st.integers(0, 10**6), level=st.floats(0.01, 3))
def test_what_is_held_varies_more_than_means_by_half_of_what_they_lack(seed, level):
    keys, weights, tokens = _block(seed, 32, 8)
    starts = runs.optimal_starts(keys, weights, tokens, level)
    means, held = (f(keys, starts, tokens) for f in (runs.weighted_means, runs.held_values))
    share = (tokens / tokens.sum())[:, None].astype(np.float64)
    center = (share * keys).sum(axis=0)
    of_keys, of_means, of_held = (
        (share * (x - center) ** 2).sum(axis=0) for x in (keys, means, held)
    )
    varies = of_means > 1e-6 * of_keys  # not all of a channel is one run
    ratio = of_keys[varies] / of_means[varies]
    most = np.minimum(1 + (ratio - 1) / 2, 1.5) ** 2
    assert (of_held[varies] >= of_means[varies] * (1 - 1e-5)).all()
    assert (of_held[varies] <= of_means[varies] * most * (1 + 1e-4)).all()
    assert (np.abs(held - means) <= 0.5 * np.abs(means - center) + 1e-5).all()


def test_a_run_of_one_token_is_its_key_and_others_are_stretched():
    keys = np.array([0, 0.25, 4, 9, -1], np.float32)[:, None]
    starts = np.array([1, 0, 1, 1, 0], bool)[:, None]
    held = runs.held_values(keys, starts, np.ones(5, np.float32))[:, 0]
    center = keys.mean()
    apart = np.array([0.125, 0.125, 4, 4, 4]) - center
    factor = 1 + (keys.var() / np.mean(apart**2) - 1) / 2
    assert factor > 1.5
    wanted = [*(center + 1.5 * apart[:2]), 4, *(center + 1.5 * apart[3:])]
    np.testing.assert_allclose(held, wanted, rtol=1e-6)
    exact = runs.held_values(keys, np.ones((5, 1), bool), np.ones(5, np.float32))
    np.testing.assert_array_equal(exact, keys)


def test_higher_levels_hold_more():
    keys, weights, _ = _block(1, 64, 16)
    zeros = [
        (~runs.block_runs(keys, weights, NONE, level, True, sinks=0)[1]).mean()
        for level in (0.0, 0.01, 0.1, 1.0, 10.0, 1e6)
    ]
    assert zeros == sorted(zeros)
    assert zeros[0] == 0
    assert zeros[-1] == 63 / 64


def test_heavy_channels_are_cut_more_often():
    keys = np.repeat(smooth_keys((64, 1)), 2, axis=1)
    starts = runs.optimal_starts(keys, np.array([1, 100], np.float32), np.ones(64, np.float32), 0.5)
    assert starts[:, 1].sum() > starts[:, 0].sum()


CONFIGS = {
    "optimal": DeltaConfig(block_size=8, window=8, level=0.2),
    "greedy": DeltaConfig(block_size=8, window=8, threshold_mode="greedy", level=0.2),
    "optimal, weights": DeltaConfig(
        block_size=16, window=16, level=0.3, sensitivities=_sensitivities(3, 20)
    ),
    "greedy, weights": DeltaConfig(
        block_size=16,
        window=16,
        threshold_mode="greedy",
        level=0.3,
        sensitivities=_sensitivities(3, 20),
    ),
    "many sinks": DeltaConfig(block_size=8, window=8, sinks=21, level=0.2),
    "no sinks": DeltaConfig(block_size=8, window=8, sinks=0, level=0.2),
    "level 0": DeltaConfig(block_size=8, window=8, level=0.0),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("blocks", [1, 2, 5])
def test_operations_agree_with_the_specification(config, blocks):
    size = config.block_size
    keys = smooth_keys((2, 3, blocks * size, 20))
    held, starts, zeros = hold_runs(mx.array(keys).reshape(2, 3, blocks, size, 20), config, 0)
    for row, head in np.ndindex(2, 3):
        own = config.for_head(head)
        wanted, cuts = reference.hold_by_cost(keys[row, head], own)
        np.testing.assert_array_equal(
            np.array(starts)[row, head].reshape(-1, 20), cuts, f"{row}, {head}"
        )
        got = np.array(held)[row, head].reshape(-1, 20)
        np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(
            np.array(zeros)[row, head], (~cuts).reshape(blocks, -1).sum(axis=1)
        )


@pytest.mark.parametrize("mode", ["optimal", "greedy"])
def test_blocks_do_not_depend_on_each_other(mode):
    config = DeltaConfig(block_size=8, window=8, threshold_mode=mode, level=0.2)
    keys = mx.array(smooth_keys((1, 2, 5, 8, 16)))
    together = hold_runs(keys, config, 0)
    for block in range(5):
        alone = hold_runs(keys[:, :, block : block + 1], config, block)
        for whole, part in zip(together, alone, strict=True):
            np.testing.assert_array_equal(whole[:, :, block], part[:, :, 0])


@pytest.mark.parametrize("mode", ["optimal", "greedy"])
@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_stay_with_their_channel_and_block(mode, broken):
    config = DeltaConfig(block_size=8, window=8, sinks=0, threshold_mode=mode, level=0.2)
    keys = smooth_keys((1, 1, 3, 8, 16))
    keys[0, 0, 1, 4, 7] = broken
    held = np.array(hold_runs(mx.array(keys), config, 0)[0])
    finite = np.isfinite(held)
    assert finite[:, :, [0, 2]].all()
    assert finite[..., [c for c in range(16) if c != 7]].all()
    np.testing.assert_equal(held[0, 0, 1, 4, 7], np.float32(broken))


def test_mlx_and_numpy_cut_alike():
    """The steps that run on a GPU for which there is no kernel are NumPy's."""
    from mlx_delta.ops import runs as ops

    keys = smooth_keys((4, 16, 12))
    rng = np.random.default_rng(0)
    weights = rng.lognormal(0, 2, (4, 12)).astype(np.float32)
    salience = rng.normal(0, 0.3, (4, 12)).astype(np.float32)
    for optimal in (True, False):
        sinks = np.array([2, 0, 0, 0])
        felt = weights, salience
        numpy = ops.cut_blocks(np, keys, *felt, sinks, optimal, 0.3)
        mlx = ops.cut_blocks(mx, *map(mx.array, (keys, *felt)), sinks, optimal, 0.3)
        np.testing.assert_array_equal(numpy[1], np.array(mlx[1]))
        np.testing.assert_allclose(numpy[0], np.array(mlx[0]), rtol=1e-5, atol=1e-6)
