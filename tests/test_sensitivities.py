"""Sensitivities: their file, their curve, and the settings that carry them."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_delta import DeltaConfig, sensitivities
from mlx_delta.sensitivities import Sensitivities

CURVE = [(0, 0, 0), (0.1, 0.4, 0.001), (0.4, 0.6, 0.004)]


def _some(layers: int = 3, heads: int = 2, channels: int = 8, **others: object) -> Sensitivities:
    rng = np.random.default_rng(0)
    weights, salience = (
        [rng.uniform(least, 9, (heads, channels)) for _ in range(layers)] for least in (0, -9)
    )
    return Sensitivities(weights, **{"salience": salience, **others})


def test_a_file_gives_back_what_was_saved(tmp_path):
    some = _some(3)
    saved = Sensitivities([*some.layers[:2], None], CURVE, salience=[None, some.salience[1], None])
    saved.save(tmp_path / "s.safetensors")
    read = Sensitivities.read(tmp_path / "s.safetensors")
    assert read == saved
    assert read.curve == saved.curve
    assert read.file == "s.safetensors"
    assert read.layers[2] is None
    assert read.salience[0] is None
    np.testing.assert_array_equal(read.salience[1], some.salience[1])


def test_a_file_without_salience_is_read(tmp_path):
    """As files were at first."""
    some = _some(2)
    arrays = {f"layers.{i}": mx.array(x) for i, x in enumerate(some.layers)}
    metadata = {"format": "mlx_delta sensitivities 1", "layers": "2", "curve": "[]"}
    mx.save_safetensors(str(tmp_path / "old.safetensors"), arrays, metadata)
    read = Sensitivities.read(tmp_path / "old.safetensors")
    assert read == Sensitivities(some.layers)
    assert read != some


def test_another_file_is_refused(tmp_path):
    (tmp_path / "s.safetensors").write_bytes(b"\0" * 64)
    with pytest.raises(ValueError, match="can't be read as sensitivities"):
        Sensitivities.read(tmp_path / "s.safetensors")
    with pytest.raises(FileNotFoundError, match="config.json names it"):
        Sensitivities.read(tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    ("wish", "level"),
    [
        ({"zeros": 0.4}, 0.1),
        ({"zeros": 0.5}, 0.2),  # halfway between the logarithms of 0.1 and 0.4
        ({"zeros": 0.2}, 0.05),
        ({"zeros": 0.0}, 0.0),
        ({"kl": 0.0025}, 0.2),
        ({"kl": 0.004}, 0.4),
    ],
    ids=str,
)
def test_a_level_for_a_wish(wish, level):
    assert _some(curve=CURVE).level_for(**wish) == pytest.approx(level)


def test_a_wish_beyond_the_curve_is_refused():
    with pytest.raises(ValueError, match=r"between 0 and 0\.6, .* but got 0\.7"):
        _some(curve=CURVE).level_for(zeros=0.7)
    with pytest.raises(ValueError, match="have no curve"):
        _some().level_for(zeros=0.5)


@pytest.mark.parametrize(
    "layers", [[[[1.0, -1.0]]], [[[np.nan]]], [[1.0, 2.0]]], ids=["negative", "nan", "one axis"]
)
def test_bad_weights_are_refused(layers):
    with pytest.raises(ValueError, match="weights of layer 0 must be finite numbers >= 0"):
        Sensitivities([np.array(x) for x in layers])


@pytest.mark.parametrize(
    "salience", [[np.full((2, 8), np.nan)], [np.ones((2, 4))], []], ids=["nan", "shape", "layers"]
)
def test_bad_salience_is_refused(salience):
    weights = _some(1).layers
    with pytest.raises(ValueError, match="salience (is of|of layer)"):
        Sensitivities(weights * 2 if not salience else weights, salience=salience or [None])


def test_a_setting_names_their_file_or_holds_them():
    named = DeltaConfig(level=0.1, sensitivities=_some(file="s.safetensors"))
    assert named.to_dict()["sensitivities"] == "s.safetensors"
    whole = json.loads(json.dumps(named.to_dict(whole=True)))
    assert DeltaConfig.from_dict(whole) == named
    held = DeltaConfig(level=0.1, sensitivities=_some())
    assert DeltaConfig.from_dict(json.loads(json.dumps(held.to_dict()))) == held


def test_a_layer_and_a_head_have_their_own():
    config = DeltaConfig(sensitivities=_some())
    layer = config.for_layer(1, 3)
    wanted = _some().layers[1], _some().salience[1]
    np.testing.assert_array_equal(layer.sensitivities_of_layer(2, 8), wanted)
    second = [x[1:] for x in wanted]
    np.testing.assert_array_equal(layer.for_head(1).sensitivities_of_layer(1, 8), second)
    with pytest.raises(ValueError, match="of 3 layers but the model has 4"):
        config.for_layer(0, 4)
    with pytest.raises(ValueError, match="of 2 kv heads of 8 channels but the layer has 2 of 16"):
        layer.sensitivities_of_layer(2, 16)


def test_a_name_alone_can_not_be_held_by():
    with pytest.raises(ValueError, match="'s.safetensors' are not loaded"):
        DeltaConfig(sensitivities="s.safetensors").for_layer(0, 3)


@pytest.mark.parametrize(
    ("given", "fields", "mode"),
    [
        ({}, {}, "optimal"),
        ({"threshold": 0.5}, {}, "relative"),
        ({"keyframes": False, "run_value": "first"}, {}, "relative"),
        ({}, {"threshold": 0.5}, "relative"),
        ({"level": 0.2}, {"run_value": "first"}, "relative"),
        ({"threshold": 0.5}, {"level": 0.2}, "optimal"),
        ({"threshold": 0.5}, {"threshold_mode": "greedy"}, "greedy"),
        ({"level": 0.2}, {"window": 128}, "optimal"),
        ({"threshold": 0.5, "threshold_mode": "absolute"}, {"window": 128}, "absolute"),
    ],
    ids=str,
)
def test_the_mode_follows_from_what_is_given(given, fields, mode):
    assert DeltaConfig(**given).changed(**fields).threshold_mode == mode


def test_settings_written_before_there_were_levels_still_load():
    old = {"threshold": [0.9, [1.0, 1.1]], "block_size": 64, "window": 64, "sinks": 4}
    assert DeltaConfig.from_dict(old).threshold_mode == "relative"
    assert DeltaConfig.from_dict(old).threshold == (0.9, (1.0, 1.1))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"level": -1}, "level must be >= 0 but got -1"),
        ({"level": "high"}, "level must be a number but got 'high'"),
        ({"level": 1, "threshold": 1}, "level needs threshold_mode 'optimal' or 'greedy'"),
        ({"threshold": 1, "threshold_mode": "greedy"}, "'greedy' takes a level instead"),
        ({"threshold_mode": "optimal", "keyframes": False, "run_value": "first"}, "keyframes=True"),
        ({"block_size": 128, "window": 0}, "block_size of at most 64 but got 128"),
        ({"sensitivities": 3}, "sensitivities must be Sensitivities or the name of a file"),
        ({"sensitivities": {"layers": [[1]]}}, "sensitivities can't be read"),
    ],
    ids=str,
)
def test_bad_values_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        DeltaConfig(**values)


def test_load_reads_the_file_beside_the_model(tmp_path: Path):
    from mlx_delta import load
    from tests.tiny import LLAMA, write_llama

    path = write_llama(tmp_path / "model")
    saved = _some(3, 2, 16)
    saved.save(path / "weights.safetensors")
    delta = {"level": 0.2, "sensitivities": "weights.safetensors"}
    (path / "config.json").write_text(json.dumps({**LLAMA, "delta": delta}))
    model, _ = load(path)
    assert model.args.delta == DeltaConfig(level=0.2, sensitivities=saved)
    assert model.make_cache()[2].config.sensitivities == saved.for_layer(2, 3)
    (path / "weights.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="weights.safetensors is missing"):
        load(path)
    delta["sensitivities"] = "../weights.safetensors"
    (path / "config.json").write_text(json.dumps({**LLAMA, "delta": delta}))
    with pytest.raises(ValueError, match="must name a file beside config.json"):
        load(path)


def test_a_model_that_was_not_calibrated_weighs_by_its_queries(tmp_path: Path):
    from mlx_delta import load
    from tests.tiny import LLAMA, write_llama

    path = write_llama(tmp_path / "model")
    (path / "config.json").write_text(json.dumps({**LLAMA, "delta": {"sinks": 2}}))
    model, _ = load(path)
    found = model.args.delta.loaded_sensitivities
    assert [x.shape for x in found.layers] == [(2, 16)] * 3
    # RoPE turns channels d and d + 8 into each other: they weigh the same.
    np.testing.assert_array_equal(found.layers[0][:, :8], found.layers[0][:, 8:])
    again, _ = load(path)
    assert again.args.delta == model.args.delta


def test_a_file_beside_the_model_comes_before_a_bundled_one(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(sensitivities, "BUNDLED", tmp_path / "bundled")
    (tmp_path / "bundled").mkdir()
    _some(2).save(tmp_path / "bundled" / "some.safetensors")
    assert Sensitivities.find(tmp_path, "some.safetensors") == _some(2)
    _some(3).save(tmp_path / "some.safetensors")
    assert Sensitivities.find(tmp_path, "some.safetensors") == _some(3)


@pytest.mark.parametrize("name", ["demo", "demo-bitnet"])
def test_bundled_demos_are_calibrated_for_three_quarters(name):
    from mlx_delta.loading import find_model, read_config, read_setting

    path = find_model(name)
    setting = read_setting(path, read_config(path))
    own = setting.loaded_sensitivities
    assert setting.level == pytest.approx(own.level_for(zeros=0.75), rel=1e-3)
    assert own.level_for(kl=0.0015) > setting.level
    sizes = read_config(path)
    shape = sizes["num_key_value_heads"], sizes["head_dim"]
    assert [x.shape for x in own.layers] == [shape] * sizes["num_hidden_layers"]


def test_conversion_takes_the_file_along(tmp_path: Path):
    from mlx_delta.convert.__main__ import make_job, make_parser
    from mlx_delta.convert.converting import prepare, read_delta
    from mlx_delta.convert.errors import ConvertError
    from tests.tiny import LLAMA, write_llama

    path = write_llama(tmp_path / "model")
    _some(3, 2, 16).save(path / "own.safetensors")
    delta = {"level": 0.2, "sensitivities": "own.safetensors"}
    (path / "config.json").write_text(json.dumps({**LLAMA, "delta": delta}))
    job = make_job(make_parser().parse_args([str(path), "-o", str(tmp_path / "out")]))
    source, *_ = prepare(job)
    assert read_delta(job, source)["sensitivities"] == "own.safetensors"
    assert source.files["own.safetensors"] == (path / "own.safetensors").read_bytes()
    (path / "own.safetensors").unlink()
    source, *_ = prepare(job)
    with pytest.raises(ConvertError, match="'own.safetensors', is missing"):
        read_delta(job, source)
