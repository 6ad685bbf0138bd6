"""Bits of codes: what decides them is measured anew, and a wish is met with little lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_delta import DeltaConfig, load
from mlx_delta.attention.probe import watch_keys
from mlx_delta.calibrate.codes import Search, Sizes
from mlx_delta.calibrate.command import main
from mlx_delta.calibrate.divergence import Comparison
from mlx_delta.calibrate.gradients import far_gradients
from mlx_delta.calibrate.weights import measure_weights, watch
from mlx_delta.sensitivities import FILE_NAME, Sensitivities
from tests.tiny import LLAMA, llama_model, tokens, write_llama

SMALL = DeltaConfig(block_size=8, window=16, sinks=3, level=0.1)
OLD = Sensitivities(
    [np.random.default_rng(i).lognormal(0, 1, (2, 32)) for i in range(3)],
    [(0, 0, 0), (0.1, 0.5, 0.01)],
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A model of an older version, whose sensitivities say nothing of codes."""
    path = write_llama(tmp_path / "model", head_dim=32)
    OLD.save(path / FILE_NAME)
    delta = SMALL.changed(level=0.05, sensitivities=FILE_NAME).to_dict()
    config = {**LLAMA, "head_dim": 32, "delta": delta}
    (path / "config.json").write_text(json.dumps(config, indent=1))
    return path


def run(*flags: object) -> int:
    return main(["--length", "200", *map(str, flags)])


def setting(path: Path) -> dict[str, Any]:
    return json.loads((path / "config.json").read_text())["delta"]


def test_codes_are_calibrated_anew_and_the_rest_stays(path, capsys):
    before = setting(path)
    assert run("--model", path, "--codes") == 0, capsys.readouterr().err
    assert setting(path) == before
    new = Sensitivities.read(path / FILE_NAME)
    for mine, theirs in zip(OLD.layers, new.layers, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert new.curve == OLD.curve
    assert all(x.shape == (2, 32) and (x > 0).all() for x in new.spread)
    assert all(x.shape == (2,) and (x > 0).all() for x in new.value_costs)
    keys = watch(load(path)[0], tokens(64)[0].tolist(), SMALL).keys
    for own, found in zip(keys, new.spread, strict=True):  # of another text
        deviation = np.array(own).reshape(2, 8, 8, 32).std(axis=2)
        np.testing.assert_allclose(np.sqrt(np.square(deviation).mean(axis=1)), found, rtol=1)


def test_values_cost_what_is_asked_of_each_times_its_own_size():
    model, window = llama_model(delta=SMALL), tokens(64)[0].tolist()
    watched = watch(model, window, SMALL)
    costs = measure_weights(model, window, SMALL, watched, "gradients").values
    _, squares = far_gradients(model, window, SMALL, watched.layers, 0)
    values: dict[int, mx.array] = {}
    see = lambda layer, seen: values.update({layer: seen.values[0]})  # noqa: E731
    watch_keys(model, window, SMALL, watched.layers, see)
    far = range(SMALL.sinks, (63 // 8 - SMALL.window_blocks) * 8)  # that some query sees as far
    for layer, found in enumerate(costs):
        for head in range(2):
            pairs = [(squares[layer][head, t], values[layer][head, t]) for t in far]
            each = [float(g.mean() * mx.square(v).mean()) for g, v in pairs]
            assert found[head] == pytest.approx(np.mean(each), rel=1e-4)


def test_bits_for_wanted_bytes_are_written(path, capsys):
    before = setting(path)
    assert run("--model", path, "--codes", "--bytes", "0.4") == 0, capsys.readouterr().err
    new = setting(path)
    chosen = {name: new.pop(name) for name in list(new) if name not in before}
    assert new == before
    assert (chosen.pop("key_format"), chosen.pop("value_format")) == ("codes", "rotated")
    # Grids of 16 + 16 bits for 8 tokens of a channel, a byte for 32 numbers.
    taken = (chosen.pop("key_bits") + 4 + chosen.pop("value_bits") + 0.25) / 32
    assert 0.399 < taken <= 0.4 and not chosen
    assert "Chosen:" in capsys.readouterr().out
    model, _ = load(path)
    assert model.args.delta.for_layer(0, 3).key_widths is not None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--codes", "--uncorrected"], "--uncorrected says nothing about codes"),
        (["--codes", "--bytes", "0.1"], "bytes must be between 0.2578 and 0.6328 of those"),
        (["--codes", "--bytes", "0.3", "--kl", "0.1"], "--bytes goes with --codes, and without"),
        (["--bytes", "0.3", "--kl", "0.1"], "--bytes goes with --codes"),
        (["--codes", "--kl", "0"], "KL, in nats per token, must be > 0 but got 0"),
        (["--codes", "--tiles"], "not allowed with argument --codes"),
        (["--sparsity", "0.5", "--kl", "0.1"], "but got --sparsity and --kl"),
        ([], "give one of --sparsity, --kl, --loss, --tiles or --codes but got none"),
    ],
    ids=str,
)
def test_what_can_not_be_is_said(path, capsys, flags, message):
    before = setting(path)
    try:
        assert run("--model", path, *flags) == 1
    except SystemExit as error:
        assert error.code == 2
    assert message in capsys.readouterr().err
    assert setting(path) == before


def test_codes_need_what_was_calibrated(path, capsys):
    config = json.loads((path / "config.json").read_text())
    del config["delta"]
    (path / "config.json").write_text(json.dumps(config))
    assert run("--model", path, "--codes") == 1
    assert "--codes needs sensitivities that were measured" in capsys.readouterr().err


class Text:
    """Of whose codes every bit more takes a part of what errors cost."""

    def __init__(self, keys: float, values: float):
        self.keys, self.values = keys, values

    def compare(self, config: DeltaConfig) -> Comparison:
        assert config.key_bits is not None and config.value_bits is not None
        loss = self.keys * 4.0**-config.key_bits + self.values * 4.0**-config.value_bits
        return Comparison(loss, 1.0, 0.0)


SIZES = Sizes(keys=600, values=600, key_grid=0.5, value_grid=0.5)


def search(keys: float, values: float) -> Search:
    return Search(Text(keys, values), SMALL, SIZES, lambda: None)  # type: ignore[arg-type]


@pytest.mark.parametrize(("keys", "values", "split"), [(1, 1, 0), (4, 1, 1), (1, 9, -1.5)])
def test_bits_go_where_they_are_worth_most(keys, values, split):
    found = search(keys, values).with_share(0.22)
    assert found.key_bits - found.value_bits == pytest.approx(split, abs=0.01)
    assert 0.2195 < found.share <= 0.22
    assert found.share == SIZES.share(found.key_bits, found.value_bits)


@pytest.mark.parametrize("wanted", [0.1, 0.01, 0.001])
def test_the_least_bytes_for_a_wanted_divergence(wanted):
    found = search(2, 1).with_divergence(wanted)
    assert found.found.divergence <= wanted
    fewer = search(2, 1).with_share(found.share - 0.012)
    assert fewer.found.divergence > wanted


def test_a_divergence_that_no_codes_have():
    with pytest.raises(ValueError, match="KL must be at least 3.05e-05, which codes of 8 bits"):
        search(1, 1).with_divergence(1e-5)


def test_bits_stay_within_what_codes_have():
    sizes = Sizes(keys=600, values=300, key_grid=0.5, value_grid=1)
    for share in (0.2, 0.3, 0.5):
        for split in (-9, -1, 0, 1, 9):
            keys, values = sizes.bits(share, split)
            assert 2 <= keys <= 8.0001 and 2 <= values <= 8.0001
            assert sizes.share(keys, values) == pytest.approx(share)
