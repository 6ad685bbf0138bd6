"""Sensitivities: gradients that are right, weights that predict, and what the command writes."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_delta import DeltaConfig, DeltaKVCache, load
from mlx_delta.attention.probe import near_and_causal, shifted_output, shifted_scores
from mlx_delta.calibrate.command import main
from mlx_delta.calibrate.divergence import DenseText
from mlx_delta.calibrate.gradients import far_gradients
from mlx_delta.calibrate.salience import measure_salience
from mlx_delta.calibrate.weights import Watched, correct_layers, measure_weights, watch
from mlx_delta.generate.command import build_parser, choose_delta
from mlx_delta.measure.sparsity import share_of_zeros
from mlx_delta.measure.text import BUNDLED_TEXT, read_text
from mlx_delta.models import llama
from mlx_delta.sensitivities import FILE_NAME, Sensitivities
from tests.tiny import LLAMA, llama_model, tokens, write_llama

SMALL_RUNS = DeltaConfig(block_size=8, window=16, sinks=3, level=0.1)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A checkpoint that was not calibrated, with small blocks."""
    path = write_llama(tmp_path / "model")
    delta = SMALL_RUNS.changed(level=None).to_dict()
    (path / "config.json").write_text(json.dumps({**LLAMA, "delta": delta}, indent=1))
    return path


def run(*flags: object) -> int:
    return main(["--length", "200", *map(str, flags)])


def test_a_shift_has_the_gradient_of_far_keys_that_move():
    rng = np.random.default_rng(0)
    queries, keys, values = (
        mx.array(rng.normal(size=shape).astype(np.float32))
        for shape in ((1, 2, 3, 40, 4), (1, 2, 40, 4), (1, 2, 1, 40, 5))
    )
    near, causal = near_and_causal(40, SMALL_RUNS)
    far = mx.logical_and(causal, mx.logical_not(near))

    def output(scores: mx.array) -> mx.array:
        weights = mx.softmax(mx.where(causal, scores, -mx.inf), axis=-1)
        return mx.sin(weights @ values).sum()

    def probed(shift: mx.array) -> mx.array:
        scores = queries @ keys[:, :, None].swapaxes(-1, -2)
        return output(shifted_scores(scores, shift, queries, far))

    def moved(shift: mx.array) -> mx.array:
        exact = queries @ keys[:, :, None].swapaxes(-1, -2)
        return output(mx.where(far, queries @ (keys + shift)[:, :, None].swapaxes(-1, -2), exact))

    wanted = mx.grad(moved)(mx.zeros_like(keys))
    assert float(mx.abs(wanted).max()) > 0.01
    np.testing.assert_allclose(mx.grad(probed)(mx.zeros_like(keys)), wanted, atol=1e-5)


def test_a_shift_has_the_gradient_of_far_values_that_move():
    rng = np.random.default_rng(0)
    scores, values = (
        mx.array(rng.normal(size=shape).astype(np.float32))
        for shape in ((1, 2, 3, 40, 40), (1, 2, 40, 5))
    )
    near, causal = near_and_causal(40, SMALL_RUNS)
    far = mx.logical_and(causal, mx.logical_not(near))
    weights = mx.softmax(mx.where(causal, scores, -mx.inf), axis=-1)

    def probed(shift: mx.array) -> mx.array:
        output = weights @ values[:, :, None]
        return mx.sin(shifted_output(output, shift, weights, far)).sum()

    def moved(shift: mx.array) -> mx.array:
        seen = mx.where(far, weights, 0) @ (values + shift)[:, :, None]
        return mx.sin(seen + mx.where(far, 0, weights) @ values[:, :, None]).sum()

    wanted = mx.grad(moved)(mx.zeros_like(values))
    assert float(mx.abs(wanted).max()) > 0.01
    np.testing.assert_allclose(mx.grad(probed)(mx.zeros_like(values)), wanted, atol=1e-5)


def test_only_keys_and_values_that_are_seen_as_far_have_gradients():
    model = llama_model(SMALL_RUNS)
    of_both = far_gradients(model, tokens(64)[0].tolist(), SMALL_RUNS, [0, 2], seed=0)
    squares = [x for found in of_both for x in found]
    assert [x.shape for x in squares] == [(2, 64, 16)] * 4
    for each in squares:
        each = np.array(each)
        assert not each[:, :3].any()  # sinks
        assert not each[:, 40:].any()  # in the window of the last query's block
        assert (each[:, 3:40].sum(axis=-1) > 0).all()
    classes = {type(layer).__name__ for layer in model.layers}
    assert classes == {"TransformerBlock"}
    assert all(type(x) is type(model.layers[0]) for x in model.layers)


def test_a_layer_without_keys_has_no_cache():
    """As in mixtures with recurrent layers: which layer reads a cache is seen, not counted."""

    class WithOneMore(llama.Model):
        @property
        def layers(self):
            return [nn.Identity(), *self.model.layers]

        def make_cache(self):
            return [DeltaKVCache(SMALL_RUNS) for _ in self.model.layers]

    window = tokens(64)[0].tolist()
    model = llama_model(SMALL_RUNS)
    wanted, _ = far_gradients(model, window, SMALL_RUNS, [0, 2], seed=0)
    model.__class__ = WithOneMore
    found, _ = far_gradients(model, window, SMALL_RUNS, [0, 2], seed=0)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-9)


def test_squared_gradients_predict_the_divergence_of_a_layer():
    """Half the Fisher information times squared errors, within a small factor."""
    model = llama_model(SMALL_RUNS)
    window = tokens(200)[0].tolist()
    watched = watch(model, window, SMALL_RUNS)
    weights, squares, _ = measure_weights(model, window, SMALL_RUNS, watched, "gradients")
    text = DenseText(model, window, 24)
    for i in range(3):
        layers = [weights[j] if j == i else None for j in range(3)]
        setting = SMALL_RUNS.changed(sensitivities=Sensitivities(layers), level=3e-3)
        measured = text.compare(setting, only=i)
        assert 0.01 < measured.zeros < 0.95, measured
        held = np.array(_held(watched.keys[i], setting.for_layer(i, 3)))
        errors = np.square(held - np.array(watched.keys[i])[:, : held.shape[1]])
        predicted = 0.5 * (np.array(squares[i])[:, : held.shape[1]] * errors).sum() / (200 - 24)
        assert 0.25 < measured.divergence / predicted < 4, (i, measured, predicted)
    held = SMALL_RUNS.changed(level=3e-3)
    corrected = correct_layers(text, held, watched, weights, [None] * 3, squares)
    for own, before in zip(corrected, weights, strict=True):
        factor = own / before
        assert factor.min() == pytest.approx(factor.max(), rel=1e-5)
        assert 1 / 8.01 < factor.max() < 8.01


def test_salience_finds_the_direction_that_queries_look_along():
    """Squares made to grow with one channel of each head's keys, and a little noise."""
    rng = np.random.default_rng(0)
    keys = rng.normal(size=(2, 200, 16)).astype(np.float32)
    noise = rng.lognormal(0, 0.3, (2, 200, 16))
    squares = np.exp(0.8 * keys[np.arange(2), :, [3, 9]])[..., None] * noise
    watched = Watched((0,), [mx.array(keys)], [], [])
    weights = [squares.mean(axis=1).astype(np.float32)]
    (found,) = measure_salience([watched], [[squares]], weights, SMALL_RUNS)
    for head, channel in enumerate((3, 9)):
        others = np.delete(found[head], channel)
        assert found[head, channel] == pytest.approx(0.4, rel=0.2)  # half is trusted
        assert np.abs(others).max() < 0.1


def _held(keys: mx.array, config: DeltaConfig) -> mx.array:
    from mlx_delta.ops.hold import hold_blocks

    far = ((keys.shape[1] - 1) // 8 - 2) * 8
    return hold_blocks(keys[None, :, :far], config)[0][0]


@pytest.mark.parametrize(
    "flags", [[], ["--weights", "queries"], ["--mode", "greedy", "--prose-only"]], ids=str
)
def test_load_picks_up_what_was_written(path, capsys, flags):
    before = json.loads((path / "config.json").read_text())
    assert run("--model", path, "--sparsity", "0.5", *flags) == 0
    assert "Chosen:" in capsys.readouterr().out
    after = json.loads((path / "config.json").read_text())
    delta = after.pop("delta")
    assert delta["sensitivities"] == FILE_NAME
    assert delta["threshold_mode"] == ("greedy" if "greedy" in flags else "optimal")
    assert after == {k: v for k, v in before.items() if k != "delta"}
    model, tokenizer = load(path)
    assert model.args.delta.run_level == delta["level"]
    assert len(model.args.delta.loaded_sensitivities.curve) > 5
    ids = tokenizer.encode(read_text(BUNDLED_TEXT))[5000:5200]
    caches = model.make_cache()
    mx.eval(model(mx.array([ids]), cache=caches))
    assert share_of_zeros(caches) == pytest.approx(0.5, abs=0.06)


def test_flags_of_generate_set_the_level_from_the_curve(path, tmp_path):
    parse = build_parser().parse_args
    with pytest.raises(ValueError, match=r"--delta-sparsity needs a calibrated model"):
        choose_delta(parse(["--delta-sparsity", "0.5"]), str(path))
    assert run("--model", path, "--sparsity", "0.4", "--output", tmp_path / "copy") == 0
    assert not (path / FILE_NAME).exists(), "a copy gets the file, the model does not"
    path = tmp_path / "copy"
    levels = [
        choose_delta(parse(["--delta-sparsity", share]), str(path)).level
        for share in ("0", "0.4", "0.6")
    ]
    assert levels[0] == 0 < levels[1] < levels[2]
    written = json.loads((path / "config.json").read_text())["delta"]["level"]
    assert levels[1] == pytest.approx(written, rel=1e-3)
    curve = load(path)[0].args.delta.loaded_sensitivities.curve
    chosen = choose_delta(parse(["--delta-kl", str(curve[3][2])]), str(path))
    assert chosen.level <= curve[3][0] * 1.001
    assert choose_delta(parse(["--delta-level", "0.7"]), str(path)).level == 0.7
    relative = choose_delta(parse(["--delta-threshold", "0.7"]), str(path))
    assert relative.threshold == 0.7 and relative.threshold_mode == "relative"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sparsity", "0.99"], "share of zeros must be between 0 and"),
        (["--loss", "0.1"], "--loss is for --mode relative or absolute"),
        (["--sparsity", "0.5", "--windows", "3"], "--windows is for --mode relative"),
        (["--kl", "0.1", "--mode", "relative"], "--kl is for --mode optimal or greedy"),
        (["--sparsity", "0.5", "--text", "SHORT"], "two windows of 200 tokens are needed"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_can_not_be_is_said(path, tmp_path, capsys, flags, message):
    short = tmp_path / "short.txt"
    short.write_text(read_text(BUNDLED_TEXT)[:1000])
    before = (path / "config.json").read_text()
    assert run("--model", path, *[str(short) if x == "SHORT" else x for x in flags]) != 0
    assert message in capsys.readouterr().err
    assert (path / "config.json").read_text() == before
    assert not (path / FILE_NAME).exists()
