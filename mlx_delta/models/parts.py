"""Settings of a part of a model: of some of its layers, or of a share of their heads."""

from __future__ import annotations

from typing import Any

import mlx.nn as nn

from mlx_delta.config import DeltaConfig
from mlx_delta.sensitivities import Sensitivities


def own_part(model: nn.Module) -> slice | None:
    """Which layers of a model this process has, in a pipeline of several; ``None`` for all."""
    inner: Any = getattr(model, "model", None)
    if getattr(inner, "pipeline_size", 1) == 1:
        return None
    return slice(inner.start_idx, inner.end_idx)


def of_own_layers(config: DeltaConfig, part: slice | None, n_own: int) -> DeltaConfig:
    """The setting of a process's own layers; what is of so many already stays.

    Args:
        config: The setting, of all layers or of these.
        part: Which ones these are; ``None`` for all.
        n_own: How many these are.
    """
    if part is None:
        return config
    fields: dict[str, Any] = {}
    found = config.sensitivities
    if isinstance(found, Sensitivities) and len(found.layers) != n_own:
        fields["sensitivities"] = found.for_part(part)
    config = config.with_widths()  # by all layers' needs
    for name in ("threshold", "key_widths", "value_widths"):
        values = getattr(config, name)
        if isinstance(values, tuple) and len(values) != n_own:
            fields[name] = values[part]
    return config.changed(**fields) if fields else config


def share_of_heads(config: DeltaConfig, rank: int, size: int) -> DeltaConfig:
    """The setting of the ``rank``-th of ``size`` equal shares of each layer's kv heads."""
    fields: dict[str, Any] = {}
    config = config.with_widths()  # by all heads' needs
    if isinstance(config.sensitivities, Sensitivities):
        fields["sensitivities"] = config.sensitivities.share_of_heads(rank, size)
    for name in ("threshold", "key_widths", "value_widths"):
        values = getattr(config, name)
        if isinstance(values, tuple):
            fields[name] = tuple(
                x[len(x) * rank // size : len(x) * (rank + 1) // size]
                if isinstance(x, tuple)
                else x
                for x in values
            )
    return config.changed(**fields) if fields else config
