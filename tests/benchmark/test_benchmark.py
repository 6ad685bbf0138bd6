"""``python -m mlx_delta.benchmark``: what is timed and computed, printed and refused."""

from __future__ import annotations

import json

import pytest

from mlx_delta.benchmark import (
    Benchmark,
    Row,
    Run,
    Spread,
    Tail,
    command,
    timing,
)
from mlx_delta.benchmark.command import main
from mlx_delta.benchmark.table import timing_tables, timing_values
from mlx_delta.benchmark.timing import round_order, time_once
from mlx_delta.measure.filling import memory_needed
from mlx_delta.measure.settings import parse_settings
from mlx_delta.measure.traffic import Traffic
from mlx_delta.system import chips
from mlx_delta.system.chips import Chip, find_chips, this_chip
from tests.tiny import SMALL, llama_model, tokens, write_llama

TEXT = "It was a dark night, and the wind was in the trees. "
NAMES = ["dense", "delta", "delta:kv=small", "kv8", "rotating:32", "window-only", "paper"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with a context of 128, and a text."""
    changes = {"head_dim": 64, "max_position_embeddings": 128, "num_hidden_layers": 2}
    folder = write_llama(tmp_path_factory.mktemp("models") / "tiny-llama", **changes)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "delta": SMALL.to_dict()}))
    (folder / "text.txt").write_text(TEXT * 3)
    return folder


@pytest.fixture
def run(capsys, folder):
    """Run the command on the tiny model; its status, output and errors."""

    def call(*flags: str, text: str = str(folder / "text.txt")) -> tuple[int, str, str]:
        status = main(["--model", str(folder), "--text", text, *flags])
        out, err = capsys.readouterr()
        return status, out, err

    return call


# Timing.


def test_spread_is_median_and_quartiles():
    spread = Spread.of([4, 1, 3, 2])
    assert (spread.median, spread.q1, spread.q3) == (2.5, 1.75, 3.25)
    assert spread.to_dict() == {
        "median": 2.5, "q1": 1.75, "q3": 3.25, "min": 1, "max": 4, "n": 4
    }  # fmt: skip


def test_speeds_are_tokens_by_seconds():
    (setting,) = parse_settings(["dense"])
    traffic = Traffic(900_000, 100_000, 0, 0, 0)
    seconds = [(0.5, 0.02, 7), (1.0, 0.01, 5), (2.0, 0.04, 6)]
    runs = [Run(first, (each,) * 10, peak) for first, each, peak in seconds]
    row = Row(setting, 100, 11, runs, traffic)
    assert row.prefill_speed.median == 89 / 1.0  # until the first token
    assert row.decode_speed.median == pytest.approx(10 / 0.2)  # after it
    assert row.token_seconds == Tail(0.02, 0.04, 0.04, 30)
    assert row.first_token.q3 == 1.5 and row.peak_bytes == 7
    # 50 tokens a second of a megabyte each are a twentieth of 1 GB/s.
    assert row.bandwidth_share(1.0) == pytest.approx(0.05)


@pytest.mark.parametrize("name", NAMES)
def test_a_run_fills_the_context(model, ids, name):
    (setting,) = parse_settings([name], SMALL)
    run, caches = time_once(model, setting, ids[:90], 10, prefill_step=32)
    assert [cache.offset for cache in caches] == [100] * 3
    assert len(run.tokens) == 9 and min(run.tokens) > 0 < run.first_token
    assert run.decode == sum(run.tokens) and run.peak_bytes > 1e6
    assert (type(caches[0]).__name__ == "QuantizedKVCache") == (name == "kv8")


def test_rounds_are_drawn_from_the_seed():
    rows = list(range(8))
    orders = [round_order(rows, seed, 512, turn) for seed in (0, 1) for turn in range(4)]
    assert orders[0] == round_order(rows, 0, 512, 0) != round_order(rows, 0, 1024, 0)
    assert all(sorted(order) == rows for order in orders)
    assert len(set(map(tuple, orders))) == 8


def test_settings_take_turns_and_the_first_round_is_dropped(model, ids, monkeypatch):
    calls = []

    def recorded(model, setting, prompt, generated, step):
        calls.append((len(prompt) + generated, setting.name))
        caches = setting.make_caches(model)
        setting.prefill(model, list(prompt), caches)
        return Run(1.0, (1.0,), len(calls)), caches

    monkeypatch.setattr(timing, "time_once", recorded)
    settings = parse_settings(["dense", "delta", "kv8"], SMALL)
    bench = Benchmark(model, settings, ids, [40, 60], generated=4, trials=3, seed=5)
    bench.run()
    assert [context for context, _ in calls] == [40] * 12 + [60] * 12
    rounds = [calls[i : i + 3] for i in range(0, 24, 3)]
    for i, names in enumerate(rounds):
        rows = [row for row in bench.rows if row.context == names[0][0]]
        order = round_order(rows, 5, names[0][0], i % 4)
        assert [name for _, name in names] == [row.setting.name for row in order]
    assert [len(row.runs) for row in bench.rows] == [3] * 6
    assert min(run.peak_bytes for row in bench.rows[:3] for run in row.runs) == 4


def test_what_memory_cannot_hold_is_left_out(model, ids, monkeypatch):
    settings = parse_settings(["dense", "rotating:32"], SMALL)
    needed = [memory_needed(model, setting, 300, 16) for setting in settings]
    assert needed[1] < needed[0]
    monkeypatch.setattr(timing, "physical_memory", lambda: needed[1])
    bench = Benchmark(model, settings, ids, [300], generated=4, trials=1, prefill_step=16)
    bench.run()
    assert [row.setting.name for row in bench.rows] == ["rotating:32"]
    assert bench.notes[0].startswith("dense at 300 tokens was left out: it takes about ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"settings": []}, r"\[Benchmark\] settings is empty; name at least one"),
        ({"contexts": [3000]}, "of 3000 tokens is longer than the model's, which is 2048"),
        ({"contexts": [64]}, "64 tokens has no room for a prompt and 64 generated"),
        ({"contexts": [500]}, "needs 436 tokens of prompt but got 400"),
        ({"generated": 1}, "generated must be >= 2"),
        ({"trials": 0}, "trials must be >= 1 but got 0"),
    ],
)
def test_misuse_in_code(model, ids, arguments, message):
    values = {"settings": parse_settings(["dense"]), "tokens": ids, "contexts": [128]}
    with pytest.raises(ValueError, match=message):
        Benchmark(model, **{**values, **arguments})


def test_tokens_that_take_longer_are_told(model, ids):
    assert Tail.of([1] * 98 + [6, 6]) == Tail(1, 1, 6, 100)
    assert Tail.of([2, 4]).to_dict() == {"median": 3, "p95": 3.9, "max": 4, "n": 2}
    settings = parse_settings(["delta"], SMALL)
    bench = Benchmark(model, settings, ids, [64], generated=SMALL.block_size, trials=1)
    for row in bench.run():
        # One of eight tokens encodes a block of eight as well.
        assert len(row.operations) == 8 and len(set(row.operations)) == 2
        assert row.token_operations.greatest > row.token_operations.median
        cells = dict(zip(*table_of(row), strict=True))
        assert cells["ops/token"].endswith(f" / {max(row.operations)}")
        assert cells["ms/token"].count(" / ") == 2


def table_of(row: Row) -> tuple[list[str], list[str]]:
    """Header and cells of a row's table."""
    (table,) = timing_tables([row], None)
    return table.header, table.rows[0]


def test_tiles_are_reported_beside_the_rest(tiles_from_the_start):
    model = llama_model(SMALL, max_position_embeddings=2048)
    settings = parse_settings(
        ["stock", "dense", "delta:threshold=0,block_size=32,window=32,tiles=0.3"]
    )
    bench = Benchmark(model, settings, tokens(600)[0].tolist(), [600], generated=2, trials=1)
    stock, dense, tiles = bench.run()
    assert stock.density is dense.density is None and 0 < tiles.density < 1
    (table,) = timing_tables(bench.rows, None)
    assert [row[table.header.index("tiles")] for row in table.rows] == [
        "–", "–", f"{tiles.density:.3f}"
    ]  # fmt: skip
    assert [entry["tile_density"] for entry in timing_values(bench.rows, None)] == [
        None, None, tiles.density
    ]  # fmt: skip
    assert "tiles" not in timing_tables(bench.rows[:2], None)[0].header


# Chips.


def test_chips_by_name_family_and_all():
    def labels(*names):
        return [chip.label for chip in find_chips(names)]

    family = ["M4", "M4 Pro", "M4 Max (32-core GPU)", "M4 Max (40-core GPU)"]
    assert labels("m4") == labels("M4", "Apple M4 Pro") == family
    assert labels("m4-max") == family[2:] and labels("M4 Max (40-core GPU)") == family[3:]
    assert labels("all") == [chip.label for chip in chips.CHIPS]
    assert [chip.gb_per_s for chip in find_chips(["M4"])] == [120, 273, 410, 546]
    with pytest.raises(ValueError, match=r"unknown chip 'M4 Mx' \(did you mean M4 Max .*; known"):
        find_chips(["M4 Mx"])


@pytest.mark.parametrize(
    ("brand", "cores", "expected"),
    [
        ("Apple M2 Pro", 19, 200),
        ("Apple M3 Max", 30, 300),
        ("Apple M3 Max", 40, 400),
        ("Apple M4 Max", None, 546),  # not told: the one with most
        ("Apple M99", 40, None),
    ],
)
def test_this_chip_is_what_macos_says(monkeypatch, brand, cores, expected):
    says = {
        "sysctl": f"{brand}\n",
        "ioreg": f'    "gpu-core-count" = {cores}\n' if cores else "",
    }
    monkeypatch.setattr(chips.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(chips, "_output", lambda command, *_: says[command])
    chips.gpu_cores.cache_clear()
    chip = this_chip()
    chips.gpu_cores.cache_clear()
    assert (chip.gb_per_s if chip else None) == expected and chips.chip_name() == brand


def test_without_apples_chip_there_is_no_bandwidth(monkeypatch):
    monkeypatch.setattr(chips.platform, "system", lambda: "Linux")
    assert this_chip() is None and chips.chip_name().startswith("Linux ")
    assert chips._output("no-such-command-here") == ""


# The command.


def test_a_table_for_each_context(run, tmp_path):
    file = tmp_path / "results.json"
    flags = ["--contexts", "96", "48", "-g", "4", "-n", "2", "--output", str(file)]
    status, out, _ = run("--settings", "dense", "delta:kv=small", "kv4", *flags)
    assert status == 0
    lines = out.splitlines()
    heads = [line for line in lines if line.endswith(" generated")]
    assert heads == [f"{n} tokens: {n - 4} of prompt, 4 generated" for n in (48, 96)]
    start = lines.index(heads[0])
    assert lines[start + 1].split()[:3] == ["setting", "prefill", "tok/s"]
    assert [line.split()[0] for line in lines[start + 2 : start + 5]] == [
        "dense", "delta:kv=small", "kv4"
    ]  # fmt: skip
    assert "prompt MB  cache MB  written out MB" in lines[start + 1]
    assert "2 launches per layer" in out and "GB/s" not in out
    data = json.loads(file.read_text())
    assert data["kind"] == "timing" and data["complete"] and data["notes"] == []
    assert data["model"]["name"].endswith("tiny-llama") and data["machine"]["chip"]
    assert data["delta"] == SMALL.to_dict() and data["bandwidth_gb_per_s"] is None
    first = data["results"][0]
    assert (first["setting"], first["context"], first["prompt_tokens"]) == ("dense", 48, 44)
    assert first["generation_tps"]["n"] == 2 == len(first["runs"])
    assert first["generation_tps"]["min"] <= first["generation_tps"]["median"]
    assert first["traffic_per_token"]["cache_bytes"] == 2 * 2 * 2 * 64 * 2 * 48
    assert first["cache_bytes"] == 2 * 2 * 2 * 64 * 2 * 256  # mlx-lm grows by 256
    assert first["operations_per_token"]["median"] > 50 < first["peak_memory_bytes"]
    assert 0 < first["prompt_memory_bytes"] < first["peak_memory_bytes"]
    coded = data["results"][1]
    # Keys and values of 2 layers, 2 heads of 64, in float32, with room for 256 tokens.
    assert coded["scratch_bytes"] == 2 * 2 * 2 * 64 * 4 * 256 > first["scratch_bytes"] == 0
    assert first["token_seconds"]["median"] <= first["token_seconds"]["max"]
    assert first["token_seconds"]["n"] == 2 * 3 and first["operations_per_token"]["n"] == 4


def test_on_a_mac_the_share_of_bandwidth_is_told(run, monkeypatch):
    monkeypatch.setattr(command, "this_chip", lambda: Chip("M4", 120))
    _, out, _ = run("--settings", "dense", "-p", "40", "-g", "2", "-n", "1", "--markdown")
    header = next(line for line in out.splitlines() if line.startswith("| setting"))
    assert header.endswith("| of 120 GB/s |") and "\n| `dense` | " in out and out.count("%") == 1
    assert "42 tokens: 40 of prompt, 2 generated" in out


def test_an_interruption_keeps_what_was_measured(run, monkeypatch, tmp_path):
    real, calls = timing.time_once, []

    def interrupted(*args):
        calls.append(args[1].name)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(timing, "time_once", interrupted)
    file = tmp_path / "results.json"
    status, out, err = run(
        *("--settings", "dense", "delta", "--contexts", "40", "-g", "4", "--output", str(file))
    )
    assert status == 130 and err.endswith("Interrupted.\n")
    data = json.loads(file.read_text())
    assert not data["complete"]
    assert [row["setting"] for row in data["results"]] == [calls[2]]
    assert [line.split()[0] for line in out.splitlines()[4:5]] == [calls[2]]


def test_default_contexts_are_those_the_model_allows(run, monkeypatch):
    class Stop(ValueError):
        pass

    def stop(model, settings, ids, contexts, *others):
        raise Stop(f"{contexts} {len(ids)} {others[0]}")

    monkeypatch.setattr(command, "Benchmark", stop)
    assert "[128] 128 64" in run("--settings", "dense")[2]
    assert "[30] 30 10" in run("--settings", "dense", "-p", "20", "-g", "10")[2]


def test_ceilings_of_a_family(run, tmp_path):
    file = tmp_path / "results.json"
    flags = ("--contexts", "64", "1024", "--settings", "dense", "delta", "--output", str(file))
    status, out, _ = run("--roofline", "M4 Pro", "M1", *flags)
    assert status == 0 and "computed, not measured" in out.splitlines()[0]
    assert "M4, computed ceiling of decode at 64 tokens, tok/s\n" in out
    assert "M1, computed ceiling of decode at 1024 tokens, tok/s (extrapolated)" in out
    assert "Extrapolated: from caches filled to 128 tokens." in out
    data = json.loads(file.read_text())
    assert data["kind"] == "roofline" and [r["extrapolated"] for r in data["results"]] == [
        False, False, True, True
    ]  # fmt: skip
    row = data["results"][2]
    assert row["cache_bytes"] == 2 * 2 * 2 * 64 * 2 * 1024
    assert row["ceilings"]["M4 Pro"] == pytest.approx(273e9 / row["bytes"])
    assert list(row["ceilings"]) == ["M4 Pro", "M1", "M1 Pro", "M1 Max", "M1 Ultra"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--roofline", "M4 Mac"], "unknown chip 'M4 Mac' (did you mean M4 Max"),
        (["--contexts", "512"], "of 512 tokens is longer than the model's, which is 128."),
        (["--contexts", "64", "64"], "--contexts has 64 twice; drop one."),
        (["--contexts", "0"], "--contexts must be >= 1 but got 0."),
        (["--contexts", "40"], "40 tokens has no room for a prompt and 64 generated tokens"),
        (["-g", "1"], "--generation-tokens must be >= 2 but got 1."),
        (["-n", "0"], "--num-trials must be >= 1 but got 0."),
        (["--settings", "dens"], "unknown setting 'dens' (did you mean dense"),
        (["--longest", "64"], "--longest goes together with --roofline"),
        (["--output", "/no/such/folder/x.json"], "there is no folder /no/such/folder."),
        (["--output", "/"], "--output / is a folder; give a file's name."),
    ],
)
def test_misuse_is_one_line(run, flags, message):
    status, out, err = run(*flags)
    assert status == 1 and out == ""
    last = err.splitlines()[-1]
    assert last.startswith("error: ") and message in last


def test_a_missing_text_or_model_is_one_line(run, capsys):
    status, _, err = run(text="nowhere.txt")
    assert status == 1 and "there is no text file 'nowhere.txt'" in err
    assert main(["--model", "nowhere"]) == 1
    assert "there is no model directory 'nowhere'" in capsys.readouterr().err


def test_a_model_of_another_kind_is_one_line(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    assert main(["--model", str(tmp_path), "--settings", "dense"]) == 1
    assert "is neither a Llama nor a BitNet" in capsys.readouterr().err


def test_an_interruption_before_anything_was_measured_keeps_the_file(run, monkeypatch, tmp_path):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(timing, "time_once", interrupted)
    file = tmp_path / "results.json"
    file.write_text("older")
    flags = ("--contexts", "40", "-g", "4", "--output", str(file))
    assert run("--settings", "dense", *flags)[:2] == (130, "")
    assert file.read_text() == "older"


def test_no_settings_is_refused_by_the_parser(run, capsys):
    with pytest.raises(SystemExit) as stop:
        run("--settings")
    assert stop.value.code == 2 and "expected at least one argument" in capsys.readouterr().err
