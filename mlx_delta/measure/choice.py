"""Choosing settings for a model: which it can have, and the delta to load it with."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import mlx.nn as nn

from mlx_delta.config import DeltaConfig
from mlx_delta.loading import find_model, read_config, read_setting
from mlx_delta.models import get_model_classes, has_class
from mlx_delta.models.queries import query_sensitivities
from mlx_delta.system.kv import written_fields

from .settings import Setting, parse_settings


def choose_settings(
    model: str, names: list[str], changes: str | None = None
) -> tuple[DeltaConfig | None, list[Setting]]:
    """The delta to load a model with, and the settings of these names.

    A model is loaded with the delta's attention, which is dense on a dense cache; one of a kind
    that has none is loaded as it is, for settings that need none.

    Args:
        model: A directory, a hub name or a bundled model.
        names: As :func:`parse_settings` takes them.
        changes: What ``delta`` stands for differs in this from the model's own setting, as
            :func:`written_fields` reads it; ``None``: in nothing.

    Raises:
        ValueError: A setting is unknown, or the model can't have it.
    """
    path = find_model(model)
    config = read_config(path)
    own = read_setting(path, config) or DeltaConfig()
    delta = own.changed(**written_fields(changes or ""))
    settings = parse_settings(names, delta)
    needing = [setting.name for setting in settings if setting.delta is not None]
    try:
        get_model_classes(config)
    except ValueError as error:
        if needing:
            raise ValueError(
                f"setting {needing[0]!r} needs a delta model: {error} Settings without it are "
                "dense, kv8, kv4, kv4-rotated, kivi4, kivi2 and rotating:N."
            ) from error
        return None, settings
    if not needing and not has_class(config):
        return None, settings  # it may be one that the delta can't be applied to
    return delta, settings


def with_samples(settings: Sequence[Setting], model: nn.Module, tokenizer: Any) -> list[Setting]:
    """The settings, ``uncalibrated`` ones with what ``load`` finds for such a model."""
    found = []
    for setting in settings:
        if setting.sampled and setting.delta is not None:
            sensitivities = query_sensitivities(model, tokenizer, setting.delta)
            delta = setting.delta.changed(sensitivities=sensitivities)
            setting = dataclasses.replace(setting, delta=delta)
        found.append(setting)
    return found
