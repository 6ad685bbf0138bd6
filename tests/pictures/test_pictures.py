"""Pictures show the numbers in the files, and say what is wrong with what they are given."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

matplotlib = pytest.importorskip("matplotlib")

from mlx_delta.pictures import command, names, theme, tradeoff  # noqa: E402
from mlx_delta.pictures.heads import HeadMap, color_range, draw_heads  # noqa: E402
from mlx_delta.pictures.labels import Label, place_labels  # noqa: E402
from mlx_delta.pictures.results import read_runs  # noqa: E402
from mlx_delta.pictures.roofline import draw_roofline, read_roofline, spread  # noqa: E402
from mlx_delta.pictures.theme import DARK, LIGHT, THEMES  # noqa: E402

# Setting: accuracy, prefill sparsity, bytes.
RECALL = {
    "dense": (0.98, 0.0, 1000),
    "delta:threshold=0.8": (0.985, 0.55, 1020),
    "delta:threshold=1.1": (0.975, 0.64, 1020),
    "delta:threshold=1.1,key_bits=4,value_bits=4": (0.97, 0.64, 260),
    "paper": (0.93, 0.7, 1030),
    "kv4": (0.95, 0.0, 281),
    "rotating:1024": (0.5, 0.0, 500),
    "window-only": (0.01, 0.6, 65),
}


def run_entry(task: str, setting: str, score: float, sparsity: float, size: int) -> dict[str, Any]:
    kind = setting.partition(":")[0]
    heads = [[sparsity, sparsity - 0.05], [sparsity + 0.1, sparsity - 0.1]]
    kld = task == "kld"
    return {
        "task": task,
        "setting": setting,
        "kind": kind,
        "date": "2026-01-02",
        "summary": {
            "metric": "kld" if kld else "accuracy",
            "higher_is_better": not kld,
            "score": score,
            "low": score * 0.99,
            "high": score * 1.01,
            "samples": 40,
            "prefill_sparsity": sparsity,
            "decode_sparsity": sparsity / 2,
            "overall_sparsity": sparsity * 0.9,
            "prefill_heads": heads if kind in ("delta", "paper", "window-only") else [],
            "cache_bytes": size,
        },
    }


def write_results(path: Path, runs: list[dict[str, Any]], model: str = "tiny") -> Path:
    data = {"version": 1, "model": {"name": model, "fingerprint": f"of {model}"}, "runs": runs}
    path.write_text(json.dumps(data))
    return path


@pytest.fixture
def results(tmp_path: Path) -> Path:
    runs = [run_entry("recall", name, *values) for name, values in RECALL.items()]
    kld = {"dense": 0.0, "delta:threshold=1.1": 2e-4, "kv4": 3e-2}
    runs += [run_entry("kld", name, kld[name], *RECALL[name][1:]) for name in kld]
    return write_results(tmp_path / "results.json", runs)


def drawn(draw: Any, page: theme.Theme = LIGHT) -> Any:
    """The figure, made inside the theme's settings."""
    with matplotlib.rc_context(page.settings()):
        return draw(page)


def points(axes: Any) -> dict[str, tuple[float, float]]:
    """Each setting's marker."""
    return {
        line.get_gid(): (float(line.get_xdata()[0]), float(line.get_ydata()[0]))
        for line in axes.lines
        if line.get_gid()
    }


def texts(figure: Any) -> str:
    found = figure.findobj(matplotlib.text.Text)
    return "\n".join(text.get_text() for text in found if text.get_text())


# tradeoff


def test_points_are_the_results(results: Path):
    runs = read_runs([results])
    figure = drawn(lambda page: tradeoff.draw_tradeoff(runs, page))
    by_sparsity, by_bytes, kld_sparsity, _ = figure.axes
    inside = ["dense", *(name for name in RECALL if name.startswith(("delta", "paper")))]
    assert points(by_sparsity) == {n: (RECALL[n][1], RECALL[n][0]) for n in inside}
    shares = points(by_bytes)
    assert set(shares) == set(RECALL)
    for name, (score, _, size) in RECALL.items():
        assert shares[name][0] == size / 1000
        low, high = by_bytes.get_ylim()
        assert shares[name][1] == min(max(score, low), high)
    assert kld_sparsity.get_yscale() == "log"
    assert points(kld_sparsity)["delta:threshold=1.1"] == (0.64, 2e-4)


def test_a_lost_memory_stands_at_the_edge_with_its_number(results: Path):
    runs = read_runs([results])
    axis = tradeoff.score_axis([run for run in runs if run.task == "recall"])
    assert axis.low > 0.5 and not axis.log
    said = texts(drawn(lambda page: tradeoff.draw_tradeoff(runs, page)))
    assert "window-only 0.01 ↓" in said and "rotating 1024 0.5 ↓" in said and "dense 0 ↓" in said


def test_a_sweep_joins_single_thresholds_and_leaves_out_those_per_layer(tmp_path: Path):
    scores = {
        "delta:threshold=1.2": (0.96, 0.68, 90),
        "delta:threshold=0.8": (0.98, 0.5, 90),
        "delta:threshold=1/2.5": (0.99, 0.7, 90),
        "delta:threshold=0.9,key_bits=4": (0.95, 0.6, 50),
    }
    runs = [run_entry("recall", name, *values) for name, values in scores.items()]
    runs = read_runs([write_results(tmp_path / "r.json", runs)])
    figure = drawn(lambda page: tradeoff.draw_tradeoff(runs, page))
    sweeps = [x for x in figure.axes[0].lines if not x.get_gid() and x.get_alpha() == 0.45]
    assert [x.get_xydata().tolist() for x in sweeps] == [[[0.5, 0.98], [0.68, 0.96]]]


@pytest.mark.parametrize("scores", [[0.99, 0.991, 0.989], [0.5, 0.5, 0.5], [0.0, 0.0, 0.0]])
def test_noise_is_not_magnified(tmp_path: Path, scores: list[float]):
    entries = [
        run_entry("recall", name, score, 0.0, 10)
        for name, score in zip(("dense", "kv8", "kv4"), scores, strict=True)
    ]
    axis = tradeoff.score_axis(read_runs([write_results(tmp_path / "r.json", entries)]))
    assert axis.high - axis.low >= tradeoff.LEAST_SHARE
    assert all(axis.holds(score) for score in scores)


def test_scores_of_a_hundred_are_not_shares(tmp_path: Path):
    entries = [run_entry("squad", "dense", 30.0, 0, 10), run_entry("squad", "delta", 31.0, 0.5, 10)]
    axis = tradeoff.score_axis(read_runs([write_results(tmp_path / "r.json", entries)]))
    assert axis.high - axis.low >= tradeoff.LEAST_RELATIVE * 30
    assert axis.low < 29.7 and axis.high > 31.31  # the intervals


def test_every_setting_is_labelled_and_none_covers_another(results: Path):
    runs = read_runs([results])
    figure = drawn(lambda page: tradeoff.draw_tradeoff(runs, page))
    for axes in figure.axes:
        boxes = [t.get_window_extent() for t in axes.texts if t.get_text()]
        assert len(boxes) == len(points(axes))
        for i, box in enumerate(boxes):
            assert not any(box.overlaps(other) for other in boxes[:i])
    assert {run.label for run in runs} >= {"θ 0.8", "θ 1.1 K4 V4", "rotating 1024", "kv4"}


def test_labels_of_one_point_do_not_collide():
    figure = drawn(lambda page: theme.new_figure(4))
    axes = figure.add_axes((0.1, 0.1, 0.8, 0.8))
    notes = place_labels(axes, [Label(0.5, 0.5, f"setting {i}", "k") for i in range(9)])
    boxes = [note.get_window_extent() for note in notes]
    frame = axes.get_window_extent()
    for i, box in enumerate(boxes):
        assert frame.containsx(box.x0) and frame.containsx(box.x1)
        assert not any(box.overlaps(other) for other in boxes[:i])


def test_families_differ_in_colour_and_marker_and_stand_out_from_the_page():
    markers = [marker for marker, _, _ in names.FAMILIES.values()]
    assert len(set(markers)) == len(markers)
    for page in THEMES.values():
        colors = [names.color(page, family) for family in names.FAMILIES]
        assert len(set(colors)) == len(colors)
        for color in (*colors, page.ink, page.quiet):
            assert contrast(color, page.background) >= 3  # WCAG 2.1's least for graphics


def contrast(a: str, b: str) -> float:
    def luminance(color: str) -> float:
        rgb = np.array(matplotlib.colors.to_rgb(color))
        return float(np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
                     @ [0.2126, 0.7152, 0.0722])  # fmt: skip

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_settings_and_tasks_can_be_chosen(results: Path, tmp_path: Path):
    flags = ["--tasks", "recall", "--settings", "dense", "kv4", "--against", "bytes"]
    assert command.main(["tradeoff", str(results), *flags, "-o", str(tmp_path / "p.svg")]) == 0
    content = (tmp_path / "p-dark.svg").read_text()
    assert "kv4" in content and "rotating 1024" not in content and "sparsity:" not in content


def test_runs_of_two_models_get_panels_of_their_own(results: Path, tmp_path: Path):
    other = write_results(tmp_path / "b.json", [run_entry("recall", "dense", 0.7, 0, 10)], "other")
    figure = drawn(lambda page: tradeoff.draw_tradeoff(read_runs([results, other]), page))
    assert len(figure.axes) == 2 * 3
    assert "other, recall: higher is better; 40 samples a setting" in texts(figure)


# heads


def test_cells_hold_the_sparsities():
    values = np.random.default_rng(0).uniform(0.4, 0.8, (5, 3))
    maps = [HeadMap("delta", values), HeadMap("paper", values / 2)]
    figure = drawn(lambda page: draw_heads(maps, page, "title", "meaning", "source"))
    for axes, head_map in zip(figure.axes, maps, strict=False):
        np.testing.assert_allclose(axes.collections[0].get_array(), head_map.values.T)
        cells = {text.get_position(): text.get_text() for text in axes.texts}
        for layer in range(5):
            for head in range(3):
                shown = float(cells[layer + 0.5, head + 0.5])
                assert abs(shown - head_map.values[layer, head]) <= 0.0005 + 1e-9
    assert f"delta: mean {values.mean():.3f}" in texts(figure)


@pytest.mark.parametrize(
    ("values", "expected"),
    [([0.61, 0.64], (0.4, 0.7)), ([0.9, 1.0], (0.7, 1.0)), ([0.0, 0.0], (0.0, 0.3)),
     ([0.15, 0.75], (0.1, 0.8))],
)  # fmt: skip
def test_colours_span_enough(values: list[float], expected: tuple[float, float]):
    assert color_range([HeadMap("delta", np.array([values]))]) == pytest.approx(expected)


def test_heads_of_a_file(results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    output = tmp_path / "h.svg"
    flags = ["--settings", "delta:threshold=1.1", "--theme", "light", "-o", str(output)]
    assert command.main(["heads", str(results), *flags]) == 0
    content = (tmp_path / "h-light.svg").read_text()
    for value in ("0.640", "0.590", "0.740", "0.540"):
        assert value in content
    assert "mean of 40 samples of recall" in content and "2026-01-02" in content
    assert capsys.readouterr().out == f"{tmp_path / 'h-light.svg'}\n"


# roofline


@pytest.fixture
def ceilings(tmp_path: Path) -> Path:
    rows = [
        {
            "setting": setting,
            "context": context,
            "extrapolated": context > 2048,
            "weight_bytes": 10**9,
            "cache_bytes": context * size,
            "bytes": 10**9 + context * size,
            "ceilings": {
                chip: gb * 1e9 / (10**9 + context * size)
                for chip, gb in (("M4", 120), ("M4 Max (40-core GPU)", 546))
            },
        }
        for context in (1024, 2048, 32768)
        for setting, size in (("dense", 100_000), ("delta:key_bits=4,value_bits=4", 25_000))
    ]
    data = {"kind": "roofline", "model": {"name": "tiny"}, "delta": {"threshold": 1.1}}
    path = tmp_path / "roofline.json"
    path.write_text(json.dumps(data | {"date": "2026-01-02T03:04:05", "results": rows}))
    return path


def test_lines_are_the_ceilings(ceilings: Path):
    roofline = read_roofline(ceilings)
    figure = drawn(lambda page: draw_roofline(roofline, page))
    assert len(figure.axes) == 2
    for axes, gb in zip(figure.axes, (120, 546), strict=True):
        lines = {line.get_gid(): line for line in axes.lines if str(line.get_gid()).startswith("M")}
        assert len(lines) == 2
        for gid, line in lines.items():
            size = 100_000 if gid.endswith("dense") else 25_000
            contexts = np.array([1024, 2048, 32768])
            np.testing.assert_array_equal(line.get_xdata(), contexts)
            np.testing.assert_allclose(line.get_ydata(), gb * 1e9 / (10**9 + contexts * size))
    said = texts(figure)
    gain = (1 + 32768e-4) / (1 + 32768 * 25e-6)
    for part in (f"θ 1.1 K4 V4 ×{gain:.2f}", "computed, not measured", "filled to 2,048 tokens",
                 "2026-01-02", "40-core GPU, 546 GB/s"):  # fmt: skip
        assert part in said


def test_names_of_lines_are_kept_apart():
    assert spread([0, 100, 101, 300], 10) == [0, 95.5, 105.5, 300]
    places = spread([5, 5, 5, 12, 13, 40], 10)
    assert np.all(np.diff(places) >= 10 - 1e-9)
    assert places == sorted(places)


# Files.


def test_all_themes_and_formats_are_written_and_the_same_each_time(results: Path, tmp_path: Path):
    contents = []
    for folder in ("a", "b"):
        output = tmp_path / folder / "picture"
        assert command.main(["tradeoff", str(results), "--tasks", "kld", "-o", str(output)]) == 0
        files = sorted((tmp_path / folder).iterdir())
        expected = [f"picture-{page}.{end}" for page in ("dark", "light") for end in ("png", "svg")]
        assert [file.name for file in files] == expected
        contents.append([file.read_bytes() for file in files])
    assert contents[0] == contents[1]
    for content in (contents[0][0], contents[0][2]):
        width, _ = struct.unpack(">II", content[16:24])
        assert width == 1200 and len(content) < 200_000
    for content, page in ((contents[0][1], DARK), (contents[0][3], LIGHT)):
        svg = content.decode()
        assert page.background in svg and "KL divergence from dense, nats" in svg
        assert re.search(r"<text[^>]*>[^<]*tiny, kld", svg)  # text, not outlines


def test_a_suffix_chooses_the_format(results: Path, tmp_path: Path):
    args = ["tradeoff", str(results), "--tasks", "kld", "--theme", "dark"]
    assert command.main([*args, "-o", str(tmp_path / "x.svg")]) == 0
    assert [file.name for file in tmp_path.glob("x*")] == ["x-dark.svg"]


def test_a_users_matplotlibrc_changes_nothing(results: Path):
    runs = [run for run in read_runs([results]) if run.task == "kld"]
    with matplotlib.rc_context({"axes.facecolor": "red", "font.size": 30}):
        figure = drawn(lambda page: tradeoff.draw_tradeoff(runs, page))
    assert matplotlib.colors.to_hex(figure.axes[0].get_facecolor()) == LIGHT.background


# Misuse.


def fails(capsys: pytest.CaptureFixture[str], *args: str | Path) -> str:
    """The one line that a command ends with."""
    assert command.main([str(arg) for arg in args]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def test_misuse_is_named(results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = ["-o", tmp_path / "p"]
    assert "did you mean tradeoff" in fails(capsys, "tradeof", results, *out)
    error = fails(capsys, "tradeoff", results, "--tasks", "recal", *out)
    assert "no task 'recal' (did you mean recall?); they have recall, kld" in error
    error = fails(capsys, "tradeoff", results, "--settings", "kv5", *out)
    assert "no setting 'kv5' (did you mean kv4?)" in error
    assert "no results file" in fails(capsys, "tradeoff", tmp_path / "none.json", *out)
    assert "is in" in fails(capsys, "tradeoff", results, results, *out)
    error = fails(capsys, "heads", results, "--settings", "dense", *out)
    assert "no setting with held keys among dense" in error
    assert "--delta are both given" in fails(capsys, "heads", results, "--delta", "sinks=0", *out)
    assert "is not a results file" in fails(capsys, "roofline", results, *out)
    assert "unknown chip 'M44'" in fails(capsys, "roofline", "--chips", "M44", *out)
    assert "--tokens must be <= 16384" in fails(capsys, "keys", "--tokens", "20000", *out)
    assert not list(tmp_path.glob("p*"))


@pytest.mark.parametrize("content", ["not JSON", "[]", '{"version": 1}', "{}"])
def test_other_files_are_refused(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "other.json"
    path.write_text(content)
    assert "other.json" in fails(capsys, "tradeoff", path, "-o", tmp_path / "p")
    assert "other.json" in fails(capsys, "roofline", path, "-o", tmp_path / "p")


def test_runs_that_have_only_begun(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    begun = run_entry("recall", "dense", 1, 0, 1) | {"summary": None}
    path = write_results(tmp_path / "r.json", [begun])
    assert "has no results yet" in fails(capsys, "tradeoff", path, "-o", tmp_path / "p")
    path = write_results(path, [run_entry("recall", "dense", 1, 0, 1) | {"summary": {"a": 1}}])
    assert "a run lacks" in fails(capsys, "tradeoff", path, "-o", tmp_path / "p")


def test_an_output_that_can_not_be_written(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    error = fails(capsys, "tradeoff", results, "-o", results / "p")
    assert "can't be written" in error and "results.json" in error


def test_without_matplotlib_it_says_what_to_install(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
):
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    error = fails(capsys, "tradeoff", results, "-o", tmp_path / "p")
    assert "pip install 'mlx_delta[pictures]'" in error


def test_an_interruption_is_not_an_error(results: Path, tmp_path: Path, monkeypatch: Any):
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(theme, "save", interrupt)
    assert command.main(["tradeoff", str(results), "-o", str(tmp_path / "p")]) == 130
