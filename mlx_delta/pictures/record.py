"""What one kv head of a model does with a text: its keys, what is held of them, its attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_delta.cache import HeldKeys
from mlx_delta.config import DeltaConfig
from mlx_delta.measure.settings import Setting
from mlx_delta.measure.sparsity import measure_sparsity
from mlx_delta.method.attention import delta_keys, exact_pairs, hold, starts_anew

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


class _Listener(nn.Module):
    """Stands in for a layer's attention and keeps what comes in."""

    def __init__(self, attention: nn.Module):
        super().__init__()
        self.attention = attention
        self.seen: list[mx.array] = []

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> Any:
        self.seen = [*self.seen, x]
        return self.attention(x, mask, cache)


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
    queries, keys = _projected(model, tokens, setting, caches, layer)
    if not 0 <= head < len(keys):
        raise ValueError(f"[record_head] kv head must be 0 to {len(keys) - 1} but got {head}.")
    config = cache.config.for_head(head)
    group = len(queries) // len(keys)
    held = hold(keys[head], config)
    scale = float(model.layers[layer].self_attn.scale)
    own = queries[head * group : (head + 1) * group]
    rank = sum(isinstance(c, HeldKeys) for c in caches[:layer])
    return HeadRecord(
        layer=layer,
        head=head,
        query_heads=group,
        config=config,
        keys=keys[head],
        delta=delta_keys(held, config),
        exact=np.array([starts_anew(t, config) for t in range(len(tokens))]),
        far=((len(tokens) - 1) // config.block_size - config.window_blocks) * config.block_size,
        attention=np.mean([_weights(q, keys[head], held, config, scale) for q in own], axis=0),
        sparsity=float(measure_sparsity(caches, len(tokens)).prefill_heads[rank, head]),
    )


def _projected(
    model: nn.Module, tokens: Sequence[int], setting: Setting, caches: list[Any], layer: int
) -> tuple[np.ndarray, np.ndarray]:
    """Queries [Hq, N, D] and keys [Hkv, N, D] of a layer, after RoPE, as the setting makes them."""
    attention = model.layers[layer].self_attn
    listener = _Listener(attention)
    model.layers[layer].self_attn = listener
    try:
        setting.prefill(model, tokens, caches)
    finally:
        model.layers[layer].self_attn = attention
    x = mx.concatenate(listener.seen, axis=1)
    rotated = []
    for projection, heads in (
        (attention.q_proj, attention.n_heads),
        (attention.k_proj, attention.n_kv_heads),
    ):
        rows = projection(x).reshape(1, len(tokens), heads, -1).transpose(0, 2, 1, 3)
        rotated.append(np.array(attention.rope(rows)[0].astype(mx.float32)))
    return rotated[0], rotated[1]


def _weights(
    queries: np.ndarray, keys: np.ndarray, held: np.ndarray, config: DeltaConfig, scale: float
) -> np.ndarray:
    """Attention weights [N, N] of one query head: full keys near, held keys far."""
    n = len(keys)
    scores = np.where(exact_pairs(n, n, config), queries @ keys.T, queries @ held.T) * scale
    scores = np.where(np.tri(n, dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)
