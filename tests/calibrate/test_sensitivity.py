"""KL divergences of single layers: against a direct computation, and what follows from them."""

from __future__ import annotations

import dataclasses

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import KVCache

from mlx_delta import DeltaConfig, DeltaKVCache
from mlx_delta.calibrate import sensitivity
from mlx_delta.calibrate.family import Family
from mlx_delta.calibrate.record import GRID as RECORDED
from mlx_delta.calibrate.record import Recording, record
from mlx_delta.calibrate.sensitivity import (
    GRID,
    USUAL,
    Sensitivity,
    measure_sensitivity,
    passes,
)
from tests.tiny import SMALL, bitnet_model, llama_model, tokens

# The bundled BitNet model, one layer held at a time: sparsity and KL divergence in nats.
HELD_AT = np.array([0.7, 0.9, 1.1, 1.4, 1.8, 2.4])
SPARSITY = np.array(
    [
        [0.388, 0.48, 0.56, 0.659, 0.751, 0.831],
        [0.448, 0.547, 0.628, 0.72, 0.797, 0.853],
        [0.521, 0.619, 0.693, 0.769, 0.824, 0.858],
        [0.428, 0.521, 0.598, 0.687, 0.767, 0.834],
    ]
)
DIVERGENCE = np.array(
    [
        [0.00028, 0.00037, 0.00051, 0.00094, 0.00161, 0.00234],
        [0.00019, 0.00024, 0.00032, 0.00045, 0.00062, 0.00074],
        [0.00012, 0.00014, 0.00016, 0.0002, 0.00023, 0.00026],
        [0.001, 0.0028, 0.00594, 0.01677, 0.0409, 0.09069],
    ]
)


def recording_of(model):
    """Only what measuring reads of it: the layers, and the units of thresholds."""
    thresholds = np.tile(RECORDED, (len(model.layers), 1))
    blank = np.zeros((len(model.layers), 2, len(RECORDED)))
    return Recording(tuple(range(len(model.layers))), thresholds, blank, blank)


def direct(model, window, config, layer, threshold):
    """Mean KL over the second half, fed one token at a time, in float64."""
    logs = []
    for held in (False, True):
        caches = [KVCache() for _ in model.layers]
        if held:
            caches[layer] = DeltaKVCache(dataclasses.replace(config, threshold=threshold))
        half = len(window) // 2
        model(mx.array([window[:half]]), cache=caches)
        each = [model(mx.array([[t]]), cache=caches)[0, 0] for t in window[half:]]
        logits = np.array(mx.stack(each)).astype(np.float64)
        shifted = logits - logits.max(axis=1, keepdims=True)
        logs.append(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))
    dense, other = logs
    return (np.exp(dense) * (dense - other)).sum(axis=1).mean()


@pytest.mark.parametrize(
    ("make", "storage"),
    [(llama_model, {}), (bitnet_model, {}), (llama_model, {"key_format": "codes", "key_bits": 4})],
    ids=["llama", "bitnet", "coded"],
)
def test_a_layer_held_alone_has_the_divergence_of_a_direct_computation(make, storage, monkeypatch):
    monkeypatch.setattr(sensitivity, "GRID", (0.5, 1.5))
    config = dataclasses.replace(SMALL, **storage)
    model, windows = make(config), tokens(91, rows=2).tolist()
    recording = recording_of(model)
    done = []
    found = measure_sensitivity(model, windows, config, recording, progress=lambda: done.append(1))
    assert found.divergence.shape == (3, 1, 2) and found.windows == 2
    wanted = np.mean([direct(model, w, config, 1, 1.5) for w in windows])
    assert wanted > 1e-4
    assert found.divergence[1, 0, 1] == pytest.approx(wanted, rel=2e-3)
    nothing = np.mean([direct(model, w, config, 1, 0.0) for w in windows])
    assert found.stored[1] == pytest.approx(nothing if storage else 0, rel=2e-3, abs=1e-9)
    assert len(done) == passes(3, 1, 2, config) == 2 * (1 + 3 * (2 + bool(storage)))


def test_heads_are_held_alone_too(monkeypatch):
    monkeypatch.setattr(sensitivity, "GRID", (1.5,))
    model, window = llama_model(), tokens(100)[0].tolist()
    recording = recording_of(model)
    found = measure_sensitivity(model, [window], SMALL, recording, heads=2)
    assert found.divergence.shape == (3, 2, 1)
    for head, thresholds in enumerate([((1.5, 0.0),), ((0.0, 1.5),)]):
        wanted = direct(model, window, SMALL, 1, thresholds)
        assert found.divergence[1, head, 0] == pytest.approx(wanted, rel=2e-3)


def test_a_large_vocabulary_is_compared_at_every_so_many_tokens(monkeypatch):
    """The mean over half of the tokens, where the log-probabilities of all take too much."""
    monkeypatch.setattr(sensitivity, "GRID", (1.5,))
    model, window = llama_model(), tokens(200)[0].tolist()
    recording = recording_of(model)
    whole = measure_sensitivity(model, [window], SMALL, recording).divergence
    monkeypatch.setattr(sensitivity, "KEPT_BYTES", 50 * 4096 * 4)
    half = measure_sensitivity(model, [window], SMALL, recording).divergence
    assert not np.array_equal(half, whole)
    np.testing.assert_allclose(half, whole, rtol=0.5)


def test_logits_that_are_not_finite_are_refused():
    model = llama_model()
    model.model.norm.weight = model.model.norm.weight * mx.inf
    with pytest.raises(ValueError, match=r"\[calibrate\] the model's logits are not finite with"):
        measure_sensitivity(model, tokens(100).tolist(), SMALL, recording_of(model))


def test_costs_between_grid_points_are_a_power_of_the_threshold():
    grid = np.array([[0.5, 1.0, 4.0]])
    found = Sensitivity(grid, np.array([[[0.01, 0.08, 5.12]]]), np.zeros(1), 1)  # 0.08 t^3
    costs = found.cost(np.array([[0.0, 0.25, 0.5, 2.0, 4.0]]))[0, 0]
    np.testing.assert_allclose(costs, [0, 0.0025, 0.01, 0.64, 5.12])


def test_costs_never_fall_and_leave_out_what_storage_alone_costs():
    grid = np.array([[0.5, 1.0, 2.0, 4.0]])
    found = Sensitivity(grid, np.array([[[0.2, 0.4, 0.3, 0.5]]]), np.array([0.1]), 1)
    costs = found.cost(np.linspace(0, 8, 50)[None])[0, 0]
    assert costs[0] == 0 and (np.diff(costs) >= 0).all()
    assert costs[-1] == pytest.approx(0.4)
    np.testing.assert_allclose(found.cost(grid)[0, 0], [0.1, 0.3, 0.3, 0.4])


def table_family():
    """The curves of a measured model, as a family of settings."""
    zero = np.zeros((4, 1))
    blank = np.zeros((4, 1, 8))
    divergence = np.concatenate([DIVERGENCE, DIVERGENCE[:, -1:] * 1.01], axis=1)[:, None]
    # In units of which the recording's last point, as ever, is its grid's.
    thresholds = np.tile([0.0, *HELD_AT, 8.0], (4, 1))
    sparsity = np.concatenate([zero, SPARSITY, SPARSITY[:, -1:] + 0.03], axis=1)[:, None]
    recording = Recording((0, 1, 2, 3), thresholds, sparsity, blank)
    measured = Sensitivity(thresholds[:, 1:], divergence, np.zeros(4), 1)
    return Family(DeltaConfig(threshold=1.0), recording, 4, "layer", measured)


@pytest.mark.parametrize("wanted", [0.5, 0.65, 0.7])
def test_thresholds_by_measured_divergences_are_the_best_of_all(wanted):
    """Against a search over a lattice of thresholds with the same curves."""
    family = table_family()
    config = family.setting(wanted)
    assert family.sparsity_of(config) == pytest.approx(wanted, abs=1e-4)
    fine = np.linspace(0.3, 2.4, 36)
    grid = np.array([0.0, *HELD_AT])
    measured = Sensitivity(np.tile(HELD_AT, (4, 1)), DIVERGENCE[:, None], np.zeros(4), 1)
    at_grid = measured.cost(np.tile(grid, (4, 1)))[:, 0]
    sparsity = [np.interp(fine, grid, np.r_[0, row]) for row in SPARSITY]
    cost = [np.interp(fine, grid, row) for row in at_grid]
    total, reached = np.zeros(1), np.zeros(1)
    for s, c in zip(sparsity, cost, strict=True):
        total = (total[:, None] + c).ravel()
        reached = (reached[:, None] + s / 4).ravel()
    best = total[reached >= wanted].min()
    assert family.divergence_of(config) <= best * 1.02
    if wanted == 0.65:
        assert config.threshold[3] < 0.8 and min(config.threshold[:3]) >= 1.1
        uniform = family.uniform_setting(wanted)
        assert family.sparsity_of(uniform) == pytest.approx(wanted, abs=1e-4)
        assert family.divergence_of(config) < family.divergence_of(uniform) / 3


def test_thresholds_beyond_the_usual_are_for_sparsity_that_needs_them():
    family = table_family()
    assert max(family.setting(0.8).threshold) <= USUAL, "though holding all costs hardly more"
    far = family.setting(0.86)
    assert max(far.threshold) > USUAL
    assert family.sparsity_of(far) == pytest.approx(0.86, abs=1e-4)


def test_recorded_grids_hold_the_measured_points():
    assert set(GRID) <= set(RECORDED) and GRID[-1] == RECORDED[-1]
    config = dataclasses.replace(SMALL, threshold_mode="absolute")
    recording = record(llama_model(), tokens(100).tolist(), config, np.random.default_rng(0))
    np.testing.assert_allclose(recording.thresholds, recording.units[:, None] * np.array(RECORDED))
