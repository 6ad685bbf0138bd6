"""Attention over a cache against the specification, however the text is cut into chunks."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_delta import DeltaConfig, DeltaKVCache
from mlx_delta.attention.hybrid import delta_attention
from mlx_delta.attention.operations import QUERY_CHUNK
from mlx_delta.method import attention as reference
from tests.tiny import SMALL, smooth_keys

HEADS, KV_HEADS, DIM, SCALE = 4, 2, 16, 0.25
SETTINGS = {
    "default": DeltaConfig(),
    "small blocks": SMALL,
    "no window": DeltaConfig(block_size=8, window=0),
    "chain": DeltaConfig(block_size=8, window=8, keyframes=False, run_value="first"),
    "paper": DeltaConfig.paper().resolve(120),
    "blocks of one": DeltaConfig.paper().resolve(20),
    "many sinks": DeltaConfig(block_size=8, window=16, sinks=30),
    "heads": DeltaConfig(block_size=8, window=8, threshold=((0.5, 2.0),)),
    "heads, absolute": DeltaConfig(
        block_size=8, window=8, threshold=((0.3, 1.0),), threshold_mode="absolute"
    ),
}
each_setting = pytest.mark.parametrize("config", SETTINGS.values(), ids=SETTINGS.keys())


def inputs(length: int, rows: int = 1, dim: int = DIM) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Queries, keys and values of a text."""
    rng = np.random.default_rng(length)
    queries = rng.normal(size=(rows, HEADS, length, dim)).astype(np.float32)
    values = rng.normal(size=(rows, KV_HEADS, length, dim)).astype(np.float32)
    return queries, smooth_keys((rows, KV_HEADS, length, dim), length), values


def attend(cache, text, cuts, mask=None) -> np.ndarray:
    """Feed a text chunk by chunk; the outputs of all its queries."""
    outputs, start = [], 0
    for steps in cuts:
        part = [mx.array(x[:, :, start : start + steps]) for x in text]
        outputs.append(delta_attention(*part, cache, SCALE, mask))
        start += steps
    return np.array(mx.concatenate(outputs, axis=2))


def expected(text, config) -> np.ndarray:
    """The specification's outputs, for every row and head."""
    queries, keys, values = text
    group = HEADS // KV_HEADS
    return np.stack(
        [
            [
                reference.hybrid_attention(
                    q,
                    keys[row, h // group],
                    values[row, h // group],
                    config.for_head(h // group),
                    SCALE,
                )
                for h, q in enumerate(queries[row])
            ]
            for row in range(len(queries))
        ]
    )


@each_setting
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 200])
def test_one_chunk_agrees_with_the_reference(config, length):
    text = inputs(length)
    output = attend(DeltaKVCache(config), text, [length])
    np.testing.assert_allclose(output, expected(text, config), atol=2e-6)


@each_setting
@pytest.mark.parametrize(
    "cuts",
    [[1] * 200, [199, 1], [63, 1, 64, 72], [100, 1, 1, 1, 97], [7, 193]],
    ids=["token by token", "prompt and last token", "at block borders", "in between", "uneven"],
)
def test_chunks_agree_with_the_reference(config, cuts):
    text = inputs(200)
    output = attend(DeltaKVCache(config), text, cuts)
    np.testing.assert_allclose(output, expected(text, config), atol=2e-6)


def test_more_queries_than_one_fused_call_takes():
    length = 2 * QUERY_CHUNK + 65
    text = inputs(length, rows=2)
    whole = attend(DeltaKVCache(SMALL), text, [length])
    np.testing.assert_allclose(whole, expected(text, SMALL), atol=2e-6)
    shifted = attend(DeltaKVCache(SMALL), text, [QUERY_CHUNK - 3, length - QUERY_CHUNK + 3])
    np.testing.assert_allclose(shifted, whole, atol=2e-6)


def test_a_window_longer_than_the_text_is_dense_attention_bit_for_bit():
    queries, keys, values = (mx.array(x) for x in inputs(200))
    dense = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=SCALE, mask="causal")
    cache = DeltaKVCache(DeltaConfig(block_size=8, window=200))
    assert mx.array_equal(delta_attention(queries, keys, values, cache, SCALE), dense)


@each_setting
def test_threshold_zero_is_dense_attention(config):
    queries, keys, values = (mx.array(x) for x in inputs(200))
    dense = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=SCALE, mask="causal")
    cache = DeltaKVCache(
        config.changed(**({"level": 0.0} if config.cuts_runs else {"threshold": 0.0}))
    )
    output = delta_attention(queries, keys, values, cache, SCALE)
    np.testing.assert_allclose(output, dense, atol=2e-6)


@pytest.mark.parametrize("kind", ["bool", "additive"])
@pytest.mark.parametrize("cuts", [[100], [60, 40], [99, 1]], ids=str)
def test_a_mask_hides_keys_from_both_kinds(kind, cuts):
    """Hiding the first 20 keys is attending to a text whose first 20 values can't be reached."""
    text = inputs(100)
    cache = DeltaKVCache(SMALL)
    outputs, start = [], 0
    for steps in cuts:
        key = mx.arange(start + steps)[None]
        query = mx.arange(start, start + steps)[:, None]
        mask = (key <= query) & ((key >= 20) | (key == query))
        if kind == "additive":
            mask = mx.where(mask, 0.0, -mx.inf)
        part = [mx.array(x[:, :, start : start + steps]) for x in text]
        outputs.append(np.array(delta_attention(*part, cache, SCALE, mask)))
        start += steps
    output = np.concatenate(outputs, axis=2)

    queries, keys, values = text
    for h in range(HEADS):
        held = reference.hold(keys[0, h // 2], SMALL)
        exact = reference.exact_pairs(100, 100, SMALL)
        scores = np.where(exact, queries[0, h] @ keys[0, h // 2].T, queries[0, h] @ held.T) * SCALE
        i, j = np.arange(100)[:, None], np.arange(100)[None]
        scores = np.where((j <= i) & ((j >= 20) | (j == i)), scores, -np.inf)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        wanted = weights / weights.sum(axis=1, keepdims=True) @ values[0, h // 2]
        np.testing.assert_allclose(output[0, h], wanted, atol=2e-6)


def test_attention_that_knows_nothing_of_deltas_still_gets_the_right_keys_for_one_query():
    """What another model's attention fetches: exact for one query, the delta keys of the past."""
    text = inputs(100)
    cache = DeltaKVCache(SMALL)
    attend(cache, text, [99])
    query, key, value = (mx.array(x[:, :, 99:]) for x in text)
    keys, values = cache.update_and_fetch(key, value)
    output = mx.fast.scaled_dot_product_attention(query, keys, values, scale=SCALE)
    np.testing.assert_allclose(output, expected(text, SMALL)[:, :, 99:], atol=2e-6)


def test_fetching_several_queries_gives_them_the_first_ones_window():
    text = inputs(100)
    cache = DeltaKVCache(SMALL)
    attend(cache, text, [60])
    fetched, _ = cache.update_and_fetch(*(mx.array(x[:, :, 60:]) for x in text[1:]))
    keys = text[1][0]
    near = (60 // 8 - 2) * 8
    held = np.stack([reference.hold(head, SMALL) for head in keys])
    np.testing.assert_array_equal(fetched[0, :, :near], held[:, :near])
    np.testing.assert_array_equal(fetched[0, :, near:], keys[:, near:])
