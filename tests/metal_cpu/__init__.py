"""A bench that runs Metal kernels on the CPU of any Linux machine. See README.md."""

from .bench import KernelSource, MetalBench, Outputs
from .errors import KernelError, KernelFault, KernelRejected
from .launch import Traffic

__all__ = [
    "KernelError",
    "KernelFault",
    "KernelRejected",
    "KernelSource",
    "MetalBench",
    "Outputs",
    "Traffic",
]
