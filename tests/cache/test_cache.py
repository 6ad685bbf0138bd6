"""DeltaKVCache: whatever is done to a cache, the text goes on as if nothing had been."""

from __future__ import annotations

import copy
import json

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import (
    KVCache,
    LRUPromptCache,
    load_prompt_cache,
    save_prompt_cache,
    trim_prompt_cache,
)

from mlx_delta import DeltaConfig, DeltaKVCache, measure_sparsity
from tests.attention.test_hybrid import attend, inputs
from tests.cache.settings import LENGTH, TEXT, each_setting
from tests.tiny import SMALL


def whole(config: DeltaConfig) -> np.ndarray:
    """Outputs of the text, fed at once."""
    return attend(DeltaKVCache(config), TEXT, [LENGTH])


def part(start: int, end: int) -> tuple[np.ndarray, ...]:
    """Tokens of the text."""
    return tuple(x[:, :, start:end] for x in TEXT)


def assert_goes_on(cache: DeltaKVCache, start: int, config: DeltaConfig) -> None:
    """The rest of the text comes out as it does from a cache that saw it all at once."""
    rest = attend(cache, part(start, LENGTH), [1, LENGTH - start - 1])
    np.testing.assert_allclose(rest, whole(config)[:, :, start:], atol=2e-6)


@each_setting
@given(cuts=st.lists(st.integers(1, 60), min_size=1, max_size=12))
@settings(deadline=None, max_examples=25)
def test_the_encoding_does_not_depend_on_the_chunks(config, cuts):
    end = min(LENGTH, sum(cuts))
    one, many = DeltaKVCache(config), DeltaKVCache(config)
    one.update(*map(mx.array, part(0, end)[1:]))
    start = 0
    for steps in cuts:
        steps = min(steps, end - start)
        if steps:
            many.update(*map(mx.array, part(start, start + steps)[1:]))
            start += steps
    for a, b in zip(one.keys_and_values(), many.keys_and_values(), strict=True):
        assert mx.array_equal(a, b)
    assert measure_sparsity([one], end).overall == measure_sparsity([many], end).overall


@each_setting
@pytest.mark.parametrize("fed", [1, 64, 90])
def test_saved_and_loaded(config, fed, tmp_path):
    cache = DeltaKVCache(config)
    attend(cache, part(0, fed), [fed])
    save_prompt_cache(str(tmp_path / "cache.safetensors"), [cache], {"note": "x"})
    (loaded,), metadata = load_prompt_cache(str(tmp_path / "cache.safetensors"), True)
    assert isinstance(loaded, DeltaKVCache)
    assert (loaded.config, loaded.offset, metadata) == (config, fed, {"note": "x"})
    assert_goes_on(loaded, fed, config)


def test_an_empty_cache_is_saved_and_loaded(tmp_path):
    save_prompt_cache(str(tmp_path / "cache.safetensors"), [DeltaKVCache(SMALL)])
    (loaded,) = load_prompt_cache(str(tmp_path / "cache.safetensors"))
    assert loaded.empty() and loaded.nbytes == 0
    assert_goes_on(loaded, 0, SMALL)


@each_setting
def test_a_copy_is_independent(config):
    cache = DeltaKVCache(config)
    attend(cache, part(0, 90), [90])
    twin = copy.deepcopy(cache)
    attend(cache, tuple(-x for x in part(90, 120)), [30])
    assert_goes_on(twin, 90, config)


@each_setting
@pytest.mark.parametrize("fed", [20, 64, 65, 100])
@pytest.mark.parametrize("back", [0, 1, 7, 8], ids=lambda n: f"back {n}")
def test_rewinding_by_up_to_a_block_is_exact(config, fed, back):
    """As in speculative decoding: wrong tokens come in, and are taken back."""
    cache = DeltaKVCache(config)
    attend(cache, part(0, fed - back), [fed - back])
    if back:
        attend(cache, tuple(-x for x in part(fed - back, fed)), [back])
    assert trim_prompt_cache([cache], back) == back
    assert cache.offset == fed - back
    assert_goes_on(cache, fed - back, config)


@pytest.mark.parametrize("again", ["at once", "in steps"])
def test_a_state_saved_where_held_keys_stand_in_for_full_ones_goes_on(again):
    """Version 0.1.0 rewound any number of tokens; means of means would drift."""
    cache = DeltaKVCache(SMALL)
    attend(cache, part(0, 120), [120])
    held, _ = cache.keys_and_values()
    zeros = np.array(cache.zeros)
    old = _edit(cache.state[0], lengths=[60], encoded=[5], held=[7], spare_valid=[False])
    cache = DeltaKVCache.from_state([old, *cache.state[1:]])
    assert cache.exact_trim() == 0 and cache.trim(0) == 0
    with pytest.raises(ValueError, match="can be taken back exactly but not 1"):
        cache.trim(1)
    attend(cache, part(60, 120), [1] * 20 + [40] if again == "in steps" else [60])
    keys, _ = cache.keys_and_values()
    assert mx.array_equal(keys[:, :, :56], held[:, :, :56]), "7 blocks of 8 in 60 tokens"
    np.testing.assert_array_equal(cache.zeros[:, :, :7], zeros[:, :, :7])


def test_rewinding_more_than_there_is_empties_the_cache():
    cache = DeltaKVCache(SMALL)
    attend(cache, part(0, 20), [20])
    assert (cache.trim(99), cache.offset, cache.trim(1)) == (20, 0, 0)
    assert_goes_on(cache, 0, SMALL)


def test_the_members_that_mlx_lm_asks_for():
    cache = DeltaKVCache(SMALL)
    assert cache.empty() and cache.size() == 0 and cache.nbytes == 0
    assert bool(cache), "a falsy cache would be passed over"
    for absent in ("bits", "group_size", "to_quantized"):
        assert not hasattr(cache, absent), f"{absent}: mlx-lm would take it for its own kind"
    attend(cache, part(0, 20), [20])
    assert not cache.empty() and cache.size() == cache.offset == 20
    assert cache.make_mask(1) is None and cache.make_mask(5) == "causal"
    stock = KVCache()
    stock.update_and_fetch(*(mx.array(x) for x in part(0, 20)[1:]))
    for window in (None, 7):
        ours = cache.make_mask(5, return_array=True, window_size=window)
        theirs = stock.make_mask(5, return_array=True, window_size=window)
        assert mx.array_equal(ours, theirs)


def test_bytes_are_those_allocated():
    cache = DeltaKVCache(SMALL)
    attend(cache, part(0, 20), [20])
    stock = KVCache()
    stock.update_and_fetch(*(mx.array(x) for x in part(0, 20)[1:]))
    buffers = [x for x in cache.state if isinstance(x, mx.array)]
    assert cache.nbytes == sum(x.nbytes for x in buffers)
    assert cache.dense_nbytes == stock.nbytes


def test_the_lru_prompt_cache_serves_a_prefix():
    cache = DeltaKVCache(SMALL)
    attend(cache, part(0, 90), [90])
    store = LRUPromptCache()
    store.insert_cache("model", list(range(90)), [cache])
    (fetched,), rest = store.fetch_nearest_cache("model", [*range(90), 7])
    assert rest == [7] and fetched.offset == 90
    assert_goes_on(fetched, 90, SMALL)


@pytest.mark.parametrize("length", [9, 40])
def test_rows_of_equal_length_share_one_cache(length):
    rows = inputs(length, rows=3)
    together = attend(DeltaKVCache(SMALL), rows, [length])
    for row in range(3):
        alone = attend(DeltaKVCache(SMALL), tuple(x[row : row + 1] for x in rows), [length])
        np.testing.assert_allclose(together[row], alone[0], atol=2e-6)


def test_a_state_with_one_count_for_all_rows_goes_on():
    """As version 0.1.0 saved rows of equal length."""
    rows = inputs(60, rows=3)
    cache = DeltaKVCache(SMALL)
    attend(cache, tuple(x[:, :, :40] for x in rows), [40])
    header = json.loads(cache.state[0])
    one = {name: header[name][:1] for name in ("lengths", "encoded", "held", "spare_valid")}
    buffers = copy.deepcopy(cache).state[1:]
    restored = DeltaKVCache.from_state([_edit(cache.state[0], **one), *buffers])
    rest = [attend(x, tuple(y[:, :, 40:] for y in rows), [1, 19]) for x in (cache, restored)]
    np.testing.assert_array_equal(*rest)


@pytest.mark.parametrize("cuts", [[60, 1], [40, 19, 2], [20, 20, 20, 1]], ids=str)
def test_the_papers_window_is_fixed_when_the_prompt_is_over(cuts):
    """A chunk may not be the last one. Until few tokens come, all keys are full."""
    cache = DeltaKVCache(DeltaConfig.paper())
    prompt = sum(cuts)
    queries, keys, values = (mx.array(x[:, :, : prompt - cuts[-1]]) for x in TEXT)
    dense = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=0.25, mask="causal")
    np.testing.assert_allclose(attend(cache, TEXT, cuts[:-1]), dense, atol=2e-6)
    assert cache.config.block_fraction == 0.05 and cache.encoded == (0,)
    assert measure_sparsity([cache], prompt).prefill == 0
    attend(cache, part(prompt - cuts[-1], prompt), [cuts[-1]])
    assert cache.config == DeltaConfig.paper().resolve(prompt)
    known = DeltaKVCache(DeltaConfig.paper().resolve(prompt))
    attend(known, part(0, prompt), [prompt])
    for ours, theirs in zip(cache.keys_and_values(), known.keys_and_values(), strict=True):
        assert mx.array_equal(ours, theirs)
    rest = [attend(x, part(prompt, 150), [1, 149 - prompt]) for x in (cache, known)]
    np.testing.assert_array_equal(*rest)
    sparsity = measure_sparsity([cache], prompt)
    assert sparsity.decode == measure_sparsity([known], prompt).decode > 0
    assert sparsity.prefill < measure_sparsity([known], prompt).prefill / 5, "few queries saw it"


def test_a_window_that_is_not_fixed_yet_is_saved_and_loaded(tmp_path):
    cache = DeltaKVCache(DeltaConfig.paper())
    attend(cache, part(0, 60), [60])
    save_prompt_cache(str(tmp_path / "cache.safetensors"), [cache])
    (loaded,) = load_prompt_cache(str(tmp_path / "cache.safetensors"))
    for _ in range(2):
        outputs = [attend(x, part(60, 80), [1, 19]) for x in (cache, copy.deepcopy(loaded))]
        np.testing.assert_array_equal(*outputs)
        save_prompt_cache(str(tmp_path / "cache.safetensors"), [loaded])
        cache = copy.deepcopy(loaded)
    assert cache.config.block_fraction == 0.05


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda s: ["x", *s[1:]], "not a saved state"),
        (lambda s: s[:3], "not a saved state"),
        (lambda s: [_edit(s[0], version=99), *s[1:]], "version 99"),
        (lambda s: [_edit(s[0], lengths=[9999]), *s[1:]], "counts 9999 tokens"),
        (lambda s: [_edit(s[0], encoded=[40]), *s[1:]], "40 encoded blocks"),
        (lambda s: [_edit(s[0], held=[8]), *s[1:]], "8 held ones of 90 tokens"),
        (lambda s: [_edit(s[0], held=[12]), *s[1:]], "12 held ones of 90 tokens"),
        (lambda s: [_edit(s[0], held=[]), *s[1:]], "held blocks for other rows"),
        (lambda s: [s[0], s[1], s[2][..., :9, :], *s[3:]], "values have shape"),
        (lambda s: [s[0], s[1], None, *s[3:]], "lacks one of its buffers"),
    ],
    ids=[
        *("no header", "truncated", "version", "length", "encoded"),
        *("held too few", "held too many", "held rows", "shape", "missing buffer"),
    ],
)
def test_a_damaged_state_is_refused(break_it, message):
    cache = DeltaKVCache(SMALL)
    attend(cache, part(0, 90), [90])
    with pytest.raises(ValueError, match=message):
        DeltaKVCache.from_state(break_it(cache.state))


def _edit(header: str, **changes) -> str:
    return json.dumps({**json.loads(header), **changes})


def test_a_state_saved_before_runs_were_means_goes_on(tmp_path):
    """Without what was not in it: the setting's default, and as many blocks held as encoded."""
    cache = DeltaKVCache(SMALL)
    attend(cache, part(0, 90), [90])
    header, *buffers = cache.state
    old = json.loads(header)
    del old["config"]["run_value"], old["held"]
    restored = DeltaKVCache.from_state([json.dumps(old), *buffers])
    assert restored.config == SMALL
    assert_goes_on(restored, 90, SMALL)
