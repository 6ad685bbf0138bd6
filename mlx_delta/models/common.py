"""What the delta models share: reading their configuration, and making their caches."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_delta.attention.dense import dense_attention
from mlx_delta.attention.hybrid import delta_attention
from mlx_delta.cache import DeltaKVCache, HeldKeys
from mlx_delta.config import DeltaConfig
from mlx_delta.sensitivities import Sensitivities

from .parts import of_own_layers


def read_delta(delta: DeltaConfig | Mapping[str, Any] | None) -> DeltaConfig | None:
    """The ``delta`` entry of a config.json as a setting; ``None`` (or JSON null) is dense."""
    if delta is None or isinstance(delta, DeltaConfig):
        return delta
    return DeltaConfig.from_dict(delta)


def arguments_in(folder: Path, arguments: type) -> type:
    """A model's argument class, with the sensitivities read that lie beside it in a folder.

    For the file by which mlx-lm runs a converted directory: mlx-lm builds the model from
    config.json alone, which names the sensitivities and does not hold them.
    """

    class Arguments(arguments):  # type: ignore[misc]
        @classmethod
        def from_dict(cls, params: dict) -> Any:
            delta = read_delta(params.get("delta"))
            if delta is not None and isinstance(delta.sensitivities, str):
                found = Sensitivities.find(folder, delta.sensitivities)
                params = {**params, "delta": delta.changed(sensitivities=found)}
            return super().from_dict(params)

    return Arguments


def normalize_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Give mlx-lm the rope settings under the names it reads.

    transformers 5 writes one ``rope_parameters`` instead of ``rope_theta`` and ``rope_scaling``;
    mlx-lm's Llama would silently fall back to theta 10,000 without scaling.
    """
    config = dict(config)
    parameters = config.get("rope_parameters")
    if not parameters:
        return config
    parameters = dict(parameters)
    theta = parameters.pop("rope_theta", None)
    if theta is not None and config.get("rope_theta") is None:
        config["rope_theta"] = theta
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind != "default" and config.get("rope_scaling") is None:
        config["rope_scaling"] = parameters
    return config


def project(layer: nn.Module, x: mx.array, offset: Any) -> tuple[mx.array, mx.array, mx.array]:
    """Queries, keys and values [B, heads, L, D] of x [B, L, hidden], rotated from ``offset`` on.

    ``layer`` is an attention layer of mlx-lm's, with its usual names.
    """
    B, L, _ = x.shape
    queries = layer.q_proj(x).reshape(B, L, layer.n_heads, -1).transpose(0, 2, 1, 3)
    keys = layer.k_proj(x).reshape(B, L, layer.n_kv_heads, -1).transpose(0, 2, 1, 3)
    values = layer.v_proj(x).reshape(B, L, layer.n_kv_heads, -1).transpose(0, 2, 1, 3)
    return layer.rope(queries, offset=offset), layer.rope(keys, offset=offset), values


def attend(layer: nn.Module, x: mx.array, mask: Any, cache: Any) -> mx.array:
    """Project x [B, L, hidden] and attend, with the delta if the cache holds keys.

    Returns:
        [B, L, Hq * D], heads joined.
    """
    B, L, _ = x.shape
    queries, keys, values = project(layer, x, 0 if cache is None else cache.offset)
    attention = delta_attention if isinstance(cache, HeldKeys) else dense_attention
    output = attention(queries, keys, values, cache, layer.scale, mask)
    return output.transpose(0, 2, 1, 3).reshape(B, L, -1)


def make_delta_caches(
    layers: list[nn.Module],
    config: DeltaConfig,
    prompt_length: int | None = None,
    part: slice | None = None,
) -> list[DeltaKVCache]:
    """One cache for each layer, with that layer's own threshold.

    Args:
        layers: The model's layers.
        config: The model's setting.
        prompt_length: Length of the prompt, for settings that depend on it; without it they
            take the length of the first chunk that comes, and tiles know of no end.
        part: Which of the model's layers these are, in a pipeline.
    """
    if prompt_length is not None:
        config = config.resolve(prompt_length)
    config = of_own_layers(config, part, len(layers))
    caches = [DeltaKVCache(config.for_layer(i, len(layers))) for i in range(len(layers))]
    for cache in caches:
        cache.prompt_length = prompt_length
    return caches


def model_setting(model: nn.Module) -> DeltaConfig | None:
    """The setting that a model attends with; ``None`` is dense."""
    return getattr(getattr(model, "args", None), "delta", None)
