"""The command: what it writes, what a model then does, and what it says to bad input."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_delta import calibrate as package
from mlx_delta import load, measure_sparsity
from mlx_delta.calibrate import sensitivity
from mlx_delta.calibrate.command import main
from mlx_delta.calibrate.loss import mean_loss
from mlx_delta.measure.text import BUNDLED_TEXT, read_text
from tests.tiny import LLAMA, SMALL, llama_model, tokens, write_llama

SHORT = ["--length", "200", "--windows", "2"]
GRID = (0.6, 1.4, 8.0)
FAST = ["--cost", "attention"]


@pytest.fixture(autouse=True)
def few_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Divergences at three thresholds instead of seven."""
    monkeypatch.setattr(sensitivity, "GRID", GRID)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A checkpoint of three layers of two kv heads, with a setting of small blocks."""
    path = write_llama(tmp_path / "model")
    config = {**LLAMA, "delta": SMALL.to_dict(), "odd  one": [1, 2.50, "é"]}
    (path / "config.json").write_text(json.dumps(config, indent=3, ensure_ascii=False))
    return path


def run(*flags: object) -> int:
    """With thresholds, unless the flags say otherwise."""
    mode = [] if "--mode" in flags else ["--mode", "relative"]
    return main([*SHORT, *mode, *map(str, flags)])


def test_load_picks_up_what_was_written(path, capsys):
    before = (path / "config.json").read_text()
    assert run("--model", path, "--sparsity", "0.45") == 0
    output = capsys.readouterr().out
    assert "Chosen: a prefill sparsity of 0.4500" in output and "threshold  sparsity" in output
    assert "Expected KL divergence from dense: 0." in output
    after = (path / "config.json").read_text()
    old, new = json.loads(before), json.loads(after)
    assert before.split('"delta"')[0] == after.split('"delta"')[0]
    assert before.split('"odd')[1] == after.split('"odd')[1]
    assert len(new["delta"].pop("threshold")) == 3
    old["delta"].pop("threshold")
    assert new == old

    model, tokenizer = load(path)
    ids = tokenizer.encode(read_text(BUNDLED_TEXT))[5000:5200]
    caches = model.make_cache()
    mx.eval(model(mx.array([ids]), cache=caches))
    assert measure_sparsity(caches, 200).prefill == pytest.approx(0.45, abs=0.02)


@pytest.mark.parametrize(
    ("flags", "kind"),
    [
        (["--per-head", "--windows", "1"], list),
        (["--per-head", *FAST], list),
        (["--uniform"], float),
        (["--mode", "absolute", *FAST], float),
    ],
)
def test_other_thresholds(path, flags, kind):
    assert run("--model", path, "--sparsity", "0.4", *flags) == 0
    delta = json.loads((path / "config.json").read_text())["delta"]
    threshold = delta["threshold"]
    assert isinstance(threshold[0] if isinstance(threshold, list) else threshold, kind)
    assert delta["threshold_mode"] == ("absolute" if "absolute" in flags else "relative")
    if kind is list:
        assert [len(heads) for heads in threshold] == [2, 2, 2]
    load(path)


def test_a_copy_leaves_the_model_as_it_is(path, tmp_path):
    before = (path / "config.json").read_text()
    copy = tmp_path / "new" / "copy"
    assert run("--model", path, "--sparsity", "0.4", "--output", copy, *FAST) == 0
    assert (path / "config.json").read_text() == before
    model, _ = load(copy)
    assert len(model.args.delta.threshold) == 3
    assert {p.name for p in copy.iterdir()} == {p.name for p in path.iterdir()}


def test_a_dry_run_writes_the_curves_and_nothing_else(path, tmp_path, capsys):
    before = (path / "config.json").read_text()
    curve = tmp_path / "curve.json"
    assert run("--model", path, "--sparsity", "0.4", "--dry-run", "--curve", curve) == 0
    assert "Dry run: no setting written." in capsys.readouterr().out
    assert (path / "config.json").read_text() == before
    values = json.loads(curve.read_text())
    assert values["sparsity"] == pytest.approx(0.4, abs=1e-3)
    assert values["curve"]["thresholds"][0] == 0 and values["curve"]["sparsity"][0] == 0
    assert values["curve"]["sparsity"][-1] <= values["highest_sparsity"]
    assert [layer["layer"] for layer in values["layers"]] == [0, 1, 2]
    assert len(values["layers"][0]["sparsity_of_heads"]) == 2
    assert values["kl"]["windows"] == 2
    assert 0 < values["kl"]["chosen"] <= values["kl"]["uniform"]
    kl = values["layers"][2]["kl"]
    assert kl["thresholds"] == list(GRID) and kl["nothing_held"] == 0
    assert len(kl["alone"]) == 1 and min(kl["alone"][0]) > 0


def test_a_wanted_loss(path, capsys):
    assert run("--model", path, "--loss", "0.02", "--windows", "3", *FAST) == 0
    words = capsys.readouterr().out.split("(")[-1]
    assert float(words.split(")")[0]) <= 0.02


def test_the_loss_is_held_to_on_windows_that_were_not_recorded(path):
    model, tokenizer = load(path)
    ids = tokens(300)[0].tolist()
    found = package.calibrate(
        model, tokenizer, ids, loss=0.01, length=150, windows=2, cost="attention"
    )
    assert found.windows == 1 and found.sparsity <= found.highest
    dense, delta = (mean_loss(model, [ids[150:]], config) for config in (None, found.config))
    assert found.loss == package.LossRise(dense, delta)
    assert delta - dense <= 0.01


def test_thresholds_that_do_not_fit_the_model_are_mended(path):
    config = json.loads((path / "config.json").read_text())
    config["delta"]["threshold"] = [1.0, 2.0]
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="2 values but the model has 3 layers"):
        load(path)
    assert run("--model", path, "--sparsity", "0.4", *FAST) == 0
    load(path)


@pytest.mark.parametrize("when", ["record", "measure_sensitivity"])
def test_an_interruption_leaves_the_config_as_it_was(path, capsys, monkeypatch, when):
    before = (path / "config.json").read_text()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(package, when, interrupt)
    assert run("--model", path, "--sparsity", "0.4") == 130
    assert "Interrupted; the model is as it was." in capsys.readouterr().err
    assert (path / "config.json").read_text() == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sparsity", "1.5"], "sparsity must be between 0 and 1 but got 1.5"),
        (["--sparsity", "nan"], "sparsity must be between 0 and 1 but got nan"),
        (["--sparsity", "0.95"], "can't be reached in 200 tokens: with everything held but"),
        (["--loss", "-1"], "loss, in nats per token, must be >= 0 but got -1.0"),
        (["--loss", "inf"], "must be >= 0 but got inf"),
        (["--loss", "1", "--length", "2048", "--text", "SHORT"], "the text has"),
        (["--sparsity", "0.4", "--text", "SHORT"], "the text has"),
        (["--sparsity", "0.4", "--text", "absent.txt"], "there is no text file 'absent.txt'"),
        (["--sparsity", "0.4", "--length", "4096"], "longer than the model's context of 2048"),
        (["--sparsity", "0.4", "--length", "20"], "nothing can be skipped in 20 tokens"),
        (["--sparsity", "0.4", "--windows", "0"], "windows must be >= 1 but got 0"),
        (["--sparsity", "0.4", "--cost", "kl", "--uniform"], "leaves nothing to share out; drop"),
        (["--sparsity", "0.4", "--output", "MODEL"], "exists already; give a new directory"),
        (["--sparsity", "0.4", "--output", "MODEL/x"], "lies inside the model's own directory"),
        (["--sparsity", "0.4", "--output", "x", "--dry-run"], "contradict each other"),
        (["--sparsity", "0.4", "--curve", "no/such/file.json"], "there is no directory no/such"),
        (
            ["--sparsity", "0.4", "--mode", "relative", "--delta", "key_format=codes,key_bits=4"],
            "--sparsity says how much is held, but of keys with key_format='codes' nothing is",
        ),
        (["--sparsity", "0.4", "--model", "nowhere"], "there is no model directory 'nowhere'"),
        (["--sparsity", "0.4", "--model", "demo"], "pass --output DIR for a calibrated copy"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "",
)
def test_what_is_wrong_is_said_in_one_line(path, tmp_path, capsys, flags, message):
    (tmp_path / "short.txt").write_text("It was a dark night.")
    places = {"SHORT": tmp_path / "short.txt", "MODEL": path, "MODEL/x": path / "x"}
    before = {p: p.stat().st_mtime_ns for p in path.iterdir()}
    flags = [str(places.get(flag, flag)) for flag in flags]
    assert run("--model", path, *flags) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: ") and message in error
    assert {p: p.stat().st_mtime_ns for p in path.iterdir()} == before


@pytest.mark.parametrize("flags", [[], ["--sparsity", "0.4", "--loss", "0.1"]], ids=str)
def test_one_wish_is_asked_for(path, flags):
    with pytest.raises(SystemExit) as stop:
        run("--model", path, *flags)
    assert stop.value.code == 2


def test_models_without_keys_to_hold_are_refused(path, capsys):
    config = json.loads((path / "config.json").read_text())
    for model_type, message in (("gemma5", "not supported"), ("deepseek_v3", "latents")):
        (path / "config.json").write_text(json.dumps({**config, "model_type": model_type}))
        assert run("--model", path, "--sparsity", "0.4") == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("delta", "options", "message"),
    [
        (None, {"sparsity": 0.4}, "the model attends densely; load it with a DeltaConfig"),
        (SMALL, {"sparsity": 0.4, "per": "row"}, "per must be 'model', 'layer' or 'head' but got"),
        (
            SMALL,
            {"sparsity": 0.4, "cost": "loss"},
            "cost must be 'kl' or 'attention' but got 'loss'",
        ),
        (SMALL, {}, "give either a wanted sparsity or a wanted loss"),
    ],
)
def test_in_an_app_what_is_wrong_is_named(delta, options, message):
    with pytest.raises(ValueError, match=rf"\[calibrate\] {message}"):
        package.calibrate(llama_model(delta), None, [1] * 500, **options)
