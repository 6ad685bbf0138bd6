"""Which back-end there is: the one place that knows.

With Metal the kernels run; without, their twins do, which are made of MLX's own operations. Another
back-end with kernels of its own enters here, and its launchers stand beside those of Metal.
"""

from __future__ import annotations

import mlx.core as mx


def has_kernels() -> bool:
    """Whether the kernels run here."""
    return mx.metal.is_available()
