"""Going back in a text: exactly, or not at all."""

from __future__ import annotations

import copy
import dataclasses

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import (
    CacheList,
    KVCache,
    LRUPromptCache,
    RotatingKVCache,
    trim_prompt_cache,
)

from mlx_delta import DeltaConfig, DeltaKVCache
from mlx_delta.cache import BatchDeltaKVCache, length_of, rewind
from tests.attention.test_hybrid import attend, inputs
from tests.tiny import SMALL, llama_model, tokens

LENGTH = 620
TEXT = inputs(LENGTH, dim=32)
SETTINGS = {
    "window": SMALL,
    "no window": DeltaConfig(block_size=8, window=0),
    "chain": DeltaConfig(block_size=8, window=0, keyframes=False, run_value="first"),
    "deltas": SMALL.changed(level=0.03, key_bits=4, value_bits=4),
    "deltas, no window": DeltaConfig(block_size=8, window=0, key_bits=4),
    "codes": dataclasses.replace(SMALL, key_format="codes", key_bits=4, value_bits=3),
}
each_setting = pytest.mark.parametrize("config", SETTINGS.values(), ids=SETTINGS)


def part(start: int, end: int) -> tuple[np.ndarray, ...]:
    return tuple(x[:, :, start:end] for x in TEXT)


def wrong(n: int) -> tuple[np.ndarray, ...]:
    """Tokens that will be taken back."""
    return tuple(5 - x for x in part(0, n))


def assert_undisturbed(cache: DeltaKVCache, config: DeltaConfig, length: int) -> None:
    """What is stored, and what comes next, is bit for bit that of a cache fed in these pieces."""
    twin = DeltaKVCache(config)
    if length:
        attend(twin, part(0, length), [length])
    assert cache.lengths == twin.lengths
    after = [attend(x, part(length, length + 20), [1, 1, 18]) for x in (cache, twin)]
    np.testing.assert_array_equal(*after)
    for ours, theirs in zip(cache.keys_and_values(), twin.keys_and_values(), strict=True):
        assert mx.array_equal(ours, theirs)
    assert cache.encoded == twin.encoded
    (far,) = twin.encoded
    assert mx.array_equal(cache.zeros[:, :, :far], twin.zeros[:, :, :far])


@each_setting
@pytest.mark.parametrize("back", [1, 2, 7, 8, 9, 15, 16, 40, 63, 64, 65, 200, 499, 500])
def test_going_back_and_feeding_again_is_as_if_nothing_had_been(config, back):
    length = 560
    cache = DeltaKVCache(config)
    attend(cache, part(0, length - back), [length - back])
    attend(cache, wrong(back), [back])
    again = rewind([cache], back)
    assert cache.offset == length - back - again
    if again:
        attend(cache, part(cache.offset, length - back), [again])
    assert_undisturbed(cache, config, length - back)


@each_setting
@pytest.mark.parametrize(("first", "second"), [(5, 6), (8, 8), (12, 9), (1, 30), (90, 3), (3, 90)])
def test_twice_in_a_row(config, first, second):
    """What the first one used up must not be used again by the second."""
    length = 300
    cache = DeltaKVCache(config)
    attend(cache, part(0, length), [length])
    rewind([cache], first)
    rewind([cache], second)
    assert cache.offset <= length - first - second
    assert_undisturbed(cache, config, cache.offset)


@each_setting
def test_every_rewind_that_is_called_exact_is(config):
    for length in range(60, 78):
        whole = DeltaKVCache(config)
        attend(whole, part(0, length), [length])
        assert config.block_size <= whole.exact_trim() < 2 * config.block_size + 1
        for back in range(whole.exact_trim() + 1):
            cache = copy.deepcopy(whole)
            assert cache.trim(back) == back
            assert cache.exact_trim() == whole.exact_trim() - back
            assert rewind([cache], 0) == 0
        assert_undisturbed(cache, config, length - back)


@each_setting
def test_what_would_not_be_exact_is_refused_and_changes_nothing(config):
    cache = DeltaKVCache(config)
    attend(cache, part(0, 101), [101])
    state = [np.array(x) for x in cache.keys_and_values()]
    with pytest.raises(ValueError, match=rf"the last {cache.exact_trim()} can be taken back exact"):
        cache.trim(cache.exact_trim() + 1)
    assert cache.offset == 101
    for before, after in zip(state, cache.keys_and_values(), strict=True):
        np.testing.assert_array_equal(before, after)
    assert cache.trim(101) == 101, "all of it"
    attend(cache, part(0, 90), [90])
    assert_undisturbed(cache, config, 90)


def test_all_of_a_short_text_can_be_taken_back():
    cache = DeltaKVCache(SMALL)
    attend(cache, part(0, 24), [24])
    assert cache.exact_trim() == cache.size() == 24
    assert cache.trim(20) == 20
    assert_undisturbed(cache, SMALL, 4)


@pytest.mark.parametrize("key_bits", [None, 4])
def test_a_model_goes_on_with_the_logits_of_an_undisturbed_run(key_bits):
    """All layers: where a window is gone, its keys can't be had from a part of the text."""
    config = SMALL.changed(level=0.03, key_bits=key_bits)
    model, text = llama_model(delta=config), tokens(210)
    caches = model.make_cache()
    model(text[:, :200], cache=caches)
    for back in (8, 150, 60):
        kept = 200 - back
        again = rewind(caches, back)
        caches_length = kept - again
        assert length_of(caches) == caches_length
        if again:
            model(text[:, caches_length:kept], cache=caches)
        fresh = model.make_cache()
        model(text[:, :kept], cache=fresh)
        wanted = model(text[:, kept : kept + 5], cache=fresh)
        np.testing.assert_allclose(model(text[:, kept : kept + 5], cache=caches), wanted, atol=1e-5)
        model(text[:, kept + 5 : 200], cache=caches)


def test_beside_mlx_lms_own_caches():
    ours, theirs = DeltaKVCache(SETTINGS["no window"]), KVCache()
    keys = mx.array(TEXT[1][:, :, :100])
    ours.update(keys, keys)
    theirs.update_and_fetch(keys, keys)
    assert rewind([CacheList(ours, theirs)], 30) == 6
    assert ours.offset == theirs.offset == length_of([theirs, ours]) == 64


def test_a_full_sliding_window_is_refused():
    sliding = RotatingKVCache(max_size=16)
    ours = DeltaKVCache(SMALL)
    keys = mx.array(TEXT[1][:, :, :100])
    sliding.update_and_fetch(keys, keys)
    ours.update(keys, keys)
    assert length_of([sliding, ours]) == length_of([sliding]) == 100, "not the 16 it keeps"
    with pytest.raises(ValueError, match=r"\[rewind\] a RotatingKVCache of 100 tokens can't be"):
        rewind([ours, sliding], 1)
    assert ours.offset == 100


def test_rows_of_a_batch_are_taken_back_exactly_or_not():
    caches = [DeltaKVCache(SMALL) for _ in range(2)]
    for cache, n in zip(caches, (70, 90), strict=True):
        attend(cache, part(0, n), [n])
    batch = BatchDeltaKVCache.merge(caches)
    assert rewind([batch], 6) == 0 and batch.lengths == (64, 84)
    with pytest.raises(ValueError, match="rows of a batch can't be taken back by 30"):
        rewind([batch], 30)
    assert batch.lengths == (64, 84)


# What mlx-lm does with it.


def test_the_servers_store_never_takes_back_more_than_is_exact():
    """It keeps the shorter prefix instead, and finds it."""
    store = LRUPromptCache()
    prompt, answered = DeltaKVCache(SMALL), DeltaKVCache(SMALL)
    attend(prompt, part(0, 90), [90])
    attend(answered, part(0, 200), [200])
    store.insert_cache("model", list(range(90)), [prompt])
    store.insert_cache("model", list(range(200)), [answered])
    (fetched,), rest = store.fetch_nearest_cache("model", [*range(100), 7])
    assert (fetched.offset, rest) == (90, [*range(90, 100), 7])
    assert_undisturbed(fetched, SMALL, 90)


def test_the_servers_store_takes_back_what_is_exact():
    store = LRUPromptCache()
    cache = DeltaKVCache(SMALL)
    attend(cache, part(0, 24), [24])
    store.insert_cache("model", list(range(24)), [cache])
    (fetched,), rest = store.fetch_nearest_cache("model", [*range(10), 7])
    assert (fetched.offset, rest) == (10, [7])
    assert_undisturbed(fetched, SMALL, 10)


def test_speculation_takes_back_its_guesses_however_long_the_text_is():
    cache = DeltaKVCache(SMALL)
    attend(cache, part(0, 500), [500])
    assert cache.is_trimmable() and trim_prompt_cache([cache], 4) == 4
    assert cache.offset == 496
