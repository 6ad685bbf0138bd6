"""What somebody gets who names no setting: never slower than dense, and it says why."""

from __future__ import annotations

import json
import shutil

import pytest

from mlx_delta.generate.command import choose_delta
from mlx_delta.generate.flags import build_parser
from mlx_delta.loading import BUNDLED, DEMO, MODEL_SETTING
from mlx_delta.measure import usual
from mlx_delta.system.kv import kv_fields
from mlx_delta.system.tuning import DENSE, KERNEL, UNPACK, Shape, Tuning

CONFIG = json.loads((BUNDLED / DEMO / "config.json").read_text())
HEADS = (CONFIG["num_attention_heads"], CONFIG["num_key_value_heads"])
SHAPE = Shape("codes 4, rotated 4", *HEADS, CONFIG["head_dim"])


def measured(ratio, shape=SHAPE):
    """A table in which the fastest path takes so many times dense attention's time, at most."""
    times = {KERNEL: ratio * 1e-4, UNPACK: 1.0, DENSE: 1e-4}
    return Tuning({shape: {1024: {**times, KERNEL: 1e-5}, 8192: times}})


@pytest.fixture
def on_a_gpu(monkeypatch):
    """A made-up device with kernels and this table."""

    def use(table):
        monkeypatch.delenv("MLX_DELTA_TUNING")
        monkeypatch.setattr(usual, "has_kernels", lambda: True)
        monkeypatch.setattr(usual, "read_tuning", lambda: table)

    return use


def chosen(*flags, model=DEMO):
    """What ``generate`` makes of its flags."""
    return choose_delta(build_parser().parse_args(["-p", "x", *flags]), model)


@pytest.mark.parametrize("ratio", [0.4, 1.0, 1.02])
def test_coded_where_that_was_measured_to_be_as_fast(on_a_gpu, capsys, ratio):
    on_a_gpu(measured(ratio))
    setting = chosen()
    assert {name: getattr(setting, name) for name in kv_fields("balanced")} == kv_fields("balanced")
    assert setting.sensitivities is not None, "by the model's own calibration"
    assert capsys.readouterr().err == (
        f"note: keys and values are kept as --kv balanced, which takes at most {ratio:.2f} times "
        "dense attention's time here; --kv exact keeps them in full.\n"
    )


def test_in_full_where_it_was_measured_to_be_slower(on_a_gpu, capsys):
    on_a_gpu(measured(1.03))
    assert chosen() == MODEL_SETTING
    assert capsys.readouterr().err == (
        "note: keys and values are kept in full: --kv balanced takes up to 1.03 times dense "
        "attention's time here.\n"
    )


@pytest.mark.parametrize("table", [Tuning(), measured(0.5, Shape("codes 4, rotated 4", 1, 1, 64))])
def test_in_full_where_nothing_was_measured_of_this_shape(on_a_gpu, capsys, table):
    on_a_gpu(table)
    assert chosen() == MODEL_SETTING
    assert "`python -m mlx_delta.benchmark --tune --model demo` measures" in capsys.readouterr().err


def test_nothing_is_chosen_or_said_where_tables_do_not_count(on_a_gpu, monkeypatch, capsys):
    on_a_gpu(measured(0.1))
    monkeypatch.setenv("MLX_DELTA_TUNING", "off")
    assert chosen() == MODEL_SETTING and capsys.readouterr().err == ""


def test_without_a_gpu_nothing_is_chosen_or_said(monkeypatch, capsys):
    monkeypatch.setattr(usual, "read_tuning", None)  # not even looked at
    monkeypatch.setattr(usual, "has_kernels", lambda: False)
    assert chosen() == MODEL_SETTING and capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("flags", "bits"),
    [
        (["--kv", "exact"], None),
        (["--kv", "small"], 3),
        (["--delta", "window=128"], None),
        (["--delta-key-bits", "6"], 6),
        (["--delta-paper"], None),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_what_is_asked_for_wins(on_a_gpu, capsys, flags, bits):
    on_a_gpu(measured(0.1))
    assert chosen(*flags).key_bits == bits and chosen("--no-delta") is None
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "delta",
    [
        None,
        {"level": 0.01},
        {**CONFIG["delta"], "key_format": "deltas", "key_bits": 6},
        {**CONFIG["delta"], "value_bits": 16},
    ],
    ids=["dense", "not calibrated", "deltas", "values"],
)
def test_what_a_model_says_of_itself_wins(on_a_gpu, capsys, tmp_path, delta):
    on_a_gpu(measured(0.1))
    shutil.copytree(BUNDLED / DEMO, tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps({**CONFIG, "delta": delta}))
    assert chosen(model=str(tmp_path / "model")) == MODEL_SETTING
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("entries", "delta"),
    [({}, {"block_size": 20, "window": 20}), ({"head_dim": 40}, {}), ({"head_dim": 48}, {})],
    ids=["blocks", "keys", "values"],
)
def test_where_no_codes_are_made_nothing_is_chosen_or_said(
    on_a_gpu, tmp_path, capsys, entries, delta
):
    on_a_gpu(Tuning())
    shutil.copytree(BUNDLED / DEMO, tmp_path / "model")
    config = {**CONFIG, **entries, "delta": {**CONFIG["delta"], **delta}}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    assert chosen(model=str(tmp_path / "model")) == MODEL_SETTING
    assert capsys.readouterr().err == ""
