"""The `bench` fixture; a project's conftest.py has `from .metal_cpu.fixture import bench`."""

from __future__ import annotations

import mlx.core as mx
import pytest

from .bench import MetalBench
from .toolchain import INSTALL_HINT, find_compiler


@pytest.fixture(scope="session")
def bench() -> MetalBench:
    """A MetalBench; the test is skipped where there is neither a GPU nor a compiler."""
    if not mx.metal.is_available() and find_compiler() is None:
        pytest.skip(INSTALL_HINT)
    return MetalBench()
