"""Which kernels there are is known in one place."""

from __future__ import annotations

from pathlib import Path

import mlx_delta


def files_with(words: str) -> list[str]:
    root = Path(mlx_delta.__file__).parent
    return [
        file.relative_to(root).as_posix()
        for file in root.rglob("*.py")
        if words in file.read_text(encoding="utf-8")
    ]


def test_only_the_back_end_asks_for_metal():
    assert files_with("is_available") == ["ops/backend.py"]


def test_only_the_maker_makes_kernels():
    assert files_with("mx.fast.metal_kernel(") == ["ops/building.py"]
    assert files_with("mx.fast.cuda_kernel(") == ["ops/building.py"]
