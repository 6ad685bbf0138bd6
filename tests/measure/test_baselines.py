"""Others' quantized caches: what queries see of them, against the numbers computed directly."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_delta.measure.baselines import GROUP, ChannelKVCache, RotatedKVCache
from mlx_delta.measure.settings import cache_nbytes, parse_setting
from tests.tiny import llama_model, smooth_keys

RNG = np.random.default_rng(4)
KEYS, VALUES = smooth_keys((1, 2, 300, 64)), RNG.normal(size=(1, 2, 300, 64)).astype(np.float32)
HEAD_64 = {"head_dim": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
IDS = RNG.integers(0, 4096, 200).tolist()


def fed(cache, cuts: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """What the last call of several returns."""
    start = 0
    for steps in cuts:
        part = (mx.array(x[:, :, start : start + steps]) for x in (KEYS, VALUES))
        fetched = cache.update_and_fetch(*part)
        start += steps
    return tuple(np.array(x) for x in fetched)


def rounded(x: np.ndarray, bits: int) -> np.ndarray:
    """Affine codes of groups of 64 along the last axis."""
    parts = mx.quantize(mx.array(x), GROUP, bits)
    return np.array(mx.dequantize(*parts, GROUP, bits))


def test_rotated_codes_are_those_of_the_turned_tokens():
    keys, values = fed(RotatedKVCache(4), [200, 99, 1])
    turn = np.ones((1, 1), np.float32)
    for _ in range(6):
        turn = np.block([[turn, turn], [turn, -turn]])
    turn /= 8
    for found, x in ((keys, KEYS), (values, VALUES)):
        wanted = rounded(x @ turn, 4) @ turn
        # A number on the border between two codes may fall either way.
        assert np.mean(np.abs(found - wanted) > 1e-4) < 0.002
        assert 0.01 < np.abs(found - x).mean() < 0.5


@pytest.mark.parametrize("make", [RotatedKVCache, ChannelKVCache])
def test_the_first_call_sees_nothing_quantized(make):
    keys, values = fed(make(4), [200])
    np.testing.assert_array_equal(keys, KEYS[:, :, :200])
    np.testing.assert_array_equal(values, VALUES[:, :, :200])


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("cuts", [[200, 1], [64, 64, 64, 9], [100, 100, 1], [1] * 201], ids=len)
def test_keys_are_rounded_by_channel_and_the_last_group_is_full(bits, cuts):
    keys, values = fed(ChannelKVCache(bits), cuts)
    full = (sum(cuts) - cuts[-1]) // GROUP * GROUP  # groups that were complete before the call
    assert full == 192
    by_channel = rounded(KEYS[:, :, :full].reshape(1, 2, 3, 64, 64).swapaxes(3, 4), bits)
    by_channel = by_channel.swapaxes(3, 4).reshape(1, 2, full, 64)
    np.testing.assert_allclose(keys[:, :, :full], by_channel, atol=1e-5)
    np.testing.assert_allclose(values[:, :, :full], rounded(VALUES[:, :, :full], bits), atol=1e-5)
    np.testing.assert_array_equal(keys[:, :, full:], KEYS[:, :, full : sum(cuts)])
    np.testing.assert_array_equal(values[:, :, full:], VALUES[:, :, full : sum(cuts)])


@pytest.mark.parametrize("name", ["kv4-rotated", "kivi4", "kivi2"])
def test_how_a_text_is_cut_changes_nothing(name):
    model, setting = llama_model(**HEAD_64), parse_setting(name)
    results = []
    for step in (1, 7, 150):
        caches = setting.make_caches(model)
        setting.prefill(model, IDS[:50], caches)
        rows = [setting.forward(model, IDS[i : i + step], caches) for i in range(50, 200, step)]
        results.append(mx.concatenate(rows))
    assert mx.allclose(results[0], results[1], atol=1e-3)
    assert mx.allclose(results[0], results[2], atol=1e-3)


def test_bytes_are_those_of_the_codes():
    sizes = {}
    for name in ("dense", "kv4", "kv4-rotated", "kivi4", "kivi2"):
        setting = parse_setting(name)
        model = llama_model(**HEAD_64)
        caches = setting.make_caches(model)
        setting.prefill(model, IDS[:192], caches)
        sizes[name] = cache_nbytes(caches) / 3
    assert sizes["dense"] == 256 * 2 * 64 * 2
    assert sizes["kv4"] == sizes["kv4-rotated"] == sizes["kivi4"] == 256 * 2 * 64 * 4.5 / 8
    assert sizes["kivi2"] == 256 * 2 * 64 * 2.5 / 8


def test_heads_that_can_not_be_turned_are_named():
    model, setting = llama_model(), parse_setting("kv4-rotated")
    with pytest.raises(ValueError, match="heads must be of 64, 128, 256 .. numbers but got 16"):
        setting.prefill(model, IDS[:9], setting.make_caches(model))
