"""delta_decode: attention straight from packed storage, against the specification."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
from typing import Any
from unittest import mock

import mlx.core as mx
import numpy as np
import pytest

from mlx_delta import DeltaConfig, DeltaKVCache
from mlx_delta.attention.hybrid import delta_attention
from mlx_delta.method import storage as ref
from mlx_delta.ops import decode_kernel
from mlx_delta.ops import pack as packing
from mlx_delta.ops.hold import block_thresholds

from ..metal_cpu import MetalBench
from ..metal_cpu.mutate import Mutation, assert_caught, without_barrier
from .common import (
    STORED,
    UNWRITTEN,
    as_float,
    config,
    each_type,
    every_run,
    fast_runs,
    on_bench,
    source_of,
    special_keys,
    walk,
    with_kernel,
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


SMALL = config(4, block_size=8, window=8, sinks=3)


@every_run
@pytest.mark.parametrize("bits", [16, 4])
def test_one_query(bench: MetalBench, bits, options):
    case = Case(config(bits, block_size=16, window=16, value_bits=bits), (90,))
    check(bench, case, **options)


@each_type
@pytest.mark.parametrize(("key_bits", "value_bits"), [(16, None), (16, 16), (4, 4), (2, 8)])
def test_types_and_widths(bench: MetalBench, dtype, key_bits, value_bits):
    check(bench, Case(config(key_bits, value_bits=value_bits), (333,), dtype=dtype))


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize(("key_bits", "value_bits"), [(16, None), (3, 4)])
def test_head_dims(bench: MetalBench, head_dim, key_bits, value_bits):
    value_bits = 16 if head_dim == 80 else value_bits
    setting = config(key_bits, value_bits=value_bits)
    check(bench, Case(setting, (200,), head_dim=head_dim, dtype=mx.float16))


@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (8, 2), (5, 1), (32, 2)], ids=str)
@pytest.mark.parametrize("steps", [1, 8])
def test_head_groupings(bench: MetalBench, heads, steps):
    check(bench, Case(config(4, value_bits=4), (150,), steps, heads))


@pytest.mark.parametrize("length", [17, 63, 64, 65, 66, 67, 1000])
@pytest.mark.parametrize("steps", [1, 3])
def test_lengths(bench: MetalBench, length, steps):
    """Queries of one step lie on both sides of a block's border, or on one."""
    check(bench, Case(SMALL, (length,), steps))


@fast_runs
@pytest.mark.parametrize("mask", [False, True], ids=["no mask", "mask"])
def test_ragged_rows(bench: MetalBench, mask, options):
    case = Case(SMALL, (1, 65, 1000, 2, 64), dtype=mx.float16)
    check(bench, case, mask, **options)


@pytest.mark.parametrize("rows", [2, 3, 5])
def test_rows(bench: MetalBench, rows):
    lengths = tuple(63 + 9 * row for row in range(rows))
    check(bench, Case(config(16, block_size=8, window=0), lengths, 2, (2, 1)))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ragged_rows_checked(bench: MetalBench, seed):
    case = Case(dataclasses.replace(SMALL, value_bits=4), (2, 40, 65), 2, (2, 1))
    check(bench, case, True, mode="checked", seed=seed)


@each_type
@pytest.mark.parametrize("kind", ["constant", "alternating", "extreme"])
@pytest.mark.parametrize("bits", [16, 4])
def test_special_keys(bench: MetalBench, bits, kind, dtype):
    scale = 1e-6 if kind == "extreme" else 0.2
    check(
        bench,
        Case(config(bits, block_size=16, window=16), (90,), 1, dtype=dtype, kind=kind, scale=scale),
    )


@pytest.mark.parametrize("kind", ["nan", "inf"])
@pytest.mark.parametrize("bits", [16, 4])
def test_what_is_not_finite_shows(bench: MetalBench, bits, kind):
    """NaN comes out as NaN. With codes an infinity does too; at 16 bits it weighs as it should."""
    case = Case(config(bits, block_size=16, window=16), (90,), kind=kind)
    cache = case.cache()
    with on_bench(bench):
        output = case.step(cache)
    if bits == 16:
        assert_close(output, case)
    else:
        assert np.isnan(output).all()


@pytest.mark.parametrize(
    "changes",
    [{"sinks": 0}, {"sinks": 40}, {"window": 0}, {"window": 48}, {"threshold": 0.0}],
    ids=str,
)
def test_settings(bench: MetalBench, changes):
    check(bench, Case(config(4, **{"block_size": 16, "window": 16, **changes}), (100,), 2))


def test_rewound_to_the_first_token(bench: MetalBench):
    case = Case(SMALL, (100,))
    cache = case.cache()
    cache.trim(99)
    case.lengths = (1,)
    with on_bench(bench):
        output = case.step(cache)
    assert_close(output, case)


def test_decode_goes_on_from_token_to_token(bench: MetalBench):
    """Blocks are finished, packed and moved together while text is generated."""
    cases = [Case(SMALL, (length,), heads=(2, 1)) for length in range(60, 90)]
    whole = Case(SMALL, (89,), heads=(2, 1))
    for case in cases:
        case.keys, case.values = whole.keys, whole.values
    cache = cases[0].cache()
    twin = copy.deepcopy(cache)
    with on_bench(bench):
        for case in cases:
            assert_close(case.step(cache), case)
    for case in cases:
        case.step(twin)
    for ours, theirs in zip(cache.keys_and_values(), twin.keys_and_values(), strict=True):
        assert mx.array_equal(ours, theirs)


@pytest.mark.parametrize("bits", [16, 4])
def test_a_text_on_the_bench_alone(bench: MetalBench, bits):
    """Prompt in chunks, then tokens: encoded, unpacked and decoded by the kernels only."""
    case = Case(config(bits, block_size=16, window=16, value_bits=bits), (90,), 3, head_dim=32)
    caches = [DeltaKVCache(case.setting) for _ in range(2)]
    outputs = []
    for cache, where in zip(caches, (on_bench(bench), contextlib.nullcontext()), strict=True):
        with where:
            for start, end in ((0, 40), (40, 87)):
                queries = mx.repeat(case.keys[:, :, start:end], 2, axis=1)
                part = (x[:, :, start:end] for x in (case.keys, case.values))
                outputs.append(as_float(delta_attention(queries, *part, cache, case.scale)))
            outputs.append(case.step(cache))
    for ours, twins in zip(outputs[:3], outputs[3:], strict=True):
        np.testing.assert_allclose(ours, twins, atol=2e-5)
    for ours, twins in zip(*(cache.keys_and_values() for cache in caches), strict=True):
        assert mx.array_equal(ours, twins)


def test_splits_do_not_matter(bench: MetalBench):
    for threadgroups in (1, 3, 1000):
        with mock.patch.object(decode_kernel, "THREADGROUPS", threadgroups):
            check(bench, Case(SMALL, (100,), 2, (2, 1)))


@pytest.mark.parametrize(("key_bits", "value_bits"), [(16, 16), (8, 8), (4, 4), (2, 4)])
@pytest.mark.parametrize("heads", [(2, 2), (8, 1)], ids=str)
def test_loads_what_it_must_and_no_more(bench: MetalBench, key_bits, value_bits, heads):
    """At most 1.1 times the packed bytes, counted over all threads; and two launches."""
    if bench.on_gpu:
        pytest.skip("the GPU does not count")
    case = Case(config(key_bits, value_bits=value_bits), (700,), heads=heads, dtype=mx.float16)
    cache = case.cache()
    traffic: dict[str, Any] = {}
    launches = []

    def counting(builder: str):
        source = source_of(builder)

        def run(**call: Any) -> Any:
            launches.append(builder)
            outputs = bench.run(source, mode="checked", **UNWRITTEN, **call)
            traffic.update({} if builder == "reduce_kernel" else outputs.traffic)
            return outputs

        return run

    decode, reduce = counting("decode_kernel"), counting("reduce_kernel")
    with (
        on_bench(bench),
        mock.patch.object(decode_kernel, "decode_kernel", lambda: decode),
        mock.patch.object(decode_kernel, "reduce_kernel", lambda: reduce),
    ):
        output = case.step(cache)
    assert_close(output, case)
    assert launches == ["decode_kernel", "reduce_kernel"]
    packed = ("masks", "payload", "offsets", "grid", "sinks", "near", "values", "scales", "biases")
    loaded = sum(traffic[name].loaded for name in packed)
    needed = needed_bytes(cache, case)
    assert loaded <= 1.1 * needed, f"{loaded} bytes for {needed}"


def needed_bytes(cache: DeltaKVCache, case: Case) -> int:
    """Bytes of the packed blocks, of the near keys and of all values, each counted once."""
    header, (length,) = json.loads(cache.state[0]), case.lengths
    heads, D, size = case.heads[1], case.head_dim, case.setting.block_size
    (blocks,) = cache.encoded
    masks = blocks * heads * (size - 1) * D // 8
    payload = 4 * header["ends"][0][-1]
    grid = 0 if case.setting.key_bits == 16 else 4 * D * blocks * heads
    near = 2 * D * heads * (length - blocks * size)
    buffers = cache.state[2 : 5 if case.setting.value_bits in (8, 4) else 3]
    values = sum(x.nbytes // x.shape[2] for x in buffers) * length
    return masks + payload + grid + near + values + 4 * blocks * heads


DECODE_MUTATIONS = [
    *(without_barrier(n) for n in (1, 2, 3, 4)),
    Mutation("no scale", "scale * float(queries", "float(queries"),
    Mutation("queries past the last", "bool exists = q < all_queries;", "bool exists = true;"),
    Mutation("channels past the last", "exists && d < D ?", "exists ?"),
    Mutation("grid past the last", "Bits < 16 && d < D;", "Bits < 16;"),
    Mutation("no low", "low[i] = has_grid ?", "low[i] = false ?"),
    Mutation("no step", "spacing[i] = has_grid ?", "spacing[i] = false ?"),
    Mutation("mask rows past the last", "if (t > 0 && t < Size) {", "if (t > 0) {"),
    Mutation("starts past the last", "if (t < Size) {", "if (true) {"),
    Mutation("no carry between tokens", "total += simd_sum(bits);", "total = simd_sum(bits);"),
    Mutation("payload from its first word", "words + first_word, key_words", "words, key_words"),
    Mutation("tokens after the last", "min(Tile, block_tokens - first)", "Tile"),
    Mutation(
        "near keys past the last channel",
        "if (!is_packed) {\n            key[i] = d < D ?",
        "if (!is_packed) {\n            key[i] = true ?",
    ),
    Mutation("keyframe past the last channel", "D - 32 * i >= 32 ?", "true ?"),
    Mutation(
        "inclusive places",
        "uint index = before + popcount(word & lanes_before(lane));",
        "uint index = before + popcount(word & (lanes_before(lane) | (1u << lane)));",
    ),
    Mutation("no carry between words", "before += popcount(word);", ""),
    Mutation("no sinks", "token + t < sizes.sinks && d < D", "false"),
    Mutation(
        "sinks past the last channel", "token + t < sizes.sinks && d < D", "token + t < sizes.sinks"
    ),
    Mutation("one sink more", "token + t < sizes.sinks", "token + t <= sizes.sinks"),
    Mutation("no sum over lanes", "product = simd_sum(product);", ""),
    Mutation("the future", "own <= position[j] && ", ""),
    Mutation("both forms of a block", "&& (block < far[j]) == is_packed", ""),
    Mutation(
        "mask not looked at", "seen = mask[long(mask_row)", "seen = true || mask[long(mask_row)"
    ),
    Mutation("mask of another step", "* sizes.queries + step[j]", "* sizes.queries"),
    Mutation("nothing seen yet", "highest[j] == new_highest ? 1.0f :", "false ? 1.0f :"),
    Mutation("no rescaling of the output", "output[j][i] *= rescale;", ""),
    Mutation("no rescaling of the weights", "weights[j] * rescale", "weights[j]"),
    Mutation("values past the last channel", "value[i] = d < D ?", "value[i] = true ?"),
    Mutation("no scale of values", "float(code) * float(scales[group])", "float(code)"),
    Mutation("no bias of values", " + float(biases[group])", ""),
    Mutation("output of no query", "if (place[j] < 0) {", "if (false) {"),
    Mutation(
        "output past the last channel",
        "if (d < D) {\n        partial",
        "if (true) {\n        partial",
    ),
    Mutation("all rows' offsets alike", "offsets += long(head) * sizes.blocks;", ""),
    Mutation("all rows' payloads alike", "payload += long(row) * sizes.payload;", ""),
]


def decode_cases() -> None:
    """Small cases that between them use every part of the kernel."""
    blocks_of_16 = {"block_size": 16, "window": 16}
    # A block that only one of the queries sees packed; all of the packed capacity in use.
    case = Case(config(4, **blocks_of_16, value_bits=16), (49, 150), 3, (3, 1), 80)
    cache = case.cache()
    mask = cache.make_mask(case.steps)
    column = mx.arange(mask.shape[-1])
    mask = mask & (column % 5 != 2)
    mask = mask & (column >= mx.array([20, 60])[:, None, None, None])  # a split sees nothing
    cases = [
        (case, mask),
        # Several slices to a block, several blocks to a split.
        (Case(config(4, window=0, value_bits=4, sinks=17), (200,), 2, (2, 2), 32), None),
        # No more values than a keyframe's.
        (Case(config(4, **blocks_of_16, sinks=0), (40,), 1, (1, 1), 80, kind="constant"), None),
    ]
    with mock.patch.object(decode_kernel, "THREADGROUPS", 8):
        for case, mask in cases:
            cache = case.cache()
            # What was fed and taken back must not be looked at.
            wrong = mx.full((len(case.lengths), case.heads[1], 2, case.head_dim), mx.nan)
            cache.update(wrong.astype(case.dtype), wrong.astype(case.dtype))
            cache.trim(2)
            output = case.step(cache, mask)
            wanted = case.expected() if mask is None else masked(case, mask)
            np.testing.assert_allclose(output, wanted, atol=1e-4)


def masked(case: Case, mask: mx.array) -> np.ndarray:
    """The outputs that MLX operations give under a mask."""
    with mock.patch.object(mx.metal, "is_available", lambda: False):
        return case.step(case.cache(), mask)


@pytest.mark.parametrize("mutation", DECODE_MUTATIONS, ids=str)
def test_decode_mutations(bench: MetalBench, mutation):
    run = with_kernel(bench, "decode_kernel", decode_cases)
    assert_caught(source_of("decode_kernel"), mutation, run)


REDUCE_MUTATIONS = [
    Mutation("channels past the last", "if (int(d) >= D) {", "if (false) {"),
    Mutation(
        "one split less",
        "for (int s = 0; s < splits; ++s) {\n    // A",
        "for (int s = 1; s < splits; ++s) {\n    // A",
    ),
    Mutation(
        "no rescaling",
        "output += partial[s * D + int(d)] * rescale;",
        "output += partial[s * D + int(d)];",
    ),
    Mutation(
        "weights not rescaled",
        "weights += sums[s * 2 + 1] * rescale;",
        "weights += sums[s * 2 + 1];",
    ),
    Mutation("not divided by the weights", "T(output / weights)", "T(output)"),
    Mutation(
        "the first split's score", "highest = max(highest, sums[s * 2]);", "highest = sums[0];"
    ),
]


@pytest.mark.parametrize("mutation", REDUCE_MUTATIONS, ids=str)
def test_reduce_mutations(bench: MetalBench, mutation):
    run = with_kernel(bench, "reduce_kernel", decode_cases)
    assert_caught(source_of("reduce_kernel"), mutation, run)
