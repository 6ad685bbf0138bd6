"""mlx-lm's own tests: fetched from the package index, listed, imported.

mlx-lm's wheel leaves its tests out; the sdist of the same version carries them. They are fetched
once, by pip with whatever index it is set up for, and kept in the user's cache folder.
"""

import ast
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from types import ModuleType

VERSION = importlib.metadata.version("mlx-lm")


class CannotFetch(Exception):
    """The package index cannot be reached, or has no such sdist; the message is pip's."""


def fetch_tests() -> Path:
    """Return the folder of the tests of the installed mlx-lm.

    Raises:
        CannotFetch: They are not in the cache, and pip cannot download them.
    """
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(base, "mlx_delta", f"mlx-lm-{VERSION}-tests")
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as aside:
            made = _download(Path(aside))
            try:
                made.rename(folder)  # whole or not at all
            except OSError:
                if not folder.is_dir():  # else another process was first
                    raise
    return folder


def _download(aside: Path) -> Path:
    """Download the sdist and unpack its tests; returns their folder."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    result = subprocess.run(
        [*pip, "--no-deps", "--no-binary=mlx-lm", f"--dest={aside}", f"mlx-lm=={VERSION}"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise CannotFetch(f"pip cannot download the sdist of mlx-lm {VERSION}: {reason}")
    (sdist,) = aside.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(aside, filter="data")
    (tests,) = aside.glob("*/tests")
    return tests


def list_tests(file: Path) -> list[str]:
    """Return the tests of a file as "Class.method", without importing it."""
    return [
        f"{node.name}.{method.name}"
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef)
        for method in node.body
        if isinstance(method, ast.FunctionDef) and method.name.startswith("test_")
    ]


def import_tests(file: Path) -> ModuleType:
    """Import a file of tests as a new module, so that names patched in it touch no other run."""
    spec = importlib.util.spec_from_file_location(f"mlx_lm_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
