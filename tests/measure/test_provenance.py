"""What tells the models of results files apart."""

from __future__ import annotations

import json

from mlx_delta.measure.provenance import fingerprint
from mlx_delta.sensitivities import FILE_NAME
from tests.tiny import write_llama


def test_a_calibration_does_not_make_another_model(tmp_path):
    path = write_llama(tmp_path / "model")
    before = fingerprint(path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "delta": {"level": 0.1}}))
    for name in (FILE_NAME, "delta_sensitivities-124a498a.safetensors"):  # a catalogued model's
        (path / name).write_bytes(b"sensitivities")
    assert fingerprint(path) == before
    (path / "config.json").write_text(json.dumps({**config, "rope_theta": 5}))
    assert fingerprint(path) != before
