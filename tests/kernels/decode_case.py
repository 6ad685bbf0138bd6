"""One text with queries for `delta_decode`, and its check against the specification."""

from __future__ import annotations

import dataclasses
from typing import Any
from unittest import mock

import mlx.core as mx
import numpy as np

from mlx_delta import DeltaConfig, DeltaKVCache
from mlx_delta.attention.hybrid import delta_attention
from mlx_delta.method import storage as ref
from mlx_delta.ops import decode_kernel
from mlx_delta.ops import pack as packing
from mlx_delta.ops.hold import block_thresholds

from ..metal_cpu import MetalBench
from .common import (
    STORED,
    as_float,
    on_bench,
    special_keys,
    walk,
)

TOLERANCE = {mx.float32: 2e-5, mx.float16: 2e-3, mx.bfloat16: 1.6e-2}


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

    def expected(self) -> np.ndarray:
        """What the specification says, in float64."""
        queries, values = as_float(self.queries), self._stored_values()
        group = self.heads[0] // self.heads[1]
        output = np.zeros(queries.shape)
        for row, length in enumerate(self.lengths):
            for head in range(self.heads[1]):
                keys, held = self._keys(row, head, length)
                for i in range(self.steps):
                    position = length - self.steps + i
                    far = max(0, position // self.setting.block_size - self.setting.window_blocks)
                    near = far * self.setting.block_size
                    seen = np.concatenate([held[:near], keys[near : position + 1]])
                    for q in range(head * group, (head + 1) * group):
                        output[row, q, i] = self._softmax(
                            queries[row, q, i], seen, values[row, head, : position + 1]
                        )
        return output

    def _softmax(self, query: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore", over="ignore"):
            scores = keys.astype(np.float64) @ query * self.scale
            weights = np.exp(scores - scores.max())
            return weights @ values / weights.sum()

    def _keys(self, row: int, head: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Full and held keys [length, D] of one head, both as they are stored."""
        bits, size = self.setting.key_bits, self.setting.block_size
        assert bits is not None
        stored = packing.to_storage(self.keys[row, head, :length])
        kind = STORED[self.dtype]
        keys = as_float(stored)
        held = keys.copy()
        for start in range(0, length - size + 1, size):
            block = keys[start : start + size]
            threshold = np.array(block_thresholds(mx.array(block)[None, None, None], self.setting))
            sinks, mean = self.setting.sinks, self.setting.run_value == "mean"
            values = ref.mean_block(block, threshold, start, sinks)[0] if mean else block
            if bits < 16:
                grid = ref.block_grid(block, bits, kind)
                values = ref.decode_values(ref.encode_values(values, grid, bits), grid, kind)
            else:
                values = ref.stored_values(values, kind)
            if not mean:
                values = ref.hold_block(block, values, threshold, start, sinks)
            held[start : start + size] = values
        held[: self.setting.sinks] = keys[: self.setting.sinks]
        return keys, held

    def _stored_values(self) -> np.ndarray:
        bits = self.setting.value_bits
        if bits is None:
            return as_float(self.values)
        stored = packing.to_storage(self.values)
        if bits == 16:
            return as_float(stored)
        group = 64 if self.head_dim % 64 == 0 else 32
        words, scales, biases = mx.quantize(stored, group, bits)
        wide = (scales.astype(mx.float32), biases.astype(mx.float32))
        return as_float(mx.dequantize(words, *wide, group, bits))


def check(bench: MetalBench, case: Case, mask: bool = False, **options: Any) -> None:
    """The kernel runs, and gives what the specification says."""
    cache = case.cache()
    built_in = cache.make_mask(case.steps) if mask else None
    with (
        on_bench(bench, **options),
        mock.patch.object(decode_kernel, "decode", wraps=decode_kernel.decode) as spy,
    ):
        output = case.step(cache, built_in)
    assert spy.called, "the kernel was not used"
    assert_close(output, case)


def assert_close(output: np.ndarray, case: Case) -> None:
    scale = max(1.0, float(np.abs(as_float(case.values)).max()))
    tolerance = TOLERANCE[case.dtype]
    np.testing.assert_allclose(output, case.expected(), atol=tolerance * scale, rtol=tolerance)
