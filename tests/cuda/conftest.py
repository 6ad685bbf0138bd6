"""Makes the bench available to the tests of the kernels as CUDA."""

from ..metal_cpu.fixture import bench

__all__ = ["bench"]
