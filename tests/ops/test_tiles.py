"""Tiles: the operations against the specification, and what the choice must not lose."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_delta.method import tiles as reference
from mlx_delta.ops.exact_attention import Far, exact_attention
from mlx_delta.ops.tiles import TileCount, pack_tiles, tile_attention, tile_shares

T, HEADS, KV_HEADS, DIM, SCALE = 64, 6, 2, 16, 0.25
LOG2_E = float(np.log2(np.e))


def inputs(length: int, rows: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Queries, keys that drift, and values of a text."""
    rng = np.random.default_rng(length)
    shape = (rows, KV_HEADS, length, DIM)
    keys = np.cumsum(rng.normal(size=shape) * (rng.random(shape) < 0.1), axis=2)
    keys += rng.normal(size=shape, scale=0.3)
    queries = rng.normal(size=(rows, HEADS, length, DIM), scale=1.2)
    values = rng.normal(size=shape)
    return tuple(x.astype(np.float32) for x in (queries, keys, values))


def attend(text, mass, start=0, window_blocks=1):
    """Tile attention of the queries from ``start`` on, and the count of its tiles."""
    queries, keys, values = (mx.array(x) for x in text)
    count = TileCount()
    far = Far(keys, T, window_blocks)
    output = tile_attention(queries[:, :, start:], keys, values, SCALE, start, far, mass, count)
    return output, count


def expected_shares(text, row, head, block, window_blocks):
    """The specification's shares for one block of queries."""
    group = HEADS // KV_HEADS
    queries = text[0][row, head * group : (head + 1) * group, block * T : (block + 1) * T]
    keys = text[1][row, head, : (block + 1) * T].reshape(-1, T, DIM)
    border = block - window_blocks
    return reference.shares(queries * SCALE, keys[:border], keys[border:])


def test_packing_agrees_with_the_specification():
    keys = inputs(6 * T, rows=2)[1].reshape(2, KV_HEADS, 6, T, DIM)
    keys[0, 0, 0] = keys[0, 0, 0, :1]  # all equal: pieces begin at the first rows
    packed = pack_tiles(mx.array(keys))
    for index in np.ndindex(2, KV_HEADS, 6):
        means, counts, spread = reference.pack(keys[index])
        np.testing.assert_allclose(np.array(packed.keys)[index], means, atol=1e-5)
        np.testing.assert_allclose(2 ** np.array(packed.bias)[index], counts, rtol=1e-5)
        scaled = np.array(packed.spread)[index] * 2 * LOG2_E
        np.testing.assert_allclose(scaled, spread, atol=1e-5)


def test_the_spread_makes_up_for_what_means_lose():
    """Keys that vary within a piece attract more than their mean does."""
    rng = np.random.default_rng(0)
    keys = rng.normal(size=(T, DIM)).astype(np.float32)
    means, counts, spread = reference.pack(keys)
    queries = rng.normal(size=(200, DIM)).astype(np.float32) * 0.5
    true = np.exp(queries @ keys.T).sum(axis=1)
    square = np.square(queries).sum(axis=1, keepdims=True)
    plain = (counts * np.exp(queries @ means.T)).sum(axis=1)
    spread_out = (counts * np.exp(queries @ means.T + square * spread / 2)).sum(axis=1)
    assert plain.sum() < 0.9 * true.sum()
    assert abs(spread_out.sum() / true.sum() - 1) < 0.1


@pytest.mark.parametrize("window_blocks", [0, 1, 2])
def test_shares_agree_with_the_specification(window_blocks):
    text = inputs(8 * T, rows=2)
    group, block = HEADS // KV_HEADS, 7
    border = block - window_blocks
    queries = mx.array(text[0][:, :, block * T :] * SCALE * LOG2_E)
    keys = mx.array(text[1])
    packed = pack_tiles(keys.reshape(2, KV_HEADS, 8, T, DIM))
    found = tile_shares(
        queries.reshape(2, KV_HEADS, group, T, DIM), packed, keys[:, :, border * T :], border
    )
    for row, head in np.ndindex(2, KV_HEADS):
        far, near = expected_shares(text, row, head, block, window_blocks)
        np.testing.assert_allclose(found[row, head], [*far, near], atol=1e-5)


@pytest.mark.parametrize("window_blocks", [0, 1, 2])
def test_attention_agrees_with_the_specification(window_blocks):
    text, mass = inputs(6 * T, rows=2), 0.8
    output, count = attend(text, mass, window_blocks=window_blocks)
    group, computed = HEADS // KV_HEADS, 0
    for row, head, block in np.ndindex(2, KV_HEADS, 6):
        border = max(0, block - window_blocks)
        chosen = np.ones(block + 1, bool)
        if border > 1:
            far, near = expected_shares(text, row, head, block, min(block, window_blocks))
            chosen[:border] = reference.choose(far, near, mass)
        computed += chosen.sum()
        seen = np.repeat(chosen, T)[None] & (
            np.arange((block + 1) * T) <= np.arange(block * T, (block + 1) * T)[:, None]
        )
        keys, values = (x[row, head, : (block + 1) * T].astype(np.float64) for x in text[1:])
        for member in range(head * group, (head + 1) * group):
            queries = text[0][row, member, block * T : (block + 1) * T].astype(np.float64)
            weights = np.where(seen, np.exp(queries @ keys.T * SCALE), 0)
            expected = weights / weights.sum(axis=1, keepdims=True) @ values
            found = output[row, member, block * T : (block + 1) * T]
            np.testing.assert_allclose(found, expected, atol=1e-5)
    assert count.computed == computed < count.all == 2 * KV_HEADS * 21
    assert count.density == computed / count.all


def test_all_of_the_mass_is_exact_attention():
    text = inputs(6 * T)
    output, count = attend(text, 2.0)
    queries, keys, values = (mx.array(x) for x in text)
    np.testing.assert_allclose(output, exact_attention(queries, keys, values, SCALE), atol=1e-5)
    assert count.density == 1


@pytest.mark.parametrize("start", [T, 3 * T, 5 * T])
def test_cuts_at_blocks_choose_the_same_tiles(start):
    text = inputs(7 * T)
    whole, _ = attend(text, 0.7)
    rest, _ = attend(text, 0.7, start)
    assert mx.array_equal(rest, whole[:, :, start:])


def test_far_tiles_are_read_from_the_keys_that_stand_in():
    """Near tiles are read in full: NaN in what is near may not be looked at."""
    text = inputs(6 * T)
    queries, keys, values = (mx.array(x) for x in text)
    held = mx.concatenate([keys[:, :, : 4 * T], mx.full((1, KV_HEADS, 2 * T, DIM), mx.nan)], 2)
    full = mx.concatenate([mx.full((1, KV_HEADS, 3 * T, DIM), mx.nan), keys[:, :, 3 * T :]], 2)
    last = queries[:, :, 4 * T :]
    output = tile_attention(last, full, values, SCALE, 4 * T, Far(held, T, 1), 0.8, TileCount())
    assert mx.array_equal(output, attend(text, 0.8, 4 * T)[0])


def question() -> tuple[np.ndarray, np.ndarray]:
    """Queries [1, T, D] of which four ask for one far block, and ten blocks of keys [10, T, D].

    All others look at a block that is always computed.
    """
    rng = np.random.default_rng(5)
    keys = rng.normal(size=(10, T, DIM), scale=0.05).astype(np.float32)
    keys[4, 20:24, 0] += 12  # the fact
    keys[9, :, 1] += 4  # the queries' own block
    queries = rng.normal(size=(1, T, DIM), scale=0.05).astype(np.float32)
    queries[:, :, 1] += 2
    queries[:, 40:44, :2] = [1.5, -2]  # the question
    return queries, keys


def test_the_mean_query_of_a_block_loses_a_question_that_the_most_of_four_keeps():
    queries, keys = question()
    far, near = reference.shares(queries, keys[:8], keys[8:])
    by_four = reference.choose(far, near, 0.85)
    far, near = reference.shares(queries, keys[:8], keys[8:], pooled=T)
    by_mean = reference.choose(far, near, 0.85)
    assert by_four[4], "four queries that look at a block are enough to choose it"
    assert not by_mean[4], "in the mean of 64 queries they are lost"
    # What it costs: the answer that those four read.
    scores = queries[0, 40:44] @ keys.reshape(-1, DIM).T
    weights = np.exp(scores - scores.max())
    weights /= weights.sum(axis=1, keepdims=True)
    assert weights[:, 4 * T : 5 * T].sum(axis=1).min() > 0.99


def test_rules_of_choosing():
    far = np.array([0.01, 0.3, 0.02, 0.3, 0.07])
    assert reference.choose(far, 0.3, 0.0).tolist() == [True, False, False, False, False]
    assert reference.choose(far, 0.3, 0.5).tolist() == [True, True, False, False, False]
    assert reference.choose(far, 0.3, 0.9).tolist() == [True, True, False, True, False]
    assert reference.choose(far, 0.3, 2.0).all()
    assert reference.choose(far[:0], 1.0, 0.9).shape == (0,)


class Counted(np.ndarray):
    """An array whose products add up their multiply-accumulates."""

    products = 0

    def __matmul__(self, other):
        Counted.products += self.shape[0] * self.shape[1] * other.shape[1]
        return np.asarray(self) @ np.asarray(other)


def test_scoring_takes_few_of_dense_attentions_products():
    """Of a prompt of 4,096 tokens, the near tiles' exact scores included."""
    n_blocks, small = 64, 4
    keys = np.zeros((n_blocks, T, small), np.float32)
    Counted.products = dense = 0
    for block in range(n_blocks):
        if block > 2:  # before, there is nothing to choose
            queries = np.zeros((1, T, small), np.float32).view(Counted)
            reference.shares(queries, keys[: block - 1], keys[block - 1 : block + 1])
        dense += 2 * T * T * small * (block + 1)  # with keys, and with values
    # Packing, once for a chunk of 2,048 tokens: sums over the pieces, their means back at each
    # key, and squares added up twice; as many as the keys that are packed by each chunk.
    rows = reference.PACKED_ROWS
    packing = (2 * rows * T * small + 2 * T * small + rows * T) * (n_blocks // 2 + n_blocks)
    assert 0.03 * dense < Counted.products < 0.05 * dense
    assert Counted.products + packing < 0.06 * dense


def test_memory_is_less_than_that_of_dense_attention():
    rng = np.random.default_rng(0)
    queries, keys, values = (
        mx.array(rng.normal(size=(1, heads, length, 64)).astype(np.float32))
        for heads, length in ((6, 1024), (2, 2048), (2, 2048))
    )
    peaks = []
    far = Far(keys, T, 1)
    for attention in (
        lambda: tile_attention(queries, keys, values, 0.1, 1024, far, 0.9, TileCount()),
        lambda: mx.fast.scaled_dot_product_attention(
            queries, keys, values, scale=0.1, mask="causal"
        ),
    ):
        mx.eval(queries, keys, values)
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(attention())
        peaks.append(mx.get_peak_memory() - before)
    assert peaks[0] < peaks[1] / 2
