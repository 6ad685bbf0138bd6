"""A catalogued model gets each release's sensitivities and level; what a user changed stays."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from mlx_delta.calibrate.write import write_setting
from mlx_delta.checkpoint import known_level, obtain
from mlx_delta.checkpoint.catalogue import CATALOGUE
from mlx_delta.config import DeltaConfig
from mlx_delta.loading import read_setting
from mlx_delta.sensitivities import Sensitivities

from .test_catalogue import ENTRY, cache, give

__all__ = ["cache"]  # a fixture

CURVE = [(0.0, 0.0, 0.0), (0.1, 0.6, 0.001), (0.4, 0.8, 0.002)]


@pytest.fixture
def known(cache, tmp_path, monkeypatch):
    """The toy comes with sensitivities; a function lets a release have others."""
    monkeypatch.setattr(known_level, "BUNDLED", tmp_path)

    def release(weight: float = 1.0, zeros: float = 0.7, window: int = 64) -> Sensitivities:
        found = Sensitivities([np.full((1, 4), weight, np.float32)], CURVE)
        found.save(tmp_path / "toy.safetensors")
        own = {"sensitivities": "toy.safetensors", "zeros": zeros, "window": window}
        entry = dataclasses.replace(ENTRY, **own)
        monkeypatch.setitem(CATALOGUE, "toy", entry)
        return found

    release()
    give(monkeypatch)
    return release


def setting_of(folder: Path) -> DeltaConfig:
    setting = read_setting(folder, json.loads((folder / "config.json").read_text()))
    assert isinstance(setting, DeltaConfig)
    return setting


def test_sensitivities_are_put_beside_it_with_their_level(known):
    setting = setting_of(obtain.obtain("toy"))
    assert setting.level == pytest.approx(0.2, rel=1e-3) and setting.sensitivities == known()
    assert setting.window == DeltaConfig.window


def test_a_window_of_its_own_comes_and_goes_with_releases(known):
    for window in (64, 128, 256, 64):
        known(window=window)
        assert setting_of(obtain.obtain("toy")).window == window


@pytest.mark.parametrize("change", [{"weight": 2.0}, {"zeros": 0.6}], ids=str)
def test_a_newer_release_brings_its_own_and_fetches_nothing(known, monkeypatch, change):
    old = obtain.obtain("toy")
    monkeypatch.setattr(obtain, "fetch", None)
    newer, wanted = known(**change), {"weight": 0.2, "zeros": 0.1}
    setting = setting_of(obtain.obtain("toy"))
    assert obtain.obtain("toy") == old and setting.sensitivities == newer
    assert setting.level == pytest.approx(wanted[next(iter(change))], rel=1e-3)
    assert json.loads((old / "config.json").read_text())["model_type"] == "llama"


def change_level(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["delta"]["level"] = 0.3
    (folder / "config.json").write_text(json.dumps(config))


def change_window(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["delta"]["window"] = 192
    (folder / "config.json").write_text(json.dumps(config))


def change_what_128_is_of(folder: Path) -> None:
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"window"', '"block_size"'))


def calibrate_anew(folder: Path) -> None:
    own = DeltaConfig(level=0.7, sensitivities=Sensitivities([np.ones((1, 4), np.float32)]))
    write_setting(folder / "config.json", own)


def ask_for_dense(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama", "delta": null}')


def break_it(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def lose_them(folder: Path) -> None:
    next(folder.glob("delta_sensitivities-*")).unlink()


@pytest.mark.parametrize(
    "change",
    [
        change_level,
        change_window,
        change_what_128_is_of,
        calibrate_anew,
        ask_for_dense,
        break_it,
        lose_them,
    ],
)
def test_what_a_user_changed_stays(known, change):
    known(window=128)
    folder = obtain.obtain("toy")
    change(folder)
    config = (folder / "config.json").read_text()
    known(weight=2.0, window=128)
    assert obtain.obtain("toy") == folder
    assert (folder / "config.json").read_text() == config


def test_a_cache_that_is_only_read_serves_as_it_is(known, monkeypatch):
    folder = obtain.obtain("toy")
    config = (folder / "config.json").read_text()
    known(weight=2.0)
    refused = mock.Mock(side_effect=PermissionError)
    monkeypatch.setattr(known_level, "write_whole", refused)
    assert obtain.obtain("toy") == folder and refused.called
    assert (folder / "config.json").read_text() == config
