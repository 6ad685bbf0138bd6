"""The fixture for the bench's own tests, which are about the CPU."""

from __future__ import annotations

import mlx.core as mx
import pytest

from .bench import MetalBench
from .toolchain import INSTALL_HINT, find_compiler


@pytest.fixture(scope="session")
def bench() -> MetalBench:
    """A MetalBench that runs kernels on the CPU."""
    if mx.metal.is_available():
        pytest.skip("on this machine kernels run on the GPU, not on the bench")
    if find_compiler() is None:
        pytest.skip(INSTALL_HINT)
    return MetalBench()
