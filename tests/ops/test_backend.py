"""Which kernels there are is known in one place."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import mlx_delta

ROOT = Path(__file__).parents[2]


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


def test_kernels_can_be_turned_off():
    code = (
        "import mlx_delta, mlx.core as mx; from tests.gpus import seems_to_have; "
        "from mlx_delta.ops.backend import METAL, backend; "
        "exec('with seems_to_have(METAL): print(backend())')"
    )
    for value, wanted in (("off", "None"), ("on", "Metal")):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "MLX_DELTA_KERNELS": value},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == wanted
