"""Where files of this library lie in a user's home."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_folder() -> Path:
    """Converted models and measurements: ``MLX_DELTA_CACHE``, or the user's folder for caches."""
    if given := os.environ.get("MLX_DELTA_CACHE"):
        return Path(given).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "mlx_delta"
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The specification asks to ignore relative ones.
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "mlx_delta"
