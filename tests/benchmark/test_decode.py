"""``benchmark --decode``: settings take turns token by token, over caches that are filled once."""

from __future__ import annotations

import itertools
import json

import mlx.core as mx
import pytest

from mlx_delta.benchmark.command import main
from mlx_delta.benchmark.decode import DecodeBenchmark, DecodeRow, decode_tables, fill
from mlx_delta.measure.settings import cache_nbytes, parse_settings
from tests.tiny import SMALL, write_llama

NAMES = ["dense", "delta", "delta:kv=balanced", "kv4", "rotating:32", "window-only", "paper"]


@pytest.mark.parametrize("name", NAMES)
def test_caches_hold_the_prompt_as_if_they_had_read_it(model, ids, name):
    dense_setting, setting = parse_settings(["stock", name], SMALL)
    dense = dense_setting.make_caches(model)
    parts = (ids[:40], ids[40:80], ids[80:96])  # the same, so that keys are rounded alike
    for part in (*parts, ids[96:100]):
        mx.eval(model(mx.array(part)[None], cache=dense))
    caches = fill(setting, model, dense, 96, step=40)
    assert [cache.offset for cache in caches] == [96] * 3
    # The first layer's keys depend on no other layer, so that its cache is as if it had read.
    own = setting.make_caches(model, 96)
    for part in parts:
        mx.eval(model(mx.array(part)[None], cache=own))
        setting.settle(own)
    pairs = zip(flat(own[0].state), flat(caches[0].state), strict=True)
    assert all(bool(mx.allclose(a, b, atol=1e-5)) for a, b in pairs)
    assert cache_nbytes(own) == cache_nbytes(caches)


def flat(state):
    """The arrays of a cache's state."""
    if isinstance(state, mx.array):
        return [state]
    return [x for part in state for x in flat(part)] if isinstance(state, (list, tuple)) else []


def test_settings_take_turns_and_the_first_token_is_dropped(model, ids):
    calls = []

    class Watched(DecodeBenchmark):
        def _token(self, row, caches, token):
            calls.append((row.setting.name, row.context, caches[0].offset, token))
            super()._token(row, caches, token)

    wall, processor = itertools.count(), itertools.count(0, 3)
    settings = parse_settings(["dense", "delta", "delta:kv=balanced"], SMALL)
    clocks = (wall.__next__, processor.__next__)
    rows = Watched(model, settings, ids, [90, 60], 4, step=32, clocks=clocks).run()
    assert [(row.setting.name, row.context) for row in rows] == [
        (setting.name, context) for context in (60, 90) for setting in settings
    ]
    for context in (60, 90):
        own = [call for call in calls if call[1] == context]
        turns = [own[i : i + 3] for i in range(0, len(own), 3)]
        assert [{call[2:] for call in turn} for turn in turns] == [
            {(n, ids[n])} for n in range(context - 5, context)
        ]
        assert all({call[0] for call in turn} == {s.name for s in settings} for turn in turns)
        assert len({tuple(call[0] for call in turn) for turn in turns}) > 1, (
            "in an order drawn anew"
        )
    assert all(row.wall == [1] * 4 and row.processor == [3] * 4 for row in rows)
    assert [row.scratch_bytes > 0 for row in rows] == [False, False, True] * 2
    # Keys and values of 3 layers, 2 heads of 64, in float32, with room for 256 tokens.
    assert rows[2].scratch_bytes == 2 * 3 * 2 * 64 * 4 * 256
    assert rows[2].cache_bytes < rows[0].cache_bytes


def test_ratios_are_of_the_same_token():
    (dense, delta) = parse_settings(["dense", "delta"])
    first = DecodeRow(dense, 64, [1.0, 2.0, 4.0], [1.0, 1.0, 1.0])
    row = DecodeRow(delta, 64, [1.1, 2.0, 8.0], [2.0, 2.0, 5.0], 3_000_000, 1_000_000)
    assert row.times(first).median == pytest.approx(1.1)
    assert row.times_in_all(first) == pytest.approx(11.1 / 7)
    assert row.times_in_all(first, "processor") == 3
    (table,) = decode_tables([first, row])
    assert dict(zip(table.header[1:], table.rows[1][1:], strict=True)) | {} == {
        "ms/token": "2000 [1550, 5000]",
        "times dense": "1.10 [1.05, 1.55]",
        "in all": "3.00",
        "processor": "2.00 [2.00, 3.50]",
        "cache MB": "3.00",
        "written out MB": "1.00",
    }
    assert table.rows[1][3] == "1.59"


def test_the_command_prints_and_writes(tmp_path, capsys):
    folder = write_llama(tmp_path / "llama", head_dim=64, max_position_embeddings=128)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "delta": SMALL.to_dict()}))
    (tmp_path / "text.txt").write_text("It was a dark night, and the wind was in the trees. " * 3)
    file = tmp_path / "out.json"
    flags = ["--model", str(folder), "--text", str(tmp_path / "text.txt"), "--decode"]
    more = ["--settings", "dense", "delta:kv=small", "--contexts", "96", "-g", "3"]
    assert main([*flags, *more, "--output", str(file)]) == 0
    out = capsys.readouterr().out
    assert "96 tokens: the last 3 decoded, token by token\n" in out
    assert "The prompt was read once, densely" in out
    data = json.loads(file.read_text())
    assert data["kind"] == "decode" and data["complete"]
    dense, small = data["results"]
    assert dense["wall_times"]["median"] == 1 == dense["processor_times_in_all"]
    assert small["wall_seconds"]["n"] == 3 and small["scratch_bytes"] > 0 == dense["scratch_bytes"]
    assert main([*flags, "--contexts", "4", "-g", "3"]) == 1
    assert "must have more than the 4 that are decoded" in capsys.readouterr().err
