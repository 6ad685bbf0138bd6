"""The specification against the paper's own words: what holding means, and what it saves."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mlx_delta import DeltaConfig, reference

from .tiny import SMALL, smooth_keys

PAPER = DeltaConfig.paper().resolve(100)
SETTINGS = {
    "blocks, relative": SMALL,
    "blocks, absolute": DeltaConfig(
        block_size=8, window=8, threshold=0.5, threshold_mode="absolute"
    ),
    "paper": PAPER,
    "paper, blocks of one": DeltaConfig.paper().resolve(20),
}
each_setting = pytest.mark.parametrize("config", SETTINGS.values(), ids=SETTINGS.keys())

keys_strategy = arrays(
    np.float32, st.tuples(st.integers(1, 40), st.just(4)), elements=st.floats(-4, 4, width=32)
)


def test_worked_example():
    """Threshold 1: 0.9 is held at 0, 1.1 propagates, and then 1.1 is what the next is held to."""
    config = DeltaConfig(threshold=1.0, threshold_mode="absolute", block_size=6, window=0, sinks=0)
    keys = np.array([[0.0], [0.9], [1.1], [2.0], [0.2], [0.05]], np.float32)
    held = np.array([[0.0], [0.0], [1.1], [1.1], [1.1], [0.05]], np.float32)
    np.testing.assert_array_equal(reference.hold(keys, config), held)
    delta = reference.delta_keys(held, config)
    np.testing.assert_allclose(delta[:, 0], [0, 0, 1.1, 0, 0, -1.05], atol=1e-6)


@each_setting
@given(keys=keys_strategy)
@settings(deadline=None, max_examples=40)
def test_the_error_stays_within_the_threshold(config, keys):
    """The reference is the last propagated value, so errors never add up."""
    held = reference.hold(keys, config)
    for start in range(0, len(keys) - config.block_size + 1, config.block_size):
        block = slice(start, start + config.block_size)
        threshold = reference.block_threshold(keys[block], config)
        assert np.all(np.abs(held[block] - keys[block]) <= threshold)


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
