"""Settings written into config.json: everything else stays, and nothing is ever half-written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest

from mlx_delta import DeltaConfig
from mlx_delta.calibrate.write import copy_model, merged, with_entry, write_setting
from mlx_delta.sensitivities import FILE_NAME, Sensitivities

WEIGHTS, OTHER_WEIGHTS = (Sensitivities([np.full((2, 4), x, np.float32)]) for x in (1, 2))
NEW = DeltaConfig(threshold=(0.5, (1.0, 2.0)))
VALUE = {"threshold": [0.5, [1.0, 2.0]]}

INDENTED = """{
  "model_type": "llama",
  "rope":   {"delta": 1, "odd": [1,2,  3]},
  "delta": {
    "threshold": 1.1
  },
  "name": "Zo\\u00eb \\"}\\" é",
  "rms_norm_eps": 1e-05
}
"""


@pytest.mark.parametrize(
    "text",
    [
        INDENTED,
        INDENTED.replace("\n", "\r\n"),
        INDENTED.replace("  ", "\t"),
        INDENTED.replace('"delta": {\n    "threshold": 1.1\n  }', '"delta": null'),
        INDENTED.replace('  "delta": {\n    "threshold": 1.1\n  },\n', ""),
        json.dumps(json.loads(INDENTED)),
        json.dumps(json.loads(INDENTED), separators=(",", ":")),
        '{"delta": 3}',
        '{"a": 1}',
        "{}",
        " { } ",
        '{"delta": {"threshold": 1}, "a": 1, "delta": {"threshold": 2}}',
    ],
    ids=[
        *("indented", "windows line ends", "tabs", "null", "without", "one line", "compact"),
        *("only it", "another", "empty", "spaces", "twice"),
    ],
)
def test_only_the_entry_changes(text):
    changed = with_entry(text, "delta", VALUE)
    assert json.loads(changed) == {**json.loads(text), "delta": VALUE}
    assert ("\r\n" in changed) == ("\r\n" in text)
    start = len(os.path.commonprefix([text, changed]))
    end = len(os.path.commonprefix([text[start:][::-1], changed[start:][::-1]]))
    gone = "".join(text[start : len(text) - end].split())
    old = json.dumps(json.loads(text).get("delta", ""), separators=(",", ":"))
    assert gone in old, "nothing but the old value is gone"
    assert with_entry(changed, "delta", VALUE) == changed, "written twice is written once"


def test_what_it_looks_like():
    assert with_entry('{\n  "a": 1\n}\n', "delta", VALUE) == (
        '{\n  "a": 1,\n  "delta": {\n    "threshold": [0.5, [1.0, 2.0]]\n  }\n}\n'
    )


@pytest.mark.parametrize(
    ("old", "new", "wanted"),
    [
        (None, DeltaConfig(threshold=2.0), {"threshold": 2.0, "threshold_mode": "relative"}),
        ({"threshold": 1.1}, DeltaConfig(threshold=2.0), {"threshold": 2.0}),
        (
            {"window": 64, "threshold": 1.0},
            DeltaConfig(threshold=2.0, threshold_mode="absolute"),
            {"window": 64, "threshold": 2.0, "threshold_mode": "absolute"},
        ),
        (
            DeltaConfig.paper().to_dict(),
            DeltaConfig.paper(0.7),
            {**DeltaConfig.paper().to_dict(), "threshold": 0.7},
        ),
    ],
)
def test_the_entry_says_no_more_than_it_did(old, new, wanted):
    assert merged(old, new) == wanted
    assert DeltaConfig.from_dict(merged(old, new)) == new


def test_an_interruption_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    file = tmp_path / "config.json"
    file.write_text(INDENTED)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_setting(file, NEW)
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]
    assert file.read_text() == INDENTED


def test_an_interrupted_copy_is_not_there(tmp_path, monkeypatch):
    source = tmp_path / "model"
    source.mkdir()
    (source / "config.json").write_text(INDENTED)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        copy_model(source, tmp_path / "copy", NEW)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_permissions_and_links_stay(tmp_path):
    real = tmp_path / "real.json"
    real.write_text(INDENTED)
    real.chmod(0o640)
    link = tmp_path / "config.json"
    link.symlink_to(real)
    write_setting(link, NEW)
    assert link.is_symlink() and json.loads(real.read_text())["delta"] == VALUE
    assert real.stat().st_mode & 0o777 == 0o640
    assert real.read_text().startswith('{\n  "model_type": "llama",\n  "rope":   {"delta": 1')


def test_on_a_full_disk_setting_and_sensitivities_stay_as_they_were(tmp_path, monkeypatch):
    file, sensitive = tmp_path / "config.json", DeltaConfig(sensitivities=WEIGHTS)
    file.write_text(INDENTED)
    write_setting(file, sensitive)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(before) == {"config.json", FILE_NAME}
    other = sensitive.changed(level=0.5, sensitivities=OTHER_WEIGHTS)

    def failing(error: Exception) -> Callable[..., None]:
        def fail(*_: object) -> None:
            raise error

        return fail

    for place, name, error in (
        (os, "fsync", OSError("no space left on device")),
        (mx, "save_safetensors", RuntimeError("[write] Unable to write 664 bytes to file.")),
    ):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="no space|can't write"):
            patch.setattr(place, name, failing(error))
            write_setting(file, other)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    write_setting(file, other)
    assert Sensitivities.read(tmp_path / FILE_NAME) == OTHER_WEIGHTS
