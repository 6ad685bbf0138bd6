"""Which kernels there are is known in one place."""

from __future__ import annotations

from pathlib import Path

import mlx_delta


def test_only_the_back_end_asks_for_metal():
    root = Path(mlx_delta.__file__).parent
    asking = [
        file.relative_to(root).as_posix()
        for file in root.rglob("*.py")
        if "is_available" in file.read_text(encoding="utf-8")
    ]
    assert asking == ["ops/backend.py"]
