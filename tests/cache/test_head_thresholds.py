"""Thresholds of single kv heads: from a model's config.json to caches."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import load_prompt_cache, save_prompt_cache

from mlx_delta import BatchDeltaKVCache, DeltaConfig, DeltaKVCache, load, measure_sparsity
from mlx_delta.method import attention as reference
from tests.attention.test_hybrid import attend, expected, inputs
from tests.tiny import SMALL, llama_model, smooth_keys, tokens, write_llama

HEADS = dataclasses.replace(SMALL, threshold=((0.4, 2.0),))
HALVES = dataclasses.replace(HEADS, value_bits=16)
LAYERS = ((0.5, 1.5), 1.0, (2.0, 0.3))


@pytest.fixture(scope="module")
def text() -> tuple[np.ndarray, ...]:
    """Rounded to float16, so that storing it in 16 bits changes only the means of runs."""
    return tuple(x.astype(np.float16).astype(np.float32) for x in inputs(200))


@pytest.mark.parametrize("config", [HEADS, HALVES], ids=["dense", "values of 16 bits"])
@pytest.mark.parametrize("cuts", [[200], [150, *[1] * 50]], ids=["prefill", "decode"])
def test_heads_agree_with_the_reference_one_by_one(text, config, cuts):
    output = attend(DeltaKVCache(config), text, cuts)
    np.testing.assert_allclose(output, expected(text, config), atol=3e-6)
    firsts = dataclasses.replace(config, run_value="first")
    output = attend(DeltaKVCache(firsts), text, cuts)
    np.testing.assert_allclose(output, expected(text, firsts), atol=3e-6)


def test_sparsity_is_that_of_each_heads_own_threshold(text):
    cache = DeltaKVCache(HEADS)
    attend(cache, text, [200])
    wanted = [
        reference.sparsity(text[1][0, head], HEADS.for_head(head), 0, 200) for head in range(2)
    ]
    np.testing.assert_allclose(measure_sparsity([cache], 200).prefill_heads, [wanted])
    assert wanted[1] > wanted[0] + 0.1


@pytest.mark.parametrize("config", [HEADS, HALVES], ids=["dense", "values of 16 bits"])
def test_a_saved_cache_goes_on_with_its_own_thresholds(text, config, tmp_path):
    file = str(tmp_path / "cache.safetensors")
    first, rest = (tuple(x[:, :, part] for x in text) for part in (slice(120), slice(120, None)))
    cache = DeltaKVCache(config)
    attend(cache, first, [120])
    save_prompt_cache(file, [cache])
    (restored,) = load_prompt_cache(file)
    assert restored.config == config
    np.testing.assert_array_equal(attend(restored, rest, [80]), attend(cache, rest, [80]))


def test_a_state_with_thresholds_for_other_heads_is_refused(text):
    cache = DeltaKVCache(HEADS)
    attend(cache, text, [200])
    header, *buffers = cache.state
    changed = json.loads(header)
    changed["config"]["threshold"] = [[1.0, 1.0, 1.0]]
    with pytest.raises(ValueError, match="3 values for the heads of a layer but it has 2 kv heads"):
        DeltaKVCache.from_state([json.dumps(changed), *buffers])


@pytest.mark.parametrize("make", [DeltaKVCache, lambda config: BatchDeltaKVCache([0], config)])
def test_a_cache_refuses_keys_of_other_heads(make):
    keys = mx.array(smooth_keys((1, 3, 20, 16)))
    with pytest.raises(ValueError, match="2 values for the heads of a layer but it has 3 kv heads"):
        make(HEADS).update(keys, keys)


def test_thresholds_of_layers_are_not_taken_for_those_of_heads():
    keys = mx.array(smooth_keys((1, 2, 20, 16)))
    with pytest.raises(ValueError, match="thresholds per layer: call for_layer first"):
        DeltaKVCache(dataclasses.replace(SMALL, threshold=(0.4, 2.0))).update(keys, keys)


def test_rows_of_a_batch_hold_as_they_do_alone():
    config = dataclasses.replace(SMALL, threshold=LAYERS)
    model, ids = llama_model(config), tokens(120, rows=2)
    alone = [model(ids[row : row + 1]) for row in range(2)]
    caches = [model.make_cache() for _ in range(2)]
    for row in range(2):
        mx.eval(model(ids[row : row + 1, :100], cache=caches[row]))
    merged = [DeltaKVCache.merge(list(layer)) for layer in zip(*copy.deepcopy(caches), strict=True)]
    output = model(ids[:, 100:], cache=merged)
    for row in range(2):
        np.testing.assert_allclose(output[row], alone[row][0, 100:], atol=2e-4)


def write_model(path: Path, threshold: list) -> Path:
    """A checkpoint of three layers of two kv heads with these thresholds."""
    write_llama(path)
    config = json.loads((path / "config.json").read_text())
    config["delta"] = {**SMALL.to_dict(), "threshold": threshold}
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_a_models_config_names_its_heads(tmp_path):
    model, _ = load(write_model(tmp_path / "model", [[0.5, 1.5], 1.0, [2.0, 0.3]]))
    assert [cache.config.layer_threshold for cache in model.make_cache()] == list(LAYERS)


def test_load_names_the_layer_with_another_number_of_heads(tmp_path):
    path = write_model(tmp_path / "model", [1.0, 1.0, [1.0, 1.0, 1.0]])
    with pytest.raises(ValueError, match="3 values for the heads of layer 2 but it has 2 kv heads"):
        load(path)


def test_one_head_of_a_model_can_stay_exact():
    """Threshold 0 for the other heads: only what the one head holds differs from dense."""
    exact = DeltaConfig(block_size=8, window=8, threshold=0.0)
    some = dataclasses.replace(exact, threshold=(0.0, (0.0, 2.0), 0.0))
    ids = tokens(150)
    models = {c: llama_model(c) for c in (exact, some)}
    caches = {c: model.make_cache() for c, model in models.items()}
    for config, model in models.items():
        mx.eval(model(ids, cache=caches[config]))
    sparse = measure_sparsity(caches[some], 150).prefill_heads
    dense = measure_sparsity(caches[exact], 150).prefill_heads
    assert sparse[1, 1] > 0.5
    sparse[1, 1] = dense[1, 1]
    np.testing.assert_allclose(sparse, dense, atol=1e-3)
