"""What is recorded against the specification, and that recording leaves no trace."""

from __future__ import annotations

import dataclasses

import mlx.core as mx
import numpy as np
import pytest

from mlx_delta import DeltaConfig, measure_sparsity
from mlx_delta.calibrate.record import GRID, highest_sparsity, measure_layer, record, spread
from mlx_delta.method import attention as reference
from mlx_delta.models.llama import Attention
from tests.attention.test_hybrid import DIM, SCALE, inputs
from tests.tiny import SMALL, bitnet_model, llama_model, tokens

PAPER = DeltaConfig.paper().resolve(120)
SETTINGS = {
    "relative": SMALL,
    "absolute": dataclasses.replace(SMALL, threshold_mode="absolute"),
    "chain": PAPER,
}
each_setting = pytest.mark.parametrize("config", SETTINGS.values(), ids=SETTINGS.keys())
THRESHOLDS = np.array([0.0, *np.linspace(0.2, 3, 9)])  # more than are held at once


@each_setting
@pytest.mark.parametrize("length", [120, 117])
def test_sparsity_at_every_threshold_is_the_references(config, length):
    queries, keys, _ = (mx.array(x) for x in inputs(length))
    positions = np.array([60, length - 1])
    got, _ = measure_layer(queries, keys, SCALE, config, THRESHOLDS, positions)
    wanted = [
        [
            reference.sparsity(head, dataclasses.replace(config, threshold=t), 0, length)
            for t in THRESHOLDS.tolist()
        ]
        for head in np.array(keys[0])
    ]
    np.testing.assert_allclose(got, wanted, atol=1e-9)


@each_setting
def test_cost_is_half_the_variance_of_the_error_under_the_attention(config):
    length, positions = 120, np.array([50, 77, 119])
    queries, keys, _ = inputs(length)
    _, got = measure_layer(mx.array(queries), mx.array(keys), SCALE, config, THRESHOLDS, positions)
    near = reference.exact_pairs(length, length, config)
    for head in range(2):
        for g, threshold in enumerate(THRESHOLDS.tolist()):
            tried = dataclasses.replace(config, threshold=threshold)
            held = reference.hold(keys[0, head], tried)
            variances = []
            for q in (2 * head, 2 * head + 1):
                for position in positions:
                    query = queries[0, q, position].astype(np.float64) * SCALE
                    scores = (keys[0, head, : position + 1] @ query)[: position + 1]
                    p = np.exp(scores - scores.max())
                    p /= p.sum()
                    e = np.where(
                        near[position], 0, (held - keys[0, head]).astype(np.float64) @ query
                    )[: position + 1]
                    variances.append(p @ e**2 - (p @ e) ** 2)
            assert got[head, g] == pytest.approx(0.5 * np.mean(variances), rel=2e-3, abs=1e-6)


@pytest.mark.parametrize("make", [llama_model, bitnet_model])
def test_a_models_first_layer_is_recorded_as_its_cache_counts_it(make):
    """The keys of the first layer do not depend on what is held."""
    config = dataclasses.replace(SMALL, threshold=1.2)
    model, windows = make(config), tokens(150, rows=2).tolist()
    recording = record(model, windows, config, np.random.default_rng(0))
    counted = []
    for window in windows:
        caches = model.make_cache()
        mx.eval(model(mx.array([window]), cache=caches))
        counted.append(measure_sparsity(caches, 150).prefill_heads[0])
    got = recording.sparsity[0, :, GRID.index(1.2)]
    np.testing.assert_allclose(got, np.mean(counted, axis=0), atol=1e-9)


def test_every_layer_is_recorded_and_the_model_left_as_it_was():
    model = llama_model()
    weights = model.parameters()
    ids = tokens(100)
    before = model(ids)
    done = []
    recording = record(model, ids.tolist(), SMALL, np.random.default_rng(0), lambda: done.append(1))
    assert recording.layers == (0, 1, 2) and len(done) == 1
    assert recording.sparsity.shape == recording.cost.shape == (3, 2, len(GRID))
    assert (np.diff(recording.sparsity, axis=2) > -1e-3).all()
    assert all(type(layer.self_attn) is Attention for layer in model.layers)
    assert model.parameters().keys() == weights.keys()
    assert mx.array_equal(model(ids), before)


def test_an_interrupted_recording_leaves_the_model_as_it_was():
    model = llama_model()

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record(model, tokens(100, rows=2).tolist(), SMALL, np.random.default_rng(0), interrupt)
    assert all(type(layer.self_attn) is Attention for layer in model.layers)


def test_sliding_layers_are_left_out():
    model = llama_model(
        layer_types=["full_attention", "sliding_attention", "full_attention"], sliding_window=32
    )
    recording = record(model, tokens(100).tolist(), SMALL, np.random.default_rng(0))
    assert recording.layers == (0, 2) and recording.sparsity.shape[0] == 2


def test_absolute_thresholds_are_tried_in_units_of_the_keys():
    config = dataclasses.replace(SMALL, threshold_mode="absolute")
    keys = mx.array(inputs(120)[1])
    blocks = np.array(keys[0]).reshape(2, -1, 8, DIM)
    wanted = np.sqrt(np.mean((blocks - blocks.mean(axis=2, keepdims=True)) ** 2))
    assert spread(keys, config) == pytest.approx(wanted, rel=1e-5)
    recording = record(llama_model(), tokens(100).tolist(), config, np.random.default_rng(0))
    assert (recording.sparsity[:, :, -1] > 0.95 * highest_sparsity(config, 100)).all()
    assert (recording.thresholds[:, 0] == 0).all()


@each_setting
@pytest.mark.parametrize("length", [1, 24, 25, 120, 123])
def test_the_highest_sparsity_is_that_of_keys_that_never_change(config, length):
    keys = np.ones((length, 4), np.float32)
    wanted = reference.sparsity(keys, config, 0, length)
    assert highest_sparsity(config, length) == pytest.approx(wanted)
