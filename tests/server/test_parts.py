"""Stop words, and the store of caches."""

from __future__ import annotations

import gc
import itertools

import mlx.core as mx
import pytest
from mlx_lm.models.cache import KVCache, LRUPromptCache, RotatingKVCache

from mlx_delta import DeltaConfig, DeltaKVCache
from mlx_delta.prefixes import PrefixCache
from mlx_delta.server.stop_words import StopWords
from mlx_delta.server.store import Prefixes, cut_known


def fill(cache, length: int):
    cache.update_and_fetch(mx.ones((1, 1, length, 16)), mx.ones((1, 1, length, 16)))
    return cache


@pytest.mark.parametrize(
    ("words", "text", "shown"),
    [
        ((), "anything", "anything"),
        (("ab",), "xxabyy", "xx"),
        (("ab",), "xxa", "xxa"),
        (("aab",), "aaaab", "aa"),
        (("bc", "abcd"), "xabcd", "xa"),  # the one that is whole first
        (("cd", "abce"), "xabcd", "xab"),
        (("\n\n",), "a\nb\n", "a\nb\n"),
        (("ß",), "Straße", "Stra"),
    ],
)
def test_stop_words_do_not_depend_on_how_a_text_is_cut(words, text, shown):
    cuts = range(1, len(text))
    for n in range(min(3, len(text))):
        for borders in itertools.combinations(cuts, n):
            found, ends = StopWords(words), [0, *borders, len(text)]
            out = ""
            for a, b in itertools.pairwise(ends):
                piece, stopped = found.feed(text[a:b])
                out += piece
                assert shown.startswith(out)  # nothing is shown that is not to stay
                if stopped:
                    break
            else:
                out += found.flush()
            assert out == shown


def test_known_tokens_are_cut_off_segments():
    segments, kinds = [[1, 2], [3, 4, 5], [6]], ["system", "user", "assistant"]
    assert cut_known(segments, kinds, 0) == (segments, kinds)
    assert cut_known(segments, kinds, 2) == ([[3, 4, 5], [6]], ["user", "assistant"])
    assert cut_known(segments, kinds, 4) == ([[5], [6]], ["user", "assistant"])
    assert cut_known(segments, kinds, 5) == ([[6]], ["assistant"])


def test_a_prompt_is_never_found_whole():
    prefixes = Prefixes(LRUPromptCache())
    prefixes.keep("m", [1, 2, 3, 4], [[fill(KVCache(), 4)]])
    for tokens, known in [([1, 2, 3, 4], 3), ([1, 2, 3, 4, 5], 4), ([1, 2, 9, 9], 2), ([1], 0)]:
        cache, found = prefixes.find("m", tokens)
        # A cache that is cut keeps one token less than it could: mlx-lm's store sees to that.
        assert known - 1 <= found <= known
        assert (cache is None) == (found == 0)
        assert cache is None or cache[0].offset == found
    assert prefixes.find("other", [1, 2, 3, 4]) == (None, 0)


def test_caches_are_kept_with_what_they_hold():
    prefixes = Prefixes(LRUPromptCache())
    model, draft = [fill(KVCache(), 9)], [fill(KVCache(), 7)]
    prefixes.keep("m", list(range(10)), [model, draft])
    cache, found = prefixes.find("m", list(range(20)))
    assert found == 7 and [c.offset for c in cache] == [7, 7]


def test_held_keys_are_taken_back_exactly_or_not_kept():
    config = DeltaConfig(block_size=8, window=8, sinks=1)
    prefixes = Prefixes(LRUPromptCache())
    prefixes.keep("m", list(range(60)), [[fill(DeltaKVCache(config), 64)]])
    assert len(prefixes) == 1 and prefixes.find("m", list(range(99)))[1] == 60
    prefixes = Prefixes(LRUPromptCache())
    prefixes.keep("m", list(range(20)), [[fill(DeltaKVCache(config), 64)]])
    assert len(prefixes) == 0


def test_a_full_window_that_slides_is_not_kept():
    prefixes = Prefixes(LRUPromptCache())
    full = fill(RotatingKVCache(8), 8)
    for _ in range(4):
        fill(full, 1)
    prefixes.keep("m", list(range(10)), [[full]])
    assert len(prefixes) == 0
    prefixes.keep("m", list(range(12)), [[full]])
    assert len(prefixes) == 1


def test_kept_caches_are_let_go_at_once():
    """A circle would keep them until Python looks for one: gigabytes of long prompts."""
    store = PrefixCache()
    config = DeltaConfig(block_size=8, window=8, sinks=1)
    fill(DeltaKVCache(config), 40)
    gc.collect()
    gc.disable()
    try:
        before = mx.get_active_memory()
        caches = [fill(DeltaKVCache(config), 40)]
        mx.eval(caches[0].state)
        store.insert_cache("m", list(range(40)), caches)
        assert mx.get_active_memory() > before
        del caches
        found, _ = store.fetch_nearest_cache("m", list(range(41)))
        mx.eval(found[0].state)
        del found
        assert mx.get_active_memory() <= before
    finally:
        gc.enable()


def test_a_closed_store_is_empty():
    prefixes = Prefixes(LRUPromptCache())
    prefixes.keep("m", [1, 2], [[fill(KVCache(), 2)]])
    assert prefixes.nbytes > 0
    prefixes.close()
    assert (len(prefixes), prefixes.nbytes) == (0, 0)
