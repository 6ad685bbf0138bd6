"""Prefixes of texts: kept, found again, and gone on with."""

import mlx_delta  # noqa: F401  (before MLX, for the faster BLAS)
