"""Names with an underscore stay in their module, and others' are listed in one place."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from mlx_delta.system.upstream import INTERNAL, PRIVATE, TESTED

ROOT = Path(__file__).parents[1]
FOLDERS = ("mlx_delta", "convert", "kernels", "examples")
FILES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


def is_private(name: str) -> bool:
    """Whether a name is for its own module only."""
    return name.startswith("_") and not name.endswith("__")


def imported(source: str) -> Iterator[str]:
    """Full names that a source imports, and attributes with an underscore of modules it imports."""
    tree = ast.parse(source)
    modules: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = "." * node.level + (f"{node.module}." if node.module else "")
            for alias in node.names:
                modules[alias.asname or alias.name] = module + alias.name
                yield module + alias.name
        elif isinstance(node, ast.Import):
            for alias in node.names:
                modules[alias.asname or alias.name.split(".")[0]] = alias.name
                yield alias.name
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = modules.get(node.value.id)
            if module is not None and is_private(node.attr):
                yield f"{module}.{node.attr}"


def private_names(source: str) -> list[str]:
    """Those of the imported names that have a part with an underscore."""
    return [name for name in imported(source) if any(map(is_private, name.split(".")))]


def own(name: str) -> bool:
    """Whether a name is of this library or of a script beside it."""
    return name.startswith((".", "mlx_delta.", "examples."))


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from .cache import _grow", [".cache._grow"]),
        ("from mlx_delta._x import y", ["mlx_delta._x.y"]),
        ("from . import chips\nchips._output()", [".chips._output"]),
        ("import mlx_lm.utils as u\nu._download", ["mlx_lm.utils._download"]),
        ("from __future__ import annotations\nself._x = x.__dict__", []),
    ],
)
def test_the_check_finds_private_names(source, found):
    assert private_names(source) == found


def test_no_module_imports_another_ones_private_names():
    found = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in FILES
        for name in private_names(path.read_text(encoding="utf-8"))
        if own(name)
    }
    assert found == set()


def test_others_private_names_are_those_that_are_listed():
    names = {name for path in FILES for name in private_names(path.read_text(encoding="utf-8"))}
    documented = {"os._exit"}  # public for all its underscore
    assert {name for name in names if not own(name)} - documented == set(PRIVATE)


def test_no_room_imports_the_package_whose_names_are_for_users():
    rooms = {path.name.removesuffix(".py") for path in (ROOT / "mlx_delta").iterdir()}
    found = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in FILES
        if path.parts[len(ROOT.parts)] != "examples"
        for name in imported(path.read_text(encoding="utf-8"))
        if name == "mlx_delta"
        or (name.count(".") == 1 and name.startswith("mlx_delta.") and name[10:] not in rooms)
    }
    assert found == set()


@pytest.mark.parametrize("name", [*PRIVATE, *INTERNAL])
def test_a_name_of_others_exists(name):
    module, _, attribute = name.rpartition(".")
    if module.startswith("lm_eval"):
        pytest.importorskip("lm_eval", reason="lm-eval comes with the extra 'evaluate'")
    assert hasattr(importlib.import_module(module), attribute)


@pytest.mark.parametrize("name", ["mlx-lm", "lm-eval"])
def test_versions_are_bounded_where_private_names_are_used(name):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    needed = [Requirement(line) for group in groups for line in group]
    oldest, newest = TESTED[name]
    bounds = [need.specifier for need in needed if need.name == name]
    assert bounds
    # lm-eval moves things within 0.4, mlx-lm with its second number.
    part = 2 if name == "lm-eval" else 1
    release = Version(newest).release
    after = ".".join(map(str, [*release[:part], release[part] + 1]))
    for bound in bounds:
        assert oldest in bound and newest in bound
        assert after not in bound and "0.1" not in bound


def test_ci_runs_the_oldest_versions():
    lines = (ROOT / ".ci" / "oldest.txt").read_text(encoding="utf-8").splitlines()
    pins = {line for line in lines if not line.startswith("#")}
    assert pins == {f"{name}=={oldest}" for name, (oldest, _) in TESTED.items()}


@pytest.mark.parametrize("name", list(TESTED))
def test_the_version_here_is_not_older_than_those_tested(name):
    try:
        here = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{name} is not installed")
    assert Version(TESTED[name][0]) <= Version(here)
