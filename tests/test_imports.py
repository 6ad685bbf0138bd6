"""Which room imports which: import-linter's contracts, on the package as it is installed.

In a checkout ``kernels/`` and ``convert/`` lie outside the package, where ``lint-imports`` does
not see them. A copy with both inside is checked here, and that planted faults are found.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("importlinter", reason="import-linter comes with the extra 'dev'")

ROOT = Path(__file__).parents[1]
FAULTS = {  # file: an import that a contract forbids
    "evaluate/tasks.py": "from mlx_delta.benchmark.timing import Spread",  # command to command
    "convert/files.py": "from mlx_delta.generate import generate",
    "measure/text.py": "from mlx_delta.calibrate.solve import Curve",  # upwards
    "ops/hold.py": "from mlx_delta.cache.buffers import grow",
    "kernels/__init__.py": "from mlx_delta.ops.hold import hold_blocks",
    "method/attention.py": "import mlx.core",
    "config.py": "from mlx_lm import load",
    "system/chips.py": "from .cli import run_command",  # half a circle
    "system/cli.py": "from .chips import Chip",
}
BROKEN = (  # as import-linter reports them
    "mlx_delta.evaluate is not allowed to import mlx_delta.benchmark",
    "mlx_delta.convert is not allowed to import mlx_delta.generate",
    "mlx_delta.measure is not allowed to import mlx_delta.calibrate",
    "mlx_delta.ops is not allowed to import mlx_delta.cache",
    "mlx_delta.kernels is not allowed to import mlx_delta.ops",
    "mlx_delta.method is not allowed to import mlx",
    "mlx_delta.config is not allowed to import mlx_lm",
    ".chips",
)


@pytest.fixture
def installed(tmp_path) -> Path:
    """A folder with the package as a wheel has it, and the contracts."""
    ignore = shutil.ignore_patterns("__pycache__", "*.safetensors", "tokenizer.json")
    shutil.copytree(ROOT / "mlx_delta", tmp_path / "mlx_delta", ignore=ignore)
    for name in ("kernels", "convert"):
        shutil.copytree(ROOT / name, tmp_path / "mlx_delta" / name, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def lint(folder: Path) -> tuple[int, str]:
    """What ``lint-imports`` says of a folder's package: status, and text in one line."""
    code = "from importlinter.cli import lint_imports_command as run; run()"
    result = subprocess.run(
        [sys.executable, "-c", code, "--no-cache", "--no-logo", "--verbose"],
        cwd=folder,
        env={"PYTHONPATH": str(folder), "COLUMNS": "200", "PATH": ""},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return result.returncode, " ".join((result.stdout + result.stderr).split())


def test_every_contract_holds_with_kernels_and_convert_inside(installed):
    status, text = lint(installed)
    assert status == 0, text
    assert "3 kept, 0 broken" in text


def test_planted_faults_are_found(installed):
    for file, line in FAULTS.items():
        path = installed / "mlx_delta" / file
        text = path.read_text(encoding="utf-8")
        path.write_text(f"{text}\n\ndef _later():\n    {line}\n", encoding="utf-8")
    status, text = lint(installed)
    assert status == 1 and "0 kept, 3 broken" in text
    assert [broken for broken in BROKEN if broken not in text] == []
