"""BitNet b1.58 with hybrid delta attention: mlx-lm's model, with linears and attention replaced.

mlx-lm's ternary layers run on Metal only, and leave out the activation quantization that BitNet
is trained with; ours are :mod:`mlx_delta.ternary.linear`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models import bitnet
from mlx_lm.models.cache import KVCache

from mlx_delta.ternary.model import TernaryArgs, TernaryModel

from .common import attend, make_delta_caches, normalize_rope, read_delta


@dataclass
class ModelArgs(TernaryArgs, bitnet.ModelArgs):
    """mlx-lm's arguments, those of ternary layers, and the setting of the delta."""

    delta: Any = None  # DeltaConfig, or a dict or None (dense) as in config.json

    def __post_init__(self) -> None:
        """Read the setting as it stands in a config.json."""
        self.check()
        self.delta = read_delta(self.delta)

    @classmethod
    def from_dict(cls, params: dict) -> ModelArgs:
        """Arguments from a config.json, in either spelling of the rope settings."""
        return super().from_dict(normalize_rope(params))


class Attention(bitnet.Attention):
    """mlx-lm's attention, reading held keys where the cache has them, by blocks without a GPU."""

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        """Attend; x is [B, L, hidden], mask None, "causal" or an array."""
        return self.o_proj(self.attn_sub_norm(attend(self, x, mask, cache)))


class Model(TernaryModel, bitnet.Model):
    """mlx-lm's BitNet. With a setting it attends with the delta, also when given no cache."""

    args: ModelArgs

    def __init__(self, args: ModelArgs):
        super().__init__(args)
        for layer in self.layers:
            layer.self_attn = Attention(args)
        self.make_ternary(args)

    def __call__(self, inputs: mx.array, cache: list[Any] | None = None) -> mx.array:
        """Logits [B, L, vocabulary] of inputs [B, L]."""
        if cache is None and self.args.delta is not None:
            cache = self.make_cache(prompt_length=inputs.shape[1])
        return super().__call__(inputs, cache)

    def make_cache(self, prompt_length: int | None = None) -> list[Any]:
        """A new cache for each layer; see ``make_delta_caches`` for ``prompt_length``."""
        if self.args.delta is None:
            return [KVCache() for _ in self.layers]
        return make_delta_caches(self.layers, self.args.delta, prompt_length)
