"""The devices that MLX has here."""

from __future__ import annotations

import mlx.core as mx

from .chips import chip_name


def has_gpu() -> bool:
    """Whether MLX runs on a GPU here."""
    return mx.default_device() == mx.Device(mx.gpu)


def machine_name() -> str:
    """What models run on here: an NVIDIA GPU by its name, else what :func:`chip_name` says."""
    info = mx.device_info()
    if str(info.get("architecture", "")).startswith("sm_"):  # as NVIDIA counts its own
        return str(info.get("device_name", "an NVIDIA GPU"))
    return chip_name()
