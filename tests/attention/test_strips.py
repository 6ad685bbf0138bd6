"""Stored keys attended to strip by strip: the same output, and no copy of them all."""

from __future__ import annotations

import dataclasses

import mlx.core as mx
import numpy as np
import pytest

from mlx_delta import DeltaConfig, DeltaKVCache
from mlx_delta.attention import prefill
from mlx_delta.attention.hybrid import delta_attention
from mlx_delta.ops import strip_attention
from mlx_delta.ops.backend import has_kernels
from tests.attention.test_hybrid import HEADS, KV_HEADS, inputs
from tests.tiny import smooth_keys

pytestmark = pytest.mark.skipif(has_kernels(), reason="there is a GPU, whose attention is fused")

DELTAS = DeltaConfig(block_size=8, window=16, sinks=11, key_bits=4, value_bits=16)
SETTINGS = {
    "deltas": DELTAS,
    "codes": dataclasses.replace(DELTAS, key_format="codes"),
    "no window": dataclasses.replace(DELTAS, window=0, sinks=0),
    "dropping": dataclasses.replace(DELTAS, max_size=160),
    "blocks of 64": DeltaConfig(key_bits=3, value_bits=16),
}


@pytest.fixture(autouse=True)
def short_strips(monkeypatch):
    """Strips of which a short text has several, and few queries read them too."""
    monkeypatch.setattr(strip_attention, "STRIP", 40)
    monkeypatch.setattr(prefill, "LONG", 0)


@pytest.mark.parametrize("config", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("cuts", [[330], [100, 37, 1, 64, 128], [64, 1, 1, 200, 64]], ids=str)
def test_strips_agree_with_keys_written_out_at_once(config, cuts, monkeypatch):
    text = [mx.array(x) for x in inputs(330)]

    def run() -> np.ndarray:
        cache, start, outputs = DeltaKVCache(config), 0, []
        for steps in cuts:
            part = [x[:, :, start : start + steps] for x in text]
            outputs.append(delta_attention(*part, cache, 0.25))
            start += steps
        return np.array(mx.concatenate(outputs, axis=2))

    found = run()
    monkeypatch.setattr("mlx_delta.attention.hybrid.attends_in_strips", lambda *_: False)
    np.testing.assert_allclose(found, run(), atol=2e-5)


def test_coded_values_are_written_out_in_strips_too(monkeypatch):
    config, keys = dataclasses.replace(DELTAS, value_bits=4), smooth_keys((1, KV_HEADS, 300, 32))
    queries = np.random.default_rng(0).normal(size=(1, HEADS, 300, 32))
    text = [mx.array(x, mx.float32) for x in (queries, keys, keys)]
    found = delta_attention(*text, DeltaKVCache(config), 0.1)
    monkeypatch.setattr("mlx_delta.attention.hybrid.attends_in_strips", lambda *_: False)
    wanted = delta_attention(*text, DeltaKVCache(config), 0.1)
    np.testing.assert_allclose(found, wanted, atol=2e-5)


def test_what_a_prompt_takes_besides_its_stored_keys_does_not_grow(monkeypatch):
    """The peak of a chunk, less what is kept: little more after 6,000 tokens than after 2,000."""
    monkeypatch.setattr(strip_attention, "STRIP", 1024)
    config, width = DeltaConfig(key_format="codes", key_bits=4, value_bits=4), 64
    cache = DeltaKVCache(config)
    keys = mx.array(smooth_keys((1, KV_HEADS, 2048, width)))
    queries = mx.random.normal((1, HEADS, 256, width))
    taken = []
    for _ in range(3):
        cache.update(keys, keys)
        mx.eval(cache.state)
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        new = keys[:, :, :256]
        mx.eval(delta_attention(queries, new, new, cache, 0.1), cache.state)
        taken.append(mx.get_peak_memory() - before)
        cache.trim(0)
    unpacked = 2 * 4 * cache.size() * KV_HEADS * width  # keys and values of one layer in float32
    growth = taken[2] - taken[0]
    assert growth < 0.5 * unpacked * 2 / 3, (taken, unpacked)
