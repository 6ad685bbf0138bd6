"""What a model's output makes of its keys: gradients, and the queries that look at them.

A :class:`KeyProbe` takes the place of a layer's cache. Attention is dense, and differentiable
with respect to shifts added to each key and value where they are seen as far: there, and only
there, a held key or a coded one would stand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache, make_prompt_cache

from mlx_delta.cache import DeltaKVCache
from mlx_delta.config import DeltaConfig


@dataclass(frozen=True)
class Seen:
    """What a layer's attention is given for a text.

    Attributes:
        queries: [1, Hq, L, D], after RoPE.
        keys: [1, Hkv, L, D], after RoPE.
        values: [1, Hkv, L, Dv].
        scale: Factor on the scores.
    """

    queries: mx.array
    keys: mx.array
    values: mx.array
    scale: float


See = Callable[[Seen], None]


class KeyProbe(DeltaKVCache):
    """Stands in for the cache of one layer, for a whole text at once.

    Attributes:
        shift: [1, Hkv, L, D], added to the keys as far ones; 0.
        value_shift: [1, Hkv, L, Dv], added to the values as far ones; 0. Not without ``shift``.
        see: Called with what attention is given.
    """

    def __init__(self, config: DeltaConfig, see: See | None):
        super().__init__(config)
        self.shift: mx.array | None = None
        self.value_shift: mx.array | None = None
        self.see = see

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, scale: float) -> mx.array:
        """Causal attention over one text, [1, Hq, L, D]."""
        if self.see is not None:
            self.see(Seen(queries, keys, values, scale))
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
        apply_values: Any = shifted_output
        scores = apply(scores, self.shift, own, far)
        weights = mx.softmax(mx.where(causal, scores, -mx.inf), axis=-1)
        output = weights @ values[:, :, None].astype(mx.float32)
        if self.value_shift is not None:
            output = apply_values(output, self.value_shift, weights, far)
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


@mx.custom_function
def shifted_output(output: mx.array, shift: mx.array, weights: mx.array, far: mx.array) -> mx.array:
    """Output [1, Hkv, groups, L, Dv] of weights [.., L, L], with far values shifted by ``shift``.

    As of :func:`shifted_scores`, only its gradient is of interest.
    """
    return output


@shifted_output.vjp
def _shifted_output_vjp(primals: Any, cotangent: mx.array, _: mx.array) -> tuple[mx.array, ...]:
    _, _, weights, far = primals
    seen = mx.where(far, weights, 0)
    shift = (seen.swapaxes(-1, -2) @ cotangent).sum(axis=2)
    return cotangent, shift, mx.zeros_like(weights), mx.zeros_like(far)


def held_layers(model: nn.Module) -> tuple[int, ...]:
    """Which of a model's caches hold keys: all but those of windows and recurrent states."""
    caches = make_prompt_cache(model)
    return tuple(i for i, cache in enumerate(caches) if type(cache) in (KVCache, DeltaKVCache))


def watch_keys(
    model: nn.Module,
    window: Sequence[int],
    config: DeltaConfig,
    layers: Sequence[int],
    see: Callable[[int, Seen], None],
) -> None:
    """Run the model densely over a window; ``see`` gets what each layer's attention is given."""
    caches = make_probes(model, config, layers, see)
    mx.eval(model(mx.array(list(window))[None], cache=caches))


def make_probes(
    model: nn.Module,
    config: DeltaConfig,
    layers: Sequence[int],
    see: Callable[[int, Seen], None] | None,
) -> list[Any]:
    """Caches for one pass over a text: probes for these layers, the model's own elsewhere."""

    def watcher(layer: int) -> See | None:
        return None if see is None else lambda seen: see(layer, seen)

    caches = model.make_cache()
    for layer in layers:
        caches[layer] = KeyProbe(config, watcher(layer))
    return caches
