"""The specification of held keys by lanes, against what it says of itself."""

from __future__ import annotations

import numpy as np
import pytest

from mlx_delta.method import deltas as ref
from mlx_delta.method.runs import held_values, optimal_starts, token_weights
from mlx_delta.method.sequence import token_sequence
from mlx_delta.method.storage import LARGEST_STEP, short_steps, whole_steps

WEIGHTS, SALIENCE = np.ones(16, np.float32), np.zeros(16, np.float32)
WIDTHS = np.array([4, 2] * 8)  # lane 0 has the even channels, lane 1 the odd ones


def walk(n: int, step: float = 0.3) -> np.ndarray:
    rng = np.random.default_rng(n)
    keys = 2 * rng.normal(size=16) + np.cumsum(rng.normal(size=(n, 16)), axis=0) * step
    return keys.astype(np.float16).astype(np.float32)


def pack(keys: np.ndarray, level: float = 1.0, sinks: int = 0, **changes) -> ref.DeltaBlock:
    settings = {"weights": WEIGHTS, "salience": SALIENCE, "optimal": True, "widths": WIDTHS}
    return ref.pack_block(keys, level=level, sinks=sinks, dtype="float16", **settings | changes)


def runs_of(keys: np.ndarray, level: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Starts and means, both in sequence."""
    keys = keys[token_sequence(keys, WEIGHTS, 0)]
    tokens = token_weights(keys, WEIGHTS, SALIENCE)
    starts = optimal_starts(keys, WEIGHTS, tokens, level)
    return starts, held_values(keys, starts, tokens)


@pytest.mark.parametrize("n", [8, 24, 64])
def test_words(n):
    """Which lanes are held, masks of 16 tokens, then one stream of codes, in the order said.

    All of it in the block's sequence of tokens.
    """
    keys = walk(n)
    starts, _ = runs_of(keys)
    order, lanes = ref.lane_order(WIDTHS)
    assert order.tolist() == [*range(0, 16, 2), *range(1, 16, 2)] and lanes.tolist() == [4, 2]
    block, starts = pack(keys), starts[:, order]
    assert block.words[0] == 0b11
    at, bits = 1, 0
    for first in range(0, n, 16):
        for lane, width in enumerate(lanes):
            own = starts[first : first + 16, 8 * lane : 8 * lane + 8]
            found = block.words[at : at + len(own) // 4].view(np.uint8)
            np.testing.assert_array_equal(found, own @ (1 << np.arange(8)))
            at += len(own) // 4
            bits += own.sum() * width
    assert len(block.words) == at + -(-bits // 32)
    # The stream begins with all of lane 0's codes of the first token.
    low, step = block.low[:8], whole_steps(block.steps)[:8]
    codes = block.words[at] >> (4 * np.arange(8, dtype=np.uint32)) & 15
    held = ref.unpack_block(block, n, WIDTHS, "float16")
    assert sorted(block.sequence) == list(range(n))
    assert n < 64 or (block.sequence != np.arange(n)).any()
    np.testing.assert_allclose(low + step * codes, held[block.sequence[0], ::2], atol=2e-3)


@pytest.mark.parametrize("n", [8, 24, 64])
def test_a_run_is_its_mean_half_a_step_away(n):
    keys = walk(n)
    starts, means = runs_of(keys)
    block = pack(keys)
    held = ref.unpack_block(block, n, WIDTHS, "float16")[block.sequence]
    assert (held[1:] == held[:-1])[~starts[1:]].all()
    order, lanes = ref.lane_order(WIDTHS)
    low, step, high = np.empty((3, 16), np.float32)
    low[order], step[order] = block.low, whole_steps(block.steps)
    high[order] = block.low + step[order] * (2.0 ** np.repeat(lanes, 8) - 1)
    beyond = np.maximum(0, np.maximum(low - means, means - high))
    assert (np.abs(held - means) <= np.maximum(step / 2, beyond) + 3e-3).all()


def test_no_block_is_larger_than_plain_codes():
    """Of keys that always change every lane is stored as the codes of its own keys."""
    keys = np.random.default_rng(0).normal(size=(64, 16)).astype(np.float16).astype(np.float32)
    block = pack(keys, level=1e-6)
    assert block.words[0] == 0 and len(block.words) == 1 + 64 * 8 * (4 + 2) // 32
    held = ref.unpack_block(block, 64, WIDTHS, "float16")
    assert np.abs(held - keys)[:, ::2].max() < 0.5
    # One lane that does not change is held by itself.
    keys[:, ::2] = keys[:1, ::2]
    block = pack(keys, level=1e-6)
    assert block.words[0] == 0b01
    np.testing.assert_allclose(
        ref.unpack_block(block, 64, WIDTHS, "float16")[:, ::2], keys[:, ::2], atol=2e-3
    )


def test_first_tokens_do_not_disturb_the_rest():
    keys = walk(64)
    disturbed = keys.copy()
    disturbed[:3] = 500
    keys[:3] = keys[3]
    found, wanted = pack(disturbed, sinks=3), pack(keys, sinks=3)
    np.testing.assert_array_equal(found.sequence, np.arange(64))
    np.testing.assert_array_equal(found.words, wanted.words)
    np.testing.assert_array_equal(found.low, wanted.low)


def test_short_steps_are_the_nearest():
    short = np.arange(1, LARGEST_STEP + 1).astype(np.uint8)
    steps = whole_steps(short)
    np.testing.assert_array_equal(short_steps(steps), short)
    assert (np.diff(steps) > 0).all() and steps[-1] == 61440
    between = steps[:-1] + 0.4 * np.diff(steps)
    np.testing.assert_array_equal(short_steps(between[8:]), short[8:-1])
    special = np.array([0, -1, np.nan, np.inf, 1e9], np.float32)
    assert short_steps(special).tolist() == [0, 0, 0, 0xF7, 0xF7]


def test_a_channel_with_a_nan_is_nan_throughout():
    keys = walk(24)
    keys[5, 3] = np.nan
    held = ref.unpack_block(pack(keys), 24, WIDTHS, "float16")
    assert np.isnan(held[:, 3]).all() and np.isfinite(np.delete(held, 3, axis=1)).all()


def test_keys_that_do_not_vary():
    keys = np.tile(walk(1), (8, 1))
    keys[3, 2] += 6e-8
    held = ref.unpack_block(pack(keys), 8, WIDTHS, "float16")
    np.testing.assert_allclose(held, keys, atol=2e-3)
