"""Which back-end there is: the one place that knows.

With Metal or CUDA the kernels run, made from one set of sources (``building.py``); without, their
twins do, which are made of MLX's own operations. ``MLX_DELTA_KERNELS=off`` lets none run.
"""

from __future__ import annotations

import os

import mlx.core as mx

METAL, CUDA = "Metal", "CUDA"

# Read once: attention asks several times for each token and layer.
_ALLOWED = os.environ.get("MLX_DELTA_KERNELS", "").lower() != "off"


def backend() -> str | None:
    """Whose kernels run here; ``None``: nobody's, as MLX has no GPU or is not to use it."""
    if not _ALLOWED or mx.default_device() != mx.Device(mx.gpu):
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
