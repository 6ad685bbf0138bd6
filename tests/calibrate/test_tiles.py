"""Shares of tiles by layer: chosen by what was measured, under the wanted loss, and written."""

from __future__ import annotations

import json

import pytest

from mlx_delta import DeltaConfig, load
from mlx_delta.calibrate.command import main
from mlx_delta.calibrate.tiles import SHARES, _Layer, calibrate_tiles
from mlx_delta.measure.text import BUNDLED_TEXT, read_text
from tests.tiny import LLAMA, write_llama

LEVEL = DeltaConfig(level=0.1)
pytestmark = pytest.mark.usefixtures("tiles_from_the_start")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A checkpoint with a setting of its own."""
    path = write_llama(tmp_path_factory.mktemp("model") / "tiny")
    (path / "config.json").write_text(json.dumps({**LLAMA, "delta": LEVEL.to_dict()}, indent=1))
    return path


@pytest.mark.parametrize("needed", [*SHARES, 1.0])
def test_the_least_share_that_is_enough_is_found(needed):
    asked = []

    def measure(share: float) -> float:
        asked.append(share)
        return 0.0 if share >= needed else 1.0

    layer = _Layer(measure)
    assert layer.least_share(0.5) == needed
    assert len(asked) <= 4 and layer.known == {share: float(share < needed) for share in asked}
    before = len(asked)
    assert layer.least_share(0.4) == needed and len(asked) == before, "nothing is measured twice"


def test_shares_are_those_that_were_measured_to_be_enough(path):
    model, tokenizer = load(path)
    text = read_text(BUNDLED_TEXT)[:6000]
    found = {kl: calibrate_tiles(model, tokenizer, text, kl=kl, length=640) for kl in (0.02, 1e-4)}
    for kl, one in found.items():
        assert one.config.prefill == "tiles" and one.config.level == LEVEL.level
        assert one.chosen.divergence <= kl and 0 < one.chosen.density <= 1
        for layer, share in enumerate(one.config.tiles):
            known = one.curves[layer]
            assert share == 1 or known[share] <= one.part
            assert all(known[less] > one.part for less in known if less < share)
    loose, strict = (one.config.tiles for one in found.values())
    assert all(a <= b for a, b in zip(loose, strict, strict=True)) and loose != strict


def test_the_command_writes_the_shares_and_keeps_the_rest(path, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text(read_text(BUNDLED_TEXT)[:6000])
    flags = ["--model", str(path), "--text", str(text), "--length", "640"]
    assert main([*flags, "--tiles", "0.02", "--output", str(tmp_path / "new")]) == 0
    printed = capsys.readouterr().out
    written = json.loads((tmp_path / "new" / "config.json").read_text())["delta"]
    assert written["level"] == LEVEL.level and written["prefill"] == "tiles"
    assert len(written["tiles"]) == 3 and "All together: 0." in printed
    model, _ = load(tmp_path / "new")
    shares = [cache.config.tile_share for cache in model.make_cache()]
    assert shares == written["tiles"]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--tiles", "0"], "KL for tiles, in nats per token, must be > 0 but got 0.0"),
        (["--tiles", "--weights", "queries"], "--weights says nothing about tiles"),
        (["--tiles", "--length", "300"], "no tiles can be chosen in 300 tokens"),
        (["--tiles", "--length", "2000"], "more than the model's context of 2048"),
    ],
)
def test_misuse_is_named(path, capsys, flags, message):
    assert main(["--model", str(path), "--dry-run", *flags]) == 1
    assert message in capsys.readouterr().err
