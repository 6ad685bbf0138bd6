"""The specification against the paper's own words: what holding means, and what it saves."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mlx_delta import DeltaConfig
from mlx_delta.method import attention as reference
from tests.tiny import SMALL, smooth_keys

PAPER = DeltaConfig.paper().resolve(100)
SETTINGS = {
    "blocks, relative": SMALL,
    "blocks, absolute": DeltaConfig(
        block_size=8, window=8, threshold=0.5, threshold_mode="absolute"
    ),
    "blocks, first values": dataclasses.replace(SMALL, run_value="first"),
    "paper": PAPER,
    "paper, blocks of one": DeltaConfig.paper().resolve(20),
}
each_setting = pytest.mark.parametrize("config", SETTINGS.values(), ids=SETTINGS.keys())

keys_strategy = arrays(
    np.float32, st.tuples(st.integers(1, 40), st.just(4)), elements=st.floats(-4, 4, width=32)
)


WORKED = DeltaConfig(threshold=1.0, threshold_mode="absolute", block_size=6, window=0, sinks=0)
WORKED_KEYS = np.array([[0.0], [0.9], [1.1], [2.0], [0.2], [0.05]], np.float32)


def test_worked_example():
    """Threshold 1: 0.9 is held at 0, 1.1 propagates, and then 1.1 is what the next is held to."""
    config = dataclasses.replace(WORKED, run_value="first")
    held = np.array([[0.0], [0.0], [1.1], [1.1], [1.1], [0.05]], np.float32)
    np.testing.assert_array_equal(reference.hold(WORKED_KEYS, config), held)
    delta = reference.delta_keys(held, config)
    np.testing.assert_allclose(delta[:, 0], [0, 0, 1.1, 0, 0, -1.05], atol=1e-6)


def test_worked_example_of_means():
    """The same runs, 0 0.9, 1.1 2.0 0.2 and 0.05, each as its mean."""
    held = reference.hold(WORKED_KEYS, WORKED)
    np.testing.assert_allclose(held[:, 0], [0.45, 0.45, 1.1, 1.1, 1.1, 0.05], atol=1e-6)
    assert reference.count_zeros(WORKED_KEYS, WORKED).tolist() == [0, 1, 0, 1, 1, 0]


def runs_of(starts: np.ndarray) -> list[slice]:
    """The runs of one channel."""
    borders = [*np.flatnonzero(starts), len(starts)]
    return [slice(*pair) for pair in zip(borders, borders[1:], strict=False)]


@each_setting
@given(keys=keys_strategy)
@settings(deadline=None, max_examples=40)
def test_the_error_stays_within_the_threshold(config, keys):
    """The reference is the last propagated value, so errors never add up."""
    held = reference.hold(keys, config)
    furthest = 2 * (1 + 1e-6) if config.run_value == "mean" else 1
    for start in range(0, len(keys) - config.block_size + 1, config.block_size):
        block = slice(start, start + config.block_size)
        threshold = reference.block_threshold(keys[block], config)
        assert np.all(np.abs(held[block] - keys[block]) <= furthest * threshold + 1e-37)


@given(keys=keys_strategy)
@settings(deadline=None, max_examples=40)
def test_errors_of_means_cancel_within_each_run(keys):
    """Their sum is 0, and so is what they add to a query's mean score over the run."""
    held = reference.hold(keys, SMALL)
    starts = reference.find_runs(keys, SMALL)
    for d in range(keys.shape[1]):
        for run in runs_of(starts[:, d]):
            values = keys[run, d].astype(np.float64)
            wanted = values[0] if run.start < SMALL.sinks else values.mean()
            np.testing.assert_allclose(held[run, d], wanted, atol=2e-6)


@given(keys=keys_strategy)
@settings(deadline=None, max_examples=40)
def test_means_have_the_smallest_error(keys):
    """Over the same runs, as first values have them."""
    firsts = dataclasses.replace(SMALL, run_value="first")
    np.testing.assert_array_equal(
        reference.find_runs(keys, SMALL), reference.find_runs(keys, firsts)
    )
    of_means, of_firsts = (
        np.square(reference.hold(keys, config).astype(np.float64) - keys).sum()
        for config in (SMALL, firsts)
    )
    assert of_means <= of_firsts * (1 + 1e-5) + 1e-12


@given(value=st.floats(-(2.0**100), 2.0**100, width=32), count=st.integers(1, 64))
@settings(deadline=None, max_examples=100)
def test_the_mean_of_equal_values_is_that_value(value, count):
    keys = np.full((count, 1), value, np.float32)
    starts = np.arange(count)[:, None] == 0
    np.testing.assert_array_equal(reference.run_means(keys, starts, 0), keys)


@each_setting
def test_scores_by_recurrence_are_the_scores(config):
    """q.held[t] = q.held[t - 1] + q.delta[t], with the zeros of the delta left out."""
    keys = smooth_keys((100, 16))
    query = np.random.default_rng(1).normal(size=16).astype(np.float32)
    held = reference.hold(keys, config)
    scores = reference.recurrent_scores(query, reference.delta_keys(held, config), config)
    np.testing.assert_allclose(scores, held @ query, atol=2e-4)


@each_setting
def test_threshold_zero_holds_only_what_did_not_change(config):
    keys = smooth_keys((100, 16)).round(1)  # rounded: some values really do repeat
    zero = DeltaConfig(**{**config.to_dict(), "threshold": 0.0})
    np.testing.assert_array_equal(reference.hold(keys, zero), keys)


def test_keyframes_make_blocks_independent():
    keys = smooth_keys((64, 16))
    held = reference.hold(keys, SMALL)
    alone = DeltaConfig(**{**SMALL.to_dict(), "sinks": 0})
    for start in range(8, 64, 8):
        block = slice(start, start + 8)
        np.testing.assert_array_equal(held[block], reference.hold(keys[block], alone))


@each_setting
def test_zeros_are_those_of_the_delta_key_matrix(config):
    keys = smooth_keys((100, 16))
    delta = reference.delta_keys(reference.hold(keys, config), config)
    end = len(keys) // config.block_size * config.block_size
    anew = [reference.starts_anew(t, config) for t in range(end)]
    wanted = np.where(anew, 0, (delta[:end] == 0).sum(axis=1))
    np.testing.assert_array_equal(reference.count_zeros(keys, config)[:end], wanted)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
def test_a_value_that_is_not_finite_stays_in_its_own_run(value):
    config = DeltaConfig(block_size=8, window=0, sinks=0, threshold=0.5, threshold_mode="absolute")
    keys = np.ones((16, 2), np.float32)
    keys[[0, 5, 12], 1] = value
    np.testing.assert_array_equal(reference.hold(keys, config), keys)


def test_the_window_and_the_sinks_are_exact():
    """Blocks of 8 with two blocks of window: a query sees 16 to 23 tokens before it exactly."""
    exact = reference.exact_pairs(100, 100, SMALL)
    for query in range(100):
        first_exact = max(0, query // 8 - 2) * 8
        assert exact[query, first_exact : query + 1].all()
        assert not exact[query, SMALL.sinks : first_exact].any()
        assert exact[query, : SMALL.sinks].all()


def test_a_window_longer_than_the_text_is_dense_attention():
    keys, values, queries = (smooth_keys((50, 16), seed) for seed in range(3))
    dense = DeltaConfig(threshold=0.0)
    windowed = DeltaConfig(threshold=9.0, window=64)
    np.testing.assert_array_equal(
        reference.hybrid_attention(queries, keys, values, windowed, 0.25),
        reference.hybrid_attention(queries, keys, values, dense, 0.25),
    )


def test_sparsity_counts_every_causal_pair():
    """Constant keys: all deltas are zero but for keyframes, sinks and the exact window."""
    keys = np.ones((64, 16), np.float32)
    expected = sum(
        not (key >= (query // 8 - 2) * 8 or key < 3 or key % 8 == 0)
        for query in range(64)
        for key in range(query + 1)
    ) / (64 * 65 / 2)
    assert reference.sparsity(keys, SMALL, 0, 64) == pytest.approx(expected)


def test_the_papers_setting_skips_on_a_short_prompt():
    """WinoGrande's prompts have some 20 tokens: blocks of 64 would have nothing to skip."""
    keys = smooth_keys((20, 64))
    assert reference.sparsity(keys, DeltaConfig.paper(1.0).resolve(20), 0, 20) > 0.5
    assert reference.sparsity(keys, DeltaConfig(), 0, 20) == 0
