"""The grid of needles shows the counts in the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from mlx_delta.pictures import command, needles  # noqa: E402
from mlx_delta.pictures.results import read_runs  # noqa: E402
from tests.pictures.test_pictures import drawn, run_entry, texts, write_results  # noqa: E402


def needle_runs(path: Path) -> Path:
    metrics = {
        "dense": {"64:0.1": (2, 3), "64:0.9": (3, 3), "128:0.1": (0, 3), "128:0.9": (1, 3)},
        "delta": {"64:0.1": (2, 2), "64:0.9": (2, 3), "128:0.9": (1, 1)},
    }
    runs = []
    for name, cells in metrics.items():
        run = run_entry("needles", name, 0.5, 0.5, 1000)
        run["summary"]["metrics"] = {
            key: value
            for cell, (found, asked) in cells.items()
            for key, value in ((f"found@{cell}", found), (f"asked@{cell}", asked))
        }
        runs.append(run)
    return write_results(path, runs)


def test_needles_are_a_grid_with_their_counts(tmp_path: Path):
    runs = read_runs([needle_runs(tmp_path / "needles.json")])
    grids = [needles.make_grid(run.setting, run.metrics) for run in runs]
    assert grids[0].lengths == (64, 128) and grids[0].depths == ("0.1", "0.9")
    np.testing.assert_array_equal(grids[0].found, [[2, 0], [3, 1]])
    np.testing.assert_array_equal(grids[1].asked, [[2, 0], [3, 1]])
    figure = drawn(lambda page: needles.draw_needles(grids, page, "title", "source"))
    first, second = ([t.get_text() for t in axes.texts] for axes in figure.axes)
    assert first == ["2/3", "0/3", "3/3", "1/3"]
    assert second == ["2/2", "–", "2/3", "1/1"]
    assert "dense: 6 of 12" in texts(figure) and "delta: 5 of 6" in texts(figure)


def test_results_without_needles_are_named(tmp_path: Path, capsys):
    results = write_results(tmp_path / "kld.json", [run_entry("kld", "dense", 0.0, 0.0, 9)])
    assert command.main(["needles", str(results), "-o", str(results.with_name("x.png"))]) == 1
    assert "have no task 'needles'" in capsys.readouterr().err
