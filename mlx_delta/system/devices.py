"""The devices that MLX has here."""

from __future__ import annotations

import mlx.core as mx


def has_gpu() -> bool:
    """Whether MLX runs on a GPU here."""
    return mx.default_device() == mx.Device(mx.gpu)
