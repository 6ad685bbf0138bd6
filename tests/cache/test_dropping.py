"""A cache that keeps so many tokens: what a query sees depends on its position alone."""

from __future__ import annotations

import copy
import dataclasses

import mlx.core as mx
import numpy as np
import pytest

from mlx_delta import DeltaConfig, DeltaKVCache
from mlx_delta.attention.hybrid import delta_attention
from mlx_delta.cache import BatchDeltaKVCache, rewind
from mlx_delta.cache.dropping import Dropping
from mlx_delta.measure.sparsity import measure_sparsity
from tests.attention.test_hybrid import inputs
from tests.tiny import SMALL, llama_model, tokens

LENGTH = 200
TEXT = tuple(mx.array(x) for x in inputs(LENGTH, dim=32))
SETTINGS = {
    "held": dataclasses.replace(SMALL, max_size=72),
    "two at a time": dataclasses.replace(SMALL, max_size=136),
    "no sinks": DeltaConfig(block_size=8, window=0, sinks=0, max_size=40, threshold=1.0),
    "chain": DeltaConfig(block_size=8, window=8, keyframes=False, run_value="first", max_size=64),
    "deltas": SMALL.changed(level=0.03, max_size=136, key_bits=4, value_bits=16),
    "codes": dataclasses.replace(
        SMALL,
        max_size=136,
        key_format="codes",
        key_bits=8,
        value_bits=8,
    ),
}
each_setting = pytest.mark.parametrize("config", SETTINGS.values(), ids=SETTINGS)


def feed(cache, start: int, end: int, step: int | None = None, text=TEXT) -> list[mx.array]:
    """Outputs of a part of the text, fed so many tokens at a time."""
    step = step or end - start
    return [
        delta_attention(*(x[:, :, i : min(i + step, end)] for x in text), cache, 0.25)
        for i in range(start, end, step)
    ]


def expected(config: DeltaConfig) -> mx.array:
    """The same by a cache that keeps all, under a mask that hides what would be gone."""
    unbounded = DeltaKVCache(dataclasses.replace(config, max_size=None))
    dropping = Dropping.of(config)
    position, key = mx.arange(LENGTH)[:, None], mx.arange(LENGTH)[None]
    gone = mx.array([dropping.dropped(i) for i in range(LENGTH)])[:, None] + dropping.first
    block = key // config.block_size
    hidden = (block >= dropping.first) & (block < gone)
    return delta_attention(*TEXT, unbounded, 0.25, (key <= position) & ~hidden)


@each_setting
@pytest.mark.parametrize("step", [LENGTH, 37, 1])
def test_what_is_seen_does_not_depend_on_how_a_text_is_cut(config, step):
    cache = DeltaKVCache(config)
    found = mx.concatenate(feed(cache, 0, LENGTH, step), axis=2)
    np.testing.assert_allclose(found, expected(config), atol=2e-3 if config.key_bits else 1e-5)
    kept = cache.keys_and_values()[0].shape[2]
    assert kept <= config.max_size < LENGTH and cache.offset == LENGTH
    assert kept > config.max_size * 7 // 8 - config.block_size


@each_setting
def test_its_buffers_stay_as_they_are(config):
    """Nothing grows beyond what the first few hundred tokens took."""
    cache, sizes = DeltaKVCache(config), []
    for _ in range(4):
        feed(cache, 0, LENGTH)
        mx.eval(cache.state)
        sizes.append(cache.nbytes)
    unbounded = DeltaKVCache(dataclasses.replace(config, max_size=None))
    for _ in range(4):
        feed(unbounded, 0, LENGTH)
    assert max(sizes[2:]) <= 1.1 * max(sizes[:2])
    assert max(sizes) < unbounded.nbytes / 2


@each_setting
def test_a_batch_drops_each_rows_own(config):
    singles = [DeltaKVCache(config) for _ in range(2)]
    for cache, n in zip(singles, (50, 110), strict=True):
        feed(cache, 0, n)
    batch = BatchDeltaKVCache.merge([copy.deepcopy(cache) for cache in singles])
    rows = [tuple(x[:, :, n : n + 90] for x in TEXT) for n in (50, 110)]
    both = tuple(mx.concatenate(pair) for pair in zip(*rows, strict=True))
    mask = batch.make_mask(90)
    together = delta_attention(*both, batch, 0.25, mask)
    for i, (cache, row) in enumerate(zip(singles, rows, strict=True)):
        alone = delta_attention(*row, cache, 0.25)
        np.testing.assert_allclose(together[i : i + 1], alone, atol=1e-5)
        out = batch.extract(i)
        assert (out.lengths, out.encoded, out.dropped) == (
            cache.lengths,
            cache.encoded,
            cache.dropped,
        )
        for ours, theirs in zip(out.keys_and_values(), cache.keys_and_values(), strict=True):
            assert mx.array_equal(ours, theirs)


@pytest.mark.parametrize("lengths", [(50, 110), (110, 1)], ids=str)
@each_setting
def test_a_row_that_dropped_sees_nothing_behind_its_end(config, lengths):
    """Of two texts the longer one keeps fewer tokens for a while; or has blocks of its own."""
    singles = [DeltaKVCache(config) for _ in lengths]
    for cache, n in zip(singles, lengths, strict=True):
        feed(cache, 0, n)
    batch = BatchDeltaKVCache.merge([copy.deepcopy(cache) for cache in singles])
    for t in range(30):
        rows = [tuple(x[:, :, n + t : n + t + 1] for x in TEXT) for n in lengths]
        both = tuple(mx.concatenate(pair) for pair in zip(*rows, strict=True))
        together = delta_attention(*both, batch, 0.25, batch.make_mask(1))
        for i, (cache, row) in enumerate(zip(singles, rows, strict=True)):
            alone = delta_attention(*row, cache, 0.25)
            np.testing.assert_allclose(together[i : i + 1], alone, atol=1e-5)


def test_padding_drops_nothing():
    """A row of a batch whose text ends early, and goes on."""
    config = SETTINGS["held"]
    batch, single = BatchDeltaKVCache([0, 0], config), DeltaKVCache(config)
    both = tuple(mx.concatenate([x, x]) for x in TEXT)
    batch.prepare(lengths=[90, 200], right_padding=[110, 0])
    delta_attention(*(x[:, :, :200] for x in both), batch, 0.25, batch.make_mask(200))
    batch.finalize()
    feed(single, 0, 90)
    assert batch.lengths == (90, 200) and batch.dropped[0] == single.dropped[0]
    one = tuple(x[:, :, 90:91] for x in TEXT)
    both = tuple(mx.concatenate([x, x]) for x in one)
    found = delta_attention(*both, batch, 0.25, batch.make_mask(1))
    np.testing.assert_allclose(found[:1], delta_attention(*one, single, 0.25), atol=1e-5)


@each_setting
def test_saved_and_restored(config):
    cache = DeltaKVCache(config)
    feed(cache, 0, 150)
    other = DeltaKVCache.from_state(cache.state)
    for ours, theirs in zip(feed(other, 150, 190, 7), feed(cache, 150, 190, 7), strict=True):
        assert mx.array_equal(ours, theirs)


@each_setting
def test_going_back_is_exact_or_refused(config):
    for length in (160, 171):
        cache = DeltaKVCache(config)
        feed(cache, 0, length)
        with pytest.raises(ValueError, match="full keys are gone"):
            cache.trim(length - 20)
        back = cache.exact_trim()
        assert cache.trim(back) == back
        undisturbed = DeltaKVCache(config)
        feed(undisturbed, 0, length - back)
        pairs = zip(
            feed(cache, length - back, 190), feed(undisturbed, length - back, 190), strict=True
        )
        assert all(np.allclose(ours, theirs, atol=1e-6) for ours, theirs in pairs)
    assert rewind([cache], cache.offset) == 0 and cache.dropped == (0,)
    assert np.allclose(feed(cache, 0, 90)[0], feed(DeltaKVCache(config), 0, 90)[0], atol=1e-6)


def test_a_model_of_mlx_lms_and_ours_drop_alike():
    """One hands its keys through mlx-lm's attention, the other calls ours."""
    model = llama_model(delta=dataclasses.replace(SMALL, max_size=72))
    text = tokens(180)
    whole, parts = model.make_cache(), model.make_cache()
    wanted = model(text, cache=whole)
    found = mx.concatenate([model(text[:, i : i + 50], cache=parts) for i in range(0, 180, 50)], 1)
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    far = measure_sparsity(whole, 180)
    kept = measure_sparsity(model_run(model, dataclasses.replace(SMALL), text), 180)
    assert far.prefill > kept.prefill, "what is dropped is not computed"


def model_run(model, config, text) -> list[DeltaKVCache]:
    caches = [DeltaKVCache(config) for _ in model.layers]
    mx.eval(model(text, cache=caches))
    return caches


@pytest.mark.parametrize("size", [0, 47, True, 1 << 30, "64"])
def test_sizes_that_leave_no_room(size):
    with pytest.raises(ValueError, match=r"max_size must be a whole number from 48"):
        dataclasses.replace(SMALL, max_size=size)


def test_a_size_is_written_and_read():
    config = DeltaConfig(max_size=4096)
    assert DeltaConfig.from_dict(config.to_dict()) == config
    assert DeltaConfig.parse(str(config)) == config
    assert "max_size" not in DeltaConfig().to_dict()
