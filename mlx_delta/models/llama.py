"""Llama with hybrid delta attention: mlx-lm's model, with its attention and caches replaced.

Sliding-window layers keep mlx-lm's own attention: what lies outside their window is not seen at
all, so there is nothing to hold.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models import llama
from mlx_lm.models.cache import RotatingKVCache

from .common import attend, make_delta_caches, normalize_rope, read_delta
from .parts import own_part
from .pipeline import Layers
from .sharing import share_heads


@dataclass
class ModelArgs(llama.ModelArgs):
    """mlx-lm's arguments, and the setting of hybrid delta attention (``None``: dense)."""

    delta: Any = None  # DeltaConfig, or a dict or None as in config.json

    def __post_init__(self) -> None:
        """Read the setting as it stands in a config.json."""
        super().__post_init__()
        self.delta = read_delta(self.delta)

    @classmethod
    def from_dict(cls, params: dict) -> ModelArgs:
        """Arguments from a config.json, in either spelling of the rope settings."""
        return super().from_dict(normalize_rope(params))


class Attention(llama.Attention):
    """mlx-lm's attention, reading held keys where the cache has them, by blocks without a GPU."""

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        """Attend; x is [B, L, hidden], mask None, "causal" or an array."""
        return self.o_proj(attend(self, x, mask, cache))


class Model(llama.Model):
    """mlx-lm's Llama. With a setting it attends with the delta, also when given no cache."""

    args: ModelArgs

    def __init__(self, args: ModelArgs):
        super().__init__(args)
        self.model = Layers(args)
        for layer in self.layers:
            if not layer.use_sliding:
                layer.self_attn = Attention(args)

    def __call__(
        self, inputs: mx.array, cache: list[Any] | None = None, input_embeddings: Any = None
    ) -> mx.array:
        """Logits [B, L, vocabulary] of inputs [B, L]."""
        if cache is None and self.args.delta is not None:
            cache = self.make_cache(prompt_length=inputs.shape[1])
        return super().__call__(inputs, cache, input_embeddings)

    @property
    def layers(self) -> list[Any]:
        """The layers; in a pipeline of several processes, this one's own."""
        return self.model.pipeline_layers

    def shard(self, group: Any = None) -> None:
        """Keep this process's share of the heads, and of what the setting says of each."""
        share_heads(self, super().shard, group)

    def make_cache(self, prompt_length: int | None = None) -> list[Any]:
        """A new cache for each layer; see ``make_delta_caches`` for ``prompt_length``."""
        if self.args.delta is None:
            return super().make_cache()
        caches = make_delta_caches(self.layers, self.args.delta, prompt_length, own_part(self))
        return [
            RotatingKVCache(max_size=self.model.sliding_window) if layer.use_sliding else cache
            for layer, cache in zip(self.layers, caches, strict=True)
        ]
