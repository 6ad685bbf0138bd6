"""Sequences of blocks' tokens, many at once, against the specification: the same bits."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_delta import DeltaConfig
from mlx_delta.method.sequence import factors, token_sequence
from mlx_delta.ops.sequence import by_token, in_sequence, sequences_of, token_sequences
from mlx_delta.sensitivities import Sensitivities

from ..tiny import smooth_keys

MODULES = {"numpy": np, "mlx": mx}


def blocks_of(seed: int, n: int, head_dim: int, kind: str) -> np.ndarray:
    """Three blocks of keys [3, n, head_dim], one of which is hard."""
    rng = np.random.default_rng(seed)
    keys = rng.normal(size=(3, n, head_dim)).astype(np.float32)
    if kind == "whole numbers":  # many are as far from each other
        keys[1] = rng.integers(-1, 2, (n, head_dim))
    elif kind == "one far away":  # all other codes are small
        keys[1, n // 2, 0] = 1000
    elif kind == "constant":
        keys[1] = keys[1, 0]
    elif kind == "hardly apart":
        keys[1] *= 1e-34
    else:
        keys[1, n // 2, head_dim - 1] = {"nan": np.nan, "inf": np.inf, "too large": 3e38}[kind]
    return keys


@pytest.mark.parametrize("module", MODULES)
@given(
    seed=st.integers(0, 1 << 16),
    n=st.sampled_from([2, 8, 24, 64]),
    head_dim=st.sampled_from([2, 16, 40, 256]),
    kind=st.sampled_from(
        ["whole numbers", "one far away", "constant", "hardly apart", "nan", "inf", "too large"]
    ),
    stay=st.lists(st.booleans(), min_size=3, max_size=3),
)
@settings(max_examples=20, deadline=None)
def test_agrees_with_the_specification(module, seed, n, head_dim, kind, stay):
    keys = blocks_of(seed, n, head_dim, kind)
    weights = np.random.default_rng(seed).lognormal(0, 2, (3, head_dim)).astype(np.float32)
    xp = MODULES[module]
    with mx.stream(mx.cpu):
        arrays = [xp.array(x) for x in (keys, factors(weights)[:, None], np.array(stay))]
        found = sequences_of(xp, *arrays)
        assert isinstance(found, mx.array if xp is mx else np.ndarray)
        found = np.array(found)
    assert found.dtype == np.uint8
    for own, felt, alone, got in zip(keys, weights, stay, found, strict=True):
        np.testing.assert_array_equal(got, token_sequence(own, felt, int(alone)))


@pytest.mark.parametrize("kind", [mx.float16, mx.bfloat16, mx.float32], ids=str)
@pytest.mark.parametrize(("sinks", "first_block"), [(0, 0), (9, 0), (20, 2)])
def test_rows_heads_and_blocks(kind, sinks, first_block):
    """Each head by its own channels' weights; blocks with sinks stay as they are."""
    weights = np.random.default_rng(0).lognormal(0, 2, (2, 24)).astype(np.float32)
    config = DeltaConfig(
        **{"threshold_mode": "greedy", "level": 0.3, "block_size": 8, "window": 8},
        sinks=sinks,
        sensitivities=Sensitivities([weights]),
    ).for_layer(0, 1)
    text = smooth_keys((2, 2, 24, 24))[:, :, np.random.default_rng(1).permutation(24)]
    keys = mx.array(text).astype(kind)
    found = np.array(token_sequences(keys, config, first_block))
    for row, head, block in np.ndindex(2, 2, 3):
        own = np.array(keys[row, head, 8 * block :][:8].astype(mx.float32))
        alone = sinks - 8 * (first_block + block)
        np.testing.assert_array_equal(
            found[row, head, block], token_sequence(own, weights[head], alone)
        )
    moved = (found != np.arange(8)).any(axis=3)
    stay = np.arange(3) + first_block < -(-sinks // 8)
    assert not moved[:, :, stay].any() and moved[:, :, ~stay].any()


def test_there_and_back():
    rng = np.random.default_rng(0)
    sequence = rng.permuted(np.broadcast_to(np.arange(8, dtype=np.uint8), (2, 1, 3, 8)), axis=3)
    x = rng.normal(size=(2, 1, 3, 8, 5)).astype(np.float32)
    placed = np.array(in_sequence(mx.array(x), mx.array(sequence)))
    for at in np.ndindex(2, 1, 3):
        np.testing.assert_array_equal(placed[at], x[at][sequence[at]])
    np.testing.assert_array_equal(by_token(mx.array(placed), mx.array(sequence)), x)
