"""The MLX encoder against the specification."""

from __future__ import annotations

import dataclasses

import mlx.core as mx
import numpy as np
import pytest

from mlx_delta import DeltaConfig
from mlx_delta.method import attention as reference
from mlx_delta.ops.hold import hold_blocks, hold_text
from tests.tiny import SMALL, smooth_keys

CHAIN = DeltaConfig(
    block_size=8,
    window=0,
    keyframes=False,
    run_value="first",
    threshold=0.6,
    threshold_mode="absolute",
    sinks=1,
)
SETTINGS = {
    "blocks, relative": SMALL,
    "blocks, absolute": DeltaConfig(
        block_size=8, window=8, threshold=0.5, threshold_mode="absolute"
    ),
    "chain, absolute": CHAIN,
    "chain, relative": DeltaConfig(block_size=8, window=8, keyframes=False, run_value="first"),
    "chain, blocks of one": DeltaConfig.paper().resolve(20),
    "many sinks": DeltaConfig(block_size=8, window=8, sinks=21, threshold=1.0),
    "no sinks": DeltaConfig(block_size=8, window=8, sinks=0, threshold=1.0),
    "first values": dataclasses.replace(SMALL, run_value="first"),
    "first values, absolute": DeltaConfig(
        block_size=8, window=8, threshold=0.5, threshold_mode="absolute", run_value="first"
    ),
    "heads, relative": DeltaConfig(block_size=8, window=8, threshold=((0.5, 1.5, 1),)),
    "heads, first values": DeltaConfig(
        block_size=8, window=8, threshold=((0.5, 1.5, 1),), run_value="first"
    ),
    "heads, chain": dataclasses.replace(CHAIN, threshold=((0.4, 1.2, 0.7),)),
}
each_setting = pytest.mark.parametrize("config", SETTINGS.values(), ids=SETTINGS.keys())


def _reference(keys: np.ndarray, config: DeltaConfig) -> np.ndarray:
    return np.stack(
        [[reference.hold(head, config.for_head(h)) for h, head in enumerate(row)] for row in keys]
    )


@each_setting
@pytest.mark.parametrize("blocks", [1, 2, 5])
def test_agrees_with_the_reference(config, blocks):
    keys = smooth_keys((2, 3, blocks * config.block_size, 20))
    held, zeros = hold_blocks(mx.array(keys), config)
    np.testing.assert_array_equal(held, _reference(keys, config))
    for row in range(2):
        for head in range(3):
            counted = reference.count_zeros(keys[row, head], config.for_head(head))
            expected = counted.reshape(blocks, config.block_size).sum(axis=1)
            np.testing.assert_array_equal(zeros[row, head], expected)


@each_setting
def test_encoding_block_by_block_is_encoding_at_once(config):
    keys = mx.array(smooth_keys((1, 3, 6 * config.block_size, 20)))
    whole, whole_zeros = hold_blocks(keys, config)
    parts, zeros, previous = [], [], None
    for first, end in ((0, 1), (1, 4), (4, 6)):
        part = keys[:, :, first * config.block_size : end * config.block_size]
        held, count = hold_blocks(part, config, first, previous)
        parts.append(held)
        zeros.append(count)
        previous = None if config.keyframes else held[:, :, -1]
    assert mx.array_equal(mx.concatenate(parts, axis=2), whole)
    assert mx.array_equal(mx.concatenate(zeros, axis=2), whole_zeros)


each_half = pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=["fp16", "bf16"])


@each_half
def test_half_types_hold_their_own_values(dtype):
    """Compared in float32, stored as they were: no first value appears that was not a key."""
    config = dataclasses.replace(SMALL, run_value="first")
    keys = mx.array(smooth_keys((1, 2, 32, 16))).astype(dtype)
    held, _ = hold_blocks(keys, config)
    assert held.dtype == dtype
    expected = _reference(np.array(keys.astype(mx.float32)), config)
    np.testing.assert_array_equal(held.astype(mx.float32), expected)


@each_half
def test_means_of_half_types_are_rounded_once(dtype):
    keys = mx.array(smooth_keys((1, 2, 32, 16))).astype(dtype)
    held, _ = hold_blocks(keys, SMALL)
    assert held.dtype == dtype
    expected = mx.array(_reference(np.array(keys.astype(mx.float32)), SMALL))
    assert mx.array_equal(held, expected.astype(dtype))


@pytest.mark.parametrize("name", ["blocks, relative", "blocks, absolute", "many sinks", "no sinks"])
def test_the_same_values_propagate_whatever_runs_are_held_as(name):
    config = SETTINGS[name]
    keys = mx.array(smooth_keys((2, 3, 48, 20)))
    held, zeros = hold_blocks(keys, config)
    firsts, zeros_of_firsts = hold_blocks(keys, dataclasses.replace(config, run_value="first"))
    assert mx.array_equal(zeros, zeros_of_firsts)
    assert mx.array_equal(held[:, :, 1:] == held[:, :, :-1], firsts[:, :, 1:] == firsts[:, :, :-1])
    assert not mx.array_equal(held, firsts)


def test_equal_means_of_neighbouring_runs_are_two_runs():
    """0 1 1 1 and 1.25 0.25 0.75 both have the mean 0.75: five elements are held, not six."""
    config = DeltaConfig(block_size=8, window=0, sinks=0, threshold=1.0, threshold_mode="absolute")
    column = np.array([0, 1, 1, 1, 1.25, 0.25, 0.75, 3], np.float32)
    held, zeros = hold_blocks(mx.array(column.reshape(1, 1, 8, 1)), config)
    np.testing.assert_array_equal(np.array(held).ravel(), [0.75] * 7 + [3])
    assert zeros.item() == reference.count_zeros(column[:, None], config).sum() == 5


def test_a_run_that_starts_at_a_sink_keeps_its_exact_value():
    config = DeltaConfig(block_size=8, window=0, sinks=3, threshold=1.0, threshold_mode="absolute")
    column = np.array([0.1, 0.2, 0.3, 0.4, 0.6, 5.0, 5.5, 6.0], np.float32)
    held, _ = hold_blocks(mx.array(column.reshape(1, 1, 8, 1)), config)
    wanted = np.array([0.1, 0.2, 0.3, 0.3, 0.3, 5.5, 5.5, 5.5], np.float32)
    np.testing.assert_array_equal(np.array(held).ravel(), wanted)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("name", ["blocks, absolute", "chain, absolute", "chain, blocks of one"])
def test_nan_and_infinity_are_not_hidden(name, value):
    config = SETTINGS[name]
    keys = np.ones((1, 1, 4 * config.block_size, 4), np.float32)
    keys[0, 0, 2, 1] = value
    held, _ = hold_blocks(mx.array(keys), config)
    np.testing.assert_array_equal(held, keys)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
def test_a_relative_block_with_a_value_that_is_not_finite_propagates_it(value):
    keys = np.ones((1, 1, 16, 4), np.float32)
    keys[0, 0, 5, 1] = value
    held, _ = hold_blocks(mx.array(keys), DeltaConfig(block_size=8, window=8))
    np.testing.assert_array_equal(held, keys)


@pytest.mark.parametrize("length", [129, 200, 320, 1001])
def test_a_long_chain_walked_in_segments_is_the_literal_one(length):
    rng = np.random.default_rng(length)
    keys = smooth_keys((1, 2, length, 24))
    keys[:, :, :, 3] = 0.25  # held from end to end: what is handed on goes through all segments
    keys[:, :, :, 4] *= 1e-4
    keys[0, 1, rng.integers(length), 5] = np.nan
    keys[0, 1, rng.integers(length), 6] = -np.inf
    config = dataclasses.replace(CHAIN, block_size=length, sinks=3)
    held, zeros = hold_blocks(mx.array(keys), config)
    np.testing.assert_array_equal(held, _reference(keys, config))
    assert 0.2 < zeros.sum() / keys.size < 0.8


def test_rows_at_different_positions_go_on_as_if_alone():
    keys, cuts = smooth_keys((3, 2, 200, 16)), [0, 37, 140]
    whole, zeros = hold_text(mx.array(keys), CHAIN, [0, 0, 0])
    rows = [
        mx.pad(mx.array(k[:, c:]), [(0, 0), (0, c), (0, 0)])
        for k, c in zip(keys, cuts, strict=True)
    ]
    previous = mx.stack([whole[row, :, max(0, cut - 1)] for row, cut in enumerate(cuts)])
    parts, counts = hold_text(mx.stack(rows), CHAIN, cuts, previous)
    for row, cut in enumerate(cuts):
        assert mx.array_equal(parts[row, :, : 200 - cut], whole[row, :, cut:])
        assert mx.array_equal(counts[row, :, : 200 - cut], zeros[row, :, cut:])
