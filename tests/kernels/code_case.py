"""Texts with coded keys and queries for `codes_decode`, and its check against the specification."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any
from unittest import mock

import mlx.core as mx
import numpy as np

from mlx_delta import BatchDeltaKVCache, DeltaConfig
from mlx_delta.method import codes as ref
from mlx_delta.method.storage import whole_steps
from mlx_delta.method.values import encode_head, numbers_of
from mlx_delta.ops import codes_kernel
from mlx_delta.ops.storage import to_storage
from mlx_delta.widths import FIELDS

from ..attention.test_hybrid import attend
from ..metal_cpu import MetalBench
from .common import STORED, as_float, on_bench
from .decode_case import Case

# Keys on a grid are rounded to 16 bits by the specification, and are not in the kernel: the grid
# goes into the query.
TOLERANCE = {mx.float32: 3e-3, mx.float16: 4e-3, mx.bfloat16: 3e-2}


# How many rows of words there are of each kind: of a head.
Kinds = Mapping[int, int]


def coded(
    kinds: Kinds | Sequence[Kinds] = MappingProxyType({4: 8}),
    values: tuple[int, ...] | None = (4, 4),
    seed: int = 0,
    **changes: Any,
) -> DeltaConfig:
    """A setting of one layer with such rows of words, channels in a random order for each head.

    Args:
        kinds: Of all heads, or of each; none: keys are turned and coded in 4 bits.
        values: The width of each kv head's values; ``None``: they are plain.
        seed: Of the order.
        **changes: Other fields.
    """
    settings: dict[str, Any] = {"key_format": "codes", "key_bits": 4, "sinks": 4, "window": 64}
    heads = len(values) if values else 2
    if kinds:
        rng = np.random.default_rng(seed)
        widths = []
        for own in [kinds] * heads if isinstance(kinds, Mapping) else kinds:
            half = "".join(str(width) for kind, n in own.items() for width in FIELDS[kind] * n)
            widths.append("".join(rng.permutation(list(half))) * 2)
        settings["key_widths"] = (tuple(widths),)
    if values:
        settings |= {"value_bits": 4, "value_widths": (values,)}
    return DeltaConfig(**{**settings, **changes}).for_layer(0, 1)


@dataclasses.dataclass
class CodedCase(Case):
    """A case whose far keys are codes, and whose far values may be."""

    def expected(self) -> np.ndarray:
        """What the specification says, in float64."""
        queries = as_float(self.queries)
        group, size = self.heads[0] // self.heads[1], self.setting.block_size
        output = np.zeros(queries.shape)
        for row, length in enumerate(self.lengths):
            for head in range(self.heads[1]):
                keys, coded = self._keys(row, head, length)
                values, turned = self._values(row, head, length)
                for i in range(self.steps):
                    position = max(length - self.steps + i, 0)
                    far = max(0, position // size - self.setting.window_blocks) * size
                    seen = np.concatenate([coded[:far], keys[far : position + 1]])
                    read = np.concatenate([turned[:far], values[far : position + 1]])
                    for q in range(head * group, (head + 1) * group):
                        output[row, q, i] = self._softmax(queries[row, q, i], seen, read)
        return output

    def _keys(self, row: int, head: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        size, kind = self.setting.block_size, STORED[self.dtype]
        keys = as_float(to_storage(self.keys[row, head, :length]))
        written = self.setting.key_widths
        if written is None:
            widths = np.full(self.head_dim, self.setting.key_bits, np.int64)
        else:
            widths = np.array(list(map(int, (written[0] or ())[head])))
        own, rows = ref.order_of(widths)
        coded = keys.copy()
        for start in range(0, length - size + 1, size):
            block = keys[start : start + size]
            if written is None:
                block = ref.turn(block, kind)
            found = ref.decode_block(ref.code_block(block, own, rows, kind), own, rows, kind)
            coded[start : start + size] = ref.turn(found, kind) if written is None else found
        coded[: self.setting.sinks] = keys[: self.setting.sinks]
        return keys, coded

    def _values(self, row: int, head: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Near and far values [length, D] of one head."""
        if self.setting.value_format == "plain":
            stored = self._stored_values()[row, head, :length]
            return stored, stored
        near = as_float(to_storage(self.values[row, head, :length]))
        assert self.setting.value_widths is not None and self.setting.value_widths[0]
        width = self.setting.value_widths[0][head]
        codes, scales = encode_head(near, width, STORED[self.dtype])
        groups = codes.reshape(scales.size, -1)
        far = numbers_of(groups, whole_steps(scales.ravel()), width).reshape(near.shape)
        coded = far @ ref.hadamard(self.head_dim)
        coded[: self.setting.sinks] = near[: self.setting.sinks]
        return near, coded


def fed_batch(setting: DeltaConfig, head_dim: int) -> BatchDeltaKVCache:
    """Two rows of 72 and 63 tokens in blocks of 16, fed a prompt and then token by token."""
    rng = np.random.default_rng(2)
    text = [rng.normal(size=(2, n, 72, head_dim)).astype(np.float32) for n in (4, 2, 2)]
    cache = BatchDeltaKVCache([0, 9], setting)
    for steps in (40, *[1] * 32):
        mask = cache.make_mask(steps)
        at = cache.offset.tolist()[0]
        attend(cache, [x[:, :, at : at + steps] for x in text], [steps], mask)
    assert cache.encoded == (3, 2)
    return cache


def check(bench: MetalBench, case: CodedCase, mask: bool = False, **options: Any) -> None:
    """The kernel runs, and gives what the specification says."""
    cache = case.cache()
    built_in = cache.make_mask(case.steps) if mask else None
    with (
        on_bench(bench, **options),
        mock.patch.object(codes_kernel, "decode", wraps=codes_kernel.decode) as spy,
    ):
        output = case.step(cache, built_in)
    assert spy.called, "the kernel was not used"
    assert_close(output, case.expected(), case)


def assert_close(output: np.ndarray, expected: np.ndarray, case: CodedCase) -> None:
    """The outputs agree up to what the case's type allows."""
    scale = max(1.0, float(np.abs(as_float(case.values)).max()))
    tolerance = TOLERANCE[case.dtype]
    np.testing.assert_allclose(output, expected, atol=tolerance * scale, rtol=tolerance)
