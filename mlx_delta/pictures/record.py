"""What one kv head of a model does with a text: its keys, what is held of them, its attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_delta.attention.hybrid import attend_to_step
from mlx_delta.cache import HeldKeys
from mlx_delta.config import DeltaConfig
from mlx_delta.measure.settings import Setting
from mlx_delta.measure.sparsity import measure_sparsity
from mlx_delta.method.attention import (
    delta_keys,
    exact_pairs,
    hold,
    starts_anew,
    text_sequence,
)

MOST_TOKENS = 4096  # more than a picture has room for


@dataclass(frozen=True)
class HeadRecord:
    """A kv head and a text of N tokens.

    Attributes:
        layer: Counted from 0.
        head: Kv head, counted from 0.
        query_heads: How many query heads share it.
        config: The head's own setting.
        keys: Full keys [N, D], after RoPE.
        delta: The delta key matrix [N, D], as if all blocks were held.
        exact: Tokens [N] at which the hold starts anew: keyframes and sinks.
        far: Tokens that the last query sees as held.
        attention: [N queries, N keys], mean over the query heads.
        sparsity: Share of QK^T that a prefill of the text skips in this head.
    """

    layer: int
    head: int
    query_heads: int
    config: DeltaConfig
    keys: np.ndarray
    delta: np.ndarray
    exact: np.ndarray
    far: int
    attention: np.ndarray
    sparsity: float

    @property
    def held(self) -> np.ndarray:
        """Elements [N, D] that were held: the zeros of the delta key matrix."""
        return (self.delta == 0) & ~self.exact[:, None]

    @property
    def zero_share(self) -> float:
        """Zeros of the delta key matrix, among the keys that the last query sees as held."""
        return float(self.held[: self.far].mean())


def record_head(
    model: nn.Module, tokens: Sequence[int], setting: Setting, layer: int, head: int
) -> HeadRecord:
    """Prefill a text and record one kv head.

    Args:
        model: From :func:`mlx_delta.load`.
        tokens: Of the text.
        setting: A setting with held keys.
        layer: Counted from 0.
        head: Kv head, counted from 0.

    Raises:
        ValueError: There is no such layer or head, it holds no keys, or the text is too short.
    """
    if setting.kind not in ("delta", "paper"):
        raise ValueError(f"[record_head] {setting.name!r} holds no keys; give delta or paper.")
    caches = setting.make_caches(model, len(tokens))
    if not 0 <= layer < len(caches):
        raise ValueError(f"[record_head] layer must be 0 to {len(caches) - 1} but got {layer}.")
    cache = caches[layer]
    if not isinstance(cache, HeldKeys):
        raise ValueError(f"[record_head] layer {layer} has a sliding window and holds no keys.")
    if not 1 <= len(tokens) <= MOST_TOKENS:
        raise ValueError(
            f"[record_head] the text must have 1 to {MOST_TOKENS:,} tokens but has {len(tokens):,}."
        )
    near = cache.config.window + cache.config.block_size
    if len(tokens) <= near:
        raise ValueError(
            f"[record_head] {len(tokens)} tokens are all within the exact window; give more than "
            f"{near}."
        )
    queries, keys, scale = _seen(model, tokens, setting, caches, layer)
    if not 0 <= head < len(keys):
        raise ValueError(f"[record_head] kv head must be 0 to {len(keys) - 1} but got {head}.")
    config = cache.config.for_head(head)
    held = hold(keys[head], config)
    # By token: each by how much it differs from the one before it in the sequence of its block.
    sequence = text_sequence(keys[head], config)
    delta = np.empty_like(held)
    delta[sequence] = delta_keys(held[sequence], config)
    weights = [_weights(own, keys[head], held, config, scale) for own in queries[head]]
    rank = sum(isinstance(c, HeldKeys) for c in caches[:layer])
    return HeadRecord(
        layer=layer,
        head=head,
        query_heads=len(queries[head]),
        config=config,
        keys=keys[head],
        delta=delta,
        exact=np.array([starts_anew(t, config) for t in range(len(tokens))]),
        far=((len(tokens) - 1) // config.block_size - config.window_blocks) * config.block_size,
        attention=np.mean(weights, axis=0),
        sparsity=float(measure_sparsity(caches, len(tokens)).prefill_heads[rank, head]),
    )


def _seen(
    model: nn.Module, tokens: Sequence[int], setting: Setting, caches: list[Any], layer: int
) -> tuple[np.ndarray, np.ndarray, float]:
    """What reaches a cache: queries [Hkv, G, N, D], keys [Hkv, N, D], the factor on their scores.

    As the model hands them to its attention, whatever it is made of. Where several layers read one
    cache, their queries all count.
    """
    cache = caches[layer]
    queries: list[list[mx.array]] = []  # of each update and each layer that reads it
    keys: list[mx.array] = []
    factors: list[float] = []
    step: Any = None

    def attend(own: mx.array, new: mx.array, values: mx.array, scale: float) -> mx.array:
        nonlocal step
        if not keys or keys[-1] is not new:
            step = cache.update(new, values)
            keys.append(new)
            queries.append([])
            factors.append(float(scale))
        _, kv_heads, length, D = new.shape
        queries[-1].append(own.reshape(kv_heads, -1, length, D))
        return attend_to_step(own, step, scale)

    cache.attend = attend
    try:
        setting.prefill(model, tokens, caches)
    finally:
        del cache.attend
    joined = [mx.concatenate(layers, axis=1) for layers in queries]
    whole = mx.concatenate(joined, axis=2), mx.concatenate(keys, axis=2)[0]
    own, all_keys = (np.array(x.astype(mx.float32)) for x in whole)
    return own, all_keys, factors[0]


def _weights(
    queries: np.ndarray, keys: np.ndarray, held: np.ndarray, config: DeltaConfig, scale: float
) -> np.ndarray:
    """Attention weights [N, N] of one query head: full keys near, held keys far."""
    n = len(keys)
    scores = np.where(exact_pairs(n, n, config), queries @ keys.T, queries @ held.T) * scale
    scores = np.where(np.tri(n, dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)
