"""``benchmark --tune`` with a made-up clock and device: which paths there are, and what is kept."""

from __future__ import annotations

import itertools
import json

import mlx.core as mx
import pytest
from mlx_lm.models.cache import KVCache

from mlx_delta.attention import choice
from mlx_delta.benchmark import command, tune
from mlx_delta.benchmark.command import main
from mlx_delta.benchmark.tune import NOTHING, seconds_of, tried_shapes, tuning_tables
from mlx_delta.cache import DeltaKVCache
from mlx_delta.system import tuning
from mlx_delta.system.tuning import DENSE, KERNEL, PATHS, UNPACK, Shape
from tests.gpus import Everything
from tests.tiny import SMALL, llama_model, write_llama

SHAPE = Shape("codes 4, rotated 4", 4, 2, 32)


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    """A device of its own, with an empty folder for caches."""
    monkeypatch.setenv("MLX_DELTA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MLX_DELTA_TUNING", raising=False)
    monkeypatch.setattr(tuning, "device_name", lambda: "Apple M9")
    tuning.read_tuning.cache_clear()
    tuning._best.cache_clear()
    yield tmp_path / "cache"
    tuning.read_tuning.cache_clear()
    tuning._best.cache_clear()


@pytest.fixture(scope="module")
def tried():
    """What a small model's layers could store, with blocks of 8."""
    held = SMALL.changed(level=0.03)
    return {each.shape: each for each in tried_shapes(llama_model(held, head_dim=32))}


def test_each_shape_of_a_model_is_tried_once(tried):
    assert list(tried) == [
        SHAPE, Shape("codes 3, rotated 3", 4, 2, 32), Shape("deltas 4, rotated 4", 4, 2, 32)
    ]  # fmt: skip
    assert tried_shapes(llama_model(SMALL, head_dim=16)) == [], "no codes of this dimension"


def test_a_chain_can_not_be_stored_and_what_a_threshold_holds_only_coded():
    chain = SMALL.changed(keyframes=False, run_value="first", threshold_mode="absolute")
    assert tried_shapes(llama_model(chain, head_dim=32)) == []
    names = [each.shape.store for each in tried_shapes(llama_model(SMALL, head_dim=32))]
    assert names == ["codes 4, rotated 4", "codes 3, rotated 3"]


def test_the_median_counts_and_the_first_round_does_not(tried):
    times = iter([0, 90, 100, 104, 200, 202, 300, 330])  # a warm-up, then 4, 2 and 30
    each = tried[SHAPE]
    each.fill(40)
    assert seconds_of(each, UNPACK, lambda: next(times), layers=2, rounds=3) == 2
    assert each.cache.size() == 40 + 2 * 4
    each.fill(40)
    assert each.cache.size() == 40, "back for the next path"
    assert seconds_of(each, DENSE, itertools.count().__next__, layers=1, rounds=1) == 1
    assert (each.cache.size(), each.dense.offset) == (40, 42)  # a warm-up, and a round


def test_both_ways_to_attend_are_to_the_same_text(tried):
    each = tried[SHAPE]
    for tokens, error in ((50, 0.4), (12, 0.002)):  # coded far away; all of it near
        each.cache, each.dense = DeltaKVCache(each.config), KVCache()
        each.fill(tokens)
        mx.random.seed(3)
        own = each.attend(UNPACK)
        mx.random.seed(3)
        dense = each.attend(DENSE)
        assert own.shape == dense.shape and mx.abs(own - dense).max() < error
    assert mx.abs(dense).max() > 0.5


def fake(tried, path):
    """Seconds of a made-up device: unpacking is faster for short texts only."""
    tokens = tried.cache.size()
    return {DENSE: 1e-4, UNPACK: 1e-7 * tokens}.get(path, 1e-5 if path == KERNEL else 2e-5)


def test_the_table_grows_from_shape_to_shape(tried, monkeypatch):
    shapes = [tried[SHAPE]]
    seen = [
        {n: dict(times) for n, times in table.seconds[SHAPE].items()}
        for table in tune.tune(shapes, [160, 80], fake)
    ]
    assert [list(each) for each in seen] == [[80], [80, 160]]
    assert set(seen[1][160]) == {DENSE, *PATHS}
    assert seen[1][80] == {**dict.fromkeys(PATHS, 2e-5), DENSE: 1e-4, KERNEL: 1e-5, UNPACK: 8e-6}
    monkeypatch.setattr(tune, "free_memory", lambda _: (0, "nothing"))
    assert list(tune.tune(shapes, [80], fake)) == [], "no more than memory holds"


def test_what_was_fastest_is_told_kept_and_taken(machine, tmp_path, monkeypatch, capsys):
    folder = write_llama(tmp_path / "llama", max_position_embeddings=512, head_dim=32)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "delta": SMALL.to_dict()}))
    monkeypatch.setattr(command, "has_kernels", lambda: True)
    monkeypatch.setattr(command, "seconds_of", fake)
    result = tmp_path / "out.json"
    flags = ("--tune", "--contexts", "64", "256", "--output", str(result))
    assert main(["--model", str(folder), *flags]) == 0
    out = capsys.readouterr().out
    assert "codes 4, rotated 4: 4 query heads on 2 of 32, microseconds of a layer and token" in out
    rows = [line.split() for line in out.splitlines()]
    assert rows[2] == ["64", "100.0", "10.0", "20.0", "20.0", "6.4", UNPACK, "0.06"]
    assert rows[3] == ["256", "100.0", "10.0", "20.0", "20.0", "25.6", KERNEL, "0.10"]
    assert "--kv balanced takes at most 0.10 times dense attention's time: so calibrated" in out
    (file,) = (machine / "tuning").iterdir()
    assert f"Kept in {file}\n" in out
    assert json.loads(result.read_text())["kind"] == "tuning"
    assert tuning.decode_path(SHAPE, 300) == KERNEL and tuning.decode_path(SHAPE, 70) == UNPACK


def test_an_interruption_keeps_what_was_measured(machine, tried, monkeypatch, capsys, tmp_path):
    folder = write_llama(tmp_path / "llama", max_position_embeddings=512, head_dim=32)
    calls = itertools.count()

    def interrupted(tried, path):
        if next(calls) > len(PATHS):
            raise KeyboardInterrupt
        return fake(tried, path)

    monkeypatch.setattr(command, "has_kernels", lambda: True)
    monkeypatch.setattr(command, "seconds_of", interrupted)
    assert main(["--model", str(folder), "--tune", "--contexts", "192", "256"]) == 130
    (kept,) = tuning.read_tuning().seconds.values()
    assert list(kept) == [192] and "Interrupted" in capsys.readouterr().err


def test_slower_than_dense_is_said_too(tried):
    table = tuning.Tuning({SHAPE: {64: {**dict.fromkeys(PATHS, 1.5e-4), DENSE: 1e-4}}})
    assert tuning_tables(table)[0].rows[0][-1] == "1.50"
    (said,) = tune.said_of_default(table)
    assert said.endswith("1.50 times dense attention's time: so keys and values stay in full "
                         "where nothing else is asked for.")  # fmt: skip


def test_without_a_gpu_there_is_nothing_to_decide(machine, capsys):
    assert main(["--tune", "--model", "nowhere"]) == 0
    assert capsys.readouterr().out == NOTHING + "\n" and not machine.exists()


def test_what_can_not_be_kept_or_measured_is_said_at_once(machine, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(command, "has_kernels", lambda: True)
    monkeypatch.setattr(command, "seconds_of", None)
    assert main(["--tune", "--prompt-tokens", "64"]) == 1
    assert "--prompt-tokens says nothing about --tune" in capsys.readouterr().err
    folder = write_llama(tmp_path / "llama", max_position_embeddings=512, head_dim=16)
    assert main(["--model", str(folder), "--tune"]) == 1
    assert "can keep its keys and values as codes, so there is nothing" in capsys.readouterr().err
    monkeypatch.setattr(tune, "free_memory", lambda _: (0, "nothing"))
    assert main(["--model", "demo", "--tune", "--contexts", "64", "32"]) == 1
    assert "there is no memory for 32 tokens" in capsys.readouterr().err
    tuning.table_file().mkdir(parents=True)
    assert main(["--model", "demo", "--tune"]) == 1
    assert "is a folder, where the table is to be" in capsys.readouterr().err


def test_a_table_that_can_not_be_kept_is_still_in_the_output(tried, monkeypatch, capsys, tmp_path):
    def full(table):
        raise OSError("no space left")

    monkeypatch.setattr(command, "tried_shapes", lambda _: [tried[SHAPE]])
    monkeypatch.setattr(command, "has_kernels", lambda: True)
    monkeypatch.setattr(command, "seconds_of", fake)
    monkeypatch.setattr(command, "write_tuning", full)
    flags = ["--tune", "--contexts", "64", "--output", str(tmp_path / "out.json")]
    assert main(["--model", "demo", *flags]) == 1
    said = capsys.readouterr()
    assert said.err.endswith("error: no space left\n") and SHAPE.store in said.out
    assert json.loads((tmp_path / "out.json").read_text())["kind"] == "tuning"


@pytest.mark.parametrize("other", [["--decode"], ["--roofline", "M4"]], ids=str)
def test_one_thing_at_a_time(other, capsys):
    assert main(["--tune", *other]) == 1
    assert "are two things to do; drop one." in capsys.readouterr().err


# What attention makes of it.


@pytest.mark.parametrize(
    ("path", "reads", "simdgroups"),
    [
        (None, True, 160),
        (KERNEL, True, 160),
        ("kernel, half the splits", True, 80),
        ("kernel, twice the splits", True, 320),
        (UNPACK, False, None),
        ("another release's path", True, 160),
    ],
    ids=str,
)
def test_attention_takes_the_path_of_the_table(monkeypatch, path, reads, simdgroups):
    from mlx_delta.attention import hybrid
    from mlx_delta.ops import launching, proving

    wide = SMALL.changed(block_size=64, window=64)
    each = {t.shape: t for t in tried_shapes(llama_model(wide, head_dim=32))}
    if path is not None:
        tuning.write_tuning(tuning.Tuning({SHAPE: {256: {path: 1e-6, DENSE: 1.0}}}))
    cache = each[SHAPE]
    cache.fill(300)
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    monkeypatch.setattr(launching, "_own_simdgroups", lambda: 160)
    asked = []

    def decode(queries, *_):
        asked.append(launching.gpu_simdgroups())
        return queries

    monkeypatch.setattr(hybrid, "_decode", decode)
    monkeypatch.setattr(hybrid, "attend_in_full", lambda queries, *_: queries)
    monkeypatch.setattr(proving, "_tried", Everything())
    keys = mx.zeros((1, 2, 1, 32))
    hybrid.delta_attention(mx.zeros((1, 4, 1, 32)), keys, keys, cache.cache, 1.0)
    assert asked == ([simdgroups] if reads else [])
    assert launching.gpu_simdgroups() == 160, "for this launch only"
    step = cache.cache.update(mx.zeros((1, 2, 2, 32)), mx.zeros((1, 2, 2, 32)))
    assert choice.decode_blocks(mx.zeros((1, 4, 2, 32)), step, None) is not None, "one query only"
