"""Imports mlx_delta before any test imports MLX, so that the tests too run on a fast BLAS."""

import mlx_delta  # noqa: F401
