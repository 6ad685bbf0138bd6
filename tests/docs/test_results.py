"""The page of results and README's table are what the results files say."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """docs/make_results.py, which is no part of the package."""
    spec = importlib.util.spec_from_file_location("make_results", DOCS / "make_results.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_results"] = module
    spec.loader.exec_module(module)
    return module


def commands(script: ModuleType) -> dict[str, str]:
    return {run.name: "python " + " ".join(run.command("DIR")) for run in script.RUNS}


def test_the_page_is_what_the_files_say(script):
    """If not: python docs/make_results.py --page."""
    wanted = script.results_page.page(DOCS, commands(script))
    assert (DOCS / "results.md").read_text("utf-8") == wanted


def test_the_readmes_table_is_what_the_file_says(script):
    page, readme = script.results_page, (DOCS.parent / "README.md").read_text("utf-8")
    assert page.with_table(readme, page.readme_table(DOCS)) == readme
    with pytest.raises(ValueError, match=r"README.md must have <!-- results"):
        page.with_table("no marks", "")


def test_every_picture_of_the_page_is_there():
    shown = re.findall(
        r'src(?:set)?="\.\./(pictures/[^"]+)"', (DOCS / "results.md").read_text("utf-8")
    )
    assert shown and all((DOCS / name).is_file() for name in shown)


def test_every_results_file_is_one_of_the_scripts_runs(script):
    names = {run.name for run in script.RUNS}
    assert {path.stem for path in (DOCS / "results").glob("*.json")} <= names


def test_runs_are_commands_that_evaluate_takes(script):
    from mlx_delta.evaluate.command import build_parser
    from mlx_delta.evaluate.tasks import TASKS
    from mlx_delta.measure.settings import parse_settings

    for run in script.RUNS:
        args = build_parser().parse_args(run.command("DIR")[2:])
        assert all(task in TASKS or "=DIR/" in task for task in args.tasks)
        simple = [name for name in args.settings if "sparsity=" not in name]
        assert len(parse_settings(simple)) == len(simple) and args.settings[0] == "dense"


def test_a_run_without_its_files_is_left_out(script, tmp_path):
    run = next(run for run in script.RUNS if run.name == "smollm2-squad")
    assert script.missing(run, None) == script.missing(run, tmp_path) == ["squad.json"]
    (tmp_path / "squad.json").touch()
    assert script.missing(run, tmp_path) == []
    fidelity = next(run for run in script.RUNS if "fidelity" in run.tasks)
    assert script.missing(fidelity, tmp_path) == ["prose.txt.xz"]
