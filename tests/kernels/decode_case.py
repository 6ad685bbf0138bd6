"""One text with queries for a decode kernel; its subclasses know what far keys are."""

from __future__ import annotations

import dataclasses
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_delta import DeltaConfig, DeltaKVCache
from mlx_delta.attention.hybrid import delta_attention
from mlx_delta.ops.storage import to_storage

from .common import as_float, special_keys, walk


@dataclasses.dataclass
class Case:
    """Texts in a cache, and the queries of one step.

    Attributes:
        setting: Of the cache.
        lengths: Tokens of each row, the step's included.
        steps: Queries of each row.
        heads: Query heads, and kv heads.
    """

    setting: DeltaConfig
    lengths: tuple[int, ...] = (200,)
    steps: int = 1
    heads: tuple[int, int] = (4, 2)
    head_dim: int = 64
    dtype: mx.Dtype = mx.float32
    kind: str = ""
    scale: float = 0.2

    def __post_init__(self):
        longest, rows = max(self.lengths), len(self.lengths)
        shape = (rows, self.heads[1], longest, self.head_dim)
        rng = np.random.default_rng(longest)
        keys = walk(shape, self.dtype)
        self.keys = special_keys(self.kind, shape, self.dtype) if self.kind else keys
        self.values = mx.array(rng.normal(size=shape)).astype(self.dtype)
        queries = rng.normal(size=(rows, self.heads[0], self.steps, self.head_dim))
        self.queries = mx.array(queries).astype(self.dtype)

    def cache(self) -> Any:
        """A cache that holds all but the step's tokens."""
        caches = []
        for row, length in enumerate(self.lengths):
            cache = DeltaKVCache(self.setting)
            before = length - self.steps
            if before:
                cache.update(*(x[row : row + 1, :, :before] for x in (self.keys, self.values)))
            caches.append(cache)
        return caches[0] if len(caches) == 1 else DeltaKVCache.merge(caches)

    def step(self, cache: Any, mask: Any = None) -> np.ndarray:
        """The step's outputs, [rows, Hq, steps, D]."""
        new = []
        for x in (self.keys, self.values):
            parts = [
                x[row : row + 1, :, length - self.steps : length]
                for row, length in enumerate(self.lengths)
            ]
            new.append(mx.concatenate(parts))
        return as_float(delta_attention(self.queries, *new, cache, self.scale, mask))

    def _softmax(self, query: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore", over="ignore"):
            scores = keys.astype(np.float64) @ query * self.scale
            weights = np.exp(scores - scores.max())
            return weights @ values / weights.sum()

    def _stored_values(self) -> np.ndarray:
        """Plain values, float32."""
        return as_float(self.values if self.setting.value_bits is None else to_storage(self.values))
