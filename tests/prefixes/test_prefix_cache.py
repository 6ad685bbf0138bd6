"""The store in memory: what is found, what is shared, what goes first."""

from __future__ import annotations

import itertools
import unittest

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import KVCache, RotatingKVCache

from mlx_delta import DeltaConfig, DeltaKVCache
from mlx_delta.prefixes import PrefixCache, fingerprint
from tests.peers.upstream import CannotFetch, fetch_tests, import_tests
from tests.tiny import SMALL, llama_model, tokens

TEXT = tokens(260)[0].tolist()
DELTAS = SMALL.changed(level=0.03, key_bits=4, value_bits=16)
MODEL = llama_model(delta=DELTAS, num_hidden_layers=2)


def filled(text: list[int], model=MODEL, caches=None, cuts: tuple[int, ...] = ()) -> list:
    """Caches of a text, fed in these parts: another cut would round otherwise."""
    caches = model.make_cache() if caches is None else caches
    edges = [0, *(cut for cut in cuts if cut < len(text)), len(text)]
    for start, end in itertools.pairwise(edges):
        mx.eval(model(mx.array([text[start:end]]), cache=caches))
    return caches


def logits(caches, text: list[int], model=MODEL) -> np.ndarray:
    return np.array(model(mx.array([text]), cache=caches))


def as_if_undisturbed(caches, known: list[int], rest: list[int], model=MODEL, cuts=()) -> bool:
    wanted = logits(filled(known, model, cuts=cuts), rest, model)
    return np.array_equal(logits(caches, rest, model), wanted)


@pytest.mark.parametrize("length", [1, 7, 8, 24, 100, 103, 104, 105])
def test_a_text_goes_on_where_another_ended(length):
    store = PrefixCache()
    store.insert_cache("m", TEXT[:length], filled(TEXT[:length]))
    caches, rest = store.fetch_nearest_cache("m", TEXT[:150])
    assert rest == TEXT[length:150]
    assert as_if_undisturbed(caches, TEXT[:length], rest)


def test_what_is_fetched_is_ones_own():
    store = PrefixCache()
    store.insert_cache("m", TEXT[:100], filled(TEXT[:100]))
    for _ in range(2):
        caches, rest = store.fetch_nearest_cache("m", TEXT[:150])
        assert as_if_undisturbed(caches, TEXT[:100], rest)


def test_the_last_token_is_left_to_be_fed():
    store = PrefixCache()
    store.insert_cache("m", TEXT[:100], filled(TEXT[:100]))
    caches, rest = store.fetch_nearest_cache("m", TEXT[:100])
    assert rest == TEXT[99:100] and caches[0].offset == 99
    undisturbed = filled(TEXT[:100])
    for cache in undisturbed:
        cache.trim(1)
    assert np.array_equal(logits(caches, rest), logits(undisturbed, rest))


def test_within_the_last_tokens_a_text_is_cut_exactly():
    store, ends = PrefixCache(), filled(TEXT[:100])
    store.insert_cache("m", TEXT[:100], ends)
    back = ends[0].exact_trim()
    found, rest = store.fetch_nearest_cache("m", [*TEXT[: 100 - back], 5, 5])
    assert rest == [5, 5] and found[0].offset == 100 - back
    wanted = filled(TEXT[:100])
    for cache in wanted:
        cache.trim(back)
    assert np.array_equal(logits(found, rest), logits(wanted, rest))
    found, rest = store.fetch_nearest_cache("m", [*TEXT[: 99 - back], 5, 5])
    assert found is None and len(rest) == 101 - back, "full keys are gone: not exact, not reused"


def test_where_texts_part_a_mark_helps():
    store, caches = PrefixCache(), filled(TEXT[:96])
    mark = store.mark(caches)
    filled(TEXT[96:200], caches=caches)
    store.insert_cache("m", TEXT[:200], caches, marks=[mark])
    other = [*TEXT[:96], *TEXT[:50]]
    assert store.known_blocks("m", [*TEXT[:60], *TEXT[:50]]) == 56
    found, rest = store.fetch_nearest_cache("m", other)
    assert rest == TEXT[:50] and as_if_undisturbed(found, TEXT[:96], rest)


def test_without_a_window_every_border_will_do():
    model = llama_model(delta=DeltaConfig(block_size=8, window=0, key_bits=4, sinks=11))
    store = PrefixCache()
    store.insert_cache("m", TEXT[:200], filled(TEXT[:200], model, cuts=(8, 96)))
    for parting, found_at in ((100, 96), (8, 8), (3, 0)):
        text = [*TEXT[:parting], 5, *TEXT[:20]]
        caches, rest = store.fetch_nearest_cache("m", text)
        assert len(text) - len(rest) == found_at
        known = TEXT[:found_at]
        assert caches is None or as_if_undisturbed(caches, known, rest, model, cuts=(8,))


def test_mlx_lms_own_caches_are_cut_anywhere_near():
    model = llama_model(delta=None)
    store = PrefixCache()
    store.insert_cache("m", TEXT[:200], filled(TEXT[:200], model))
    for parting, found_at in ((150, 128), (198, 198)):
        text = [*TEXT[:parting], 5, *TEXT[:20]]
        caches, rest = store.fetch_nearest_cache("m", text)
        assert len(text) - len(rest) == found_at and type(caches[0]) is KVCache
        wanted = logits(filled(TEXT[:found_at], model), rest, model)
        np.testing.assert_allclose(logits(caches, rest, model), wanted, atol=1e-4)


def test_layers_with_windows_are_kept_for_where_a_text_ended():
    """What can't be cut is kept whole: of use at that very place."""
    model = llama_model(delta=DELTAS)

    def mixed():
        first, *others = model.make_cache()
        return [first, RotatingKVCache(32, 4), *others[1:]]

    store, caches = PrefixCache(), mixed()
    store.insert_cache("m", TEXT[:100], filled(TEXT[:100], model, caches))
    found, rest = store.fetch_nearest_cache("m", TEXT[:120])
    assert rest == TEXT[100:120] and type(found[1]) is RotatingKVCache
    wanted = logits(filled(TEXT[:100], model, mixed()), rest, model)
    assert np.array_equal(logits(found, rest, model), wanted)
    found, rest = store.fetch_nearest_cache("m", [*TEXT[:99], 5])
    assert found is None and len(rest) == 100


def test_beginnings_are_stored_once():
    one, both = PrefixCache(), PrefixCache()
    one.insert_cache("m", TEXT[:200], filled(TEXT[:200]))
    for i in range(3):
        text = [*TEXT[:200], *TEXT[i : i + 30]]
        both.insert_cache("m", text, filled(text))
    separate = sum(x.nbytes for x in filled(TEXT[:230])) * 3
    assert len(both) == 3 and both.nbytes < 2 * one.nbytes < separate
    assert both.stats_by_type()["assistant"] == {"n_sequences": 3, "n_bytes": both.nbytes}


def test_models_and_settings_are_kept_apart():
    store = PrefixCache()
    store.insert_cache("m", TEXT[:100], filled(TEXT[:100]))
    assert store.fetch_nearest_cache("n", TEXT)[0] is None
    other = llama_model(DELTAS.changed(key_bits=6), num_hidden_layers=2)
    assert store.fetch_nearest_cache("m", TEXT, other.make_cache())[0] is None
    assert store.fetch_nearest_cache("m", TEXT, MODEL.make_cache())[0] is not None
    named = PrefixCache(make_caches=lambda model, n: other.make_cache())
    named.insert_cache("m", TEXT[:100], filled(TEXT[:100]))
    assert named.fetch_nearest_cache("m", TEXT)[0] is None


def test_a_fingerprint_is_of_the_content():
    layers = {"num_hidden_layers": 2}
    same = llama_model(delta=DELTAS, **layers)
    other = llama_model(delta=DELTAS, seed=1, **layers)
    assert fingerprint(MODEL) == fingerprint(same) != fingerprint(other)
    assert fingerprint(MODEL) != fingerprint(llama_model(delta=SMALL, **layers))
    assert fingerprint(MODEL, 4) != fingerprint(MODEL)
    weight = same.model.layers[1].mlp.up_proj.weight
    weight[3, 5] = weight[3, 6]  # one number
    assert fingerprint(MODEL) != fingerprint(same)


def test_what_was_not_used_for_longest_goes_first():
    store = PrefixCache(max_size=2)
    texts = [TEXT[i : i + 60] for i in (0, 60, 120)]
    for text in texts[:2]:
        store.insert_cache("m", text, filled(text))
    store.fetch_nearest_cache("m", [*texts[0], 1])
    store.insert_cache("m", texts[2], filled(texts[2]))
    found = [store.fetch_nearest_cache("m", [*text, 1])[0] is not None for text in texts]
    assert found == [True, False, True] and len(store) == 2
    store.trim_to(n_bytes=store.nbytes - 1)
    assert len(store) == 1
    store.trim_to(n_sequences=0)
    assert (len(store), store.nbytes) == (0, 0)


def test_bytes_are_counted_down_to_nothing():
    store = PrefixCache(max_bytes=60_000)
    for i in range(6):
        text = TEXT[: 60 + 10 * i] if i % 2 else TEXT[10 * i : 10 * i + 50]
        store.insert_cache("m", text, filled(text), cache_type="user" if i % 3 else "system")
        assert store.nbytes <= 60_000
    assert len(store) > 1
    store.trim_to(n_bytes=0)
    assert (len(store), store.nbytes) == (0, 0)


@pytest.mark.parametrize("seen", [90, 110], ids=["fewer", "more"])
def test_caches_that_have_seen_another_number_of_tokens(seen):
    """A server may be a token ahead of its caches, or behind."""
    store, caches = PrefixCache(), filled(TEXT[:64])
    mark = store.mark(caches)
    filled(TEXT[64:seen], caches=caches)
    store.insert_cache("m", TEXT[:100], caches, marks=[mark])
    found, rest = store.fetch_nearest_cache("m", TEXT[:150])
    known = 90 if seen == 90 else 64
    assert rest == TEXT[known:150]
    assert as_if_undisturbed(found, TEXT[:known], rest, cuts=(64,))


def test_the_row_of_a_batch():
    both = [filled(TEXT[:80]), filled(TEXT[:50])]
    batch = [DeltaKVCache.merge(list(pair)) for pair in zip(*both, strict=True)]
    store = PrefixCache()
    store.insert_cache("m", TEXT[:50], [cache.extract(1) for cache in batch])
    found, rest = store.fetch_nearest_cache("m", TEXT[:70])
    assert rest == TEXT[50:70] and as_if_undisturbed(found, TEXT[:50], rest)


def store_tests() -> list[str]:
    names = ["test_caching", "test_lru", "test_lru_bytes"]
    names += ["test_insert_trimmable_cache_removes_immediate_prefix"]
    names += ["test_insert_empty_tokens_does_not_self_destruct"]
    return [*names, "test_fetch_empty_tokens_after_root_eviction"]


@pytest.mark.parametrize("name", store_tests())
def test_mlx_lms_tests_of_its_own_store(name, monkeypatch):
    try:
        module = import_tests(fetch_tests() / "test_server.py")
    except CannotFetch as error:
        pytest.skip(str(error))
    monkeypatch.setattr(module, "LRUPromptCache", PrefixCache)
    result = unittest.TestResult()
    module.TestLRUPromptCache(name).run(result)
    assert result.testsRun == 1 and not result.errors + result.failures, result
