"""Which back-end there is: the one place that knows.

With Metal or CUDA the kernels run, made from one set of sources (``building.py``); without, their
twins do, which are made of MLX's own operations.
"""

from __future__ import annotations

import mlx.core as mx

METAL, CUDA = "Metal", "CUDA"


def backend() -> str | None:
    """Whose kernels run here; ``None``: nobody's, as MLX has no GPU or was told not to use it."""
    if mx.default_device() != mx.Device(mx.gpu):
        return None  # MLX launches a kernel on the GPU only
    if mx.metal.is_available():
        return METAL
    return CUDA if mx.cuda.is_available() else None


def has_kernels() -> bool:
    """Whether the kernels run here."""
    return backend() is not None


def has_matrices() -> bool:
    """Whether products of small matrices are the GPU's own, in the kernels' sources.

    On CUDA they are made of exchanges between lanes: right, and slower than MLX's operations.
    """
    return backend() == METAL
