"""Packed caches: the same keys as dense storage, whatever is done to them; and what they refuse."""

from __future__ import annotations

import copy
import dataclasses
import json
from unittest import mock

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import KVCache, QuantizedKVCache, load_prompt_cache, save_prompt_cache

from mlx_delta import DeltaConfig, DeltaKVCache
from mlx_delta.cache import rewind
from mlx_delta.cache.packed_log import PackedLog
from mlx_delta.config import KEY_BITS
from tests.attention.test_hybrid import attend, inputs
from tests.cache.test_batch import feed_batch
from tests.tiny import SMALL, smooth_keys

# Of a float16 model, so that storing keys and their means in 16 bits changes nothing.
TEXTS = [tuple(x.astype(np.float16) for x in inputs(400 + row)) for row in range(3)]
PACKED = dataclasses.replace(SMALL, key_bits=16, value_bits=16)
each_run_value = pytest.mark.parametrize("run_value", ["mean", "first"])

actions = st.one_of(
    st.tuples(st.just("feed"), st.sampled_from([1, 1, 1, 2, 7, 8, 9, 40])),
    st.tuples(st.just("rewind"), st.integers(0, 60)),
    st.tuples(st.sampled_from(["copy", "save"]), st.just(0)),
)


def assert_same_keys(packed, dense) -> None:
    for ours, theirs in zip(packed.keys_and_values(), dense.keys_and_values(), strict=True):
        assert mx.array_equal(ours, theirs)


@each_run_value
@given(todo=st.lists(actions, min_size=1, max_size=14))
@settings(deadline=None, max_examples=40)
def test_one_text(tmp_path_factory, run_value, todo):
    packed, dense = (
        DeltaKVCache(dataclasses.replace(setting, run_value=run_value))
        for setting in (PACKED, SMALL)
    )
    for action, n in [("feed", 40), *todo]:
        if action == "feed":
            start = dense.offset
            if start + n > 400:
                break
            part = tuple(x[:, :, start : start + n] for x in TEXTS[0])
            np.testing.assert_allclose(
                attend(packed, part, [n]), attend(dense, part, [n]), atol=4e-3
            )
        elif action == "rewind":
            assert rewind([packed], n) == rewind([dense], n)
        elif action == "copy":
            packed = copy.deepcopy(packed)
        else:
            file = str(tmp_path_factory.mktemp("cache") / "cache.safetensors")
            save_prompt_cache(file, [packed])
            (packed,) = load_prompt_cache(file)
        assert packed.offset == dense.offset
        assert packed.encoded == dense.encoded
        if dense.offset:
            assert_same_keys(packed, dense)


@given(
    lengths=st.lists(st.integers(0, 90), min_size=3, max_size=3).filter(any),
    todo=st.lists(
        st.one_of(
            st.tuples(st.just("feed"), st.sampled_from([1, 1, 2, 8, 30])),
            st.tuples(st.just("rewind"), st.integers(0, 8)),
            st.tuples(st.just("filter"), st.permutations([0, 1, 2])),
            st.tuples(st.just("extend"), st.integers(0, 2)),
        ),
        max_size=6,
    ),
)
@example(lengths=[0, 0, 2], todo=[("rewind", 2), ("feed", 1), ("feed", 8)])
@example(lengths=[0, 30, 9], todo=[("rewind", 8), ("feed", 2), ("feed", 30), ("rewind", 3)])
@settings(deadline=None, max_examples=40)
def test_batches(lengths, todo):
    """Merged, fed, rewound, filtered, extended and taken apart again."""
    batches = []
    for setting in (PACKED, SMALL):
        caches = [DeltaKVCache(setting) for _ in lengths]
        for cache, text, length in zip(caches, TEXTS, lengths, strict=True):
            if length:
                attend(cache, tuple(x[:, :, :length] for x in text), [length])
        batches.append(DeltaKVCache.merge(caches))
    packed, dense = batches
    texts = list(TEXTS)
    for action, n in todo:
        if action == "feed":
            outputs = [feed_batch(cache, texts, n) for cache in (packed, dense)]
            np.testing.assert_allclose(*outputs, atol=4e-3)
        elif action == "rewind" and n <= dense.exact_trim():
            assert packed.exact_trim() == dense.exact_trim()
            assert packed.trim(n) == dense.trim(n)
        elif action == "filter":
            kept = n[: max(1, len(texts) - 1)]
            kept = [row for row in kept if row < len(texts)] or [0]
            for cache in (packed, dense):
                cache.filter(kept)
            texts = [texts[row] for row in kept]
        elif action == "extend":
            for cache, setting in ((packed, PACKED), (dense, SMALL)):
                other = DeltaKVCache(setting)
                attend(other, tuple(x[:, :, : 20 * n + 1] for x in TEXTS[n]), [20 * n + 1])
                cache.extend(DeltaKVCache.merge([other]))
            texts.append(TEXTS[n])
        assert packed.offset.tolist() == dense.offset.tolist()
    for row, length in enumerate(dense.offset.tolist()):
        if length > 0:
            assert_same_keys(packed.extract(row), dense.extract(row))


@pytest.mark.parametrize("key_bits", KEY_BITS)
@pytest.mark.parametrize("value_bits", [None, 16, 8, 4])
def test_all_widths_go_on_as_if_fed_at_once(key_bits, value_bits):
    setting = dataclasses.replace(SMALL, key_bits=key_bits, value_bits=value_bits)
    rng = np.random.default_rng(0)
    shape = (1, 2, 100, 32)
    text = (
        rng.normal(size=(1, 4, 100, 32)).astype(np.float32),
        smooth_keys(shape),
        smooth_keys(shape, 1),
    )
    at_once, in_steps = DeltaKVCache(setting), DeltaKVCache(setting)
    wanted = attend(at_once, text, [100])
    output = attend(in_steps, text, [50, 1, 1, 1, 30, *[1] * 17])
    np.testing.assert_allclose(output, wanted, atol=2e-5)
    assert_same_keys(in_steps, at_once)
    exact = attend(DeltaKVCache(SMALL), text, [100])
    assert np.corrcoef(exact.reshape(-1), wanted.reshape(-1))[0, 1] > 0.95


def keys_of(zeros: float, length: int, heads: int = 2, head_dim: int = 64) -> mx.array:
    """float16 keys [1, heads, length, head_dim] of which about this share is held.

    Each value stays as it is for a while, or jumps by far more than the threshold.
    """
    rng = np.random.default_rng(0)
    shape = (1, heads, length, head_dim)
    jumps = rng.random(shape) > zeros
    level = np.where(rng.random(shape) < 0.5, 1.0, -1.0) + rng.normal(size=shape) * 0.01
    last = np.maximum.accumulate(np.where(jumps, np.arange(length)[:, None], 0), axis=2)
    sign = np.where(np.cumsum(jumps, axis=2) % 2 == 0, 1.0, -1.0)  # every jump changes it
    return mx.array(np.take_along_axis(np.abs(level), last, axis=2) * sign * 2).astype(mx.float16)


@pytest.mark.parametrize(
    ("key_bits", "value_bits", "of_keys", "of_both"),
    [(16, None, 0.47, 0.75), (8, 8, 0.33, 0.44), (4, 4, 0.22, 0.26), (2, 4, 0.19, 0.24)],
)
@pytest.mark.parametrize("fed", ["prompt", "prompt and tokens"])
def test_bytes_at_8192_tokens(key_bits, value_bits, of_keys, of_both, fed):
    """Allocated bytes, window and room to grow included, against dense float16."""
    length = 8192
    keys = keys_of(0.655, length)
    setting = DeltaConfig(key_bits=key_bits, value_bits=value_bits)
    cache = DeltaKVCache(setting)
    cuts = [2048] * 4 if fed == "prompt" else [2048] * 3 + [1500] + [1] * 548
    start = 0
    for steps in cuts:
        cache.update(*[keys[:, :, start : start + steps]] * 2)
        start += steps
    mx.eval(cache.state[1:])
    (blocks,) = cache.encoded
    zeros = np.array(cache.zeros)[:, :, :blocks].mean() / (63 * 64)
    assert 0.65 <= zeros < 0.66
    assert cache.key_nbytes <= of_keys * keys.nbytes
    assert cache.nbytes <= of_both * 2 * keys.nbytes


def test_decode_waits_for_no_count():
    """A block's words are moved together when the next block comes, not when it is encoded."""
    setting = DeltaConfig(key_bits=16, block_size=8, window=0)
    keys = keys_of(0.6, 40)
    cache = DeltaKVCache(setting)
    moved = []
    with mock.patch.object(
        PackedLog, "_settle_row", autospec=True, side_effect=PackedLog._settle_row
    ) as spy:
        for t in range(40):
            cache.update(*[keys[:, :, t : t + 1]] * 2)
            moved.append(spy.call_count)
    encoded = [t // 8 for t in range(40)]
    assert moved == [max(0, n - 1) for n in encoded]


def test_values_take_what_mlx_lms_take():
    keys = keys_of(0.5, 512)
    for bits in (8, 4):
        ours, theirs = DeltaKVCache(DeltaConfig(value_bits=bits)), QuantizedKVCache(bits=bits)
        ours.update(keys, keys)
        theirs.update_and_fetch(keys, keys)
        assert ours.value_nbytes == theirs.nbytes / 2
    dense = KVCache()
    dense.update_and_fetch(keys, keys)
    assert ours.dense_nbytes == dense.nbytes


# Bad input.


def fed_cache(key_bits: int = 4) -> DeltaKVCache:
    cache = DeltaKVCache(dataclasses.replace(SMALL, key_bits=key_bits, value_bits=16))
    attend(cache, tuple(x[:, :, :90] for x in TEXTS[0]), [90])
    return cache


def header(state, **changes) -> list:
    return [json.dumps({**json.loads(state[0]), **changes}), *state[1:]]


def replaced(state, index: int, value) -> list:
    return [*state[:index], value, *state[index + 1 :]]


# header, near, values, masks, payload, offsets, grid, sinks, zeros
@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda s: header(s, version=7), "version 7"),
        (lambda s: header(s, type="int4"), "int4"),
        (lambda s: header(s, ends=[]), "row counts do not fit"),
        (lambda s: header(s, ends=[[1] * 9]), "offsets of row 0"),
        (lambda s: header(s, firsts=[8]), "near keys from position 8"),
        (lambda s: header(s, lengths=[9999]), "9999 tokens"),
        (lambda s: header(s, encoded=[2]), "near keys from position"),
        (lambda s: header(s, encoded=[99]), "99 encoded blocks"),
        (lambda s: header(s, lost=[7]), "7. blocks without full keys"),
        (lambda s: header(s, lost=[10]), "10. blocks without full keys"),
        (lambda s: header(s, lost=[]), "blocks without full keys"),
        (
            lambda s: header(s, config={**json.loads(s[0])["config"], "key_bits": 16}),
            "grid|sinks|do not",
        ),
        (lambda s: header(s, config={**json.loads(s[0])["config"], "key_bits": 5}), "key_bits"),
        (lambda s: header(s, config={**json.loads(s[0])["config"], "value_bits": 4}), "9 parts"),
        (lambda s: s[:-2], "7 parts"),
        (lambda s: replaced(s, 4, s[4][:, :50]), "payload of 50 words"),
        (lambda s: replaced(s, 5, s[5] + 1), "offsets of row 0"),
        (lambda s: replaced(s, 5, s[5] + 10**6), "offsets of row 0"),
        (lambda s: replaced(s, 3, s[3] ^ 1), "offsets of row 0"),
        (lambda s: replaced(s, 3, s[3][..., :0]), "masks do not fit"),
        (lambda s: replaced(s, 3, None), "lacks one of its buffers"),
        (lambda s: replaced(s, 6, None), "grid do not fit"),
        (lambda s: replaced(s, 7, s[7][:, :, :1]), "sinks do not fit"),
        (lambda s: replaced(s, 1, s[1][:, :, :8]), "near do not fit"),
        (lambda s: replaced(s, 1, s[1].astype(mx.float32)), "near do not fit"),
        (lambda s: replaced(s, 4, s[4].astype(mx.float32)), "payload do not fit"),
        (lambda s: replaced(s, 4, s[4][:, :0]), "counts encoded blocks but has none"),
    ],
)
def test_a_damaged_state_is_refused(break_it, message):
    with pytest.raises(ValueError, match=message):
        DeltaKVCache.from_state(break_it(fed_cache().state))


def test_a_truncated_file_is_refused(tmp_path):
    file = tmp_path / "cache.safetensors"
    save_prompt_cache(str(file), [fed_cache()])
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(RuntimeError):
        load_prompt_cache(str(file))


def test_another_models_cache_is_refused():
    cache = fed_cache()
    for shape in ((1, 3, 1, 16), (1, 2, 1, 32)):
        new = mx.zeros(shape)
        with pytest.raises(ValueError, match="the cache is of a model with kv heads and head dim"):
            cache.update(new, new)
    new = mx.zeros((2, 2, 1, 16))
    with pytest.raises(ValueError, match="the cache has 1 rows but these keys have 2"):
        cache.update(new, new)


@pytest.mark.parametrize(
    ("changes", "shape", "dtype", "message"),
    [
        ({"key_bits": 4}, (1, 1, 9, 20), mx.float32, "head_dim that is a multiple of 16"),
        ({"key_bits": 4}, (1, 1, 9, 512), mx.float32, "up to 256, but got 512"),
        ({"key_bits": 4}, (1, 1, 9, 64), mx.int32, "must be float16, bfloat16 or float32"),
        ({"value_bits": 4}, (1, 1, 9, 80), mx.float32, "value_bits=4 needs a head_dim"),
    ],
)
def test_what_no_kernel_supports_is_refused(changes, shape, dtype, message):
    cache = DeltaKVCache(DeltaConfig(**changes))
    with pytest.raises(ValueError, match=message):
        cache.update(mx.zeros(shape, dtype), mx.zeros(shape, dtype))
    assert cache.empty()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key_bits": 5}, "key_bits must be one of 16, 8, 4, 3, 2 but got 5"),
        ({"key_bits": True}, "key_bits must be one of"),
        ({"value_bits": 2}, "value_bits must be one of 16, 8, 4 but got 2"),
        ({"key_bits": 4, "keyframes": False, "run_value": "first"}, "needs keyframes=True"),
        ({"key_bits": 4, "window": 0, "block_fraction": 0.05}, "a fixed block_size"),
        ({"key_bits": 4, "block_size": 20, "window": 20}, "multiple of 8, up to 64, but got 20"),
        (
            {"key_bits": 4, "block_size": 128, "window": 128, "threshold": 1.0},
            "up to 64, but got 128",
        ),
    ],
)
def test_settings_that_can_not_be_packed_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        DeltaConfig(**changes)
