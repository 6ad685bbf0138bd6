"""What a model's output makes of its keys: gradients, and the queries that look at them.

A :class:`KeyProbe` takes the place of a layer's cache. Attention is dense, and differentiable
with respect to a shift added to each key where it is seen as far: there, and only there, a held
key would stand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache, make_prompt_cache

from mlx_delta.cache import DeltaKVCache
from mlx_delta.config import DeltaConfig

See = Callable[[mx.array, mx.array, float], None]


class KeyProbe(DeltaKVCache):
    """Stands in for the cache of one layer, for a whole text at once.

    Attributes:
        shift: [1, Hkv, L, D], added to the keys as far ones; 0.
        see: Called with the queries [1, Hq, L, D], the keys [1, Hkv, L, D] of the text and the
            factor on their scores.
    """

    def __init__(self, config: DeltaConfig, see: See | None):
        super().__init__(config)
        self.shift: mx.array | None = None
        self.see = see

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, scale: float) -> mx.array:
        """Causal attention over one text, [1, Hq, L, D]."""
        if self.see is not None:
            self.see(queries, keys, scale)
        if self.shift is None:
            return mx.fast.scaled_dot_product_attention(
                queries, keys, values, scale=scale, mask="causal"
            )
        _, n_heads, length, _ = queries.shape
        groups = n_heads // keys.shape[1]
        near, causal = near_and_causal(length, self.config)
        own = queries.astype(mx.float32) * scale
        own = own.reshape(1, keys.shape[1], groups, length, -1)
        scores = own @ keys[:, :, None].astype(mx.float32).swapaxes(-1, -2)
        far = mx.logical_and(causal, mx.logical_not(near))
        apply: Any = shifted_scores
        scores = apply(scores, self.shift, own, far)
        weights = mx.softmax(mx.where(causal, scores, -mx.inf), axis=-1)
        output = weights @ values[:, :, None].astype(mx.float32)
        return output.reshape(1, n_heads, length, -1).astype(queries.dtype)


def near_and_causal(length: int, config: DeltaConfig) -> tuple[mx.array, mx.array]:
    """Which pairs [L, L] of a text are computed with the full key, and which are seen at all."""
    query, key = mx.arange(length)[:, None], mx.arange(length)[None]
    size = config.block_size
    near = (key // size >= query // size - config.window_blocks) | (key < config.sinks)
    return near, key <= query


@mx.custom_function
def shifted_scores(scores: mx.array, shift: mx.array, queries: mx.array, far: mx.array) -> mx.array:
    """Scores [1, Hkv, groups, L, L] of queries with keys, shifted by ``shift`` where far.

    The shift is 0, so the scores stay as they are; only its gradient is of interest.
    """
    return scores


@shifted_scores.vjp
def _shifted_vjp(primals: Any, cotangent: mx.array, _: mx.array) -> tuple[mx.array, ...]:
    _, _, queries, far = primals
    seen = mx.where(far, cotangent, 0)
    shift = (seen.swapaxes(-1, -2) @ queries).sum(axis=2)
    return cotangent, shift, mx.zeros_like(queries), mx.zeros_like(far)


def held_layers(model: nn.Module) -> tuple[int, ...]:
    """Which of a model's caches hold keys: all but those of windows and recurrent states."""
    caches = make_prompt_cache(model)
    return tuple(i for i, cache in enumerate(caches) if type(cache) in (KVCache, DeltaKVCache))


def watch_keys(
    model: nn.Module,
    window: Sequence[int],
    config: DeltaConfig,
    layers: Sequence[int],
    see: Callable[[int, mx.array, mx.array, float], None],
) -> None:
    """Run the model densely over a window; ``see`` gets each layer's queries, keys and scale."""
    caches = make_probes(model, config, layers, see)
    mx.eval(model(mx.array(list(window))[None], cache=caches))


def make_probes(
    model: nn.Module,
    config: DeltaConfig,
    layers: Sequence[int],
    see: Callable[[int, mx.array, mx.array, float], None] | None,
) -> list[Any]:
    """Caches for one pass over a text: probes for these layers, the model's own elsewhere."""

    def watcher(layer: int) -> See | None:
        return None if see is None else lambda *seen: see(layer, *seen)

    caches = model.make_cache()
    for layer in layers:
        caches[layer] = KeyProbe(config, watcher(layer))
    return caches
