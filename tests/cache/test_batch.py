"""BatchDeltaKVCache: each row of a padded batch is what it would be by itself."""

from __future__ import annotations

from functools import lru_cache

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import (
    load_prompt_cache,
    save_prompt_cache,
)

from mlx_delta import BatchDeltaKVCache, DeltaConfig, DeltaKVCache, measure_sparsity
from mlx_delta.method import attention as reference
from tests.attention.test_hybrid import attend, inputs
from tests.cache.settings import CHAIN, each_setting
from tests.tiny import SMALL, smooth_keys


def feed_batch(cache: BatchDeltaKVCache, texts, steps: int, right: list[int] | None = None):
    """Feed the next ``steps`` tokens of each text [1, H, N, D], each from its own position."""
    starts = cache.offset.tolist()
    rows = []
    for row, (text, start) in enumerate(zip(texts, starts, strict=True)):
        end = start + steps - (right[row] if right else 0)
        piece = [x[:, :, max(0, start) : max(0, end)] for x in text]
        left = min(steps, max(0, -start))  # all of them where a row was rewound past its start
        after = steps - left - piece[0].shape[2]
        pads = [(0, 0), (0, 0), (left, after), (0, 0)]
        rows.append([np.pad(x, pads, constant_values=5.0) for x in piece])
    stacked = [np.concatenate(x) for x in zip(*rows, strict=True)]
    mask = cache.make_mask(steps)
    return attend(cache, stacked, [steps], mask)


TEXTS = [
    inputs(230 + i, dim=32) for i in range(3)
]  # the longest fed below: 100 tokens and 4 times 30


@lru_cache(maxsize=32)
def whole_text(config: DeltaConfig, number: int) -> np.ndarray:
    """What each query of one of the texts sees; no later token changes it."""
    text = TEXTS[number]
    return attend(DeltaKVCache(config), text, [text[0].shape[2]])


def expect_rows(output, texts, starts, ends, config):
    """Rows of a batch give what each text gives alone."""
    for row, (text, start, end) in enumerate(zip(texts, starts, ends, strict=True)):
        number = next((i for i, known in enumerate(TEXTS) if known is text), None)
        if number is None:
            alone = attend(DeltaKVCache(config), tuple(x[:, :, :end] for x in text), [end])
        else:
            alone = whole_text(config, number)[:, :, :end]
        steps = end - max(0, start)
        first = max(0, -start)
        np.testing.assert_allclose(
            output[row][:, first : first + steps], alone[0][:, max(0, start) :], atol=1e-5
        )


@each_setting
@given(
    lengths=st.lists(st.integers(1, 100), min_size=3, max_size=3),
    more=st.lists(st.sampled_from([1, 1, 1, 9, 30]), max_size=4),
    side=st.sampled_from(["left", "right"]),
)
@settings(deadline=None, max_examples=25)
def test_a_padded_batch_is_its_rows(config, lengths, more, side):
    longest = max(lengths)
    padding = [longest - n for n in lengths]
    if side == "left":
        cache = BatchDeltaKVCache(padding, config)
        starts = [-p for p in padding]
        output = feed_batch(cache, TEXTS, longest)
        expect_rows(output, TEXTS, starts, lengths, config)
    else:
        cache = BatchDeltaKVCache([0, 0, 0], config)
        cache.prepare(lengths=lengths, right_padding=padding)
        output = feed_batch(cache, TEXTS, longest, padding)
        cache.finalize()
        expect_rows(output, TEXTS, [0, 0, 0], lengths, config)
    assert cache.offset.tolist() == lengths
    for steps in more:
        starts = cache.offset.tolist()
        output = feed_batch(cache, TEXTS, steps)
        expect_rows(output, TEXTS, starts, [s + steps for s in starts], config)
    for row in range(3):
        row_cache = cache.extract(row)
        end = row_cache.offset
        alone = DeltaKVCache(config)
        alone.update(*(mx.array(x[:, :, :end]) for x in TEXTS[row][1:]))
        for a, b in zip(row_cache.keys_and_values(), alone.keys_and_values(), strict=True):
            assert mx.array_equal(a, b), "the same encoding as alone"
        assert row_cache.encoded == alone.encoded


def merged(lengths: list[int], config: DeltaConfig = SMALL) -> BatchDeltaKVCache:
    """Caches of single texts, fed and merged."""
    caches = []
    for text, length in zip(TEXTS, lengths, strict=True):
        cache = DeltaKVCache(config)
        if length:
            attend(cache, tuple(x[:, :, :length] for x in text), [length])
        caches.append(cache)
    return caches[0].merge(caches)


@each_setting
@pytest.mark.parametrize("lengths", [[30, 5, 77], [64, 0, 1], [0, 0, 0]], ids=str)
def test_merged_caches_go_on(config, lengths):
    cache = merged(lengths, config)
    assert cache.offset.tolist() == lengths and cache.size() == max(lengths)
    for steps in (1, 1, 20, 1):
        starts = cache.offset.tolist()
        output = feed_batch(cache, TEXTS, steps)
        expect_rows(output, TEXTS, starts, [s + steps for s in starts], config)


@given(
    keep=st.lists(st.integers(0, 2), min_size=1, max_size=3, unique=True),
    as_array=st.booleans(),
)
@settings(deadline=None, max_examples=10)
def test_filtered_and_extended_rows_go_on(keep, as_array):
    cache = merged([30, 5, 77])
    cache.filter(mx.array(keep) if as_array else keep)
    other = merged([3, 90, 64])
    cache.extend(other)
    texts = [TEXTS[i] for i in keep] + TEXTS
    assert cache.offset.tolist() == [[30, 5, 77][i] for i in keep] + [3, 90, 64]
    for steps in (1, 12, 1):
        starts = cache.offset.tolist()
        output = feed_batch(cache, texts, steps)
        expect_rows(output, texts, starts, [s + steps for s in starts], SMALL)


def test_extending_an_empty_batch():
    cache = BatchDeltaKVCache([0, 0], SMALL)
    cache.extend(merged([3, 90, 64]))
    assert cache.offset.tolist() == [0, 0, 3, 90, 64]
    texts = TEXTS[:2] + TEXTS
    output = feed_batch(cache, texts, 20)
    expect_rows(output, texts, [0, 0, 3, 90, 64], [20, 20, 23, 110, 84], SMALL)


@pytest.mark.parametrize("back", [1, 5, 8])
def test_a_rewound_batch_goes_on(back):
    cache = merged([30, 16, 77])
    output = feed_batch(cache, TEXTS, 8)
    assert cache.trim(back) == back
    starts = cache.offset.tolist()
    output = feed_batch(cache, TEXTS, 30)
    expect_rows(output, TEXTS, starts, [s + 30 for s in starts], SMALL)


def test_a_batch_state_is_saved_and_loaded(tmp_path):
    cache = merged([30, 5, 77])
    save_prompt_cache(str(tmp_path / "batch.safetensors"), [cache])
    (loaded,) = load_prompt_cache(str(tmp_path / "batch.safetensors"))
    assert isinstance(loaded, BatchDeltaKVCache)
    output = feed_batch(loaded, TEXTS, 9)
    expect_rows(output, TEXTS, [30, 5, 77], [39, 14, 86], SMALL)


def test_caches_of_different_settings_do_not_merge():
    with pytest.raises(ValueError, match=r"\[DeltaKVCache.merge\] all caches must have the same"):
        DeltaKVCache.merge([DeltaKVCache(SMALL), DeltaKVCache(CHAIN)])


def test_left_padding_comes_before_the_first_token():
    cache = merged([3, 4, 5])
    with pytest.raises(ValueError, match="left_padding can only be added to an empty cache"):
        cache.prepare(left_padding=[1, 0, 0])


def test_each_row_has_its_own_sparsity():
    keys = smooth_keys((1, 2, 140, 16))
    text = (inputs(140)[0], keys, keys)
    cache = BatchDeltaKVCache([0, 0, 0], SMALL)
    cache.prepare(lengths=[140, 60, 10], right_padding=[0, 80, 130])
    feed_batch(cache, [text] * 3, 140, [0, 80, 130])
    cache.finalize()
    for row, length in enumerate([140, 60, 10]):
        measured = measure_sparsity([cache], length, row).prefill
        wanted = np.mean(
            [reference.sparsity(keys[0, h, :length], SMALL, 0, length) for h in (0, 1)]
        )
        assert measured == pytest.approx(wanted)
