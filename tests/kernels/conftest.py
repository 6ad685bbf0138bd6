"""Makes the bench available to the kernels' tests."""

from ..metal_cpu.fixture import bench

__all__ = ["bench"]
