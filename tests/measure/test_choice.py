"""Which settings a model can have, and the delta to load it with."""

from __future__ import annotations

import json

import pytest

from mlx_delta import DeltaConfig, load
from mlx_delta.measure.choice import choose_settings, with_samples
from tests.tiny import write_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model whose own threshold is 1.5."""
    folder = write_llama(tmp_path_factory.mktemp("models") / "tiny-llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "delta": {"threshold": 1.5}}))
    return str(folder)


def test_delta_is_the_models_own_setting_with_what_was_asked_for(folder):
    delta, settings = choose_settings(folder, ["dense", "delta", "delta:sinks=0"], "value_bits=16")
    assert delta == DeltaConfig(threshold=1.5, value_bits=16)
    assert [setting.delta for setting in settings] == [
        None,
        delta,
        DeltaConfig(threshold=1.5, value_bits=16, sinks=0),
    ]
    assert choose_settings(folder, ["delta"])[0] == DeltaConfig(threshold=1.5)


def test_uncalibrated_is_what_a_model_without_calibration_is_loaded_with(folder, tmp_path):
    plain = write_llama(tmp_path / "plain")
    as_loaded = load(str(plain))[0].args.delta
    _, settings = choose_settings(folder, ["delta", "uncalibrated", "uncalibrated:sinks=0"])
    model, tokenizer = load(folder, DeltaConfig(threshold=1.5))
    delta, sampled, changed = with_samples(settings, model, tokenizer)
    assert delta.delta == DeltaConfig(threshold=1.5)
    assert sampled.kind == "delta" and sampled.delta == as_loaded
    assert changed.delta == as_loaded.changed(sinks=0)


def test_a_wrong_change_is_named(folder):
    with pytest.raises(ValueError, match=r"unknown option 'bits' \(did you mean key_bits"):
        choose_settings(folder, ["delta"], "bits=4")


def test_a_model_without_keys_to_hold_takes_settings_without_the_delta(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "deepseek_v3"}')
    delta, settings = choose_settings(str(tmp_path), ["dense", "kv8"])
    assert delta is None and [setting.kind for setting in settings] == ["dense", "kv8"]
    with pytest.raises(ValueError, match="setting 'delta' needs a delta model"):
        choose_settings(str(tmp_path), ["dense", "delta"])
