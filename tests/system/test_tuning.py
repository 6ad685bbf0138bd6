"""The table of what was measured on a machine: kept, found again, and believed only if it fits."""

from __future__ import annotations

import json
import warnings

import pytest

from mlx_delta.config import DeltaConfig
from mlx_delta.system import tuning
from mlx_delta.system.kv import kv_fields
from mlx_delta.system.tuning import (
    DENSE,
    KERNEL,
    UNPACK,
    Shape,
    Tuning,
    read_tuning,
    store_name,
    table_file,
    write_tuning,
)

BALANCED = Shape("codes 4, rotated 4", 9, 3, 64)
OTHER = Shape("held 4, plain 4", 8, 2, 128)
TABLE = Tuning(
    {
        BALANCED: {
            1024: {DENSE: 4e-5, KERNEL: 5e-5, UNPACK: 3e-5},
            8192: {DENSE: 4e-5, KERNEL: 2e-5, UNPACK: 9e-5},
        }
    }
)


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    """A device of its own, with an empty folder for caches."""
    monkeypatch.setenv("MLX_DELTA_CACHE", str(tmp_path))
    monkeypatch.delenv("MLX_DELTA_TUNING", raising=False)
    monkeypatch.setattr(tuning, "device_name", lambda: "Apple M9 Max, 40 GPU cores")
    read_tuning.cache_clear()
    tuning._best.cache_clear()
    yield tmp_path
    read_tuning.cache_clear()
    tuning._best.cache_clear()


def test_stores_are_named_by_what_they_keep():
    named = {name: store_name(DeltaConfig().changed(**kv_fields(name))) for name in ("small",)}
    assert named == {"small": "codes 3, rotated 3"}
    assert store_name(DeltaConfig(key_bits=4)) == "deltas 4, plain full"
    assert store_name(DeltaConfig()) == store_name(DeltaConfig(value_bits=16)) == ""


def test_the_nearest_length_decides():
    found = [TABLE.best(BALANCED, n) for n in (1, 1024, 2500, 3500, 8192, 100_000)]
    assert found == [UNPACK, UNPACK, UNPACK, KERNEL, KERNEL, KERNEL]
    assert TABLE.best(OTHER, 1024) is None is Tuning().times_dense(BALANCED)
    assert TABLE.times_dense(BALANCED) == pytest.approx(0.75)  # of the fastest, at the worst length


def test_without_a_table_nothing_is_known_and_nothing_is_said():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_tuning() == Tuning() and tuning.decode_path(BALANCED, 1024) is None


def test_what_is_written_is_found_again(machine):
    file = write_tuning(TABLE)
    assert file == machine / "tuning" / f"apple-m9-max-40-gpu-cores-mlx-{tuning.mlx_version()}.json"
    assert read_tuning() == TABLE and list(file.parent.iterdir()) == [file]
    assert tuning.decode_path(BALANCED, 1000) == UNPACK
    assert tuning.decode_path(BALANCED, 9000) == KERNEL
    # Another model's shapes come beside it; measured again, a shape's times are the new ones.
    again = {1024: {DENSE: 1.0, KERNEL: 1.0}}
    write_tuning(Tuning({OTHER: again, BALANCED: again}))
    assert read_tuning() == Tuning({BALANCED: again, OTHER: again})
    assert tuning.decode_path(BALANCED, 1000) == KERNEL


def test_a_measurement_asks_for_its_path():
    write_tuning(TABLE)
    with tuning.by_path("kernel, half the splits"):
        assert tuning.decode_path(BALANCED, 9000) == "kernel, half the splits"
    assert tuning.decode_path(BALANCED, 9000) == KERNEL


def test_it_can_be_switched_off(monkeypatch):
    write_tuning(TABLE)
    monkeypatch.setenv("MLX_DELTA_TUNING", "off")
    read_tuning.cache_clear()
    assert read_tuning() == Tuning()


def changed(**entries):
    """The table's file with other entries."""
    return json.dumps({**TABLE.to_json(), **entries})


def shape(**entries):
    """The same with another shape in it."""
    data = TABLE.to_json()
    data["seconds_of_a_layer_and_token"][0].update(entries)
    return json.dumps(data)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (lambda: "{", "Expecting property name"),
        (lambda: "[1]", "it is no table of this format"),
        (lambda: changed(format=2), "it is no table of this format"),
        (lambda: changed(device="Apple M1"), "its device is 'Apple M1', not 'Apple M9 Max"),
        (lambda: changed(mlx="0.1.0"), "its mlx is '0.1.0', not "),
        (lambda: changed(seconds_of_a_layer_and_token=3), "it lacks something"),
        (lambda: shape(heads=-1), "a shape is no shape"),
        (lambda: shape(heads=True), "a shape is no shape"),
        (lambda: shape(lengths={"0": {}}), "'0' is no length"),
        (lambda: shape(lengths={"1024": {"dense": -1}}), "-1 is no time"),
        (lambda: shape(lengths={"1024": {"dense": "fast"}}), "'fast' is no time"),
        (lambda: shape(lengths={"1024": {"dense": float("nan")}}), "nan is no time"),
        (lambda: shape(lengths=[]), "it lacks something"),
        (lambda: "[" * 100_000, "is not used: "),
        (lambda: " " * (1 << 21), "it has more than 1048576 bytes"),
    ],
    ids=["cut", "a list", "format", "device", "release", "shapes", "negative", "boolean", "length",
         "time", "text", "nan", "lengths", "deep", "large"],
)  # fmt: skip
def test_a_file_that_does_not_fit_is_named_and_left_alone(text, reason):
    file = table_file()
    file.parent.mkdir()
    file.write_text(text())
    with pytest.warns(UserWarning, match=r"^\[tuning\] .*\.json is not used: ") as said:
        assert read_tuning() == Tuning() == read_tuning()
    assert len(said) == 1 and reason in str(said[0].message)
    assert "`python -m mlx_delta.benchmark --tune` writes it anew" in str(said[0].message)
    write_tuning(TABLE)
    assert read_tuning() == TABLE


def test_a_place_that_can_not_be_written_leaves_the_older_table(machine, monkeypatch):
    file = write_tuning(TABLE)

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(tuning.os, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        write_tuning(Tuning({OTHER: {1: {DENSE: 1.0}}}))
    assert read_tuning() == TABLE and list(file.parent.iterdir()) == [file]
