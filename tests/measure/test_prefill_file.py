"""Measurements of prefill: read as they were written, and the tables and the picture of them."""

from __future__ import annotations

import json
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from mlx_delta.measure.prefill_file import Row, mean, read_rows, tables

ROOT = Path(__file__).parents[2]
ROWS = [
    Row("speed", "tiny", 1024, "tiles:0.95", 0,
        {"seconds": 2, "processor_seconds": 1, "peak_bytes": 2e6, "density": 0.25}),
    Row("speed", "tiny", 1024, "stock", 0,
        {"seconds": 8, "processor_seconds": 4, "peak_bytes": 9e6, "density": None}),
    Row("speed", "tiny", 1024, "tiles:0.95", 1,
        {"seconds": 4, "processor_seconds": 3, "peak_bytes": 4e6, "density": 0.25}),
    Row("loss", "tiny", 1024, "tiles:0.95", 0,
        {"density": 0.25, "end_kl": 0.01, "after_kl": 0.002, "after_flips": 0.1}),
    Row("recall", "tiny", 1024, "exact", 0, {"right": {"256": True, "512": True}}),
    Row("recall", "tiny", 1024, "tiles:0.95", 0, {"right": {"256": True, "512": False}}),
]  # fmt: skip


def write(path: Path, rows=ROWS, rest: str = "") -> Path:
    path.write_text("".join(json.dumps(row.to_dict()) + "\n" for row in rows) + rest)
    return path


def test_rows_are_read_as_written_without_a_last_one_that_was_cut_off(tmp_path):
    assert read_rows(write(tmp_path / "a")) == ROWS
    assert read_rows(write(tmp_path / "b", rest='{"part": "spe')) == ROWS


@pytest.mark.parametrize("content", ["{}\n", "no\n", '{"part": "spe\n{}\n', "[1]\n"])
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "other").write_text(content)
    with pytest.raises(ValueError, match="line 1 is no measurement; give a file that examples"):
        read_rows(tmp_path / "other")
    with pytest.raises(OSError, match="no such file"):
        read_rows(tmp_path / "none")


def test_tables_hold_means_and_answers():
    speed, loss = tables(ROWS)
    assert speed.rows == [
        ["1024", "stock", "8.0", "4.0", "1.00", "–", "9", "1"],
        ["1024", "tiles:0.95", "3.0", "2.0", "2.00", "0.250", "3", "2"],
    ]
    assert loss.rows == [
        ["1024", "exact", "–", "–", "–", "–", "–", "2 of 2"],
        ["1024", "tiles:0.95", "0.250", "0.01000", "0.00200", "0.100", "1", "1 of 2"],
    ]
    assert mean(ROWS, "speed", 1024, "exact", "seconds") is None


def example():
    """``examples/prefill_results.py``."""
    found = spec_from_file_location("prefill_results", ROOT / "examples" / "prefill_results.py")
    module = module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_the_command_measures_what_is_not_there_yet_and_fills_a_page(tmp_path, capsys, monkeypatch):
    command, file, page = example(), tmp_path / "rows", tmp_path / "page.md"
    asked = []

    def measured(*what):
        asked.append(what)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return {"seconds": 1, "processor_seconds": 1, "peak_bytes": 1, "density": None}

    monkeypatch.setitem(command.PARTS, "speed", measured)
    flags = [str(file), "--parts", "speed", "--models", "demo", "--tokens", "1024", "2048"]
    assert command.main(flags) == 130
    assert "Interrupted; the same command goes on." in capsys.readouterr().err
    assert command.main(flags) == 0 and command.main(flags) == 0
    ways = ("stock", "exact", "tiles:0.95")
    expected = [("demo", tokens, way, 0) for tokens in (1024, 2048) for way in ways]
    assert [row.key[1:] for row in read_rows(file)] == expected and len(asked) == 7
    page.write_text("Before\n{}old\n{}\nafter\n".format(*command.MARKS))
    for _ in range(2):
        assert command.main([str(file), "--page", str(page)]) == 0
    (table,) = tables(read_rows(file))
    assert page.read_text() == "Before\n{0}\n{2}\n{1}\nafter\n".format(
        *command.MARKS, table.markdown()
    )
    page.write_text("none")
    assert command.main([str(file), "--page", str(page)]) == 1
    assert "put them where tables belong" in capsys.readouterr().err


def test_the_picture_shows_the_measurements():
    pytest.importorskip("matplotlib")
    from mlx_delta.pictures.prefill import draw_prefill
    from mlx_delta.pictures.theme import LIGHT

    figure = draw_prefill(ROWS, LIGHT)
    speed, density, loss = figure.axes
    assert [list(line.get_ydata()) for line in speed.lines] == [[], [2.0]]
    assert [list(line.get_ydata()) for line in density.lines] == [[0.25]]
    assert [list(line.get_ydata()) for line in loss.lines] == [[0.002], [0.01]]
    with pytest.raises(ValueError, match="nothing was measured with tiles"):
        draw_prefill([row for row in ROWS if row.way == "exact"], LIGHT)


def test_the_documentation_has_the_tables_of_its_file():
    rows = read_rows(ROOT / "docs" / "results" / "prefill.jsonl")
    page = (ROOT / "docs" / "results.md").read_text("utf-8")
    for table in tables(rows):
        assert table.markdown() in page, "print them with examples/prefill_results.py --show"
