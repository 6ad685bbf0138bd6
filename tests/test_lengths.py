"""A file has one subject: more than 400 lines say in their first lines why they are together."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MOST = 400
REASON = "Over 400 lines: "
SOURCES = (".py", ".metal", ".h", ".cpp", ".sh", ".toml", ".yml")
FOLDERS = ("mlx_delta", "kernels", "convert", "tests", "examples", ".github", ".ci")


def too_long(path: Path) -> bool:
    """Whether a file is longer than it may be, and gives no reason."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return len(lines) > MOST and not any(REASON in line for line in lines[:15])


@pytest.mark.parametrize("folder", FOLDERS)
def test_files_are_short_or_say_why_not(folder):
    files = (path for path in (ROOT / folder).rglob("*") if path.suffix in SOURCES)
    assert [str(path.relative_to(ROOT)) for path in files if too_long(path)] == []


def test_a_long_file_is_noticed(tmp_path):
    file = tmp_path / "long.py"
    file.write_text("\n" * (MOST + 1))
    assert too_long(file)
    file.write_text("# Over 400 lines: one table.\n" + "\n" * MOST)
    assert not too_long(file)
    file.write_text("\n" * MOST)
    assert not too_long(file)
