"""What a wheel and an sdist hold, and that a checkout works without being installed.

``kernels/`` and ``convert/`` stand beside ``mlx_delta/`` in the checkout and install inside it.
That takes some settings in pyproject.toml that are easily broken: these tests build both.
"""

import importlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# What git would not carry, and what a build leaves behind.
NOT_SOURCE = shutil.ignore_patterns(
    ".git", ".venv", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis"
)

# Where the package holds data: models, and what evaluations are made of.
DATA = ("mlx_delta/bundled/", "mlx_delta/evaluate/", "mlx_delta/measure/")

pytestmark = pytest.mark.skipif(
    not (ROOT / "pyproject.toml").is_file(), reason="the tests do not run from a checkout"
)


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Run a command and return what it printed; it must succeed."""
    # Without the caller's PYTHONPATH, which may name this checkout.
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        command,
        cwd=cwd,
        env=inherited | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.strip()


@pytest.fixture(scope="module")
def setuptools_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A PYTHONPATH on which there is the setuptools that pyproject.toml asks for.

    The extra ``test`` brings one, so only an environment made otherwise needs the package index.
    """
    try:
        if int(importlib.metadata.version("setuptools").split(".")[0]) >= 77:
            return ""
    except importlib.metadata.PackageNotFoundError:
        pass
    folder = tmp_path_factory.mktemp("setuptools")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--target", folder]
    result = subprocess.run(
        [*install, "setuptools>=77"], stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    if result.returncode:
        pytest.skip(f"no setuptools>=77 here, nor from the package index: {result.stderr[-200:]}")
    return str(folder)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, setuptools_path: str) -> dict[str, set[str]]:
    """The wheel's files, the packages in its top_level.txt, and the sdist's files."""
    source = tmp_path_factory.mktemp("source") / "mlx_delta"
    shutil.copytree(ROOT, source, ignore=NOT_SOURCE)
    if not (source / "README.md").is_file():
        (source / "README.md").write_text("")  # pyproject.toml names it
    build = "from setuptools import build_meta as b; b.build_sdist('dist'); b.build_wheel('dist')"
    run(sys.executable, "-c", build, cwd=source, PYTHONPATH=setuptools_path)
    (wheel,) = (source / "dist").glob("*.whl")
    (sdist,) = (source / "dist").glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        files = set(archive.namelist())
        (top_level,) = (name for name in files if name.endswith("top_level.txt"))
        packages = set(archive.read(top_level).decode().split())
    with tarfile.open(sdist) as archive:
        sources = {name.partition("/")[2] for name in archive.getnames()}
    return {"wheel": files, "top level": packages, "sdist": sources}


def checkout_files(folder: str) -> set[str]:
    """The names, relative to the checkout, of the source and data files in a folder."""
    return {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".")
    }


def test_the_wheel_has_one_top_level_package(built: dict[str, set[str]]):
    assert built["top level"] == {"mlx_delta"}
    assert {name.split("/")[0].split("-")[0] for name in built["wheel"]} == {"mlx_delta"}


def test_the_wheel_holds_every_module_and_data_file(built: dict[str, set[str]]):
    beside = checkout_files("kernels") | checkout_files("convert")
    expected = checkout_files("mlx_delta") | {f"mlx_delta/{name}" for name in beside}
    assert {"mlx_delta/py.typed", "mlx_delta/kernels/__init__.py"} <= expected
    assert expected - built["wheel"] == set()


def test_the_wheel_holds_nothing_else(built: dict[str, set[str]]):
    others = {name for name in built["wheel"] if ".dist-info/" not in name}
    suffixes = (".py", ".metal", ".h", "py.typed")
    strays = {name for name in others if not name.endswith(suffixes) and not name.startswith(DATA)}
    assert strays == set()
    assert {name for name in others if "test" in name} == set()
    assert any(name.endswith("licenses/LICENSE") for name in built["wheel"])


def test_the_sdist_holds_what_a_build_and_a_test_run_need(built: dict[str, set[str]]):
    folders = ("mlx_delta", "kernels", "convert", "tests")
    expected = set().union(*map(checkout_files, folders))
    expected |= {"pyproject.toml", "LICENSE", "README.md"}
    assert expected - built["sdist"] == set()


@pytest.mark.parametrize("name", ["kernels", "convert"])
def test_a_checkout_works_without_being_installed(name: str, tmp_path: Path):
    # A copy, and run from elsewhere: an installed mlx_delta must not stand in for it.
    checkout = tmp_path / "checkout"
    for folder in ("mlx_delta", "kernels", "convert"):
        shutil.copytree(ROOT / folder, checkout / folder, ignore=NOT_SOURCE)
    code = f"import mlx_delta.{name} as module; print(module.__name__, module.__file__)"
    output = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(checkout))
    assert output == f"mlx_delta.{name} {checkout / name / '__init__.py'}"


@pytest.mark.parametrize("name", ["tests", "docs", "examples"])
def test_what_else_stands_beside_the_package_is_not_found_in_it(name: str, tmp_path: Path):
    checkout = tmp_path / "checkout"
    for folder in ("mlx_delta", "kernels", "convert"):
        shutil.copytree(ROOT / folder, checkout / folder, ignore=NOT_SOURCE)
    (checkout / name).mkdir()
    (checkout / name / "__init__.py").write_text("")
    code = f"import importlib.util as u; print(u.find_spec('mlx_delta.{name}'))"
    assert run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(checkout)) == "None"


def test_every_command_has_a_console_script_and_is_listed():
    from mlx_delta.__main__ import COMMANDS

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    scripts = project["scripts"]
    runnable = {p.parent.name for p in (ROOT / "mlx_delta").glob("*/__main__.py")} | {"convert"}
    assert set(COMMANDS) == runnable
    assert set(scripts) == {"mlx_delta", *(f"mlx_delta.{name}" for name in runnable)}
    for target in scripts.values():
        module, _, function = target.partition(":")
        assert callable(getattr(importlib.import_module(module), function)), target


def test_an_unknown_kernel_is_an_error_that_names_the_known_ones():
    from mlx_delta.kernels import kernel_source

    with pytest.raises(ValueError, match=r"\[kernel_source\] filename must be one of .*'nothing'"):
        kernel_source("nothing")


def test_kernel_sources_are_read_as_text():
    from mlx_delta.kernels import kernel_source

    for path in (ROOT / "kernels").glob("*.metal"):
        assert kernel_source(path.name) == path.read_text(encoding="utf-8")
